//! Reads a body as it arrives, and inflates one that is gzip by its magic bytes, whatever Content-Encoding says.
//!
//! Stream signs the uncompressed bytes, so a receiver must inflate before it can authenticate. What a stranger can make it
//! spend is bounded: until the signature has matched only the bytes that arrived are kept. A gzip body is inflated twice, once
//! through the signature check keeping nothing, and again into memory of a length that is known by then. One that is over within
//! the first step, with which nobody else's turn comes, is kept from there.

use crate::{reason::Reason, signature::Verifier};
use flate2::bufread::GzDecoder;
use std::io::{self, BufRead, Read};

const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
/// The first allocation, in bytes: most events fit, and a stranger's connection costs no more than this.
const FIRST_ALLOCATION: usize = 4096;
/// Bytes that any body may inflate to. Chosen: the largest events of the protocol's samples are a tenth of it.
const FREE: usize = 256 << 10;
/// Beyond [`FREE`], bytes for each byte on the wire. Chosen: chat text of one repeated letter is 56:1, a bomb 1000:1.
const RATIO: usize = 200;
/// Members of one gzip body, and bytes of each optional field in a member's header (RFC 1952, 2.3). Stream sends one member
/// without such fields; each member costs a decoder.
const MAX_MEMBERS: usize = 16;
const MAX_HEADER_FIELD: usize = 1 << 10;
/// Bytes that one step inflates, and bytes of the wire that it may take for them: a stream of empty blocks inflates to nothing and
/// costs a table each. A few milliseconds at the most, after which other requests have their turn.
const STEP: usize = 128 << 10;
const WIRE_STEP: usize = 64 << 10;
const BUFFER: usize = 16 << 10;

/// Bytes that an inflation holds beside its input and output: the decoder's window and tables (48 KiB), and a buffer.
pub const INFLATION: usize = (48 << 10) + BUFFER;

/// Collects the bytes of one request body. Errors are final: drop it.
#[derive(Debug)]
pub struct WireBody {
    bytes: Vec<u8>,
    verifier: Verifier,
    limit: usize,
    /// Unknown until two bytes have come.
    is_gzip: Option<bool>,
}

/// A body that came whole.
#[derive(Debug)]
pub enum Whole {
    /// Found to be signed by the app.
    Signed(Vec<u8>),
    /// Not known yet: the signature is over what it inflates to.
    Gzip(Gzip),
}

impl WireBody {
    /// `limit`: the most bytes on the wire.
    pub fn new(verifier: Verifier, limit: usize) -> WireBody {
        WireBody { bytes: Vec::new(), verifier, limit, is_gzip: None }
    }

    /// By how many bytes the buffer has to grow for a piece of this length: by doubling, and never beyond the limit. The caller
    /// pays for them from its budget before it pushes the piece.
    pub fn growth(&self, piece: usize) -> Result<usize, Reason> {
        let length = self.bytes.len().saturating_add(piece);
        if length > self.limit {
            return Err(Reason::TooLarge);
        }
        let capacity = self.bytes.capacity();
        if length <= capacity {
            return Ok(0);
        }
        Ok(length.max(capacity.saturating_mul(2)).max(FIRST_ALLOCATION).min(self.limit) - capacity)
    }

    /// Takes the next piece from the wire.
    pub fn push(&mut self, piece: &[u8]) -> Result<(), Reason> {
        let grown = self.bytes.capacity() + self.growth(piece.len())?;
        self.bytes.reserve_exact(grown - self.bytes.len());
        self.bytes.extend_from_slice(piece);
        match self.is_gzip {
            Some(true) => {}
            Some(false) => self.verifier.update(piece),
            None if self.bytes.len() < GZIP_MAGIC.len() => {}
            None => {
                let is_gzip = self.bytes.starts_with(&GZIP_MAGIC);
                self.is_gzip = Some(is_gzip);
                if !is_gzip {
                    self.verifier.update(&self.bytes);
                }
            }
        }
        Ok(())
    }

    /// The end of the body. A plain one is checked here.
    pub fn finish(mut self) -> Result<Whole, Reason> {
        if self.is_gzip == Some(true) {
            return Ok(Whole::Gzip(Gzip { wire: self.bytes, verifier: self.verifier }));
        }
        if self.is_gzip.is_none() {
            self.verifier.update(&self.bytes);
        }
        if self.verifier.verify() { Ok(Whole::Signed(self.bytes)) } else { Err(Reason::WrongSignature) }
    }
}

/// A gzip body that came whole and was not inflated yet.
#[derive(Debug)]
pub struct Gzip {
    wire: Vec<u8>,
    verifier: Verifier,
}

