//! A process that runs, as it describes itself every few seconds for `streamgate status`.

use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Interval between two heartbeats of a process.
pub const INTERVAL: Duration = Duration::from_secs(5);
/// A process whose last heartbeat is older is gone. Four intervals, so that a slow store does not make a process disappear.
pub const GONE_AFTER: Duration = Duration::from_secs(20);

/// Which commands run in the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    Up,
    Gateway,
    Worker,
}

impl Role {
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Up => "up",
            Role::Gateway => "gateway",
            Role::Worker => "worker",
        }
    }
}

/// One process. Fields that an older version does not write have defaults, and unknown ones are ignored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    /// Unique among all processes of a prefix.
    pub id: String,
    pub role: Role,
    pub host: String,
    pub pid: u32,
    pub version: String,
    /// Milliseconds since the Unix epoch, by the process's clock.
    pub started_at_ms: i64,
    /// Whether it would accept work, as `/readyz` says.
    pub ready: bool,
    /// Why it is not ready, or what is impaired although it is.
    #[serde(default)]
    pub trouble: Option<String>,
    /// Requests, events and hooks that it has in hand.
    #[serde(default)]
    pub in_hand: i64,
    /// The spool of a gateway.
    #[serde(default)]
    pub spool: Option<SpoolUse>,
    /// The routes of a worker whose breaker is open.
    #[serde(default)]
    pub open_routes: Vec<String>,
}

/// How full a gateway's spool is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpoolUse {
    pub events: i64,
    pub bytes: i64,
    /// Age of the oldest event.
    pub oldest_seconds: i64,
}

impl Instance {
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }

    /// `None` if the text is unreadable, as that of a later version may be.
    pub fn parse(json: &str) -> Option<Instance> {
        serde_json::from_str(json).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_heartbeat_reads_back_and_one_of_another_version_has_defaults() {
        let instance = Instance {
            id: "gateway@one:7".into(),
            role: Role::Gateway,
            host: "one".into(),
            pid: 7,
            version: "0.1.0".into(),
            started_at_ms: 5,
            ready: false,
            trouble: Some("draining".into()),
            in_hand: 3,
            spool: Some(SpoolUse { events: 1, bytes: 2, oldest_seconds: 3 }),
            open_routes: vec!["app".into()],
        };
        assert_eq!(Instance::parse(&instance.to_json()), Some(instance));
        let least =
            r#"{"id":"a","role":"up","host":"h","pid":1,"version":"2","started_at_ms":0,"ready":true,"new":[]}"#;
        let read = Instance::parse(least).unwrap();
        assert_eq!((read.in_hand, read.spool, read.open_routes.len()), (0, None, 0));
        assert_eq!(Instance::parse("{}"), None);
    }
}
