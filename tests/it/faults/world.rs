//! Two gateways and two workers under load, how each fault is made and ended, and what is counted meanwhile.

use super::Fault::{self, *};
use super::{ALL, Part};
use crate::harness::fleet::Fleet;
use crate::harness::ledger::Load;
use crate::harness::process::{Server, Site};
use crate::harness::proxy::{Proxy, Weather};
use crate::harness::receiver::Receiver;
use crate::harness::servers::Backends;
use crate::harness::volume::Volume;
use crate::harness::{eventually, within};
use crate::policies::Policy;
use lapin::options::{BasicGetOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use rusqlite::Connection;
use rustix::process::Signal;
use std::collections::HashSet;
use std::process::Stdio;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio_util::task::AbortOnDropHandle;

const SENDERS: usize = 10;
/// Of each sender: 100 events a second altogether.
const PACE: Duration = Duration::from_millis(100);

pub struct World {
    backends: Backends,
    proxy: Proxy,
    pub service: Receiver,
    prefix: String,
    pub gateways: Vec<(Site, Option<Server>)>,
    pub workers: Vec<(Site, Option<Server>)>,
    pub load: Load,
    /// The first gateway's; none where the tests may not mount one.
    volume: Option<Volume>,
    /// Holds the write lock of its spool, always or most of the time.
    lock: Option<Connection>,
    slowness: Option<AbortOnDropHandle<()>>,
    /// Ids of what gateways published, and how often an id came again.
    published: HashSet<String>,
    published_again: u64,
    /// What was promised and not kept: told at the end, for the table says why.
    broken: Vec<String>,
}

impl World {
    pub async fn start(seed: u64) -> World {
        let (backends, service) = (Backends::start().await, Receiver::willing().await);
        let proxy = Proxy::start(backends.broker.port, seed).await;
        let mut fleet = Fleet::new(&backends, &service);
        let (direct, proxied) = (format!(":{}/%2f", backends.broker.port), format!(":{}/%2f?heartbeat=1", proxy.port));
        fleet.tables = backends.impatient_tables(&fleet.prefix).replace(&direct, &proxied);
        // An unsettled event comes back once its holder's lease is over.
        // Few in hand, so that the queue can be full.
        let retry = vec!["\"100ms\""; 60].join(", ");
        fleet.worker = format!("handler_timeout = \"1s\"\nprefetch = 16\nconcurrency = 16\nretry = [{retry}]");
        let (mut gateways, mut workers, mut targets) = (Vec::new(), Vec::new(), Vec::new());
        let volume = Volume::mount(32);
        for number in 0..2 {
            let place = fleet.site();
            if let (0, Some(volume)) = (number, &volume) {
                std::os::unix::fs::symlink(volume.path(), place.data_dir()).unwrap();
            }
            let gateway = fleet.gateway_at(&place).await;
            let (site, worker) = fleet.worker().await;
            targets.push(gateway.public);
            gateways.push((place, Some(gateway)));
            workers.push((site, Some(worker)));
        }
        let load = Load::paced(targets, SENDERS, Some(20), PACE);
        let (prefix, lock, slowness, published) = (fleet.prefix, None, None, HashSet::new());
        let world = World {
            backends,
            proxy,
            service,
            prefix,
            gateways,
            workers,
            load,
            volume,
            lock,
            slowness,
            published,
            published_again: 0,
            broken: Vec::new(),
        };
        let (_connection, channel) = world.backends.broker.channel().await;
        let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        // A classic queue would bring back what was read when RabbitMQ is killed.
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
        channel.queue_declare(world.audit().into(), options, arguments).await.unwrap();
        world.audits(true).await;
        // What RabbitMQ is killed with in its first moment it may not know any more: its queues are there once they confirm.
        world.flows("before the first fault", super::WHILE).await;
        world
    }

    /// Whether this machine lets the tests make it.
    pub fn can(&self, fault: Fault) -> bool {
        !matches!(fault, SpoolFull | SpoolReadOnly) || self.volume.is_some()
    }

    /// A queue that gets a copy of whatever gateways publish.
    fn audit(&self) -> String {
        format!("{}.audit", self.prefix)
    }

    async fn audits(&self, on: bool) {
        let (_connection, channel) = self.backends.broker.channel().await;
        let (queue, exchange, key) = (self.audit().into(), self.prefix.as_str().into(), "*.push.#".into());
        let (options, nothing) = (QueueBindOptions::default(), FieldTable::default());
        if on {
            channel.queue_bind(queue, exchange, key, options, nothing).await.unwrap();
        } else {
            channel.queue_unbind(queue, exchange, key, nothing).await.unwrap();
        }
    }

    /// Reads the copies.
    async fn count_published(&mut self) {
        let (_connection, channel) = self.backends.broker.channel().await;
        let audit = self.audit();
        while let Some(copy) = channel.basic_get(audit.as_str().into(), BasicGetOptions { no_ack: true }).await.unwrap()
        {
            let id = copy.properties.message_id().as_ref().unwrap().to_string();
            self.published_again += u64::from(!self.published.insert(id));
        }
    }

    /// How many answers said that an event is on the disk, of the gateways that run.
    async fn spooled(&self) -> f64 {
        let mut spooled = 0.0;
        for (_, server) in &self.gateways {
            if let Some(server) = server {
                spooled += server.pushes("spooled").await;
            }
        }
        spooled
    }

    async fn flows(&self, what: &str, events: usize) {
        let before = self.load.ledger.accepted();
        eventually(&format!("traffic flows: {what}"), || async { self.load.ledger.accepted() >= before + events })
            .await;
    }

    /// Whether each gateway that runs has its broker.
    async fn brokers(&self) -> Vec<bool> {
        let mut up = Vec::new();
        for (_, server) in &self.gateways {
            if let Some(server) = server {
                up.push(server.metric("streamgate_gateway_broker_up").await == 1.0);
            }
        }
        up
    }

    async fn strike(&mut self, fault: Fault) {
        match fault {
            BrokerKilled => self.backends.broker.kill(),
            BrokerRestarted => self.backends.broker.control(&["stop_app"]).await,
            BrokerHangs => {
                self.backends.broker.signal(Signal::STOP);
                let given_up = || async { !self.brokers().await.contains(&true) };
                eventually("the gateways give the broker up", given_up).await;
            }
            MemoryAlarm => self.backends.broker.control(&["set_vm_memory_high_watermark", "0.000001"]).await,
            DiskAlarm => self.backends.broker.control(&["set_disk_free_limit", "1000000000000000"]).await,
            EventsQueueFull => {
                let policy = format!(
                    r#"{{"pattern":"^{}[.]events$","definition":{{"max-length-bytes":1000}},"apply-to":"queues"}}"#,
                    self.prefix
                );
                self.backends.broker.manage("PUT", "policies/%2f/full", &policy).await;
                self.signal_workers(Signal::STOP);
            }
            EventsQueueDeleted => {
                // Or it would be where the events go, and no message without a queue.
                self.audits(false).await;
                // What is in the queue when it is deleted is gone with it, by its operator's own hand.
                self.load.paused.send_replace(true);
                self.handled("before the queue is deleted").await;
                let queue = format!("queues/%2f/{}.events", self.prefix);
                self.backends.broker.manage("DELETE", &queue, "").await;
                self.load.paused.send_replace(false);
            }
            AlternateExchangeDeleted => {
                let exchange = format!("exchanges/%2f/{}.unrouted", self.prefix);
                self.backends.broker.manage("DELETE", &exchange, "").await;
            }
            CutBeforeTheConfirm => self.proxy.turn(Weather::Stalled),
            CutAfterThePublish => self.proxy.turn(Weather::Deaf),
            LosesPackets => self.proxy.turn(Weather::Lossy),
            RedisKilled => self.backends.redis.kill(),
            RedisHangs => self.backends.redis.signal(Signal::STOP),
            RedisFlushed => drop(self.backends.redis.ask(&["FLUSHALL"]).await),
            RedisFull => drop(self.backends.redis.ask(&["CONFIG", "SET", "maxmemory", "1"]).await),
            GatewayKilled => kill(&mut self.gateways[0]).await,
            WorkerKilled => kill(&mut self.workers[0]).await,
            GatewayAndWorkerKilled => {
                kill(&mut self.gateways[1]).await;
                kill(&mut self.workers[1]).await;
            }
            SpoolHangs => {
                self.lock = Some(self.gateways[0].0.hang_store());
            }
            SpoolSlow => {
                let connection = self.gateways[0].0.store();
                self.slowness = Some(AbortOnDropHandle::new(tokio::spawn(async move {
                    loop {
                        // Busy at times: then the gateway is writing.
                        if connection.execute_batch("BEGIN IMMEDIATE").is_ok() {
                            tokio::time::sleep(Duration::from_millis(200)).await;
                            connection.execute_batch("ROLLBACK").unwrap();
                        }
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                })));
            }
            SpoolFull => {
                // The log keeps its length, and what it has used once it would write over.
                let truncate = "PRAGMA wal_checkpoint(TRUNCATE)";
                self.gateways[0].0.store().query_row(truncate, [], |_| Ok(())).unwrap();
                self.volume.as_ref().unwrap().fill();
            }
            SpoolReadOnly => {
                kill(&mut self.gateways[0]).await;
                self.volume.as_ref().unwrap().read_only(true);
                let refused = self.gateways[0].0.run(&["gateway"]).await;
                let told = String::from_utf8_lossy(&refused.stderr);
                assert!(refused.status.code() == Some(1) && told.contains("Read-only file system"), "{told}");
            }
            BrokerAndRedisKilled => {
                self.backends.broker.kill();
                self.backends.redis.kill();
            }
            PolicyExpiresEvents => {
                self.signal_workers(Signal::STOP);
                let policy = format!(
                    r#"{{"pattern":"^{}[.]events$","definition":{{"message-ttl":100}},"apply-to":"queues"}}"#,
                    self.prefix
                );
                self.backends.broker.manage("PUT", "policies/%2f/expires", &policy).await;
                let dead = format!("{}.dead", self.prefix);
                let dropped = || async { self.backends.broker.ready(&dead).await > 0 };
                within(Duration::from_secs(120), "RabbitMQ drops events", dropped).await;
            }
            PermissionsTaken => self.permit("^$").await,
            OperatorPeeks => {
                let events = format!("{}.events", self.prefix);
                crate::blame::wear(&self.backends.broker, &events, 12).await;
            }
            RedisReplica => drop(self.backends.redis.ask(&["REPLICAOF", "127.0.0.1", "1"]).await),
            RedisCannotSave => {
                // In the place of its file.
                std::fs::create_dir_all(self.backends.redis.dump().join("taken")).unwrap();
                let redis = &self.backends.redis;
                redis.ask(&["CONFIG", "SET", "save", "3600 1"]).await;
                redis.ask(&["BGSAVE"]).await;
                eventually("it could not save", || async {
                    redis.ask(&["INFO", "persistence"]).await.contains("rdb_last_bgsave_status:err")
                })
                .await;
            }
            DataDirectoryMoved => {
                let place = &self.gateways[1].0;
                std::fs::rename(place.data_dir(), place.path("moved")).unwrap();
            }
            LogStalled => {
                let (site, server) = &mut self.gateways[1];
                assert!(server.take().unwrap().terminate().await.success());
                let mut command = site.command(&["gateway"]);
                command.env("STREAMGATE_LOG", "trace");
                // The pipe holds 64 KiB, and each event is more than a line.
                *server = Some(Server::with_log(command, Stdio::piped(), site).await);
            }
            ClockSetBack => {
                let (site, server) = &mut self.workers[1];
                assert!(server.take().unwrap().terminate().await.success());
                site.set_clock("+0");
                *server = Some(Server::of(site.command_by_clock(&["worker"]), site).await);
                site.set_clock("-1d");
            }
        }
    }

    /// What the user of the services may publish to, from its next connection on.
    async fn permit(&self, write: &str) {
        let permissions = format!(r#"{{"configure":".*","write":"{write}","read":".*"}}"#);
        self.backends.broker.manage("PUT", "permissions/%2f/guest", &permissions).await;
        self.backends.broker.manage("DELETE", "connections/username/guest", "").await;
    }

    async fn heal(&mut self, fault: Fault) {
        match fault {
            BrokerKilled => self.backends.broker.restart().await,
            BrokerRestarted => self.backends.broker.control(&["start_app"]).await,
            BrokerHangs => self.backends.broker.signal(Signal::CONT),
            MemoryAlarm => self.backends.broker.control(&["set_vm_memory_high_watermark", "0.4"]).await,
            DiskAlarm => self.backends.broker.control(&["set_disk_free_limit", "50000000"]).await,
            EventsQueueFull => {
                self.backends.broker.manage("DELETE", "policies/%2f/full", "").await;
                self.signal_workers(Signal::CONT);
            }
            EventsQueueDeleted | AlternateExchangeDeleted => {
                // Declared again by whoever met the gap, or looks at it once a minute; what the alternate exchange took
                // meanwhile is handed back by the gateways.
                within(Duration::from_secs(120), "the topology is whole", || async {
                    let queue = self.backends.broker.manage("GET", "queues?columns=name", "").await;
                    let exchanges = self.backends.broker.manage("GET", "exchanges?columns=name", "").await;
                    queue.contains(&format!("\"{}.events\"", self.prefix))
                        && exchanges.contains(&format!("\"{}.unrouted\"", self.prefix))
                })
                .await;
                self.audits(true).await;
                let unrouted = format!("{}.unrouted", self.prefix);
                let handed_back = || async { self.backends.broker.ready(&unrouted).await == 0 };
                eventually("what was diverted is handed back", handed_back).await;
            }
            CutBeforeTheConfirm | CutAfterThePublish => {
                self.proxy.cut();
                self.proxy.turn(Weather::Fair);
            }
            LosesPackets => self.proxy.turn(Weather::Fair),
            RedisKilled => self.backends.redis.restart().await,
            RedisHangs => self.backends.redis.signal(Signal::CONT),
            RedisFlushed => {}
            RedisFull => drop(self.backends.redis.ask(&["CONFIG", "SET", "maxmemory", "0"]).await),
            GatewayKilled => restart(&mut self.gateways[0], "gateway").await,
            WorkerKilled => restart(&mut self.workers[0], "worker").await,
            GatewayAndWorkerKilled => {
                restart(&mut self.gateways[1], "gateway").await;
                restart(&mut self.workers[1], "worker").await;
            }
            SpoolHangs => self.lock = None,
            SpoolSlow => self.slowness = None,
            SpoolFull => self.volume.as_ref().unwrap().empty(),
            SpoolReadOnly => {
                self.volume.as_ref().unwrap().read_only(false);
                restart(&mut self.gateways[0], "gateway").await;
            }
            BrokerAndRedisKilled => {
                self.backends.broker.restart().await;
                self.backends.redis.restart().await;
            }
            PolicyExpiresEvents => {
                self.backends.broker.manage("DELETE", "policies/%2f/expires", "").await;
                self.signal_workers(Signal::CONT);
                let dead = format!("{}.dead", self.prefix);
                let events = format!("{}.events", self.prefix);
                let is_on = || Policy::is_on(&self.backends.broker, "expires", &events);
                eventually("the policy is gone", async || !is_on().await).await;
                eventually("no more events are dropped", || async {
                    let replay = ["dead", "replay", "--reason", "dropped_by_broker"];
                    self.workers[0].0.run(&replay).await.status.success()
                        && self.backends.broker.ready(&dead).await == 0
                })
                .await;
            }
            PermissionsTaken => self.permit(".*").await,
            OperatorPeeks => {}
            RedisReplica => drop(self.backends.redis.ask(&["REPLICAOF", "NO", "ONE"]).await),
            RedisCannotSave => {
                drop(self.backends.redis.ask(&["CONFIG", "SET", "save", ""]).await);
                std::fs::remove_dir_all(self.backends.redis.dump()).unwrap();
            }
            DataDirectoryMoved => {
                let place = &self.gateways[1].0;
                std::fs::rename(place.path("moved"), place.data_dir()).unwrap();
            }
            LogStalled => {
                let (site, server) = &mut self.gateways[1];
                assert!(server.take().unwrap().terminate().await.success());
                *server = Some(site.start_as("gateway").await);
            }
            ClockSetBack => {
                let (site, server) = &mut self.workers[1];
                assert!(server.take().unwrap().terminate().await.success());
                *server = Some(site.start_as("worker").await);
            }
        }
    }

    /// Nothing is refused that could have been taken: none is given up by its sender, for one gateway can always take it; and while only
    /// RabbitMQ or Redis is ill, no request at all is refused. Memory stays within what is promised.
    fn judge(&mut self, faults: &[Fault], name: &str, failed: u64, given_up: u64) {
        const PROMISED: u64 = (256 + 128) << 20;
        let ill = ALL.iter().filter(|(fault, _)| faults.contains(fault)).flat_map(|(_, parts)| parts.iter());
        if failed > 0 && !ill.clone().any(|part| *part == Part::Process) {
            self.broken.push(format!("{name}: {failed} requests refused, though each gateway and its disk were well"));
        }
        if given_up > 0 {
            self.broken
                .push(format!("{name}: {given_up} events given up by their sender, though one gateway was well"));
        }
        let peak = self.peak_memory();
        if peak > PROMISED {
            self.broken.push(format!("{name}: {} MiB of memory", peak >> 20));
        }
    }

    pub fn promises_were_kept(&self) {
        assert!(self.broken.is_empty(), "{}", self.broken.join("\n"));
    }

    fn signal_workers(&self, signal: Signal) {
        for (_, server) in &self.workers {
            if let Some(server) = server {
                server.signal(signal);
            }
        }
    }

    /// Waits until what is accepted by now is handled.
    async fn handled(&self, when: &str) {
        let accepted = self.load.ledger.accepted_ids();
        eventually(&format!("all is handled {when}"), || async { accepted.is_subset(&self.service.ids()) }).await;
    }

    fn peak_memory(&self) -> u64 {
        let servers = self.gateways.iter().filter_map(|(_, server)| server.as_ref());
        servers.map(Server::peak_resident_bytes).max().unwrap_or(0)
    }

    /// Makes the faults, lets traffic flow, heals, and waits until all is well; one line of the table.
    pub async fn suffer(&mut self, faults: &[Fault], events: usize) -> String {
        let ledger = std::sync::Arc::clone(&self.load.ledger);
        let count = |of: &std::sync::atomic::AtomicU64| of.load(Ordering::Relaxed);
        let (requests, failed, given_up) = (count(&ledger.requests), count(&ledger.failed), count(&ledger.refused));
        let (repeats, again, spooled) = (self.service.repeats(), self.published_again, self.spooled().await);
        for fault in faults {
            self.strike(*fault).await;
        }
        self.flows(&format!("{faults:?}"), events).await;
        for fault in faults {
            self.heal(*fault).await;
        }
        let healed = Instant::now();
        self.handled(&format!("after {faults:?}")).await;
        eventually(&format!("the spools are handed over after {faults:?}"), || async {
            let mut well = true;
            for (_, server) in &self.gateways {
                well &= server.as_ref().unwrap().publishes().await;
            }
            well
        })
        .await;
        let recovered = healed.elapsed();
        let (requests, failed) = (count(&ledger.requests) - requests, count(&ledger.failed) - failed);
        let repeats = self.service.repeats() - repeats;
        self.count_published().await;
        // Those of a process that was killed are not counted.
        let spooled = (self.spooled().await - spooled).max(0.0);
        let name = faults.iter().map(|fault| format!("{fault:?}")).collect::<Vec<_>>().join(" + ");
        self.judge(faults, &name, failed, count(&ledger.refused) - given_up);
        format!(
            "{name:<46} {requests:>8} {:>7.2} {spooled:>8} {:>11} {repeats:>8} {:>9.1} {:>8}",
            100.0 - failed as f64 * 100.0 / requests as f64,
            self.published_again - again,
            recovered.as_secs_f64(),
            self.peak_memory() >> 20,
        )
    }
}

async fn kill((_, server): &mut (Site, Option<Server>)) {
    if let Some(server) = server.take() {
        server.kill().await;
    }
}

async fn restart((site, server): &mut (Site, Option<Server>), service: &str) {
    *server = Some(site.start_as(service).await);
}
