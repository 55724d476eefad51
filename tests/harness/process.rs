//! The real binary as a child process, which tests query, stop and kill.

use super::wire::{API_KEY, SECRET, Webhook, raw};
use rusqlite::Connection;
use rustix::process::{Pid, Signal};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Output, Stdio};
use std::sync::Arc;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, ChildStdout, Command};

/// Where a server keeps its files. Outlives the processes.
#[derive(Clone, Debug)]
pub struct Site {
    directory: Arc<TempDir>,
}

impl Site {
    pub fn new() -> Site {
        Site { directory: Arc::new(tempfile::tempdir().unwrap()) }
    }

    /// In memory, for tests that compare times: no commit waits for a disk that other tests keep busy.
    pub fn in_memory() -> Site {
        Site { directory: Arc::new(tempfile::tempdir_in("/dev/shm").unwrap()) }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn data_dir(&self) -> PathBuf {
        self.path("data")
    }

    /// A connection of the test's own to the site's store or spool.
    pub fn store(&self) -> Connection {
        let connection = Connection::open(self.data_dir().join("streamgate.db")).unwrap();
        connection.busy_timeout(std::time::Duration::from_secs(10)).unwrap();
        connection
    }

    /// Makes the store hang as on a dead disk: SQLite's write lock is held until this is dropped, so no commit goes through.
    pub fn hang_store(&self) -> Connection {
        let connection = self.store();
        connection.execute_batch("BEGIN IMMEDIATE").unwrap();
        connection
    }

    pub fn config(&self) -> PathBuf {
        self.path("streamgate.toml")
    }

    pub fn write(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    /// Writes the config file.
    pub fn configure(&self, setup: &Setup) {
        self.write("streamgate.toml", setup.toml(&self.data_dir()));
    }

    /// A command of the binary on this site's configuration, with nothing else in its environment.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = bare_command(args);
        command.current_dir(self.directory.path()).env("STREAMGATE_CONFIG", self.config());
        command
    }

    /// A command whose wall clock follows the site's clock file: see [`set_clock`](Site::set_clock).
    pub fn command_by_clock(&self, args: &[&str]) -> Command {
        let mut command = self.command(args);
        let library = ["x86_64", "aarch64"].map(|cpu| format!("/usr/lib/{cpu}-linux-gnu/faketime/libfaketimeMT.so.1"));
        command.env("LD_PRELOAD", library.iter().find(|path| Path::new(path).exists()).expect("faketime is installed"));
        command.env("FAKETIME_TIMESTAMP_FILE", self.path("clock")).env("FAKETIME_NO_CACHE", "1");
        command.env("FAKETIME_DONT_FAKE_MONOTONIC", "1").env("DONT_FAKE_MONOTONIC", "1");
        command
    }

    /// Sets how far the clock is off: `+1d`, `+0`.
    pub fn set_clock(&self, offset: &str) {
        // Replaced atomically: it is read whenever the process looks at the clock.
        let new = self.write("clock.new", offset);
        std::fs::rename(new, self.path("clock")).unwrap();
    }

    pub async fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().await.unwrap()
    }

    /// `streamgate up`.
    pub async fn start(&self) -> Server {
        self.start_as("up").await
    }

    /// `up`, `gateway` or `worker`, on the site's configuration.
    pub async fn start_as(&self, service: &str) -> Server {
        Server::of(self.command(&[service]), self).await
    }

    /// A name that no other site has, for queues and keys outside its directory.
    pub fn name(&self) -> String {
        let name = self.directory.path().file_name().unwrap().to_string_lossy();
        format!("t{}", name.trim_start_matches('.'))
    }

    /// Waits until the log contains this: a line is written a moment after its event.
    pub async fn logged(&self, text: &str) {
        super::eventually(&format!("the log says {text:?}"), || async { self.log().contains(text) }).await;
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }
}

/// Another build that is tested or measured in place of this one.
pub fn other_binary() -> Option<String> {
    std::env::var("STREAMGATE_TEST_BINARY").ok()
}

/// The binary under test.
pub fn binary() -> String {
    other_binary().unwrap_or_else(|| env!("CARGO_BIN_EXE_streamgate").to_owned())
}

/// The binary with these arguments and an empty environment.
pub fn bare_command(args: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command.args(args).env_clear().kill_on_drop(true).stdin(Stdio::null());
    command
}

/// The parts of the configuration that a test sets; each is the inside of its table.
#[derive(Clone, Debug)]
pub struct Setup {
    pub listen: SocketAddr,
    /// The ops address of a gateway, or of `up`.
    pub ops: SocketAddr,
    pub gateway: String,
    pub store: String,
    pub worker: String,
    /// Further tables.
    pub rest: String,
}

impl Default for Setup {
    fn default() -> Setup {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        Setup {
            listen: any,
            ops: any,
            gateway: String::new(),
            store: String::new(),
            worker: String::new(),
            rest: String::new(),
        }
    }
}

impl Setup {
    pub fn toml(&self, data_dir: &Path) -> String {
        format!(
            "[[apps]]\nname = \"chat\"\nkeys = [{{ api_key = \"{API_KEY}\", secrets = [\"{SECRET}\"] }}]\n\
             [gateway]\nlisten = \"{}\"\nops_listen = \"{}\"\n{}\n\
             [store]\ndata_dir = \"{}\"\n{}\n[worker]\nops_listen = \"127.0.0.1:0\"\n{}\n{}\n",
            self.listen,
            self.ops,
            self.gateway,
            data_dir.display(),
            self.store,
            self.worker,
            self.rest
        )
    }
}

