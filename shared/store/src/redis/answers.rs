//! First answers to hooks, so that a repeat gets the same answer at any gateway. `W` marks a hook that is in work, `A`
//! stands before an answer.

use super::link::{Redis, millis};
use bytes::Bytes;
use redis::{ExistenceCheck, Script, SetExpiry, SetOptions};
use std::time::Duration;
use streamgate_core::id::fingerprint;
use streamgate_core::ports::{Answers, CallState, StoreError};

/// How long after its deadline the first call may take to have its answer kept.
const KEEP_GRACE: Duration = Duration::from_secs(1);
const IN_WORK: u8 = b'W';
const ANSWER: u8 = b'A';

/// The first answer stays; later ones are ignored.
const REMEMBER: &str = "
local found = redis.call('GET', KEYS[1])
if found and string.sub(found, 1, 1) == 'A' then return end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
";

/// An answer that another gateway has stored stays.
const FORGET: &str = "
if redis.call('GET', KEYS[1]) == 'W' then redis.call('DEL', KEYS[1]) end
";

/// Answers of all gateways on one Redis.
#[derive(Debug)]
pub struct RedisAnswers {
    redis: Redis,
    remember: Script,
    forget: Script,
}

impl RedisAnswers {
    pub fn new(redis: Redis) -> RedisAnswers {
        RedisAnswers { redis, remember: Script::new(REMEMBER), forget: Script::new(FORGET) }
    }

    fn place(&self, key: &str) -> String {
        self.redis.key("answer", fingerprint(key))
    }
}

impl Answers for RedisAnswers {
    async fn begin(&self, key: &str, within: Duration) -> Result<CallState, StoreError> {
        // Two commands in one round trip: cheaper for Redis than a script, and the single command for both (SET NX GET)
        // needs Redis 7.
        let place = self.place(key);
        let mark = SetOptions::default()
            .conditional_set(ExistenceCheck::NX)
            .with_expiration(SetExpiry::PX(millis(within + KEEP_GRACE)));
        let mut asked = redis::pipe();
        asked.set_options(&place, &[IN_WORK], mark).get(&place);
        let (marked, found): (Option<()>, Option<Vec<u8>>) = self.redis.pipeline(&asked).await?;
        if marked.is_some() {
            return Ok(CallState::First);
        }
        match found.as_deref().and_then(<[u8]>::split_first) {
            // `None`: the mark expired between the two commands. The next caller will be the first.
            None | Some((&IN_WORK, _)) => Ok(CallState::InWork),
            Some((&ANSWER, answer)) => Ok(CallState::Answered(Bytes::copy_from_slice(answer))),
            Some(_) => Err(StoreError::Unavailable("Redis holds an invalid answer".to_owned())),
        }
    }

    async fn remember(&self, key: &str, answer: Bytes, window: Duration) -> Result<(), StoreError> {
        let value = [&[ANSWER], &answer[..]].concat();
        let mut script = self.remember.key(self.place(key));
        script.arg(value).arg(millis(window));
        self.redis.script(&script).await
    }

    async fn forget(&self, key: &str) -> Result<(), StoreError> {
        self.redis.script(&self.forget.key(self.place(key))).await
    }
}
