//! A server with the rules of Stream's REST API for an app's settings, which refuses what Stream refuses.

use super::receiver::{Received, Receiver};
use super::wire::{API_KEY, SECRET};
use bytes::Bytes;
use http_body_util::Full;
use hyper::{Method, Response};
use serde_json::value::RawValue;
use serde_json::{Value, json};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};
use streamgate_core::fields::Fields;

const TIMES: [&str; 2] = ["created_at", "updated_at"];
const V1_FIELDS: [&str; 4] = ["webhook_url", "webhook_events", "sqs_url", "sns_topic_arn"];

/// An app's settings, and the faults to come.
#[derive(Clone, Debug, Default)]
pub struct App {
    pub is_v2: bool,
    /// Each hook as it was written; times as text.
    pub hooks: Vec<String>,
    /// The plain settings.
    pub plain: BTreeMap<String, Value>,
    /// How many reads after an update still show the settings before it.
    pub lag: usize,
    /// How many of the next requests are answered 429.
    pub too_many: usize,
    /// How many of the next updates are answered 429.
    pub busy_updates: usize,
    /// How many of the next requests an edge answers 502.
    pub edge_errors: usize,
    /// The hooks after each of the next reads, as if somebody else had changed them.
    pub changes: Vec<Vec<String>>,
    /// Whether hooks are read in another order than they were written.
    pub reorders: bool,
    /// Whether `/hook/events` exists.
    pub lists_events: bool,
    /// The results of the next updates. Those after them are taken.
    pub faults: VecDeque<Fault>,
    /// The plain settings that somebody else changes right after the next update.
    pub meanwhile: Option<BTreeMap<String, Value>>,
    /// Whether a timeout of 0 is refused, as Stream's documentation says.
    pub refuses_zero: bool,
    /// How many requests an edge answers 502 after the next update.
    pub unreadable: usize,
    /// A field of hooks that is dropped silently.
    pub drops: Option<&'static str>,
    /// How many reads still show these older hooks and plain settings.
    pub stale: Option<(usize, Vec<String>, BTreeMap<String, Value>)>,
}

/// The result of an update.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    Taken,
    /// 400, with this message.
    Refused(&'static str),
    /// The update is made, and an edge on the way back answers 502 with this text.
    LostAnswer(&'static str),
}

/// Serves until it is dropped.
#[derive(Debug)]
pub struct StreamApi {
    receiver: Receiver,
    app: Arc<Mutex<App>>,
}

impl StreamApi {
    pub async fn start(app: App) -> StreamApi {
        let app = Arc::new(Mutex::new(app));
        let served = Arc::clone(&app);
        let receiver = Receiver::start(move |request| served.lock().unwrap().answer(request)).await;
        StreamApi { receiver, app }
    }

    /// An app of the second generation with these hooks.
    pub async fn v2(hooks: &[&str]) -> StreamApi {
        let hooks = hooks.iter().map(|hook| (*hook).to_owned()).collect();
        StreamApi::start(App { is_v2: true, lists_events: true, hooks, ..App::default() }).await
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.receiver.address)
    }

    pub fn app(&self) -> App {
        self.app.lock().unwrap().clone()
    }

    pub fn change(&self, change: impl FnOnce(&mut App)) {
        change(&mut self.app.lock().unwrap());
    }

    pub fn requests(&self) -> Vec<Received> {
        self.receiver.received()
    }

    /// The bodies of all updates.
    pub fn updates(&self) -> Vec<Value> {
        let updates = self.requests().into_iter().filter(|request| request.method == Method::PATCH);
        updates.map(|request| serde_json::from_slice(&request.body).unwrap()).collect()
    }
}

