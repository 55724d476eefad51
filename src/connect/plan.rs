//! Computes the changes from an app's current settings to the requested ones. Pure, so that a plan can be shown, tested
//! and refused before anything is written.

use super::goal::{Goal, HookUrl, Wanted};
use super::hook::{EventHook, WantedHook, same_set, without_credentials};
use super::settings::{Settings, TIMEOUT_FIELD, Webhooks, listed};
use super::step::{Mark, Step};
use super::update::{Part, Update};
use serde_json::json;
use streamgate_core::fields::Fields;
use uuid::Uuid;

const BEFORE_MESSAGE_SEND_FIELD: &str = "before_message_send_hook_url";
const COMMANDS_FIELD: &str = "custom_action_handler_url";
/// Receivers in the first generation of hooks; they get the same event types as the URL.
const V1_QUEUES: [&str; 2] = ["sqs_url", "sns_topic_arn"];
const COMPRESSION_FIELD: &str = "enable_hook_payload_compression";
/// Namespace of our hooks' UUIDs, which are derived from app and URL, so that a second run finds the first one's hook.
const NAMESPACE: Uuid = Uuid::from_u128(0x6a7f_33c6_02b5_4e0d_9f1e_5a0c_1d5b_7e42);

#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) steps: Vec<Step>,
    /// Why something may not be written; each names the option that overrides it.
    pub(super) refusals: Vec<String>,
    before: Settings,
    /// Whether the plan removes everything: then a refused list does not keep the rest in place.
    removes: bool,
    /// The URLs of synchronous hooks are removed first: each message waits for them.
    urls_first: bool,
    /// The expected settings after all updates.
    pub(super) expected: Settings,
    /// The webhooks in the PATCH, if they change.
    webhooks: Option<String>,
    /// The plain settings in the PATCH, if they change.
    plain: Fields,
    /// The settings in the last PATCH.
    last: Fields,
}

impl Plan {
    pub(super) fn of(now: &Settings, wanted: &Wanted) -> Plan {
        let (removes, urls_first) = match &wanted.goal {
            Goal::Remove { .. } => (true, true),
            Goal::Connect { before_message_send, .. } => (false, *before_message_send == HookUrl::Clear),
        };
        let remark = |what: &String| Step { mark: Mark::Attention, what: what.clone() };
        let mut plan = Plan {
            steps: wanted.remarks.iter().map(remark).collect(),
            refusals: Vec::new(),
            before: now.clone(),
            removes,
            urls_first,
            expected: now.clone(),
            webhooks: None,
            plain: Fields::default(),
            last: Fields::default(),
        };
        plan.push_webhooks(now, wanted);
        plan.synchronous_hooks(now, wanted);
        plan.compression(now, wanted);
        plan
    }

    /// The updates, in order.
    pub(super) fn updates(&self) -> Vec<Update> {
        let parts = match self.urls_first {
            true => [Part::Urls, Part::Webhooks, Part::Default],
            false => [Part::Webhooks, Part::Urls, Part::Default],
        };
        let json = |fields: &Fields| (!fields.is_empty()).then(|| fields.to_json());
        let mut reached = self.before.clone();
        let update = |part| {
            let body = match part {
                Part::Webhooks => self.webhooks.clone(),
                Part::Urls => json(&self.plain),
                Part::Default => json(&self.last),
            }?;
            let after = self.expected.clone();
            match part {
                Part::Webhooks => reached.webhooks = after.webhooks,
                Part::Urls => {
                    let before_message_send_timeout = match self.last.is_empty() {
                        true => after.before_message_send_timeout,
                        false => reached.before_message_send_timeout,
                    };
                    reached = Settings { webhooks: reached.webhooks.clone(), before_message_send_timeout, ..after };
                }
                Part::Default => reached.before_message_send_timeout = after.before_message_send_timeout,
            }
            Some(Update { part, body, expected: reached.clone() })
        };
        parts.into_iter().filter_map(update).collect()
    }

    /// Whether the whole plan is refused.
    pub(super) fn is_refused(&self) -> bool {
        let goes_on = self.removes && self.changes_anything();
        !self.refusals.is_empty() && !goes_on
    }

    pub(super) fn changes_anything(&self) -> bool {
        self.webhooks.is_some() || !self.plain.is_empty() || !self.last.is_empty()
    }

