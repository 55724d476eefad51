//! Options that every command shares: the configuration and the logs.

use crate::backends;
use clap::{Args, ValueEnum};
use std::path::PathBuf;
use streamgate_service::config::{self, ConfigError, Environment, Loaded, Source};
use streamgate_service::telemetry::{self, FilterError, Host, LogFormat};

const GLOBAL: &str = "Global options";

#[derive(Clone, Debug, Args)]
pub struct Global {
    /// The TOML file to read
    #[arg(long, global = true, value_name = "FILE", help_heading = GLOBAL)]
    pub config: Option<PathBuf>,
    /// Overrides store.data_dir
    #[arg(long, global = true, value_name = "DIR", help_heading = GLOBAL)]
    pub data_dir: Option<PathBuf>,
    /// Format of the logs on stderr: auto is human on a terminal and JSON lines elsewhere
    #[arg(long, global = true, value_enum, value_name = "FORMAT", default_value = "auto", help_heading = GLOBAL)]
    pub log_format: LogFormatArg,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum LogFormatArg {
    Auto,
    Human,
    Json,
}

impl Global {
    /// STREAMGATE_LOG sets the filter, in the syntax of RUST_LOG; the default is `info`.
    pub fn start_logs(&self) -> Result<(), FilterError> {
        let format = match self.log_format {
            LogFormatArg::Auto => LogFormat::Auto,
            LogFormatArg::Human => LogFormat::Human,
            LogFormatArg::Json => LogFormat::Json,
        };
        telemetry::init(format, std::env::var("STREAMGATE_LOG").ok().as_deref(), Host::Ours)
    }

    pub fn source(&self) -> Source {
        Source { file: self.config.clone(), environment: Environment::of_process() }
    }

    pub fn load(&self) -> Result<Loaded, ConfigError> {
        self.load_from(&self.source())
    }

    /// Loads the configuration for commands that need no secret.
    pub fn load_without_secrets(&self) -> Result<Loaded, ConfigError> {
        let source = self.source();
        self.load_from(&Source { environment: source.environment.without_secrets(), ..source })
    }

    pub fn load_from(&self, source: &Source) -> Result<Loaded, ConfigError> {
        let loaded = self.load_quietly(source)?;
        loaded.log_doubts();
        Ok(loaded)
    }

    /// Loads the configuration for commands that show doubts elsewhere than in the log.
    pub fn load_quietly(&self, source: &Source) -> Result<Loaded, ConfigError> {
        let mut loaded = config::load(source, backends::problems)?;
        if let Some(data_dir) = &self.data_dir {
            loaded.config.store.data_dir.clone_from(data_dir);
        }
        Ok(loaded)
    }
}
