//! What a connection is doing, for its timeouts and for connections that need its place.

use crate::connections::Connections;
use futures_util::task::AtomicWaker;
use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::Context;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// Stands for a time that is not set.
const NEVER: u64 = 0;
/// Wrong signatures after which an HTTP/2 connection ends. More than one: a balancer may carry several clients' requests on it.
const STRIKES: usize = 4;
/// Answers that an unverified peer may leave untaken; each takes about 1 KiB of the connection's memory. Peers that read
/// leave none.
const MOST_UNWRITTEN: usize = 16;

/// Shared by a connection's IO, its requests and its timeouts. Times are microseconds since the connection opened, plus 1.
#[derive(Debug)]
pub(crate) struct Activity {
    /// The connection's number.
    pub(crate) number: u64,
    /// Cancelled when its place is given to another connection.
    pub(crate) evicted: CancellationToken,
    opened: Instant,
    /// The other end, and the client that its PROXY header names instead.
    peer: IpAddr,
    client: OnceLock<IpAddr>,
    /// Requests with a complete head that are not answered yet, and those of them whose signature has matched.
    in_hand: AtomicUsize,
    signed: AtomicUsize,
    /// Refused bodies that are still read, so that the refusal arrives.
    lingering: AtomicUsize,
    /// Answers that the peer has not taken yet: their numbers and since when they wait, oldest first.
    answers: Mutex<VecDeque<(u64, u64)>>,
    unwritten: AtomicUsize,
    /// Since when nothing is in hand.
    idle_since: AtomicU64,
    /// When the first byte of the next head came.
    head_since: AtomicU64,
    /// When the last byte of a body came.
    body_byte: AtomicU64,
    /// Since when the socket blocks writes.
    blocked_since: AtomicU64,
    /// Whether bytes between requests belong to a head.
    heads: AtomicBool,
    /// Bytes of the memory budget that its unverified requests hold.
    pub(crate) unverified_bytes: Arc<AtomicUsize>,
    /// Whether it ever carried a signed request.
    is_verified: AtomicBool,
    strikes: AtomicUsize,
    /// Whether it is in the line of connections whose place can be given away.
    in_line: AtomicBool,
    /// Wakes the connection's task. HTTP/2 answers end in tasks of their own, after which the clock has to run again.
    connection: AtomicWaker,
    connections: Arc<Connections>,
}

/// What a connection is doing, as far as the timeouts care.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Nothing is in hand, since this instant.
    Idle(Instant),
    /// Only refused bodies are still read.
    Lingering(Instant),
    /// A head is on its way; its first byte came at this instant.
    Head(Instant),
    /// It waits for bodies; the last byte of one came at this instant.
    Reading(Instant),
    /// It waits for its peer to take answers, the oldest since this instant.
    Writing(Instant),
    /// A signed request is in hand.
    Busy,
}

/// Which connections have to go first; within a rank, those that have waited longest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Rank {
    /// It was refused, and its body is still read.
    Refused,
    /// It never carried a signed request.
    Unverified,
    Verified,
}

impl Activity {
    pub(crate) fn new(number: u64, peer: IpAddr, connections: Arc<Connections>) -> Arc<Activity> {
        Arc::new(Activity {
            number,
            peer,
            client: OnceLock::new(),
            evicted: CancellationToken::new(),
            opened: Instant::now(),
            in_hand: AtomicUsize::new(0),
            signed: AtomicUsize::new(0),
            lingering: AtomicUsize::new(0),
            answers: Mutex::default(),
            unwritten: AtomicUsize::new(0),
            idle_since: AtomicU64::new(1),
            head_since: AtomicU64::new(NEVER),
            body_byte: AtomicU64::new(1),
            blocked_since: AtomicU64::new(NEVER),
            heads: AtomicBool::new(false),
            unverified_bytes: Arc::default(),
            is_verified: AtomicBool::new(false),
            strikes: AtomicUsize::new(0),
            in_line: AtomicBool::new(true),
            connection: AtomicWaker::new(),
            connections,
        })
    }