impl Gzip {
    /// Begins the first pass. `limit`: the most bytes that it may inflate to.
    pub fn check(&self, limit: usize) -> Result<Check<'_>, Reason> {
        let most = limit.min(FREE.saturating_add(self.wire.len().saturating_mul(RATIO)));
        let members = Members::new(&self.wire)?;
        Ok(Check { members, verifier: self.verifier.clone(), most, length: 0, buffer: vec![0; BUFFER] })
    }

    /// Begins the second pass. `length`: what the first one found.
    pub fn inflate(&self, length: usize) -> Result<Inflate<'_>, Reason> {
        Ok(Inflate { members: Members::new(&self.wire)?, bytes: vec![0; length], filled: 0 })
    }
}

/// A gzip body that was found to be signed by the app.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Checked {
    /// It was over within the first step: here it is.
    Short(Vec<u8>),
    /// It inflates to so many bytes.
    Long(usize),
}

/// The first pass: who signed it, and how long it is.
#[derive(Debug)]
pub struct Check<'w> {
    members: Members<'w>,
    verifier: Verifier,
    most: usize,
    length: usize,
    buffer: Vec<u8>,
}

impl Check<'_> {
    /// Goes on for a while. Returns what is known of the body once all of it was found to be signed by the app.
    pub fn step(&mut self) -> Result<Option<Checked>, Reason> {
        let mut inflated = 0;
        // Gone with this call, unless the body is over and signed by then.
        let mut kept = (self.length == 0).then(Vec::new);
        self.members.ration = WIRE_STEP;
        while inflated < STEP {
            let read = match self.members.read(&mut self.buffer)? {
                Piece::Bytes(read) => read,
                Piece::Rationed => break,
                Piece::End => return self.verified(kept).map(Some),
            };
            inflated += read;
            self.length += read;
            if self.length > self.most {
                return Err(Reason::TooLarge);
            }
            let piece = self.buffer.get(..read).unwrap_or_default();
            self.verifier.update(piece);
            if let Some(kept) = &mut kept {
                kept.extend_from_slice(piece);
            }
        }
        Ok(None)
    }

    fn verified(&self, kept: Option<Vec<u8>>) -> Result<Checked, Reason> {
        if !self.verifier.clone().verify() {
            return Err(Reason::WrongSignature);
        }
        Ok(match kept.filter(|kept| kept.len() == self.length) {
            Some(mut whole) => {
                whole.shrink_to_fit();
                Checked::Short(whole)
            }
            None => Checked::Long(self.length),
        })
    }
}

/// The second pass: into memory.
#[derive(Debug)]
pub struct Inflate<'w> {
    members: Members<'w>,
    bytes: Vec<u8>,
    filled: usize,
}

impl Inflate<'_> {
    /// Goes on for a while. Returns the body once it is whole.
    pub fn step(&mut self) -> Result<Option<Vec<u8>>, Reason> {
        let until = self.filled.saturating_add(STEP).min(self.bytes.len());
        self.members.ration = WIRE_STEP;
        while let Some(rest) = self.bytes.get_mut(self.filled..until).filter(|rest| !rest.is_empty()) {
            match self.members.read(rest)? {
                Piece::Bytes(read) => self.filled += read,
                Piece::Rationed => break,
                // Shorter than a moment ago: that cannot be.
                Piece::End => return Err(Reason::BadGzip),
            }
        }
        let is_whole = self.filled == self.bytes.len();
        Ok(is_whole.then(|| std::mem::take(&mut self.bytes)))
    }
}

/// The members of a gzip body, one after the other (RFC 1952, 2.2).
struct Members<'w> {
    /// None after the last one.
    decoder: Option<GzDecoder<Rationed<'w>>>,
    begun: usize,
    /// Bytes of the wire that may still be taken in this step.
    ration: usize,
}

/// What a look at the members brings.
enum Piece {
    Bytes(usize),
    /// The step's ration of the wire is used up.
    Rationed,
    /// The last member is over, and its checksum and length are right.
    End,
}

/// The wire, of which a decoder gets only so much at a time.
struct Rationed<'w> {
    rest: &'w [u8],
    ration: usize,
}

impl BufRead for Rationed<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        match self.rest.get(..self.ration.min(self.rest.len())) {
            Some([]) | None if !self.rest.is_empty() => Err(io::ErrorKind::WouldBlock.into()),
            piece => Ok(piece.unwrap_or_default()),
        }
    }

    fn consume(&mut self, amount: usize) {
        self.rest = self.rest.get(amount..).unwrap_or_default();
        self.ration = self.ration.saturating_sub(amount);
    }
}

impl Read for Rationed<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let length = self.fill_buf()?.read(into)?;
        self.consume(length);
        Ok(length)
    }
}

impl std::fmt::Debug for Members<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Members").field("begun", &self.begun).finish_non_exhaustive()
    }
}

