//! Envelope ↔ AMQP properties and headers: the contract with consumers in any language. Readers ignore what they do not
//! know and have a default for what is missing, so that old and new processes can share the queues.

use bytes::Bytes;
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use std::collections::HashMap;
use std::time::Duration;
use streamgate_core::{
    dead_letter::DeadLetter,
    envelope::{Envelope, Properties, UNKNOWN_TYPE, VERSION, header, safe_type},
    hook::is_answer,
    id::{Kind, body_id, fingerprint},
    reason::Reason,
};

const PERSISTENT: u8 = 2;
const TRANSIENT: u8 = 1;
/// RabbitMQ's direct reply-to: the broker hands answers straight to the channel that asked.
pub(super) const REPLY_TO: &str = "amq.rabbitmq.reply-to";
const CONTENT_TYPE: &str = "application/json";
/// Why an event is in the dead letters, and since when.
const REASON: &str = "x-streamgate-reason";
const ERROR: &str = "x-streamgate-error";
const DIED_AT: &str = "x-streamgate-died-at";
/// Milliseconds since the Unix epoch: until then a copy waits in further rounds of the longest retry step.
const NOT_BEFORE: &str = "x-streamgate-not-before";
/// The broker's count of earlier deliveries that were not acknowledged.
const DELIVERY_COUNT: &str = "x-delivery-count";
/// The broker's record of the queues that it took a message out of, the latest first.
const X_DEATH: &str = "x-death";
/// Precision of a time, in nanoseconds: of a death that a worker recorded, of an event's arrival, of a death that the
/// broker recorded.
const MICROSECOND: i64 = 1_000;
const MILLISECOND: i64 = 1_000_000;
const SECOND: i64 = 1_000_000_000;
/// Most bytes of an AMQP short string.
const MAX_SHORT: usize = 255;

/// A message as it was received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Received {
    pub(super) envelope: Envelope,
    /// The broker's count of earlier deliveries.
    pub(super) redelivered: u32,
    pub(super) annotations: Annotations,
}

/// What a published copy carries in addition to its envelope.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Annotations {
    pub(super) not_before_ms: Option<i64>,
    pub(super) death: Option<Death>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Death {
    pub(super) reason: String,
    pub(super) error: Option<String>,
    /// Microseconds since the Unix epoch: the leading digits of the dead letter's number.
    pub(super) at_us: i64,
    /// RabbitMQ took the event out of its queue.
    pub(super) by_broker: bool,
}

/// Marks a message that only tests whether an exchange leads to its queue.
const PROBE: &str = "x-streamgate-probe";

/// A message that each of our readers removes, so that the test leaves nothing behind.
pub(super) fn probe() -> BasicProperties {
    let mut headers = FieldTable::default();
    headers.insert(PROBE.into(), AMQPValue::LongString(VERSION.to_string().into()));
    BasicProperties::default().with_headers(headers)
}

pub(super) fn is_probe(properties: &BasicProperties) -> bool {
    properties.headers().as_ref().is_some_and(|headers| headers.contains_key(PROBE))
}

/// `<app>.push.<type>`.
pub(super) fn routing_key(envelope: &Envelope) -> ShortString {
    short(&format!("{}.{}.{}", envelope.app, envelope.kind.as_str(), envelope.event_type))
}

/// All properties and headers of a message. Nothing that the broker put on an earlier copy goes along: the broker drops
/// what looks to it like a dead-letter cycle.
pub(super) fn properties(envelope: &Envelope, annotations: &Annotations) -> BasicProperties {
    let mut headers = FieldTable::default();
    let mut put = |name: &str, value: &str| {
        headers.insert(name.into(), AMQPValue::LongString(value.into()));
    };
    for (name, value) in envelope.headers() {
        put(name, &value);
    }
    if let Some(not_before) = annotations.not_before_ms {
        put(NOT_BEFORE, &not_before.to_string());
    }
    if let Some(Death { reason, error, at_us, by_broker: _ }) = &annotations.death {
        put(REASON, reason);
        put(DIED_AT, &jiff::Timestamp::from_microsecond(*at_us).unwrap_or_default().to_string());
        if let Some(error) = error {
            put(ERROR, error);
        }
    }
    BasicProperties::default()
        .with_delivery_mode(PERSISTENT)
        .with_content_type(CONTENT_TYPE.into())
        .with_message_id(short(&envelope.id))
        .with_app_id(short(&envelope.app))
        .with_type(short(&envelope.event_type))
        .with_timestamp(u64::try_from(envelope.received_at_ms / 1000).unwrap_or_default())
        .with_headers(headers)
}

