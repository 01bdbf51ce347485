//! The engine against another's client: random doings of visitors, origins and
//! both transports, over a wire that splits what is sent as it likes.

use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use russh::client::{self, ChannelOpenHandle, Msg};
use russh::keys::PublicKeyOrCertificate;
use russh::{Channel, ChannelMsg};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::fuzzing::{Anybody, config};
use super::{Config, Driver, Link, To};

const SOON: Duration = Duration::from_secs(30);
const CHANNELS: usize = 4;

/// What one side of one channel does next.
#[derive(Debug, Clone, Copy)]
enum Step {
    Write(usize),
    End,
    Leave,
}

#[derive(Debug, Clone, Copy)]
enum Doing {
    /// The visitor's side, here.
    Here(usize, Step),
    /// The origin's side, at the client.
    There(usize, Step),
    /// The client asks for new keys; the node does after each 200 KiB.
    Rekey,
}

fn doings() -> impl Strategy<Value = Vec<Doing>> {
    let size = prop_oneof![1..100usize, 1..70_000usize, Just(32 << 10), Just(300_000)];
    let step = prop_oneof![8 => size.prop_map(Step::Write), 1 => Just(Step::End), 1 => Just(Step::Leave)];
    let doing = prop_oneof![
        5 => (0..CHANNELS, step.clone()).prop_map(|(channel, step)| Doing::Here(channel, step)),
        5 => (0..CHANNELS, step).prop_map(|(channel, step)| Doing::There(channel, step)),
        1 => Just(Doing::Rekey),
    ];
    prop::collection::vec(doing, 1..40)
}

fn cases() -> u32 {
    if std::env::var_os("ADIT_LONG").is_some() { 500 } else { 16 }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), max_shrink_iters: 40, ..ProptestConfig::default() })]
    #[test]
    fn every_byte_arrives_whatever_both_sides_do(doings in doings(), pieces in prop::collection::vec(1..9000usize, 1..20)) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async { timeout(SOON, play(&doings, pieces)).await.expect("it hangs") });
    }
}

struct Opened(mpsc::UnboundedSender<Channel<Msg>>);

impl client::Handler for Opened {
    type Error = russh::Error;

    async fn check_server_key(&mut self, _: &PublicKeyOrCertificate) -> Result<bool, Self::Error> {
        Ok(true)
    }

    async fn server_channel_open_forwarded_tcpip(
        &mut self,
        channel: Channel<Msg>,
        _: &str,
        _: u32,
        _: &str,
        _: u32,
        reply: ChannelOpenHandle,
        _: &mut client::Session,
    ) -> Result<(), Self::Error> {
        reply.accept().await;
        let _ = self.0.send(channel);
        Ok(())
    }
}

/// Carries bytes in pieces of these sizes, over and over.
async fn split(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, pieces: Vec<usize>) {
    let mut buffer = vec![0; 9000];
    for piece in pieces.into_iter().cycle() {
        match from.read(&mut buffer[..piece]).await {
            Ok(n) if n > 0 => {
                if to.write_all(&buffer[..n]).await.is_err() {
                    return;
                }
                tokio::task::yield_now().await;
            }
            _ => break,
        }
    }
    let _ = to.shutdown().await;
}

/// The bytes from `at` on of one direction of one channel.
fn pattern(channel: usize, at: usize, len: usize) -> Vec<u8> {
    (at..at + len).map(|n| (n * 7 + n / 251 + channel * 31) as u8).collect()
}

/// What one side of a channel did: bytes sent, bytes heard, and whether it left.
#[derive(Debug, Default)]
struct Side {
    sent: usize,
    heard: usize,
    left: bool,
}

fn check(channel: usize, heard: &mut usize, bytes: &[u8]) {
    assert!(bytes == pattern(channel, *heard, bytes.len()), "channel {channel}: wrong bytes from {heard} on");
    *heard += bytes.len();
}

/// The visitor: returns when both ends have come, or it has left.
async fn here(number: usize, stream: super::ChannelStream, mut steps: mpsc::UnboundedReceiver<Step>) -> Side {
    let (mut read, mut write) = tokio::io::split(stream);
    let reading = tokio::spawn(async move {
        let (mut heard, mut buffer) = (0, vec![0; 10_000]);
        while let Ok(n) = read.read(&mut buffer).await
            && n > 0
        {
            check(number, &mut heard, &buffer[..n]);
        }
        heard
    });
    let mut side = Side::default();
    while let Some(step) = steps.recv().await {
        match step {
            Step::Write(len) => {
                if write.write_all(&pattern(number + CHANNELS, side.sent, len)).await.is_err() {
                    break;
                }
                side.sent += len;
            }
            Step::End => break,
            Step::Leave => {
                reading.abort();
                side.left = true;
                return side;
            }
        }
    }
    let _ = write.shutdown().await;
    side.heard = reading.await.unwrap();
    side
}

