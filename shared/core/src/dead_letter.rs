//! Dead letters: events that no handler could take, kept with the reason until somebody replays or drops them.

use crate::{
    attempts::Attempts, envelope::Envelope, id::fingerprint, pattern::Pattern, reason::Reason, user::names_user,
};

/// Hex digits of a replay's nonce.
const NONCE: usize = 16;

/// One dead letter.
#[derive(Clone, Debug)]
pub struct DeadLetter {
    /// Its number in the store, which grows with time.
    pub number: i64,
    pub envelope: Envelope,
    /// The name of a [`Reason`] of this version or another.
    pub reason: String,
    /// At most 512 bytes; never contains a service's response.
    pub error: Option<String>,
    /// In milliseconds since the Unix epoch.
    pub died_at_ms: i64,
}

/// Identifies a dead letter. Two may share a number by chance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeadLetterId {
    pub number: i64,
    /// A fingerprint of the event and its life.
    pub life: u128,
}

impl DeadLetter {
    pub fn id(&self) -> DeadLetterId {
        let Envelope { key, replay, .. } = &self.envelope;
        let life = fingerprint(&format!("{key}|{}", replay.as_deref().unwrap_or_default()));
        DeadLetterId { number: self.number, life: u128::from_be_bytes(life) }
    }

    /// The event as it returns to its queue: the first attempt of a new life. The life's nonce is derived from the dead
    /// letter, so that each move of it, by any tool and however often, begins the same life, and the claim absorbs the copies
    /// of an interrupted replay. An unrouted event has not lived yet and a parked one lives still, so both return as they
    /// came. An event whose route is unknown goes to any route that matches.
    pub fn replayed(&self) -> Envelope {
        let envelope = self.envelope.clone();
        if [Reason::Unrouted, Reason::Parked].map(Reason::as_str).contains(&&*self.reason) {
            return envelope;
        }
        let before = envelope.replay.as_deref().unwrap_or_default();
        let mut nonce = hex::encode(fingerprint(&format!("{before}|{}|{}", self.number, self.reason)));
        nonce.truncate(NONCE);
        let route = envelope.route.filter(|_| self.reason != Reason::RouteUnknown.as_str());
        Envelope { attempt: 1, attempts: Attempts::default(), replay: Some(nonce), route, ..envelope }
    }
}

/// Selects dead letters. Everything given must match.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Numbers, webhook ids (unless they are all digits) or idempotency keys; empty matches any.
    pub ids: Vec<String>,
    pub reason: Option<Reason>,
    pub event_type: Option<Pattern>,
    pub route: Option<String>,
    pub app: Option<String>,
    /// Dead letters after at least this many attempts.
    pub attempts: Option<u32>,
    /// Dead letters that died then or later, in milliseconds since the Unix epoch.
    pub died_since_ms: Option<i64>,
    /// Dead letters that died before then, in milliseconds since the Unix epoch.
    pub died_before_ms: Option<i64>,
    /// Events that name this user anywhere, see [`names_user`].
    pub user: Option<String>,
}