/// Properties of a call. It does not outlive its caller: never on disk, and dropped by the broker when the caller's
/// time is over.
pub(super) fn call(envelope: &Envelope, number: u64, within: Duration) -> BasicProperties {
    properties(envelope, &Annotations::default())
        .with_delivery_mode(TRANSIENT)
        .with_expiration(within.as_millis().to_string().into())
        .with_correlation_id(number.to_string().into())
        .with_reply_to(REPLY_TO.into())
}

/// The time left for a call, from its expiration: nothing records when it was sent.
pub(super) fn within(properties: &BasicProperties) -> Option<Duration> {
    properties.expiration().as_ref()?.as_str().parse().ok().map(Duration::from_millis)
}

/// Properties of the answer to the call with this correlation id. `reason`: why there is no answer.
pub(super) fn answer(correlation: ShortString, reason: Option<Reason>) -> BasicProperties {
    let mut headers = FieldTable::default();
    headers.insert(header::VERSION.into(), AMQPValue::LongString(VERSION.to_string().into()));
    if let Some(reason) = reason {
        headers.insert(REASON.into(), AMQPValue::LongString(reason.as_str().into()));
    }
    BasicProperties::default()
        .with_delivery_mode(TRANSIENT)
        .with_content_type(CONTENT_TYPE.into())
        .with_correlation_id(correlation)
        .with_headers(headers)
}

/// The number of the call that is answered, and its answer. A body that is not a JSON object comes from a foreign
/// sender and is a failure.
pub(super) fn read_answer(properties: &BasicProperties, body: Vec<u8>) -> Option<(u64, Result<Bytes, Reason>)> {
    let number = properties.correlation_id().as_ref()?.as_str().parse().ok()?;
    let reason = properties.headers().as_ref().and_then(|headers| text(headers.inner().get(REASON)?));
    let answer = match reason {
        // A later version may know reasons that this one does not.
        Some(reason) => Err(Reason::parse(&reason).unwrap_or(Reason::HookFailed)),
        None if is_answer(&body) => Ok(body.into()),
        None => Err(Reason::HookFailed),
    };
    Some((number, answer))
}

/// Reads a message of this version, another version or a foreign publisher: whatever is missing has a default.
pub(super) fn read(properties: &BasicProperties, routing_key: &str, body: Bytes) -> Received {
    let headers: HashMap<&str, String> = properties
        .headers()
        .iter()
        .flat_map(FieldTable::inner)
        .filter_map(|(name, value)| Some((name.as_str(), text(value)?)))
        .collect();
    let header = |name: &str| headers.get(name).map(String::as_str);
    let number = |name: &str| header(name).and_then(|value| value.parse::<i64>().ok());
    let dropped = Dropped::of(properties);
    // A dead letter made by the broker has its original routing key in `x-death`; the current one may be the policy's.
    let keys = [dropped.as_ref().and_then(|dropped| dropped.routing_key.as_deref()), Some(routing_key)];
    let routed = keys.into_iter().flatten().find_map(|key| key.split_once(".push."));
    let key = header(header::KEY);
    let app = properties.app_id().as_ref().map(ShortString::as_str);
    let app = app.or_else(|| key?.split(':').next()).or_else(|| routed.map(|(app, _)| app));
    let own = |value: &Option<ShortString>| value.as_ref().map(ToString::to_string).filter(|text| !text.is_empty());
    let id = own(properties.message_id()).or_else(|| header(header::WEBHOOK_ID).map(str::to_owned));
    let event_type = properties.kind().as_ref().map(ShortString::as_str).or(routed.map(|(_, event_type)| event_type));
    let known = Properties {
        app: app.unwrap_or(UNKNOWN_TYPE).to_owned(),
        kind: key.and_then(|key| Kind::parse(key.split(':').nth(1)?)).unwrap_or(Kind::Push),
        id: id.unwrap_or_else(|| body_id(&body)),
        event_type: safe_type(event_type).to_owned(),
    };
    let redelivered = u32::try_from(number(DELIVERY_COUNT).unwrap_or_default()).unwrap_or(u32::MAX);
    let died_at = header(DIED_AT).and_then(|text| text.parse::<jiff::Timestamp>().ok());
    let ours = || {
        header(REASON).map(|reason| Death {
            reason: reason.to_owned(),
            error: header(ERROR).map(str::to_owned),
            at_us: died_at.map(jiff::Timestamp::as_microsecond).unwrap_or_default(),
            by_broker: false,
        })
    };
    // We publish without what the broker added before, so anything that it added is later than what we wrote.
    let death = dropped.map(Dropped::death).or_else(ours);
    let annotations = Annotations { not_before_ms: number(NOT_BEFORE), death };
    let stamp = properties.timestamp().and_then(|seconds| i64::try_from(seconds).ok()?.checked_mul(1000));
    let mut envelope = Envelope::restore(known, header, body);
    if envelope.received_at_ms == 0 {
        envelope.received_at_ms = stamp.unwrap_or_default();
    }
    Received { envelope, redelivered, annotations }
}

