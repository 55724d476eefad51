//! RabbitMQ for the tests: a node, which can be killed, stopped and started again, and a cluster of three.

use super::servers::{Guard, directory, free_port, send_signal, speaks};
use rustix::process::Signal;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A RabbitMQ node.
#[derive(Debug)]
pub struct Broker {
    pub port: u16,
    management: u16,
    pub(super) files: PathBuf,
    epmd: u16,
    distribution: u16,
    /// Whether another guard runs its epmd.
    clustered: bool,
    guard: Option<Guard>,
}

impl Broker {
    pub async fn start() -> Broker {
        Broker::with("").await
    }

    /// With further lines of configuration.
    pub async fn with(more: &str) -> Broker {
        let mut broker = Broker::new(free_port(), false, more);
        broker.restart().await;
        broker
    }

    /// A node that does not run yet.
    fn new(epmd: u16, clustered: bool, more: &str) -> Broker {
        let [port, management, distribution] = [free_port(), free_port(), free_port()];
        let files = directory();
        std::fs::write(files.join("plugins"), "[rabbitmq_management].").unwrap();
        let config = format!(
            "management.tcp.ip = 127.0.0.1\nmanagement.tcp.port = {management}\nlog.console = true\n\
             log.console.level = warning\nlog.file = false\ndisk_free_limit.absolute = 50MB\n{more}\n"
        );
        std::fs::write(files.join("rabbitmq.conf"), config).unwrap();
        Broker { port, management, files, epmd, distribution, clustered, guard: None }
    }

    /// Its name among the nodes of a cluster.
    pub fn node(&self) -> String {
        format!("test{}@localhost", self.port)
    }

