//! Builds routes, hooks and a worker's policies from the configuration. The stores that they work on are in `backends`.

use anyhow::{Context, bail};
use std::collections::HashSet;
use std::collections::hash_map::{Entry, HashMap};
use std::sync::Arc;
use std::time::Duration;
use streamgate_core::{pattern::Pattern, retry::Ladder};
use streamgate_service::config::{Config, ForwardConfig, HandlerConfig, RouteConfig};
use streamgate_service::http_client::{ClientError, ServiceClient};
use streamgate_worker::{
    CallPolicy, Exec, Forward, ForwardHook, Handler, HookHandler, Hooks, Limits, Observe, Policy, Reply, Route, Router,
    Screen,
};

/// File descriptors of one command: both ends of three pipes while it starts, and its process.
const FILES_OF_A_COMMAND: usize = 8;

/// One client for each set of authorities, so that calls to one service share its connections.
#[derive(Default)]
pub(crate) struct ServiceClients(HashMap<Option<String>, ServiceClient>);

impl ServiceClients {
    pub(crate) fn of(&mut self, to: &ForwardConfig) -> Result<ServiceClient, ClientError> {
        Ok(match self.0.entry(to.ca.clone()) {
            Entry::Occupied(known) => known.get().clone(),
            Entry::Vacant(place) => place.insert(ServiceClient::new(to.ca.as_deref())?).clone(),
        })
    }

    fn event_handler(&mut self, handler: &HandlerConfig) -> anyhow::Result<Arc<dyn Handler>> {
        Ok(match handler {
            HandlerConfig::Forward(to) => Arc::new(Forward::new(self.of(to)?, to)),
            HandlerConfig::Exec(exec) => Arc::new(Exec::new(exec)),
            HandlerConfig::Reply(_) => bail!("a reply answers commands, and no events"),
        })
    }

    fn hook_handler(&mut self, handler: &HandlerConfig) -> anyhow::Result<Arc<dyn HookHandler>> {
        Ok(match handler {
            HandlerConfig::Forward(to) => Arc::new(ForwardHook::new(self.of(to)?, to)),
            HandlerConfig::Reply(reply) => Arc::new(Reply::new(reply)),
            HandlerConfig::Exec(_) => bail!("exec handles events, and answers no hooks"),
        })
    }
}

/// Name of the route that logs events, if there is no other.
const LOG: &str = "log";

/// The names of the configured routes; code may have more.
pub fn route_names(config: &Config) -> Vec<&str> {
    let names: Vec<_> = config.worker.routes.iter().map(|route| route.name.as_str()).collect();
    if names.is_empty() { vec![LOG] } else { names }
}

/// The routes in code, then those of the configuration; without any, every event is logged.
pub fn router(config: &Config, code: Vec<Route>) -> anyhow::Result<Router> {
    let (mut routes, configured) = (code, &config.worker.routes);
    if routes.is_empty() && configured.is_empty() {
        let every = Pattern::parse("*").context("\"*\" is a pattern")?;
        let log = Route::new(LOG, vec![every], Arc::new(Observe));
        return Ok(Router::new(vec![log]));
    }
    let mut clients = ServiceClients::default();
    for route in configured {
        // Every field by name, so that a key that is added does not stay without effect.
        let RouteConfig {
            name,
            events,
            apps,
            channel_types,
            handler,
            retry,
            handler_timeout,
            concurrency,
            rate,
            breaker,
            fan_out,
        } = route.clone();
        routes.push(Route {
            apps,
            channel_types,
            ladder: Some(Ladder::new(retry)),
            handler_timeout: Some(handler_timeout),
            concurrency: Some(concurrency),
            rate,
            breaker,
            fan_out,
            ..Route::new(name, events, clients.event_handler(&handler)?)
        });
    }
    Ok(Router::new(routes))
}