impl Filter {
    pub fn matches(&self, dead_letter: &DeadLetter) -> bool {
        let envelope = &dead_letter.envelope;
        // Digits are always a number, never a webhook id: one argument must not select two dead letters.
        let named = |id: &String| match id.parse::<i64>() {
            Ok(number) => number == dead_letter.number,
            Err(_) => *id == envelope.id || *id == envelope.key,
        };
        (self.ids.is_empty() || self.ids.iter().any(named))
            && self.reason.is_none_or(|reason| reason.as_str() == dead_letter.reason)
            && self.event_type.as_ref().is_none_or(|pattern| pattern.matches(&envelope.event_type))
            && self.route.as_ref().is_none_or(|route| Some(route) == envelope.route.as_ref())
            && self.app.as_ref().is_none_or(|app| *app == envelope.app)
            && self.attempts.is_none_or(|least| envelope.attempt >= least)
            && self.died_since_ms.is_none_or(|limit| dead_letter.died_at_ms >= limit)
            && self.died_before_ms.is_none_or(|limit| dead_letter.died_at_ms < limit)
            && self.user.as_ref().is_none_or(|user| names_user(&envelope.body, user))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::further::FurtherHeaders;
    use crate::id::Kind;

    /// A dead letter of the seventh attempt.
    fn dead_letter(body: &'static [u8]) -> DeadLetter {
        let envelope = Envelope {
            app: "chat".into(),
            kind: Kind::Push,
            id: "id-1".into(),
            event_type: "message.new".into(),
            key: "the-key".into(),
            webhook_attempt: 1,
            api_key: String::new(),
            signature: String::new(),
            received_at_ms: 0,
            attempt: 7,
            attempts: Attempts::parse(r#"[{"n":6,"at":"2026-01-01T00:00:00Z","ms":7,"error":"refused"}]"#),
            cid: None,
            route: Some("app".into()),
            replay: None,
            traceparent: None,
            further: FurtherHeaders::default(),
            body: bytes::Bytes::from_static(body),
        };
        DeadLetter { number: 7, envelope, reason: "rejected".into(), error: None, died_at_ms: 1000 }
    }

    #[test]
    fn every_replay_of_a_dead_letter_begins_the_same_life_and_each_death_another() {
        let dead_letter = dead_letter(b"{}");
        let life = dead_letter.replayed();
        assert_eq!((life.attempt, life.replay.as_ref().map(String::len)), (1, Some(16)));
        assert!(life.attempts.is_empty(), "a new life has none behind it");
        assert_eq!(dead_letter.replayed(), life);
        let again = DeadLetter { number: 8, envelope: life.clone(), ..dead_letter.clone() };
        assert_ne!(again.replayed().replay, life.replay);
        let unrouted = DeadLetter { reason: "unrouted".into(), ..dead_letter };
        assert_eq!(unrouted.replayed(), unrouted.envelope, "it has not lived yet");
    }

    #[test]
    fn a_table_of_filters() {
        let body =
            br#"{"type":"message.new","user":{"id":"ann"},"message":{"user":{"id":"bob"}},"member":{"user_id":"cid"}}"#;
        let dead_letter = dead_letter(body);
        let ids = |id: &str| Filter { ids: vec!["other".into(), id.into()], ..Filter::default() };
        let user = |id: &str| Filter { user: Some(id.into()), ..Filter::default() };
        let cases = [
            (Filter::default(), true),
            (ids("7"), true),
            (ids("id-1"), true),
            (ids("the-key"), true),
            (ids("8"), false),
            (ids("07"), true),
            (Filter { reason: Some(Reason::Rejected), ..Filter::default() }, true),
            (Filter { reason: Some(Reason::Unmatched), ..Filter::default() }, false),
            (Filter { event_type: Pattern::parse("message.new").ok(), ..Filter::default() }, true),
            (Filter { event_type: Pattern::parse("message.*").ok(), ..Filter::default() }, true),
            (Filter { event_type: Pattern::parse("message").ok(), ..Filter::default() }, false),
            (Filter { route: Some("app".into()), ..Filter::default() }, true),
            (Filter { route: Some("other".into()), ..Filter::default() }, false),
            (Filter { app: Some("chat".into()), ..Filter::default() }, true),
            (Filter { app: Some("other".into()), ..Filter::default() }, false),
            (Filter { attempts: Some(7), ..Filter::default() }, true),
            (Filter { attempts: Some(8), ..Filter::default() }, false),
            (Filter { died_since_ms: Some(1000), ..Filter::default() }, true),
            (Filter { died_since_ms: Some(1001), ..Filter::default() }, false),
            (Filter { died_before_ms: Some(1001), ..Filter::default() }, true),
            (Filter { died_before_ms: Some(1000), ..Filter::default() }, false),
            (user("ann"), true),
            (user("bob"), true),
            (user("cid"), true),
            (user("eve"), false),
        ];
        for (filter, expected) in cases {
            assert_eq!(filter.matches(&dead_letter), expected, "{filter:?}");
        }
    }
}
