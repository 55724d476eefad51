//! Loads the configuration: finds the file, applies the environment over it, and resolves secrets by reference.

use super::{
    Config, Environment, StoreKind, lines,
    reader::{Problem, Report},
};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// Read if it exists and neither `--config` nor `STREAMGATE_CONFIG` names a file.
const DEFAULT_FILE: &str = "streamgate.toml";
const PREFIX: &str = "STREAMGATE__";
/// The sections whose keys the environment may set.
const SECTIONS: [&str; 8] = ["gateway", "store", "rabbitmq", "redis", "dedup", "worker", "hooks", "log"];

/// Where a configuration comes from: enough to read it again.
#[derive(Clone, Debug)]
pub struct Source {
    /// `--config`.
    pub file: Option<PathBuf>,
    pub environment: Environment,
}

impl Source {
    /// The file to read, if there is one.
    pub fn path(&self) -> Option<PathBuf> {
        let named = self.file.clone().or_else(|| self.environment.get("STREAMGATE_CONFIG").map(PathBuf::from));
        named.or_else(|| Some(PathBuf::from(DEFAULT_FILE)).filter(|path| path.exists()))
    }
}

/// A configuration and its origin.
#[derive(Clone, Debug)]
pub struct Loaded {
    pub config: Config,
    /// `None` for defaults and environment alone.
    pub path: Option<PathBuf>,
    /// Settings that work and are probably not what was meant.
    pub doubts: Vec<Problem>,
}

impl Loaded {
    /// Logs the settings that work and are probably not what was meant.
    pub fn log_doubts(&self) {
        log_doubts(&self.doubts);
    }

    /// Checks the configuration for `gateway` and `worker`, which use only RabbitMQ.
    pub fn for_services(mut self) -> Result<Loaded, ConfigError> {
        let what = "\"embedded\" is the store of `up`; `gateway` and `worker` work on \"rabbitmq\"";
        self.wants(StoreKind::RabbitMq, what)?;
        self.config.store.kind = StoreKind::RabbitMq;
        Ok(self)
    }

    /// Checks the configuration for `up`, which uses only the embedded store.
    pub fn for_one_process(mut self) -> Result<Loaded, ConfigError> {
        let what = "\"rabbitmq\" is the store of `gateway` and `worker`; `up` works on \"embedded\"";
        self.wants(StoreKind::Embedded, what)?;
        if self.config.store.kind == StoreKind::RabbitMq {
            tracing::warn!(
                "[rabbitmq] and [redis] are for `gateway` and `worker`: `up` works on its own embedded store, and connects to neither"
            );
        }
        self.config.store.kind = StoreKind::Embedded;
        Ok(self)
    }

    fn wants(&self, kind: StoreKind, what: &str) -> Result<(), ConfigError> {
        let store = &self.config.store;
        let other = store.kind_is_given && store.kind != kind;
        self.fail_if_any(other.then(|| Problem::new("store.kind", what)).into_iter().collect())
    }

    /// The error for these mistakes, together with the doubts.
    pub fn error_of(&self, problems: Vec<Problem>) -> ConfigError {
        ConfigError::Invalid { path: self.path.clone(), problems, doubts: self.doubts.clone() }
    }

    /// An error if there are any mistakes.
    pub fn fail_if_any(&self, problems: Vec<Problem>) -> Result<(), ConfigError> {
        if problems.is_empty() { Ok(()) } else { Err(self.error_of(problems)) }
    }
}

