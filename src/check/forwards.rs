//! Checks whether the services that events and hooks are forwarded to can be reached (name, port and TLS, without a
//! request), and whether the commands that are run for events exist.

use super::Finding;
use crate::wiring::ServiceClients;
use rustix::fs::{Access, access};
use std::path::{Path, PathBuf};
use std::time::Duration;
use streamgate_service::config::{CommandConfig, Config, ForwardConfig, HandlerConfig};

const PATIENCE: Duration = Duration::from_secs(5);

/// One finding for each service, all checked concurrently.
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

/// Checks the routes' commands: each must be an executable file, at its path or in PATH.
pub(super) fn commands(config: &Config) -> Vec<Finding> {
    let routes = config.worker.routes.iter().enumerate();
    let commands = routes.filter_map(|(place, route)| match &route.handler {
        HandlerConfig::Forward(_) => None,
        HandlerConfig::Exec(exec) => Some((format!("worker.routes[{}].exec", place + 1), exec.command.first()?)),
    });
    let found = commands.map(|(key, program)| {
        let there = match program.contains('/') {
            true => Some(PathBuf::from(program)).filter(|path| is_executable(path)),
            false => {
                let path = std::env::var_os("PATH").unwrap_or_default();
                std::env::split_paths(&path).map(|directory| directory.join(program)).find(|path| is_executable(path))
            }
        };
        let what = match there {
            Some(path) => Ok(format!("runs {}", path.display())),
            None => Err(format!(
                "{program} is no file that can be run from here: give its whole path, and make it executable"
            )),
        };
        Finding::new(key, what)
    });
    found.collect()
}

fn is_executable(path: &Path) -> bool {
    path.is_file() && access(path, Access::EXEC_OK).is_ok()
}

/// The services, each with the key of its URL.
fn services(config: &Config) -> Vec<(String, &ForwardConfig)> {
    let routes = config.worker.routes.iter().enumerate();
    let forwards = routes.filter_map(|(place, route)| match &route.handler {
        HandlerConfig::Forward(forward) => Some((format!("worker.routes[{}].forward", place + 1), forward)),
        HandlerConfig::Exec(_) => None,
    });
    let mut services: Vec<_> = forwards.collect();
    let (moderation, commands) = (&config.hooks.before_message_send, &config.hooks.custom_commands);
    services.extend(moderation.forward.iter().map(|to| ("hooks.before_message_send.forward".to_owned(), to)));
    services.extend(commands.forward.iter().map(|to| ("hooks.custom_commands.forward".to_owned(), to)));
    services.extend(commands.commands.iter().filter_map(|(name, command)| match command {
        CommandConfig::Forward(to) => Some((format!("hooks.custom_commands.commands.{name}.forward"), to)),
        CommandConfig::Reply { .. } => None,
    }));
    services
}
