//! Who has paused which route: one hash, a field for each route that ever had a worker.

use super::link::Redis;
use redis::Script;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use streamgate_core::ports::{RouteRecords, StoreError};
use streamgate_core::route_record::{Records, RouteRecord};

/// The record with the later epoch stays.
const WRITE: &str = "
local found = redis.call('HGET', KEYS[1], ARGV[1])
if found then
  local is_json, record = pcall(cjson.decode, found)
  if is_json and type(record) == 'table' and tonumber(record.epoch) and tonumber(record.epoch) >= tonumber(ARGV[2]) then return 0 end
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
return 1
";

/// Records of all workers on one Redis.
#[derive(Debug)]
pub struct RedisRoutes {
    redis: Redis,
    place: String,
    write: Script,
    /// Texts that are not records and were already logged.
    unreadable: Mutex<BTreeSet<String>>,
}

impl RedisRoutes {
    pub fn new(redis: Redis) -> RedisRoutes {
        let place = redis.name("routes");
        RedisRoutes { redis, place, write: Script::new(WRITE), unreadable: Mutex::default() }
    }
}

impl RouteRecords for RedisRoutes {
    /// A flush deletes the records, and other workers write them back at their next look.
    const GRACE: Duration = Duration::from_millis(500);

    async fn read(&self) -> Result<Records, StoreError> {
        let found: BTreeMap<String, String> = self.redis.command(redis::cmd("HGETALL").arg(&self.place)).await?;
        let mut unreadable = self.unreadable.lock().unwrap_or_else(PoisonError::into_inner);
        let read = |(route, json): (String, String)| {
            let record = RouteRecord::parse(&json);
            // It is read again at each look: one line is enough.
            if record.is_none() && unreadable.insert(json) {
                tracing::warn!(route, "Redis holds a route record that this version cannot read: ignored");
            }
            record.map(|record| (route, record))
        };
        Ok(found.into_iter().filter_map(read).collect())
    }

    async fn write(&self, route: &str, record: &RouteRecord) -> Result<bool, StoreError> {
        let mut script = self.write.key(&self.place);
        script.arg(route).arg(record.epoch).arg(record.to_json());
        self.redis.script(&script).await
    }
}
