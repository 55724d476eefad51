//! Which processes run: one hash, a field for each process, with the time of its last heartbeat by Redis's clock.

use super::link::{Redis, millis};
use redis::Script;
use std::collections::BTreeMap;
use streamgate_core::instance::{GONE_AFTER, Instance};
use streamgate_core::ports::{Instances, StoreError};

/// Removes processes that are gone, keeps this one if it is given, and returns those that are left. One key, so that a cluster
/// takes it.
const BEAT: &str = "
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local fields = redis.call('HGETALL', KEYS[1])
for i = 1, #fields, 2 do
  local at = tonumber(string.match(fields[i + 1], '^%d+'))
  if not at or now - at > tonumber(ARGV[1]) then redis.call('HDEL', KEYS[1], fields[i]) end
end
if ARGV[2] then
  redis.call('HSET', KEYS[1], ARGV[2], string.format('%d ', now) .. ARGV[3])
  redis.call('PEXPIRE', KEYS[1], ARGV[1])
end
return redis.call('HGETALL', KEYS[1])
";

/// The processes under one prefix.
#[derive(Debug)]
pub struct RedisInstances {
    redis: Redis,
    key: String,
    beat: Script,
}

impl RedisInstances {
    pub fn new(redis: Redis) -> RedisInstances {
        let key = redis.name("instances");
        RedisInstances { redis, key, beat: Script::new(BEAT) }
    }
}

impl Instances for RedisInstances {
    async fn beat(&self, instance: &Instance) -> Result<(), StoreError> {
        let mut script = self.beat.key(&self.key);
        script.arg(millis(GONE_AFTER)).arg(&instance.id).arg(instance.to_json());
        self.redis.script::<BTreeMap<String, String>>(&script).await.map(drop)
    }

    async fn leave(&self, id: &str) -> Result<(), StoreError> {
        self.redis.command::<i64>(redis::cmd("HDEL").arg(&self.key).arg(id)).await.map(drop)
    }

    async fn list(&self) -> Result<Vec<Instance>, StoreError> {
        let mut script = self.beat.key(&self.key);
        script.arg(millis(GONE_AFTER));
        let found: BTreeMap<String, String> = self.redis.script(&script).await?;
        Ok(found.values().filter_map(|value| Instance::parse(value.split_once(' ')?.1)).collect())
    }
}
