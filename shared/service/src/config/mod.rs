//! The configuration: one typed struct per concern, checked as a whole before anything binds.
//!
//! Each field's doc says meaning, unit and default. `load` finds the file, applies the environment over it and reports
//! every mistake at once.

mod apps;
mod backends;
mod environment;
mod exec;
mod forward;
mod handler;
mod hooks;
mod lines;
mod load;
mod log;
pub mod reader;
mod route;
mod tls;
mod worker;

pub use apps::{AppConfig, KeyConfig};
pub use backends::{RabbitMqConfig, RedisConfig};
pub use environment::Environment;
pub use exec::ExecConfig;
pub use forward::ForwardConfig;
pub use handler::{COMMAND_PLACE, HandlerConfig, ReplyConfig, ReplyType};
pub use hooks::{CommandsConfig, HookPolicy, HooksConfig, ModerationConfig, STREAM_LONGEST, STREAM_MODERATION};
pub use load::{BackendCheck, ConfigError, Loaded, Source, from_text, load, log_doubts};
pub use log::{Lines, LogConfig};
pub use route::RouteConfig;
pub use tls::{AcmeConfig, CertificateFiles, TlsConfig};
pub use worker::{Unmatched, WorkerConfig};

use reader::{Report, Section};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use streamgate_core::id::DedupBy;
use streamgate_core::peer::{Networks, Peers};

/// Stream hangs up on a push after 6 s: a later answer is lost.
const STREAM_PUSH_TIMEOUT: Duration = Duration::from_secs(6);
const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
const GIB: usize = 1 << 30;

/// Everything that can be configured.
#[derive(Clone, Debug)]
pub struct Config {
    pub apps: Vec<AppConfig>,
    pub gateway: GatewayConfig,
    pub store: StoreConfig,
    pub rabbitmq: RabbitMqConfig,
    pub redis: RedisConfig,
    pub dedup: DedupConfig,
    pub worker: WorkerConfig,
    pub hooks: HooksConfig,
    pub log: LogConfig,
}

/// `[gateway]`
#[derive(Clone, Debug)]
pub struct GatewayConfig {
    /// Where webhooks arrive. Default 127.0.0.1:8080; with a certificate from an ACME authority 0.0.0.0:443.
    pub listen: SocketAddr,
    /// Where /metrics, /healthz and /readyz answer; never the public port. Default 127.0.0.1:9464.
    pub ops_listen: SocketAddr,
    /// Most bytes of a body, on the wire and after gunzip. Default 4 MiB.
    pub max_body: usize,
    /// Most bytes of all admitted bodies; beyond it 503, so it should be far over `max_body`. Default 256 MiB.
    pub memory_budget: usize,
    /// Most requests at a time; beyond it 503. Default 4096.
    pub max_in_flight: usize,
    /// Most connections; at the limit the longest idle one is closed for the new one. Default 10000.
    pub max_connections: usize,
    /// From a request's first byte to the end of its headers; also the TLS handshake. Default 5 s.
    pub header_timeout: Duration,
    /// From the end of the headers to the end of the body; `answer_deadline` applies if it is shorter. Default 3 s.
    pub body_timeout: Duration,
    /// How long a connection may be idle between requests. Default 75 s.
    pub keep_alive: Duration,
    /// From headers read to answer written, whatever happens. Default 4.5 s.
    pub answer_deadline: Duration,
    /// How long requests in hand may take to finish after SIGTERM. Default 10 s.
    pub drain_timeout: Duration,
    /// New connections are served for at least this long after SIGTERM, for load balancers that notice late. Default 1
    /// s for `gateway`, 0 for `up`.
    pub drain_least: Option<Duration>,
    /// `allow_from`: addresses or networks that may send; others get 403 before the body is read. Absent: everybody.
    /// `trusted_proxies`: addresses whose X-Forwarded-For names the client, and with `proxy_protocol` whose PROXY
    /// headers count. Absent: no X-Forwarded-For counts.
    /// `proxy_protocol`: a PROXY header, version 1 or 2, precedes each connection. Default false.
    pub peers: Peers,
    /// Absent: plain HTTP, behind a proxy or load balancer.
    pub tls: Option<TlsConfig>,
}

