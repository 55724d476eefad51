//! Bodies of hooks, and the answers of services: the answer that Stream gets is always JSON.
#![no_main]

use libfuzzer_sys::fuzz_target;
use streamgate_core::hook::{OnFailure, SignedCommand, command, fallback, is_answer, is_command_name};

fuzz_target!(|data: &[u8]| {
    is_answer(data);
    let text = String::from_utf8_lossy(data);
    for body in [data, &[b"{\"message\":", data, b"}"].concat()] {
        if let SignedCommand::Name(name) = command(body) {
            assert!(is_command_name(&name));
        }
        assert!(is_answer(&fallback(OnFailure::Allow, &text, body)));
        assert!(is_answer(&fallback(OnFailure::Reject, &text, body)));
    }
});