    /// From now on bytes between requests belong to a head, as in HTTP/1.1; HTTP/2 has frames of its own there.
    pub(crate) fn expect_heads(&self) {
        self.heads.store(true, Ordering::Relaxed);
    }

    /// The other end of the connection, or the client that its PROXY header names.
    pub(crate) fn peer(&self) -> IpAddr {
        self.client.get().copied().unwrap_or(self.peer)
    }

    /// Sets the client that the PROXY header names; only the first call counts.
    pub(crate) fn comes_from(&self, client: IpAddr) {
        self.client.get_or_init(|| client);
    }

    fn now(&self) -> u64 {
        u64::try_from(self.opened.elapsed().as_micros()).unwrap_or(u64::MAX - 1) + 1
    }

    fn instant(&self, at: u64) -> Instant {
        self.opened + Duration::from_micros(at.saturating_sub(1))
    }

    fn answers(&self) -> MutexGuard<'_, VecDeque<(u64, u64)>> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn bytes_arrived(&self) {
        if self.heads.load(Ordering::Relaxed)
            && self.in_hand.load(Ordering::Relaxed) == 0
            && self.unwritten.load(Ordering::Relaxed) == 0
            && self.lingering.load(Ordering::Relaxed) == 0
            && self.head_since.load(Ordering::Relaxed) == NEVER
        {
            self.head_since.store(self.now(), Ordering::Relaxed);
        }
    }

    /// Notes that a piece of a body came.
    pub(crate) fn body_arrived(&self) {
        self.body_byte.store(self.now(), Ordering::Relaxed);
    }

    /// Notes that the socket blocks writes.
    pub(crate) fn note_blocked(&self) {
        if self.blocked_since.load(Ordering::Relaxed) == NEVER {
            self.blocked_since.store(self.now(), Ordering::Relaxed);
        }
    }

    /// Notes that the socket took everything that was to be written.
    pub(crate) fn note_flushed(&self) {
        if self.blocked_since.load(Ordering::Relaxed) != NEVER {
            self.blocked_since.store(NEVER, Ordering::Relaxed);
        }
    }

    pub(crate) fn phase(&self) -> Phase {
        let head_since = self.head_since.load(Ordering::SeqCst);
        if self.signed.load(Ordering::SeqCst) > 0 {
            return Phase::Busy;
        }
        if self.in_hand.load(Ordering::SeqCst) > 0 {
            return Phase::Reading(self.instant(self.body_byte.load(Ordering::SeqCst)));
        }
        if let Some(since) = self.unwritten_since() {
            return Phase::Writing(since);
        }
        match self.blocked_since.load(Ordering::SeqCst) {
            NEVER => {}
            since => return Phase::Writing(self.instant(since)),
        }
        let idle_since = || self.instant(self.idle_since.load(Ordering::SeqCst));
        match head_since {
            NEVER if self.lingering.load(Ordering::SeqCst) > 0 => Phase::Lingering(idle_since()),
            NEVER => Phase::Idle(idle_since()),
            at => Phase::Head(self.instant(at)),
        }
    }

    /// Returns the phase, and wakes this task when requests end elsewhere.
    pub(crate) fn poll_phase(&self, cx: &Context<'_>) -> Phase {
        self.connection.register(cx.waker());
        self.phase()
    }

    /// Its rank among connections that can be closed for others; `None` while a signed request is in hand.
    pub(crate) fn standing(&self) -> Option<(Rank, Instant)> {
        let since = match self.phase() {
            Phase::Busy => return None,
            Phase::Idle(since)
            | Phase::Lingering(since)
            | Phase::Head(since)
            | Phase::Reading(since)
            | Phase::Writing(since) => since,
        };
        let rank = match (self.is_verified(), self.lingering.load(Ordering::SeqCst)) {
            (true, _) => Rank::Verified,
            (false, 0) => Rank::Unverified,
            (false, _) => Rank::Refused,
        };
        Some((rank, since))
    }

    pub(crate) fn is_verified(&self) -> bool {
        self.is_verified.load(Ordering::SeqCst)
    }

    /// Whether too many of its requests had a wrong signature.
    pub(crate) fn is_struck_out(&self) -> bool {
        self.strikes.load(Ordering::Relaxed) >= STRIKES
    }

    pub(crate) fn set_in_line(&self, is_in_line: bool) {
        self.in_line.store(is_in_line, Ordering::SeqCst);
    }

    /// Closes the first connection that can go, perhaps this one, to free memory that is not given back otherwise.
    pub(crate) fn evict_for_memory(&self) {
        self.connections.evict_for_memory();
    }

    /// Since when the oldest answer waits for the peer to take it.
    pub(crate) fn unwritten_since(&self) -> Option<Instant> {
        if self.unwritten.load(Ordering::SeqCst) == 0 {
            return None;
        }
        self.answers().front().map(|(_, since)| self.instant(*since))
    }

    /// Something ended: the clock runs again, and the connection can be closed for another.
    fn settled(&self) {
        if !self.in_line.load(Ordering::SeqCst) {
            self.connections.line_up(self);
        }
        if !self.heads.load(Ordering::Relaxed) {
            self.connection.wake();
        }
    }

    /// Begins a request whose head is complete. Returns when its first byte came, and what keeps the connection busy.
    pub(crate) fn begin(self: &Arc<Self>) -> (Instant, InHand) {
        self.body_arrived();
        // In this order the connection never looks idle in between.
        self.in_hand.fetch_add(1, Ordering::SeqCst);
        let first_byte = match self.head_since.swap(NEVER, Ordering::SeqCst) {
            NEVER => Instant::now(),
            at => self.instant(at),
        };
        (
            first_byte,
            InHand { activity: Arc::clone(self), is_signed: AtomicBool::new(false), is_struck: AtomicBool::new(false) },
        )
    }
}

