//! How each fault is made, and ended.

use super::super::Fault::{self, *};
use super::{Server, Site, World};
use crate::harness::proxy::Weather;
use crate::harness::{eventually, within};
use crate::policies::Policy;
use rustix::process::Signal;
use std::process::Stdio;
use std::time::Duration;
use tokio_util::task::AbortOnDropHandle;

impl World {
    pub(super) async fn strike(&mut self, fault: Fault) {
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
                // The audit queue would take the events, and none would be without a queue.
                self.audits(false).await;
                // Events in a queue that an operator deletes are lost with it, so it must be empty.
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
                        // Fails while the gateway writes.
                        if connection.execute_batch("BEGIN IMMEDIATE").is_ok() {
                            tokio::time::sleep(Duration::from_millis(200)).await;
                            connection.execute_batch("ROLLBACK").unwrap();
                        }
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                })));
            }
            SpoolFull => {
                // Otherwise the WAL would keep its length, and commits would overwrite it without needing room.
                let truncate = "PRAGMA wal_checkpoint(TRUNCATE)";
                self.gateways[0].0.store().query_row(truncate, [], |_| Ok(())).unwrap();
                self.volume.as_ref().unwrap().fill();
            }
            SpoolReadOnly => {
                kill(&mut self.gateways[0]).await;
                self.volume.as_ref().unwrap().read_only(true);
                let refused = self.gateways[0].0.run(&["gateway"]).await;
                let errors = String::from_utf8_lossy(&refused.stderr);
                assert!(refused.status.code() == Some(1) && errors.contains("Read-only file system"), "{errors}");
            }
            BrokerAndRedisKilled => {
                self.backends.broker.kill();
                self.backends.redis.kill();
            }
            PolicyExpiresEvents | DeadLettersMoved => self.expire().await,
            PermissionsTaken => self.permit("^$").await,
            OperatorPeeks => {
                let events = format!("{}.events", self.prefix);
                crate::blame::deliver_and_drop(&self.backends.broker, &events, 12).await;
            }
            RedisReplica => drop(self.backends.redis.ask(&["REPLICAOF", "127.0.0.1", "1"]).await),
            RedisCannotSave => {
                // A directory in place of the dump file.
                std::fs::create_dir_all(self.backends.redis.dump().join("taken")).unwrap();
                let redis = &self.backends.redis;
                redis.ask(&["CONFIG", "SET", "save", "3600 1"]).await;
                redis.ask(&["BGSAVE"]).await;
                eventually("Redis could not save", || async {
                    redis.ask(&["INFO", "persistence"]).await.contains("rdb_last_bgsave_status:err")
                })
                .await;
            }
            DataDirectoryMoved => {
                let place = &self.gateways[1].0;
                std::fs::rename(place.data_dir(), place.path("moved")).unwrap();
            }
            // The pipe holds 64 KiB, and each event is more than a line.
            LogStalled => self.log_into(Stdio::piped()).await,
            LogFull => {
                let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
                self.log_into(Stdio::from(full)).await;
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

    /// Restarts a gateway that logs at trace level to `stderr`.
    async fn log_into(&mut self, stderr: Stdio) {
        let (site, server) = &mut self.gateways[1];
        assert!(server.take().unwrap().terminate().await.success());
        let mut command = site.command(&["gateway"]);
        command.env("STREAMGATE_LOG", "trace");
        *server = Some(Server::with_log(command, stderr, site).await);
    }

    /// Sets a policy that expires queued events, and waits until some are dead letters.
    async fn expire(&self) {
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

    /// Ends that policy. Returns the queue of dead letters.
    async fn expire_no_more(&self) -> String {
        self.backends.broker.manage("DELETE", "policies/%2f/expires", "").await;
        self.signal_workers(Signal::CONT);
        let events = format!("{}.events", self.prefix);
        let is_on = || Policy::is_on(&self.backends.broker, "expires", &events);
        eventually("the policy is gone", async || !is_on().await).await;
        format!("{}.dead", self.prefix)
    }

    /// Sets what the services' user may publish to, and closes its connections: new ones see the change.
    async fn permit(&self, write: &str) {
        let permissions = format!(r#"{{"configure":".*","write":"{write}","read":".*"}}"#);
        self.backends.broker.manage("PUT", "permissions/%2f/guest", &permissions).await;
        self.backends.broker.manage("DELETE", "connections/username/guest", "").await;
    }

    pub(super) async fn heal(&mut self, fault: Fault) {
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
                // A process that meets the gap, or checks the topology once a minute, declares it again; the gateways hand back
                // the events that the alternate exchange took meanwhile.
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
                eventually("the diverted events are handed back", handed_back).await;
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
                let dead = self.expire_no_more().await;
                eventually("no more events are dropped", || async {
                    let replay = ["dead", "replay", "--reason", "dropped_by_broker"];
                    self.workers[0].0.run(&replay).await.status.success()
                        && self.backends.broker.ready(&dead).await == 0
                })
                .await;
            }
            DeadLettersMoved => {
                let dead = self.expire_no_more().await;
                let events = format!("{}.events", self.prefix);
                while self.backends.broker.ready(&dead).await > 0 {
                    crate::blame::move_by_hand(&self.backends.broker, &dead, &events, 1).await;
                }
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
            LogStalled | LogFull => {
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
}

async fn kill((_, server): &mut (Site, Option<Server>)) {
    if let Some(server) = server.take() {
        server.kill().await;
    }
}

async fn restart((site, server): &mut (Site, Option<Server>), service: &str) {
    *server = Some(site.start_as(service).await);
}
