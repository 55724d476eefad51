//! The PROXY header in front of a connection, version 1 or 2: not a byte more is read, for what follows is the client's.

use proxy_header::{ParseConfig, ProxyHeader};
use std::net::IpAddr;
use tokio::io::{AsyncRead, AsyncReadExt};

/// The longest header of version 1, with its line break (the protocol's section 2.1).
const LONGEST_V1: usize = 107;
/// Version 2: the signature, and all that stands before the addresses.
const SIGNATURE_V2: usize = 12;
const FIXED_V2: usize = 16;
/// Addresses and their extensions in version 2. Chosen: those of load balancers take under 200 bytes.
const LONGEST_V2: usize = 1024;

/// The client that the header names; none where the proxy speaks for itself, as in a health check. An error: the header is
/// absent, broken or too long, and the connection cannot be read.
pub(crate) async fn client(stream: &mut (impl AsyncRead + Unpin)) -> std::io::Result<Option<IpAddr>> {
    let broken = || std::io::Error::from(std::io::ErrorKind::InvalidData);
    let mut header = vec![0; SIGNATURE_V2];
    stream.read_exact(&mut header).await?;
    if header.first() == Some(&b'\r') {
        header.resize(FIXED_V2, 0);
        stream.read_exact(header.get_mut(SIGNATURE_V2..).ok_or_else(broken)?).await?;
        let length = match header.get(FIXED_V2 - 2..) {
            Some([high, low]) => usize::from(u16::from_be_bytes([*high, *low])),
            Some(_) | None => return Err(broken()),
        };
        if length > LONGEST_V2 {
            return Err(broken());
        }
        header.resize(FIXED_V2 + length, 0);
        stream.read_exact(header.get_mut(FIXED_V2..).ok_or_else(broken)?).await?;
    } else {
        while header.last() != Some(&b'\n') {
            if !header.starts_with(b"PROXY ") || header.len() >= LONGEST_V1 {
                return Err(broken());
            }
            header.push(stream.read_u8().await?);
        }
    }
    let config = ParseConfig { include_tlvs: false, ..ParseConfig::default() };
    let (parsed, length) = ProxyHeader::parse(&header, config).map_err(|_| broken())?;
    if length != header.len() {
        return Err(broken());
    }
    Ok(parsed.proxied_address().map(|addresses| addresses.source.ip()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;
    use proptest::prelude::*;
    use proxy_header::ProxiedAddress;

    /// What is read of these bytes, and what is left of them.
    fn read(mut bytes: &[u8]) -> (Option<Option<IpAddr>>, &[u8]) {
        let client = client(&mut bytes).now_or_never().unwrap().ok();
        (client, bytes)
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
            assert_eq!(read(&bytes), (Some(client), &b"POST /"[..]), "{:?}", String::from_utf8_lossy(&header));
            assert_eq!(read(&header[..header.len() - 1]).0, None, "it broke off");
        }
        let long = [b"\r\n\r\n\0\r\nQUIT\n\x21\x11".as_slice(), &2000u16.to_be_bytes(), &[0; 2000]].concat();
        let bad: [&[u8]; 6] = [
            b"POST /webhooks/stream/push HTTP/1.1\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\x00\x00\x00",
            b"PROXY TCP4 192.0.2.1 nobody 4711 443\r\n",
            b"PROXY TCP4 1.1.1.1 1.1.1.1 1 1                                                                                   \r\n",
            b"\r\n\r\n\0\r\nQUIT\n\x31\x11\x00\x0c............",
            &long,
        ];
        for header in bad {
            assert_eq!(read(header).0, None, "{:?}", String::from_utf8_lossy(header));
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            read(&bytes);
            read(&[b"PROXY TCP4 ".as_slice(), &bytes, b"\r\n"].concat());
            let length = u16::try_from(bytes.len()).unwrap().to_be_bytes();
            for command in [0x20, 0x21] {
                for family in [0, 0x11, 0x21, 0x31, 0xff] {
                    read(&[b"\r\n\r\n\0\r\nQUIT\n".as_slice(), &[command, family], &length, &bytes].concat());
                }
            }
        }
    }
}
