//! Every metric, declared once. The doc comment of a field is its HELP; labels come from closed sets, never ids or channels.

use crate::telemetry;
use prometheus::core::Collector;
use prometheus::{
    Encoder, Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Opts, Registry, TextEncoder,
};
pub use prometheus::{IntGauge, IntGaugeVec};
use std::sync::{Arc, Mutex, PoisonError};
use streamgate_core::{id::Kind, reason::Reason};

/// Seconds: from a fast answer on loopback to Stream's timeout of 6 s.
const ANSWER_BUCKETS: [f64; 14] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.5, 6.0];
/// Seconds: from a handler in this process to a slow service.
const HANDLE_BUCKETS: [f64; 12] = [0.0005, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 10.0, 30.0];
/// Seconds: from an immediate delivery to the end of the default retry ladder.
const AGE_BUCKETS: [f64; 12] = [0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0, 120.0, 600.0, 3600.0, 7200.0];

static RENDERING: Mutex<()> = Mutex::new(());

macro_rules! metrics {
    ($($(#[doc = $help:literal])+ $field:ident: $kind:ty = $name:literal $make:expr;)+) => {
        /// All metrics of a process. Passed in, never global: two servers in one test do not share them.
        #[derive(Clone, Debug)]
        pub struct Metrics {
            registry: Registry,
            $($(#[doc = $help])+ pub $field: $kind,)+
        }

        impl Metrics {
            /// Fails only on a name or label that Prometheus rejects: a mistake in this file.
            fn declare() -> prometheus::Result<Metrics> {
                let registry = Registry::new();
                $(
                    let help = [$($help.trim()),+].join(" ");
                    let make: fn(&str, String) -> prometheus::Result<$kind> = $make;
                    let $field = make(concat!("streamgate_", $name), help)?;
                    registry.register(Box::new($field.clone()))?;
                )+
                Ok(Metrics { registry, $($field,)+ })
            }
        }
    };
}

metrics! {
    /// Webhooks answered, by app, kind and outcome (enqueued, spooled, duplicate, the reason of the refusal, or the
    /// outcome of a hook).
    gateway_requests: IntCounterVec = "gateway_requests_total" |name, help| counters(name, help, &["app", "kind", "outcome"]);
    /// Requests with Stream's headers that were answered 4xx, by reason: Stream repeats only those answered 408.
    gateway_refused: IntCounterVec = "gateway_refused_webhooks_total" |name, help| counters(name, help, &["reason"]);
    /// From the first byte of a signed webhook to its answer, in seconds.
    gateway_ack: HistogramVec = "gateway_ack_seconds" |name, help| histograms(name, help, &ANSWER_BUCKETS, &["kind"]);
    /// Webhooks being read, stored or answered.
    gateway_in_flight: IntGauge = "gateway_in_flight" |name, help| IntGauge::new(name, help);
    /// Bytes held for bodies of webhooks that are not answered yet.
    gateway_memory: IntGauge = "gateway_memory_bytes" |name, help| IntGauge::new(name, help);
    /// Open connections to the public port.
    gateway_connections: IntGauge = "gateway_connections" |name, help| IntGauge::new(name, help);
    /// Connections closed to make room for new ones, at gateway.max_connections.
    gateway_evictions: IntCounter = "gateway_connections_evicted_total" |name, help| IntCounter::new(name, help);
    /// Look-ups or marks of seen events that failed; the events went on without deduplication.
    gateway_dedup_errors: IntCounter = "gateway_dedup_errors_total" |name, help| IntCounter::new(name, help);
    /// Events that RabbitMQ sent back because no queue took them: its bindings are broken.
    gateway_returned: IntCounter = "gateway_returned_total" |name, help| IntCounter::new(name, help);
    /// 1 while RabbitMQ takes events, as `gateway` sees it.
    gateway_broker_up: IntGaugeVec = "gateway_broker_up" |name, help| absent_gauge(name, help);
    /// 1 while Redis takes writes, as `gateway` sees it.
    gateway_redis_up: IntGaugeVec = "gateway_redis_up" |name, help| absent_gauge(name, help);
    /// Time to make an event durable, including the look-up of a repeat, in seconds. Repeats are not counted.
    gateway_publish: Histogram = "gateway_publish_seconds" |name, help| histogram(name, help, &ANSWER_BUCKETS);
    /// Events that wait for a worker (waiting) or for another attempt (retrying), dead letters (dead), and with
    /// RabbitMQ events that no queue was bound for (unrouted); counted every 5 seconds. With RabbitMQ, without those
    /// that workers have in hand.
    queue_messages: IntGaugeVec = "queue_messages" |name, help| gauges(name, help, &["queue"]);
    /// Events that wait on the gateway's own disk for RabbitMQ.
    spool_events: IntGauge = "spool_events" |name, help| IntGauge::new(name, help);
    /// Bytes of store.spool_max in use, by waiting events and by the keys of earlier events.
    spool_bytes: IntGauge = "spool_bytes" |name, help| IntGauge::new(name, help);
    /// Age of the oldest event that waits on the gateway's own disk, in seconds; 0 without any.
    spool_oldest: IntGauge = "spool_oldest_seconds" |name, help| IntGauge::new(name, help);
    /// Events that left the gateway's own disk because RabbitMQ had confirmed them.
    spool_released: IntCounter = "spool_released_total" |name, help| IntCounter::new(name, help);
    /// Events on the gateway's own disk that the queue refuses although it takes others.
    spool_held: IntGauge = "spool_held_events" |name, help| IntGauge::new(name, help);
    /// Deliveries settled, by route and outcome (done, retry, dead, superseded, wait, unmatched).
    worker_deliveries: IntCounterVec = "worker_deliveries_total" |name, help| counters(name, help, &["route", "outcome"]);
    /// Time in a handler, in seconds.
    worker_handle: HistogramVec = "worker_handle_seconds" |name, help| histograms(name, help, &HANDLE_BUCKETS, &["route"]);
    /// From an event's arrival at the gateway to its handling, in seconds.
    worker_event_age: Histogram = "worker_event_age_seconds" |name, help| histogram(name, help, &AGE_BUCKETS);
    /// Attempts that failed and are tried again later.
    worker_retries: IntCounterVec = "worker_retries_total" |name, help| counters(name, help, &["route"]);
    /// Events that were parked because their route was full, open or paused. This counts no attempt.
    worker_parked: IntCounterVec = "worker_parked_total" |name, help| counters(name, help, &["route"]);
    /// Events that are parked now, counted every 5 seconds. With RabbitMQ, without those that workers have in hand.
    worker_parked_events: IntGaugeVec = "worker_parked_events" |name, help| gauges(name, help, &["route"]);
    /// Whether this worker handles a route's events: 0 it does, 1 the route's breaker is open, 2 a person paused the
    /// route.
    worker_route_state: IntGaugeVec = "worker_route_state" |name, help| gauges(name, help, &["route"]);
    /// Events that became dead letters.
    worker_dead_letters: IntCounterVec = "worker_dead_letters_total" |name, help| counters(name, help, &["reason"]);
    /// Claims that could not be made or recorded; their events were handled all the same.
    worker_claim_errors: IntCounter = "worker_claim_errors_total" |name, help| IntCounter::new(name, help);
    /// Retries and dead letters that RabbitMQ sent back because no queue took them: its bindings are broken.
    worker_returned: IntCounter = "worker_returned_total" |name, help| IntCounter::new(name, help);
    /// 1 while RabbitMQ hands out events and takes retries, as `worker` sees it.
    worker_broker_up: IntGaugeVec = "worker_broker_up" |name, help| absent_gauge(name, help);
    /// 1 while Redis takes writes, as `worker` sees it.
    worker_redis_up: IntGaugeVec = "worker_redis_up" |name, help| absent_gauge(name, help);
    /// Event handlers that are running.
    worker_in_flight: IntGauge = "worker_in_flight" |name, help| IntGauge::new(name, help);
    /// Deliveries that are handled and not yet settled: they keep their places while RabbitMQ takes no retries or dead
    /// letters.
    worker_settling: IntGauge = "worker_settling" |name, help| IntGauge::new(name, help);
    /// Time to answer a synchronous hook once its body is read, in seconds, by kind and outcome (answered, repeated, or
    /// why it was answered by its policy).
    hook_call: HistogramVec = "hook_call_seconds" |name, help| histograms(name, help, &ANSWER_BUCKETS, &["kind", "outcome"]);
    /// 1 while a worker is available to answer hooks, as `gateway` sees it.
    gateway_hook_workers: IntGaugeVec = "gateway_hook_workers_up" |name, help| absent_gauge(name, help);
    /// Answers from workers that came after their callers had given up.
    hook_late_answers: IntCounter = "hook_late_answers_total" |name, help| IntCounter::new(name, help);
    /// First answers to hooks that could not be looked up or kept; a repeat would be asked again.
    hook_memory_errors: IntCounter = "hook_memory_errors_total" |name, help| IntCounter::new(name, help);
    /// Hooks that this worker received, by kind and outcome (answered, or why there was no answer).
    worker_calls: IntCounterVec = "worker_calls_total" |name, help| counters(name, help, &["kind", "outcome"]);
    /// Hooks that this worker is answering.
    worker_calls_in_flight: IntGauge = "worker_calls_in_flight" |name, help| IntGauge::new(name, help);
    /// Time in the handler of a hook, in seconds.
    worker_call: HistogramVec = "worker_call_seconds" |name, help| histograms(name, help, &HANDLE_BUCKETS, &["kind"]);
    /// Log lines that were dropped because stderr was not read or could not be written.
    log_lines_dropped: IntCounter = "log_lines_dropped_total" |name, help| IntCounter::new(name, help);
    /// Expiry of the served certificate, in seconds since the Unix epoch; 0 without TLS.
    tls_certificate_expiry: Gauge = "tls_certificate_expiry_timestamp_seconds" |name, help| Gauge::new(name, help);
    /// 1, with the version and the source revision as labels.
    build_info: IntGaugeVec = "build_info"
        |name, help| IntGaugeVec::new(Opts::new(name, help), &["version", "revision"]);
}

impl Metrics {
    #[expect(clippy::expect_used, reason = "a wrong name or label in this file, which every test would meet")]
    pub fn new() -> Arc<Metrics> {
        let metrics = Metrics::declare().expect("every metric is declared once, with a valid name");
        let revision = option_env!("STREAMGATE_REVISION").unwrap_or("unknown");
        metrics.build_info.with_label_values(&[env!("CARGO_PKG_VERSION"), revision]).set(1);
        let process = prometheus::process_collector::ProcessCollector::for_self();
        metrics.registry.register(Box::new(process)).expect("its names are its own");
        Arc::new(metrics)
    }

    /// Gives every label set that is known from the start its first value: a counter that appears with its first event
    /// hides that event from rates and alerts.
    pub fn begin(&self, apps: &[&str], routes: &[&str]) {
        for app in apps {
            for outcome in ["enqueued", "spooled", "duplicate"] {
                self.gateway_requests.with_label_values(&[app, "push", outcome]).reset();
            }
            for reason in Reason::OF_OVERLOAD {
                self.gateway_requests.with_label_values(&[app, "push", reason.as_str()]).reset();
            }
            let unavailable = [Kind::BeforeMessageSend, Kind::CustomCommand]
                .map(|kind| [kind.as_str(), Reason::StoreUnavailable.as_str()]);
            for [kind, outcome] in hook_outcomes().chain(unavailable) {
                self.gateway_requests.with_label_values(&[app, kind, outcome]).reset();
            }
        }
        for kind in [Kind::Push, Kind::BeforeMessageSend, Kind::CustomCommand] {
            self.gateway_ack.with_label_values(&[kind.as_str()]);
        }
        for labels in hook_outcomes() {
            self.worker_calls.with_label_values(&labels).reset();
        }
        for route in routes {
            for outcome in ["done", "retry", "dead"] {
                self.worker_deliveries.with_label_values(&[*route, outcome]).reset();
            }
            self.worker_handle.with_label_values(&[*route]);
            self.worker_retries.with_label_values(&[*route]).reset();
            self.worker_parked.with_label_values(&[*route]).reset();
        }
        for reason in Reason::OF_WORKERS {
            self.worker_dead_letters.with_label_values(&[reason.as_str()]).reset();
        }
    }

    /// The routes whose breaker is open in this process.
    pub fn open_routes(&self) -> Vec<String> {
        let families = self.worker_route_state.collect();
        let states = families.iter().flat_map(|family| family.get_metric());
        let open = states.filter(|state| state.get_gauge().get_value() == 1.0);
        open.flat_map(|state| state.get_label().iter().map(|label| label.value().to_owned())).collect()
    }

    /// The Prometheus text format.
    pub fn render(&self) -> Result<Vec<u8>, prometheus::Error> {
        // One at a time: two concurrent renderings would both add the difference.
        let _adding = RENDERING.lock().unwrap_or_else(PoisonError::into_inner);
        self.log_lines_dropped.inc_by(telemetry::dropped_lines().saturating_sub(self.log_lines_dropped.get()));
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }
}

/// Kind and outcome of every hook, with or without an answer from a handler.
fn hook_outcomes() -> impl Iterator<Item = [&'static str; 2]> {
    let failures = [Reason::NoWorker, Reason::Unhandled, Reason::HookFailed, Reason::HookTimeout];
    let outcomes = ["answered"].into_iter().chain(failures.map(Reason::as_str));
    outcomes.flat_map(|outcome| [Kind::BeforeMessageSend, Kind::CustomCommand].map(|kind| [kind.as_str(), outcome]))
}

fn counters(name: &str, help: String, labels: &[&str]) -> prometheus::Result<IntCounterVec> {
    IntCounterVec::new(Opts::new(name, help), labels)
}

/// A gauge without labels that is absent until it is first set: a process that does not know must not report 0.
fn absent_gauge(name: &str, help: String) -> prometheus::Result<IntGaugeVec> {
    gauges(name, help, &[])
}

fn gauges(name: &str, help: String, labels: &[&str]) -> prometheus::Result<IntGaugeVec> {
    IntGaugeVec::new(Opts::new(name, help), labels)
}

fn histogram(name: &str, help: String, buckets: &[f64]) -> prometheus::Result<Histogram> {
    Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec()))
}

fn histograms(name: &str, help: String, buckets: &[f64], labels: &[&str]) -> prometheus::Result<HistogramVec> {
    HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), labels)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_is_declared_once_and_rendered_with_help() {
        let metrics = Metrics::new();
        metrics.gateway_requests.with_label_values(&["chat", "push", "enqueued"]).inc();
        let text = String::from_utf8(metrics.render().unwrap()).unwrap();
        assert!(text.contains("streamgate_gateway_requests_total{app=\"chat\",kind=\"push\",outcome=\"enqueued\"} 1"));
        assert!(text.contains("# HELP streamgate_gateway_requests_total Webhooks answered, by app"));
        assert!(text.contains("streamgate_build_info{") && text.contains("process_resident_memory_bytes"));
    }
}