/// `store.kind`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreKind {
    /// One SQLite file, for `up`.
    Embedded,
    /// RabbitMQ and Redis, for `gateway` and `worker`.
    RabbitMq,
}

/// `[store]`
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// Default: the store of the command. A command that works on both uses RabbitMQ if there is a `[rabbitmq]` or
    /// `[redis]`.
    pub kind: StoreKind,
    /// Whether the configuration sets it explicitly.
    pub kind_is_given: bool,
    /// The directory of the embedded store or the spool; mode 0700. Default `streamgate-data`.
    pub data_dir: PathBuf,
    /// Most bytes that waiting events may take on disk; beyond it 503. Default 1 GiB.
    pub spool_max: usize,
}

/// `[dedup]`
#[derive(Clone, Debug)]
pub struct DedupConfig {
    /// How long a repeat of an accepted event is recognised. Default 10 min; Stream's own retries end after 15 s.
    pub window: Duration,
    /// What makes two pushes the same event. Default: their signed bodies, under any id.
    pub by: DedupBy,
    /// Pushes whose signed `created_at` is older are refused for good. Default `off`: Stream's own clock and queues
    /// decide how old an event is when it is sent.
    pub max_age: Option<Duration>,
}

/// Checks the ports of `host:port` or of a list of them; a port may be absent. Libraries ignore a port over 65535, or
/// wrap it around. Nothing is quoted: if a password contains a slash, a part of it may stand in this place.
fn url_port(hosts: &str) -> Result<(), String> {
    let is_wrong = |host: &str| {
        let port = host.rsplit_once(':').map(|(_, port)| port).filter(|port| !port.ends_with(']'));
        port.is_some_and(|port| !port.parse::<u16>().is_ok_and(|port| port > 0))
    };
    if hosts.split(',').any(is_wrong) {
        let what = "has an invalid port: expected 1 to 65535; in a password write / ? # @ as %2F %3F %23 %40";
        return Err(what.to_owned());
    }
    Ok(())
}

impl Config {
    fn read(table: toml::Table, environment: &Environment, report: &Report) -> Config {
        let mut root = Section::root(table, report);
        let apps = apps::read(root.sections("apps"), environment, report);
        let names_backends = root.has("rabbitmq") || root.has("redis");
        let has_apps = root.was_given("apps");
        let config = Config {
            gateway: GatewayConfig::read(root.section_or_empty("gateway")),
            store: StoreConfig::read(root.section_or_empty("store"), names_backends),
            rabbitmq: RabbitMqConfig::read(root.section_or_empty("rabbitmq"), environment),
            redis: RedisConfig::read(root.section_or_empty("redis"), environment),
            dedup: DedupConfig::read(root.section_or_empty("dedup")),
            worker: WorkerConfig::read(root.section_or_empty("worker"), environment),
            hooks: HooksConfig::read(root.section_or_empty("hooks"), environment),
            log: LogConfig::read(root.section_or_empty("log")),
            apps,
        };
        root.finish();
        let named = |key: &str| config.apps.iter().flat_map(|app| &app.keys).any(|known| known.api_key == key);
        let given = environment.get("STREAM_API_KEY").or(environment.get("STREAM_KEY"));
        if has_apps && given.is_some_and(|key| !key.is_empty() && !named(key)) {
            report.doubt("apps", "are named here, so the environment's STREAM_API_KEY is not used");
        }
        config.cross_check(report);
        config
    }

