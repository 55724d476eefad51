//! Gateways and workers as processes of their own, on one pair of backends.

use super::process::{Server, Setup, Site};
use super::receiver::Receiver;
use super::servers::Backends;
use std::net::SocketAddr;

/// Sites of processes that share backends, by one prefix.
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

    pub fn site(&self, listen: Option<SocketAddr>) -> Site {
        let site = Site::new();
        self.configure(&site, listen);
        site
    }

    pub fn configure(&self, site: &Site, listen: Option<SocketAddr>) {
        let mut setup = Setup::default();
        setup.listen = listen.unwrap_or(setup.listen);
        site.configure(&Setup {
            worker: self.worker.clone(),
            rest: format!("{}\n{}", self.rest, self.tables),
            ..setup
        });
    }

    pub async fn gateway(&self) -> (Site, Server) {
        let site = self.site(None);
        let server = site.start_as("gateway").await.ready().await;
        // A restart comes back on the same port.
        self.configure(&site, Some(server.public));
        (site, server)
    }

    pub async fn worker(&self) -> (Site, Server) {
        let site = self.site(None);
        let server = site.start_as("worker").await.ready().await;
        (site, server)
    }
}
