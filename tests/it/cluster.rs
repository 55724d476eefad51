//! A cluster of three RabbitMQ nodes that loses the leader of its queue, then a minority of its nodes, then the majority.

use crate::harness::broker::Cluster;
use crate::harness::eventually;
use crate::harness::fleet::Fleet;
use crate::harness::ledger::Load;
use crate::harness::process::Site;
use crate::harness::proxy::Proxy;
use crate::harness::receiver::Receiver;
use crate::harness::servers::RedisServer;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How many events are accepted in each state of the cluster.
const WHILE: usize = 150;

#[tokio::test(flavor = "multi_thread")]
async fn losing_the_leader_a_minority_and_the_majority_of_a_cluster_costs_no_event() {
    let (mut cluster, redis) = tokio::join!(Cluster::start(), RedisServer::start());
    let service = Receiver::willing().await;
    // Like a load balancer in front of the nodes.
    let proxy = Proxy::over(cluster.nodes.iter().map(|node| node.port).collect(), 1).await;
    let prefix = Site::new().name();
    let tables = format!(
        "[rabbitmq]\nurl = \"amqp://guest:guest@127.0.0.1:{}/%2f?heartbeat=2\"\nprefix = \"{prefix}\"\n\
         [redis]\nurl = \"{}\"\nprefix = \"{prefix}\"\ntimeout = \"2s\"\n",
        proxy.port,
        redis.url()
    );
    let worker = format!("handler_timeout = \"1s\"\nretry = [{}]", ["\"100ms\""; 30].join(", "));
    let fleet = Fleet { prefix: prefix.clone(), tables, rest: service.route(), worker };
    let gateways = [fleet.gateway().await, fleet.gateway().await];
    let _workers = [fleet.worker().await, fleet.worker().await];
    let targets = gateways.iter().map(|(_, server)| server.public).collect();
    let load = Load::paced(targets, 10, None, Duration::from_millis(100));
    let flows = async |what: &str| {
        let before = load.ledger.accepted();
        eventually(&format!("traffic flows: {what}"), || async { load.ledger.accepted() >= before + WHILE }).await;
    };
    let handed_over = async |when: &str| {
        let accepted = load.ledger.accepted_ids();
        let started = std::time::Instant::now();
        eventually(&format!("all is handled {when}"), || async { accepted.is_subset(&service.ids()) }).await;
        eventually(&format!("both gateways publish {when}"), || async {
            let mut well = true;
            for (_, gateway) in &gateways {
                well &= gateway.publishes().await;
            }
            well
        })
        .await;
        println!("{when}: all is handed over after {:.1} s", started.elapsed().as_secs_f64());
    };
    let path = format!("queues/%2f/{prefix}.events?columns=leader,members");
    let queue = cluster.nodes[0].manage("GET", &path, "").await;
    let queue: serde_json::Value = serde_json::from_str(&queue).unwrap();
    assert_eq!(queue["members"].as_array().unwrap().len(), 3, "{queue}");
    let leader = cluster.nodes.iter().position(|node| queue["leader"] == node.node()).unwrap();
    flows("with three nodes").await;
    cluster.nodes[leader].kill();
    flows("without the leader").await;
    handed_over("with two of three nodes, without the leader").await;
    cluster.nodes[leader].restart().await;
    let (one, two) = ((leader + 1) % 3, (leader + 2) % 3);
    cluster.nodes[one].kill();
    flows("without a minority").await;
    handed_over("with two of three nodes, the old leader among them").await;
    cluster.nodes[two].kill();
    flows("without the majority").await;
    cluster.nodes[one].restart().await;
    cluster.nodes[two].restart().await;
    handed_over("with three nodes again").await;
    let ledger = load.stop().await;
    let repeats = ledger.prove(&service).await;
    println!("{} events accepted, 0 lost, {repeats} deliveries repeated", ledger.accepted());
    assert_eq!(ledger.failed.load(Ordering::Relaxed), 0, "every attempt was answered 200");
}
