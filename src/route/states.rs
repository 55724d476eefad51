//! Where the routes' records and parked events are kept: in the data directory, or in Redis and RabbitMQ.

use crate::backends::rabbitmq as backend;
use anyhow::{Context, bail};
use std::collections::BTreeMap;
use std::time::Duration;
use streamgate_core::ports::{RouteRecords, StoreError};
use streamgate_core::route_record::{Records, RouteRecord};
use streamgate_service::config::{Config, StoreKind};
use streamgate_store::rabbitmq::{self, Endpoint, Topology};
use streamgate_store::redis::{Redis, RedisRoutes};
use streamgate_store::sqlite::RouteRecordsFile;
use tokio::time::Instant;

/// How long to wait for Redis, and the interval between tries.
const REDIS_TIMEOUT: Duration = Duration::from_secs(5);
const RETRY_INTERVAL: Duration = Duration::from_millis(50);

pub(crate) enum RouteStates {
    Embedded(RouteRecordsFile),
    Services { routes: RedisRoutes, endpoint: Endpoint, topology: Topology },
}

impl RouteStates {
    /// Starts to connect to Redis, unless the store is embedded. Call within a tokio runtime.
    pub(crate) fn of(config: &Config) -> anyhow::Result<RouteStates> {
        Ok(match config.store.kind {
            StoreKind::Embedded => RouteStates::Embedded(RouteRecordsFile::open(&config.store.data_dir)?),
            StoreKind::RabbitMq => {
                let address = backend::address(config).context("redis.url")?;
                let redis = Redis::start(address, &config.redis.prefix, config.redis.timeout);
                let endpoint = backend::endpoint(config).context("rabbitmq.url")?;
                let topology = backend::topology(config);
                RouteStates::Services { routes: RedisRoutes::new(redis), endpoint, topology }
            }
        })
    }

    /// Whether only commands like this one write records.
    pub(super) fn is_alone(&self) -> bool {
        matches!(self, RouteStates::Embedded(_))
    }

    pub(crate) async fn read(&self) -> Result<Records, StoreError> {
        match self {
            RouteStates::Embedded(file) => file.read().await,
            RouteStates::Services { routes, .. } => until_there(|| routes.read()).await,
        }
    }

    pub(super) async fn write(&self, route: &str, record: &RouteRecord) -> Result<bool, StoreError> {
        match self {
            RouteStates::Embedded(file) => file.write(route, record).await,
            RouteStates::Services { routes, .. } => until_there(|| routes.write(route, record)).await,
        }
    }

    /// How many events are parked, by route.
    pub(crate) async fn parked(&self, names: &[String]) -> anyhow::Result<BTreeMap<String, u64>> {
        match self {
            RouteStates::Embedded(file) => {
                let counts = file.parked().await?.into_iter();
                Ok(counts.map(|(route, events)| (route, u64::try_from(events).unwrap_or_default())).collect())
            }
            RouteStates::Services { endpoint, topology, .. } => match rabbitmq::parked(endpoint, topology, names).await
            {
                Ok(counts) => Ok(counts.into_iter().collect()),
                Err(why) => bail!(why),
            },
        }
    }
}

/// Retries while the connection to Redis is being opened.
pub(crate) async fn until_there<T, F: Future<Output = Result<T, StoreError>>>(
    ask: impl Fn() -> F,
) -> Result<T, StoreError> {
    let until = Instant::now() + REDIS_TIMEOUT;
    loop {
        match ask().await {
            Err(_) if Instant::now() < until => tokio::time::sleep(RETRY_INTERVAL).await,
            result => return result,
        }
    }
}