    fn step(&mut self, mark: Mark, what: impl Into<String>) {
        self.steps.push(Step { mark, what: what.into() });
    }

    fn push_webhooks(&mut self, now: &Settings, wanted: &Wanted) {
        match &now.webhooks {
            Webhooks::V1 { url, event_types } => self.one_url(url, event_types, now, wanted),
            Webhooks::V2(hooks) => self.event_hooks(hooks, now, wanted),
        }
    }

    fn event_hooks(&mut self, hooks: &[EventHook], now: &Settings, wanted: &Wanted) {
        let mut id = Uuid::new_v5(&NAMESPACE, format!("{} {}", now.app.id, wanted.base.as_str()).as_bytes());
        // Someone has pointed the hook of that id elsewhere: it is no longer ours.
        while hooks.iter().any(|hook| hook.id() == id.to_string()) {
            id = Uuid::new_v5(&NAMESPACE, id.as_bytes());
        }
        let id = id.to_string();
        let removes = self.removes;
        let is_ours = |hook: &EventHook| {
            hook.is_webhook() && wanted.base.is_push(&hook.url()) && (removes || hook.delivers_chat())
        };
        let (mut ours, others): (Vec<&EventHook>, Vec<&EventHook>) = hooks.iter().partition(|hook| is_ours(hook));
        ours.sort_by_key(|hook| !hook.is_enabled());
        let list: Vec<EventHook> = match &wanted.goal {
            Goal::Remove { .. } => others.iter().copied().cloned().collect(),
            Goal::Connect { event_types, custom_events, .. } => {
                let wanted_hook = WantedHook {
                    id,
                    url: wanted.base.push(),
                    event_types: event_types.clone(),
                    custom_events: custom_events.then_some(true),
                };
                let list = self.with_ours(hooks, &ours, &wanted_hook);
                for other in others.iter().filter(|other| other.is_enabled() && other.is_webhook()) {
                    if other.delivers_chat() && other.overlaps(event_types) {
                        self.step(Mark::Attention, format!("{} gets the same events", other.describe()));
                    }
                }
                list
            }
        };
        match others.len() {
            0 => {}
            1 => self.step(Mark::Keep, "1 other hook kept"),
            count => self.step(Mark::Keep, format!("{count} other hooks kept")),
        }
        let after = Webhooks::V2(list.clone());
        if after.is_equivalent(&now.webhooks) {
            return;
        }
        let hidden = list.iter().filter_map(|other| Some((other, other.hidden_secret()?)));
        let hidden: Vec<_> = hidden.filter(|_| !wanted.is_forced).collect();
        for (other, field) in &hidden {
            self.refusals.push(format!(
                "{}: Stream did not show its {field}, and an update of the list would overwrite it: change the hooks in Stream's \
                 dashboard, or add --force and set {field} again afterwards",
                other.describe()
            ));
        }
        for hook in ours.iter().filter(|_| removes) {
            match hidden.is_empty() {
                true => self.step(Mark::Remove, hook.describe()),
                false => {
                    self.step(Mark::Attention, format!("{} stays, since the list may not be written", hook.describe()))
                }
            }
        }
        if removes && !hidden.is_empty() {
            return;
        }
        let list: Vec<&str> = list.iter().map(EventHook::json).collect();
        self.webhooks = Some(format!("{{\"event_hooks\":[{}]}}", list.join(",")));
        self.expected.webhooks = after;
    }

    /// The list with our hook, in its old position if it exists.
    fn with_ours(&mut self, hooks: &[EventHook], ours: &[&EventHook], wanted: &WantedHook) -> Vec<EventHook> {
        let types = listed(&wanted.event_types);
        let Some(first) = ours.first() else {
            self.step(Mark::Add, format!("webhook hook to {}: {types}", wanted.url));
            return hooks.iter().cloned().chain([EventHook::new(wanted)]).collect();
        };
        for more in ours.iter().skip(1).filter(|more| more.is_enabled()) {
            self.step(Mark::Attention, format!("{} leads here too: every event comes twice", more.describe()));
        }
        let (updated, changed) = first.updated(wanted);
        match changed.is_empty() {
            true => self.step(Mark::Keep, format!("webhook hook to {}: {types}", wanted.url)),
            false => {
                let fields = changed.join(", ");
                let before = listed(&first.event_types());
                self.step(Mark::Change, format!("webhook hook to {}: {before} -> {types} ({fields})", wanted.url));
            }
        }
        hooks.iter().map(|hook| if std::ptr::eq(hook, *first) { updated.clone() } else { hook.clone() }).collect()
    }

