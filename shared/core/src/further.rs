//! The headers of a webhook beyond the four that Stream documents: `target-agent`, which public Stream apps filter on, and
//! others that Stream may add. They are not signed, so they are passed on within bounds, except those that a service could
//! mistake for its own proxy's.

/// Most headers of a webhook that are passed on.
const MAX_HEADERS: usize = 16;
/// Most bytes of a name, of a value, and of all headers.
const MAX_NAME: usize = 64;
const MAX_VALUE: usize = 256;
const MAX_BYTES: usize = 1024;

/// Passed on although its name does not begin with `x-`.
const TARGET_AGENT: &str = "target-agent";
/// Headers that the gateway reads itself.
const READ: [&str; 4] = ["x-api-key", "x-signature", "x-webhook-attempt", "x-webhook-id"];
/// Prefix of headers that Streamgate writes itself.
const OURS: &str = "x-streamgate-";
/// Prefixes of headers in which proxies describe the client and its request: services trust these, so they must come from a
/// proxy.
const PROXIES: [&str; 35] = [
    "x-accel-",
    "x-access-",
    "x-amz",
    "x-appengine-",
    "x-arr-",
    "x-auth",
    "x-b3-",
    "x-client-",
    "x-cloud-trace-context",
    "x-cluster-client-ip",
    "x-consumer-",
    "x-credential-",
    "x-envoy-",
    "x-forwarded",
    "x-goog-",
    "x-host",
    "x-http-method",
    "x-jwt-",
    "x-matched-",
    "x-method-override",
    "x-middleware-",
    "x-ms-client-",
    "x-original-",
    "x-proxy",
    "x-real-ip",
    "x-remote-",
    "x-rewrite-",
    "x-scheme",
    "x-script-name",
    "x-sendfile-",
    "x-ssl-",
    "x-token-",
    "x-url-",
    "x-user",
    "x-webauth-",
];

/// Lower-case names with their values, each name once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FurtherHeaders(Vec<(String, String)>);

impl FurtherHeaders {
    /// The headers of a request that are passed on. `headers` have lower-case names. The first value of a name counts, and
    /// headers over the bounds are left out.
    pub fn of<'h>(headers: impl IntoIterator<Item = (&'h str, &'h [u8])>) -> FurtherHeaders {
        let (mut further, mut bytes) = (FurtherHeaders::default(), 0);
        // The known header comes first, so that headers of a proxy on the way cannot push it out.
        let (known, others): (Vec<_>, Vec<_>) =
            headers.into_iter().filter(|(name, _)| is_passed_on(name)).partition(|(name, _)| *name == TARGET_AGENT);
        for (name, value) in known.into_iter().chain(others) {
            let Ok(text) = std::str::from_utf8(value) else { continue };
            let size = name.len() + text.len();
            let is_known = further.0.iter().any(|(known, _)| known == name);
            let fits = further.0.len() < MAX_HEADERS && bytes + size <= MAX_BYTES;
            if is_value(text) && !is_known && fits {
                bytes += size;
                further.0.push((name.to_owned(), text.to_owned()));
            }
        }
        further
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// A JSON list of pairs, stored as one header next to the event.
    pub(crate) fn to_json(&self) -> String {
        serde_json::to_string(&self.0).unwrap_or_default()
    }

    /// Reads what [`to_json`](FurtherHeaders::to_json) wrote. The same bounds apply, because other writers may exist.
    pub(crate) fn parse(json: &str) -> FurtherHeaders {
        let pairs: Vec<(String, String)> = serde_json::from_str(json).unwrap_or_default();
        FurtherHeaders::of(pairs.iter().map(|(name, value)| (name.as_str(), value.as_bytes())))
    }
}

