//! Redis: seen keys, claims, route records, and first answers to hooks. Every command has our own timeout. Without
//! Redis events go on, at the price of repeats, and a breaker keeps an outage from costing time.

mod address;
mod answers;
mod claims;
mod instances;
mod link;
mod routes;
mod seen;

pub use address::{Address, AddressError};
pub use answers::RedisAnswers;
pub use claims::RedisClaims;
pub use instances::RedisInstances;
pub use link::Redis;
pub use routes::RedisRoutes;
pub use seen::{OnLost, SeenKeys};

use link::Probe;

/// The oldest version that is supported.
const OLDEST: (u32, u32) = (6, 2);

/// Asks Redis for its version, and whether we may write. Leaves nothing behind.
pub async fn inspect(address: &Address, prefix: &str) -> Result<String, String> {
    let mut connection = link::ping(address).await.map_err(|error| {
        let hint = if error.contains("WRONGPASS") || error.contains("NOAUTH") || error.contains("uthentication") {
            "check user and password in redis.url"
        } else {
            "is it running, is it a Redis, and is redis.url right?"
        };
        format!("cannot use Redis at {address}: {error}; {hint}")
    })?;
    let wrong = |why: String| match why.starts_with("NOPERM") {
        true => format!("Redis at {address} does not let this user do that: {why}; grant it by ACL SETUSER"),
        false => format!("Redis at {address}: {why}"),
    };
    Probe::new(prefix).run(&mut connection).await.map_err(wrong)?;
    // A cluster replies for each node, and a user may lack the right to ask: no version is not an error.
    let info: redis::RedisResult<String> = redis::cmd("INFO").arg("server").query_async(&mut connection).await;
    let version = info.ok().and_then(|text| Some(text.split_once("redis_version:")?.1.lines().next()?.to_owned()));
    let Some(version) = version else { return Ok(format!("{address} answers")) };
    let mut numbers = version.split('.').map_while(|part| part.parse::<u32>().ok());
    if (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default()) < OLDEST {
        return Err(format!("Redis at {address} is version {version}; Streamgate needs 6.2 or later"));
    }
    Ok(format!("{address} answers, version {version}"))
}