impl App {
    fn answer(&mut self, request: &Received) -> Response<Full<Bytes>> {
        if self.edge_errors > 0 {
            self.edge_errors -= 1;
            let page = "<html><body>502 Bad Gateway</body></html>";
            return Response::builder().status(502).body(Full::from(page)).unwrap();
        }
        let is_busy = request.method == Method::PATCH && self.busy_updates > 0;
        if self.too_many > 0 || is_busy {
            self.too_many = self.too_many.saturating_sub(1);
            self.busy_updates -= usize::from(is_busy);
            let (code, message) = (9, "Too many requests");
            let body = json!({"code": code, "message": message, "StatusCode": 429}).to_string();
            let response = Response::builder().status(429).header("retry-after", "1");
            return response.body(Full::from(body)).unwrap();
        }
        if !is_signed(request.header("authorization")) || request.header("stream-auth-type") != "jwt" {
            return refuse(401, 5, "Token signature is invalid");
        }
        let (path, query) = request.path.split_once('?').unwrap_or((&request.path, ""));
        if !query.split('&').any(|pair| pair == format!("api_key={API_KEY}")) {
            return refuse(401, 2, "api_key not found");
        }
        match (request.method.as_str(), path) {
            ("GET", "/api/v2/app" | "/app") => self.read(),
            ("PATCH", "/api/v2/app" | "/app") => {
                let fault = self.faults.pop_front().unwrap_or(Fault::Taken);
                let done = match fault {
                    Fault::Refused(message) => Err(message.to_owned()),
                    Fault::Taken | Fault::LostAnswer(_) => self.update(&request.body),
                };
                match (done, fault) {
                    (Ok(()), Fault::LostAnswer(text)) => {
                        Response::builder().status(502).body(Full::from(text)).unwrap()
                    }
                    (Ok(()), _) => respond(200, json!({"duration": "12.34ms"}).to_string()),
                    (Err(message), _) => refuse(400, 4, &format!("UpdateApp failed with error: \"{message}\"")),
                }
            }
            ("GET", "/hook/events") if self.lists_events => {
                let events = ["message.new", "message.updated", "message.deleted", "reaction.new", "future.event"];
                let events: Vec<_> = events.iter().map(|name| json!({"name": name, "products": ["chat"]})).collect();
                respond(200, json!({"events": events}).to_string())
            }
            _ => refuse(404, 16, "not found"),
        }
    }

    fn read(&mut self) -> Response<Full<Bytes>> {
        let (hooks, plain) = match &mut self.stale {
            Some((left, hooks, plain)) if *left > 0 => {
                *left -= 1;
                (hooks.clone(), plain.clone())
            }
            _ => (self.hooks.clone(), self.plain.clone()),
        };
        let mut app = Fields::default();
        app.set("id", &json!(12345));
        app.set("name", &json!("an app"));
        app.set("placement", &json!("us-east"));
        app.set("suspended", &json!(false));
        app.set("use_hook_v2", &json!(self.is_v2));
        for (name, value) in &plain {
            app.set(name, value);
        }
        let mut hooks: Vec<String> = hooks.iter().map(|hook| with_times(hook, nanoseconds)).collect();
        if self.reorders {
            hooks.reverse();
        }
        app.set_raw("event_hooks", RawValue::from_string(format!("[{}]", hooks.join(", "))).unwrap());
        if !self.changes.is_empty() {
            self.hooks = self.changes.remove(0);
        }
        respond(200, format!("{{\"app\": {}, \"duration\": \"1.2ms\"}}", app.to_json()))
    }

    /// Replaces the settings that the body names, and no others.
    fn update(&mut self, body: &[u8]) -> Result<(), String> {
        let changes: BTreeMap<String, Box<RawValue>> =
            serde_json::from_slice(body).map_err(|error| error.to_string())?;
        let before = (self.lag, self.hooks.clone(), self.plain.clone());
        let mut after = self.clone();
        for (name, value) in changes {
            let value = value.get();
            if name == "event_hooks" {
                after.hooks = self.replaced(value)?;
            } else if self.is_v2 && V1_FIELDS.contains(&name.as_str()) {
                return Err("Cannot set webhook URL, webhook events in new hook v2 system".to_owned());
            } else {
                let value: Value = serde_json::from_str(value).unwrap();
                let is_time = name == "before_message_send_hook_attempt_timeout_ms";
                let is_refused = |value| value > 5000 || value == 0 && self.refuses_zero;
                if is_time && value.as_u64().is_none_or(is_refused) {
                    return Err("timeout out of range".to_owned());
                }
                after.plain.insert(name, value);
            }
        }
        *self = App { stale: Some(before), ..after };
        self.plain.extend(self.meanwhile.take().unwrap_or_default());
        self.edge_errors = std::mem::take(&mut self.unreadable);
        Ok(())
    }

