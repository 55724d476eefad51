//! The URL under which Stream reaches this gateway: its parts, whether Stream can reach it, and which server answers
//! there.

use crate::exit::BadUsage;
use bytes::Bytes;
use http_body_util::Full;
use hyper::header::HOST;
use hyper::{Request, StatusCode, Uri};
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;
use streamgate_core::path::{BEFORE_MESSAGE_SEND, CUSTOM_COMMANDS, PUSH};
use streamgate_service::http_client;

/// Stream replaces `{type}` with the command's name.
const COMMAND_QUERY: &str = "?type={type}";
/// Chosen: Stream itself waits 6 s for a push.
const TIMEOUT: Duration = Duration::from_secs(10);
/// A gateway's answer takes 100 bytes.
const MAX_ANSWER: usize = 64 << 10;
/// Query parameter by which Stream's own CLI marks the URLs of its temporary hooks, which it removes itself.
const TEMPORARY: &str = "cliwebhook";
/// Domains whose names lead to a laptop while a tunnel is open.
const TUNNELS: [&str; 20] = [
    "trycloudflare.com",
    "ngrok.io",
    "ngrok.app",
    "ngrok.dev",
    "ngrok-free.app",
    "ngrok-free.dev",
    "loca.lt",
    "localhost.run",
    "lhr.life",
    "serveo.net",
    "devtunnels.ms",
    "pinggy.link",
    "pinggy.io",
    "localtunnel.me",
    "tunnelmole.net",
    "tunnelto.dev",
    "bore.pub",
    "zrok.io",
    "loclx.io",
    "pagekite.me",
];
/// Suffixes of names that do not resolve in public.
const PRIVATE_NAMES: [&str; 11] = [
    "localhost",
    "localdomain",
    "local",
    "internal",
    "intranet",
    "lan",
    "home",
    "home.arpa",
    "corp",
    "test",
    "invalid",
];

/// A base URL: scheme, host, port, and a path prefix that a proxy strips.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BaseUrl {
    text: String,
    host: String,
}

impl BaseUrl {
    /// Parses a base URL, or the whole URL of a webhook on it.
    pub(super) fn parse(text: &str, option: &str) -> Result<BaseUrl, BadUsage> {
        let wrong = || BadUsage(format!("{option} takes a URL like https://hooks.example.com, not {text:?}"));
        if text.contains('@') {
            return Err(BadUsage(format!("{option} takes no user and password")));
        }
        let uri: Uri = text.trim().parse().map_err(|_| wrong())?;
        let (Some(scheme @ ("http" | "https")), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
            return Err(wrong());
        };
        if uri.query().is_some() || text.contains('#') {
            return Err(wrong());
        }
        let default = if scheme == "https" { 443 } else { 80 };
        // A trailing dot does not change a name.
        let host = authority.host().trim_end_matches('.').to_ascii_lowercase();
        if host.is_empty() {
            return Err(wrong());
        }
        let port = authority.port_u16().filter(|port| *port != default);
        if authority.port().is_some() && authority.port_u16().is_none_or(|port| port == 0) {
            return Err(wrong());
        }
        let port = port.map(|port| format!(":{port}")).unwrap_or_default();
        let path: Vec<&str> = uri.path().split('/').filter(|part| !part.is_empty()).collect();
        let mut path = path.iter().map(|part| format!("/{part}")).collect::<String>();
        for known in [PUSH, BEFORE_MESSAGE_SEND, CUSTOM_COMMANDS] {
            if let Some(base) = path.strip_suffix(known) {
                path = base.to_owned();
                break;
            }
        }
        Ok(BaseUrl { text: format!("{scheme}://{host}{port}{path}"), host })
    }

    pub(super) fn as_str(&self) -> &str {
        &self.text
    }

    pub(super) fn push(&self) -> String {
        format!("{}{PUSH}", self.text)
    }

    pub(super) fn before_message_send(&self) -> String {
        format!("{}{BEFORE_MESSAGE_SEND}", self.text)
    }

    pub(super) fn custom_commands(&self) -> String {
        format!("{}{CUSTOM_COMMANDS}{COMMAND_QUERY}", self.text)
    }