    fn one_url(&mut self, url: &str, event_types: &[String], now: &Settings, wanted: &Wanted) {
        let is_ours = wanted.base.is_push(url);
        let shown = without_credentials(url);
        let mut body = Fields::default();
        let after = match &wanted.goal {
            Goal::Remove { .. } if is_ours => {
                self.step(Mark::Remove, format!("webhook_url {shown}"));
                body.set("webhook_url", &json!(""));
                // It also applies to the app's other receivers.
                if !event_types.is_empty() {
                    self.step(Mark::Attention, format!("webhook_events stays {}", listed(event_types)));
                }
                Webhooks::V1 { url: String::new(), event_types: event_types.to_vec() }
            }
            Goal::Remove { .. } => return,
            Goal::Connect { event_types: types, custom_events, .. } => {
                if *custom_events {
                    let what = "--custom-events has no effect: this app is one of Stream's first generation of hooks";
                    self.step(Mark::Attention, what);
                }
                if !is_ours && !url.is_empty() && !wanted.may_replace {
                    self.refuse_replacing("webhook_url", url, "every event that it gets now");
                }
                let ours = wanted.base.push();
                match (is_ours, url.is_empty()) {
                    (true, _) if same_set(event_types, types) => self.step(Mark::Keep, format!("webhook_url {shown}")),
                    (true, _) => self.step(Mark::Change, format!("webhook_url {shown} (webhook_events)")),
                    (false, true) => self.step(Mark::Add, format!("webhook_url {ours}")),
                    (false, false) => self.step(Mark::Change, format!("webhook_url {shown} -> {ours}")),
                }
                if !is_ours {
                    body.set("webhook_url", &json!(ours));
                }
                if !same_set(event_types, types) {
                    let (before, after) = (listed(event_types), listed(types));
                    self.step(Mark::Change, format!("webhook_events: {before} -> {after}"));
                    let queues = now.other_receivers.iter().filter(|(field, _)| V1_QUEUES.contains(field));
                    let queues: Vec<_> =
                        queues.map(|(field, place)| format!("{field} {}", without_credentials(place))).collect();
                    if !queues.is_empty() && !wanted.may_replace {
                        self.refusals.push(format!(
                            "webhook_events is {before} and holds for {}, too: --event-types with the same types leaves it, and --replace \
                             makes it {after} for all of them",
                            queues.join(" and ")
                        ));
                    }
                    body.set("webhook_events", &json!(types));
                }
                Webhooks::V1 { url: if is_ours { url.to_owned() } else { ours }, event_types: types.clone() }
            }
        };
        if !body.is_empty() {
            self.webhooks = Some(body.to_json());
            self.expected.webhooks = after;
        }
    }

    fn synchronous_hooks(&mut self, now: &Settings, wanted: &Wanted) {
        let base = &wanted.base;
        let (moderation, commands, timeout) = match &wanted.goal {
            Goal::Connect { before_message_send, custom_commands, timeout, .. } => {
                (*before_message_send, *custom_commands, *timeout)
            }
            Goal::Remove { timeout } => (HookUrl::Clear, HookUrl::Clear, *timeout),
        };
        let url = &now.before_message_send_url;
        let was_ours = base.is_before_message_send(url);
        let place = Place { field: BEFORE_MESSAGE_SEND_FIELD, ours: base.before_message_send(), was_ours };
        let after = self.plain_url(place, url, moderation, wanted);
        let waits = now.before_message_send_timeout;
        let shown = |timeout| if timeout == 0 { "Stream's default".to_owned() } else { format!("{timeout} ms") };
        let timeout = match moderation {
            HookUrl::Set => Some(timeout),
            // A run that ended between its updates may have left the timeout in place.
            HookUrl::Clear if (was_ours || url.is_empty()) && waits == timeout => Some(0),
            HookUrl::Clear if was_ours && waits != 0 => {
                let (stays, ours) = (shown(waits), shown(timeout));
                self.step(
                    Mark::Attention,
                    format!("{TIMEOUT_FIELD} stays {stays}: this configuration sets {ours}, so it may be another's"),
                );
                None
            }
            HookUrl::Clear | HookUrl::Keep => None,
        };
        if let Some(timeout) = timeout.filter(|timeout| *timeout != waits) {
            self.step(Mark::Change, format!("{TIMEOUT_FIELD}: {} -> {}", shown(waits), shown(timeout)));
            let fields = if timeout == 0 { &mut self.last } else { &mut self.plain };
            fields.set(TIMEOUT_FIELD, &json!(timeout));
            self.expected.before_message_send_timeout = timeout;
        }
        self.expected.before_message_send_url = after;
        let url = &now.custom_action_handler_url;
        let was_ours = base.is_custom_commands(url);
        let place = Place { field: COMMANDS_FIELD, ours: base.custom_commands(), was_ours };
        self.expected.custom_action_handler_url = self.plain_url(place, url, commands, wanted);
    }

