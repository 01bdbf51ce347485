use super::way::SMALL_SPLICES;
use super::*;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::pin::Pin;

use aws_lc_rs::digest::{Context as Digest, SHA256};
use proptest::prelude::*;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, duplex};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// A deadline for what should take no time: reaching it fails the test.
const SOON: Duration = Duration::from_secs(20);

async fn soon<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, work).await.expect("takes too long")
}

async fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    (near, listener.accept().await.unwrap().0)
}

/// A visitor, a running relay, an origin.
struct Scene<S> {
    visitor: S,
    origin: S,
    relay: JoinHandle<Relayed>,
    cut: CancellationToken,
}

fn start(visitor: Stream, origin: Stream, settings: RelaySettings) -> (JoinHandle<Relayed>, CancellationToken) {
    let cut = CancellationToken::new();
    let token = cut.clone();
    (tokio::spawn(async move { relay(visitor, origin, &settings, &token).await }), cut)
}

async fn tcp_scene(settings: RelaySettings) -> Scene<TcpStream> {
    let ((visitor, edge), (origin, tunnel)) = (tcp_pair().await, tcp_pair().await);
    let (relay, cut) = start(Stream::tcp(edge), Stream::tcp(tunnel), settings);
    Scene { visitor, origin, relay, cut }
}

fn duplex_scene(settings: RelaySettings) -> Scene<DuplexStream> {
    let ((visitor, edge), (origin, tunnel)) = (duplex(1 << 16), duplex(1 << 16));
    let (relay, cut) = start(Stream::other(edge), Stream::other(tunnel), settings);
    Scene { visitor, origin, relay, cut }
}

fn copying() -> RelaySettings {
    RelaySettings { splice: false, ..RelaySettings::default() }
}

fn impatient() -> RelaySettings {
    RelaySettings { idle: Duration::from_millis(600), ..RelaySettings::default() }
}

/// Bytes that differ at every place of every stream.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend((state >> 8).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

async fn sha256_to_end(mut from: impl AsyncRead + Unpin) -> (u64, Vec<u8>) {
    let (mut digest, mut count) = (Digest::new(&SHA256), 0);
    let mut buf = vec![0; 64 << 10];
    loop {
        match from.read(&mut buf).await.unwrap() {
            0 => return (count, digest.finish().as_ref().to_vec()),
            n => {
                digest.update(&buf[..n]);
                count += n as u64;
            }
        }
    }
}

