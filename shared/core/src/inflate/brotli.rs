//! Brotli (RFC 7932) with a bounded window.

use super::Piece;
use crate::reason::Reason;
use brotli_decompressor::{Allocator, BrotliDecompressStream, BrotliResult, BrotliState, SliceWrapper, StandardAlloc};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The largest window, in bits: 4 MiB, the default of encoders.
const MAX_WINDOW_BITS: u32 = 22;
/// Bytes from the wire for one step. 1.25 kB can set up 768 prefix codes, which costs as much as inflating some 100 kB.
pub(super) const WIRE_STEP: usize = 4 << 10;
/// A decoder that allocates its window and tables as it needs them: a few kilobytes for most bodies, and at most the window
/// and three groups of 256 prefix codes with 1,080 entries of 4 bytes (RFC 7932, section 9.2), which are 3.3 MiB.
pub(super) struct Brotli<'w> {
    state: BrotliState<Counted, Counted, Counted>,
    counted: Counted,
    rest: &'w [u8],
    is_over: bool,
    /// Bytes of the wire that this step may still take.
    pub(super) ration: usize,
}

/// Counts the bytes that a decoder holds.
#[derive(Clone, Default)]
struct Counted(Arc<AtomicUsize>);

impl<T: Clone + Default> Allocator<T> for Counted {
    type AllocatedMemory = <StandardAlloc as Allocator<T>>::AllocatedMemory;

    fn alloc_cell(&mut self, count: usize) -> Self::AllocatedMemory {
        self.0.fetch_add(count * size_of::<T>(), Ordering::Relaxed);
        StandardAlloc::default().alloc_cell(count)
    }

    fn free_cell(&mut self, cell: Self::AllocatedMemory) {
        self.0.fetch_sub(size_of_val(cell.slice()), Ordering::Relaxed);
        StandardAlloc::default().free_cell(cell);
    }
}

impl std::fmt::Debug for Brotli<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Brotli").field("rest", &self.rest.len()).finish_non_exhaustive()
    }
}

impl<'w> Brotli<'w> {
    pub(super) fn new(wire: &'w [u8]) -> Result<Brotli<'w>, Reason> {
        if window_bits(wire).is_none_or(|bits| bits > MAX_WINDOW_BITS) {
            return Err(Reason::BadEncoding);
        }
        // Strict: without the windows of up to 1 GiB, which the RFC does not define.
        let counted = Counted::default();
        let state = BrotliState::new_strict(counted.clone(), counted.clone(), counted.clone());
        Ok(Brotli { state, counted, rest: wire, is_over: false, ration: WIRE_STEP })
    }

    /// Bytes that it holds now.
    pub(super) fn held(&self) -> usize {
        self.counted.0.load(Ordering::Relaxed)
    }

    pub(super) fn read(&mut self, into: &mut [u8]) -> Result<Piece, Reason> {
        if self.is_over {
            return if self.rest.is_empty() { Ok(Piece::End) } else { Err(Reason::BadEncoding) };
        }
        let some = self.rest.get(..self.ration.min(self.rest.len())).unwrap_or_default();
        let (mut left, mut taken) = (some.len(), 0);
        let (mut room, mut given, mut total) = (into.len(), 0, 0);
        let result = BrotliDecompressStream(
            &mut left,
            &mut taken,
            some,
            &mut room,
            &mut given,
            into,
            &mut total,
            &mut self.state,
        );
        self.rest = self.rest.get(taken..).unwrap_or_default();
        self.ration = self.ration.saturating_sub(taken);
        match result {
            BrotliResult::ResultFailure => return Err(Reason::BadEncoding),
            BrotliResult::ResultSuccess => self.is_over = true,
            // The body is truncated.
            BrotliResult::NeedsMoreInput if given == 0 && self.rest.is_empty() => return Err(Reason::BadEncoding),
            BrotliResult::NeedsMoreInput if given == 0 => return Ok(Piece::Rationed),
            // There was room for output, so this would never end.
            BrotliResult::NeedsMoreOutput if given == 0 => return Err(Reason::BadEncoding),
            BrotliResult::NeedsMoreInput | BrotliResult::NeedsMoreOutput => {}
        }
        match given {
            0 if self.is_over => self.read(into),
            given => Ok(Piece::Bytes(given)),
        }
    }
}

/// WBITS from the first byte (RFC 7932, section 9.1). `None` if there is no byte, or if it marks a large window.
fn window_bits(wire: &[u8]) -> Option<u32> {
    let first = u32::from(*wire.first()?);
    Some(match (first & 1, first >> 1 & 7, first >> 4 & 7) {
        (0, _, _) => 16,
        (_, 0, 0) => 17,
        (_, 0, 1) => return None,
        (_, 0, bits) => 8 + bits,
        (_, bits, _) => 17 + bits,
    })
}