    /// Plans one URL. Returns the setting's value afterwards.
    fn plain_url(&mut self, place: Place, url: &str, what: HookUrl, wanted: &Wanted) -> String {
        let Place { field, ours, was_ours } = place;
        match what {
            HookUrl::Set if url == ours => self.step(Mark::Keep, format!("{field} {url}")),
            HookUrl::Set => {
                if url.is_empty() {
                    self.step(Mark::Add, format!("{field} {ours}"));
                } else {
                    if !was_ours && !wanted.may_replace {
                        self.refuse_replacing(field, url, "the hooks that it answers now");
                    }
                    self.step(Mark::Change, format!("{field} {} -> {ours}", without_credentials(url)));
                }
                self.plain.set(field, &json!(ours));
                return ours;
            }
            HookUrl::Clear if was_ours => {
                self.step(Mark::Remove, format!("{field} {}", without_credentials(url)));
                self.plain.set(field, &json!(""));
                return String::new();
            }
            HookUrl::Keep if was_ours => {
                let what = "leads here, and this run leaves it alone (--no-hooks removes it)";
                self.step(Mark::Attention, format!("{field} {what}"));
            }
            HookUrl::Clear | HookUrl::Keep => {}
        }
        url.to_owned()
    }

    fn refuse_replacing(&mut self, field: &str, url: &str, loses: &str) {
        self.refusals.push(format!(
            "{field} is {}, which is not this gateway's: --replace points it here, and that service loses {loses}",
            without_credentials(url)
        ));
    }

    /// Compression can be set but never read back, and affects every receiver of the app.
    fn compression(&mut self, now: &Settings, wanted: &Wanted) {
        let Goal::Connect { compress: true, .. } = wanted.goal else { return };
        let mut receivers = match &now.webhooks {
            Webhooks::V1 { .. } => Vec::new(),
            Webhooks::V2(hooks) => hooks
                .iter()
                .filter(|hook| hook.is_enabled() && !wanted.base.is_push(&hook.url()))
                .map(EventHook::describe)
                .collect(),
        };
        let urls = [
            (BEFORE_MESSAGE_SEND_FIELD, &self.expected.before_message_send_url),
            (COMMANDS_FIELD, &self.expected.custom_action_handler_url),
        ];
        for (field, url) in urls.into_iter().chain(now.other_receivers.iter().map(|(field, url)| (*field, url))) {
            let is_ours = wanted.base.is_before_message_send(url) || wanted.base.is_custom_commands(url);
            if !url.is_empty() && !is_ours {
                receivers.push(format!("{field} {}", without_credentials(url)));
            }
        }
        self.step(Mark::Change, format!("{COMPRESSION_FIELD}: true (Stream does not show what it is now)"));
        self.plain.set(COMPRESSION_FIELD, &json!(true));
        if !receivers.is_empty() && !wanted.is_forced {
            self.refusals.push(format!(
                "--compress compresses what every receiver of this app gets, and cannot be read back: {}; --force does it all the same, \
                 and those that do not inflate gzip fail",
                receivers.join(", ")
            ));
        }
    }
}

/// A plain setting that may lead to this gateway.
struct Place {
    field: &'static str,
    ours: String,
    was_ours: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connect::address::BaseUrl;
    use proptest::prelude::*;
    use serde_json::Value;
    use serde_json::value::RawValue;
    use std::collections::BTreeMap;

    const TIME: i64 = 1_791_485_542_458_572_000;
    const WRITTEN: &str = "\"2026-10-08T18:52:22.458572Z\"";

    fn base() -> BaseUrl {
        BaseUrl::parse("https://hooks.example.com", "--url").unwrap()
    }

