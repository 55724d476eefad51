//! The webhooks to send: bodies, signatures and headers, as Stream makes them.

use super::edit::Edit;
use super::samples::{Cast, Sample};
use super::{KindArg, Send};
use crate::exit::BadUsage;
use anyhow::Context;
use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};
use http_body_util::Full;
use hyper::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HeaderValue};
use hyper::{Request, Uri};
use std::io::{Read, Write};
use std::sync::atomic::{AtomicI64, Ordering};
use streamgate_core::{envelope::header, fields::Fields, peek::peek, signature::SigningKey};
use streamgate_service::secret::Secret;

/// The parts that all webhooks of a run share; each adds its own id.
#[derive(Debug)]
pub(super) struct Webhooks {
    url: Uri,
    api_key: String,
    signing: SigningKey,
    body: Body,
    gzip: bool,
    attempt: u32,
    id: Option<String>,
}

#[derive(Debug)]
enum Body {
    /// Sent unchanged.
    Given(Bytes),
    /// An event that is sent many times: each copy has its own date, or all but the first would be duplicates.
    Dated { event: Fields, began: jiff::Timestamp, sent: AtomicI64 },
    /// Generated for each webhook, with its id in the message, so that no two have the same signature.
    Made { kind: KindArg, cast: Cast, edits: Vec<Edit> },
}

impl Webhooks {
    pub(super) fn new(args: &Send, url: Uri, api_key: String, secret: &Secret) -> anyhow::Result<Webhooks> {
        let body = match &args.file {
            None => Body::Made { kind: args.kind, cast: args.cast()?, edits: args.set.clone() },
            Some(path) => {
                let body = read(path)?;
                let edits = args.edits_of_file(&body);
                Body::of_file(args, edited(body, &edits)?)
            }
        };
        let webhooks = Webhooks {
            url,
            api_key,
            signing: SigningKey::new(secret.expose().as_bytes()),
            body,
            gzip: args.gzip,
            attempt: args.attempt,
            id: args.id.clone(),
        };
        // A body that cannot be made is a usage error, reported before anything is sent.
        webhooks.request()?;
        Ok(webhooks)
    }

    /// The next webhook, and its id.
    pub(super) fn request(&self) -> anyhow::Result<(String, Request<Full<Bytes>>)> {
        let unique = unique_id()?;
        let body = match &self.body {
            Body::Given(body) => body.clone(),
            Body::Dated { event, began, sent } => {
                let mut event = event.clone();
                let at = *began + jiff::SignedDuration::from_nanos(sent.fetch_add(1, Ordering::Relaxed));
                event.set("created_at", &at.to_string().into());
                event.to_json().into()
            }
            // With a given id the body must stay the same, or a repeat would be another event.
            Body::Made { kind, cast, edits } => {
                let (id, now) = match &self.id {
                    Some(id) => (id, None),
                    None => (&unique, Some(jiff::Timestamp::now())),
                };
                edited(Sample { cast, id, now }.body(*kind).to_string().into(), edits)?
            }
        };
        let signature = self.signing.sign(&body).to_hex();
        let id = self.id.clone().unwrap_or(unique);
        let mut request = Request::post(self.url.clone())
            .header(CONTENT_TYPE, "application/json")
            .header(header::API_KEY, &self.api_key)
            .header(header::SIGNATURE, signature)
            .header(header::WEBHOOK_ID, &id)
            .header(header::WEBHOOK_ATTEMPT, self.attempt);
        let body = if self.gzip {
            request = request.header(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
            let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
            encoder.write_all(&body).and_then(|()| encoder.finish()).context("cannot compress the body")?.into()
        } else {
            body
        };
        let request = request.header(CONTENT_LENGTH, body.len());
        let request = request.body(Full::new(body)).context("this API key is not valid in a header")?;
        Ok((id, request))
    }
}

impl Body {
    /// A body is sent byte for byte if it is sent once. Warns if every copy would be the same event.
    fn of_file(args: &Send, body: Bytes) -> Body {
        let is_dated = peek(&body).created_at_ms.is_some();
        if args.count == 1 || args.kind != KindArg::Push || !is_dated {
            return Body::Given(body);
        }
        let keeps_its_date = args.id.is_some() || args.set.iter().any(|edit| edit.is_of("created_at"));
        match Fields::parse(&body).filter(|_| !keeps_its_date) {
            Some(event) => Body::Dated { event, began: jiff::Timestamp::now(), sent: AtomicI64::new(0) },
            None => {
                tracing::warn!("the same event is sent each time: all but the first are repeats of it");
                Body::Given(body)
            }
        }
    }
}

fn edited(body: Bytes, edits: &[Edit]) -> anyhow::Result<Bytes> {
    edits.iter().try_fold(body, |body, edit| Ok(edit.apply(&body).map_err(BadUsage)?.into()))
}

fn read(path: &std::path::Path) -> anyhow::Result<Bytes> {
    if path.as_os_str() == "-" {
        let mut body = Vec::new();
        std::io::stdin().read_to_end(&mut body).context("cannot read the body from stdin")?;
        return Ok(body.into());
    }
    let body = std::fs::read(path).with_context(|| format!("cannot read the body from {}", path.display()))?;
    Ok(body.into())
}

/// A random UUID (version 4), like Stream's ids.
fn unique_id() -> anyhow::Result<String> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| anyhow::anyhow!("no random bytes: {error}"))?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let text = hex::encode(bytes);
    Ok([&text[..8], &text[8..12], &text[12..16], &text[16..20], &text[20..]].join("-"))
}
