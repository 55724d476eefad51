//! Reads a body as it arrives, and inflates it: gzip is recognised by its magic bytes, whatever Content-Encoding says,
//! deflate and br by that header. Stream sends plain bodies and gzip; tunnels and proxies may compress them anew.
//!
//! Stream signs the uncompressed bytes, so a receiver must inflate before it can authenticate. What a stranger can make it
//! spend is bounded: until the signature matches, only the bytes that arrived are kept. A compressed body is inflated twice:
//! once through the signature check, keeping nothing, and then into memory of a length that is known. A body that ends within
//! the first step, before any other request could have its turn, is kept from that step.

mod brotli;
mod deflate;
mod gzip;

use crate::{reason::Reason, signature::Verifier};
use brotli::Brotli;
use deflate::Deflate;
use gzip::Members;

const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
/// The first allocation, in bytes: most events fit, and a stranger's connection costs no more than this.
const FIRST_ALLOCATION: usize = 4096;
/// Bytes that any body may inflate to. Chosen: the largest events in the protocol's samples have a tenth of it.
const FREE: usize = 256 << 10;
/// Beyond [`FREE`], inflated bytes for each byte on the wire. Chosen: chat text of one repeated letter has 56:1, a bomb 1000:1.
const RATIO: usize = 200;
/// Bytes that one step inflates, and bytes it may take from the wire for that: a stream of empty blocks inflates to nothing,
/// and each costs a table. A step takes a few milliseconds at most, after which other requests have their turn.
const STEP: usize = 128 << 10;
const WIRE_STEP: usize = 64 << 10;
const BUFFER: usize = 16 << 10;

/// Bytes that an inflation holds besides its input, its output and [`Check::held`]: the decoder's window and tables (48 KiB),
/// and a buffer.
pub const INFLATION: usize = (48 << 10) + BUFFER;

/// The Content-Encoding of a body, as far as it is believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Declared {
    /// None, identity, or gzip, which is recognised by its magic bytes.
    Plain,
    Deflate,
    Brotli,
}

/// How a body is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Gzip,
    Deflate,
    Brotli,
}

/// Collects the bytes of one request body. Errors are final: drop it after one.
#[derive(Debug)]
pub struct WireBody {
    bytes: Vec<u8>,
    /// Verifies the bytes as they came.
    verifier: Verifier,
    /// Verifies what a compressed body inflates to.
    fresh: Verifier,
    declared: Declared,
    limit: usize,
    /// `None` until two bytes have come.
    is_gzip: Option<bool>,
}

/// A complete body.
#[derive(Debug)]
pub enum Whole {
    /// Verified: the app signed it.
    Signed(Vec<u8>),
    /// Not verified yet, because the signature covers the inflated bytes.
    Compressed(Compressed),
}

impl WireBody {
    /// `limit` is the most bytes on the wire.
    pub fn new(verifier: Verifier, declared: Declared, limit: usize) -> WireBody {
        WireBody { bytes: Vec::new(), fresh: verifier.clone(), verifier, declared, limit, is_gzip: None }
    }

    /// How many bytes the buffer has to grow for a piece of this length: it doubles, but never exceeds the limit. The caller
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

    /// Ends the body. Verifies it as it came if it is not gzip, even if the header says that it is compressed: some proxies
    /// inflate a body and leave the header.
    pub fn finish(mut self) -> Result<Whole, Reason> {
        let is_gzip = self.is_gzip == Some(true);
        if self.is_gzip.is_none() {
            self.verifier.update(&self.bytes);
        }
        if !is_gzip && self.verifier.verify() {
            return Ok(Whole::Signed(self.bytes));
        }
        let formats = match (is_gzip, self.declared) {
            (true, Declared::Plain | Declared::Deflate) => &[Format::Gzip][..],
            // One br body in some hundreds begins like gzip.
            (true, Declared::Brotli) => &[Format::Gzip, Format::Brotli],
            (false, Declared::Deflate) => &[Format::Deflate],
            (false, Declared::Brotli) => &[Format::Brotli],
            (false, Declared::Plain) => return Err(Reason::WrongSignature),
        };
        Ok(Whole::Compressed(Compressed { wire: self.bytes, verifier: self.fresh, formats }))
    }
}

