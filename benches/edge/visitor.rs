//! Visitors: each does one thing until a moment, counts what it did, and fails
//! where a byte is missing or wrong.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::origin::Order;
use crate::pattern::{CHUNK, Pattern};
use crate::{Outcome, within};

/// The size of an echoed message.
pub const MESSAGE: usize = 64;

/// Bytes ordered at once by a download: its end takes no longer than two of these.
const PIECE: u64 = 8 << 20;

/// Longer than any server lets a visitor wait for others who stopped.
const PATIENCE: Duration = Duration::from_secs(100);

/// What visitors did so far, for those who look on.
#[derive(Debug, Clone, Default)]
pub struct Tally(Arc<AtomicU64>);

impl Tally {
    /// So much more was done.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// Bytes, or round trips.
    pub fn read(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Connects, without a delay for small messages.
///
/// # Errors
/// Why it cannot.
pub async fn connect(addr: SocketAddr) -> Outcome<TcpStream> {
    let tcp = TcpStream::connect(addr).await?;
    tcp.set_nodelay(true)?;
    Ok(tcp)
}

/// How fast a transfer goes.
#[derive(Debug, Clone, Copy)]
pub enum Pace {
    /// As fast as it can.
    Full,
    /// Bytes a second, in steps of a millisecond.
    Of(u64),
}

impl Pace {
    async fn keep(self, begun: Instant, done: u64) {
        if let Self::Of(rate) = self {
            let due = begun + Duration::from_secs_f64(done as f64 / rate as f64);
            if due > Instant::now() {
                tokio::time::sleep_until(due.into()).await;
            }
        }
    }
}

/// Downloads until then; returns how much, all of it come and the end seen.
pub async fn download(addr: SocketAddr, until: Instant, pace: Pace, tally: Tally) -> Outcome<u64> {
    let begun = Instant::now();
    let mut tcp = connect(addr).await?;
    let mut came = Pattern::default();
    let mut ordered = 0;
    let mut buffer = vec![0; CHUNK];
    loop {
        // One piece ahead, so that the origin never waits for an order.
        if ordered < came.len() + PIECE && Instant::now() < until {
            tcp.write_all(&Order::Send(PIECE).bytes()).await?;
            ordered += PIECE;
        }
        if came.len() == ordered {
            break;
        }
        let n = some(&mut tcp, &mut buffer).await?;
        came.check(&buffer[..n])?;
        tally.add(n as u64);
        if Instant::now() < until {
            pace.keep(begun, came.len()).await;
        }
    }
    tcp.shutdown().await?;
    end(&mut tcp).await?;
    Ok(came.len())
}

/// Uploads until then; returns how much, all of it confirmed by the origin.
pub async fn upload(addr: SocketAddr, until: Instant, pace: Pace, tally: Tally) -> Outcome<u64> {
    let begun = Instant::now();
    let mut tcp = connect(addr).await?;
    tcp.write_all(&Order::Check.bytes()).await?;
    let mut sent = Pattern::default();
    while Instant::now() < until {
        let write = async { Ok(tcp.write(sent.peek(CHUNK)).await?) };
        let n = within(PATIENCE, "a write", write).await?;
        sent.advance(n);
        tally.add(n as u64);
        pace.keep(begun, sent.len()).await;
    }
    tcp.shutdown().await?;
    let answer = async { Ok((tcp.read_u64().await?, tcp.read_u8().await?)) };
    let (arrived, wrong) = within(PATIENCE, "the origin's count", answer).await?;
    if (arrived, wrong) != (sent.len(), 0) {
        let wrong = if wrong == 0 { "" } else { ", then wrong ones" };
        return Err(format!("{arrived} bytes arrived of {}{wrong}", sent.len()).into());
    }
    end(&mut tcp).await?;
    Ok(sent.len())
}

/// Sends a message and waits for it, until then; returns the times of all.
pub async fn echo(addr: SocketAddr, until: Instant, tally: Tally) -> Outcome<Vec<Duration>> {
    let mut tcp = connect(addr).await?;
    tcp.write_all(&Order::Echo.bytes()).await?;
    let mut times = Vec::with_capacity(1 << 16);
    let mut begun = Instant::now();
    while begun < until {
        ping(&mut tcp, times.len() as u64).await?;
        let done = Instant::now();
        times.push(done - begun);
        tally.add(1);
        begun = done;
    }
    tcp.shutdown().await?;
    end(&mut tcp).await?;
    Ok(times)
}

/// One message to and fro, on a connection that has an echo.
pub async fn ping(tcp: &mut TcpStream, number: u64) -> Outcome<()> {
    let message = message(number);
    tcp.write_all(&message).await?;
    let mut answer = [0; MESSAGE];
    let read = async { Ok(tcp.read_exact(&mut answer).await.map(drop)?) };
    within(PATIENCE, "an echo", read).await?;
    if answer == message { Ok(()) } else { Err("an echo came back changed".into()) }
}

/// A whole visit: connect, one message to and fro, both ends closed.
pub async fn greet(addr: SocketAddr) -> Outcome<()> {
    let visit = async {
        let mut tcp = connect(addr).await?;
        let message = message(0);
        let mut said = Order::Echo.bytes().to_vec();
        said.extend(message);
        tcp.write_all(&said).await?;
        tcp.shutdown().await?;
        let mut answer = Vec::with_capacity(2 * MESSAGE);
        tcp.read_to_end(&mut answer).await?;
        if answer == message { Ok(()) } else { Err(format!("{} bytes came back", answer.len()).into()) }
    };
    within(PATIENCE, "a visit", visit).await
}

fn message(number: u64) -> [u8; MESSAGE] {
    let mut message = [0x5a; MESSAGE];
    message[..8].copy_from_slice(&number.to_be_bytes());
    message
}

/// What comes next, at least a byte.
async fn some(tcp: &mut TcpStream, buffer: &mut [u8]) -> Outcome<usize> {
    match within(PATIENCE, "a read", async { Ok(tcp.read(buffer).await?) }).await? {
        0 => Err("ended too early".into()),
        n => Ok(n),
    }
}

async fn end(tcp: &mut TcpStream) -> Outcome<()> {
    match within(PATIENCE, "the end", async { Ok(tcp.read(&mut [0]).await?) }).await? {
        0 => Ok(()),
        _ => Err("more bytes than there are".into()),
    }
}
