//! Real backends for the tests: RabbitMQ (`broker`) and Redis on private ports of the loopback. Most tests share one pair;
//! faults get servers of their own. A guard kills a server and removes its files when its owner drops it, or when the test
//! process ends in any way.

use super::broker::Broker;
use rustix::process::{Pid, Signal};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::OnceCell;

/// Below the ephemeral ports of the kernel, even with the 10,000 that a Redis cluster adds for its bus port.
const PORTS: std::ops::Range<u16> = 20_000..22_700;

/// A port that nobody listens on.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let offset = u16::try_from(std::process::id() % 2_000).unwrap();
    loop {
        let port = PORTS.start + (offset + NEXT.fetch_add(1, Ordering::Relaxed)) % (PORTS.end - PORTS.start);
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
}

/// A program in a process group of its own, which is killed when this is dropped.
#[derive(Debug)]
pub(super) struct Guard {
    shell: Child,
}

impl Guard {
    /// The shell waits for the end of its stdin, which carries no bytes, then kills the program's group.
    pub(super) fn start(command: &Command, files: &Path) -> Guard {
        let program: Vec<_> = std::iter::once(command.get_program()).chain(command.get_args()).collect();
        let watch = r#"files=$1; shift; setsid "$@" </dev/null & cat; kill -s KILL -- -$!; wait; [ -e "$files/keep" ] || rm -rf "$files""#;
        let mut shell = Command::new("sh");
        shell.args(["-c", watch, "guard"]).arg(files).args(program);
        for (name, value) in command.get_envs() {
            if let Some(value) = value {
                shell.env(name, value);
            }
        }
        let log = std::fs::OpenOptions::new().create(true).append(true).open(files.join("output")).unwrap();
        shell.stdin(Stdio::piped()).stdout(log.try_clone().unwrap()).stderr(log);
        // A signal to the tests' process group, such as Ctrl-C, must not end the guard before its work is done.
        shell.process_group(0);
        Guard { shell: shell.spawn().unwrap() }
    }

