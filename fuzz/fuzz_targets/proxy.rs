//! The PROXY header in front of a connection: bounded, and it asks for no byte that follows it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use streamgate_core::proxy::{Header, header};

fuzz_target!(|data: &[u8]| {
    let mut length = 0;
    while let Some(read) = data.get(..length) {
        match header(read) {
            Ok(Header::Incomplete(more)) => {
                assert!(more > 0 && more <= 1024);
                length += more;
            }
            Ok(Header::Whole(_)) | Err(_) => return,
        }
    }
});
