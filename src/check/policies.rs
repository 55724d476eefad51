//! The policies on our queues. AMQP does not show them, so RabbitMQ's management API is asked, if its URL is
//! configured.

use super::Finding;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{AUTHORIZATION, HOST};
use hyper::{Request, StatusCode, Uri};
use percent_encoding::{NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::time::Duration;
use streamgate_service::http_client::{self, HttpClient};

const WHAT: &str = "rabbitmq.management_url";
const PATIENCE: Duration = Duration::from_secs(5);
/// RabbitMQ's description of one queue takes a few kilobytes.
const MAX_ANSWER: usize = 1 << 20;

/// The fields of RabbitMQ's description of a queue that are used here.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Queue {
    policy: Option<String>,
    operator_policy: Option<String>,
    /// RabbitMQ sends an empty list if there is none.
    effective_policy_definition: serde_json::Value,
}

/// What a policy does to a queue of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// The policy is harmless.
    Harmless,
    /// Events take another way than usual, and none is lost.
    Notable(&'static str),
    /// Events are lost, and we can neither stop nor see it.
    Loses(&'static str),
}

/// `queues`: all names; `dead`: the name of the dead letters' queue.
pub(super) async fn look(url: &str, vhost: &str, queues: Vec<String>, dead: &str) -> Vec<Finding> {
    let api = match Api::of(url) {
        Ok(api) => api,
        Err(why) => return vec![Finding::new(WHAT, Err(why))],
    };
    // A 404 for a queue counts only if the server is the management API: any server may answer 404.
    if let Err(why) = api.overview().await {
        return vec![Finding::new(WHAT, Err(why))];
    }
    let mut findings = Vec::new();
    for name in queues {
        match api.queue(vhost, &name).await {
            Ok(Some(queue)) => findings.extend(judge_all(&name, name == dead, &queue)),
            Ok(None) => {}
            // The other queues would fail the same way.
            Err(why) => return vec![Finding::new(WHAT, Err(why))],
        }
    }
    if findings.is_empty() {
        findings.push(Finding::new(WHAT, Ok("no policy takes events out of the queues".to_owned())));
    }
    findings
}

struct Api {
    client: HttpClient,
    /// Scheme, host, port, and the path under which the API is served.
    base: String,
    host: String,
    authorization: Option<String>,
}

impl Api {
    fn of(url: &str) -> Result<Api, String> {
        let uri: Uri = url
            .parse()
            .map_err(|_| "is not a valid URL: expected one like http://user:password@host:15672".to_owned())?;
        let (scheme, authority) = uri
            .scheme_str()
            .zip(uri.authority())
            .ok_or("names no host; write it like http://user:password@host:15672".to_owned())?;
        let (login, host) = match authority.as_str().rsplit_once('@') {
            Some((login, host)) => (Some(login), host),
            None => (None, authority.as_str()),
        };
        let authorization = login.map(|login| {
            let decoded: Vec<u8> = percent_decode_str(login).collect();
            format!("Basic {}", STANDARD.encode(decoded))
        });
        let client = http_client::client(None).map_err(|error| error.to_string())?;
        let base = format!("{scheme}://{host}{}", uri.path().trim_end_matches('/'));
        Ok(Api { client, base, host: host.to_owned(), authorization })
    }

    /// Checks that the server is RabbitMQ's management API.
    async fn overview(&self) -> Result<(), String> {
        match self.get::<serde_json::Value>("overview").await? {
            Some(overview) if overview.get("rabbitmq_version").is_some() => Ok(()),
            Some(_) | None => Err(format!("the server at {} is not RabbitMQ's management API", self.base)),
        }
    }

    /// `None` if there is no such queue.
    async fn queue(&self, vhost: &str, name: &str) -> Result<Option<Queue>, String> {
        let encoded = |text| utf8_percent_encode(text, NON_ALPHANUMERIC);
        self.get(&format!("queues/{}/{}", encoded(vhost), encoded(name))).await
    }

    /// `None` if the server answers 404.
    async fn get<T: DeserializeOwned>(&self, what: &str) -> Result<Option<T>, String> {
        let uri = format!("{}/api/{what}", self.base);
        let mut request = Request::get(uri).header(HOST, &self.host);
        if let Some(authorization) = &self.authorization {
            request = request.header(AUTHORIZATION, authorization);
        }
        let request = request.body(Full::<Bytes>::default()).map_err(|error| error.to_string())?;
        let response = http_client::exchange(&self.client, request, PATIENCE, MAX_ANSWER).await;
        let response = response.map_err(|error| format!("{}: {error}", self.host))?;
        match response.status() {
            StatusCode::OK => {
                serde_json::from_slice(response.body().as_ref().map_err(String::clone)?).map(Some).map_err(|error| {
                    format!("the answer of {} is not one of RabbitMQ's management API: {error}", self.host)
                })
            }
            StatusCode::NOT_FOUND => Ok(None),
            StatusCode::UNAUTHORIZED => Err(format!(
                "{} refuses the login; the user needs the tag `monitoring` or `management`, and the URL its password",
                self.host
            )),
            status => Err(format!("{} answers {status}", self.host)),
        }
    }
}

fn judge_all(name: &str, is_dead: bool, queue: &Queue) -> Vec<Finding> {
    let definition: BTreeMap<_, _> = queue.effective_policy_definition.as_object().into_iter().flatten().collect();
    let policies = [&queue.policy, &queue.operator_policy].into_iter().flatten().filter(|name| !name.is_empty());
    let policies = policies.map(|name| format!("{name:?}")).collect::<Vec<_>>().join(" and ");
    let found = definition.into_iter().filter_map(|(key, value)| {
        let said = |effect| format!("the policy {policies} sets {key} = {value} on the queue {name}: {effect}");
        match judge(key, value, is_dead) {
            Verdict::Harmless => None,
            Verdict::Notable(effect) => Some(Finding::warning(WHAT, said(effect))),
            Verdict::Loses(effect) => Some(Finding::new(WHAT, Err(said(effect)))),
        }
    });
    found.collect()
}

fn judge(key: &str, value: &serde_json::Value, is_dead: bool) -> Verdict {
    match key {
        "overflow" if value != "reject-publish" => Verdict::Loses("messages over a limit are dropped; remove it"),
        "expires" => Verdict::Loses("RabbitMQ deletes the queue with its events when nobody uses it; remove it"),
        "message-ttl" if is_dead => {
            Verdict::Loses("dead letters are deleted; remove it, and use `streamgate dead drop`")
        }
        // Each read of the dead letters counts as a delivery.
        "delivery-limit" if is_dead => Verdict::Loses("dead letters are deleted after some reads; remove it"),
        "message-ttl" | "delivery-limit" => {
            Verdict::Notable("events that it removes become dead letters, dropped_by_broker")
        }
        "max-length" | "max-length-bytes" => {
            Verdict::Notable("over it RabbitMQ refuses, and events wait where they are")
        }
        _ => Verdict::Harmless,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_table_of_policies() {
        let cases = [
            ("overflow", json!("drop-head"), false, "loses"),
            ("overflow", json!("reject-publish"), false, "harmless"),
            ("expires", json!(1000), false, "loses"),
            ("message-ttl", json!(1000), true, "loses"),
            ("message-ttl", json!(1000), false, "notable"),
            ("delivery-limit", json!(2), false, "notable"),
            ("delivery-limit", json!(2), true, "loses"),
            ("max-length", json!(10), false, "notable"),
            ("queue-leader-locator", json!("balanced"), false, "harmless"),
        ];
        for (key, value, is_dead, expected) in cases {
            let verdict = match judge(key, &value, is_dead) {
                Verdict::Harmless => "harmless",
                Verdict::Notable(_) => "notable",
                Verdict::Loses(_) => "loses",
            };
            assert_eq!(verdict, expected, "{key} {value}");
        }
    }

    #[test]
    fn urls_are_read_and_no_password_shows() {
        assert!(Api::of("hunter2").is_err_and(|error| !error.contains("hunter2")));
        let api = Api::of("http://ann:p%40ss@host:1").unwrap();
        assert_eq!((api.base.as_str(), api.host.as_str()), ("http://host:1", "host:1"));
        assert_eq!(api.authorization, Some(format!("Basic {}", STANDARD.encode("ann:p@ss"))));
    }
}