/// What the broker recorded when it took a message out of its queue, as a policy demanded.
struct Dropped {
    queue: String,
    reason: String,
    at_s: i64,
    routing_key: Option<String>,
}

impl Dropped {
    /// The latest record, except for those of retries whose wait ended.
    fn of(properties: &BasicProperties) -> Option<Dropped> {
        let AMQPValue::FieldArray(records) = properties.headers().as_ref()?.inner().get(X_DEATH)? else { return None };
        records.as_slice().iter().find_map(|record| {
            let AMQPValue::FieldTable(record) = record else { return None };
            let field = |name: &str| text(record.inner().get(name)?);
            let keys = match record.inner().get("routing-keys") {
                Some(AMQPValue::FieldArray(keys)) => keys.as_slice().first().and_then(text),
                _ => None,
            };
            let queue = field("queue")?;
            let is_step = queue.rsplit_once(".retry.").is_some_and(|(_, ms)| ms.parse::<u64>().is_ok());
            let dropped = Dropped {
                reason: field("reason").unwrap_or_else(|| "unknown".to_owned()),
                at_s: field("time").and_then(|time| time.parse().ok()).unwrap_or_default(),
                routing_key: keys,
                queue,
            };
            (!is_step).then_some(dropped)
        })
    }

    fn death(self) -> Death {
        let error = format!("RabbitMQ took it out of {}: {}; see the policies on that queue", self.queue, self.reason);
        let reason = Reason::DroppedByBroker.as_str().to_owned();
        Death { reason, error: Some(error), at_us: self.at_s.saturating_mul(1_000_000), by_broker: true }
    }
}

/// Reads a message from a queue of dead letters. `alive`: the reason given for a message that did not die.
pub(super) fn dead_letter(properties: &BasicProperties, routing_key: &str, body: Bytes, alive: Reason) -> DeadLetter {
    let Received { envelope, annotations, .. } = read(properties, routing_key, body);
    match annotations.death {
        Some(death) => dead(envelope, death),
        None => {
            let (reason, at_us) = (alive.as_str().to_owned(), envelope.received_at_ms.saturating_mul(1000));
            numbered(envelope, reason, None, (at_us, MILLISECOND))
        }
    }
}

/// The dead letter of an event.
pub(super) fn dead(envelope: Envelope, death: Death) -> DeadLetter {
    let Death { reason, error, at_us, by_broker } = death;
    numbered(envelope, reason, error, (at_us, if by_broker { SECOND } else { MICROSECOND }))
}

/// A dead letter's number is the same at every read. It is in nanoseconds since the Unix epoch: the time of death, or
/// of arrival where the event did not die. Below the precision of that time it has digits from the key, which tell
/// apart what died or arrived at once.
fn numbered(envelope: Envelope, reason: String, error: Option<String>, (at_us, known_to): (i64, i64)) -> DeadLetter {
    let life = format!("{}|{}", envelope.key, envelope.replay.as_deref().unwrap_or_default());
    let [a, b, c, d, e, f, g, h, ..] = fingerprint(&life);
    let salt = i64::from_be_bytes([a & 0x7f, b, c, d, e, f, g, h]) % known_to;
    let number = at_us.saturating_mul(1000).saturating_add(salt).max(1);
    DeadLetter { number, envelope, reason, error, died_at_ms: at_us / 1000 }
}

/// Strings and whole numbers as text. Other types in a foreign message's headers are ignored.
fn text(value: &AMQPValue) -> Option<String> {
    match value {
        AMQPValue::LongString(text) => String::from_utf8(text.as_bytes().to_vec()).ok(),
        AMQPValue::ShortString(text) => Some(text.to_string()),
        AMQPValue::ShortShortInt(number) => Some(number.to_string()),
        AMQPValue::ShortShortUInt(number) => Some(number.to_string()),
        AMQPValue::ShortInt(number) => Some(number.to_string()),
        AMQPValue::ShortUInt(number) => Some(number.to_string()),
        AMQPValue::LongInt(number) => Some(number.to_string()),
        AMQPValue::LongUInt(number) => Some(number.to_string()),
        AMQPValue::LongLongInt(number) => Some(number.to_string()),
        AMQPValue::Timestamp(number) => Some(number.to_string()),
        AMQPValue::Boolean(_)
        | AMQPValue::Float(_)
        | AMQPValue::Double(_)
        | AMQPValue::DecimalValue(_)
        | AMQPValue::FieldArray(_)
        | AMQPValue::FieldTable(_)
        | AMQPValue::ByteArray(_)
        | AMQPValue::Void => None,
    }
}

