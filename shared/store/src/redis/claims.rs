//! The state machine of `streamgate_core::claim` as scripts, one round trip each, on Redis's own clock. A state is
//! text:
//! `L attempt abandoned holder until_ms`, `R attempt abandoned`, `D` or `X`; a test holds each script against the pure
//! functions.
//! Each event has one hash, with a field for each route and life.

use super::link::{Redis, millis};
use redis::Script;
use std::time::Duration;
use streamgate_core::claim::{ClaimKey, Conclusion, Verdict};
use streamgate_core::id::fingerprint;
use streamgate_core::ports::{Claims, StoreError};

/// Shared by all scripts: the state as a list of words, and the time. The first argument is the field, the last one how
/// long the event is remembered.
const COMMON: &str = "
local state = {}
for word in string.gmatch(redis.call('HGET', KEYS[1], ARGV[1]) or '', '%S+') do state[#state + 1] = word end
local function now()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
local function record(text)
  redis.call('HSET', KEYS[1], ARGV[1], text)
  if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[#ARGV]) then redis.call('PEXPIRE', KEYS[1], ARGV[#ARGV]) end
end
local function leased(attempt, abandoned, holder, lease)
  record(table.concat({'L', attempt, abandoned, holder, string.format('%.0f', now() + lease)}, ' '))
end
";

const CLAIM: &str = "
local attempt, holder, lease = ARGV[2], ARGV[3], tonumber(ARGV[4])
if state[1] == 'D' or state[1] == 'X' then return {'superseded', 0} end
local lapsed = state[1] == 'L'
if lapsed and tonumber(state[5]) > now() then return {'wait', 0} end
local abandoned = 0
if state[2] then
  if tonumber(attempt) < tonumber(state[2]) then return {'superseded', 0} end
  if tonumber(attempt) == tonumber(state[2]) then abandoned = tonumber(state[3]) + (lapsed and 1 or 0) end
end
leased(attempt, abandoned, holder, lease)
return {'run', abandoned}
";

const RENEW: &str = "
local holder, lease = ARGV[2], tonumber(ARGV[3])
if state[1] ~= 'L' or state[4] ~= holder then return 0 end
leased(state[2], state[3], holder, lease)
return 1
";

const CONCLUDE: &str = "
local holder, conclusion, attempt = ARGV[2], ARGV[3], ARGV[4]
if state[1] == 'D' then return end
if conclusion == 'D' then return record('D') end
if state[1] == 'X' then return end
if conclusion == 'X' then return record('X') end
if state[1] == 'L' and state[4] ~= holder then return end
if conclusion == 'R' then
  if state[1] == 'R' and tonumber(state[2]) >= tonumber(attempt) then return end
  return record('R ' .. attempt .. ' 0')
end
if state[1] ~= 'L' then return end
if tonumber(state[3]) > 0 then return record('R ' .. state[2] .. ' ' .. state[3]) end
redis.call('HDEL', KEYS[1], ARGV[1])
";

/// Claims of all workers on one Redis.
#[derive(Debug)]
pub struct RedisClaims {
    redis: Redis,
    window_ms: u64,
    claim: Script,
    renew: Script,
    conclude: Script,
}

impl RedisClaims {
    /// `window`: how long a state is remembered after its last change.
    pub fn new(redis: Redis, window: Duration) -> RedisClaims {
        let script = |body| Script::new(&format!("{COMMON}{body}"));
        let (claim, renew, conclude) = (script(CLAIM), script(RENEW), script(CONCLUDE));
        RedisClaims { redis, window_ms: millis(window), claim, renew, conclude }
    }

    /// Key of the hash that holds an event's states.
    pub fn place(&self, event: &str) -> String {
        self.redis.key("claim", fingerprint(event))
    }
}

impl Claims for RedisClaims {
    async fn claim(&self, key: &ClaimKey, attempt: u32, holder: u64, lease: Duration) -> Result<Verdict, StoreError> {
        let mut script = self.claim.key(self.place(&key.event));
        // Numbers of 64 bits are passed as text: Lua's numbers would lose their last digits.
        script
            .arg(&key.life)
            .arg(attempt)
            .arg(holder.to_string())
            .arg(millis(lease))
            .arg(self.window_ms.max(millis(lease)));
        let (verdict, abandoned): (String, u32) = self.redis.script(&script).await?;
        match verdict.as_str() {
            "run" => Ok(Verdict::Run { abandoned }),
            "wait" => Ok(Verdict::Wait),
            "superseded" => Ok(Verdict::Superseded),
            _ => Err(StoreError::Unavailable("Redis returned an invalid claim".to_owned())),
        }
    }

    async fn renew(&self, key: &ClaimKey, holder: u64, lease: Duration) -> Result<bool, StoreError> {
        let mut script = self.renew.key(self.place(&key.event));
        script.arg(&key.life).arg(holder.to_string()).arg(millis(lease)).arg(self.window_ms.max(millis(lease)));
        self.redis.script(&script).await
    }

    async fn conclude(&self, key: &ClaimKey, holder: u64, conclusion: Conclusion) -> Result<(), StoreError> {
        let (word, attempt) = match conclusion {
            Conclusion::Done => ("D", 0),
            Conclusion::Dead => ("X", 0),
            Conclusion::Retrying { attempt } => ("R", attempt),
            Conclusion::Released => ("F", 0),
        };
        let mut script = self.conclude.key(self.place(&key.event));
        script.arg(&key.life).arg(holder.to_string()).arg(word).arg(attempt).arg(self.window_ms);
        self.redis.script(&script).await
    }
}