/// A complete compressed body that was not inflated yet.
#[derive(Debug)]
pub struct Compressed {
    wire: Vec<u8>,
    verifier: Verifier,
    /// The formats it may have, the likeliest first.
    formats: &'static [Format],
}

impl Compressed {
    /// Whether one step of its inflation may hold megabytes.
    pub fn is_heavy(&self) -> bool {
        self.formats.contains(&Format::Brotli)
    }

    fn most(&self, limit: usize) -> usize {
        limit.min(FREE.saturating_add(self.wire.len().saturating_mul(RATIO)))
    }

    /// Begins the first pass. `limit` is the most bytes that it may inflate to.
    pub fn check(&self, limit: usize) -> Result<Check<'_>, Reason> {
        let mut check =
            Check { body: self, most: self.most(limit), formats: self.formats, reading: None, buffer: vec![0; BUFFER] };
        check.begin()?;
        Ok(check)
    }

    /// Begins the second pass. `format` and `length` are the results of the first.
    pub fn inflate(&self, format: Format, length: usize) -> Result<Inflate<'_>, Reason> {
        Ok(Inflate { decoder: Decoder::new(format, &self.wire)?, bytes: vec![0; length], filled: 0 })
    }
}

/// A compressed body that the app has signed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Checked {
    /// It ended within the first step, so here it is.
    Short(Vec<u8>),
    /// It inflates to `length` bytes.
    Long { format: Format, length: usize },
}

/// The first pass: verifies the signature and finds the length.
#[derive(Debug)]
pub struct Check<'w> {
    body: &'w Compressed,
    most: usize,
    /// The formats that were not tried yet.
    formats: &'static [Format],
    /// `None` before the first format and after the last.
    reading: Option<Reading<'w>>,
    buffer: Vec<u8>,
}

/// The body, read as one of the formats.
#[derive(Debug)]
struct Reading<'w> {
    format: Format,
    decoder: Decoder<'w>,
    verifier: Verifier,
    length: usize,
}

impl<'w> Check<'w> {
    /// Begins to read the body as the next format that is possible.
    fn begin(&mut self) -> Result<(), Reason> {
        let mut refused = Reason::BadEncoding;
        while let [format, others @ ..] = self.formats {
            self.formats = others;
            match Decoder::new(*format, &self.body.wire) {
                Ok(decoder) => {
                    let verifier = self.body.verifier.clone();
                    self.reading = Some(Reading { format: *format, decoder, verifier, length: 0 });
                    return Ok(());
                }
                Err(reason) => refused = reason,
            }
        }
        Err(refused)
    }

    /// Bytes that the decoder holds now, beyond [`INFLATION`].
    pub fn held(&self) -> usize {
        match self.reading.as_ref().map(|reading| &reading.decoder) {
            Some(Decoder::Brotli(brotli)) => brotli.held(),
            Some(Decoder::Gzip(_) | Decoder::Deflate(_)) | None => 0,
        }
    }

    /// Does one step. Returns a result once the whole body is verified.
    pub fn step(&mut self) -> Result<Option<Checked>, Reason> {
        let Some(reading) = &mut self.reading else { return Err(Reason::BadEncoding) };
        match reading.step(&mut self.buffer, self.most) {
            Err(reason) if self.formats.is_empty() => Err(reason),
            Err(_) => self.begin().map(|()| None),
            stepped => stepped,
        }
    }
}

impl Reading<'_> {
    fn step(&mut self, buffer: &mut [u8], most: usize) -> Result<Option<Checked>, Reason> {
        let mut inflated = 0;
        // Dropped with this call, unless the body ends in it and is verified.
        let mut kept = (self.length == 0).then(Vec::new);
        self.decoder.ration();
        while inflated < STEP {
            let read = match self.decoder.read(buffer)? {
                Piece::Bytes(read) => read,
                Piece::Rationed => break,
                Piece::End => return self.verified(kept).map(Some),
            };
            inflated += read;
            self.length += read;
            if self.length > most {
                return Err(Reason::TooLarge);
            }
            let piece = buffer.get(..read).unwrap_or_default();
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
            None => Checked::Long { format: self.format, length: self.length },
        })
    }
}