/// Truncates to what fits. Our app, id and type are far shorter; those of a foreign message that is read and published
/// again may not be.
fn short(text: &str) -> ShortString {
    text.get(..text.floor_char_boundary(MAX_SHORT)).unwrap_or_default().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn envelope() -> Envelope {
        Envelope {
            app: "chat".into(),
            kind: Kind::Push,
            id: "id-1".into(),
            event_type: "message.new".into(),
            key: "chat:push:id-1:aaaaaaaaaaaaaaaa".into(),
            webhook_attempt: 2,
            api_key: "key".into(),
            signature: "a".repeat(64),
            received_at_ms: 1_775_658_215_879,
            attempt: 3,
            attempts: Default::default(),
            cid: Some("messaging:x".into()),
            route: Some("app".into()),
            replay: None,
            traceparent: None,
            further: streamgate_core::further::FurtherHeaders::default(),
            body: Bytes::from_static(b"{}"),
        }
    }

    fn table(pairs: &[(&str, AMQPValue)]) -> BasicProperties {
        let mut headers = FieldTable::default();
        for (name, value) in pairs {
            headers.insert((*name).into(), value.clone());
        }
        BasicProperties::default().with_headers(headers)
    }

    fn long(text: &str) -> AMQPValue {
        AMQPValue::LongString(text.into())
    }

    #[test]
    fn what_is_written_reads_back() {
        let at_us = 1_775_658_215_879_123;
        let death = Death { reason: "rejected".into(), error: Some("no".into()), at_us, by_broker: false };
        let annotations = Annotations { not_before_ms: Some(7), death: Some(death) };
        let written = properties(&envelope(), &annotations);
        assert_eq!(routing_key(&envelope()).as_str(), "chat.push.message.new");
        assert_eq!(written.delivery_mode(), &Some(2));
        let expected = Received { envelope: envelope(), redelivered: 0, annotations };
        assert_eq!(read(&written, "x.events", envelope().body), expected);
        let dead_letter = dead_letter(&written, "x.dead", envelope().body, Reason::Unrouted);
        assert_eq!((dead_letter.number / 1000, dead_letter.died_at_ms), (1_775_658_215_879_123, 1_775_658_215_879));
        assert_eq!((dead_letter.reason.as_str(), dead_letter.error.as_deref()), ("rejected", Some("no")));
    }

    /// As the first version wrote it, name by name: every later version must read this.
    #[test]
    fn the_first_versions_messages_are_read() {
        let first = table(&[
            ("x-streamgate-version", long("1")),
            ("x-webhook-id", long("id-1")),
            ("x-webhook-attempt", long("2")),
            ("x-api-key", long("key")),
            ("x-signature", long(&"a".repeat(64))),
            ("x-streamgate-key", long("chat:push:id-1:aaaaaaaaaaaaaaaa")),
            ("x-streamgate-received-at", long("2026-04-08T14:23:35.879Z")),
            ("x-streamgate-attempt", long("3")),
            ("x-streamgate-cid", long("messaging:x")),
            ("x-streamgate-route", long("app")),
        ])
        .with_message_id("id-1".into())
        .with_app_id("chat".into())
        .with_type("message.new".into());
        let expected = Received { envelope: envelope(), redelivered: 0, annotations: Annotations::default() };
        assert_eq!(read(&first, "chat.push.message.new", Bytes::from_static(b"{}")), expected);
        let ours = properties(&envelope(), &Annotations::default());
        let (ours, first) = (ours.headers().clone().unwrap(), first.headers().clone().unwrap());
        assert_eq!(ours, first, "and a first version reads what this one writes");
    }

    #[test]
    fn a_later_versions_headers_are_ignored_and_missing_ones_have_defaults() {
        let later = table(&[
            ("x-streamgate-version", long("9")),
            ("x-streamgate-invention", AMQPValue::FieldArray(Vec::new().into())),
            ("x-webhook-attempt", AMQPValue::LongInt(4)),
            ("x-delivery-count", AMQPValue::LongLongInt(6)),
            ("x-death", AMQPValue::FieldArray(Vec::new().into())),
        ]);
        let Received { envelope: read_back, redelivered, .. } =
            read(&later, "chat.push.x.y", Bytes::from_static(b"{}"));
        assert_eq!((read_back.app.as_str(), read_back.event_type.as_str()), ("chat", "x.y"));
        assert_eq!((read_back.webhook_attempt, read_back.attempt, redelivered), (4, 1, 6));
        assert_eq!(read_back.key, format!("chat:push:{}:", read_back.id));
        let nothing = read(&BasicProperties::default(), "", Bytes::new()).envelope;
        assert_eq!((nothing.app.as_str(), nothing.kind), ("unknown", Kind::Push));
    }

    #[test]
    fn headers_that_rabbitmq_added_are_not_published_again() {
        let came =
            table(&[("x-death", long("?")), ("x-first-death-queue", long("?")), ("x-delivery-count", long("2"))]);
        let again = properties(&read(&came, "q", Bytes::new()).envelope, &Annotations::default());
        let headers = again.headers().clone().unwrap();
        let names: Vec<_> = headers.inner().keys().map(ShortString::as_str).collect();
        assert!(!names.iter().any(|name| name.contains("death") || *name == "x-delivery-count"), "{names:?}");
    }

    /// One record of `x-death`, as RabbitMQ 3.10 writes it.
    fn record(queue: &str, reason: &str, at_s: u64) -> AMQPValue {
        let mut record = FieldTable::default();
        record.insert("queue".into(), long(queue));
        record.insert("reason".into(), long(reason));
        record.insert("count".into(), AMQPValue::LongLongInt(1));
        record.insert("time".into(), AMQPValue::Timestamp(at_s));
        record.insert("routing-keys".into(), AMQPValue::FieldArray(vec![long("shop.push.user.banned")].into()));
        AMQPValue::FieldTable(record)
    }

    #[test]
    fn a_message_that_the_broker_drops_is_a_dead_letter_with_its_reason_and_a_stable_number() {
        let deaths = vec![record("p.retry.1000", "expired", 9), record("p.events", "delivery_limit", 7)];
        let dropped = table(&[("x-death", AMQPValue::FieldArray(deaths.into()))]);
        let look = || dead_letter(&dropped, "p.dead", Bytes::from_static(b"{}"), Reason::Unrouted);
        let DeadLetter { number, envelope, reason, error, died_at_ms } = look();
        assert_eq!((reason.as_str(), died_at_ms), ("dropped_by_broker", 7000));
        assert!(error.unwrap().contains("p.events: delivery_limit"));
        assert_eq!((envelope.app.as_str(), envelope.event_type.as_str()), ("shop", "user.banned"));
        assert_eq!((number, number / 1_000_000_000), (look().number, 7));
        // A message that only waited for a retry has not died.
        let waited = AMQPValue::FieldArray(vec![record("p.retry.1000", "expired", 9)].into());
        assert_eq!(read(&table(&[("x-death", waited)]), "p.events", Bytes::new()).annotations, Annotations::default());
    }

    #[test]
    fn a_dead_letter_that_the_broker_drops_again_died_by_the_broker() {
        let deaths = AMQPValue::FieldArray(vec![record("p.events", "expired", 7)].into());
        let both = table(&[(REASON, long("rejected")), ("x-death", deaths)]);
        assert_eq!(dead_letter(&both, "p.dead", Bytes::new(), Reason::Unrouted).reason, "dropped_by_broker");
    }

    #[test]
    fn calls_and_answers_read_back() {
        let asked =
            Envelope { kind: Kind::BeforeMessageSend, key: "chat:before-message-send:i:0".into(), ..envelope() };
        let written = call(&asked, 7, Duration::from_millis(1180));
        assert_eq!((written.delivery_mode(), within(&written)), (&Some(1), Some(Duration::from_millis(1180))));
        assert_eq!(read(&written, "x.calls", asked.body.clone()).envelope, asked);
        let correlation = written.correlation_id().clone().unwrap();
        let read_back = |reason, body: &[u8]| read_answer(&answer(correlation.clone(), reason), body.to_vec());
        assert_eq!(read_back(None, b"{\"message\":null}"), Some((7, Ok(Bytes::from_static(b"{\"message\":null}")))));
        assert_eq!(read_back(None, b"no JSON"), Some((7, Err(Reason::HookFailed))));
        assert_eq!(read_back(Some(Reason::Unhandled), b""), Some((7, Err(Reason::Unhandled))));
        assert_eq!(read_answer(&BasicProperties::default(), Vec::new()), None);
        let later = table(&[(REASON, long("an invention"))]).with_correlation_id("7".into());
        assert_eq!(read_answer(&later, b"{\"message\":null}".to_vec()), Some((7, Err(Reason::HookFailed))));
    }
}
