//! Content-Encoding `deflate`: zlib (RFC 1950), as the standard says, or raw deflate (RFC 1951), as some senders do.

use super::{Piece, WIRE_STEP};
use crate::reason::Reason;
use flate2::{Decompress, FlushDecompress, Status};

/// The compression method in zlib's header, in the low bits of the first byte (RFC 1950, section 2.2).
const METHOD: u8 = 8;

pub(super) struct Deflate<'w> {
    decoder: Decompress,
    rest: &'w [u8],
    is_over: bool,
    /// Bytes of the wire that this step may still take.
    pub(super) ration: usize,
}

impl std::fmt::Debug for Deflate<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Deflate").field("rest", &self.rest.len()).finish_non_exhaustive()
    }
}

impl<'w> Deflate<'w> {
    pub(super) fn new(wire: &'w [u8]) -> Deflate<'w> {
        Deflate { decoder: Decompress::new(is_zlib(wire)), rest: wire, is_over: false, ration: WIRE_STEP }
    }

    pub(super) fn read(&mut self, into: &mut [u8]) -> Result<Piece, Reason> {
        loop {
            if self.is_over {
                return if self.rest.is_empty() { Ok(Piece::End) } else { Err(Reason::BadEncoding) };
            }
            let some = self.rest.get(..self.ration.min(self.rest.len())).unwrap_or_default();
            if some.is_empty() && !self.rest.is_empty() {
                return Ok(Piece::Rationed);
            }
            let (taken, given) = (self.decoder.total_in(), self.decoder.total_out());
            let status = self.decoder.decompress(some, into, FlushDecompress::None).map_err(|_| Reason::BadEncoding)?;
            let count = |total: u64, before: u64| usize::try_from(total - before).unwrap_or(usize::MAX);
            let (taken, given) = (count(self.decoder.total_in(), taken), count(self.decoder.total_out(), given));
            self.rest = self.rest.get(taken..).unwrap_or_default();
            self.ration = self.ration.saturating_sub(taken);
            self.is_over = status == Status::StreamEnd;
            match (given, taken) {
                // The body is truncated.
                (0, 0) if !self.is_over => return Err(Reason::BadEncoding),
                (0, _) => {}
                (given, _) => return Ok(Piece::Bytes(given)),
            }
        }
    }
}

/// Whether there is a zlib header: the method, and two bytes that form a multiple of 31. Raw deflate begins differently: its
/// blocks of that type have padding, which encoders leave 0.
fn is_zlib(wire: &[u8]) -> bool {
    matches!(wire, [first, second, ..] if first & 0x0f == METHOD && u16::from_be_bytes([*first, *second]) % 31 == 0)
}