/// Logs the settings that work and are probably not what was meant.
pub fn log_doubts(doubts: &[Problem]) {
    for Problem { key, what, line } in doubts {
        tracing::warn!(key, line, "{what}");
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the config file {}: {error}", path.display())]
    Unreadable { path: PathBuf, error: String },
    #[error("the config file {} is not valid TOML: {error}", path.display())]
    Malformed { path: PathBuf, error: String },
    #[error("{} in the configuration{}:\n{}", count(problems), place(path.as_deref()), list(problems))]
    Invalid {
        path: Option<PathBuf>,
        problems: Vec<Problem>,
        /// Settings that work and are probably not what was meant.
        doubts: Vec<Problem>,
    },
}

fn count(problems: &[Problem]) -> String {
    if problems.len() == 1 { "1 mistake".to_owned() } else { format!("{} mistakes", problems.len()) }
}

fn place(path: Option<&Path>) -> String {
    path.map(|path| format!(" ({})", path.display())).unwrap_or_default()
}

fn list(problems: &[Problem]) -> String {
    problems.iter().map(|problem| format!("  {problem}")).collect::<Vec<_>>().join("\n")
}

/// What the backend that a configuration names cannot do: its adapter knows.
pub type BackendCheck = fn(&Config) -> Vec<Problem>;

/// Reads and checks the configuration; reports all mistakes together.
pub fn load(source: &Source, backend: BackendCheck) -> Result<Loaded, ConfigError> {
    let path = source.path();
    let text = path.as_ref().map(|path| {
        let unreadable = |error: io::Error| ConfigError::Unreadable { path: path.clone(), error: error.to_string() };
        std::fs::read_to_string(path).map_err(unreadable)
    });
    read(path, text.transpose()?.as_deref(), &source.environment, backend)
}

/// Reads and checks the text of a configuration; reports all mistakes together. `path`: where the text came from, for
/// errors.
pub fn from_text(path: Option<PathBuf>, text: Option<&str>, environment: &Environment) -> Result<Loaded, ConfigError> {
    read(path, text, environment, |_| Vec::new())
}

fn read(
    path: Option<PathBuf>,
    text: Option<&str>,
    environment: &Environment,
    backend: BackendCheck,
) -> Result<Loaded, ConfigError> {
    let text = text.unwrap_or_default();
    let mut table = parse(path.as_deref(), text)?;
    let Overlaid { from_env, misplaced } = overlay_all(&mut table, environment);
    let set: BTreeSet<String> = from_env.keys().cloned().collect();
    let is_from_environment = |key: &str| set.contains(key);
    let report = Report::new(from_env);
    for (name, value) in &environment.variables {
        if let Some(meant) = single_underscore(name, value, environment) {
            report.doubt(format!("the environment variable {name}"), format!("sets nothing; did you mean {meant}?"));
        }
    }
    let mut config = Config::read(table, environment, &report);
    if !is_from_environment("store.data_dir") {
        place_data_dir(&mut config.store.data_dir, path.as_deref(), &report);
    }
    for Problem { key, what, .. } in backend(&config) {
        report.problem(key, what);
    }
    let mut doubts = report.take_doubts();
    let mut problems = report.into_problems();
    problems.extend(misplaced);
    for problem in problems.iter_mut().chain(&mut doubts) {
        problem.line = lines::line(text, &problem.key).filter(|_| !is_from_environment(&problem.key));
    }
    // A key with a mistake needs no doubt as well.
    doubts.retain(|doubt| problems.iter().all(|problem| problem.key != doubt.key));
    let loaded = Loaded { config, path, doubts };
    loaded.fail_if_any(problems)?;
    Ok(loaded)
}

fn parse(path: Option<&Path>, text: &str) -> Result<Table, ConfigError> {
    toml::from_str::<Table>(text).map_err(|error| ConfigError::Malformed {
        path: path.map(Path::to_owned).unwrap_or_default(),
        // The message and the line number, never the line's text: it may hold a secret.
        error: match error.span() {
            Some(span) => format!("line {}: {}", lines::line_of(text, span.start), error.message()),
            None => error.message().to_owned(),
        },
    })
}

/// What the environment set.
struct Overlaid {
    /// Keys, and the variables that set them.
    from_env: BTreeMap<String, String>,
    misplaced: Vec<Problem>,
}

fn overlay_all(table: &mut Table, environment: &Environment) -> Overlaid {
    let (mut from_env, mut misplaced) = (BTreeMap::new(), Vec::new());
    for (name, value) in &environment.variables {
        let Some(rest) = name.strip_prefix(PREFIX) else { continue };
        let key = rest.to_lowercase().replace("__", ".");
        match overlay(table, &key, value) {
            Ok(()) => {
                from_env.insert(key, name.clone());
            }
            Err(what) => misplaced.push(Problem::new(key, format!("{what} (set by the environment variable {name})"))),
        }
    }
    Overlaid { from_env, misplaced }
}

/// A relative data directory in a file is relative to the file's directory. A path that is not a regular file, like /dev/null, has
/// no directory for a store.
fn place_data_dir(data_dir: &mut PathBuf, file: Option<&Path>, report: &Report) {
    let Some(directory) = file.filter(|path| path.is_file()).and_then(Path::parent) else { return };
    let placed = directory.join(&*data_dir);
    if placed != *data_dir && !placed.exists() && data_dir.is_dir() {
        let what = format!(
            "is relative to the configuration's file, so {} is not read; there is a directory of that name here",
            placed.display()
        );
        report.doubt("store.data_dir", what);
    }
    *data_dir = placed;
}

/// The variable that was probably meant instead of one that looks like a key of ours: two underscores separate section
/// and key. Only if that key exists: Kubernetes sets variables for a service that is named like a section.
fn single_underscore(name: &str, value: &str, environment: &Environment) -> Option<String> {
    let rest = name.strip_prefix("STREAMGATE_").filter(|rest| rest.is_ascii())?.to_ascii_lowercase();
    let (section, key) =
        SECTIONS.iter().find_map(|section| Some((*section, rest.strip_prefix(section)?.strip_prefix('_')?)))?;
    let mut table = Table::new();
    overlay(&mut table, &format!("{section}.{key}"), value).ok()?;
    let report = Report::default();
    Config::read(table, &environment.clone().without_secrets(), &report);
    let path = format!("{section}.{key}");
    let is_unknown =
        report.into_problems().iter().any(|problem| problem.key == path && problem.what.starts_with("unknown key"));
    (!is_unknown).then(|| format!("{PREFIX}{}__{}", section.to_uppercase(), key.to_uppercase()))
}

/// Sets one scalar. Its text is parsed later, by the type that its key has.
fn overlay(table: &mut Table, key: &str, value: &str) -> Result<(), String> {
    let (parents, leaf) = key.rsplit_once('.').unwrap_or(("", key));
    let mut at = table;
    for part in parents.split('.').filter(|part| !part.is_empty()) {
        let next = at.entry(part.to_owned()).or_insert_with(|| Value::Table(Table::new()));
        at = next
            .as_table_mut()
            .ok_or_else(|| format!("{part} is not a table, so the environment cannot set a key in it"))?;
    }
    if at.get(leaf).is_some_and(|old| old.is_table() || old.is_array()) {
        return Err("only single values can be set by the environment, not tables and lists".to_owned());
    }
    at.insert(leaf.to_owned(), Value::String(value.to_owned()));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::HandlerConfig;
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    fn load_text<const N: usize>(text: &str, variables: [(&str, &str); N]) -> Result<Loaded, ConfigError> {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("test.toml");
        std::fs::write(&file, text).unwrap();
        load(&Source { file: Some(file), environment: Environment::of(variables) }, |_| Vec::new())
    }

    fn keys<const N: usize>(text: &str, variables: [(&str, &str); N]) -> Vec<String> {
        match load_text(text, variables) {
            Err(ConfigError::Invalid { problems, .. }) => problems.into_iter().map(|problem| problem.key).collect(),
            other => panic!("expected mistakes, got {other:?}"),
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(
            text in "[ -~\\n\u{e9}]{0,200}",
            key in "(gateway|dedup|store|hooks|worker|rabbitmq)\\.[a-z_]{1,16}",
            value in "(true|-?[0-9]{1,25}|\"[ -~]{0,20}\"|\\[\\]|\\{\\}|1e400|1979-05-27)",
        ) {
            let environment = Environment::of([]);
            for text in [text.clone(), format!("{key} = {value}\n"), format!("{text}\n{key} = {value}\n")] {
                if let Err(error) = from_text(None, Some(&text), &environment) {
                    prop_assert!(!error.to_string().is_empty());
                }
            }
        }
    }

    #[test]
    fn an_empty_file_has_the_defaults() {
        let config = load_text("", []).unwrap().config;
        assert!(config.apps.is_empty());
        assert_eq!(config.gateway.max_body, 4 << 20);
        assert_eq!(config.gateway.answer_deadline, Duration::from_millis(4500));
        assert_eq!(config.worker.retry.len(), 6);
        assert_eq!(config.dedup.window, Duration::from_secs(600));
    }

    #[test]
    fn a_route_without_retries_has_a_step_to_wait_for_anothers_lease() {
        let text =
            "[worker]\nretry = ['1h']\n[[worker.routes]]\nevents = ['*']\nexec = { command = ['x'] }\nretry = []\n";
        let steps = load_text(text, []).unwrap().config.worker.retry_steps();
        assert_eq!(steps, [1, 3600].map(Duration::from_secs));
    }

    #[test]
    fn a_store_is_for_its_commands() {
        let kind = |text: &str| load_text(text, []).unwrap().config.store.kind;
        assert_eq!((kind(""), kind("[redis]")), (StoreKind::Embedded, StoreKind::RabbitMq));
        assert!(load_text("[store]\nkind = 'rabbitmq'", []).unwrap().for_one_process().is_err());
        assert!(load_text("[store]\nkind = 'embedded'", []).unwrap().for_services().is_err());
        assert!(load_text("[rabbitmq]", []).unwrap().for_one_process().is_ok());
    }

    #[test]
    fn backends_are_checked_and_their_urls_never_shown() {
        let text = "
            [rabbitmq]
            url = 'http://ann:hunter2@host'
            ca = 'ca.pem'
            cert = 'cert.pem'
            prefix = 'a b'
            events_max = '1KiB'
            confirm_timeout = '5'
            declare = 'maybe'
            [redis]
            url = 'env:NOT_SET'
            timeout = '0s'
        ";
        let mut found = keys(text, []);
        found.sort();
        let rabbitmq = ["cert", "confirm_timeout", "declare", "events_max", "prefix", "url", "url"];
        let expected: Vec<_> = rabbitmq.iter().map(|key| format!("rabbitmq.{key}")).collect();
        assert_eq!(found[..7], expected);
        assert_eq!(found[7..], ["redis.timeout", "redis.url"]);
        assert!(!load_text(text, []).unwrap_err().to_string().contains("hunter2"));
        let good = "[rabbitmq]\nurl = 'env:URL'\n[redis]\nurl = 'redis+sentinel://:hunter2@a,b/main'";
        let config = load_text(good, [("URL", "amqps://ann:hunter2@host:1/v")]).unwrap().config;
        assert_eq!(config.rabbitmq.url.expose(), "amqps://ann:hunter2@host:1/v");
        assert!(!format!("{config:?}").contains("hunter2"));
    }

    #[test]
    fn the_environment_overrides_scalars() {
        let variables = [
            ("STREAMGATE__GATEWAY__LISTEN", "127.0.0.1:1"),
            ("STREAMGATE__WORKER__CONCURRENCY", "7"),
            ("STREAMGATE__STORE__DATA_DIR", "123"),
        ];
        let config = load_text("[gateway]\nlisten = '127.0.0.1:2'", variables).unwrap().config;
        assert_eq!(config.gateway.listen.port(), 1);
        assert_eq!(config.worker.concurrency, 7);
        assert_eq!(config.store.data_dir, PathBuf::from("123"), "a variable is of the process");
        let config = load_text("[store]\ndata_dir = '123'", []).unwrap().config;
        assert!(config.store.data_dir.ends_with("123") && config.store.data_dir.is_absolute(), "beside the file");
        assert_eq!(keys("", [("STREAMGATE__GATEWAY__LISTN", "x")]), ["gateway.listn"]);
        assert_eq!(
            keys(
                "[[apps]]\nname = 'a'\nkeys = [{ api_key = 'k', secrets = ['s'] }]",
                [("STREAMGATE__APPS__NAME", "x")]
            ),
            ["apps.name"]
        );
    }

    #[test]
    fn all_mistakes_come_together() {
        let text = "
            [[apps]]
            name = 'Chat'
            keys = [{ api_key = 'k', secrets = ['env:NOT_SET'] }, { api_key = 'k', secrets = ['s'] }]
            [gateway]
            body_timeout = '5'
            answer_deadline = '7s'
            max_body = 'big'
            colour = 'red'
            tls = { cert = 'c' }
            [worker]
            retry = ['1s', 'soon']
            unmatched = 'drop'
            [[worker.routes]]
            events = []
            apps = ['nobody']
            forward = { url = 'ftp://x', headers = { Host = 'x' } }
            [[worker.routes]]
            name = 'b'
            events = ['*']
            forward = { url = 'http://user:hunter2@host/', timeout = '1m' }
            [typo]
        ";
        let mut found = keys(text, []);
        found.sort();
        let expected = [
            "apps[1].keys[1].secrets",
            "apps[1].keys[2].api_key",
            "apps[1].name",
            "gateway.answer_deadline",
            "gateway.body_timeout",
            "gateway.colour",
            "gateway.max_body",
            "gateway.tls.key",
            "typo",
            "worker.retry",
            "worker.routes[1].events",
            "worker.routes[1].forward.headers.Host",
            "worker.routes[1].forward.url",
            "worker.routes[1].name",
            "worker.routes[2].forward.url",
            "worker.unmatched",
        ];
        assert_eq!(found, expected);
        let error = load_text(text, []).unwrap_err().to_string();
        assert!(error.starts_with("16 mistakes in the configuration (") && !error.contains("hunter2"), "{error}");
    }

    /// Mistakes, each with the line that reports it.
    #[test]
    fn a_table_of_mistakes() {
        let route = |more: &str| format!("[[worker.routes]]\nevents = ['*']\nforward = {{ {more} }}");
        let hook = |more: &str| format!("[hooks.custom_commands.commands.x]\n{more}");
        let table = [
            (
                "[[apps]]\nname = 'a'\n[[apps.keys]]\napi_key = 'env:KEY'\nsecrets = ['0123456789abcdef']".to_owned(),
                "line 4: apps[1].keys[1].api_key: takes the value itself",
            ),
            (
                "[[apps]]\nname = 'a'\n[[apps.keys]]\napi_key = 'k'\nsecrets = [' 0123456789abcdef']".to_owned(),
                "line 5: apps[1].keys[1].secrets: holds a secret with white space",
            ),
            (
                "[[apps]]\nname = 'a'\n[[apps.keys]]\napi_key = 'k'\nsecrets = ['\"0123456789abcdef\"']".to_owned(),
                "line 5: apps[1].keys[1].secrets: holds a secret with quotes",
            ),
            ("[gateway]\nlistn = '127.0.0.1:1'".to_owned(), "line 2: gateway.listn: unknown key, did you mean listen?"),
            ("[gateway]\nlisten = '127.0.0.1:99999'".to_owned(), "line 2: gateway.listen: "),
            ("[gateway]\nbody_timeout = 'env:T'".to_owned(), "line 2: gateway.body_timeout: takes the value itself"),
            ("[rabbitmq]\nurl = 'amqp://h:0/v'".to_owned(), "line 2: rabbitmq.url: has an invalid port"),
            ("[redis]\nurl = 'redis://h:99999'".to_owned(), "line 2: redis.url: has an invalid port"),
            (route("url = 'http://h:0/'"), "line 3: worker.routes[1].forward.url: has an invalid port"),
            (route("url = 'http://h:99999/'"), "line 3: worker.routes[1].forward.url: has an invalid port"),
            (
                route("url = 'http://h/{type}'"),
                "line 3: worker.routes[1].forward.url: has {type}, but nothing is filled in here",
            ),
            (route("url = 'http://h/ü'"), "line 3: worker.routes[1].forward.url: takes ASCII only"),
            (route("url = 'http://ü.de/'"), "line 3: worker.routes[1].forward.url: takes ASCII only"),
            (
                route("url = 'env:NOT_SET'"),
                "line 3: worker.routes[1].forward.url: the environment variable NOT_SET is not set",
            ),
            (
                route("url = 'http://h/' }\nexec = { command = ['./x']"),
                "line 4: worker.routes[1].exec: cannot be combined with forward",
            ),
            (
                "[[worker.routes]]\nevents = ['*']\nexec = { command = [] }".to_owned(),
                "line 3: worker.routes[1].exec.command: takes a program and its arguments",
            ),
            (
                "[[worker.routes]]\nevents = ['*']".to_owned(),
                "line 1: worker.routes[1].forward: is missing: say where to",
            ),
            (
                "[[worker.routes]]\nevents = ['*']\nchannel_types = ['messaging:*']\nexec = { command = ['x'] }"
                    .to_owned(),
                "line 3: worker.routes[1].channel_types: takes the types of channels",
            ),
            (
                "[[worker.routes]]\nevents = ['*']\nretry = ['soon']\nexec = { command = ['x'] }".to_owned(),
                "line 3: worker.routes[1].retry: ",
            ),
            (
                "[[worker.routes]]\nevents = ['*']\nrate = '50'\nexec = { command = ['x'] }".to_owned(),
                "line 3: worker.routes[1].rate: invalid rate \"50\": expected a number and a unit of time, like \"50/s\"",
            ),
            (
                "[[worker.routes]]\nevents = ['*']\nrate = '0/s'\nexec = { command = ['x'] }".to_owned(),
                "line 3: worker.routes[1].rate: invalid rate \"0/s\"",
            ),
            (
                "[[worker.routes]]\nevents = ['*']\nrate = '200000/s'\nexec = { command = ['x'] }".to_owned(),
                "line 3: worker.routes[1].rate: invalid rate \"200000/s\": expected at most 100000/s",
            ),
            (
                "[[worker.routes]]\nevents = ['*']\nbreaker = true\nexec = { command = ['x'] }".to_owned(),
                "line 3: worker.routes[1].breaker: takes a table, or false for none",
            ),
            (
                "[[worker.routes]]\nevents = ['*']\nbreaker = { open = '1m', longest = '5s' }\nexec = { command = ['x'] }"
                    .to_owned(),
                "line 3: worker.routes[1].breaker.longest: is under open",
            ),
            (
                "[[worker.routes]]\nevents = ['*']\nbreaker = { failures = 0 }\nexec = { command = ['x'] }".to_owned(),
                "line 3: worker.routes[1].breaker.failures: ",
            ),
            (
                "[[worker.routes]]\nevents = ['*']\nconcurrency = 0\nexec = { command = ['x'] }".to_owned(),
                "line 3: worker.routes[1].concurrency: ",
            ),
            (
                route("url = 'http://h/', ca = 'ca.pem'"),
                "line 3: worker.routes[1].forward.ca: cannot read the file ca.pem",
            ),
            (
                hook("forward = { url = 'http://h/{name}' }"),
                "line 2: hooks.custom_commands.commands.x.forward.url: has {name}, but only {type} is filled in here",
            ),
            (route("url = 'http://ann:hunter2/x@h/'"), "line 3: worker.routes[1].forward.url: has an invalid port"),
            (route("url = 'http://h/?{sig=hunter2'"), "line 3: worker.routes[1].forward.url: has a brace, but nothing"),
            (
                route("url = 'http://h/', headers = { X-A = 'Bearer env:hunter2' }"),
                "line 3: worker.routes[1].forward.headers.X-A: has a reference within a text",
            ),
            (
                "[rabbitmq]\nurl = 'amqp://ann:hunter2+/Q==@h:5672/v'".to_owned(),
                "line 2: rabbitmq.url: has an invalid port",
            ),
            ("[redis]\nurl = 'redis://:p#hunter2@h'".to_owned(), "line 2: redis.url: has an invalid port"),
            ("[redis]\nurl = 'redis+sentinel://a:0,b:1/main'".to_owned(), "line 2: redis.url: has an invalid port"),
            (
                "[[worker.routes]]\nevents = ['env:EVENTS']\nforward = { url = 'http://h/' }".to_owned(),
                "line 2: worker.routes[1].events: takes the value itself",
            ),
            (
                "[hooks.before_message_send]\nrules = [{ pattern = '[*]', action = 'mask' }]".to_owned(),
                "line 2: hooks.before_message_send.rules[1].text: is matched by its own pattern",
            ),
            (hook("reply = ' '"), "line 2: hooks.custom_commands.commands.x.reply: is empty"),
            (
                "[hooks.before_message_send]\ndeadline = '6s'".to_owned(),
                "line 2: hooks.before_message_send.deadline: must be at most 5s",
            ),
            (
                "[hooks.before_message_send]\nrules = [{ pattern = 'a|', action = 'reject' }]".to_owned(),
                "line 2: hooks.before_message_send.rules[1].pattern: matches every message",
            ),
            (
                "[hooks.before_message_send]\nrules = [{ pattern = '[*]', action = 'mask', text = '*' }]".to_owned(),
                "line 2: hooks.before_message_send.rules[1].text: is matched by its own pattern",
            ),
            (
                "[log]\nrequests = 'failed'".to_owned(),
                "line 2: log.requests: \"failed\" is neither \"refused\" nor \"all\" nor \"none\"",
            ),
        ];
        for (text, expected) in table {
            let error = load_text(&text, []).unwrap_err().to_string();
            assert!(!error.contains("hunter2"), "{error}");
            assert!(error.lines().any(|line| line.trim_start().starts_with(expected)), "{expected:?} in {error}");
        }
    }

    /// Settings that work and are probably not what was meant.
    #[test]
    fn a_table_of_doubts() {
        let route = |events: &str| {
            format!(
                "[[worker.routes]]\nname = 'a'\nevents = ['message.*']\nforward = {{ url = 'http://h/' }}\n\
            [[worker.routes]]\nname = 'b'\nevents = ['{events}']\nforward = {{ url = 'http://h/', timeout = '1m' }}"
            )
        };
        let table = [
            (route("message.new"), "worker.routes[2].events", "whose events the earlier route \"a\" takes"),
            (route("reacton.new"), "worker.routes[2].events", "did you mean \"reaction.new\"?"),
            (route("reaction.new"), "worker.routes[2].forward.timeout", "cuts it short"),
            (
                "[hooks.before_message_send]\ndeadline = '2s'".to_owned(),
                "hooks.before_message_send.deadline",
                "is over the 1.5s",
            ),
            ("[hooks.custom_commands]\ndeadline = '2s'".to_owned(), "hooks.custom_commands.deadline", "is over the 1s"),
            (
                "[hooks.before_message_send]\nforward = { url = 'http://h/', timeout = '3s' }".to_owned(),
                "hooks.before_message_send.forward.timeout",
                "cuts it short",
            ),
            (
                "[gateway]\nanswer_deadline = '1s'\n".to_owned(),
                "hooks.before_message_send.deadline",
                "over gateway.answer_deadline",
            ),
            ("[rabbitmq]\nspool_after = '5s'".to_owned(), "rabbitmq.spool_after", "leaves no time"),
            (
                "[redis]\ntimeout = '2500ms'".to_owned(),
                "gateway.answer_deadline",
                "redis.timeout and rabbitmq.confirm_timeout",
            ),
            ("[rabbitmq]\nmanagement_url = 'h:15672'".to_owned(), "rabbitmq.management_url", "takes an http://"),
            (
                "[rabbitmq]\nmanagement_url = 'http://ann:hunter2@h:0'".to_owned(),
                "rabbitmq.management_url",
                "an invalid port",
            ),
            (
                "[[worker.routes]]\nevents = ['*']\nforward = { url = 'http://h/%zz' }".to_owned(),
                "worker.routes[1].forward.url",
                "without two hex digits",
            ),
            (
                "[[worker.routes]]\nevents = ['*']\nforward = { url = 'http://h/x#y' }".to_owned(),
                "worker.routes[1].forward.url",
                "has a fragment",
            ),
        ];
        for (text, key, expected) in table {
            let doubts = load_text(&text, []).unwrap().doubts;
            assert!(doubts.iter().any(|doubt| doubt.key == key && doubt.what.contains(expected)), "{key}: {doubts:?}");
        }
        assert_eq!(load_text(&route("reaction.*").replace(", timeout = '1m'", ""), []).unwrap().doubts, []);
        let variables =
            [("STREAMGATE_GATEWAY_LISTEN", "x"), ("STREAMGATE_TEST_X", "x"), ("STREAMGATE_LOG_FORMAT", "x")];
        let doubts = load_text("", variables).unwrap().doubts;
        assert!(doubts[0].what.contains("did you mean STREAMGATE__GATEWAY__LISTEN?"), "{doubts:?}");
        let apps = "[[apps]]\nname = 'a'\nkeys = [{ api_key = 'k', secrets = ['0123456789abcdef'] }]";
        let doubts = load_text(apps, [("STREAM_API_KEY", "another"), ("STREAM_API_SECRET", "s")]).unwrap().doubts;
        assert!(doubts[0].what.contains("STREAM_API_KEY is not used"), "{doubts:?}");
    }

    #[test]
    fn valid_configurations_have_neither_mistakes_nor_doubts() {
        for text in [
            "[redis]\nurl = 'redis+sentinel://a:26379,b/main'",
            "[redis]\nurl = 'redis://[::1]:6379'",
            "[rabbitmq]\nmanagement_url = 'https://ann:p%23@h:15671/path'",
            "[[worker.routes]]\nevents = ['*']\nforward = { url = 'http://h/%7Ba%7D?x=%25' }",
            "[rabbitmq]\nurl = 'amqps://ann:p%2F%3A@[::1]:5671/v'",
            "[hooks.before_message_send]\nfailure_text = 'file: no'\nrules = [{ pattern = 'file://', action = 'reject', text = 'env: x' }]",
            "[hooks.before_message_send]\nrules = [{ pattern = '^\\s*$', action = 'reject' }, { pattern = '[0-9]*', action = 'mask' }]",
        ] {
            assert_eq!(load_text(text, []).unwrap().doubts, [], "{text}");
        }
    }

    #[test]
    fn a_gateway_needs_nothing_of_the_services() {
        let text = "[[worker.routes]]\nevents = ['*']\nforward = { url = 'env:NOT_SET', ca = '/none.pem', headers = { X-A = 'env:NOT_SET' } }";
        let environment = Environment::of([]).without_route_secrets();
        assert!(from_text(None, Some(text), &environment).is_ok());
    }

    #[test]
    fn a_route_is_read_whole() {
        let text = "
            [[worker.routes]]
            events = ['message.*']
            forward = { url = 'https://app.example/hook', timeout = '2s', headers = { Authorization = 'env:TOKEN' } }
        ";
        let config = load_text(text, [("TOKEN", "Bearer t")]).unwrap().config;
        let route = &config.worker.routes[0];
        assert_eq!(route.name, "1");
        let HandlerConfig::Forward(forward) = &route.handler else { panic!("{route:?}") };
        assert_eq!(forward.timeout, Duration::from_secs(2));
        assert_eq!(forward.headers[0].1.expose(), "Bearer t");
        assert!(!format!("{config:?}").contains("Bearer t"));
    }

    #[test]
    fn apps_come_from_the_environment_where_the_file_names_none() {
        let variables = [("STREAM_KEY", "k2"), ("STREAM_SECRET", "s2")];
        let apps = load_text("", variables).unwrap().config.apps;
        assert_eq!((apps[0].name.as_str(), apps[0].keys[0].api_key.as_str()), ("chat", "k2"));
        let text = "[[apps]]\nname = 'a'\nkeys = [{ api_key = 'k', secrets = ['s'] }]";
        assert_eq!(load_text(text, variables).unwrap().config.apps[0].name, "a");
    }

    #[test]
    fn half_a_pair_of_variables_is_a_mistake() {
        assert_eq!(keys("", [("STREAM_API_KEY", "k")]), ["apps"]);
        assert_eq!(keys("", [("STREAM_SECRET", "s"), ("STREAM_KEY", "")]), ["apps"]);
        // A command that reads no secret does not require one.
        for half in [("STREAM_API_KEY", "k"), ("STREAM_API_SECRET", "s")] {
            let environment = Environment::of([half]).without_app_secrets();
            assert_eq!(from_text(None, None, &environment).unwrap().doubts, []);
        }
    }

    #[test]
    fn commands_without_need_of_secrets_do_not_read_them() {
        let text = "[[apps]]\nname = 'a'\nkeys = [{ api_key = 'k', secrets = ['env:NOT_SET'] }]";
        assert_eq!(keys(text, []).len(), 1);
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("test.toml");
        std::fs::write(&file, text).unwrap();
        assert!(
            load(&Source { file: Some(file), environment: Environment::of([]).without_secrets() }, |_| Vec::new())
                .is_ok()
        );
    }

    #[test]
    fn one_apps_secrets_are_read_alone() {
        let text = "[rabbitmq]\nurl = 'env:NO'\nca = 'x'\nmanagement_url = 'env:NO'\n[redis]\nurl = 'env:NO'\nca = 'x'\n\
            [[apps]]\nname = 'a'\nkeys = [{ api_key = 'a', secrets = ['env:A'] }, { api_key = 'b', secrets = ['env:NO'] }]\n\
            [[worker.routes]]\nevents = ['*']\nforward = { url = 'env:NO' }";
        let secrets = |of| {
            let environment = Environment::of([("A", "the secret of a")]).with_secrets_of(of);
            let keys = from_text(None, Some(text), &environment)?.config.apps.remove(0).keys;
            Ok::<_, ConfigError>(keys.iter().map(|key| key.secrets[0].expose().to_owned()).collect::<Vec<_>>())
        };
        assert_eq!(secrets(None).unwrap(), ["", ""]);
        assert_eq!(secrets(Some("a")).unwrap(), ["the secret of a", ""]);
        assert!(secrets(Some("b")).is_err());
    }

    #[test]
    fn secrets_can_be_given_by_reference() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("secret");
        std::fs::write(&file, "from file\r\n").unwrap();
        let environment = Environment::of([("S", "from env"), ("EMPTY", "")]);
        let read = |reference: &str| environment.resolve(reference).map(|secret| secret.expose().to_owned());
        assert_eq!(read(&format!("file:{}", file.display())), Ok("from file".into()));
        assert_eq!(read("env:S"), Ok("from env".into()));
        assert_eq!(read("plain"), Ok("plain".into()));
        assert!(read("env:EMPTY").is_err() && read("env:NONE").is_err() && read("file:/none").is_err());
    }

    #[test]
    fn an_invalid_toml_file_is_reported_by_line_and_without_its_text() {
        let error = load_text("[gateway]\nsecret = hunter2 hunter3\n", []).unwrap_err().to_string();
        assert!(error.contains("line 2") && !error.contains("hunter"), "{error}");
        let missing = Source { file: Some("/no/such/file".into()), environment: Environment::default() };
        assert!(matches!(load(&missing, |_| Vec::new()), Err(ConfigError::Unreadable { .. })));
    }
}
