//! One request: admit it, read its body, make it durable or have a handler answer it, respond. Every path ends within
//! `answer_deadline`.

use crate::access_log::{AccessLog, RequestDetails, WebhookSource};
use crate::activity::{InHand, Unwritten};
use crate::budget::Share;
use crate::deadline::Deadline;
use crate::head::{self, Head, RequestTraits};
use crate::hooks::{AnswerHook, Asked};
use crate::intake::{self, Identity};
use crate::linger::linger;
use crate::paths::{self, Target};
use crate::read::Reader;
use crate::response::{self, Outcome, Taken};
use arc_swap::ArcSwap;
use bytes::Bytes;
use futures_util::FutureExt;
use http_body_util::Full;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::{Request, Response};
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use streamgate_core::{
    admission::Limits, apps::Apps, id::Kind, peer::Peers, ports::Enqueue, reason::Reason, signature::Verifier,
};
use streamgate_service::config::{DedupConfig, GatewayConfig};
use streamgate_service::metrics::Metrics;
use tokio_util::sync::CancellationToken;

/// When a request's connection came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arrival {
    InTime,
    /// Came late in the drain: an admitted request is answered 503, so that the sender tries again.
    Late,
}

/// Everything that requests share.
#[derive(Debug)]
pub struct Intake<E> {
    apps: ArcSwap<Apps>,
    enqueue: Arc<E>,
    /// Boxed, unlike the ports: a hook waits for a worker, and the types on its way matter to nothing here.
    hooks: Arc<dyn AnswerHook>,
    limits: Limits,
    body_timeout: Duration,
    answer_deadline: Duration,
    reader: Reader,
    identity: Identity,
    pub(crate) peers: Peers,
    /// Signed requests in flight; `max_in_flight` is their limit.
    signed: AtomicUsize,
    max_in_flight: usize,
    /// Cancelled when the drain's time is over: requests that still wait are answered 503, so that the sender tries again.
    given_up: CancellationToken,
    pub(crate) log: Arc<AccessLog>,
    pub(crate) metrics: Arc<Metrics>,
}

impl<E: Enqueue> Intake<E> {
    pub fn new(
        config: &GatewayConfig,
        dedup: &DedupConfig,
        apps: Apps,
        enqueue: Arc<E>,
        hooks: Arc<dyn AnswerHook>,
        log: AccessLog,
    ) -> Self {
        let metrics = Arc::clone(&log.metrics);
        let GatewayConfig { max_body, body_timeout, memory_budget, max_in_flight, .. } = *config;
        // Half as many again: unverified requests take no places of signed ones.
        let places = max_in_flight.div_ceil(2);
        Intake {
            apps: ArcSwap::from_pointee(apps),
            enqueue,
            hooks,
            limits: Limits { max_body },
            body_timeout,
            answer_deadline: config.answer_deadline,
            reader: Reader::new(max_body, body_timeout, memory_budget, places, Arc::clone(&metrics)),
            identity: Identity::new(dedup),
            peers: config.peers.clone(),
            signed: AtomicUsize::new(0),
            max_in_flight,
            given_up: CancellationToken::new(),
            log: Arc::new(log),
            metrics,
        }
    }

    /// Answers everything in hand now.
    pub(crate) fn give_up(&self) {
        self.given_up.cancel();
    }

    /// Requests that are read from now on are judged by these apps.
    pub fn set_apps(&self, apps: Apps) {
        self.apps.store(Arc::new(apps));
    }

    /// Answers one request of a connection. Its head is judged and dropped before this returns, so that heads never wait in
    /// memory for the tasks of HTTP/2 to run.
    pub(crate) fn answer(
        self: Arc<Self>,
        request: Request<Incoming>,
        first_byte: Instant,
        in_hand: InHand,
        arrival: Arrival,
    ) -> impl Future<Output = Response<AnswerBody>> + Send + use<E> {
        let head_read = tokio::time::Instant::now();
        let (parts, body) = request.into_parts();
        let manner = RequestTraits::of(&parts);
        let client = head::client(&self.peers, in_hand.connection().peer(), &parts.headers);
        let target = if head::is_too_large(&parts) {
            Err(Reason::HeadTooLarge)
        } else if self.peers.allow(client) {
            paths::target(&parts.method, parts.uri.path())
        } else {
            Err(Reason::PeerNotAllowed)
        };
        let admitted = target.and_then(|target| head::admit(target, client, &parts, &self.apps.load(), &self.limits));
        let mut about = RequestDetails::of(client.address, &parts.headers);
        drop(parts);
        async move {
            let flight = Flight::start(&self.metrics);
            let app = admitted.as_ref().ok().map(|(head, _)| Arc::clone(&head.app));
            let mut cost = None;
            let outcome = match admitted {
                Ok((head, verifier)) if arrival == Arrival::InTime => {
                    let hook = self.hooks.deadline(head.target.kind);
                    let deadline = Deadline::of(head_read, self.answer_deadline, hook);
                    let take = self.take(body, verifier, head, &in_hand, (&mut cost, &mut about), deadline);
                    tokio::select! {
                        biased;
                        taken = take => taken,
                        () = tokio::time::sleep_until(deadline.answer_by) => Err(Reason::DeadlineExceeded),
                        () = self.given_up.cancelled() => Err(Reason::Draining),
                    }
                }
                late_or_refused => {
                    // A client that sent `Expect: 100-continue` has not sent a body yet.
                    if !manner.expects_continue {
                        self.linger(body, &in_hand);
                    }
                    Err(late_or_refused.err().unwrap_or(Reason::Draining))
                }
            };
            let outcome = self.or_by_policy(outcome, target.ok(), &in_hand);
            if matches!(outcome, Err(Reason::WrongSignature | Reason::UnknownKey)) {
                // Its address is not banned: behind a balancer that would refuse Stream.
                in_hand.strike();
            }
            let kind = target.ok().map(|target| target.kind);
            let of = WebhookSource { app: app.as_deref(), kind, is_signed: in_hand.is_signed() };
            self.log.answered(of, &outcome, &about, first_byte);
            drop(flight);
            let response = response::response(outcome, manner.is_http1 && in_hand.is_struck());
            response.map(|bytes| AnswerBody { bytes, _unwritten: in_hand.answered(), _cost: cost })
        }
    }

