//! A body from the wire, in pieces: a body that passes was signed, and nothing grows beyond its bounds.
#![no_main]

use libfuzzer_sys::fuzz_target;
use streamgate_core::inflate::{Checked, Declared, Whole, WireBody};
use streamgate_core::signature::{SigningKey, Verifier};

const LIMIT: usize = 1 << 20;

fuzz_target!(|data: &[u8]| {
    let Some((size, wire)) = data.split_first() else { return };
    let declared = [Declared::Plain, Declared::Deflate, Declared::Brotli][usize::from(*size) % 3];
    let key = SigningKey::new(b"secret");
    // Signed as it is, so that plain bodies pass.
    let verifier = Verifier::new(std::slice::from_ref(&key), key.sign(wire));
    let mut body = WireBody::new(verifier, declared, LIMIT);
    for piece in wire.chunks(usize::from(*size).max(1)) {
        if body.push(piece).is_err() {
            return;
        }
    }
    match body.finish() {
        Ok(Whole::Signed(bytes)) => assert_eq!(bytes, wire),
        Ok(Whole::Compressed(compressed)) => {
            let Ok(mut check) = compressed.check(LIMIT) else { return };
            let passed = loop {
                match check.step() {
                    Ok(None) => {}
                    Ok(Some(checked)) => break checked,
                    Err(_) => return,
                }
            };
            // A body that inflates to itself is signed as well.
            match passed {
                Checked::Short(bytes) => assert_eq!(bytes, wire),
                Checked::Long { length, .. } => assert_eq!(length, wire.len()),
            }
        }
        Err(_) => {}
    }
});
