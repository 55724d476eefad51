//! The headers of an event, as RabbitMQ may hold them: any values can be read, and are read back as they were written.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use streamgate_core::envelope::{Envelope, Properties, header};
use streamgate_core::id::Kind;

const NAMES: [&str; 12] = [
    header::WEBHOOK_ID,
    header::WEBHOOK_ATTEMPT,
    header::API_KEY,
    header::SIGNATURE,
    header::VERSION,
    header::KEY,
    header::RECEIVED_AT,
    header::ATTEMPT,
    header::CID,
    header::ROUTE,
    header::REPLAY,
    header::TRACEPARENT,
];

fuzz_target!(|text: &str| {
    let lines: Vec<_> = text.lines().collect();
    let header = |name: &str| lines.get(NAMES.iter().position(|known| *known == name)?).copied();
    let properties = || Properties { app: "chat".into(), kind: Kind::Push, id: "id".into(), event_type: "a.b".into() };
    let read = Envelope::restore(properties(), header, Bytes::new());
    let written = read.headers();
    let again = Envelope::restore(
        properties(),
        |name| written.iter().find(|(known, _)| *known == name).map(|(_, value)| &**value),
        Bytes::new(),
    );
    assert_eq!(again, read);
});
