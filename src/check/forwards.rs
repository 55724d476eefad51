//! Whether the services that events and hooks are forwarded to can be reached: name, port and TLS, without a request.

use super::Finding;
use crate::wiring::ServiceClients;
use std::time::Duration;
use streamgate_service::config::{CommandConfig, Config, ForwardConfig};

const PATIENCE: Duration = Duration::from_secs(5);

/// One finding for each service, all looked at together.
pub(super) async fn look(config: &Config) -> Vec<Finding> {
    let mut clients = ServiceClients::default();
    let services = services(config).into_iter().map(|(key, forward)| (key, forward, clients.of(forward)));
    let tries = services.map(|(key, forward, client)| async move {
        let tried = match client {
            Ok(client) => client.try_connection(&forward.url, PATIENCE).await.map_err(|failure| failure.to_string()),
            Err(error) => Err(error.to_string()),
        };
        let host = forward.url.authority().map(ToString::to_string).unwrap_or_default();
        Finding::new(key, tried.map(|()| format!("{host} takes connections")))
    });
    futures_util::future::join_all(tries).await
}

/// With the keys of their URLs.
fn services(config: &Config) -> Vec<(String, &ForwardConfig)> {
    let routes = config.worker.routes.iter().enumerate();
    let mut services: Vec<_> =
        routes.map(|(place, route)| (format!("worker.routes[{}].forward", place + 1), &route.forward)).collect();
    let (moderation, commands) = (&config.hooks.before_message_send, &config.hooks.custom_commands);
    services.extend(moderation.forward.iter().map(|to| ("hooks.before_message_send.forward".to_owned(), to)));
    services.extend(commands.forward.iter().map(|to| ("hooks.custom_commands.forward".to_owned(), to)));
    services.extend(commands.commands.iter().filter_map(|(name, command)| match command {
        CommandConfig::Forward(to) => Some((format!("hooks.custom_commands.commands.{name}.forward"), to)),
        CommandConfig::Reply { .. } => None,
    }));
    services
}