    /// Whether a URL is the push path of this base, however it is written.
    pub(super) fn is_push(&self, url: &str) -> bool {
        self.is(url, PUSH)
    }

    pub(super) fn is_before_message_send(&self, url: &str) -> bool {
        self.is(url, BEFORE_MESSAGE_SEND)
    }

    pub(super) fn is_custom_commands(&self, url: &str) -> bool {
        self.is(url, CUSTOM_COMMANDS)
    }

    fn is(&self, url: &str, path: &str) -> bool {
        gateway_at(url, path).is_some_and(|base| base == *self)
    }

    pub(super) fn is_tls(&self) -> bool {
        self.text.starts_with("https:")
    }

    pub(super) fn is_loopback(&self) -> bool {
        self.address().map_or(self.host == "localhost", |address| address.is_loopback())
    }

    /// The tunnel that the host belongs to.
    pub(super) fn tunnel(&self) -> Option<&'static str> {
        TUNNELS.into_iter().find(|domain| self.is_within(domain))
    }

    fn is_within(&self, domain: &str) -> bool {
        self.host.strip_suffix(domain).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    }

    fn address(&self) -> Option<IpAddr> {
        self.host.trim_start_matches('[').trim_end_matches(']').parse().ok()
    }

    /// Why Stream cannot reach it over the internet, if it cannot.
    pub(super) fn unreachable(&self) -> Option<String> {
        let host = &self.host;
        let why = match self.address() {
            Some(address) if is_private(address) => "is an address of a private network, which Stream cannot reach",
            Some(_) => return None,
            None if PRIVATE_NAMES.iter().any(|ending| self.is_within(ending)) => {
                "is a name of a private network, which Stream cannot look up"
            }
            // Other notations of an address, like 127.1 or 0x7f000001, are not names.
            None if host.rsplit('.').next().is_some_and(is_number) => {
                "is an address in a form that Stream does not take"
            }
            None if !host.contains('.') => "has no dot, so Stream cannot look it up",
            None => return None,
        };
        Some(format!(
            "{host} {why}: give the name under which the internet reaches this gateway; on a laptop that is a tunnel's \
             (README, \"On your laptop\")"
        ))
    }

    /// Whether all addresses that the name has here are private. It may have others elsewhere.
    pub(super) async fn is_private_from_here(&self) -> bool {
        if let Some(address) = self.address() {
            return is_private(address);
        }
        let Ok(addresses) = tokio::net::lookup_host((self.host.as_str(), 443)).await else { return false };
        let mut addresses = addresses.map(|address| address.ip()).peekable();
        addresses.peek().is_some() && addresses.all(is_private)
    }

    /// Requests the push path from here: only a Streamgate gateway answers as expected.
    pub(super) async fn try_it(&self) -> Result<(), String> {
        let url = self.push();
        let failed = |why: String| {
            format!(
                "{url} does not answer as this gateway: {why}; start the gateway and look at DNS, firewall, certificate and proxy \
                 (--no-verify leaves this out)"
            )
        };
        let client = http_client::client(None).map_err(|error| failed(error.to_string()))?;
        let uri: Uri = url.parse().map_err(|_| failed("not a URL".to_owned()))?;
        let host = uri.authority().map(ToString::to_string).unwrap_or_default();
        let request = Request::get(uri).header(HOST, host).body(Full::<Bytes>::default());
        let request = request.map_err(|error| failed(error.to_string()))?;
        let response = http_client::exchange(&client, request, TIMEOUT, MAX_ANSWER).await;
        let response = response.map_err(|error| failed(error.to_string()))?;
        let (status, body) = (response.status(), response.body().as_deref().unwrap_or_default());
        let code = serde_json::from_slice::<serde_json::Value>(body)
            .ok()
            .and_then(|body| body.get("code").and_then(|code| code.as_str()).map(str::to_owned));
        match (status, code.as_deref()) {
            (StatusCode::METHOD_NOT_ALLOWED, Some("method_not_allowed")) => Ok(()),
            // gateway.allow_from may exclude this machine.
            (StatusCode::FORBIDDEN, Some("peer_not_allowed")) => Ok(()),
            (status, _) if status.is_redirection() => {
                Err(failed(format!("{status}, a redirect, which Stream does not follow")))
            }
            (status, _) => Err(failed(format!("{status} where 405 was expected"))),
        }
    }
}