    /// Runs a command when its owner drops it or when the test process ends, and removes the directory then.
    pub(super) fn after(command: &Command, directory: &Path) -> Guard {
        let program = std::iter::once(command.get_program()).chain(command.get_args());
        let mut shell = Command::new("setsid");
        shell.args(["sh", "-c", r#"cat; directory=$1; shift; "$@"; rmdir "$directory""#, "guard"]).arg(directory);
        shell.args(program).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        Guard { shell: shell.spawn().unwrap() }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        drop(self.shell.stdin.take());
        self.shell.wait().unwrap();
    }
}

/// Signals the server of these files. Waits until SIGSTOP has taken effect: threads run on until one of them has received the
/// signal, and on a busy machine a server still answers for a while.
pub(super) fn send_signal(files: &Path, signal: Signal) {
    let pid = std::fs::read_to_string(files.join("pid")).unwrap();
    let pid = pid.trim();
    rustix::process::kill_process(Pid::from_raw(pid.parse().unwrap()).unwrap(), signal).unwrap();
    let started = Instant::now();
    while signal == Signal::STOP && !is_stopped(pid) {
        assert!(started.elapsed() < super::PATIENCE, "{pid} runs on after SIGSTOP");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Whether the kernel has stopped all threads of a process.
fn is_stopped(pid: &str) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    threads.flatten().all(|thread| {
        // A thread that has ended meanwhile has no file.
        let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        stat.rsplit(") ").next().is_none_or(|rest| rest.is_empty() || rest.starts_with('T'))
    })
}

pub(super) fn directory() -> PathBuf {
    tempfile::Builder::new().prefix("streamgate-test-").tempdir().unwrap().keep()
}

/// A Redis server that keeps nothing on disk.
#[derive(Debug)]
pub struct RedisServer {
    pub port: u16,
    files: PathBuf,
    args: Vec<String>,
    guard: Option<Guard>,
}

impl RedisServer {
    pub async fn start() -> RedisServer {
        RedisServer::with(&[]).await
    }

    /// With further arguments, as `--requirepass secret`.
    pub async fn with(args: &[&str]) -> RedisServer {
        let args = args.iter().map(|arg| (*arg).to_owned()).collect();
        let mut server = RedisServer { port: free_port(), files: directory(), args, guard: None };
        server.restart().await;
        server
    }

    /// A Sentinel with this configuration, which it rewrites.
    pub async fn sentinel(config: &Path) -> RedisServer {
        RedisServer::with(&[config.to_str().unwrap(), "--sentinel"]).await
    }

    /// Speaks TLS only.
    pub async fn secure(cert: &str, key: &str) -> RedisServer {
        let files = ["--tls-cert-file", cert, "--tls-key-file", key, "--tls-ca-cert-file", cert];
        RedisServer::with(&[&["--tls-auth-clients", "no", "--tls-port"], &files[..]].concat()).await
    }

    /// Where it would save its data.
    pub fn dump(&self) -> PathBuf {
        self.files.join("dump.rdb")
    }

    pub async fn restart(&mut self) {
        assert!(self.guard.is_none(), "Redis already runs");
        std::fs::write(self.files.join("keep"), "").unwrap();
        let mut command = Command::new("redis-server");
        let port = self.port.to_string();
        // A configuration file comes first.
        let (file, args) = self.args.split_at(usize::from(self.args.get(1).is_some_and(|arg| arg == "--sentinel")));
        command.args(file);
        let secure = args.iter().any(|arg| arg == "--tls-port");
        command.args(if secure { ["--port", "0"] } else { ["--port", &port] });
        command.args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir"]).arg(&self.files);
        command.args(["--pidfile", &self.files.join("pid").display().to_string()]);
        for arg in args {
            command.arg(arg);
            if arg == "--tls-port" {
                command.arg(&port);
            }
        }
        self.guard = Some(Guard::start(&command, &self.files));
        let port = self.port;
        super::eventually("Redis starts", || async {
            if secure { TcpStream::connect(("127.0.0.1", port)).is_ok() } else { speaks(port, b"PING\r\n", b"").await }
        })
        .await;
    }

    pub fn kill(&mut self) {
        self.guard = None;
    }

    pub fn signal(&self, signal: Signal) {
        send_signal(&self.files, signal);
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// Sends a command over a new connection and returns the answer as text.
    pub async fn ask(&self, words: &[&str]) -> String {
        let client = redis::Client::open(self.url()).unwrap();
        let mut connection = client.get_multiplexed_async_connection().await.unwrap();
        let mut command = redis::cmd(words[0]);
        command.arg(&words[1..]);
        let answer: redis::Value = command.query_async(&mut connection).await.unwrap();
        redis::from_redis_value::<Option<String>>(answer).unwrap().unwrap_or_default()
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        drop(std::fs::remove_file(self.files.join("keep")));
        self.guard = None;
        drop(std::fs::remove_dir_all(&self.files));
    }
}

/// Whether a server answers `say`, with `expect` as the first byte if that is not empty.
pub(super) async fn speaks(port: u16, say: &[u8], expect: &[u8]) -> bool {
    let talk = async {
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.ok()?;
        stream.write_all(say).await.ok()?;
        let mut answer = [0];
        stream.read_exact(&mut answer).await.ok()?;
        answer.starts_with(expect).then_some(())
    };
    tokio::time::timeout(Duration::from_secs(2), talk).await.is_ok_and(|answered| answered.is_some())
}

/// The pair that most tests share; a prefix keeps their names apart.
#[derive(Debug)]
pub struct Backends {
    pub broker: Broker,
    pub redis: RedisServer,
}

impl Backends {
    pub async fn start() -> Backends {
        let (broker, redis) = tokio::join!(Broker::start(), RedisServer::start());
        Backends { broker, redis }
    }

    pub async fn shared() -> &'static Backends {
        static SHARED: OnceCell<Backends> = OnceCell::const_new();
        let backends = SHARED.get_or_init(Backends::start).await;
        // A static is never dropped, so the guards must remove its files, too.
        for files in [&backends.broker.files, &backends.redis.files] {
            drop(std::fs::remove_file(files.join("keep")));
        }
        backends
    }

    /// The tables that name them in a configuration, with a timeout that a slow machine does not reach.
    pub fn tables(&self, prefix: &str) -> String {
        self.impatient_tables(prefix) + "timeout = \"2s\"\n"
    }

    /// With further lines for RabbitMQ.
    pub fn tables_with(&self, prefix: &str, rabbitmq: &str) -> String {
        self.tables(prefix).replace("[rabbitmq]\n", &format!("[rabbitmq]\n{rabbitmq}\n"))
    }

    /// With the default timeout of Redis, for tests in which it hangs.
    pub fn impatient_tables(&self, prefix: &str) -> String {
        format!(
            "[rabbitmq]\nurl = \"{}\"\nprefix = \"{prefix}\"\n[redis]\nurl = \"{}\"\nprefix = \"{prefix}\"\n",
            self.broker.url(),
            self.redis.url()
        )
    }
}

/// Files of an authority, of a certificate of it for loopback that serves server and client, and of its key.
pub fn certificates(site: &super::process::Site) -> (String, String, String) {
    certificates_for(site, &["localhost", "127.0.0.1"], 2099)
}

/// For these names, and until the end of this year.
pub fn certificates_for(site: &super::process::Site, names: &[&str], year: i32) -> (String, String, String) {
    use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose};
    let (authority_key, key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    let authority = params.self_signed(&authority_key).unwrap();
    let issuer = Issuer::new(params, authority_key);
    let mut params = CertificateParams::new(names.iter().map(ToString::to_string).collect::<Vec<_>>()).unwrap();
    params.distinguished_name.push(rcgen::DnType::CommonName, "localhost");
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.not_after = rcgen::date_time_ymd(year, 12, 31);
    let cert = params.signed_by(&key, &issuer).unwrap();
    let write = |name: &str, pem: String| site.write(name, pem).display().to_string();
    (write("ca.pem", authority.pem()), write("cert.pem", cert.pem()), write("key.pem", key.serialize_pem()))
}