    /// Reads an admitted request, and stores its event or has its hook answered. `cost` receives the request's cost besides
    /// its body, held until the answer is taken; `about` receives what only the body says.
    async fn take(
        &self,
        mut body: Incoming,
        verifier: Verifier,
        head: Head,
        in_hand: &InHand,
        (cost, about): (&mut Option<Share>, &mut RequestDetails),
        deadline: Deadline,
    ) -> Outcome {
        let client = Some(head.client.address).filter(|_| head.client.is_certain);
        let read = match self.reader.begin(in_hand, client).await {
            Ok(mut reading) => {
                *cost = Some(reading.cost());
                reading.read(&mut body, verifier, head.declared).await
            }
            Err(reason) => {
                // Requests that wait for bodies do not hold the memory, so it is held by answers that peers do not take.
                in_hand.connection().evict_for_memory();
                Err(reason)
            }
        };
        let held = match read {
            Ok(held) => held,
            Err(reason @ (Reason::BodyTimeout | Reason::BodyIncomplete | Reason::Displaced)) => return Err(reason),
            Err(reason) => {
                self.linger(body, in_hand);
                return Err(reason);
            }
        };
        drop(body);
        if let Some(cost) = cost {
            cost.signed();
        }
        // An id made from the body would make two equal messages one.
        let (kind, has_id) = (head.target.kind, head.id.is_some());
        let Some(_place) = Signed::start(&self.signed, self.max_in_flight) else {
            let reason = Reason::InFlightLimit;
            return match kind {
                Kind::Push => Err(reason),
                Kind::BeforeMessageSend | Kind::CustomCommand => {
                    Ok(Taken::Hook(self.hooks.by_policy(kind, &held.bytes, reason)))
                }
            };
        };
        about.bytes = Some(held.bytes.len());
        let (body, now) = (Bytes::from_owner(held), jiff::Timestamp::now().as_millisecond());
        let call = match intake::envelope(head, body.clone(), now, self.identity, &*self.hooks) {
            // It is signed, so it is answered, but by the policy alone.
            Err(reason @ Reason::Unhandled) => return Ok(Taken::Hook(self.hooks.by_policy(kind, &body, reason))),
            call => call?,
        };
        drop(body);
        about.event_type = self.log.names_types().then(|| call.event_type.clone());
        match kind {
            // Boxed, because hyper keeps space for the whole future in each open connection, idle ones too.
            Kind::Push => intake::store(&*self.enqueue, &self.metrics, call).boxed().await.map(Taken::Event),
            Kind::BeforeMessageSend | Kind::CustomCommand => {
                let repeatable = has_id || self.hooks.is_by_body(kind);
                let asked = Asked { call, repeatable, deadline: deadline.decide_by, given_up: self.given_up.clone() };
                Ok(Taken::Hook(Arc::clone(&self.hooks).answer(asked).await))
            }
        }
    }

    /// Stream never repeats a hook, so the policy answers one that is refused for a passing reason.
    fn or_by_policy(&self, outcome: Outcome, target: Option<Target>, in_hand: &InHand) -> Outcome {
        match (outcome, target) {
            (Err(reason), Some(Target { kind: kind @ (Kind::BeforeMessageSend | Kind::CustomCommand), .. }))
                if response::is_passing(reason) =>
            {
                self.hooks.refused(kind, reason, in_hand.is_signed()).map(Taken::Hook).ok_or(reason)
            }
            (outcome, _) => outcome,
        }
    }

    fn linger(&self, body: Incoming, in_hand: &InHand) {
        linger(body, in_hand, self.limits.max_body, self.body_timeout);
    }
}

/// An answer's body, held until the peer has taken it.
#[derive(Debug)]
pub(crate) struct AnswerBody {
    bytes: Full<Bytes>,
    _unwritten: Unwritten,
    _cost: Option<Share>,
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Pin::new(&mut self.bytes).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.bytes.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.bytes.size_hint()
    }
}

/// Counts a request in flight until it is dropped.
struct Flight<'a>(&'a Metrics);

impl<'a> Flight<'a> {
    fn start(metrics: &'a Metrics) -> Flight<'a> {
        metrics.gateway_in_flight.inc();
        Flight(metrics)
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        self.0.gateway_in_flight.dec();
    }
}

/// A place among the signed requests in flight.
struct Signed<'a>(&'a AtomicUsize);

impl<'a> Signed<'a> {
    fn start(signed: &'a AtomicUsize, most: usize) -> Option<Signed<'a>> {
        let place = Signed(signed);
        (signed.fetch_add(1, Ordering::Relaxed) < most).then_some(place)
    }
}

impl Drop for Signed<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