    /// Every handler, with the path of its table.
    pub fn handlers(&self) -> impl Iterator<Item = (String, &HandlerConfig)> {
        let routes = self.worker.routes.iter().enumerate();
        let routes = routes.map(|(place, route)| (format!("worker.routes[{}]", place + 1), &route.handler));
        routes.chain(self.hooks.handlers().map(|(path, handler, _)| (path, handler)))
    }

    /// Checks that involve several keys.
    fn cross_check(&self, report: &Report) {
        let gateway = &self.gateway;

        if gateway.answer_deadline >= STREAM_PUSH_TIMEOUT {
            report.problem("gateway.answer_deadline", "must be under 6s: Stream hangs up then");
        }
        if gateway.drain_least.is_some_and(|least| least > gateway.drain_timeout) {
            report.problem("gateway.drain_least", "must not be over gateway.drain_timeout: the drain is over then");
        }
        let left = gateway.drain_timeout.saturating_sub(gateway.drain_least.unwrap_or_default());
        if gateway.drain_least.is_some() && left < gateway.answer_deadline {
            report.doubt(
                "gateway.drain_least",
                "leaves less than gateway.answer_deadline of gateway.drain_timeout: the last requests may be cut off",
            );
        }
        if gateway.listen == gateway.ops_listen && gateway.listen.port() != 0 {
            report.problem(
                "gateway.ops_listen",
                "must differ from gateway.listen: metrics are never served on the public port",
            );
        }
        let least = gateway.max_body.saturating_mul(4).saturating_add(MIB);
        if gateway.memory_budget < least {
            let what = format!(
                "is less than 4 * gateway.max_body + 1MiB ({} MiB): a few large bodies, or a stranger's, can take what signed ones need",
                least.div_ceil(MIB)
            );
            report.doubt("gateway.memory_budget", what);
        }
        for (name, policy) in [
            ("before_message_send", &self.hooks.before_message_send.policy),
            ("custom_commands", &self.hooks.custom_commands.policy),
        ] {
            if policy.deadline > gateway.answer_deadline {
                report.doubt(
                    format!("hooks.{name}.deadline"),
                    "is over gateway.answer_deadline, which cuts it short: lower the one or raise the other",
                );
            }
        }
        if self.store.kind == StoreKind::RabbitMq {
            self.doubt_backend_times(report);
        }
        apps::cross_check(&self.apps, report);
        worker::cross_check(&self.worker, &self.apps, report);
        hooks::cross_check(&self.hooks, report);
    }

    /// An answer is due by `answer_deadline`, whatever a backend is still doing.
    fn doubt_backend_times(&self, report: &Report) {
        let (rabbitmq, deadline) = (&self.rabbitmq, self.gateway.answer_deadline);
        if rabbitmq.spool_after >= deadline {
            let what = "leaves no time before gateway.answer_deadline: events would be answered 503 instead of spooled; lower it";
            report.doubt("rabbitmq.spool_after", what);
        }
        // Redis is asked first, then RabbitMQ's confirm is awaited; the spool comes last.
        if self.redis.timeout.saturating_add(rabbitmq.confirm_timeout) >= deadline {
            let what = "is not over redis.timeout and rabbitmq.confirm_timeout together, so nothing is left for the spool: raise it, or lower them";
            report.doubt("gateway.answer_deadline", what);
        }
    }
}

