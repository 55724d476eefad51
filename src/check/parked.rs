//! Events parked for routes that are not in the configuration: no worker takes them.

use super::Finding;
use crate::route::states::RouteStates;
use crate::wiring;
use streamgate_service::config::Config;

/// Returns nothing where the backend cannot be asked: that has a finding of its own.
pub(super) async fn look(config: &Config) -> Vec<Finding> {
    let Ok(states) = RouteStates::of(config) else { return Vec::new() };
    let configured = wiring::route_names(config);
    let Ok(records) = states.read().await else { return Vec::new() };
    let gone: Vec<_> = records.into_keys().filter(|name| !configured.contains(&name.as_str())).collect();
    let Ok(parked) = states.parked(&gone).await else { return Vec::new() };
    let orphans = parked.into_iter().filter(|(name, events)| *events > 0 && !configured.contains(&name.as_str()));
    let findings = orphans.map(|(name, events)| {
        let what = format!(
            "{events} events are parked for the route {name:?}, which is not in the configuration (routes of code are not known here): bring it back, or \
             put them back by: streamgate dead replay --queue parked.{name} --all"
        );
        Finding::warning("worker.routes", what)
    });
    findings.collect()
}