impl<'w> Members<'w> {
    fn new(wire: &'w [u8]) -> Result<Members<'w>, Reason> {
        let mut members = Members { decoder: None, begun: 0, ration: WIRE_STEP };
        members.begin(wire)?;
        Ok(members)
    }

    fn begin(&mut self, wire: &'w [u8]) -> Result<(), Reason> {
        self.begun += 1;
        let decoder = GzDecoder::new(Rationed { rest: wire, ration: self.ration });
        if self.begun > MAX_MEMBERS {
            return Err(Reason::BadGzip);
        }
        self.decoder = Some(decoder);
        Ok(())
    }

    /// Fills some of the buffer.
    fn read(&mut self, into: &mut [u8]) -> Result<Piece, Reason> {
        while let Some(decoder) = &mut self.decoder {
            decoder.get_mut().ration = self.ration;
            let read = decoder.read(into);
            let Rationed { rest, ration } = *decoder.get_ref();
            self.ration = ration;
            // Known once the header is whole. One that breaks off, or is none, is an error of the read.
            let is_too_long = decoder.header().is_some_and(|header| {
                let fields = [header.extra(), header.filename(), header.comment()];
                fields.into_iter().flatten().any(|field| field.len() > MAX_HEADER_FIELD)
            });
            match read {
                Ok(_) if is_too_long => return Err(Reason::BadGzip),
                Ok(0) => {}
                Ok(read) => return Ok(Piece::Bytes(read)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Piece::Rationed),
                Err(_) => return Err(Reason::BadGzip),
            }
            self.decoder = None;
            if !rest.is_empty() {
                self.begin(rest)?;
            }
        }
        Ok(Piece::End)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::signature::SigningKey;
    use flate2::{Compression, GzBuilder, write::GzEncoder};
    use proptest::prelude::*;
    use std::io::Write;

    fn gzip(body: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(body).unwrap();
        encoder.finish().unwrap()
    }

    fn read(wire: &[u8], piece: usize, signed: &[u8], limit: usize) -> Result<Vec<u8>, Reason> {
        let key = SigningKey::new(b"secret");
        let verifier = Verifier::new(std::slice::from_ref(&key), key.sign(signed));
        let mut body = WireBody::new(verifier, limit);
        for piece in wire.chunks(piece) {
            let grown = body.bytes.capacity() + body.growth(piece.len())?;
            body.push(piece)?;
            assert_eq!(body.bytes.capacity(), grown, "all that it holds was announced");
            assert!(grown <= limit);
        }
        let zipped = match body.finish()? {
            Whole::Signed(bytes) => return Ok(bytes),
            Whole::Gzip(zipped) => zipped,
        };
        let length = match finished(|mut check: Check<'_>| (check.step(), check), zipped.check(limit)?)? {
            Checked::Short(bytes) => return Ok(bytes),
            Checked::Long(length) => length,
        };
        finished(|mut inflate: Inflate<'_>| (inflate.step(), inflate), zipped.inflate(length)?)
    }

    /// Steps until there is a result.
    fn finished<P, T>(step: impl Fn(P) -> (Result<Option<T>, Reason>, P), mut pass: P) -> Result<T, Reason> {
        loop {
            let (stepped, next) = step(pass);
            pass = next;
            if let Some(result) = stepped? {
                return Ok(result);
            }
        }
    }

    const MIB: usize = 1 << 20;

    #[test]
    fn a_table_of_bodies() {
        let body = br#"{"type":"message.new"}"#.repeat(100);
        let zipped = gzip(&body);
        let flipped = {
            let mut bytes = zipped.clone();
            *bytes.last_mut().unwrap() ^= 1;
            bytes
        };
        let two_members = [gzip(&body[..50]), gzip(&body[50..])].concat();
        for piece in [1, 2, 3, 4096] {
            assert_eq!(read(&body, piece, &body, MIB), Ok(body.clone()));
            assert_eq!(read(&zipped, piece, &body, MIB), Ok(body.clone()));
            assert_eq!(read(&two_members, piece, &body, MIB), Ok(body.clone()));
            assert_eq!(read(&gzip(b""), piece, b"", MIB), Ok(vec![]));
            assert_eq!(read(b"", piece, b"", MIB), Ok(vec![]));
            assert_eq!(read(b"{", piece, b"{", MIB), Ok(b"{".to_vec()));
            assert_eq!(read(&zipped, piece, &zipped, MIB), Err(Reason::WrongSignature), "signed over the gzip bytes");
            assert_eq!(read(&zipped[..zipped.len() - 1], piece, &body, MIB), Err(Reason::BadGzip), "truncated");
            assert_eq!(read(&zipped[..5], piece, &body, MIB), Err(Reason::BadGzip), "truncated in its header");
            assert_eq!(read(&flipped, piece, &body, MIB), Err(Reason::BadGzip), "wrong length field");
            assert_eq!(read(&body, piece, &body, body.len()), Ok(body.clone()), "exactly the limit");
            assert_eq!(read(&body, piece, &body, body.len() - 1), Err(Reason::TooLarge));
            assert_eq!(read(&zipped, piece, &body, body.len() - 1), Err(Reason::TooLarge));
        }
    }

    #[test]
    fn bombs_stop_early_and_repetitive_chat_does_not() {
        let equal = |length: usize| vec![b'a'; length];
        // 56:1 and authentic, and the most that is free.
        for length in [5_000, BUFFER, BUFFER + 1, STEP, STEP + BUFFER, FREE] {
            assert_eq!(read(&gzip(&equal(length)), 4096, &equal(length), 4 * MIB), Ok(equal(length)));
        }
        let bomb = equal(4 * MIB);
        assert_eq!(read(&gzip(&bomb), 4096, &bomb, 4 * MIB), Err(Reason::TooLarge), "1000:1");
        assert_eq!(read(&gzip(&bomb), 4096, &bomb, MIB), Err(Reason::TooLarge), "over the limit");
        let zipped = gzip(&bomb);
        let key = SigningKey::new(b"secret");
        let gzip = Gzip { wire: zipped, verifier: Verifier::new(&[], key.sign(b"")) };
        let mut check = gzip.check(4 * MIB).unwrap();
        while check.step() == Ok(None) {}
        assert!(check.length < FREE + RATIO * gzip.wire.len() + BUFFER, "{} bytes were inflated", check.length);
    }

    #[test]
    fn members_and_their_headers_are_bounded() {
        let members = |count: usize| [gzip(b"{}").as_slice(), &gzip(b"").repeat(count - 1)].concat();
        assert_eq!(read(&members(MAX_MEMBERS), 4096, b"{}", MIB), Ok(b"{}".to_vec()));
        assert_eq!(read(&members(MAX_MEMBERS + 1), 4096, b"{}", MIB), Err(Reason::BadGzip));
        assert_eq!(read(&gzip(b"").repeat(50_000), 4096, b"", 4 * MIB), Err(Reason::BadGzip));
        let with = |builder: GzBuilder| {
            let mut encoder = builder.write(Vec::new(), Compression::default());
            encoder.write_all(b"{}").unwrap();
            encoder.finish().unwrap()
        };
        let bad = || Err(Reason::BadGzip);
        for (length, expected) in
            [(MAX_HEADER_FIELD, Ok(b"{}".to_vec())), (MAX_HEADER_FIELD + 1, bad()), (65_000, bad())]
        {
            let field = vec![b'x'; length];
            let headers = [
                GzBuilder::new().extra(field.clone()),
                GzBuilder::new().filename(field.clone()),
                GzBuilder::new().comment(field.clone()),
            ];
            for header in headers {
                assert_eq!(read(&with(header), 4096, b"{}", MIB), expected);
            }
        }
        assert_eq!(read(&[gzip(b"{}").as_slice(), b"garbage"].concat(), 4096, b"{}", MIB), Err(Reason::BadGzip));
    }

    #[test]
    fn a_step_takes_little_of_the_wire_whatever_it_inflates_to() {
        // Stored blocks of no length (RFC 1951, 3.2.4): five bytes each, and nothing comes of them.
        let header = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];
        let wire = [&header[..], &[0, 0, 0, 0xff, 0xff].repeat(100_000), &[1, 0, 0, 0xff, 0xff], &[0; 8]].concat();
        let key = SigningKey::new(b"secret");
        let gzip = Gzip { wire, verifier: Verifier::new(std::slice::from_ref(&key), key.sign(b"")) };
        let mut check = gzip.check(MIB).unwrap();
        let mut steps = 1;
        while check.step() == Ok(None) {
            steps += 1;
        }
        assert_eq!(check.length, 0);
        assert_eq!(check.step(), Ok(Some(Checked::Short(vec![]))));
        assert_eq!(steps, gzip.wire.len().div_ceil(WIRE_STEP));
        assert_eq!(read(&gzip.wire, 4096, b"", MIB), Ok(vec![]), "and it is authentic");
    }

    proptest! {
        #[test]
        fn no_authentic_body_is_refused(body in proptest::collection::vec(any::<u8>(), 0..3000), piece in 1usize..600) {
            prop_assume!(!body.starts_with(&GZIP_MAGIC));
            prop_assert_eq!(read(&body, piece, &body, MIB), Ok(body.clone()));
            prop_assert_eq!(read(&gzip(&body), piece, &body, MIB), Ok(body.clone()));
        }

        #[test]
        fn nothing_panics_and_nothing_unsigned_passes(tail in proptest::collection::vec(any::<u8>(), 0..300), piece in 1usize..90) {
            let wire = [&GZIP_MAGIC[..], &[8], &tail].concat();
            prop_assert!(read(&wire, piece, b"something else", MIB).is_err());
        }
    }
}
