//! Goes on reading a refused body for a while, so that the refusal arrives: closing on a client that still sends resets the
//! connection, and the client never learns why. An eviction ends it at once.

use crate::activity::InHand;
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Body, Incoming};
use std::time::Duration;

/// Limits what is read on, in bodies of the largest size.
const BODIES: usize = 4;

/// Waits at most `patience` for the rest of the body.
pub(crate) fn linger(mut body: Incoming, in_hand: &InHand, max_body: usize, patience: Duration) {
    if body.is_end_stream() {
        return;
    }
    let lingering = in_hand.linger();
    let mut left = max_body.saturating_mul(BODIES);
    tokio::spawn(async move {
        let discard = async {
            while let Some(Ok(frame)) = body.frame().await {
                let length = frame.data_ref().map_or(0, Bytes::len);
                match left.checked_sub(length) {
                    Some(rest) => left = rest,
                    None => return,
                }
            }
        };
        tokio::select! {
            () = discard => {}
            () = tokio::time::sleep(patience) => {}
            () = lingering.connection().evicted.cancelled() => {}
        }
        drop(lingering);
    });
}
