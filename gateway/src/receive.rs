//! One request: admit it, read its body, make it durable or have it answered, answer. Every path ends within
//! `answer_deadline`.

use crate::activity::InHand;
use crate::budget::{HeldBody, MemoryBudget, Share};
use crate::hooks::{AnswerHook, Asked};
use crate::intake::{self, Beside};
use crate::response::{self, Outcome, Taken};
use crate::route;
use arc_swap::ArcSwap;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::header::{CONTENT_ENCODING, CONTENT_LENGTH, EXPECT, HeaderMap};
use hyper::{Request, Response};
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use streamgate_core::{
    admission::{self, Facts, Limits, Single},
    apps::Apps,
    envelope::header,
    id::Kind,
    inflate::{BodyReader, SignedBody},
    ports::{Enqueue, Seen},
    reason::Reason,
    signature::Verifier,
};
use streamgate_service::{config::GatewayConfig, metrics::Metrics};
use tokio_util::sync::CancellationToken;

/// How much of a refused body is read and thrown away, in bodies of the largest size: closing on a client that still sends
/// resets the connection, and the client never reads why.
const LINGER_BODIES: usize = 4;
/// What stands in labels where no app or kind is known.
const NONE: &str = "none";

/// When a request's connection came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arrival {
    InTime,
    /// During the drain: what could be taken is told to come back.
    Late,
}

/// Everything that requests share.
#[derive(Debug)]
pub struct Intake<E, S> {
    apps: ArcSwap<Apps>,
    enqueue: Arc<E>,
    seen: Arc<S>,
    /// Boxed, other than the ports: a hook waits for a worker, and its road has types of its own that nothing here needs.
    hooks: Arc<dyn AnswerHook>,
    limits: Limits,
    body_timeout: Duration,
    answer_deadline: Duration,
    in_flight: AtomicUsize,
    budget: Arc<MemoryBudget>,
    /// The drain's time is over: whoever still waits is told to come back.
    given_up: CancellationToken,
    pub(crate) metrics: Arc<Metrics>,
}

impl<E: Enqueue, S: Seen> Intake<E, S> {
    pub fn new(
        config: &GatewayConfig,
        apps: Apps,
        enqueue: Arc<E>,
        seen: Arc<S>,
        hooks: Arc<dyn AnswerHook>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Intake {
            apps: ArcSwap::from_pointee(apps),
            enqueue,
            seen,
            hooks,
            limits: Limits { max_body: config.max_body, max_in_flight: config.max_in_flight },
            body_timeout: config.body_timeout,
            answer_deadline: config.answer_deadline,
            in_flight: AtomicUsize::new(0),
            budget: MemoryBudget::new(config.memory_budget, Arc::clone(&metrics)),
            given_up: CancellationToken::new(),
            metrics,
        }
    }

    /// Answers all that is in hand, now.
    pub(crate) fn give_up(&self) {
        self.given_up.cancel();
    }

    /// Requests that are read from now on are judged by these apps.
    pub fn set_apps(&self, apps: Apps) {
        self.apps.store(Arc::new(apps));
    }

    /// Answers one request of a connection.
    pub(crate) async fn answer(
        self: Arc<Self>,
        request: Request<Incoming>,
        first_byte: Instant,
        in_hand: InHand,
        arrival: Arrival,
    ) -> Response<AnswerBody> {
        let flight = Flight::start(&*self);
        let head_read = tokio::time::Instant::now();
        let (parts, body) = request.into_parts();
        let apps = self.apps.load_full();
        let target = route::target(&parts.method, parts.uri.path());
        let admitted =
            target.and_then(|_| admission::admit(&facts(&parts.headers, flight.number), &apps, &self.limits));
        let admitted = admitted.and_then(|admitted| match arrival {
            Arrival::InTime => Ok(admitted),
            Arrival::Late => Err(Reason::Draining),
        });
        let kind = target.map_or(NONE, |target| target.kind.as_str());
        let app = admitted.as_ref().map_or(NONE, |admitted| &*admitted.key.app);
        let outcome = match (target, &admitted) {
            (Err(reason), _) | (Ok(_), &Err(reason)) => {
                // A client that asked first has not sent anything yet.
                if !parts.headers.contains_key(EXPECT) {
                    self.linger(body, &in_hand);
                }
                Err(reason)
            }
            (Ok(target), Ok(admitted)) => {
                let query_type = route::query_type(parts.uri.query());
                let beside = Beside {
                    target,
                    app,
                    api_key: admitted.api_key,
                    signature: admitted.signature,
                    webhook_id: first(&parts.headers, header::WEBHOOK_ID),
                    webhook_attempt: first(&parts.headers, header::WEBHOOK_ATTEMPT),
                    traceparent: first(&parts.headers, header::TRACEPARENT),
                    query_type: query_type.as_deref(),
                };
                let verifier = Verifier::new(&admitted.key.secrets, admitted.signature);
                let deadline = head_read + self.answer_deadline.min(self.hooks.deadline(target.kind));
                let take = self.take(body, verifier, &beside, &in_hand, deadline);
                tokio::select! {
                    biased;
                    taken = take => taken,
                    () = tokio::time::sleep_until(deadline) => Err(Reason::DeadlineExceeded),
                    () = self.given_up.cancelled() => Err(Reason::Draining),
                }
            }
        };
        self.told(app, kind, &outcome, first_byte);
        response::response(outcome).map(|bytes| AnswerBody { bytes, _in_hand: in_hand })
    }