/// A running `streamgate up`, `gateway` or `worker`.
#[derive(Debug)]
pub struct Server {
    child: Child,
    /// Kept open: the process must never meet a closed stdout.
    stdout: BufReader<ChildStdout>,
    pub greeting: String,
    pub public: SocketAddr,
    pub ops: SocketAddr,
}

impl Server {
    /// Starts the command and waits for its greeting. Its log is appended to the site's.
    pub async fn of(command: Command, site: &Site) -> Server {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(site.path("log")).unwrap();
        Server::with_log(command, log.into(), site).await
    }

    /// With another place for its log. A pipe stays unread, and open.
    pub async fn with_log(mut command: Command, log: Stdio, site: &Site) -> Server {
        let mut child = command.stdout(Stdio::piped()).stderr(log).spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut greeting = String::new();
        while !greeting.contains(" send ") && !greeting.contains("\n  routes") {
            let read = stdout.read_line(&mut greeting).await.unwrap();
            assert!(read > 0, "no greeting but {greeting:?}; log:\n{}", site.log());
        }
        let address = |label: &str| {
            let line = greeting.lines().find(|line| line.trim_start().starts_with(label))?;
            Some(line.split("://").nth(1).unwrap().split('/').next().unwrap().parse().unwrap())
        };
        // A worker takes no webhooks.
        let public = address("webhooks").unwrap_or(SocketAddr::from(([127, 0, 0, 1], 0)));
        let ops = address("metrics").unwrap();
        Server { child, stdout, public, ops, greeting }
    }

    /// Waits until /readyz is 200 and, for a gateway, until it has its broker: it is ready without one, too.
    pub async fn ready(self) -> Server {
        let started = std::time::Instant::now();
        while self.ops("/readyz").await.0 != 200 {
            assert!(started.elapsed() < super::PATIENCE, "not ready: {}", self.ops("/readyz").await.1);
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        if self.greeting.starts_with("Streamgate gateway") {
            let up = || async { self.metric("streamgate_gateway_broker_up").await == 1.0 };
            super::eventually("the gateway has its broker", up).await;
        }
        self
    }

    /// Signed pushes, each of `width` bytes, that wait for a commit that hangs. One after the other: while two are not verified yet,
    /// one may take the other's place.
    pub async fn hold(&self, count: u8, width: usize) -> Vec<TcpStream> {
        let mut held = Vec::new();
        for number in 0..count {
            let wide = Webhook::push(&format!("held-{number}"), vec![b'0' + number; width]);
            held.push(raw(self.public, &wide.raw()).await);
            super::eventually("all so far wait for their commit", || async {
                let held = f64::from(number) + 1.0;
                let memory = self.metric("streamgate_gateway_memory_bytes").await;
                memory >= held * width as f64 && self.metric("streamgate_gateway_in_flight").await == held
            })
            .await;
        }
        held
    }

    pub fn pid(&self) -> u32 {
        self.child.id().unwrap()
    }

    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.pid().try_into().unwrap()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    pub async fn kill(mut self) {
        self.child.kill().await.unwrap();
    }

    pub async fn wait(mut self) -> ExitStatus {
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest).await.unwrap();
        self.child.wait().await.unwrap()
    }

    pub async fn terminate(self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.wait().await
    }

    /// Status and body of an ops endpoint.
    pub async fn ops(&self, path: &str) -> (u16, String) {
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        let response = super::wire::read_to_end(super::wire::raw(self.ops, request.as_bytes()).await).await;
        let status = response.split(' ').nth(1).unwrap().parse().unwrap();
        (status, response.split_once("\r\n\r\n").unwrap().1.to_owned())
    }

    /// Whether the process has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// The value of a metric, with its labels as Prometheus writes them; 0 where it does not exist yet.
    pub async fn metric(&self, name: &str) -> f64 {
        let (_, text) = self.ops("/metrics").await;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.map_or(0.0, |value| value.parse().unwrap())
    }

    /// The number of pushes with this outcome.
    pub async fn pushes(&self, outcome: &str) -> f64 {
        let labels = format!("app=\"chat\",kind=\"push\",outcome=\"{outcome}\"");
        self.metric(&format!("streamgate_gateway_requests_total{{{labels}}}")).await
    }

    /// Whether a gateway has its broker and an empty spool.
    pub async fn publishes(&self) -> bool {
        self.metric("streamgate_gateway_broker_up").await == 1.0 && self.metric("streamgate_spool_events").await == 0.0
    }

    /// Bytes in memory, as the kernel counts them.
    pub fn resident_bytes(&self) -> u64 {
        memory(self.pid(), "VmRSS").unwrap()
    }

    /// The peak of [`resident_bytes`](Server::resident_bytes).
    pub fn peak_resident_bytes(&self) -> u64 {
        memory(self.pid(), "VmHWM").unwrap()
    }
}

/// A field of `/proc/PID/status` in bytes. `None` when the process has ended.
pub fn memory(pid: u32, which: &str) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with(which))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

/// Raises this process's limit of open files.
pub fn raise_open_files(needed: usize) {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    assert!(limit.maximum.is_none_or(|most| most >= needed as u64), "this test needs `ulimit -Hn` of {needed}");
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }).unwrap();
}