/// The second pass: inflates into memory.
#[derive(Debug)]
pub struct Inflate<'w> {
    decoder: Decoder<'w>,
    bytes: Vec<u8>,
    filled: usize,
}

impl Inflate<'_> {
    /// Does one step. Returns the body once it is complete.
    pub fn step(&mut self) -> Result<Option<Vec<u8>>, Reason> {
        let until = self.filled.saturating_add(STEP).min(self.bytes.len());
        self.decoder.ration();
        while let Some(rest) = self.bytes.get_mut(self.filled..until).filter(|rest| !rest.is_empty()) {
            match self.decoder.read(rest)? {
                Piece::Bytes(read) => self.filled += read,
                Piece::Rationed => break,
                // Shorter than in the first pass, which is impossible.
                Piece::End => return Err(Reason::BadEncoding),
            }
        }
        let is_whole = self.filled == self.bytes.len();
        Ok(is_whole.then(|| std::mem::take(&mut self.bytes)))
    }
}

/// A decoder of one format.
#[derive(Debug)]
enum Decoder<'w> {
    Gzip(Members<'w>),
    Deflate(Deflate<'w>),
    Brotli(Box<Brotli<'w>>),
}

/// The result of reading from a decoder.
enum Piece {
    Bytes(usize),
    /// The step's ration of the wire is used up.
    Rationed,
    /// The body ended as its format requires.
    End,
}

impl<'w> Decoder<'w> {
    fn new(format: Format, wire: &'w [u8]) -> Result<Decoder<'w>, Reason> {
        Ok(match format {
            Format::Gzip => Decoder::Gzip(Members::new(wire)?),
            Format::Deflate => Decoder::Deflate(Deflate::new(wire)),
            Format::Brotli => Decoder::Brotli(Box::new(Brotli::new(wire)?)),
        })
    }

    /// Begins a step.
    fn ration(&mut self) {
        match self {
            Decoder::Gzip(members) => members.ration = WIRE_STEP,
            Decoder::Deflate(deflate) => deflate.ration = WIRE_STEP,
            Decoder::Brotli(brotli) => brotli.ration = brotli::WIRE_STEP,
        }
    }

    /// Fills a part of the buffer.
    fn read(&mut self, into: &mut [u8]) -> Result<Piece, Reason> {
        match self {
            Decoder::Gzip(members) => members.read(into),
            Decoder::Deflate(deflate) => deflate.read(into),
            Decoder::Brotli(brotli) => brotli.read(into),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::gzip::{MAX_HEADER_FIELD, MAX_MEMBERS};
    use super::*;
    use crate::signature::SigningKey;
    use flate2::{
        Compression, GzBuilder,
        write::{DeflateEncoder, GzEncoder, ZlibEncoder},
    };
    use proptest::prelude::*;
    use std::io::Write;

    fn gzip(body: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(body).unwrap();
        encoder.finish().unwrap()
    }

    fn read(wire: &[u8], piece: usize, signed: &[u8], limit: usize) -> Result<Vec<u8>, Reason> {
        read_as(Declared::Plain, wire, piece, signed, limit)
    }

    fn read_as(declared: Declared, wire: &[u8], piece: usize, signed: &[u8], limit: usize) -> Result<Vec<u8>, Reason> {
        let key = SigningKey::new(b"secret");
        let verifier = Verifier::new(std::slice::from_ref(&key), key.sign(signed));
        let mut body = WireBody::new(verifier, declared, limit);
        for piece in wire.chunks(piece) {
            let grown = body.bytes.capacity() + body.growth(piece.len())?;
            body.push(piece)?;
            assert_eq!(body.bytes.capacity(), grown, "all that it holds was announced");
            assert!(grown <= limit);
        }
        let compressed = match body.finish()? {
            Whole::Signed(bytes) => return Ok(bytes),
            Whole::Compressed(compressed) => compressed,
        };
        let (format, length) = match finished(|mut check: Check<'_>| (check.step(), check), compressed.check(limit)?)? {
            Checked::Short(bytes) => return Ok(bytes),
            Checked::Long { format, length } => (format, length),
        };
        finished(|mut inflate: Inflate<'_>| (inflate.step(), inflate), compressed.inflate(format, length)?)
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
        // 56:1 and authentic, up to the free bytes.
        for length in [5_000, BUFFER, BUFFER + 1, STEP, STEP + BUFFER, FREE] {
            assert_eq!(read(&gzip(&equal(length)), 4096, &equal(length), 4 * MIB), Ok(equal(length)));
        }
        let bomb = equal(4 * MIB);
        assert_eq!(read(&gzip(&bomb), 4096, &bomb, 4 * MIB), Err(Reason::TooLarge), "1000:1");
        assert_eq!(read(&gzip(&bomb), 4096, &bomb, MIB), Err(Reason::TooLarge), "over the limit");
        let zipped = gzip(&bomb);
        let key = SigningKey::new(b"secret");
        let verifier = Verifier::new(&[], key.sign(b""));
        let body = Compressed { wire: zipped, verifier, formats: &[Format::Gzip] };
        let mut check = body.check(4 * MIB).unwrap();
        while check.step() == Ok(None) {}
        let inflated = check.reading.unwrap().length;
        assert!(inflated < FREE + RATIO * body.wire.len() + BUFFER, "{inflated} bytes were inflated");
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
        // Stored blocks without data (RFC 1951, section 3.2.4): five bytes each that inflate to nothing.
        let header = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];
        let wire = [&header[..], &[0, 0, 0, 0xff, 0xff].repeat(100_000), &[1, 0, 0, 0xff, 0xff], &[0; 8]].concat();
        let key = SigningKey::new(b"secret");
        let verifier = Verifier::new(std::slice::from_ref(&key), key.sign(b""));
        let gzip = Compressed { wire, verifier, formats: &[Format::Gzip] };
        let mut check = gzip.check(MIB).unwrap();
        let mut steps = 1;
        while check.step() == Ok(None) {
            steps += 1;
        }
        assert_eq!(check.reading.as_ref().unwrap().length, 0);
        assert_eq!(check.step(), Ok(Some(Checked::Short(vec![]))));
        assert_eq!(steps, gzip.wire.len().div_ceil(WIRE_STEP));
        assert_eq!(read(&gzip.wire, 4096, b"", MIB), Ok(vec![]), "and it is authentic");
    }

    fn deflate(body: &[u8]) -> [Vec<u8>; 2] {
        let mut zlib = ZlibEncoder::new(Vec::new(), Compression::best());
        zlib.write_all(body).unwrap();
        let mut raw = DeflateEncoder::new(Vec::new(), Compression::best());
        raw.write_all(body).unwrap();
        [zlib.finish().unwrap(), raw.finish().unwrap()]
    }

    fn br(body: &[u8], window: i32) -> Vec<u8> {
        let params = ::brotli::enc::BrotliEncoderParams { lgwin: window, quality: 5, ..Default::default() };
        let mut encoded = Vec::new();
        ::brotli::BrotliCompress(&mut &*body, &mut encoded, &params).unwrap();
        encoded
    }

    /// A body in each format, with its Content-Encoding.
    fn compressed(body: &[u8]) -> Vec<(Declared, Vec<u8>)> {
        let [zlib, raw] = deflate(body);
        vec![
            (Declared::Deflate, zlib),
            (Declared::Deflate, raw),
            (Declared::Brotli, br(body, 22)),
            (Declared::Brotli, br(body, 16)),
        ]
    }

    #[test]
    fn a_body_that_a_tunnel_compressed_anew_is_read() {
        let short = br#"{"type":"message.new"}"#.repeat(100);
        let long: Vec<u8> = (0..200_000u32).flat_map(|number| number.to_le_bytes()).collect();
        for body in [&b""[..], b"{", &short, &long] {
            for (declared, wire) in compressed(body) {
                let case = format!("{declared:?}, {} bytes", body.len());
                for piece in [1, 4096] {
                    assert_eq!(read_as(declared, &wire, piece, body, MIB), Ok(body.to_vec()), "{case}");
                }
                assert_eq!(read_as(declared, body, 4096, body, MIB), Ok(body.to_vec()), "{case}: inflated on the way");
                assert_eq!(
                    read_as(declared, &gzip(body), 4096, body, MIB),
                    Ok(body.to_vec()),
                    "{case}: gzip by its magic"
                );
                assert_eq!(read(&wire, 4096, body, MIB), Err(Reason::WrongSignature), "{case}: nothing says so");
                assert_eq!(read_as(declared, &wire, 4096, b"other", MIB), Err(Reason::WrongSignature), "{case}");
                let garbage = [&wire[..], b"garbage"].concat();
                assert_eq!(read_as(declared, &garbage, 4096, body, MIB), Err(Reason::BadEncoding), "{case}");
                if body.len() > 1 {
                    let cut = &wire[..wire.len() / 2];
                    assert_eq!(read_as(declared, cut, 4096, body, MIB), Err(Reason::BadEncoding), "{case}: truncated");
                    assert_eq!(read_as(declared, &wire, 4096, body, body.len() - 1), Err(Reason::TooLarge), "{case}");
                }
            }
        }
    }

    #[test]
    fn bombs_of_every_format_stop_early() {
        let bomb = vec![b'a'; 4 * MIB];
        for (declared, wire) in compressed(&bomb) {
            assert_eq!(read_as(declared, &wire, 4096, &bomb, 4 * MIB), Err(Reason::TooLarge), "{declared:?}");
        }
        let free = vec![b'a'; FREE];
        for (declared, wire) in compressed(&free) {
            assert_eq!(read_as(declared, &wire, 4096, &free, 4 * MIB), Ok(free.clone()), "{declared:?}");
        }
    }

    #[test]
    fn a_window_of_brotli_is_bounded() {
        let body = vec![b'a'; 100];
        // Encoders use up to 22 bits; 24 are 16 MiB.
        assert_eq!(read_as(Declared::Brotli, &br(&body, 22), 4096, &body, MIB), Ok(body.clone()));
        // An encoder takes a smaller window for a short body, so this first byte says 24 (RFC 7932, section 9.1).
        assert_eq!(read_as(Declared::Brotli, &[0x0f, 0x02], 4096, b"", MIB), Err(Reason::BadEncoding));
        assert_eq!(
            read_as(Declared::Brotli, &[0x11, 0x02], 4096, b"", MIB),
            Err(Reason::BadEncoding),
            "a large window"
        );
    }

    #[test]
    fn the_memory_of_a_brotli_decoder_is_counted() {
        let long: Vec<u8> =
            (0..300_000u32).flat_map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        let held = |body: &[u8], window| {
            let wire = br(body, window);
            let key = SigningKey::new(b"secret");
            let verifier = Verifier::new(std::slice::from_ref(&key), key.sign(body));
            let compressed = Compressed { wire, verifier, formats: &[Format::Brotli] };
            assert!(compressed.is_heavy());
            let mut check = compressed.check(4 * MIB).unwrap();
            let mut most = 0;
            while check.step() == Ok(None) {
                most = most.max(check.held());
            }
            most
        };
        let (small, large) = (held(&long, 16), held(&long, 22));
        assert!((64 << 10..256 << 10).contains(&small), "{small}");
        assert!((MIB..8 * MIB).contains(&large), "{large}");
    }

    proptest! {
        #[test]
        fn no_declared_encoding_panics_or_lets_an_unsigned_body_pass(
            wire in proptest::collection::vec(any::<u8>(), 0..300),
            piece in 1usize..90,
        ) {
            for declared in [Declared::Deflate, Declared::Brotli] {
                prop_assert!(read_as(declared, &wire, piece, b"something else", MIB).is_err());
            }
        }

        #[test]
        fn no_authentic_body_is_refused_however_it_was_compressed(body in proptest::collection::vec(any::<u8>(), 0..3000)) {
            for (declared, wire) in compressed(&body) {
                prop_assert_eq!(read_as(declared, &wire, 600, &body, MIB), Ok(body.clone()));
            }
        }

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