    fn connect(event_types: &[&str]) -> Wanted {
        let goal = Goal::Connect {
            event_types: event_types.iter().map(|name| (*name).to_owned()).collect(),
            custom_events: false,
            before_message_send: HookUrl::Set,
            custom_commands: HookUrl::Set,
            timeout: 1500,
            compress: false,
        };
        Wanted { base: base(), goal, remarks: Vec::new(), may_replace: false, is_forced: false }
    }

    fn remove() -> Wanted {
        Wanted { goal: Goal::Remove { timeout: 1500 }, ..connect(&[]) }
    }

    fn settings(app: &str) -> Settings {
        Settings::of(&Fields::parse(app.as_bytes()).unwrap()).unwrap()
    }

    fn v2(hooks: &[String]) -> Settings {
        settings(&format!("{{\"id\":1,\"use_hook_v2\":true,\"event_hooks\":[{}]}}", hooks.join(",")))
    }

    fn bodies(plan: &Plan) -> Vec<String> {
        plan.updates().into_iter().map(|update| update.body).collect()
    }

    /// The hooks that a plan writes, each as the bytes sent.
    fn written(plan: &Plan) -> Vec<String> {
        let bodies = bodies(plan);
        let Some(body) = bodies.iter().find(|body| body.contains("event_hooks")) else { return Vec::new() };
        let body: BTreeMap<&str, Vec<&RawValue>> = serde_json::from_str(body).unwrap();
        assert_eq!(body.len(), 1, "no other key");
        body["event_hooks"].iter().map(|hook| hook.get().to_owned()).collect()
    }

    #[test]
    fn times_are_written_as_text_and_nothing_else_changes() {
        let hook = |time: &str| {
            format!(
                r#"{{ "id" : "h", "sqs_queue_url":"q", "big": 9223372036854775807, "exact":1e400, "created_at": {time}, "n":null, "updated_at":{time}}}"#
            )
        };
        let plan = Plan::of(&v2(&[hook(&TIME.to_string())]), &connect(&[]));
        assert_eq!(written(&plan)[0], hook(WRITTEN));
        let plan = Plan::of(&v2(&[hook("\"2026-01-01T00:00:00Z\"")]), &connect(&[]));
        assert_eq!(written(&plan)[0], hook("\"2026-01-01T00:00:00Z\""), "the older family of paths has text");
        let plan = Plan::of(&v2(&[hook("9223372036854775807")]), &connect(&[]));
        assert_eq!(written(&plan)[0], hook("\"2262-04-11T23:47:16.854775807Z\""));
    }

    #[test]
    fn our_hook_keeps_the_fields_that_an_operator_has_set() {
        let ours = r#"{"id":"h4","hook_type":"webhook","enabled":false,"event_types":["message.updated"],"webhook_url":"https://hooks.example.com/webhooks/stream/push","timeout_ms":3000,"failover_config":{"type":"s3","s3_bucket":"mine"}}"#;
        let plan = Plan::of(&v2(&[ours.to_owned()]), &connect(&["message.new"]));
        let expected = ours.replace("false", "true").replace("message.updated", "message.new");
        assert_eq!(written(&plan), [expected]);
    }

