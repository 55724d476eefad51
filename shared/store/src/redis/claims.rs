//! The state machine of `streamgate_core::claim` as scripts, one round trip each, by Redis's own clock. A state is text:
//! `L attempt holder until_ms`, `R attempt`, `D` or `X`; a test holds each script against the pure functions.

use super::link::{Redis, millis};
use redis::Script;
use std::time::Duration;
use streamgate_core::claim::{Conclusion, Verdict};
use streamgate_core::id::fingerprint;
use streamgate_core::ports::{Claims, StoreError};

/// Shared by all scripts: the state as a list of words, and the time.
const COMMON: &str = "
local state = {}
for word in string.gmatch(redis.call('GET', KEYS[1]) or '', '%S+') do state[#state + 1] = word end
local function now()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
local function record(text) redis.call('SET', KEYS[1], text, 'PX', ARGV[#ARGV]) end
local function leased(attempt, holder, lease)
  record(table.concat({'L', attempt, holder, string.format('%.0f', now() + lease)}, ' '))
end
";

const CLAIM: &str = "
local attempt, holder, lease = ARGV[1], ARGV[2], tonumber(ARGV[3])
if state[1] == 'D' or state[1] == 'X' then return 'superseded' end
if state[1] == 'L' and tonumber(state[4]) > now() then return 'wait' end
if state[2] and tonumber(attempt) < tonumber(state[2]) then return 'superseded' end
leased(attempt, holder, lease)
return 'run'
";

const RENEW: &str = "
local holder, lease = ARGV[1], tonumber(ARGV[2])
if state[1] ~= 'L' or state[3] ~= holder then return 0 end
leased(state[2], holder, lease)
return 1
";

const CONCLUDE: &str = "
local holder, conclusion, attempt = ARGV[1], ARGV[2], ARGV[3]
if state[1] == 'D' then return end
if conclusion == 'D' then return record('D') end
if state[1] == 'X' then return end
if conclusion == 'X' then return record('X') end
if state[1] == 'L' and state[3] ~= holder then return end
if conclusion == 'R' then
  if state[1] == 'R' and tonumber(state[2]) >= tonumber(attempt) then return end
  return record('R ' .. attempt)
end
if state[1] == 'L' then redis.call('DEL', KEYS[1]) end
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

    /// Where the state of a claim stands.
    pub fn place(&self, key: &str) -> String {
        self.redis.key("claim", fingerprint(key))
    }
}

impl Claims for RedisClaims {
    async fn claim(&self, key: &str, attempt: u32, holder: u64, lease: Duration) -> Result<Verdict, StoreError> {
        let mut script = self.claim.key(self.place(key));
        // Numbers of 64 bits as text: Lua's lose their last digits.
        script.arg(attempt).arg(holder.to_string()).arg(millis(lease)).arg(self.window_ms.max(millis(lease)));
        let told: String = self.redis.script(&script).await?;
        match told.as_str() {
            "run" => Ok(Verdict::Run),
            "wait" => Ok(Verdict::Wait),
            "superseded" => Ok(Verdict::Superseded),
            _ => Err(StoreError::Unavailable("Redis answered what no claim can be".to_owned())),
        }
    }

    async fn renew(&self, key: &str, holder: u64, lease: Duration) -> Result<bool, StoreError> {
        let mut script = self.renew.key(self.place(key));
        script.arg(holder.to_string()).arg(millis(lease)).arg(self.window_ms.max(millis(lease)));
        self.redis.script(&script).await
    }

    async fn conclude(&self, key: &str, holder: u64, conclusion: Conclusion) -> Result<(), StoreError> {
        let (word, attempt) = match conclusion {
            Conclusion::Done => ("D", 0),
            Conclusion::Dead => ("X", 0),
            Conclusion::Retrying { attempt } => ("R", attempt),
            Conclusion::Released => ("F", 0),
        };
        let mut script = self.conclude.key(self.place(key));
        script.arg(holder.to_string()).arg(word).arg(attempt).arg(self.window_ms);
        self.redis.script(&script).await
    }
}