/// The origin, in the same way.
async fn there(number: usize, channel: Channel<Msg>, mut steps: mpsc::UnboundedReceiver<Step>) -> Side {
    let (mut read, write) = channel.split();
    // That client's writers wait for a window although the channel was closed.
    let (closed, mut is_closed) = watch::channel(false);
    let reading = tokio::spawn(async move {
        let mut heard = 0;
        while let Some(message) = read.wait().await {
            match message {
                ChannelMsg::Data { data } => check(number + CHANNELS, &mut heard, &data),
                ChannelMsg::Close => break,
                _ => {}
            }
        }
        let _ = closed.send(true);
        heard
    });
    let mut side = Side::default();
    while let Some(step) = steps.recv().await {
        match step {
            Step::Write(len) => {
                let written = tokio::select! {
                    written = write.data_bytes(pattern(number, side.sent, len)) => written.is_ok(),
                    _ = is_closed.wait_for(|closed| *closed) => false,
                };
                if !written {
                    break;
                }
                side.sent += len;
            }
            Step::End => break,
            Step::Leave => {
                let _ = write.close().await;
                reading.abort();
                side.left = true;
                return side;
            }
        }
    }
    let _ = write.eof().await;
    side.heard = reading.await.unwrap();
    let _ = write.close().await;
    side
}

async fn play(doings: &[Doing], pieces: Vec<usize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let far = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (tcp, _) = listener.accept().await.unwrap();
    let config = Arc::new(Config { rekey_bytes: 200 << 10, ..Arc::into_inner(config()).unwrap() });
    let outstanding = Arc::clone(&config.outstanding);
    let link = Link::new(config);
    let driver = tokio::spawn(Driver::new(Arc::clone(&link), tcp, b"", Box::new(Anybody::default())));
    let (near, wire) = tokio::io::duplex(1 << 16);
    let ((from_client, to_client), (from_node, to_node)) = (tokio::io::split(wire), far.into_split());
    tokio::spawn(split(from_client, to_node, pieces.clone()));
    tokio::spawn(split(from_node, to_client, pieces));
    let (opened, mut channels) = mpsc::unbounded_channel();
    let mut client = client::connect_stream(Arc::default(), near, Opened(opened)).await.unwrap();
    assert!(client.authenticate_none("anybody").await.unwrap().success());

    let mut sides: Vec<[(mpsc::UnboundedSender<Step>, JoinHandle<Side>); 2]> = Vec::new();
    let to = To::Tcp("web", 80, "192.0.2.1:4000".parse().unwrap());
    for number in 0..CHANNELS {
        let stream = link.open(to, None).await.unwrap();
        let channel = channels.recv().await.unwrap();
        let ((tell_here, hear_here), (tell_there, hear_there)) = (mpsc::unbounded_channel(), mpsc::unbounded_channel());
        sides.push([
            (tell_here, tokio::spawn(here(number, stream, hear_here))),
            (tell_there, tokio::spawn(there(number, channel, hear_there))),
        ]);
    }
    for doing in doings {
        match *doing {
            Doing::Here(number, step) => drop(sides[number][0].0.send(step)),
            Doing::There(number, step) => drop(sides[number][1].0.send(step)),
            Doing::Rekey => client.rekey_soon().await.unwrap(),
        }
    }
    for (number, [here, there]) in sides.into_iter().enumerate() {
        drop((here.0, there.0));
        let (here, there) = (here.1.await.unwrap(), there.1.await.unwrap());
        if here.left || there.left {
            assert!(here.heard <= there.sent && there.heard <= here.sent, "channel {number}: {here:?} {there:?}");
        } else {
            assert_eq!((here.heard, there.heard), (there.sent, here.sent), "channel {number}");
        }
    }
    // The session lives.
    let mut stream = link.open(to, None).await.unwrap();
    let channel = channels.recv().await.unwrap();
    channel.data_bytes("still here").await.unwrap();
    let mut word = [0; 10];
    stream.read_exact(&mut word).await.unwrap();
    assert_eq!(&word, b"still here");
    drop((stream, channel));
    link.disconnect("done");
    driver.await.unwrap();
    drop(link);
    assert_eq!(outstanding.load(std::sync::atomic::Ordering::Relaxed), 0);
}
