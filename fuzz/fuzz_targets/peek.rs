//! The few fields of a body that are read, and whether it names a user.
#![no_main]

use libfuzzer_sys::fuzz_target;
use streamgate_core::envelope::{safe_cid, safe_type};
use streamgate_core::fields::Fields;
use streamgate_core::peek::peek;
use streamgate_core::user::names_user;

fuzz_target!(|body: &[u8]| {
    let found = peek(body);
    assert!(safe_type(found.event_type.as_deref()).bytes().all(|byte| byte.is_ascii_graphic()));
    safe_cid(found.cid.as_deref());
    names_user(body, "ann");
    if let Some(fields) = Fields::parse(body) {
        assert!(Fields::parse(fields.to_json().as_bytes()).is_some());
    }
});
