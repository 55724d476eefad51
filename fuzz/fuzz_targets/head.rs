//! The checks of a head before its body: the headers' forms, the key, the peer.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::net::IpAddr;
use streamgate_core::admission::{Facts, Limits, Single, admit};
use streamgate_core::apps::{AppKey, Apps};
use streamgate_core::envelope::safe_traceparent;
use streamgate_core::id::{MAX_ID, header_id};
use streamgate_core::peer::{Networks, Peers};
use streamgate_core::signature::SigningKey;

fuzz_target!(|data: &[u8]| {
    let mut lines = data.split(|byte| *byte == b'\n');
    let mut next = || lines.next().unwrap_or_default();
    let mut apps = Apps::default();
    apps.insert("key".to_owned(), AppKey { app: "chat".into(), secrets: vec![SigningKey::new(b"secret")] });
    let facts = Facts {
        api_key: Single::One(next()),
        signature: Single::One(next()),
        content_encoding: Some(next()),
        content_length: None,
    };
    if let Ok(admitted) = admit(&facts, &apps, &Limits { max_body: 100 }) {
        assert_eq!(admitted.api_key, "key");
    }
    if let Some(id) = header_id(Some(next())) {
        assert!(id.len() <= MAX_ID && id.bytes().all(|byte| (0x20..=0x7e).contains(&byte)));
    }
    safe_traceparent(Some(next()));
    let trusted = Networks::parse(&["10.0.0.0/8".to_owned()]).ok();
    let peers = Peers { trusted_proxies: trusted, ..Peers::default() };
    let forwarded = [next(), next()];
    let stranger = IpAddr::from([192, 0, 2, 1]);
    assert_eq!(
        peers.client(stranger, forwarded.into_iter()).address,
        stranger,
        "only a trusted proxy can name another client"
    );
    peers.client(IpAddr::from([10, 0, 0, 1]), forwarded.into_iter());
});
