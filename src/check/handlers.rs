//! Checks whether the services that events and hooks are forwarded to can be reached (name, port and TLS, without a
//! request), and whether the commands that are run for events exist.

use super::Finding;
use crate::wiring::ServiceClients;
use rustix::fs::{Access, access};
use std::path::{Path, PathBuf};
use std::time::Duration;
use streamgate_service::config::{Config, ForwardConfig, HandlerConfig};

const PATIENCE: Duration = Duration::from_secs(5);

/// One finding for each service, all checked concurrently.
pub(super) async fn look(config: &Config) -> Vec<Finding> {
    let mut clients = ServiceClients::default();
    let services = services(config).map(|(key, forward)| (key, forward, clients.of(forward)));
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
    let commands = config.handlers().filter_map(|(path, handler)| match handler {
        HandlerConfig::Exec(exec) => Some((format!("{path}.exec"), exec.command.first()?)),
        HandlerConfig::Forward(_) | HandlerConfig::Reply(_) => None,
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
            None => Err(format!("{program} is not an executable file: give its full path, and make it executable")),
        };
        Finding::new(key, what)
    });
    found.collect()
}

fn is_executable(path: &Path) -> bool {
    path.is_file() && access(path, Access::EXEC_OK).is_ok()
}

/// With the keys of their tables.
fn services(config: &Config) -> impl Iterator<Item = (String, &ForwardConfig)> {
    config.handlers().filter_map(|(path, handler)| match handler {
        HandlerConfig::Forward(forward) => Some((format!("{path}.forward"), forward)),
        HandlerConfig::Exec(_) | HandlerConfig::Reply(_) => None,
    })
}
