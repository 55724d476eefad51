//! The apps that may send webhooks, by API key.

use crate::signature::SigningKey;
use std::collections::HashMap;
use std::sync::Arc;

/// An API key of an app, with every secret that may have signed its webhooks.
#[derive(Clone, Debug)]
pub struct AppKey {
    pub app: Arc<str>,
    pub secrets: Vec<SigningKey>,
}

/// All keys of all apps. Replaced as a whole on reload.
#[derive(Clone, Debug, Default)]
pub struct Apps {
    by_key: HashMap<String, AppKey>,
}

impl Apps {
    pub fn insert(&mut self, api_key: String, key: AppKey) {
        self.by_key.insert(api_key, key);
    }

    pub fn get(&self, api_key: &str) -> Option<&AppKey> {
        self.by_key.get(api_key)
    }

    /// The only key, for requests without an X-Api-Key: some proxies drop that header, and the signature decides anyway.
    pub fn only(&self) -> Option<(&str, &AppKey)> {
        let (api_key, key) = self.by_key.iter().next().filter(|_| self.by_key.len() == 1)?;
        Some((api_key, key))
    }
}