    /// One of the package's own scripts: the wrapper in PATH switches to a user who may not read these files.
    fn script(&self, name: &str) -> Command {
        let packages = Path::new("/usr/lib/rabbitmq/lib");
        let found = std::fs::read_dir(packages).unwrap().map(|entry| entry.unwrap().path().join("sbin").join(name));
        let script = found.into_iter().find(|path| path.exists()).expect("rabbitmq-server is installed");
        let mut command = Command::new("sh");
        // An epmd of our own in the same group: one that Erlang started would outlive the tests.
        let epmd = if self.clustered { "" } else { r#"epmd -address 127.0.0.1 -port "$ERL_EPMD_PORT" & "# };
        command.args(["-c", &format!(r#"{epmd}exec "$0""#)]).arg(script);
        self.environment(&mut command);
        command
    }

    fn environment(&self, command: &mut Command) {
        let file = |name: &str| self.files.join(name);
        command
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", &self.files)
            .env("RABBITMQ_NODENAME", self.node())
            .env("RABBITMQ_NODE_PORT", self.port.to_string())
            .env("RABBITMQ_DIST_PORT", self.distribution.to_string())
            .env("RABBITMQ_NODE_IP_ADDRESS", "127.0.0.1")
            .env("RABBITMQ_MNESIA_BASE", file("mnesia"))
            .env("RABBITMQ_LOG_BASE", file("log"))
            .env("RABBITMQ_PID_FILE", file("pid"))
            .env("RABBITMQ_ENABLED_PLUGINS_FILE", file("plugins"))
            .env("RABBITMQ_CONFIG_FILE", file("rabbitmq"))
            .env("RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS", "-kernel inet_dist_use_interface {127,0,0,1}")
            .env("ERL_EPMD_PORT", self.epmd.to_string())
            // Else a server that cannot start leaves its dump in the working directory, which is the repository.
            .env("ERL_CRASH_DUMP", file("erl_crash.dump"))
            .env("ERL_EPMD_ADDRESS", "127.0.0.1");
    }

    /// Starts the node on the files that it has, after a kill.
    pub async fn restart(&mut self) {
        assert!(self.guard.is_none(), "RabbitMQ already runs");
        std::fs::write(self.files.join("keep"), "").unwrap();
        self.guard = Some(Guard::start(&self.script("rabbitmq-server"), &self.files));
        let (port, output) = (self.port, self.files.join("output"));
        let what = format!("RabbitMQ starts; its output is in {}", output.display());
        // Several nodes that start at a time on two cores each take the time of all.
        super::within(3 * super::PATIENCE, &what, || async { speaks(port, b"AMQP\x00\x00\x09\x01", b"\x01").await })
            .await;
    }

    /// Kills the node's processes with SIGKILL; its files stay.
    pub fn kill(&mut self) {
        self.guard = None;
    }

    /// SIGSTOP or SIGCONT to the node.
    pub fn signal(&self, signal: Signal) {
        send_signal(&self.files, signal);
    }

    pub fn url(&self) -> String {
        self.url_of("guest", "guest", "%2f")
    }

    /// A connection of the test's own, with a channel.
    pub async fn channel(&self) -> (lapin::Connection, lapin::Channel) {
        let connected = lapin::Connection::connect(&self.url(), lapin::ConnectionProperties::default()).await.unwrap();
        let channel = connected.create_channel().await.unwrap();
        (connected, channel)
    }

    /// Messages that are ready in a queue.
    pub async fn ready(&self, queue: &str) -> u32 {
        let (_connection, channel) = self.channel().await;
        let options = lapin::options::QueueDeclareOptions { passive: true, ..Default::default() };
        channel.queue_declare(queue.into(), options, lapin::types::FieldTable::default()).await.unwrap().message_count()
    }

    pub fn url_of(&self, user: &str, password: &str, vhost: &str) -> String {
        format!("amqp://{user}:{password}@127.0.0.1:{}/{vhost}", self.port)
    }

    /// Runs `rabbitmqctl`.
    pub async fn control(&self, args: &[&str]) {
        let found = self.script("rabbitmqctl");
        let script = found.get_args().last().unwrap().to_owned();
        let mut command = Command::new(script);
        self.environment(&mut command);
        let output = tokio::process::Command::from(command).args(args).output().await.unwrap();
        assert!(output.status.success(), "{output:?}");
    }

    /// The URL of the management API, with guest's login.
    pub fn management_url(&self) -> String {
        format!("http://guest:guest@127.0.0.1:{}", self.management)
    }

    /// Calls the management API as guest and returns the answer's body.
    pub async fn manage(&self, method: &str, path: &str, body: &str) -> String {
        let request = format!(
            "{method} /api/{path} HTTP/1.1\r\nhost: x\r\nauthorization: Basic Z3Vlc3Q6Z3Vlc3Q=\r\nconnection: close\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let address = SocketAddr::from(([127, 0, 0, 1], self.management));
        super::eventually("the management API answers", || async { TcpStream::connect(address).is_ok() }).await;
        let answer = super::wire::read_to_end(super::wire::raw(address, request.as_bytes()).await).await;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 2"), "{method} {path}: {answer}");
        body.to_owned()
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        // The guard removes the files; a killed node has no guard, so they are removed here.
        drop(std::fs::remove_file(self.files.join("keep")));
        self.guard = None;
        drop(std::fs::remove_dir_all(&self.files));
    }
}

/// Three RabbitMQ nodes of one cluster.
#[derive(Debug)]
pub struct Cluster {
    pub nodes: [Broker; 3],
    _epmd: Guard,
}

impl Cluster {
    pub async fn start() -> Cluster {
        let (port, files) = (free_port(), directory());
        // An epmd of the cluster's own: one node's epmd would be killed with that node.
        let mut epmd = Command::new("epmd");
        epmd.args(["-address", "127.0.0.1", "-port", &port.to_string()]);
        let guard = Guard::start(&epmd, &files);
        let mut nodes = [(); 3].map(|()| Broker::new(port, true, ""));
        for node in &nodes {
            let cookie = node.files.join(".erlang.cookie");
            std::fs::write(&cookie, "STREAMGATETEST").unwrap();
            std::fs::set_permissions(cookie, std::os::unix::fs::PermissionsExt::from_mode(0o400)).unwrap();
        }
        for node in &mut nodes {
            node.restart().await;
        }
        let [first, others @ ..] = &nodes;
        for node in others {
            node.control(&["stop_app"]).await;
            node.control(&["join_cluster", &first.node()]).await;
            node.control(&["start_app"]).await;
        }
        Cluster { nodes, _epmd: guard }
    }
}
