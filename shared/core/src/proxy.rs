//! Parses the PROXY header in front of a connection, version 1 or 2: how many bytes of it are missing, and which client it
//! names. Never asks for more bytes than that, because those after it are the client's.

use proxy_header::{ParseConfig, ProxyHeader};
use std::net::IpAddr;

/// The longest header of version 1, including its line break (the protocol's section 2.1).
const LONGEST_V1: usize = 107;
/// Version 2: the signature, and the length of everything before the addresses.
const SIGNATURE_V2: usize = 12;
const FIXED_V2: usize = 16;
/// Most bytes of addresses and extensions in version 2. Chosen: those of load balancers take under 200.
const LONGEST_V2: usize = 1024;

/// The state of the header after the bytes read so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Header {
    /// At least this many more bytes have to be read.
    Incomplete(usize),
    /// It is complete. The client that it names; `None` if the proxy connects on its own behalf, as for a health check.
    Whole(Option<IpAddr>),
}

/// The header is absent, broken or too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected a PROXY header, version 1 or 2, in front of the connection")]
pub struct BrokenHeader;

/// Parses the bytes read so far.
pub fn header(read: &[u8]) -> Result<Header, BrokenHeader> {
    let length = match read {
        // No header of either version is shorter.
        [..] if read.len() < SIGNATURE_V2 => SIGNATURE_V2,
        [b'\r', ..] => match read.get(FIXED_V2 - 2..FIXED_V2) {
            None => FIXED_V2,
            Some(length) => {
                let length = length.iter().fold(0, |length, byte| length << 8 | usize::from(*byte));
                if length > LONGEST_V2 {
                    return Err(BrokenHeader);
                }
                FIXED_V2 + length
            }
        },
        [.., b'\n'] => read.len(),
        [..] if read.starts_with(b"PROXY ") && read.len() < LONGEST_V1 => read.len() + 1,
        [..] => return Err(BrokenHeader),
    };
    if read.len() < length {
        return Ok(Header::Incomplete(length - read.len()));
    }
    let config = ParseConfig { include_tlvs: false, ..ParseConfig::default() };
    match ProxyHeader::parse(read, config) {
        Ok((parsed, length)) if length == read.len() => {
            Ok(Header::Whole(parsed.proxied_address().map(|addresses| addresses.source.ip())))
        }
        Ok(_) | Err(_) => Err(BrokenHeader),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proxy_header::ProxiedAddress;

    /// The client that the bytes name, and the number of bytes read for that.
    fn read(bytes: &[u8]) -> Option<(Option<IpAddr>, usize)> {
        let mut length = 0;
        loop {
            match header(bytes.get(..length)?).ok()? {
                Header::Incomplete(more) => length += more,
                Header::Whole(client) => return Some((client, length)),
            }
        }
    }

    #[test]
    fn a_table_of_headers() {
        let ip = |text: &str| Some(text.parse().unwrap());
        let addresses = |source: &str| ProxiedAddress::stream(source.parse().unwrap(), source.parse().unwrap());
        let second = |header: ProxyHeader<'_>| {
            let mut bytes = Vec::new();
            header.encode_v2(&mut bytes).unwrap();
            bytes
        };
        let good = [
            (b"PROXY TCP4 192.0.2.1 192.0.2.9 4711 443\r\n".to_vec(), ip("192.0.2.1")),
            (b"PROXY TCP6 2001:db8::1 2001:db8::2 4711 443\r\n".to_vec(), ip("2001:db8::1")),
            (b"PROXY UNKNOWN\r\n".to_vec(), None),
            (second(ProxyHeader::with_address(addresses("192.0.2.1:4711"))), ip("192.0.2.1")),
            (second(ProxyHeader::with_address(addresses("[2001:db8::1]:4711"))), ip("2001:db8::1")),
            (second(ProxyHeader::with_local()), None),
        ];
        for (header, client) in good {
            let bytes = [&header[..], b"POST /"].concat();
            assert_eq!(read(&bytes), Some((client, header.len())), "{:?}", String::from_utf8_lossy(&header));
            assert_eq!(read(&header[..header.len() - 1]), None, "it broke off");
        }
        let endless = [b"PROXY TCP4 ".as_slice(), &[b' '; 200], b"\r\n"].concat();
        let long = [b"\r\n\r\n\0\r\nQUIT\n\x21\x11".as_slice(), &2000u16.to_be_bytes(), &[0; 2000]].concat();
        let bad: [&[u8]; 6] = [
            b"POST /webhooks/stream/push HTTP/1.1\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\x00\x00\x00",
            b"PROXY TCP4 192.0.2.1 nobody 4711 443\r\n",
            b"\r\n\r\n\0\r\nQUIT\n\x31\x11\x00\x0c............",
            &endless,
            &long,
        ];
        for header in bad {
            assert_eq!(read(header), None, "{:?}", String::from_utf8_lossy(header));
        }
    }

    proptest! {
        #[test]
        fn nothing_panics_and_nothing_endless_is_read(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let first = [b"PROXY TCP4 ".as_slice(), &bytes, b"\r\n"].concat();
            let length = u16::try_from(bytes.len()).unwrap().to_be_bytes();
            let second = [0x20, 0x21].into_iter().flat_map(|command| [0, 0x11, 0x21, 0x31, 0xff].map(|family| {
                [b"\r\n\r\n\0\r\nQUIT\n".as_slice(), &[command, family], &length, &bytes].concat()
            }));
            for header in [bytes.clone(), first].into_iter().chain(second) {
                let read = read(&header);
                prop_assert!(read.is_none_or(|(_, length)| length <= FIXED_V2 + LONGEST_V2));
            }
        }
    }
}