/// The base URL of the gateway, if the URL is this path of a gateway.
pub(super) fn gateway_at(url: &str, path: &str) -> Option<BaseUrl> {
    webhook(url).filter(|(_, its)| *its == path).map(|(base, _)| base)
}

/// Splits a webhook's URL into the gateway's base and the path. `None` if the URL is not a gateway's, or belongs to a
/// temporary hook of Stream's own CLI.
fn webhook(url: &str) -> Option<(BaseUrl, &'static str)> {
    let (plain, query) = url.split_once('?').unwrap_or((url, ""));
    if query.split('&').any(|pair| pair.split('=').next() == Some(TEMPORARY)) {
        return None;
    }
    let parts = plain.split('/').filter(|part| !part.is_empty());
    let normal = parts.fold(String::new(), |path, part| path + "/" + part);
    let path = [PUSH, BEFORE_MESSAGE_SEND, CUSTOM_COMMANDS].into_iter().find(|path| normal.ends_with(path))?;
    // A URL with a password is not ours.
    Some((BaseUrl::parse(plain, "").ok()?, path))
}

fn is_number(label: &str) -> bool {
    label.starts_with("0x") || label.bytes().all(|byte| byte.is_ascii_digit())
}

fn is_private(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            let [first, second, ..] = v4.octets();
            v4.is_private()
                || v4.is_loopback()
                || v4.is_link_local()
                || v4.is_multicast()
                // "This network" (RFC 1122), and the reserved range with the broadcast address (RFC 1112).
                || first == 0
                || first >= 240
                // Shared addresses behind a carrier's NAT (RFC 6598), and benchmarks (RFC 2544).
                || (first == 100 && (64..128).contains(&second))
                || (first == 198 && matches!(second, 18 | 19))
        }
        IpAddr::V6(v6) => match v6.to_ipv4_mapped().or(translated(v6)) {
            Some(v4) => is_private(IpAddr::V4(v4)),
            None => {
                v6.is_loopback()
                    || v6.is_unspecified()
                    || v6.is_multicast()
                    || v6.is_unique_local()
                    || v6.is_unicast_link_local()
            }
        },
    }
}