    /// Reads an admitted request, and stores its event or has its hook answered.
    async fn take(
        &self,
        mut body: Incoming,
        verifier: Verifier,
        beside: &Beside<'_>,
        in_hand: &InHand,
        deadline: tokio::time::Instant,
    ) -> Outcome {
        let reader = BodyReader::new(verifier, self.limits.max_body, self.budget.share());
        let read = tokio::time::timeout(self.body_timeout, read(&mut body, reader)).await;
        let signed = match read.unwrap_or(Err(Reason::BodyTimeout)) {
            Ok(signed) => signed,
            Err(reason @ (Reason::BodyTimeout | Reason::BodyIncomplete)) => return Err(reason),
            Err(reason) => {
                self.linger(body, in_hand);
                return Err(reason);
            }
        };
        let bytes = Bytes::from_owner(HeldBody(signed));
        let call = intake::envelope(beside, bytes, jiff::Timestamp::now().as_millisecond());
        match beside.target.kind {
            Kind::Push => intake::store(&*self.enqueue, &*self.seen, &self.metrics, call).await.map(Taken::Event),
            Kind::BeforeMessageSend | Kind::CustomCommand => {
                // An id of the body's own would make two equal messages one.
                let repeatable = beside.webhook_id.is_some_and(|id| !id.is_empty());
                let asked = Asked { call, repeatable, deadline, given_up: self.given_up.clone() };
                Ok(Taken::Hook(Arc::clone(&self.hooks).answer(asked).await))
            }
        }
    }

    /// Goes on reading a refused body for a while, beside the answer, so that the answer arrives.
    fn linger(&self, mut body: Incoming, in_hand: &InHand) {
        if body.is_end_stream() {
            return;
        }
        let in_hand = in_hand.another();
        let mut left = self.limits.max_body.saturating_mul(LINGER_BODIES);
        let patience = self.body_timeout;
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
            drop(tokio::time::timeout(patience, discard).await);
            drop(in_hand);
        });
    }

    /// Counter and histogram of one answer, in one place.
    fn told(&self, app: &str, kind: &str, outcome: &Outcome, first_byte: Instant) {
        self.metrics.gateway_requests.with_label_values(&[app, kind, response::word(outcome)]).inc();
        self.metrics.gateway_ack.with_label_values(&[kind]).observe(first_byte.elapsed().as_secs_f64());
    }

    /// A head that never came whole, answered by its connection.
    pub(crate) fn told_header_timeout(&self, first_byte: Instant) {
        self.told(NONE, NONE, &Err(Reason::HeaderTimeout), first_byte);
    }
}

/// An answer's body. The request is in hand until hyper has taken it over.
#[derive(Debug)]
pub(crate) struct AnswerBody {
    bytes: Full<Bytes>,
    _in_hand: InHand,
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

async fn read(body: &mut Incoming, mut reader: BodyReader<Share>) -> Result<SignedBody<Share>, Reason> {
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| Reason::BodyIncomplete)?;
        // Trailers are none of ours.
        if let Some(data) = frame.data_ref() {
            reader.push(data)?;
        }
    }
    reader.finish()
}

/// A request in flight, counted.
struct Flight<'a> {
    in_flight: &'a AtomicUsize,
    metrics: &'a Metrics,
    /// Requests in flight when it came, itself included.
    number: usize,
}

impl<'a> Flight<'a> {
    fn start<E, S>(intake: &'a Intake<E, S>) -> Flight<'a> {
        let number = intake.in_flight.fetch_add(1, Ordering::Relaxed) + 1;
        intake.metrics.gateway_in_flight.inc();
        Flight { in_flight: &intake.in_flight, metrics: &intake.metrics, number }
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
        self.metrics.gateway_in_flight.dec();
    }
}

fn facts(headers: &HeaderMap, in_flight: usize) -> Facts<'_> {
    Facts {
        api_key: single(headers, header::API_KEY),
        signature: single(headers, header::SIGNATURE),
        content_encoding: headers.get(CONTENT_ENCODING).map(|value| value.as_bytes()),
        content_length: headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok()),
        in_flight,
    }
}

fn single<'a>(headers: &'a HeaderMap, name: &str) -> Single<'a> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (None, _) => Single::Absent,
        (Some(value), None) => Single::One(value.as_bytes()),
        (Some(_), Some(_)) => Single::Repeated,
    }
}

fn first<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a [u8]> {
    headers.get(name).map(|value| value.as_bytes())
}