    fn replaced(&self, list: &str) -> Result<Vec<String>, String> {
        if !self.is_v2 {
            return Err("cannot set event hooks in hook v1 system".to_owned());
        }
        let list: Vec<Box<RawValue>> = serde_json::from_str(list).map_err(|error| error.to_string())?;
        for sent in &list {
            let sent = Fields::parse(sent.get().as_bytes()).unwrap();
            let is_number = |name: &str| sent.get(name).is_some_and(|time| !time.get().starts_with(['"', 'n']));
            if TIMES.into_iter().any(is_number) {
                return Err("Time.UnmarshalJSON: input is not a JSON string".to_owned());
            }
            let is_foreign = !sent.text("webhook_url").unwrap_or_default().ends_with("/webhooks/stream/push");
            let known = self.hooks.iter().map(|hook| Fields::parse(hook.as_bytes()).unwrap());
            for known in known.filter(|known| is_foreign && known.text("id") == sent.text("id")) {
                let known: BTreeMap<String, Value> = serde_json::from_str(&known.to_json()).unwrap();
                let sent: BTreeMap<String, Value> = serde_json::from_str(&sent.to_json()).unwrap();
                let kept = |name: &str, value: &Value| TIMES.contains(&name) || sent.get(name) == Some(value);
                if let Some((lost, _)) = known.iter().find(|(name, value)| !kept(name, value)) {
                    return Err(format!("hook {} lost its {lost}", known["id"]));
                }
            }
        }
        let dropped = |hook: String| match self.drops {
            Some(name) => {
                let fields = Fields::parse(hook.as_bytes()).unwrap();
                let mut kept = Fields::default();
                for (name, value) in fields.iter().filter(|(known, _)| *known != name) {
                    kept.set_raw(name, value.to_owned());
                }
                kept.to_json()
            }
            None => hook,
        };
        Ok(list.iter().map(|hook| dropped(self.completed(hook.get()))).collect())
    }
}

impl App {
    /// A new hook gets defaults for the fields that its sender left out.
    fn completed(&self, hook: &str) -> String {
        let mut fields = Fields::parse(hook.as_bytes()).unwrap();
        if self.hooks.iter().any(|known| Fields::parse(known.as_bytes()).unwrap().text("id") == fields.text("id")) {
            return hook.to_owned();
        }
        fields.set("timeout_ms", &json!(6000));
        fields.set("created_at", &json!("2026-11-28T00:00:00Z"));
        fields.set("callback", &Value::Null);
        fields.to_json()
    }
}

/// The hook with its times as `written` has them.
fn with_times(hook: &str, written: impl Fn(&str) -> String) -> String {
    let mut fields = Fields::parse(hook.as_bytes()).unwrap();
    let times = TIMES.iter().filter_map(|name| Some((*name, fields.text(name)?))).collect::<Vec<_>>();
    if times.is_empty() {
        return hook.to_owned();
    }
    for (name, time) in times {
        fields.set_raw(name, RawValue::from_string(written(&time)).unwrap());
    }
    fields.to_json()
}

fn nanoseconds(time: &str) -> String {
    time.parse::<jiff::Timestamp>().unwrap().as_nanosecond().to_string()
}

/// Whether the app's secret signed this token, for a server: tokens of Stream's libraries claim `server`, or nothing.
fn is_signed(token: &str) -> bool {
    use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD as base64url};
    let Some((signed, signature)) = token.rsplit_once('.') else { return false };
    let key = streamgate_core::signature::SigningKey::new(SECRET.as_bytes());
    let parts = signed.split('.').map(|part| serde_json::from_slice(&base64url.decode(part).unwrap_or_default()));
    let parts: Vec<Value> = parts.map(Result::unwrap_or_default).collect();
    let [header, claims] = &parts[..] else { return false };
    header["alg"] == "HS256"
        && (claims["server"] == true || *claims == json!({}))
        && base64url.encode(key.sign(signed.as_bytes()).bytes()) == signature
}

/// Stream's token of a server. The unit test of the code that makes tokens has the test vector of Stream's SDKs.
pub fn token(secret: &str) -> String {
    use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD as base64url};
    let signed = [r#"{"alg":"HS256","typ":"JWT"}"#, r#"{"server":true}"#].map(|part| base64url.encode(part)).join(".");
    let key = streamgate_core::signature::SigningKey::new(secret.as_bytes());
    format!("{signed}.{}", base64url.encode(key.sign(signed.as_bytes()).bytes()))
}

fn refuse(status: u16, code: i64, message: &str) -> Response<Full<Bytes>> {
    respond(status, json!({"code": code, "message": message, "StatusCode": status, "duration": "0.00ms"}).to_string())
}

fn respond(status: u16, body: String) -> Response<Full<Bytes>> {
    let response = Response::builder().status(status).header("content-type", "application/json");
    response.body(Full::from(body)).unwrap()
}
