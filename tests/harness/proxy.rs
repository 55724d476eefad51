//! A TCP proxy that simulates network faults: it delays, discards and cuts the traffic that passes through it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weather {
    Fair,
    /// Nothing passes in either direction; bytes sent meanwhile pass later.
    Stalled,
    /// The server's bytes are discarded: requests arrive, confirms do not. Connections must be cut after it.
    Deaf,
    /// Far away: each piece takes 25 ms, in either direction.
    Far,
    /// As TCP behaves over a line that loses packets: pieces come late and in bursts, and some connections break.
    Lossy,
}

const FAR: Duration = Duration::from_millis(25);

/// Serves until it is dropped.
#[derive(Debug)]
pub struct Proxy {
    pub port: u16,
    weather: Arc<watch::Sender<Weather>>,
    cuts: Arc<watch::Sender<u64>>,
    taken: watch::Receiver<u64>,
    _server: AbortOnDropHandle<()>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Client,
    Server,
}

impl Proxy {
    pub async fn start(to: u16, seed: u64) -> Proxy {
        Proxy::over(vec![to], seed).await
    }

    /// Each connection goes to the first of these ports that takes it.
    pub async fn over(ports: Vec<u16>, seed: u64) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (weather, cuts) = (Arc::new(watch::channel(Weather::Fair).0), Arc::new(watch::channel(0).0));
        let (sky, scissors) = (Arc::clone(&weather), Arc::clone(&cuts));
        let (count, taken) = watch::channel(0);
        let server = tokio::spawn(async move {
            let mut random = Random(seed | 1);
            loop {
                let (client, _) = listener.accept().await.unwrap();
                count.send_modify(|count| *count += 1);
                let Some(server) = connect(&ports).await else { continue };
                let mut cut = scissors.subscribe();
                let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
                let up = pass(from_client, to_server, sky.subscribe(), Side::Client, Random(random.next() | 1));
                let down = pass(from_server, to_client, sky.subscribe(), Side::Server, Random(random.next() | 1));
                tokio::spawn(async move {
                    tokio::select! {
                        () = up => {}
                        () = down => {}
                        _ = cut.changed() => {}
                    }
                });
            }
        });
        Proxy { port, weather, cuts, taken, _server: AbortOnDropHandle::new(server) }
    }

    pub fn turn(&self, weather: Weather) {
        self.weather.send_replace(weather);
    }

    /// Waits until a client has connected.
    pub async fn connected(&self) {
        tokio::time::timeout(super::PATIENCE, self.taken.clone().wait_for(|count| *count > 0)).await.unwrap().unwrap();
    }

    /// Ends every connection.
    pub fn cut(&self) {
        self.cuts.send_modify(|number| *number += 1);
    }
}

async fn connect(ports: &[u16]) -> Option<TcpStream> {
    for port in ports {
        if let Ok(server) = TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], *port))).await {
            return Some(server);
        }
    }
    None
}

/// Copies one direction; returns when the connection is to end.
async fn pass(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut weather: watch::Receiver<Weather>,
    side: Side,
    mut random: Random,
) {
    let mut piece = vec![0; 16 << 10];
    loop {
        let Ok(read @ 1..) = from.read(&mut piece).await else { return };
        let now = weather.wait_for(|weather| *weather != Weather::Stalled).await.map(|weather| *weather);
        match now {
            Ok(Weather::Deaf) if side == Side::Server => continue,
            Ok(Weather::Far) => tokio::time::sleep(FAR).await,
            Ok(Weather::Lossy) => match random.next() % 100 {
                0 => return,
                1..=20 => tokio::time::sleep(Duration::from_millis(random.next() % 300)).await,
                _ => {}
            },
            Ok(_) => {}
            Err(_) => return,
        }
        if to.write_all(&piece[..read]).await.is_err() {
            return;
        }
    }
}

/// Random numbers that a seed reproduces: xorshift64.
#[derive(Debug)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}
