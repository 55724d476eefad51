//! Describes this process to `streamgate status` every few seconds.

use std::sync::Arc;
use std::time::SystemTime;
use streamgate_core::instance::{INTERVAL, Instance, Role, SpoolUse};
use streamgate_core::ports::Instances;
use streamgate_service::metrics::Metrics;
use streamgate_service::ops::Readiness;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

/// What the description is made from.
pub(crate) struct Heartbeat {
    role: Role,
    id: String,
    host: String,
    started_at_ms: i64,
    metrics: Arc<Metrics>,
    readiness: Readiness,
}

impl Heartbeat {
    pub(crate) fn new(role: Role, metrics: Arc<Metrics>, readiness: Readiness) -> Heartbeat {
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let (pid, started_at_ms) = (std::process::id(), i64::try_from(since_epoch.as_millis()).unwrap_or(i64::MAX));
        // With the time, because containers share names, and all have the same process number.
        let id = format!("{}@{host}:{pid}:{started_at_ms}", role.as_str());
        Heartbeat { role, id, host, started_at_ms, metrics, readiness }
    }

    /// Until `ended`; then the process is recorded as gone. One that is only dropped counts as gone a while later.
    pub(crate) async fn run(self, instances: Arc<impl Instances>, ended: CancellationToken) {
        let mut ticks = tokio::time::interval(INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while ended.run_until_cancelled(ticks.tick()).await.is_some() {
            // That the store is away shows elsewhere.
            if let Err(error) = instances.beat(&self.instance()).await {
                tracing::debug!(%error, "cannot record that this process runs; `streamgate status` does not show it");
            }
        }
        if let Err(error) = instances.leave(&self.id).await {
            tracing::debug!(%error, "cannot record that this process has ended; `streamgate status` shows it for a while");
        }
    }

    fn instance(&self) -> Instance {
        let metrics = &self.metrics;
        let (ready, trouble) = match (self.readiness)() {
            Ok(trouble) => (true, trouble),
            Err(why) => (false, Some(why)),
        };
        let in_hand = [&metrics.gateway_in_flight, &metrics.worker_in_flight, &metrics.worker_calls_in_flight];
        let spool = SpoolUse {
            events: metrics.spool_events.get(),
            bytes: metrics.spool_bytes.get(),
            oldest_seconds: metrics.spool_oldest.get(),
        };
        Instance {
            id: self.id.clone(),
            role: self.role,
            host: self.host.clone(),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started_at_ms: self.started_at_ms,
            ready,
            trouble,
            in_hand: in_hand.iter().map(|gauge| gauge.get()).sum(),
            spool: (self.role == Role::Gateway).then_some(spool),
            open_routes: metrics.open_routes(),
        }
    }
}
