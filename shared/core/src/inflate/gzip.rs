//! Gzip (RFC 1952): several members, each bounded.

use super::{Piece, WIRE_STEP};
use crate::reason::Reason;
use flate2::bufread::GzDecoder;
use std::io::{self, BufRead, Read};

/// Most members of a body, and most bytes of each optional field in a member's header (RFC 1952, section 2.3). Stream sends one
/// member without such fields; each member costs a decoder.
pub(super) const MAX_MEMBERS: usize = 16;
pub(super) const MAX_HEADER_FIELD: usize = 1 << 10;

/// The members of a gzip body, one after the other (RFC 1952, section 2.2).
pub(super) struct Members<'w> {
    /// `None` after the last member.
    decoder: Option<GzDecoder<Rationed<'w>>>,
    begun: usize,
    /// Bytes of the wire that this step may still take.
    pub(super) ration: usize,
}

/// The wire, which a decoder reads in rations.
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
    pub(super) fn new(wire: &'w [u8]) -> Result<Members<'w>, Reason> {
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

    /// Fills a part of the buffer.
    pub(super) fn read(&mut self, into: &mut [u8]) -> Result<Piece, Reason> {
        while let Some(decoder) = &mut self.decoder {
            decoder.get_mut().ration = self.ration;
            let read = decoder.read(into);
            let Rationed { rest, ration } = *decoder.get_ref();
            self.ration = ration;
            // Known once the header is complete. A truncated or invalid header is an error of the read.
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
