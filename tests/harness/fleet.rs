//! Gateways and workers as processes of their own, on one pair of backends.

use super::process::{Server, Setup, Site};
use super::receiver::Receiver;
use super::servers::Backends;

/// The configuration of processes that share backends and a prefix.
#[derive(Debug)]
pub struct Fleet {
    pub prefix: String,
    pub tables: String,
    pub rest: String,
    pub worker: String,
}

impl Fleet {
    pub fn new(backends: &Backends, service: &Receiver) -> Fleet {
        let prefix = Site::new().name();
        let tables = backends.tables(&prefix);
        Fleet {
            prefix,
            tables,
            rest: service.route(),
            worker: "handler_timeout = \"1s\"\nretry = [\"100ms\", \"1s\"]".into(),
        }
    }

    pub fn site(&self) -> Site {
        let site = Site::new();
        self.configure(&site, None);
        site
    }

    /// The server takes over the ports of `before`.
    fn configure(&self, site: &Site, before: Option<&Server>) {
        let mut setup = Setup::default();
        if let Some(server) = before {
            (setup.listen, setup.ops) = (server.public, server.ops);
        }
        site.configure(&Setup {
            worker: self.worker.clone(),
            rest: format!("{}\n{}", self.rest, self.tables),
            ..setup
        });
    }

    pub async fn gateway(&self) -> (Site, Server) {
        let site = self.site();
        let server = self.gateway_at(&site).await;
        (site, server)
    }

    pub async fn gateway_at(&self, site: &Site) -> Server {
        let server = site.start_as("gateway").await.ready().await;
        // A restart comes back on the same ports.
        self.configure(site, Some(&server));
        server
    }

    pub async fn worker(&self) -> (Site, Server) {
        let site = self.site();
        let server = site.start_as("worker").await.ready().await;
        (site, server)
    }
}
