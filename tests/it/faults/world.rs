//! Two gateways and two workers under load, how each fault is made and ended, and the counts meanwhile.

mod strike;

use super::Fault::{self, *};
use super::{ALL, Part};
use crate::harness::eventually;
use crate::harness::fleet::Fleet;
use crate::harness::ledger::Load;
use crate::harness::process::{Server, Site};
use crate::harness::proxy::Proxy;
use crate::harness::receiver::Receiver;
use crate::harness::servers::Backends;
use crate::harness::volume::Volume;
use lapin::options::{BasicGetOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use rusqlite::Connection;
use rustix::process::Signal;
use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio_util::task::AbortOnDropHandle;

const SENDERS: usize = 10;
/// Time between two events of a sender: 100 events a second altogether.
const PACE: Duration = Duration::from_millis(100);

pub struct World {
    backends: Backends,
    proxy: Proxy,
    pub service: Receiver,
    prefix: String,
    pub gateways: Vec<(Site, Option<Server>)>,
    pub workers: Vec<(Site, Option<Server>)>,
    pub load: Load,
    /// The first gateway's disk; `None` where the tests may not mount one.
    volume: Option<Volume>,
    /// Holds the write lock of the first gateway's spool.
    lock: Option<Connection>,
    /// Holds that lock most of the time.
    slowness: Option<AbortOnDropHandle<()>>,
    /// Ids that gateways have published, and how often one was published again.
    published: HashSet<String>,
    published_again: u64,
    /// Promises that were broken: reported at the end, when the table is whole.
    broken: Vec<String>,
}

impl World {
    pub async fn start(seed: u64) -> World {
        let (backends, service) = (Backends::start().await, Receiver::willing().await);
        let proxy = Proxy::start(backends.broker.port, seed).await;
        let mut fleet = Fleet::new(&backends, &service);
        let (direct, proxied) = (format!(":{}/%2f", backends.broker.port), format!(":{}/%2f?heartbeat=1", proxy.port));
        fleet.tables = backends.impatient_tables(&fleet.prefix).replace(&direct, &proxied);
        // A short timeout, since an unsettled event comes back once its holder's lease is over; a small prefetch, so that the queue
        // can be full.
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
        // After a kill a classic queue would bring back messages that were read.
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
        channel.queue_declare(world.audit().into(), options, arguments).await.unwrap();
        world.audits(true).await;
        // A RabbitMQ that is killed in its first moments may forget its queues; once they have confirmed events it keeps them.
        world.flows("before the first fault", super::WHILE).await;
        world
    }

    /// Whether this machine lets the tests make the fault.
    pub fn can(&self, fault: Fault) -> bool {
        !matches!(fault, SpoolFull | SpoolReadOnly) || self.volume.is_some()
    }

    /// A queue that gets a copy of every event that gateways publish.
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

    /// Reads the copies, and counts the ids that were published before.
    async fn count_published(&mut self) {
        let (_connection, channel) = self.backends.broker.channel().await;
        let audit = self.audit();
        while let Some(copy) = channel.basic_get(audit.as_str().into(), BasicGetOptions { no_ack: true }).await.unwrap()
        {
            let id = copy.properties.message_id().as_ref().unwrap().to_string();
            self.published_again += u64::from(!self.published.insert(id));
        }
    }

    /// How many answers of the running gateways named the spool.
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

    /// Checks that no event was refused that could have been taken: no sender has given one up, since one gateway can always take it;
    /// and no request was refused while only RabbitMQ or Redis was ill. Memory must stay within the promised bound.
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

    /// Waits until all events accepted so far are handled.
    async fn handled(&self, when: &str) {
        let accepted = self.load.ledger.accepted_ids();
        eventually(&format!("all is handled {when}"), || async { accepted.is_subset(&self.service.ids()) }).await;
    }

    fn peak_memory(&self) -> u64 {
        let servers = self.gateways.iter().filter_map(|(_, server)| server.as_ref());
        servers.map(Server::peak_resident_bytes).max().unwrap_or(0)
    }

    /// Makes the faults, lets traffic flow, heals, and waits until all is well. Returns a line of the table.
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
        // The counts of a killed process are lost.
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