impl GatewayConfig {
    fn read(mut section: Section<'_>) -> GatewayConfig {
        let tls = section.section("tls").and_then(TlsConfig::read);
        // The authority connects to port 443, whatever else is configured.
        let listen = match &tls {
            Some(TlsConfig::Acme(_)) => ([0, 0, 0, 0], 443),
            Some(TlsConfig::Files(_)) | None => ([127, 0, 0, 1], 8080),
        };
        let config = GatewayConfig {
            listen: address(&mut section, "listen", listen),
            ops_listen: address(&mut section, "ops_listen", ([127, 0, 0, 1], 9464)),
            max_body: section.size("max_body", 4 * MIB),
            memory_budget: section.size("memory_budget", 256 * MIB),
            max_in_flight: section.count("max_in_flight", 4096, 1_000_000),
            max_connections: section.count("max_connections", 10_000, 1_000_000),
            header_timeout: section.duration("header_timeout", Duration::from_secs(5)),
            body_timeout: section.duration("body_timeout", Duration::from_secs(3)),
            keep_alive: section.duration("keep_alive", Duration::from_secs(75)),
            answer_deadline: section.duration("answer_deadline", Duration::from_millis(4500)),
            drain_timeout: section.duration("drain_timeout", Duration::from_secs(10)),
            drain_least: section.parsed("drain_least", reader::duration_or_zero),
            peers: Peers {
                allow_from: networks(&mut section, "allow_from"),
                trusted_proxies: networks(&mut section, "trusted_proxies"),
                proxy_protocol: section.flag("proxy_protocol", false),
            },
            tls,
        };
        section.finish();
        config
    }
}

impl StoreConfig {
    fn read(mut section: Section<'_>, names_backends: bool) -> StoreConfig {
        let kind = section.parsed("kind", |kind| match kind {
            "embedded" => Ok(StoreKind::Embedded),
            "rabbitmq" => Ok(StoreKind::RabbitMq),
            other => Err(format!("{other:?} is neither \"embedded\" nor \"rabbitmq\"")),
        });
        let data_dir = section.text("data_dir").map_or_else(|| PathBuf::from("streamgate-data"), PathBuf::from);
        let spool_max = section.size("spool_max", GIB);
        if spool_max < MIB {
            section.problem("spool_max", "must be at least 1MiB");
        }
        section.finish();
        let found = if names_backends { StoreKind::RabbitMq } else { StoreKind::Embedded };
        StoreConfig { kind: kind.unwrap_or(found), kind_is_given: kind.is_some(), data_dir, spool_max }
    }
}

impl DedupConfig {
    fn read(mut section: Section<'_>) -> DedupConfig {
        let window = section.duration("window", Duration::from_secs(600));
        if window < Duration::from_secs(15) {
            section.problem("window", "must be at least 15s: until then Stream retries");
        }
        let by = section.parsed("by", |by| match by {
            "body" => Ok(DedupBy::Body),
            "id" => Ok(DedupBy::Id),
            other => Err(format!("{other:?} is neither \"body\" nor \"id\"")),
        });
        let max_age = section.duration_or_off("max_age");
        if max_age.is_some_and(|age| age < Duration::from_secs(15)) {
            section.problem("max_age", "must be at least 15s: until then Stream retries");
        }
        section.finish();
        DedupConfig { window, by: by.unwrap_or_default(), max_age }
    }
}

fn address(section: &mut Section<'_>, key: &'static str, default: ([u8; 4], u16)) -> SocketAddr {
    let parse = |text: &str| {
        text.parse()
            .map_err(|_| format!("invalid listen address {text:?}: expected one like 127.0.0.1:8080 or [::]:8080"))
    };
    section.parsed(key, parse).unwrap_or_else(|| default.into())
}

/// Reads a list of addresses and networks. An empty one is a mistake: nobody could send.
fn networks(section: &mut Section<'_>, key: &'static str) -> Option<Networks> {
    let texts = section.texts(key)?;
    if texts.is_empty() {
        section.problem(key, "takes a list of at least one address or network; leave the key out for the default");
    }
    Networks::parse(&texts).map_err(|error| section.problem(key, error.to_string())).ok()
}

/// The characters of a name, for error messages.
const NAME: &str = "takes 1 to 64 characters of a-z, 0-9, _ and -, but not \"none\"";

/// `[a-z0-9_-]{1,64}`: safe in labels, routing keys and idempotency keys. `none` is the label for no app or no route.
fn is_name(text: &str) -> bool {
    (1..=64).contains(&text.len())
        && text != "none"
        && text.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-'))
}
