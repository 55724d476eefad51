//! The client that a request comes from: the connection's peer, or the one that a trusted proxy names.

use ipnet::IpNet;
use std::net::{IpAddr, SocketAddr};

/// A list of networks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Networks(Vec<IpNet>);

/// An invalid address or network.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid network {0:?}: expected an address or a network, like \"192.0.2.1\" or \"10.0.0.0/8\"")]
pub struct InvalidNetwork(String);

impl Networks {
    /// Parses addresses, and networks in CIDR form.
    pub fn parse(texts: &[String]) -> Result<Networks, InvalidNetwork> {
        let one = |text: &String| {
            let network = text.parse::<IpNet>().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from));
            network.ok_or_else(|| InvalidNetwork(text.clone()))
        };
        texts.iter().map(one).collect::<Result<_, _>>().map(Networks)
    }

    /// An IPv4 address that came over an IPv6 socket counts as the IPv4 address.
    pub fn contain(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.0.iter().any(|network| network.contains(&address))
    }
}

/// Which proxies are trusted, and who may send.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peers {
    /// `None`: everybody.
    pub allow_from: Option<Networks>,
    /// Proxies whose X-Forwarded-For and PROXY headers count. `None`: no X-Forwarded-For counts, and every PROXY header does.
    pub trusted_proxies: Option<Networks>,
    /// Whether each connection begins with a PROXY header.
    pub proxy_protocol: bool,
}

/// Where a request comes from, as far as known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Client {
    pub address: IpAddr,
    /// Whether this is certainly the client; otherwise it may be a proxy in front of many clients.
    pub is_certain: bool,
}

impl Peers {
    /// Whether the connections of this peer begin with a PROXY header that counts. Other peers send none: their bytes are
    /// read as they are.
    pub fn has_header(&self, peer: IpAddr) -> bool {
        self.proxy_protocol && self.trusted_proxies.as_ref().is_none_or(|proxies| proxies.contain(peer))
    }

    /// The client of a request. `peer` is the other end of the connection, or the client that its PROXY header names;
    /// `forwarded` are the X-Forwarded-For headers in order. Each proxy appends the address that it received the request
    /// from, so the last address that does not belong to a trusted proxy is the client; anybody may have written those before
    /// it.
    pub fn client<'h>(&self, peer: IpAddr, forwarded: impl DoubleEndedIterator<Item = &'h [u8]>) -> Client {
        let Some(proxies) = &self.trusted_proxies else {
            return Client { address: peer.to_canonical(), is_certain: self.proxy_protocol };
        };
        let mut client = Client { address: peer.to_canonical(), is_certain: !proxies.contain(peer) };
        for entry in forwarded.rev().flat_map(|header| header.rsplit(|byte| *byte == b',')) {
            if client.is_certain {
                break;
            }
            let Some(address) = address(entry) else { break };
            client = Client { address, is_certain: !proxies.contain(address) };
        }
        client
    }

    pub fn allow(&self, client: Client) -> bool {
        self.allow_from.as_ref().is_none_or(|networks| networks.contain(client.address))
    }
}

/// An entry of X-Forwarded-For; some proxies add the port.
fn address(entry: &[u8]) -> Option<IpAddr> {
    let text = std::str::from_utf8(entry).ok()?.trim();
    let address = text.parse().ok().or_else(|| text.parse::<SocketAddr>().ok().map(|address| address.ip()));
    address.map(|address| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn networks(texts: &[&str]) -> Networks {
        Networks::parse(&texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>()).unwrap()
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_table_of_clients() {
        let proxies = Peers { trusted_proxies: Some(networks(&["10.0.0.0/8", "::1"])), ..Peers::default() };
        // (peer, X-Forwarded-For, client, whether it is certain)
        let cases: [(&str, &[&str], &str, bool); 13] = [
            ("192.0.2.1", &[], "192.0.2.1", true),
            ("192.0.2.1", &["198.51.100.7"], "192.0.2.1", true),
            ("10.0.0.1", &[], "10.0.0.1", false),
            ("10.0.0.1", &["198.51.100.7"], "198.51.100.7", true),
            ("10.0.0.1", &["203.0.113.9, 198.51.100.7"], "198.51.100.7", true),
            ("10.0.0.1", &["203.0.113.9", "198.51.100.7,10.1.1.1"], "198.51.100.7", true),
            ("10.0.0.1", &["198.51.100.7", "10.2.2.2"], "198.51.100.7", true),
            ("10.0.0.1", &["10.3.3.3, 10.2.2.2"], "10.3.3.3", false),
            ("10.0.0.1", &["198.51.100.7:4711"], "198.51.100.7", true),
            ("10.0.0.1", &["[2001:db8::1]:4711"], "2001:db8::1", true),
            ("10.0.0.1", &["198.51.100.7, unknown"], "10.0.0.1", false),
            ("::ffff:10.0.0.1", &["::ffff:198.51.100.7"], "198.51.100.7", true),
            ("::1", &["198.51.100.7"], "198.51.100.7", true),
        ];
        for (peer, forwarded, address, is_certain) in cases {
            let headers = forwarded.iter().map(|header| header.as_bytes());
            let expected = Client { address: ip(address), is_certain };
            assert_eq!(proxies.client(ip(peer), headers), expected, "{peer} {forwarded:?}");
        }
        let nobody = Peers::default();
        let client = nobody.client(ip("10.0.0.1"), [&b"198.51.100.7"[..]].into_iter());
        assert_eq!(client, Client { address: ip("10.0.0.1"), is_certain: false });
    }

    #[test]
    fn only_allowed_networks_may_send() {
        let client = |text| Client { address: ip(text), is_certain: true };
        let some = Peers { allow_from: Some(networks(&["34.225.10.29", "10.0.0.0/8"])), ..Peers::default() };
        for (address, allowed) in [("34.225.10.29", true), ("34.225.10.30", false), ("10.9.9.9", true), ("::1", false)]
        {
            assert_eq!(some.allow(client(address)), allowed, "{address}");
            assert!(Peers::default().allow(client(address)));
        }
        assert!(
            Networks::parse(&["10.0.0.0/33".to_owned()]).is_err() && Networks::parse(&["host".to_owned()]).is_err()
        );
    }

    #[test]
    fn only_the_proxy_header_of_a_trusted_proxy_counts() {
        let peers = |proxy_protocol, trusted: Option<&[&str]>| Peers {
            proxy_protocol,
            trusted_proxies: trusted.map(networks),
            ..Peers::default()
        };
        let header = |peers: Peers| ["10.0.0.1", "192.0.2.1"].map(|peer| peers.has_header(ip(peer)));
        assert_eq!(header(peers(false, None)), [false, false]);
        assert_eq!(header(peers(true, None)), [true, true]);
        assert_eq!(header(peers(true, Some(&["10.0.0.0/8"]))), [true, false]);
    }

    proptest! {
        /// Whatever a client writes into the header, it cannot pass for another client.
        #[test]
        fn a_client_cannot_choose_its_own_address(written in "[ -~]{0,60}") {
            let peers = Peers { trusted_proxies: Some(networks(&["10.0.0.0/8"])), ..Peers::default() };
            let header = format!("{written}, 198.51.100.7");
            let client = peers.client(ip("10.0.0.1"), [header.as_bytes()].into_iter());
            prop_assert_eq!(client, Client { address: ip("198.51.100.7"), is_certain: true });
        }
    }
}
