//! The addresses and credentials of RabbitMQ and Redis, used from the next connection on.

use super::{address, endpoint};
use crate::reload::Part;
use anyhow::Context;
use streamgate_service::config::Config;
use streamgate_store::rabbitmq::Endpoint;
use streamgate_store::redis::Redis;

/// RabbitMQ's address and credentials.
#[derive(Debug)]
struct RabbitMq(Endpoint);

impl Part for RabbitMq {
    fn name(&self) -> &'static str {
        "RabbitMQ's address and credentials"
    }

    fn reload(&mut self, config: &Config, _asked: bool) -> anyhow::Result<bool> {
        Ok(self.0.replace(&endpoint(config).context("rabbitmq.url")?))
    }
}

/// Redis's address and credentials.
#[derive(Debug)]
struct RedisServer(Redis);

impl Part for RedisServer {
    fn name(&self) -> &'static str {
        "Redis's address and credentials"
    }

    fn reload(&mut self, config: &Config, _asked: bool) -> anyhow::Result<bool> {
        Ok(self.0.replace(address(config).context("redis.url")?))
    }
}

/// The parts of either service that are reloaded with the configuration.
pub(super) fn parts(endpoint: Endpoint, redis: Redis) -> [Box<dyn Part>; 2] {
    [Box::new(RabbitMq(endpoint)), Box::new(RedisServer(redis))]
}