fn is_passed_on(name: &str) -> bool {
    // No underscore and no dot: servers turn them into `-`, and would read `x-real_ip` as X-Real-IP.
    let is_safe = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-');
    name == TARGET_AGENT
        || (name.len() <= MAX_NAME
            && name.bytes().all(is_safe)
            && name.strip_prefix("x-").is_some_and(|rest| !rest.is_empty())
            && !READ.contains(&name)
            && !name.starts_with(OURS)
            && !PROXIES.iter().any(|start| name.starts_with(start)))
}

fn is_value(text: &str) -> bool {
    text.len() <= MAX_VALUE && text.bytes().all(|byte| matches!(byte, 0x20..=0x7e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(headers: &[(&str, &str)]) -> Vec<(String, String)> {
        FurtherHeaders::of(headers.iter().map(|(name, value)| (*name, value.as_bytes()))).0
    }

    #[test]
    fn a_table_of_headers() {
        let (long, wide) = (format!("x-{}", "a".repeat(MAX_NAME)), "v".repeat(MAX_VALUE + 1));
        for passed in ["target-agent", "x-stream-region", "x-signature-v2", "x-request-id"] {
            assert_eq!(of(&[(passed, "v")]), [(passed.to_owned(), "v".to_owned())]);
        }
        let kept = [
            "x-",
            "x-api-key",
            "x-signature",
            "x-webhook-id",
            "x-webhook-attempt",
            "x-streamgate-key",
            "x-forwarded-for",
            "x-real-ip",
            "x-original-url",
            "x-remote-user",
            "x-http-method-override",
            "x-real_ip",
            "x-streamgate_key",
            "x-api.key",
            "authorization",
            "cookie",
            "host",
            &long,
            "x-\u{e9}",
            "x-a b",
        ];
        for kept in kept {
            assert_eq!(of(&[(kept, "v")]), [], "{kept}");
        }
        assert_eq!(of(&[("x-a", &wide)]), []);
        assert_eq!(of(&[("x-a", "caf\u{e9}")]), []);
        assert_eq!(of(&[("x-a", "1"), ("x-a", "2")]), [("x-a".to_owned(), "1".to_owned())]);
    }

    #[test]
    fn target_agent_is_never_pushed_out() {
        let names: Vec<_> = (0..100).map(|number| format!("x-{number}")).collect();
        let mut headers: Vec<_> = names.iter().map(|name| (name.as_str(), "v")).collect();
        headers.push((TARGET_AGENT, "public/1"));
        assert_eq!(of(&headers)[0], (TARGET_AGENT.to_owned(), "public/1".to_owned()));
    }

    #[test]
    fn many_headers_are_bounded() {
        let names: Vec<_> = (0..100).map(|number| format!("x-{number}")).collect();
        let short: Vec<_> = names.iter().map(|name| (name.as_str(), "v")).collect();
        assert_eq!(of(&short).len(), MAX_HEADERS);
        let value = "v".repeat(MAX_VALUE);
        let wide: Vec<_> = names.iter().map(|name| (name.as_str(), value.as_str())).collect();
        assert_eq!(of(&wide).len(), MAX_BYTES / (MAX_VALUE + 3));
    }

    proptest! {
        #[test]
        fn what_is_passed_on_reads_back(headers in proptest::collection::vec(("x-[a-z]{1,9}|[ -~]{0,9}", "[ -~]{0,30}"), 0..20)) {
            let headers = headers.iter().map(|(name, value)| (name.as_str(), value.as_bytes()));
            let further = FurtherHeaders::of(headers);
            prop_assert_eq!(FurtherHeaders::parse(&further.to_json()), further);
        }

        #[test]
        fn nothing_that_is_read_is_over_the_bounds(json in any::<String>(), pairs in any::<Vec<(String, String)>>()) {
            FurtherHeaders::parse(&json);
            let read = FurtherHeaders::parse(&serde_json::to_string(&pairs).unwrap());
            prop_assert!(read.iter().all(|(name, value)| is_passed_on(name) && is_value(value)));
        }
    }
}