/// The IPv4 address that is embedded in an IPv6 address of a translator (RFC 6052).
fn translated(address: std::net::Ipv6Addr) -> Option<Ipv4Addr> {
    match address.segments() {
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => Some(Ipv4Addr::from(u32::from(high) << 16 | u32::from(low))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    fn base(text: &str) -> BaseUrl {
        BaseUrl::parse(text, "--url").unwrap()
    }

    #[test]
    fn a_url_is_ours_however_it_is_written() {
        for text in [
            "https://hooks.example.com",
            "https://HOOKS.example.com:443/",
            "https://hooks.example.com/webhooks/stream/push",
            "https://hooks.example.com//webhooks/stream/before-message-send/",
        ] {
            let base = base(text);
            assert_eq!(base.as_str(), "https://hooks.example.com");
            for ours in ["/webhooks/stream/push/", ":443//webhooks//stream/push", "./webhooks/stream/push?x=1&clix=2"] {
                assert!(base.is_push(&format!("https://hooks.example.com{ours}")), "{ours}");
            }
            assert!(base.is_before_message_send("https://Hooks.example.com:443/webhooks/stream/before-message-send"));
            assert!(base.is_custom_commands("https://hooks.example.com/webhooks/stream/custom-commands?type={type}"));
            for other in [
                "",
                "https://hooks.example.com",
                "http://hooks.example.com/webhooks/stream/push",
                "https://hooks.example.com:8443/webhooks/stream/push",
                "https://hooks.example.com/webhooks/stream/push?x=1&cliwebhook=1",
                "https://u:p@hooks.example.com/webhooks/stream/push",
                "https://hooks.example.com/other/webhooks/stream/push",
                "https://hooks.example.com/webhooks/stream/before-message-send",
            ] {
                assert!(!base.is_push(other), "{other}");
            }
        }
        assert_eq!(base("https://h.example/prefix/").push(), "https://h.example/prefix/webhooks/stream/push");
        for wrong in [
            "",
            "hooks.example.com",
            "ftp://h.example",
            "https://",
            "https://h?x=1",
            "https://h:0",
            "https://u:p@h.example",
        ] {
            assert!(BaseUrl::parse(wrong, "--url").is_err(), "{wrong}");
        }
        assert!(!BaseUrl::parse("https://user:geheim@h.example", "--url").unwrap_err().to_string().contains("geheim"));
    }

    #[test]
    fn urls_that_stream_cannot_reach_are_known() {
        for private in [
            "http://localhost:8080",
            "https://gateway",
            "https://127.0.0.1",
            "https://[::1]:8443",
            "https://10.1.2.3",
            "https://192.168.0.1",
            "https://172.16.0.1",
            "https://169.254.1.1",
            "https://100.64.0.1",
            "https://[fd00::1]",
            "https://[fe80::1]",
            "https://[::ffff:10.0.0.1]",
            "https://box.local",
            "https://127.1",
            "https://2130706433",
            "https://0x7f.1",
            "https://svc.cluster.internal",
            "https://svc.cluster.internal.",
            "https://gateway.",
            "https://box.localdomain",
            "https://box.corp",
            "https://box.test",
            "https://nobody.invalid",
            "https://0.1.2.3",
            "https://198.19.0.1",
            "https://240.0.0.1",
            "https://255.255.255.255",
            "https://[64:ff9b::10.0.0.1]",
        ] {
            assert!(base(private).unreachable().is_some(), "{private}");
        }
        for public in [
            "https://hooks.example.com.",
            "https://203.0.113.7",
            "https://[64:ff9b::203.0.113.7]",
            "https://local.example.com",
        ] {
            assert_eq!(base(public).unreachable(), None, "{public}");
        }
        assert_eq!(base("https://abc-def.trycloudflare.com").tunnel(), Some("trycloudflare.com"));
        assert_eq!(base("https://nottrycloudflare.com").tunnel(), None);
    }

    #[tokio::test]
    async fn a_name_that_is_private_here_is_known() {
        assert!(base("http://localhost").is_private_from_here().await);
        assert!(base("http://10.0.0.1").is_private_from_here().await);
        assert!(!base("http://203.0.113.7").is_private_from_here().await);
        assert!(!base("http://nobody.invalid").is_private_from_here().await, "it has no address at all");
    }

    /// Result of the check against a server with this answer.
    async fn tried(answer: &'static str) -> Result<(), String> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 4096];
            let read = stream.read(&mut request).await.unwrap();
            assert!(request[..read].starts_with(b"GET /webhooks/stream/push HTTP/1.1"));
            stream.write_all(answer.as_bytes()).await.unwrap();
        });
        let result = base(&url).try_it().await;
        server.await.unwrap();
        result
    }

    #[tokio::test]
    async fn only_an_answer_of_this_gateway_is_taken() {
        let ours = "HTTP/1.1 405 Method Not Allowed\r\ncontent-length: 29\r\n\r\n{\"code\":\"method_not_allowed\"}";
        assert_eq!(tried(ours).await, Ok(()));
        let for_stream_only = "HTTP/1.1 403 Forbidden\r\ncontent-length: 27\r\n\r\n{\"code\":\"peer_not_allowed\"}";
        assert_eq!(tried(for_stream_only).await, Ok(()));
        for (answer, why) in [
            ("HTTP/1.1 405 Method Not Allowed\r\ncontent-length: 2\r\n\r\nno", "405"),
            ("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", "200"),
            ("HTTP/1.1 301 Moved\r\nlocation: /x\r\ncontent-length: 0\r\n\r\n", "redirect"),
            ("HTTP/1.1 403 Forbidden\r\ncontent-length: 2\r\n\r\nno", "403"),
            ("", "connection"),
        ] {
            let refused = tried(answer).await.unwrap_err();
            assert!(refused.contains(why) && refused.contains("--no-verify"), "{answer:?}: {refused}");
        }
    }
}