/// A request in hand, until it is answered.
#[derive(Debug)]
pub(crate) struct InHand {
    activity: Arc<Activity>,
    is_signed: AtomicBool,
    /// Whether it counts as a strike against its connection.
    is_struck: AtomicBool,
}

impl InHand {
    pub(crate) fn connection(&self) -> &Arc<Activity> {
        &self.activity
    }

    /// Notes that its signature has matched.
    pub(crate) fn signed(&self) {
        self.activity.signed.fetch_add(1, Ordering::SeqCst);
        self.activity.is_verified.store(true, Ordering::SeqCst);
        self.is_signed.store(true, Ordering::SeqCst);
    }

    pub(crate) fn is_signed(&self) -> bool {
        self.is_signed.load(Ordering::SeqCst)
    }

    /// Notes a wrong signature, or a body that caused the work of an inflation without being signed.
    pub(crate) fn strike(&self) {
        if !self.is_struck.swap(true, Ordering::Relaxed) {
            self.activity.strikes.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn is_struck(&self) -> bool {
        self.is_struck.load(Ordering::Relaxed)
    }

    /// Keeps the connection lingering while its refused body is read.
    pub(crate) fn linger(&self) -> Lingering {
        let activity = Arc::clone(&self.activity);
        activity.lingering.fetch_add(1, Ordering::SeqCst);
        // Its rank has changed, so it moves in the line.
        activity.connections.line_up(&activity);
        Lingering(activity)
    }

    /// Ends the request with an answer for the peer to take.
    pub(crate) fn answered(self) -> Unwritten {
        let activity = Arc::clone(&self.activity);
        let number = {
            let mut answers = activity.answers();
            let number = answers.back().map_or(0, |(last, _)| last + 1);
            answers.push_back((number, activity.now()));
            number
        };
        let others = activity.unwritten.fetch_add(1, Ordering::SeqCst);
        if others >= MOST_UNWRITTEN && !activity.is_verified() {
            activity.evicted.cancel();
        }
        Unwritten { activity, number }
    }
}

impl Drop for InHand {
    fn drop(&mut self) {
        let activity = &self.activity;
        activity.idle_since.store(activity.now(), Ordering::SeqCst);
        activity.in_hand.fetch_sub(1, Ordering::SeqCst);
        if self.is_signed() {
            activity.signed.fetch_sub(1, Ordering::SeqCst);
        }
        activity.settled();
    }
}

/// An answer that the peer has not taken yet.
#[derive(Debug)]
pub(crate) struct Unwritten {
    activity: Arc<Activity>,
    number: u64,
}

impl Drop for Unwritten {
    fn drop(&mut self) {
        let activity = &self.activity;
        {
            let mut answers = activity.answers();
            if let Some(place) = answers.iter().position(|(number, _)| *number == self.number) {
                answers.remove(place);
            }
        }
        activity.idle_since.store(activity.now(), Ordering::SeqCst);
        activity.unwritten.fetch_sub(1, Ordering::SeqCst);
        activity.settled();
    }
}

/// A refused body that is still read.
#[derive(Debug)]
pub(crate) struct Lingering(Arc<Activity>);

impl Lingering {
    pub(crate) fn connection(&self) -> &Activity {
        &self.0
    }
}

impl Drop for Lingering {
    fn drop(&mut self) {
        self.0.idle_since.store(self.0.now(), Ordering::SeqCst);
        self.0.lingering.fetch_sub(1, Ordering::SeqCst);
        self.0.settled();
        self.0.connection.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use streamgate_service::metrics::Metrics;

    fn activity() -> Arc<Activity> {
        Activity::new(0, [192, 0, 2, 1].into(), Connections::new(1, Metrics::new()))
    }

    #[test]
    fn phases_follow_the_requests() {
        let activity = activity();
        activity.expect_heads();
        assert!(matches!(activity.phase(), Phase::Idle(_)));
        activity.bytes_arrived();
        let Phase::Head(since) = activity.phase() else { panic!("{activity:?}") };
        let (first_byte, one) = activity.begin();
        assert_eq!(first_byte, since);
        activity.bytes_arrived();
        assert!(matches!(activity.phase(), Phase::Reading(_)));
        let (_, two) = activity.begin();
        one.signed();
        assert_eq!((activity.phase(), activity.standing()), (Phase::Busy, None));
        let written = one.answered();
        assert!(matches!(activity.phase(), Phase::Reading(_)), "of the other one");
        let lingering = two.linger();
        drop(two);
        let Phase::Writing(oldest) = activity.phase() else { panic!("{activity:?}") };
        assert!(oldest >= since);
        drop(written);
        assert!(matches!(activity.phase(), Phase::Lingering(_)));
        drop(lingering);
        let Phase::Idle(idle) = activity.phase() else { panic!("{activity:?}") };
        assert!(idle >= since);
    }

    #[test]
    fn a_socket_that_takes_nothing_is_written_to_since_the_first_time() {
        let activity = activity();
        activity.note_blocked();
        let Phase::Writing(since) = activity.phase() else { panic!("{activity:?}") };
        activity.note_blocked();
        assert_eq!(activity.phase(), Phase::Writing(since));
        activity.note_flushed();
        assert!(matches!(activity.phase(), Phase::Idle(_)));
    }

    #[test]
    fn ranks_follow_what_a_connection_has_shown() {
        let activity = activity();
        let rank = || activity.standing().map(|(rank, _)| rank);
        assert_eq!(rank(), Some(Rank::Unverified));
        let (_, refused) = activity.begin();
        let lingering = refused.linger();
        assert_eq!(rank(), Some(Rank::Refused));
        drop((lingering, refused));
        assert_eq!(rank(), Some(Rank::Unverified));
        let (_, signed) = activity.begin();
        signed.signed();
        drop(signed);
        assert_eq!(rank(), Some(Rank::Verified), "ever since");
    }

    #[test]
    fn http2_has_no_heads() {
        let activity = activity();
        activity.bytes_arrived();
        assert!(matches!(activity.phase(), Phase::Idle(_)));
    }
}
