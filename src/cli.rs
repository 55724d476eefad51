//! The command line: every command, with its help.

use crate::global::Global;
use crate::{check, connect, dead, drain, route, send, status};
use clap::{Parser, Subcommand};

const AFTER_HELP: &str = "\
Examples:
  streamgate                                   run it, with a development app
  streamgate gateway --config streamgate.toml  one of several gateways, on RabbitMQ and Redis
  streamgate worker --config streamgate.toml   one of several workers
  streamgate check --config streamgate.toml    what is wrong with this configuration?
  streamgate send --count 1000 --rate 100      send test webhooks to it
  streamgate connect --url https://hooks.example.com
                                               point the Stream app at this gateway
  streamgate drain --data-dir /var/lib/old-gateway
                                               hand over the spool of a gateway that no longer runs
  streamgate status                            what runs, what waits, what needs me?
  streamgate dead list                         what could not be handled?
  streamgate route pause app --why deploying   park the events of a route until it is resumed

Configuration:
  A TOML file, named by --config or STREAMGATE_CONFIG, else streamgate.toml in the working directory if there is one.
  Single values can be set by the environment: STREAMGATE__GATEWAY__LISTEN=0.0.0.0:8080.
  STREAM_API_KEY and STREAM_API_SECRET define one app if the file has none.

Exit codes:
  0   done
  1   failed
  64  bad usage or configuration";

/// A webhook gateway for Stream Chat: verify, make durable, answer, hand to workers.
#[derive(Debug, Parser)]
#[command(name = "streamgate", version, after_help = AFTER_HELP, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Option<Command>,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run gateway and worker in one process on the embedded store (the default command)
    ///
    /// Needs no server and no config file. Without an app in the configuration it makes a development app, whose key is
    /// `dev` and whose random secret is kept in the data directory. SIGTERM or SIGINT drains, a second one aborts;
    /// SIGHUP reloads apps, certificates, routes and hooks, as does a change of their files.
    Up,
    /// Run a gateway on RabbitMQ and Redis
    ///
    /// Verifies webhooks, deduplicates them, publishes them, and answers 200 when RabbitMQ has confirmed. Needs an app
    /// in the configuration, and RabbitMQ and Redis there or on this machine. While RabbitMQ takes no events, they go
    /// to the spool in the data directory, and from there to RabbitMQ later. Any number of gateways can run side by
    /// side, each with a data directory of its own that outlives it. Signals as for `up`.
    Gateway,
    /// Run a worker on RabbitMQ and Redis
    ///
    /// Takes events from RabbitMQ, makes sure that only one handler at a time has each, and settles it: done, retried
    /// later, or a dead letter. Needs RabbitMQ and Redis, in the configuration or on this machine; without routes it
    /// logs events. The apps' secrets are not needed. Any number of workers can run side by side. SIGTERM or SIGINT
    /// drains, a second one aborts.
    Worker,
    /// Check the configuration, then everything it names
    ///
    /// Reports every mistake in the configuration at once, each with its key, and exits with 64. Then checks the store
    /// (or RabbitMQ and Redis, where the configuration names them), the certificates and the routes, without changing
    /// anything, and exits with 1 if one of them is not in order.
    Check(check::Check),
    /// Point a Stream app's settings at this gateway
    ///
    /// Reads the app's settings through Stream's REST API, shows what would change, asks on a terminal, writes only
    /// that, and reads every hook back. Other receivers' hooks are written back as they were read: Stream replaces the
    /// list as a whole. The URLs of before-message-send and custom commands are set where the configuration answers
    /// hooks, and Stream's timeout for before-message-send follows the configured deadline. A change that could do harm
    /// is refused, with the option that overrides it. Exits with 1 if Stream or this command refused, or if Stream
    /// shows something other than what was written.
    #[command(after_help = "\
Lines of the plan:
  + added   ~ changed   - taken out   = kept   ! worth a look

Examples:
  streamgate connect --url https://hooks.example.com --dry-run
  streamgate connect --url https://hooks.example.com --event-types 'message.*,reaction.new'
  streamgate connect --url https://abc-def.trycloudflare.com --hooks     a laptop behind a tunnel, with its synchronous hooks
  streamgate connect --url https://hooks.example.com --remove            remove what leads there")]
    Connect(connect::Connect),
    /// Sign and send test webhooks
    ///
    /// Sends to the configuration's own gateway, and signs with the first secret of its first app, or of the app that
    /// --api-key names; without an app, with the secret of the development app that `up` made in the data directory.
    /// Asks on a terminal for a secret that is not available here. Has a body in the right shape for every event type
    /// that Stream documents. Prints statuses, outcomes and latencies, and exits with 1 unless every webhook was
    /// answered 2xx.
    #[command(after_help = "\
Examples:
  streamgate send                                        one message.new, to the configuration's own gateway
  streamgate send --text 'buy now' --user ann --channel messaging:general
  streamgate send --type reaction.new --gzip             compressed, as Stream may send it
  streamgate send --set 'message.attachments[0]={\"type\":\"image\"}'
  streamgate send --id one --attempt 2                   a repeat of the webhook with this id
  streamgate send --kind before-message-send             a message to be moderated; prints the answer
  streamgate send --kind custom-command --type ticket --args 'open now' --form choice=yes
                                                         /ticket, and a click on its button; prints the answer
  streamgate send --file body.json --url https://host    these very bytes, to another gateway
  streamgate send --count 10000 --rate 500 --json        a load, with its figures for a script")]
    Send(send::Send),
    /// Hand the events of a stranded spool over to RabbitMQ, then exit
    ///
    /// For the data directory of a gateway that will not start on it again, or of an `up` that moves to RabbitMQ: its
    /// waiting events are published, oldest first, each removed when RabbitMQ has confirmed it. Dead letters of an `up`
    /// stay. A directory that a process uses is an error: a running gateway empties its spool itself. Exits with 1, and
    /// the rest still in the spool, when RabbitMQ takes nothing for 30 seconds; an interrupted run can be repeated.
    Drain(drain::Drain),
    /// List, replay or drop dead letters
    ///
    /// Works alongside a running `up`, which notices within a second, and without one. If the configuration names
    /// RabbitMQ, works on the queues there, alongside any number of workers: dead letters are held while they are read,
    /// and then given back in order.
    #[command(after_help = "\
Examples:
  streamgate dead list --reason retries_exhausted
  streamgate dead show 17 --body
  streamgate dead replay --route app --type message.new
  streamgate dead drop --user ann --older-than 7d")]
    Dead(dead::Dead),
    /// Show everything that runs and waits
    ///
    /// Shows what needs a person first, with the command that helps: processes that are not ready, servers that do not
    /// answer, paused or failing routes, dead letters. Then the processes, queues, routes and causes of dead letters.
    /// Works from any machine with the configuration; of `up` on its own machine. What does not answer is shown as
    /// such, next to all the rest. Exits with 1 if something needs a person.
    #[command(after_help = "\
Examples:
  streamgate status
  streamgate status --watch
  streamgate status --json")]
    Status(status::Status),
    /// List the routes, pause or resume one
    ///
    /// A paused route's events are parked, count no attempt, and are handled once it is resumed. The pause holds for
    /// all workers, across their restarts, and is kept in Redis, or in the data directory of `up`, with its author,
    /// time and reason. That a route's service is down, which workers find out by themselves, is in their metrics.
    #[command(after_help = "\
Examples:
  streamgate route list
  streamgate route pause app --why 'database migration'
  streamgate route resume app")]
    Route(route::Route),
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
