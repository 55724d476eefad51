//! The results: statuses, outcomes and latencies.

use hyper::Uri;
use hyper::http::response::Parts;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Duration;

/// Most distinct errors shown.
const MAX_ERRORS: usize = 5;

/// The answer to one webhook.
#[derive(Debug)]
pub(super) struct Answer {
    id: String,
    status: Option<u16>,
    outcome: Option<String>,
    /// Why it was refused, or why there is no answer.
    error: Option<String>,
    latency: Duration,
    /// The answer to a hook.
    answer: Option<Value>,
}

impl Answer {
    pub(super) fn new(id: String, parts: &Parts, body: &[u8], latency: Duration) -> Answer {
        let outcome = parts.headers.get("x-streamgate-outcome").and_then(|value| value.to_str().ok());
        let refusal = || {
            let parsed: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
            let text = |name: &str| parsed.get(name).and_then(|value| value.as_str()).unwrap_or_default().to_owned();
            format!("{} {}: {}", parts.status.as_u16(), text("code"), text("message"))
        };
        Answer {
            id,
            status: Some(parts.status.as_u16()),
            outcome: outcome.map(str::to_owned),
            error: (!parts.status.is_success()).then(refusal),
            latency,
            answer: parts.status.is_success().then(|| serde_json::from_slice(body).ok()).flatten(),
        }
    }

    pub(super) fn failed(id: String, error: String) -> Answer {
        Answer { id, status: None, outcome: None, error: Some(error), latency: Duration::ZERO, answer: None }
    }
}

#[derive(Debug)]
pub(super) struct Report {
    answers: Vec<Answer>,
    /// Sorted; only of webhooks that were answered.
    latencies: Vec<Duration>,
    elapsed: Duration,
}

impl Report {
    pub(super) fn new(answers: Vec<Answer>, elapsed: Duration) -> Report {
        let answered = answers.iter().filter(|answer| answer.status.is_some());
        let mut latencies: Vec<_> = answered.map(|answer| answer.latency).collect();
        latencies.sort_unstable();
        Report { answers, latencies, elapsed }
    }

    pub(super) fn all_taken(&self) -> bool {
        self.answers.iter().all(|answer| answer.error.is_none())
    }

    /// Milliseconds; `None` if nothing was answered.
    fn percentile(&self, share: f64) -> Option<f64> {
        let last = self.latencies.len().checked_sub(1)?;
        let place = (last as f64 * share).round() as usize;
        self.latencies.get(place).map(|latency| latency.as_secs_f64() * 1000.0)
    }

    fn count<'a>(&'a self, name: impl Fn(&'a Answer) -> Option<String>) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for name in self.answers.iter().filter_map(name) {
            *counts.entry(name).or_insert(0) += 1;
        }
        counts
    }

    fn statuses(&self) -> BTreeMap<String, usize> {
        self.count(|answer| Some(answer.status.map_or_else(|| "none".to_owned(), |status| status.to_string())))
    }

    fn outcomes(&self) -> BTreeMap<String, usize> {
        self.count(|answer| answer.outcome.clone())
    }

    fn errors(&self) -> BTreeMap<String, usize> {
        self.count(|answer| answer.error.clone())
    }

    pub(super) fn json(&self) -> serde_json::Result<String> {
        let ids: Vec<_> = self.answers.iter().take(1).filter(|_| self.answers.len() == 1).map(|one| &one.id).collect();
        let mut report = json!({
            "sent": self.answers.len(),
            "id": ids.first(),
            "statuses": self.statuses(),
            "outcomes": self.outcomes(),
            "errors": self.errors(),
            "latency_ms": {
                "p50": self.percentile(0.5),
                "p90": self.percentile(0.9),
                "p99": self.percentile(0.99),
                "max": self.percentile(1.0),
            },
            "elapsed_seconds": self.elapsed.as_secs_f64(),
        });
        if let [Answer { answer: Some(answer), .. }] = &*self.answers {
            report["answer"] = answer.clone();
        }
        serde_json::to_string(&report)
    }

    pub(super) fn text(&self, url: &Uri) -> String {
        let list = |counts: BTreeMap<String, usize>| {
            counts.into_iter().map(|(name, count)| format!("{count} {name}")).collect::<Vec<_>>().join(", ")
        };
        let mut lines = Vec::new();
        if let [Answer { id, status: Some(status), outcome, latency, .. }] = &*self.answers {
            let outcome = outcome.as_deref().unwrap_or("no outcome");
            lines.push(format!("{status} {outcome} in {:.1} ms, webhook id {id}", latency.as_secs_f64() * 1000.0));
        } else {
            let rate = self.answers.len() as f64 / self.elapsed.as_secs_f64();
            lines.push(format!(
                "sent       {} in {:.1} s, {rate:.0} a second",
                self.answers.len(),
                self.elapsed.as_secs_f64()
            ));
            lines.push(format!("statuses   {}", list(self.statuses())));
            lines.push(format!("outcomes   {}", list(self.outcomes())));
            if let (Some(p50), Some(p90), Some(p99), Some(max)) =
                (self.percentile(0.5), self.percentile(0.9), self.percentile(0.99), self.percentile(1.0))
            {
                lines.push(format!("latency    p50 {p50:.1} ms, p90 {p90:.1} ms, p99 {p99:.1} ms, max {max:.1} ms"));
            }
        }
        if let [Answer { answer: Some(answer), .. }] = &*self.answers {
            lines.push(format!("answer     {}", meaning(answer)));
            // Serializing a JSON value cannot fail.
            lines.extend(serde_json::to_string_pretty(answer));
        }
        for (error, count) in self.errors().into_iter().take(MAX_ERRORS) {
            lines.push(format!("refused    {count} × {error}"));
        }
        if !self.answers.is_empty() && self.latencies.is_empty() {
            let target =
                format!("{}://{}", url.scheme_str().unwrap_or("http"), url.authority().map_or("", |a| a.as_str()));
            lines.push(format!("no answer came from {target}; is `streamgate up` running, and is --url its address?"));
        }
        lines.join("\n")
    }
}

/// What Stream would do with a hook's answer.
fn meaning(answer: &Value) -> String {
    let text = |name: &str| answer["message"][name].as_str().unwrap_or_default();
    match (&answer["message"], text("type")) {
        (Value::Null, _) if answer.get("message").is_some() => "the message is deleted".to_owned(),
        (Value::Object(_), "error") => format!("rejected: {:?}", text("text")),
        (Value::Object(_), "ephemeral") => format!("only the sender sees: {:?}", text("text")),
        (Value::Object(_), _) => format!("the message is stored with the text {:?}", text("text")),
        _ => "no message: Stream would take it for a failure".to_owned(),
    }
}