async fn assert_reset(mut end: TcpStream) {
    let error = soon(end.read_to_end(&mut Vec::new())).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

async fn assert_clean_half_closes(
    mut visitor: impl AsyncRead + AsyncWrite + Unpin,
    mut origin: impl AsyncRead + AsyncWrite + Unpin,
) {
    let question = pattern(3, 3 << 20);
    let asking = async {
        visitor.write_all(&question).await.unwrap();
        visitor.shutdown().await.unwrap();
        let mut answer = Vec::new();
        visitor.read_to_end(&mut answer).await.unwrap();
        answer
    };
    let answering = async {
        let mut heard = Vec::new();
        origin.read_to_end(&mut heard).await.unwrap();
        assert!(heard == question);
        origin.write_all(b"heard it all").await.unwrap();
        origin.shutdown().await.unwrap();
    };
    let (answer, ()) = soon(async { tokio::join!(asking, answering) }).await;
    assert_eq!(answer, b"heard it all");
}

#[tokio::test]
async fn a_visitor_keeps_the_answer_after_closing_its_side() {
    for settings in [RelaySettings::default(), copying()] {
        let scene = tcp_scene(settings).await;
        assert_clean_half_closes(scene.visitor, scene.origin).await;
        let relayed = soon(scene.relay).await.unwrap();
        assert_eq!((relayed.up, relayed.down, relayed.end), (3 << 20, 12, End::Clean));
        assert!(relayed.first_byte.is_some() && relayed.error().is_none());
    }
    let scene = duplex_scene(RelaySettings::default());
    assert_clean_half_closes(scene.visitor, scene.origin).await;
    let relayed = soon(scene.relay).await.unwrap();
    assert_eq!((relayed.up, relayed.down, relayed.spliced, relayed.end), (3 << 20, 12, 0, End::Clean));
}

#[tokio::test]
async fn an_origin_may_close_its_side_first() {
    let mut scene = tcp_scene(RelaySettings::default()).await;
    scene.origin.write_all(b"bye").await.unwrap();
    scene.origin.shutdown().await.unwrap();
    let mut heard = Vec::new();
    soon(scene.visitor.read_to_end(&mut heard)).await.unwrap();
    scene.visitor.write_all(&pattern(5, 1 << 20)).await.unwrap();
    scene.visitor.shutdown().await.unwrap();
    let (count, _) = soon(sha256_to_end(scene.origin)).await;
    assert_eq!((heard.as_slice(), count), (&b"bye"[..], 1 << 20));
    assert_eq!(soon(scene.relay).await.unwrap().end, End::Clean);
}

#[tokio::test]
async fn nothing_said_is_a_clean_end_of_zero_bytes() {
    let mut scene = tcp_scene(RelaySettings::default()).await;
    scene.visitor.shutdown().await.unwrap();
    assert_eq!(soon(scene.origin.read(&mut [0; 8])).await.unwrap(), 0);
    scene.origin.shutdown().await.unwrap();
    assert_eq!(soon(scene.visitor.read(&mut [0; 8])).await.unwrap(), 0);
    let relayed = soon(scene.relay).await.unwrap();
    assert_eq!(relayed, Relayed { up: 0, down: 0, spliced: 0, first_byte: None, end: End::Clean, why: None });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bulk_both_ways_at_once_arrives_as_it_was_sent() {
    const LEN: usize = 32 << 20;
    for settings in [RelaySettings::default(), copying()] {
        let splice = settings.splice;
        let scene = tcp_scene(settings).await;
        let (from_visitor, to_visitor) = scene.visitor.into_split();
        let (from_origin, to_origin) = scene.origin.into_split();
        let send = |mut to: tokio::net::tcp::OwnedWriteHalf, bytes: Vec<u8>| async move {
            to.write_all(&bytes).await.unwrap();
            to.shutdown().await.unwrap();
        };
        let (question, answer) = (pattern(7, LEN), pattern(8, LEN));
        let sums = [&question, &answer].map(|bytes| {
            let mut digest = Digest::new(&SHA256);
            digest.update(bytes);
            (LEN as u64, digest.finish().as_ref().to_vec())
        });
        tokio::spawn(send(to_visitor, question));
        tokio::spawn(send(to_origin, answer));
        let heard = tokio::join!(tokio::spawn(sha256_to_end(from_origin)), tokio::spawn(sha256_to_end(from_visitor)));
        assert!([heard.0.unwrap(), heard.1.unwrap()] == sums);
        let relayed = soon(scene.relay).await.unwrap();
        assert_eq!((relayed.up, relayed.down, relayed.end), (LEN as u64, LEN as u64, End::Clean));
        if splice {
            assert!(relayed.spliced > LEN as u64, "most of it was spliced: {}", relayed.spliced);
        } else {
            assert_eq!(relayed.spliced, 0);
        }
    }
}

#[tokio::test]
async fn small_messages_after_bulk_are_copied_again() {
    let mut scene = tcp_scene(RelaySettings::default()).await;
    let bulk = pattern(11, 8 << 20);
    let mut heard = vec![0; bulk.len()];
    soon(async { tokio::try_join!(scene.visitor.write_all(&bulk), scene.origin.read_exact(&mut heard)) })
        .await
        .unwrap();
    assert!(heard == bulk);
    for _ in 0..64 {
        scene.visitor.write_all(b"small").await.unwrap();
        soon(scene.origin.read_exact(&mut [0; 5])).await.unwrap();
    }
    drop((scene.visitor, scene.origin));
    let relayed = soon(scene.relay).await.unwrap();
    let small_splices = relayed.spliced.saturating_sub(bulk.len() as u64) / 5;
    assert!(relayed.spliced > 0 && small_splices <= u64::from(SMALL_SPLICES), "{relayed:?}");
}

#[tokio::test]
async fn a_reset_of_one_side_reaches_the_other_as_one() {
    for settings in [RelaySettings::default(), copying()] {
        let mut scene = tcp_scene(settings.clone()).await;
        scene.visitor.write_all(b"half a question").await.unwrap();
        soon(scene.origin.read_exact(&mut [0; 15])).await.unwrap();
        Stream::tcp(scene.visitor).reset();
        // The origin reads and writes nothing: the visitor's end alone ends it.
        let relayed = soon(scene.relay).await.unwrap();
        assert_eq!((relayed.up, relayed.end), (15, End::VisitorGone));
        assert_reset(scene.origin).await;

        let mut scene = tcp_scene(settings).await;
        scene.origin.write_all(b"half an answer").await.unwrap();
        soon(scene.visitor.read_exact(&mut [0; 14])).await.unwrap();
        Stream::tcp(scene.origin).reset();
        let relayed = soon(scene.relay).await.unwrap();
        assert_eq!((relayed.down, relayed.end), (14, End::OriginLost));
        assert_eq!(relayed.error(), Some(Error::OriginReset));
        assert_reset(scene.visitor).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reset_in_the_middle_of_bulk_is_one_and_its_bytes_are_counted() {
    let mut scene = tcp_scene(RelaySettings::default()).await;
    let writer = tokio::spawn(async move {
        let bytes = pattern(13, 64 << 20);
        scene.origin.write_all(&bytes).await.unwrap_err()
    });
    soon(scene.visitor.read_exact(&mut vec![0; 8 << 20])).await.unwrap();
    Stream::tcp(scene.visitor).reset();
    let relayed = soon(scene.relay).await.unwrap();
    assert!(relayed.end == End::VisitorGone && relayed.down >= 8 << 20 && relayed.spliced > 0, "{relayed:?}");
    soon(writer).await.unwrap();
}

#[tokio::test]
async fn a_visitor_that_breaks_after_closing_its_side_is_noticed() {
    let mut scene = tcp_scene(RelaySettings::default()).await;
    scene.visitor.shutdown().await.unwrap();
    assert_eq!(soon(scene.origin.read(&mut [0; 8])).await.unwrap(), 0);
    // The origin ignores the end and never writes.
    Stream::tcp(scene.visitor).reset();
    assert_eq!(soon(scene.relay).await.unwrap().end, End::VisitorGone);
    assert_eq!(soon(scene.origin.write(b"x")).await.unwrap_or(1), 1);
}

#[tokio::test]
async fn a_visitor_that_breaks_while_its_upload_waits_is_noticed() {
    for settings in [RelaySettings::default(), copying()] {
        let mut scene = tcp_scene(settings).await;
        let bytes = pattern(17, 64 << 10);
        // The origin takes nothing: as much as the kernel does, then no more.
        while let Ok(Ok(())) = tokio::time::timeout(Duration::from_millis(200), scene.visitor.write_all(&bytes)).await {
        }
        Stream::tcp(scene.visitor).reset();
        assert_eq!(soon(scene.relay).await.unwrap().end, End::VisitorGone);
        drop(scene.origin);
    }
}

#[tokio::test]
async fn an_early_answer_arrives_although_the_origin_refuses_the_rest() {
    let (mut visitor, edge) = duplex(1 << 16);
    let (mut origin, tunnel) = tcp_pair().await;
    origin.write_all(b"413").await.unwrap();
    visitor.write_all(&[0; 60_000]).await.unwrap();
    tunnel.readable().await.unwrap();
    // Unread bytes make its close a reset: the relay's next write breaks.
    let (relay, _cut) = start(Stream::other(edge), Stream::tcp(tunnel), RelaySettings::default());
    origin.readable().await.unwrap();
    drop(origin);
    let mut heard = [0; 3];
    soon(visitor.read_exact(&mut heard)).await.unwrap();
    let writing = async { while visitor.write_all(&[0; 1000]).await.is_ok() {} };
    soon(writing).await;
    assert_eq!(&heard, b"413");
    assert_eq!(soon(relay).await.unwrap().end, End::OriginLost);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_early_answer_arrives_whole_although_the_origin_refuses_the_rest() {
    // One that takes nothing, and has much to say.
    struct Refusing(std::io::Cursor<Vec<u8>>);
    impl AsyncRead for Refusing {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &mut tokio::io::ReadBuf<'_>,
        ) -> Poll<std::io::Result<()>> {
            Pin::new(&mut self.0).poll_read(cx, buf)
        }
    }
    impl AsyncWrite for Refusing {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<std::io::Result<usize>> {
            Poll::Ready(Err(ErrorKind::BrokenPipe.into()))
        }
        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
            Poll::Ready(Ok(()))
        }
        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }
    impl Duplex for Refusing {
        fn reset(&mut self) {}
    }
    let (mut visitor, edge) = duplex(1 << 10);
    let answer = pattern(19, 8 << 20);
    let origin = Stream::other(Refusing(std::io::Cursor::new(answer.clone())));
    let (relay, _cut) = start(Stream::other(edge), origin, RelaySettings::default());
    visitor.write_all(b"upload").await.unwrap();
    let mut heard = Vec::new();
    soon(visitor.read_to_end(&mut heard)).await.unwrap();
    assert!(heard == answer);
    assert_eq!(soon(relay).await.unwrap().end, End::OriginLost);
}

#[tokio::test]
async fn a_quiet_relay_ends_at_its_idle_limit_and_a_busy_one_does_not() {
    let mut scene = tcp_scene(impatient()).await;
    let started = Instant::now();
    // Either direction keeps it alive.
    for _ in 0..8 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        scene.origin.write_all(b"x").await.unwrap();
        soon(scene.visitor.read_exact(&mut [0; 1])).await.unwrap();
    }
    let relayed = soon(scene.relay).await.unwrap();
    assert!(started.elapsed() >= Duration::from_millis(1400), "{:?}", started.elapsed());
    assert_eq!((relayed.down, relayed.end, relayed.error()), (8, End::Idle, Some(Error::Idle)));
    assert_reset(scene.visitor).await;
    assert_reset(scene.origin).await;
}

#[tokio::test]
async fn a_visitor_that_reads_nothing_is_idle_too() {
    let mut scene = tcp_scene(impatient()).await;
    let flood = async { while scene.origin.write_all(&[0; 1 << 16]).await.is_ok() {} };
    soon(flood).await;
    assert_eq!(soon(scene.relay).await.unwrap().end, End::Idle);
}

#[tokio::test]
async fn a_cut_resets_both_sides_and_so_does_a_dropped_relay() {
    let scene = tcp_scene(RelaySettings::default()).await;
    scene.cut.cancel();
    assert_eq!(soon(scene.relay).await.unwrap().end, End::Cut);
    assert_reset(scene.visitor).await;
    assert_reset(scene.origin).await;

    let scene = tcp_scene(RelaySettings::default()).await;
    tokio::task::yield_now().await;
    scene.relay.abort();
    assert!(soon(scene.relay).await.unwrap_err().is_cancelled());
    assert_reset(scene.visitor).await;
    assert_reset(scene.origin).await;
}

#[tokio::test]
async fn put_back_bytes_arrive_first() {
    let ((mut visitor, edge), (mut origin, tunnel)) = (tcp_pair().await, tcp_pair().await);
    // Larger than one read, so that bulk begins while some of it is left.
    let head = pattern(17, 100_000);
    let edge = Stream::tcp(edge).with_head(head.clone().into());
    let (relay, _cut) = start(edge, Stream::tcp(tunnel), RelaySettings::default());
    let rest = pattern(18, 1 << 20);
    let writing = async {
        visitor.write_all(&rest).await.unwrap();
        visitor.shutdown().await.unwrap();
    };
    let mut heard = Vec::new();
    soon(async { tokio::join!(writing, async { origin.read_to_end(&mut heard).await.unwrap() }) }).await;
    assert!(heard == [head, rest].concat());
    drop(origin);
    assert_eq!(soon(relay).await.unwrap().end, End::Clean);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Any sizes of writes, any sizes of what lies between.
    #[test]
    fn any_conversation_arrives_as_it_was_said(
        up in proptest::collection::vec(1usize..40_000, 0..12),
        down in proptest::collection::vec(1usize..40_000, 0..12),
        room in 1usize..5_000,
        tcp: bool,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(soon(async {
            let ((visitor, edge), (origin, tunnel)) = (duplex(room), duplex(room));
            let (edge, visitor): (Stream, Stream) = if tcp {
                let (a, b) = tcp_pair().await;
                (Stream::tcp(a), Stream::tcp(b))
            } else {
                (Stream::other(edge), Stream::other(visitor))
            };
            let (relay, _cut) = start(edge, Stream::other(tunnel), RelaySettings::default());
            let talk = |stream: Stream, seed: u64, said: Vec<usize>| async move {
                let (mut from, mut to) = tokio::io::split(stream);
                let saying = async {
                    for (i, len) in said.iter().enumerate() {
                        to.write_all(&pattern(seed + i as u64 * 2, *len)).await.unwrap();
                    }
                    to.shutdown().await.unwrap();
                };
                let mut heard = Vec::new();
                tokio::join!(saying, async { from.read_to_end(&mut heard).await.unwrap() });
                heard
            };
            let heard = tokio::join!(talk(visitor, 21, up.clone()), talk(Stream::other(origin), 1001, down.clone()));
            let all = |seed: u64, said: &[usize]| {
                said.iter().enumerate().flat_map(|(i, len)| pattern(seed + i as u64 * 2, *len)).collect::<Vec<_>>()
            };
            assert!(heard.0 == all(1001, &down) && heard.1 == all(21, &up));
            assert_eq!(relay.await.unwrap().end, End::Clean);
        }));
    }
}
