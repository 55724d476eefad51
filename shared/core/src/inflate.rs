//! Reads a body as it arrives: recognises gzip by its magic bytes, inflates within the limit, feeds the signature check.
//!
//! Stream signs the uncompressed bytes, so a receiver must inflate before it can authenticate. Two bounds make that safe:
//! the limit holds on the wire and after inflation, and every growth of the buffer is asked of the memory budget first.

use crate::{reason::Reason, signature::Verifier};
use flate2::write::MultiGzDecoder;
use std::io::{self, Write};

const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
/// The first allocation, in bytes: most events fit, and a stranger's connection costs no more than this.
const FIRST_ALLOCATION: usize = 4096;

/// Grants memory before it is taken. `reserve` says no rather than to wait: a refused webhook is retried by Stream.
pub trait Budget {
    /// Whether `bytes` more may be held by this body.
    fn reserve(&mut self, bytes: usize) -> bool;
}

/// A body that was read to its end, inflated, and found to be signed by the app.
#[derive(Debug)]
pub struct SignedBody<B> {
    pub bytes: Vec<u8>,
    /// The budget, still holding what it granted for `bytes`.
    pub budget: B,
}

/// Collects one request body. Errors are final: drop the reader.
#[derive(Debug)]
pub struct BodyReader<B: Budget> {
    stage: Stage<B>,
    wire_bytes: usize,
    limit: usize,
}

#[derive(Debug)]
enum Stage<B: Budget> {
    /// Fewer than two bytes have come: not known yet whether this is gzip.
    Sniffing {
        sink: Sink<B>,
        held: Option<u8>,
    },
    Plain(Sink<B>),
    Gzip(Box<MultiGzDecoder<Sink<B>>>),
    Failed,
}

impl<B: Budget> BodyReader<B> {
    /// `limit`: the most bytes on the wire and after inflation, each.
    pub fn new(verifier: Verifier, limit: usize, budget: B) -> BodyReader<B> {
        let sink = Sink { bytes: Vec::new(), verifier, limit, budget, refused: None };
        BodyReader { stage: Stage::Sniffing { sink, held: None }, wire_bytes: 0, limit }
    }

    /// Takes the next piece from the wire.
    pub fn push(&mut self, piece: &[u8]) -> Result<(), Reason> {
        self.wire_bytes = self.wire_bytes.saturating_add(piece.len());
        if self.wire_bytes > self.limit {
            return Err(Reason::TooLarge);
        }
        match std::mem::replace(&mut self.stage, Stage::Failed) {
            undecided @ Stage::Sniffing { .. } if piece.is_empty() => {
                self.stage = undecided;
                Ok(())
            }
            Stage::Sniffing { sink, held: None } if piece.len() < GZIP_MAGIC.len() => {
                self.stage = Stage::Sniffing { sink, held: piece.first().copied() };
                Ok(())
            }
            Stage::Sniffing { sink, held: None } => self.feed(Stage::after_sniffing(sink, piece), piece),
            Stage::Sniffing { sink, held: Some(first) } => {
                let joined = [&[first], piece].concat();
                self.feed(Stage::after_sniffing(sink, &joined), &joined)
            }
            decided @ (Stage::Plain(_) | Stage::Gzip(_) | Stage::Failed) => self.feed(decided, piece),
        }
    }

    fn feed(&mut self, mut stage: Stage<B>, piece: &[u8]) -> Result<(), Reason> {
        match &mut stage {
            Stage::Plain(sink) | Stage::Sniffing { sink, .. } => sink.take(piece)?,
            Stage::Gzip(decoder) => {
                decoder.write_all(piece).map_err(|_| decoder.get_ref().refused.unwrap_or(Reason::BadGzip))?;
            }
            Stage::Failed => return Err(Reason::BadGzip),
        }
        self.stage = stage;
        Ok(())
    }

    /// The end of the body: checks that gzip was whole, and the signature.
    pub fn finish(self) -> Result<SignedBody<B>, Reason> {
        let sink = match self.stage {
            Stage::Sniffing { mut sink, held } => {
                sink.take(held.as_slice())?;
                sink
            }
            Stage::Plain(sink) => sink,
            Stage::Gzip(mut decoder) => {
                decoder.try_finish().map_err(|_| decoder.get_ref().refused.unwrap_or(Reason::BadGzip))?;
                decoder.finish().map_err(|_| Reason::BadGzip)?
            }
            Stage::Failed => return Err(Reason::BadGzip),
        };
        if sink.verifier.verify() {
            Ok(SignedBody { bytes: sink.bytes, budget: sink.budget })
        } else {
            Err(Reason::WrongSignature)
        }
    }
}

impl<B: Budget> Stage<B> {
    fn after_sniffing(sink: Sink<B>, start: &[u8]) -> Stage<B> {
        if start.starts_with(&GZIP_MAGIC) {
            Stage::Gzip(Box::new(MultiGzDecoder::new(sink)))
        } else {
            Stage::Plain(sink)
        }
    }
}

/// Where uncompressed bytes end: the buffer and the signature check, under the limit and the budget.
#[derive(Debug)]
struct Sink<B> {
    bytes: Vec<u8>,
    verifier: Verifier,
    limit: usize,
    budget: B,
    /// What stopped the decoder, where it was us: an `io::Error` cannot carry it without a guess.
    refused: Option<Reason>,
}