/// The hooks of the configuration together with those in code: each has one handler.
pub fn hooks(config: &Config, code: Hooks) -> anyhow::Result<Hooks> {
    let (moderation, commands) = (&config.hooks.before_message_send, &config.hooks.custom_commands);
    let mut clients = ServiceClients::default();
    let mut made = |handler: &HandlerConfig| clients.hook_handler(handler);
    let mut hooks = code;
    let configured = moderation.handler.as_ref().map(&mut made).transpose()?;
    let asked = one(hooks.before_message_send, configured, "before_message_send.forward")?;
    if asked.is_some() && moderation.rules.masks() {
        bail!(
            "hooks.before_message_send.rules that mask cannot be combined with a handler in code, which can mask by itself"
        );
    }
    hooks.before_message_send = match moderation.rules.is_empty() && asked.is_none() {
        true => None,
        false => Some(Arc::new(Screen {
            rules: Arc::new(moderation.rules.clone()),
            on_unreadable: moderation.on_unreadable,
            failure_text: moderation.policy.failure_text.as_str().into(),
            then: asked,
        })),
    };
    let configured = commands.handler.as_ref().map(&mut made).transpose()?;
    hooks.any_command = one(hooks.any_command, configured, "custom_commands.forward")?;
    for (name, command) in &commands.commands {
        let key = format!("custom_commands.commands.{name}");
        let handler = one(hooks.commands.remove(name), Some(made(command)?), &key)?;
        hooks.commands.extend(handler.map(|handler| (name.clone(), handler)));
    }
    Ok(hooks)
}

fn one<T>(code: Option<T>, configured: Option<T>, key: &str) -> anyhow::Result<Option<T>> {
    if code.is_some() && configured.is_some() {
        bail!("hooks.{key} is configured, and the code has a handler for it too: remove one of them");
    }
    Ok(code.or(configured))
}

/// Commands that the URL may name if the signed message names none.
pub fn command_names(config: &Config) -> HashSet<String> {
    let commands = &config.hooks.custom_commands;
    commands.commands.keys().chain(&commands.by_url).cloned().collect()
}

pub fn call_policy(config: &Config) -> CallPolicy {
    CallPolicy { concurrency: config.hooks.concurrency, drain_timeout: drain_timeout(config) }
}

pub fn drain_timeout(config: &Config) -> Duration {
    config.worker.drain_timeout.unwrap_or(config.gateway.drain_timeout)
}

fn ladder(config: &Config) -> Ladder {
    Ladder::new(config.worker.retry.clone())
}

/// The limits of each route.
pub fn limits(config: &Config, router: &Router) -> Vec<Limits> {
    let worker = &config.worker;
    router.routes().iter().map(|route| route.limits(worker.concurrency, worker.handler_timeout)).collect()
}

/// Most deliveries in hand. At most half of them are with handlers, so that routes whose handlers all hang leave room
/// for the others.
pub fn in_hand(config: &Config, limits: &[Limits]) -> usize {
    config.worker.prefetch.max(2 * handlers(limits))
}

/// Most handlers at a time, over all routes.
pub fn handlers(limits: &[Limits]) -> usize {
    limits.iter().map(|limits| limits.concurrency).sum()
}

/// `prefetch`: how many deliveries the store hands out before the first is settled. `longest_wait`: after it the store
/// takes a delivery back.
pub fn policy(config: &Config, prefetch: usize, longest_wait: Option<Duration>) -> Policy {
    Policy {
        concurrency: config.worker.concurrency,
        handler_timeout: config.worker.handler_timeout,
        prefetch,
        longest_wait,
        memory_budget: config.worker.memory_budget,
        claim_window: config.worker.claim_window,
        drain_timeout: drain_timeout(config),
        ladder: ladder(config),
        unmatched: config.worker.unmatched,
        lines: config.log.deliveries,
    }
}

/// Most files that event handlers keep open: one connection each, or the files of a command.
pub fn files_of_handlers(config: &Config) -> usize {
    let of = |route: &RouteConfig| match route.handler {
        HandlerConfig::Exec(_) => route.concurrency * FILES_OF_A_COMMAND,
        HandlerConfig::Forward(_) => route.concurrency,
        HandlerConfig::Reply(_) => 0,
    };
    config.worker.routes.iter().map(of).sum::<usize>().max(config.worker.concurrency)
}

/// Random, so that holders of claims differ between workers.
pub fn holder_seed() -> anyhow::Result<u64> {
    getrandom::u64().context("cannot get random bytes from the system")
}
