//! Reads the PROXY header in front of a connection, and not a byte more.

use std::io;
use std::net::IpAddr;
use streamgate_core::proxy::{Header, header};
use tokio::io::{AsyncRead, AsyncReadExt};

/// The client that the header names; `None` if the proxy connects on its own behalf. After an error the connection is unreadable.
pub(crate) async fn client(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<IpAddr>> {
    let mut read = Vec::new();
    loop {
        match header(&read).map_err(io::Error::other)? {
            Header::Whole(client) => return Ok(client),
            Header::Incomplete(more) => {
                let before = read.len();
                read.resize(before + more, 0);
                stream.read_exact(read.get_mut(before..).unwrap_or_default()).await?;
            }
        }
    }
}
