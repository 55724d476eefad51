//! A configuration file: mistakes are reported, and nothing panics.
#![no_main]

use libfuzzer_sys::fuzz_target;
use streamgate_service::config::{Environment, from_text};

fuzz_target!(|text: &str| {
    // A `file:` reference would read a file of this machine.
    if !text.contains("file:") {
        let environment =
            Environment::of([("STREAM_API_KEY", "key"), ("STREAM_API_SECRET", "a secret of some length")]);
        if let Err(error) = from_text(None, Some(text), &environment) {
            assert!(!error.to_string().is_empty());
        }
    }
});