    #[test]
    fn each_setting_goes_only_where_it_changes() {
        let first = settings(r#"{"id":1,"use_hook_v2":false,"webhook_url":"","before_message_send_hook_url":""}"#);
        let plan = Plan::of(&first, &connect(&["message.new"]));
        let bodies: Vec<Value> = bodies(&plan).iter().map(|body| serde_json::from_str(body).unwrap()).collect();
        let push = json!({"webhook_url": base().push(), "webhook_events": ["message.new"]});
        let plain = json!({
            "before_message_send_hook_url": base().before_message_send(),
            "before_message_send_hook_attempt_timeout_ms": 1500,
            "custom_action_handler_url": "https://hooks.example.com/webhooks/stream/custom-commands?type={type}",
        });
        assert_eq!(bodies, [push, plain]);
        assert!(!Plan::of(&plan.expected, &connect(&["message.new"])).changes_anything());
        let removed = Plan::of(&plan.expected, &remove());
        assert_eq!(removed.expected.before_message_send_timeout, 0);
        assert!(
            removed.expected.before_message_send_url.is_empty()
                && removed.expected.custom_action_handler_url.is_empty()
        );
        let changed = Settings { before_message_send_timeout: 2000, ..plan.expected };
        assert_eq!(
            Plan::of(&changed, &remove()).expected.before_message_send_timeout,
            2000,
            "somebody has set it since"
        );
    }

    #[test]
    fn a_harmful_change_is_refused_and_names_the_option_that_overrides_it() {
        let sqs = |secret: &str| {
            format!(r#"{{"id":"q","hook_type":"sqs","enabled":true,"sqs_auth_type":"keys","sqs_key":"AKIA"{secret}}}"#)
        };
        let v2_app = |hooks: &str, plain: &str| {
            settings(&format!(r#"{{"id":1,"use_hook_v2":true,"event_hooks":[{hooks}]{plain}}}"#))
        };
        let compress = || {
            let mut wanted = connect(&[]);
            if let Goal::Connect { compress, .. } = &mut wanted.goal {
                *compress = true;
            }
            wanted
        };
        let foreign = r#"{"id":"w","hook_type":"webhook","enabled":true,"webhook_url":"https://u:geheim@other.example/x?token=geheim"}"#;
        let masked_own = format!(
            r#"{{"id":"o","hook_type":"webhook","enabled":true,"webhook_url":"{}","failover_config":{{"type":"gcs","gcs_credentials":""}}}}"#,
            base().push()
        );
        let cases = [
            (v2_app(&sqs(""), ""), connect(&[]), "--force"),
            (v2_app(&sqs(r#","sqs_secret":"""#), ""), connect(&[]), "--force"),
            (v2_app(&sqs(r#","sqs_secret":"***""#), ""), connect(&[]), "--force"),
            (
                v2_app(r#"{"id":"g","hook_type":"webhook","failover_config":{"gcs_credentials":"********"}}"#, ""),
                connect(&[]),
                "--force",
            ),
            (v2_app("", r#","before_message_send_hook_url":"https://other.example/m""#), connect(&[]), "--replace"),
            (v2_app("", r#","custom_action_handler_url":"https://other.example/c""#), connect(&[]), "--replace"),
            (settings(r#"{"id":1,"webhook_url":"https://u:geheim@other.example/"}"#), connect(&[]), "--replace"),
            (v2_app(foreign, ""), compress(), "--force"),
            (settings(r#"{"id":1,"sqs_url":"https://sqs.example/q"}"#), compress(), "--force"),
            (v2_app(&masked_own, ""), connect(&["a.b"]), "--force"),
            (v2_app("", r#","moderation_webhook_url":"https://other.example/m""#), compress(), "--force"),
        ];
        let masks = [
            sqs(r#","sqs_secret":"••••1234""#),
            sqs(r#","sqs_secret":"xxxxAB12""#),
            sqs(r#","sqs_secret":"[REDACTED]""#),
            sqs(r#","sqs_secret":"<hidden>""#),
            sqs(r#","sqs_secret":"a","odd":"\ud800","more":[{"x_secret":"Redacted"}]"#),
            r#"{"id":"s","hook_type":"sns","sns_key":"AKIA"}"#.to_owned(),
            r#"{"id":"g","failover_config":{"type":"gcs","gcs_credentials":{}}}"#.to_owned(),
        ];
        let cases = cases.into_iter().chain(masks.map(|hook| (v2_app(&hook, ""), connect(&[]), "--force")));
        for (now, wanted, option) in cases {
            let plan = Plan::of(&now, &wanted);
            assert!(plan.refusals.len() == 1 && plan.refusals[0].contains(option), "{plan:?}");
            assert!(!format!("{:?} {:?}", plan.steps, plan.refusals).contains("geheim"));
            let overridden = Wanted { may_replace: true, is_forced: true, ..wanted };
            assert!(Plan::of(&now, &overridden).refusals.is_empty());
        }
        for whole in [
            &sqs(r#","sqs_secret":"xx+AB/12x=","note":"[all] xxxx""#),
            r#"{"id":"s","hook_type":"sqs","sqs_auth_type":"resource","sqs_key":"AKIA"}"#,
            r#"{"id":"g","failover_config":{"type":"gcs","gcs_credentials":{"private_key":"abc"}}}"#,
        ] {
            assert!(Plan::of(&v2_app(whole, ""), &connect(&[])).refusals.is_empty(), "{whole}");
        }
        assert!(Plan::of(&v2_app(&sqs(""), ""), &remove()).refusals.is_empty(), "nothing is written");
        let hooks = [format!("{},{foreign}", sqs(r#","sqs_secret":"secret""#))];
        let plan = Plan::of(&v2(&hooks), &connect(&[]));
        let twice = plan.steps.iter().filter(|step| step.mark == Mark::Attention);
        assert_eq!(twice.count(), 1, "another receiver of the same events: {plan:?}");
    }

    #[test]
    fn a_differing_field_is_named_and_no_secret_is_shown() {
        let hook = |fields: &str| {
            let json = format!(r#"{{"id":"h","hook_type":"sqs","enabled":true{fields}}}"#);
            EventHook::read(&RawValue::from_string(json).unwrap()).unwrap()
        };
        let written =
            hook(r#","sqs_secret":"geheim","n":18446744073709551617,"list":[],"gone":1,"event_types":["a","b"]"#);
        let seen = hook(r#","sqs_secret":"other","n":18446744073709551618,"event_types":["b"],"new":1"#);
        let found = seen.differences(&written).join("; ");
        let expected = "event_types is [\"b\"] where [\"a\",\"b\"] was written; gone is missing; n differs from what was written; \
                        sqs_secret differs from what was written";
        assert_eq!(found, expected);
        assert!(!seen.is_equivalent(&written) && written.is_equivalent(&written));
    }

    #[test]
    fn a_missing_list_is_not_an_empty_list() {
        let read = |app: &str| Settings::of(&Fields::parse(app.as_bytes()).unwrap());
        assert!(read(r#"{"id":1,"use_hook_v2":true}"#).is_err_and(|why| why.contains("event_hooks")));
        for empty in ["null", "[]"] {
            assert!(read(&format!(r#"{{"id":1,"use_hook_v2":true,"event_hooks":{empty}}}"#)).is_ok());
        }
        assert!(read(r#"{"id":1,"use_hook_v2":true,"event_hooks":[1]}"#).is_err());
    }

    #[test]
    fn a_hook_of_another_product_or_pointed_elsewhere_is_foreign() {
        let hook = |id: &str, url: &str, product: &str| {
            format!(
                r#"{{"id":"{id}","hook_type":"webhook","enabled":true,"product":"{product}","webhook_url":"{url}"}}"#
            )
        };
        let video = hook("v", &base().push(), "video");
        let first = Plan::of(&v2(std::slice::from_ref(&video)), &connect(&[]));
        let written_first = written(&first);
        assert_eq!((written_first.len(), &written_first[0]), (2, &video));
        let Webhooks::V2(hooks) = &first.expected.webhooks else { panic!("{first:?}") };
        let moved = hook(&hooks[1].id(), "https://other.example/", "chat");
        let second = written(&Plan::of(&v2(std::slice::from_ref(&moved)), &connect(&[])));
        assert_eq!((second.len(), &second[0]), (2, &moved), "its id is taken, and it stays");
        assert_ne!(EventHook::read(&RawValue::from_string(second[1].clone()).unwrap()).unwrap().id(), hooks[1].id());
        let disabled = hook("d", &base().push(), "chat").replace("true", "false");
        let enabled = hook("e", &base().push(), "chat");
        assert!(written(&Plan::of(&v2(&[disabled, enabled]), &connect(&[]))).is_empty(), "the enabled one is it");
    }

    #[test]
    fn the_first_generation_is_compared_by_sets_and_left_as_it_was() {
        let now = settings(&format!(
            r#"{{"id":1,"webhook_url":"{}","webhook_events":["b.c","a.b"],"before_message_send_hook_url":"{}","before_message_send_hook_attempt_timeout_ms":1500,"custom_action_handler_url":"{}"}}"#,
            base().push(),
            base().before_message_send(),
            base().custom_commands()
        ));
        assert!(!Plan::of(&now, &connect(&["a.b", "b.c"])).changes_anything());
        let removed = Plan::of(&now, &remove());
        let bodies: Vec<Value> = bodies(&removed).iter().map(|body| serde_json::from_str(body).unwrap()).collect();
        let push = json!({"webhook_url": ""});
        let urls = json!({"before_message_send_hook_url": "", "custom_action_handler_url": ""});
        assert_eq!(bodies, [urls, push, json!({"before_message_send_hook_attempt_timeout_ms": 0})]);
    }

    #[test]
    fn hooks_that_no_tree_holds_are_compared_all_the_same() {
        let hook = |field: &str, time: &str| {
            let json = format!(r#"{{"id":"h","odd":"\ud800",{field}"created_at":{time}}}"#);
            EventHook::read(&RawValue::from_string(json).unwrap()).unwrap()
        };
        let whole = hook(r#""kept":1,"#, "1");
        assert!(whole.is_equivalent(&hook(r#""kept":1,"#, "2")) && hook(r#""kept":1,"#, "2").holds(&whole));
        assert!(!whole.is_equivalent(&hook("", "1")) && !hook("", "1").holds(&whole));
    }

    #[test]
    fn temporary_hooks_of_streams_own_tool_are_foreign() {
        let temporary = format!(
            r#"{{"id":"t","hook_type":"webhook","enabled":true,"webhook_url":"{}?cliwebhook=7"}}"#,
            base().push()
        );
        let plan = Plan::of(&v2(std::slice::from_ref(&temporary)), &connect(&[]));
        assert_eq!(written(&plan)[0], temporary);
        assert!(!Plan::of(&v2(&[temporary]), &remove()).changes_anything());
    }

    fn value() -> impl Strategy<Value = String> {
        let leaf = prop_oneof![
            Just("null".to_owned()),
            any::<bool>().prop_map(|value| value.to_string()),
            any::<i64>().prop_map(|value| value.to_string()),
            any::<u64>().prop_map(|value| value.to_string()),
            Just("123456789012345678901234567890.5e-7".to_owned()),
            Just("9223372036854775807".to_owned()),
            Just(r#""\ud83d\u00e9\/\t""#.to_owned()),
            "\\PC{0,8}".prop_map(|text| Value::from(text).to_string()),
        ];
        leaf.prop_recursive(2, 8, 4, |inner| {
            let list =
                proptest::collection::vec(inner.clone(), 0..4).prop_map(|items| format!("[{}]", items.join(" , ")));
            let object = proptest::collection::btree_map("[a-z]{1,4}", inner, 0..4).prop_map(|fields| {
                let fields: Vec<_> = fields.iter().map(|(name, value)| format!("\"{name}\": {value}")).collect();
                format!("{{{}}}", fields.join(","))
            });
            prop_oneof![list, object]
        })
    }

    /// A hook of an unknown type, as read and as it must be written; its times may be numbers or text.
    fn foreign() -> impl Strategy<Value = (String, String)> {
        let fields = proptest::collection::vec(("[a-z_]{1,9}", value()), 0..6);
        ("[a-z]{3,8}", fields, any::<bool>(), 0usize..3).prop_map(|(id, fields, is_number, space)| {
            let space = " ".repeat(space);
            let fields: BTreeMap<_, _> = fields.into_iter().filter(|(name, _)| name != "id" && name != "hook_type").collect();
            let fields: String = fields.iter().map(|(name, value)| format!(",{space}\"{name}\":{space}{value}")).collect();
            let hook = |time: &str| {
                format!(r#"{{"id":"{id}",{space}"created_at":{time},"hook_type":"of_the_future"{fields},"updated_at":{time} }}"#)
            };
            let read = if is_number { hook(&TIME.to_string()) } else { hook(WRITTEN) };
            (read, hook(WRITTEN))
        })
    }

    proptest! {
        #[test]
        fn foreign_hooks_are_written_back_byte_for_byte_but_for_their_times(hooks in proptest::collection::vec(foreign(), 0..4)) {
            let (read, expected): (Vec<_>, Vec<_>) = hooks.into_iter().unzip();
            let now = v2(&read);
            let forced = |wanted| Wanted { is_forced: true, ..wanted };
            let first = Plan::of(&now, &forced(connect(&[])));
            let list = written(&first);
            prop_assert_eq!(&list[..list.len() - 1], &expected[..]);
            prop_assert!(!Plan::of(&first.expected, &connect(&[])).changes_anything(), "a second run has nothing to do");
            let mut moved = forced(connect(&["message.new"]));
            moved.base = BaseUrl::parse("https://other.example.com", "--url").unwrap();
            moved.may_replace = true;
            let second = Plan::of(&first.expected, &moved);
            prop_assert_eq!(&written(&second)[..list.len()], &list[..]);
            let back = Plan::of(&Plan::of(&second.expected, &Wanted { base: moved.base, ..forced(remove()) }).expected, &forced(remove()));
            prop_assert_eq!(written(&back), expected);
        }
    }
}