impl<B: Budget> Sink<B> {
    fn take(&mut self, piece: &[u8]) -> Result<(), Reason> {
        let length = self.bytes.len().saturating_add(piece.len());
        if length > self.limit {
            return Err(Reason::TooLarge);
        }
        self.grow_to(length)?;
        self.bytes.extend_from_slice(piece);
        self.verifier.update(piece);
        Ok(())
    }

    /// Grows by doubling, as `Vec` would, but asks first and never beyond the limit.
    fn grow_to(&mut self, length: usize) -> Result<(), Reason> {
        let capacity = self.bytes.capacity();
        if length <= capacity {
            return Ok(());
        }
        let grown = length.max(capacity.saturating_mul(2)).max(FIRST_ALLOCATION).min(self.limit);
        if !self.budget.reserve(grown - capacity) {
            return Err(Reason::MemoryBudget);
        }
        self.bytes.reserve_exact(grown - self.bytes.len());
        Ok(())
    }
}

impl<B: Budget> Write for Sink<B> {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        self.take(piece).map_err(|reason| {
            self.refused = Some(reason);
            io::Error::other(reason.as_str())
        })?;
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::signature::SigningKey;
    use flate2::{Compression, write::GzEncoder};
    use proptest::prelude::*;

    /// Grants up to a total, and remembers the most that was granted.
    #[derive(Debug)]
    struct Purse(usize);

    impl Budget for Purse {
        fn reserve(&mut self, bytes: usize) -> bool {
            let granted = bytes <= self.0;
            if granted {
                self.0 -= bytes;
            }
            granted
        }
    }

    fn gzip(body: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(body).unwrap();
        encoder.finish().unwrap()
    }

    fn read(wire: &[u8], piece: usize, signed: &[u8], limit: usize, purse: usize) -> Result<Vec<u8>, Reason> {
        let key = SigningKey::new(b"secret");
        let verifier = Verifier::new(std::slice::from_ref(&key), key.sign(signed));
        let mut reader = BodyReader::new(verifier, limit, Purse(purse));
        for piece in wire.chunks(piece) {
            reader.push(piece)?;
        }
        reader.finish().map(|body| body.bytes)
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
            assert_eq!(read(&body, piece, &body, MIB, MIB), Ok(body.clone()));
            assert_eq!(read(&zipped, piece, &body, MIB, MIB), Ok(body.clone()));
            assert_eq!(read(&two_members, piece, &body, MIB, MIB), Ok(body.clone()));
            assert_eq!(read(b"", piece, b"", MIB, MIB), Ok(vec![]));
            assert_eq!(read(b"{", piece, b"{", MIB, MIB), Ok(b"{".to_vec()));
            assert_eq!(
                read(&zipped, piece, &zipped, MIB, MIB),
                Err(Reason::WrongSignature),
                "signed over the gzip bytes"
            );
            assert_eq!(read(&zipped[..zipped.len() - 1], piece, &body, MIB, MIB), Err(Reason::BadGzip), "truncated");
            assert_eq!(read(&zipped[..5], piece, &body, MIB, MIB), Err(Reason::BadGzip), "truncated in its header");
            assert_eq!(read(&flipped, piece, &body, MIB, MIB), Err(Reason::BadGzip), "wrong length field");
            assert_eq!(read(&body, piece, &body, body.len(), MIB), Ok(body.clone()), "exactly the limit");
            assert_eq!(read(&body, piece, &body, body.len() - 1, MIB), Err(Reason::TooLarge));
            assert_eq!(read(&zipped, piece, &body, body.len() - 1, MIB), Err(Reason::TooLarge));
            assert_eq!(read(&body, piece, &body, MIB, 100), Err(Reason::MemoryBudget));
            assert_eq!(read(&zipped, piece, &body, MIB, 100), Err(Reason::MemoryBudget));
        }
    }

    #[test]
    fn a_gzip_bomb_stops_at_the_limit() {
        let bomb = gzip(&vec![0; 64 * MIB]);
        assert!(bomb.len() < MIB / 8);
        // The purse is just the limit: had the buffer grown past it, the budget would have said so first.
        assert_eq!(read(&bomb, 4096, b"", MIB, MIB), Err(Reason::TooLarge));
    }

    proptest! {
        #[test]
        fn no_authentic_body_is_refused(body in proptest::collection::vec(any::<u8>(), 0..3000), piece in 1usize..600) {
            prop_assume!(!body.starts_with(&GZIP_MAGIC));
            prop_assert_eq!(read(&body, piece, &body, MIB, MIB), Ok(body.clone()));
            prop_assert_eq!(read(&gzip(&body), piece, &body, MIB, MIB), Ok(body.clone()));
        }

        #[test]
        fn nothing_panics_and_nothing_unsigned_passes(tail in proptest::collection::vec(any::<u8>(), 0..300), piece in 1usize..90) {
            let wire = [&GZIP_MAGIC[..], &[8], &tail].concat();
            prop_assert!(read(&wire, piece, b"something else", MIB, MIB).is_err());
        }
    }
}
