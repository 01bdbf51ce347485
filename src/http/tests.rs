//! Promises of the HTTP path, kept over in-memory streams: the visitor's side
//! is raw bytes or a hyper client, the origin's a task of the test.

use std::net::IpAddr;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::SeqCst;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper::body::Frame;
use hyper::client::conn::http2;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::sync::mpsc;

use super::*;
use crate::dial::{Dialed, Errand, Way};
use crate::gate::Gates;
use crate::limits::Permit;
use crate::model::{Socket, SocketType, TunnelId};
use crate::routes::Route;
use crate::visit_log::Sink;

/// How long a test waits for what must happen.
const SOON: Duration = Duration::from_secs(5);

/// What the origin's side of a test does with one connection.
type Origin = Box<dyn Fn(DuplexStream) + Send + Sync>;

struct FakeDial {
    origin: Origin,
    fails: Option<Error>,
    visits: Arc<Visits>,
}

#[derive(Default)]
struct Visits(Mutex<Vec<Arc<Visit>>>);

impl Sink for Visits {
    fn record(&self, visit: &Arc<Visit>) {
        self.0.lock().push(Arc::clone(visit));
    }
}

#[derive(Clone)]
struct FakeWay(TunnelId, Arc<Visits>);

impl Way for FakeWay {
    fn id(&self) -> u64 {
        1
    }

    fn tunnel(&self) -> &TunnelId {
        &self.0
    }

    fn console(&self) -> Arc<dyn Sink> {
        Arc::clone(&self.1) as _
    }
}

impl Dial for FakeDial {
    type Way = FakeWay;

    fn admit(&self, route: &Route) -> Result<Permit, Error> {
        Permit::take(&route.state.visitors, 1000).ok_or(Error::SocketLimit)
    }

    fn ways(&self, _: &Route, _: IpAddr) -> Vec<FakeWay> {
        vec![FakeWay("t".parse().unwrap(), Arc::clone(&self.visits))]
    }

    async fn dial(&self, ways: Vec<FakeWay>, _: Errand<'_>) -> Result<Dialed<FakeWay>, Error> {
        if let Some(error) = self.fails {
            return Err(error);
        }
        let (near, far) = duplex(64 << 10);
        (self.origin)(far);
        Ok(Dialed { stream: Stream::other(near), way: ways[0].clone(), took: None })
    }
}

struct World {
    http: Arc<Http<FakeDial>>,
    visits: Arc<Visits>,
    drain: CancellationToken,
    cut: CancellationToken,
}

fn socket(id: &str, kind: SocketType, host: &str) -> Socket {
    let mut socket = Socket::new(id.parse().unwrap(), kind);
    socket.hostnames = vec![host.parse().unwrap()];
    socket
}

impl World {
    fn new<F, Fut>(settings: HttpSettings, origin: F) -> Self
    where
        F: Fn(DuplexStream) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        Self::with(settings, None, Box::new(move |io| drop(tokio::spawn(origin(io)))))
    }

    fn with(settings: HttpSettings, fails: Option<Error>, origin: Origin) -> Self {
        let routes = Arc::new(Routes::default());
        routes.put_socket(socket("a", SocketType::Http, "a.test"));
        routes.put_socket(socket("b", SocketType::Http, "b.test"));
        routes.put_socket(socket("p", SocketType::Passthrough, "p.test"));
        let mut hosted = socket("hosted", SocketType::Http, "hosted.test");
        hosted.upstream.host = Some("inner.test:81".into());
        routes.put_socket(hosted);
        let mut secure = socket("s", SocketType::Http, "s.test");
        secure.redirect_https = true;
        routes.put_socket(secure);
        let mut two = socket("two", SocketType::Http, "two.test");
        two.upstream.http2 = true;
        routes.put_socket(two);
        let rules = serde_json::json!({"type": "http", "hostnames": ["ruled.test"],
            "request_headers": {"set": {"X-Key": "of the record"}, "remove": ["cookie"]},
            "response_headers": {"remove": ["server"], "add": {"X-Robots-Tag": "noindex"}},
            "hsts": {"max_age": 600, "include_subdomains": true}});
        let ruled = Socket::from_record(&"ruled".parse().unwrap(), rules.as_object().unwrap().clone());
        routes.put_socket(ruled.unwrap());
        let visits = Arc::new(Visits::default());
        let dial = FakeDial { origin, fails, visits: Arc::clone(&visits) };
        let gates = Gates::over(Arc::clone(&routes));
        let http = Http::new(routes, Arc::new(dial), gates, settings, TaskTracker::new()).unwrap();
        Self { http, visits, drain: CancellationToken::new(), cut: CancellationToken::new() }
    }

    /// An origin that answers each request with what `answer` makes of its head.
    fn echo(answer: impl Fn(&str) -> String + Send + Sync + 'static) -> Self {
        let answer = Arc::new(answer);
        Self::new(HttpSettings::default(), move |mut io| {
            let answer = Arc::clone(&answer);
            async move {
                let head = read_head(&mut io).await;
                let _ = io.write_all(answer(&head).as_bytes()).await;
            }
        })
    }

    fn visit(&self, via: Via) -> DuplexStream {
        let (near, far) = duplex(64 << 10);
        self.visit_over(Stream::other(far), via);
        near
    }

    fn visit_over(&self, stream: Stream, via: Via) {
        let (http, drain, cut) = (Arc::clone(&self.http), self.drain.clone(), self.cut.clone());
        let visitor = Visitor::new("198.51.100.7:5000".parse().unwrap(), "192.0.2.1:8443".parse().unwrap());
        tokio::spawn(async move { http.serve(stream, visitor, via, &drain, &cut).await });
    }

    fn plain(&self) -> DuplexStream {
        self.visit(Via { protocol: Protocol::Http1, tls: None })
    }

    async fn h2(&self, via: Via) -> http2::SendRequest<BoxBody> {
        let io = self.visit(via);
        let (requests, driver) =
            http2::handshake(TokioExecutor::new(), TokioIo::new(io)).await.expect("an h2 handshake");
        tokio::spawn(driver);
        requests
    }

    /// The records so far, once there are `n`.
    async fn records(&self, n: usize) -> Vec<Arc<Visit>> {
        soon(async {
            loop {
                let records = self.visits.0.lock().clone();
                if records.len() >= n {
                    return records;
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        })
        .await
    }

    /// What a visitor gets for these bytes, up to the connection's end.
    async fn ask(&self, request: &str) -> String {
        let mut io = self.plain();
        io.write_all(request.as_bytes()).await.unwrap();
        read_all(&mut io).await
    }
}

type BoxBody = http_body_util::combinators::BoxBody<Bytes, std::io::Error>;

fn full(text: &str) -> BoxBody {
    Full::new(Bytes::from(text.to_owned())).map_err(|e| match e {}).boxed()
}

fn empty() -> BoxBody {
    Empty::new().map_err(|e| match e {}).boxed()
}

fn channel_body() -> (mpsc::Sender<Frame<Bytes>>, BoxBody) {
    let (tx, mut rx) = mpsc::channel::<Frame<Bytes>>(1);
    let frames = futures_util::stream::poll_fn(move |cx| rx.poll_recv(cx).map(|f| f.map(Ok::<_, std::io::Error>)));
    (tx, BodyExt::boxed(StreamBody::new(frames)))
}

fn h2_plain() -> Via {
    Via { protocol: Protocol::Http2, tls: None }
}

fn tls(protocol: Protocol, sni: &str) -> Via {
    let covers = Arc::new(|host: &str| host.ends_with(".test") && host.split('.').count() == 2);
    Via { protocol, tls: Some(Tls { sni: Some(sni.parse().unwrap()), covers, took: Duration::ZERO }) }
}

async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, what).await.expect("within the test's deadline")
}

/// Reads up to the end of a head, or of the stream.
async fn read_head(io: &mut DuplexStream) -> String {
    read_until(io, "\r\n\r\n").await
}

async fn read_until(io: &mut DuplexStream, end: &str) -> String {
    let mut read = Vec::new();
    soon(async {
        let mut byte = [0];
        while !read.ends_with(end.as_bytes()) && io.read(&mut byte).await.is_ok_and(|n| n > 0) {
            read.push(byte[0]);
        }
    })
    .await;
    String::from_utf8_lossy(&read).into_owned()
}

async fn read_all(io: &mut DuplexStream) -> String {
    let mut read = Vec::new();
    let _ = soon(io.read_to_end(&mut read)).await;
    String::from_utf8_lossy(&read).into_owned()
}

fn ok(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

fn get(host: &str, more: &str) -> String {
    format!("GET / HTTP/1.1\r\nHost: {host}\r\n{more}\r\n")
}

#[tokio::test]
async fn each_request_of_a_connection_goes_where_its_own_host_says() {
    let world = World::echo(|head| ok(head.lines().find(|l| l.starts_with("host:")).unwrap_or("none")));
    let mut io = world.plain();
    for (host, seen) in
        [("a.test", "host: a.test"), ("B.Test:80", "host: B.Test:80"), ("hosted.test", "host: inner.test:81")]
    {
        io.write_all(get(host, "").as_bytes()).await.unwrap();
        let head = read_head(&mut io).await;
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        assert_eq!(read_until(&mut io, seen).await, seen);
    }
    io.write_all(b"GET http://b.test/x?y HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n").await.unwrap();
    assert!(read_all(&mut io).await.ends_with("host: b.test"));
    let sockets: Vec<String> = world.records(4).await.iter().map(|v| v.socket.as_ref().unwrap().to_string()).collect();
    assert_eq!(sockets, ["a", "b", "hosted", "b"]);
}

#[tokio::test]
async fn unknown_names_all_get_the_same_answer() {
    let world = World::echo(|_| ok("never"));
    let mut answers = Vec::new();
    for host in ["nobody.test", "p.test", "127.0.0.1", "[::1]:80"] {
        let answer = world.ask(&get(host, "Connection: close\r\nX-Request-Id: same\r\n")).await;
        assert!(answer.starts_with("HTTP/1.1 404 Not Found\r\n"), "{answer}");
        assert!(!answer.contains(host) && answer.contains("cache-control: no-store"));
        answers.push(answer.lines().filter(|l| !l.starts_with("date:")).collect::<Vec<_>>().join("\n"));
    }
    answers.dedup();
    assert_eq!(answers.len(), 1);
    assert!(world.ask("GET / HTTP/1.0\r\n\r\n").await.starts_with("HTTP/1.0 404"));
}

#[tokio::test]
async fn a_name_that_the_certificate_does_not_cover_is_misdirected() {
    let world = World::echo(|_| ok("fine"));
    for (host, status) in [
        ("a.test", "200"),
        ("b.test", "200"),
        ("nobody.test", "404"),
        ("x.y.test", "421"),
        ("a.other", "421"),
        ("uncovered.sni", "404"),
    ] {
        let mut io = world.visit(tls(Protocol::Http1, "uncovered.sni"));
        io.write_all(get(host, "Connection: close\r\n").as_bytes()).await.unwrap();
        let answer = read_all(&mut io).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{host}: {answer}");
    }
    let mut h2 = world.h2(tls(Protocol::Http2, "a.test")).await;
    let request = Request::get("https://a.other/").body(empty()).unwrap();
    assert_eq!(soon(h2.send_request(request)).await.unwrap().status(), 421);
}

#[tokio::test]
async fn malformed_and_ambiguous_requests_are_refused_and_the_connection_closed() {
    let world = World::echo(|_| ok("forwarded"));
    for bad in [
        "GET / HTTP/1.1\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a.test\r\nHost: b.test\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a.test\r\nHost: a.test\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a.test@b.test\r\n\r\n",
        "GET / HTTP/1.1\r\nHost : a.test\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a.test\r\n X: folded\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a.test\r\nX: a\0b\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a.test\r\nX: a\rb\r\n\r\n",
        "GET a.test HTTP/1.1\r\nHost: a.test\r\n\r\n",
        "GET / HTTP/2.7\r\nHost: a.test\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        "GET / HTTP/1.1\nHost: a.test\n\n",
        "GET /#x HTTP/1.1\r\nHost: a.test\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\na",
        "POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: +1\r\n\r\na",
        "POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: -1\r\n\r\na",
        "POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: gzip\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.0\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ] {
        let answer = world.ask(bad).await;
        let refused = answer.starts_with("HTTP/1.1 400") || answer.starts_with("HTTP/1.0 400");
        assert!(refused && !answer.contains("forwarded"), "{bad:?}: {answer}");
    }
    let answer = world.ask("CONNECT a.test:443 HTTP/1.1\r\nHost: a.test:443\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 405") && answer.contains("allow: GET"), "{answer}");
}

#[tokio::test]
async fn a_head_that_is_too_large_gets_431() {
    let settings = HttpSettings { head_max: crate::fields::Bytes(8 << 10), ..HttpSettings::default() };
    let world = World::new(settings, |_| async {});
    let answer = world.ask(&get("a.test", &format!("X: {}\r\n", "x".repeat(9 << 10)))).await;
    assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
    let many: String = (0..200).map(|i| format!("X-{i}: 1\r\n")).collect();
    let answer = world.ask(&get("a.test", &many)).await;
    assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
    let mut h2 = world.h2(h2_plain()).await;
    let request = Request::get("http://a.test/").header("x", "x".repeat(9 << 10)).body(empty()).unwrap();
    let answer = soon(h2.send_request(request)).await;
    assert!(answer.is_err() || answer.is_ok_and(|r| r.status() == 431));
}

#[tokio::test]
async fn the_origin_sees_a_clean_head_with_the_true_visitor() {
    let world = World::echo(ok);
    let answer = world
        .ask(
            "GET /a//b/../%2e?x=%20&y HTTP/1.1\r\nHost: a.test:8080\r\nX-Forwarded-For: 6.6.6.6\r\n\
              X-Forwarded-Proto: https\r\nForwarded: for=6.6.6.6\r\nX_Forwarded_For: 6.6.6.6\r\n\
              Connection: close, X-Forwarded-For, X-Hop\r\nX-Hop: 1\r\nKeep-Alive: 5\r\nTE: trailers\r\n\r\n",
        )
        .await;
    let (_, seen) = answer.split_once("\r\n\r\n").unwrap();
    assert!(seen.starts_with("GET /a//b/../%2e?x=%20&y HTTP/1.1\r\n"), "{seen}");
    for line in [
        "x-forwarded-for: 198.51.100.7",
        "x-forwarded-proto: http",
        "x-forwarded-host: a.test:8080",
        "x-forwarded-port: 8443",
        "forwarded: for=198.51.100.7;host=\"a.test:8080\";proto=http",
        "via: 1.1 adit",
        "te: trailers",
        "host: a.test:8080",
    ] {
        assert!(seen.contains(&format!("{line}\r\n")), "{line} in {seen}");
    }
    assert!(!seen.contains("6.6.6.6") && !seen.contains("x-hop") && !seen.contains("keep-alive"), "{seen}");
}

#[tokio::test]
async fn plain_http_is_redirected_where_the_socket_wants_it() {
    let world = World::with(
        HttpSettings { public_https_port: 8443, ..HttpSettings::default() },
        None,
        Box::new(|_| panic!("never dialled")),
    );
    let answer = world
        .ask("POST /p?q=%20 HTTP/1.1\r\nHost: S.test:8080\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        .await;
    assert!(answer.starts_with("HTTP/1.1 308"), "{answer}");
    assert!(answer.contains("location: https://s.test:8443/p?q=%20\r\n"), "{answer}");
}

#[tokio::test]
async fn failures_have_their_own_words_and_forms() {
    for (error, status, word) in [
        (Error::NoTunnel, 503, "not connected"),
        (Error::OriginRefused, 502, "refused"),
        (Error::TunnelSilent, 504, "does not answer"),
    ] {
        let world = World::with(HttpSettings::default(), Some(error), Box::new(|_| ()));
        let answer = world.ask(&get("a.test", "Connection: close\r\nAccept: text/html\r\n")).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")) && answer.contains(word), "{answer}");
        assert_eq!(answer.contains("retry-after: 5"), status == 503);
        let answer = world.ask(&get("a.test", "Connection: close\r\nAccept: application/json\r\n")).await;
        assert!(answer.contains(&format!("\"error\":\"{}\"", error.label())), "{answer}");
        let head = "HEAD / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n";
        assert!(world.ask(head).await.ends_with("\r\n\r\n"));
    }
}

#[tokio::test]
async fn an_event_arrives_before_the_origin_sends_the_next() {
    let (next, wait) = mpsc::channel::<&'static str>(1);
    let wait = Arc::new(tokio::sync::Mutex::new(wait));
    let world = World::new(HttpSettings::default(), move |mut io| {
        let wait = Arc::clone(&wait);
        async move {
            read_head(&mut io).await;
            let head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: text/event-stream\r\n\r\n";
            io.write_all(head).await.unwrap();
            while let Some(event) = wait.lock().await.recv().await {
                io.write_all(format!("{:x}\r\n{event}\r\n", event.len()).as_bytes()).await.unwrap();
            }
            io.write_all(b"0\r\n\r\n").await.unwrap();
        }
    });
    let mut io = world.plain();
    io.write_all(get("a.test", "").as_bytes()).await.unwrap();
    assert!(read_head(&mut io).await.contains("transfer-encoding: chunked"));
    for event in ["data: 1\n\n", "data: 2\n\n", "data: 3\n\n"] {
        next.send(event).await.unwrap();
        let chunk = format!("{:X}\r\n{event}\r\n", event.len());
        assert_eq!(read_until(&mut io, &chunk).await.to_lowercase(), chunk.to_lowercase());
    }
    drop(next);
    assert_eq!(read_until(&mut io, "0\r\n\r\n").await, "0\r\n\r\n");
    let records = world.records(1).await;
    assert_eq!((records[0].bytes_down, records[0].error), (27, None));
    assert!(records[0].first_byte.is_some());
}

#[tokio::test]
async fn an_answer_in_a_coding_that_stays_on_is_none() {
    for (coding, status) in [("chunked", "200"), ("identity", "200"), ("gzip, chunked", "502"), ("x", "502")] {
        let world = World::echo(move |_| format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: {coding}\r\n\r\n0\r\n\r\n"));
        let answer = world.ask(&get("a.test", "Connection: close\r\n")).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{coding}: {answer}");
    }
}

#[tokio::test]
async fn answers_without_a_body_keep_the_connection() {
    let world = World::echo(|head| {
        if head.starts_with("HEAD") {
            "HTTP/1.1 200 OK\r\nContent-Length: 1234\r\n\r\n".into()
        } else if head.starts_with("GET /304") {
            "HTTP/1.1 304 Not Modified\r\nETag: \"x\"\r\n\r\n".into()
        } else if head.starts_with("OPTIONS *") {
            "HTTP/1.1 204 No Content\r\nAllow: GET\r\n\r\n".into()
        } else {
            ok("end")
        }
    });
    let mut io = world.plain();
    for (line, status, has) in
        [("HEAD /", "200", "content-length: 1234"), ("GET /304", "304", "etag"), ("OPTIONS *", "204", "allow: GET")]
    {
        io.write_all(format!("{line} HTTP/1.1\r\nHost: a.test\r\n\r\n").as_bytes()).await.unwrap();
        let head = read_head(&mut io).await;
        assert!(head.starts_with(&format!("HTTP/1.1 {status}")) && head.contains(has), "{head}");
    }
    io.write_all(get("a.test", "Connection: close\r\n").as_bytes()).await.unwrap();
    assert!(read_all(&mut io).await.ends_with("\r\n\r\nend"));
    assert!(world.records(4).await.iter().all(|v| v.error.is_none()));
}

#[tokio::test]
async fn trailers_go_both_ways() {
    let world = World::new(HttpSettings::default(), |mut io| async move {
        let mut seen = read_head(&mut io).await;
        seen += &read_until(&mut io, "x-sum: up\r\n\r\n").await;
        assert!(
            seen.to_lowercase().contains("trailer: x-sum") && seen.contains("transfer-encoding: chunked"),
            "{seen}"
        );
        io.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n2\r\nok\r\n0\r\nX-Sum: down\r\n\r\n")
            .await
            .unwrap();
    });
    let mut io = world.plain();
    io.write_all(
        b"POST / HTTP/1.1\r\nHost: a.test\r\nTE: trailers\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n\
          2;ext=1\r\nhi\r\n0\r\nX-Sum: up\r\n\r\n",
    )
    .await
    .unwrap();
    assert!(read_until(&mut io, "x-sum: down\r\n\r\n").await.contains("2\r\nok\r\n0\r\n"));

    let mut h2 = world.h2(h2_plain()).await;
    let (tx, body) = channel_body();
    let request = Request::post("http://a.test/").header("trailer", "x-sum").body(body).unwrap();
    let sent = tokio::spawn(h2.send_request(request));
    tx.send(Frame::data("hi".into())).await.unwrap();
    let mut trailers = hyper::HeaderMap::new();
    trailers.insert("x-sum", "up".parse().unwrap());
    tx.send(Frame::trailers(trailers)).await.unwrap();
    drop(tx);
    let answer = soon(soon(sent).await.unwrap().unwrap().into_body().collect()).await.unwrap();
    assert_eq!(answer.trailers().unwrap()["x-sum"], "down");
}

#[tokio::test]
async fn a_get_with_a_body_of_unknown_length_keeps_it() {
    let world = World::new(HttpSettings::default(), |mut io| async move {
        read_head(&mut io).await;
        let body = read_until(&mut io, "0\r\n\r\n").await;
        io.write_all(ok(&body).as_bytes()).await.unwrap();
    });
    let answer = world
        .ask("GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
        .await;
    assert!(answer.contains("3\r\nabc\r\n0"), "{answer}");
}

#[tokio::test]
async fn a_websocket_echoes_both_ways_from_its_first_byte() {
    let world = World::new(HttpSettings::default(), |mut io| async move {
        let head = read_head(&mut io).await;
        assert!(head.contains("connection: upgrade\r\n") && head.contains("upgrade: websocket\r\n"), "{head}");
        // The first bytes of the new protocol share a packet with the answer.
        io.write_all(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nhello ")
            .await
            .unwrap();
        let mut buf = [0; 64];
        while let Ok(n @ 1..) = io.read(&mut buf).await {
            io.write_all(&buf[..n]).await.unwrap();
        }
    });
    let mut io = world.plain();
    let ask = get("a.test", "Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n") + "early ";
    io.write_all(ask.as_bytes()).await.unwrap();
    let head = read_head(&mut io).await;
    assert!(head.starts_with("HTTP/1.1 101") && head.contains("upgrade: websocket"), "{head}");
    assert_eq!(read_until(&mut io, "early ").await, "hello early ");
    io.write_all(b"more").await.unwrap();
    assert_eq!(read_until(&mut io, "more").await, "more");
    assert!(world.visits.0.lock().is_empty());
    io.shutdown().await.unwrap();
    assert_eq!(read_all(&mut io).await, "");
    let records = world.records(1).await;
    assert_eq!((records[0].status, records[0].bytes_up, records[0].bytes_down), (Some(101), 10, 16));
    assert_eq!(records[0].error, None);
}

#[tokio::test]
async fn an_upgrade_that_nobody_asked_for_is_refused() {
    let world = World::echo(|_| "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n".into());
    let answer = world.ask(&get("a.test", "Connection: close\r\n")).await;
    assert!(answer.starts_with("HTTP/1.1 502"), "{answer}");
    let h2c = get("a.test", "Connection: close, Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n");
    assert!(world.ask(&h2c).await.starts_with("HTTP/1.1 502"));
}

#[tokio::test]
async fn a_hundred_streams_run_at_once_on_one_connection() {
    let arrived = Arc::new(tokio::sync::Barrier::new(100));
    let world = World::new(HttpSettings::default(), move |mut io| {
        let arrived = Arc::clone(&arrived);
        async move {
            let head = read_head(&mut io).await;
            arrived.wait().await;
            let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
            io.write_all(ok(&path).as_bytes()).await.unwrap();
        }
    });
    let h2 = world.h2(h2_plain()).await;
    let asks = (0..100).map(|i| {
        let mut h2 = h2.clone();
        tokio::spawn(async move {
            let request = Request::get(format!("http://a.test/{i}")).body(empty()).unwrap();
            let body = h2.send_request(request).await.unwrap().into_body().collect().await.unwrap().to_bytes();
            assert_eq!(body, format!("/{i}"));
        })
    });
    for ask in asks.collect::<Vec<_>>() {
        soon(ask).await.unwrap();
    }
    assert_eq!(world.records(100).await.len(), 100);
}

#[tokio::test]
async fn h2_requests_arrive_as_h1_with_one_cookie_line_and_a_length() {
    let world = World::new(HttpSettings::default(), |mut io| async move {
        let mut seen = read_head(&mut io).await;
        if seen.contains("content-length: 5") {
            seen += &read_until(&mut io, "hello").await;
        }
        io.write_all(ok(&seen).as_bytes()).await.unwrap();
    });
    let mut h2 = world.h2(tls(Protocol::Http2, "a.test")).await;
    let request = Request::post("https://A.test:8443/p")
        .header("cookie", "a=1")
        .header("cookie", "b=2")
        .header("content-length", "5")
        .body(full("hello"))
        .unwrap();
    let answer = soon(soon(h2.send_request(request)).await.unwrap().into_body().collect()).await.unwrap().to_bytes();
    let seen = String::from_utf8_lossy(&answer);
    for line in
        ["cookie: a=1; b=2", "host: A.test:8443", "content-length: 5", "x-forwarded-proto: https", "via: 2 adit"]
    {
        assert!(seen.contains(&format!("{line}\r\n")), "{line} in {seen}");
    }
    assert!(seen.ends_with("hello") && !seen.contains("transfer-encoding"));
    let request = Request::post("https://a.test/p").body(empty()).unwrap();
    let answer = soon(soon(h2.send_request(request)).await.unwrap().into_body().collect()).await.unwrap().to_bytes();
    assert!(String::from_utf8_lossy(&answer).contains("content-length: 0\r\n"));
    let mut odd = Request::get("https://a.test/").body(empty()).unwrap();
    odd.headers_mut().insert("host", "b.test".parse().unwrap());
    assert_eq!(soon(h2.send_request(odd)).await.unwrap().status(), 400);
}

#[tokio::test]
async fn a_truncated_answer_never_looks_complete() {
    for head in ["Content-Length: 10", "Transfer-Encoding: chunked"] {
        let world = World::echo(move |_| format!("HTTP/1.1 200 OK\r\n{head}\r\n\r\n4\r\nhalf\r\n"));
        let answer = world.ask(&get("a.test", "")).await;
        assert!(answer.contains("half") && !answer.ends_with("0\r\n\r\n"), "{answer}");
        let mut h2 = world.h2(h2_plain()).await;
        let request = Request::get("http://a.test/").body(empty()).unwrap();
        let answer = soon(h2.send_request(request)).await.unwrap();
        assert_eq!(answer.status(), 200);
        assert!(soon(answer.into_body().collect()).await.is_err());
        for record in world.records(2).await {
            assert_eq!((record.status, record.error), (Some(200), Some(Error::OriginReset)));
        }
    }
}

#[tokio::test]
async fn an_origin_that_dies_before_its_answer_is_a_502_and_a_silent_one_a_504() {
    let world = World::new(HttpSettings::default(), |mut io| async move {
        read_head(&mut io).await;
    });
    assert!(world.ask(&get("a.test", "Connection: close\r\n")).await.starts_with("HTTP/1.1 502"));
    assert_eq!(world.records(1).await[0].error, Some(Error::OriginReset));

    let world = World::echo(|_| "SSH-2.0-OpenSSH_9.2\r\n\r\n".into());
    assert!(world.ask(&get("a.test", "Connection: close\r\n")).await.starts_with("HTTP/1.1 502"));
    assert_eq!(world.records(1).await[0].error, Some(Error::OriginProtocol));

    let settings = HttpSettings { first_byte: Duration::from_millis(50), ..HttpSettings::default() };
    let world = World::new(settings, |mut io| async move {
        read_head(&mut io).await;
        std::future::pending::<()>().await;
    });
    assert!(world.ask(&get("a.test", "Connection: close\r\n")).await.starts_with("HTTP/1.1 504"));
    assert_eq!(world.records(1).await[0].error, Some(Error::OriginSilent));
}

#[tokio::test]
async fn the_first_byte_deadline_spares_a_slow_upload() {
    let settings = HttpSettings { first_byte: Duration::from_millis(150), ..HttpSettings::default() };
    let world = World::new(settings, |mut io| async move {
        read_head(&mut io).await;
        read_until(&mut io, "12345").await;
        io.write_all(ok("got it").as_bytes()).await.unwrap();
    });
    let mut io = world.plain();
    io.write_all(b"POST / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\nContent-Length: 5\r\n\r\n").await.unwrap();
    for byte in b"12345" {
        tokio::time::sleep(Duration::from_millis(60)).await;
        io.write_all(&[*byte]).await.unwrap();
    }
    assert!(read_all(&mut io).await.ends_with("got it"));
    assert_eq!(world.records(1).await[0].bytes_up, 5);
}

#[tokio::test]
async fn the_origin_decides_whether_an_announced_body_is_sent() {
    let world = World::new(HttpSettings::default(), |mut io| async move {
        let head = read_head(&mut io).await;
        assert!(head.contains("expect: 100-continue"), "{head}");
        if head.starts_with("POST /no") {
            io.write_all(b"HTTP/1.1 417 Expectation Failed\r\nContent-Length: 0\r\n\r\n").await.unwrap();
        } else {
            io.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await.unwrap();
            let body = read_until(&mut io, "hello").await;
            io.write_all(ok(&body).as_bytes()).await.unwrap();
        }
    });
    let ask = |path: &str| {
        format!("POST {path} HTTP/1.1\r\nHost: a.test\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n")
    };
    let mut io = world.plain();
    io.write_all(ask("/no").as_bytes()).await.unwrap();
    let head = read_head(&mut io).await;
    assert!(head.starts_with("HTTP/1.1 417"), "{head}");
    let mut io = world.plain();
    io.write_all(ask("/yes").as_bytes()).await.unwrap();
    assert_eq!(read_head(&mut io).await, "HTTP/1.1 100 Continue\r\n\r\n");
    io.write_all(b"hello").await.unwrap();
    assert!(read_until(&mut io, "hello").await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn an_announced_body_never_follows_an_answer() {
    // An origin that takes what follows its answer for the next request.
    let (world, connections) = lasting(|connection, number, head| {
        let line = head.lines().next().unwrap_or_default();
        ok(&format!("{connection}.{number} {line}"))
    });
    let body = "GET /hidden HTTP/1.1\r\nHost: a.test\r\n\r\n";
    let mut io = world.plain();
    let length = body.len();
    let head = format!("POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: {length}\r\nExpect: 100-continue\r\n\r\n");
    io.write_all((head + body).as_bytes()).await.unwrap();
    assert!(read_until(&mut io, "0.0 POST / HTTP/1.1").await.starts_with("HTTP/1.1 200"));
    // Longer than a body waits for a 100.
    tokio::time::sleep(HttpSettings::default().continue_wait + Duration::from_millis(200)).await;
    assert_eq!(fetch(&world, "GET", "").await, "1.0 GET / HTTP/1.1");
    assert_eq!(connections.load(SeqCst), 2);
}

#[tokio::test]
async fn an_early_answer_reaches_a_visitor_who_is_still_sending() {
    let world = World::new(HttpSettings::default(), |mut io| async move {
        read_head(&mut io).await;
        io.write_all(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 4\r\nConnection: close\r\n\r\nbig!")
            .await
            .unwrap();
    });
    let mut io = world.plain();
    io.write_all(b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 10000000\r\n\r\n").await.unwrap();
    let (mut read, mut write) = tokio::io::split(io);
    let sender = tokio::spawn(async move { write.write_all(&vec![0; 10_000_000]).await });
    let mut answer = Vec::new();
    soon(read.read_to_end(&mut answer)).await.unwrap();
    let answer = String::from_utf8_lossy(&answer);
    assert!(answer.starts_with("HTTP/1.1 413") && answer.ends_with("big!"), "{answer}");
    // Nobody broke the visitor's sending off before it had the answer.
    soon(sender).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_visitor_who_leaves_is_counted_and_frees_the_origin() {
    let (freed, mut was_freed) = mpsc::channel(8);
    let world = World::new(HttpSettings::default(), move |mut io| {
        let freed = freed.clone();
        async move {
            read_head(&mut io).await;
            read_until(&mut io, "hello").await;
            let _ = io.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n").await;
            let mut rest = Vec::new();
            let _ = io.read_to_end(&mut rest).await;
            let _ = freed.send(()).await;
        }
    });
    // HTTP/1: an upload that stays incomplete, then a reset-like end.
    let mut io = world.plain();
    io.write_all(b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 100\r\n\r\nhello").await.unwrap();
    read_until(&mut io, "abc").await;
    drop(io);
    soon(was_freed.recv()).await.unwrap();
    let record = Arc::clone(&world.records(1).await[0]);
    assert_eq!((record.bytes_up, record.bytes_down, record.error), (5, 3, Some(Error::VisitorGone)));

    // HTTP/2: RST_STREAM, the connection stays.
    let mut h2 = world.h2(h2_plain()).await;
    let (tx, body) = channel_body();
    tx.send(Frame::data("hello".into())).await.unwrap();
    let answer = soon(h2.send_request(Request::post("http://a.test/").body(body).unwrap())).await.unwrap();
    let mut body = answer.into_body();
    assert_eq!(soon(body.frame()).await.unwrap().unwrap().into_data().unwrap(), "abc");
    drop((body, tx));
    soon(was_freed.recv()).await.unwrap();
    let record = Arc::clone(&world.records(2).await[1]);
    assert_eq!((record.bytes_up, record.bytes_down, record.error), (5, 3, Some(Error::VisitorGone)));
}

#[tokio::test]
async fn a_visitor_keeps_the_answer_after_closing_its_side() {
    let world = World::new(HttpSettings::default(), |mut io| async move {
        let head = read_head(&mut io).await;
        if head.starts_with("POST") {
            read_until(&mut io, "hello").await;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        let body = "x".repeat(1 << 20);
        let _ = io.write_all(ok(&body).as_bytes()).await;
    });
    for ask in [get("a.test", ""), "POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 5\r\n\r\nhello".into()] {
        let mut io = world.plain();
        io.write_all(ask.as_bytes()).await.unwrap();
        io.shutdown().await.unwrap();
        let answer = read_all(&mut io).await;
        let (_, body) = answer.split_once("\r\n\r\n").unwrap();
        assert_eq!(body.len(), 1 << 20);
    }
    let mut io = world.plain();
    io.write_all((get("a.test", "") + &get("b.test", "")).as_bytes()).await.unwrap();
    io.shutdown().await.unwrap();
    assert_eq!(read_all(&mut io).await.matches("HTTP/1.1 200 OK").count(), 2);
    assert!(world.records(4).await.iter().all(|v| v.error.is_none()));
}

#[tokio::test]
async fn a_ghost_does_not_hold_a_silent_origin() {
    let settings = HttpSettings { half_closed: Duration::from_millis(50), ..HttpSettings::default() };
    let (freed, mut was_freed) = mpsc::channel(1);
    let world = World::new(settings, move |mut io| {
        let freed = freed.clone();
        async move {
            read_head(&mut io).await;
            let _ = io.read_to_end(&mut Vec::new()).await;
            let _ = freed.send(()).await;
        }
    });
    let mut io = world.plain();
    io.write_all(get("a.test", "").as_bytes()).await.unwrap();
    io.shutdown().await.unwrap();
    soon(was_freed.recv()).await.unwrap();
    assert_eq!(world.records(1).await[0].error, Some(Error::VisitorGone));
}

#[tokio::test]
async fn slow_heads_and_idle_connections_are_closed() {
    let settings = HttpSettings {
        head_deadline: Duration::from_millis(100),
        idle: Duration::from_millis(1000),
        ..HttpSettings::default()
    };
    let world = World::new(settings, |mut io| async move {
        read_head(&mut io).await;
        let _ = io.write_all(ok("x").as_bytes()).await;
    });
    let closes_within = |mut io: DuplexStream, low: u64, high: u64| async move {
        let start = std::time::Instant::now();
        read_all(&mut io).await;
        let took = start.elapsed().as_millis() as u64;
        assert!((low..high).contains(&took), "{took} ms");
    };
    closes_within(world.plain(), 50, 800).await;
    let mut io = world.plain();
    io.write_all(b"GET / HT").await.unwrap();
    closes_within(io, 50, 800).await;
    let mut io = world.plain();
    io.write_all(get("a.test", "").as_bytes()).await.unwrap();
    read_until(&mut io, "\r\n\r\nx").await;
    closes_within(io, 800, 4000).await;
    let mut io = world.plain();
    io.write_all(get("a.test", "").as_bytes()).await.unwrap();
    read_until(&mut io, "\r\n\r\nx").await;
    io.write_all(b"G").await.unwrap();
    closes_within(io, 50, 800).await;
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_is_used_again_after_any_rest() {
    let settings = HttpSettings { idle: Duration::from_secs(4), ..HttpSettings::default() };
    let world = World::new(settings, |mut io| async move {
        read_head(&mut io).await;
        let _ = io.write_all(ok("x").as_bytes()).await;
    });
    let mut io = world.plain();
    for rest in [0, 900, 1_000, 1_100, 2_500, 3_900] {
        tokio::time::sleep(Duration::from_millis(rest)).await;
        // Not all at once: hyper's part is made at the first byte.
        let request = get("a.test", "");
        let (first, second) = request.split_at(1);
        io.write_all(first.as_bytes()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        io.write_all(second.as_bytes()).await.unwrap();
        let answer = read_until(&mut io, "\r\n\r\nx").await;
        assert!(answer.starts_with("HTTP/1.1 200 OK"), "{rest} ms: {answer}");
    }
    let idle_since = Instant::now();
    assert_eq!(read_all(&mut io).await, "");
    assert_eq!(idle_since.elapsed().as_secs(), 4);

    // A drain closes one that rests.
    let mut io = world.plain();
    io.write_all(get("a.test", "").as_bytes()).await.unwrap();
    read_until(&mut io, "\r\n\r\nx").await;
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    world.drain.cancel();
    let asked = Instant::now();
    assert_eq!(read_all(&mut io).await, "");
    assert!(asked.elapsed() < Duration::from_millis(100), "{:?}", asked.elapsed());
}

/// An origin that answers right after the head, and tells what came of the body.
fn early(bytes: usize) -> (World, mpsc::UnboundedReceiver<String>) {
    let (tell, told) = mpsc::unbounded_channel();
    let world = World::new(HttpSettings::default(), move |mut io| {
        let tell = tell.clone();
        async move {
            read_head(&mut io).await;
            let _ = io.write_all(ok("early").as_bytes()).await;
            let mut body = vec![0; bytes];
            let came = io.read_exact(&mut body).await.is_ok();
            let _ = tell.send(if came { String::from_utf8(body).unwrap() } else { "broke off".to_owned() });
        }
    });
    (world, told)
}

#[tokio::test(start_paused = true)]
async fn a_connection_does_not_rest_while_an_answered_upload_goes_on() {
    let body = get("b.test", "x-hidden: in a body\r\n");
    let (world, mut told) = early(body.len());
    let mut io = world.plain();
    let head = format!("POST / HTTP/1.1\r\nhost: a.test\r\ncontent-length: {}\r\n\r\n", body.len());
    io.write_all(head.as_bytes()).await.unwrap();
    let answer = read_until(&mut io, "early").await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    // Long enough for a rest, were it idle.
    tokio::time::sleep(Duration::from_secs(3)).await;
    io.write_all(body.as_bytes()).await.unwrap();
    assert_eq!(soon(told.recv()).await.as_deref(), Some(body.as_str()));
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(world.records(1).await.len(), 1, "what was in a body is no request");
    io.write_all(get("a.test", "").as_bytes()).await.unwrap();
    assert!(read_until(&mut io, "early").await.starts_with("HTTP/1.1 200"), "the connection stays");
}

#[tokio::test(start_paused = true)]
async fn half_a_pipelined_head_outlasts_the_answer_before_it() {
    let world = World::echo(|_| ok("x"));
    let mut io = world.plain();
    let second = get("a.test", "");
    let (half, rest) = second.split_at(9);
    io.write_all(format!("{}{half}", get("a.test", "")).as_bytes()).await.unwrap();
    read_until(&mut io, "\r\n\r\nx").await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    io.write_all(rest.as_bytes()).await.unwrap();
    assert!(read_until(&mut io, "\r\n\r\nx").await.starts_with("HTTP/1.1 200"));
}

/// A visitor's stream whose end does not get out, as of one who reads nothing.
struct Unending(DuplexStream);

impl tokio::io::AsyncRead for Unending {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &mut tokio::io::ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl tokio::io::AsyncWrite for Unending {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut std::task::Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut std::task::Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Pending
    }
}

impl crate::stream::Duplex for Unending {
    fn reset(&mut self) {}
}

#[tokio::test(start_paused = true)]
async fn what_comes_after_the_end_of_a_connection_is_no_request() {
    let world = World::echo(|_| ok("x"));
    let (mut io, far) = duplex(64 << 10);
    world.visit_over(Stream::other(Unending(far)), Via { protocol: Protocol::Http1, tls: None });
    io.write_all(get("a.test", "connection: close\r\n").as_bytes()).await.unwrap();
    read_until(&mut io, "\r\n\r\nx").await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let _ = io.write_all(get("a.test", "").as_bytes()).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(world.records(1).await.len(), 1);
}

#[tokio::test]
async fn a_body_that_stops_is_ended_with_the_right_word() {
    let settings = HttpSettings { body_idle: Duration::from_millis(300), ..HttpSettings::default() };
    let world = World::new(settings, |mut io| async move {
        let head = read_head(&mut io).await;
        let _ = io.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\nabc").await;
        if head.starts_with("GET /endless") {
            while io.write_all(&[0; 8192]).await.is_ok() {}
        }
        let _ = io.read_to_end(&mut Vec::new()).await;
    });
    // The origin stops.
    assert!(world.ask(&get("a.test", "")).await.ends_with("abc"));
    let mut h2 = world.h2(h2_plain()).await;
    let ask = |path: &str| Request::get(format!("http://a.test{path}")).body(empty()).unwrap();
    let stopped = soon(h2.send_request(ask("/"))).await.unwrap();
    assert!(soon(stopped.into_body().collect()).await.is_err());
    assert!(world.records(2).await.iter().all(|v| v.error == Some(Error::OriginSilent)));
    // The visitor stops.
    let _held = soon(h2.send_request(ask("/endless"))).await.unwrap();
    let mut io = world.plain();
    io.write_all(b"GET /endless HTTP/1.1\r\nHost: a.test\r\n\r\n").await.unwrap();
    read_head(&mut io).await;
    assert!(world.records(4).await[2..].iter().all(|v| v.error == Some(Error::VisitorStalled)));
}

#[tokio::test]
async fn a_drain_finishes_what_runs_and_a_cut_does_not() {
    let (go, gone) = tokio::sync::watch::channel(false);
    let world = World::new(HttpSettings::default(), move |mut io| {
        let mut gone = gone.clone();
        async move {
            read_head(&mut io).await;
            let _ = gone.wait_for(|go| *go).await;
            let _ = io.write_all(ok("done").as_bytes()).await;
        }
    });
    let (mut busy, mut idle) = (world.plain(), world.plain());
    busy.write_all(get("a.test", "").as_bytes()).await.unwrap();
    let mut h2 = world.h2(h2_plain()).await;
    let ask = tokio::spawn(h2.send_request(Request::get("http://a.test/").body(empty()).unwrap()));
    tokio::time::sleep(Duration::from_millis(50)).await;
    world.drain.cancel();
    assert_eq!(read_all(&mut idle).await, "");
    go.send_replace(true);
    let answer = read_all(&mut busy).await;
    assert!(answer.contains("connection: close") && answer.ends_with("done"), "{answer}");
    let answer: Response<_> = soon(ask).await.unwrap().unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
    assert_eq!(soon(answer.into_body().collect()).await.unwrap().to_bytes(), "done");

    let world = World::new(HttpSettings::default(), |mut io| async move {
        let _ = io.read_to_end(&mut Vec::new()).await;
    });
    let mut io = world.plain();
    io.write_all(get("a.test", "").as_bytes()).await.unwrap();
    let mut h2 = world.h2(h2_plain()).await;
    let ask = tokio::spawn(h2.send_request(Request::get("http://a.test/").body(empty()).unwrap()));
    tokio::time::sleep(Duration::from_millis(50)).await;
    world.cut.cancel();
    assert_eq!(read_all(&mut io).await, "");
    assert!(soon(ask).await.unwrap().is_err());
    assert!(world.records(2).await.iter().all(|v| v.error == Some(Error::Draining)));
}

/// An https world: the origin presents a certificate for `inner.test` by a CA
/// of its own. Gives the CA's PEM file, which lives as long as the folder.
fn https(settings: HttpSettings, verify: bool, trusted: bool) -> (World, tempfile::TempDir) {
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let mut ca = rcgen::CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca_cert = ca.self_signed(&ca_key).unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let params = rcgen::CertificateParams::new(vec!["inner.test".to_owned()]).unwrap();
    let leaf = params.signed_by(&key, &rcgen::Issuer::new(ca, ca_key)).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![leaf.der().clone()], key.serialize_der().try_into().unwrap())
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));

    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("ca.pem");
    std::fs::write(&file, ca_cert.pem()).unwrap();
    let settings = HttpSettings { origin_ca_file: trusted.then_some(file), ..settings };
    let world = World::new(settings, move |io| {
        let acceptor = acceptor.clone();
        async move {
            let Ok(mut tls) = acceptor.accept(io).await else { return };
            let mut seen = vec![0; 16 << 10];
            let n = tls.read(&mut seen).await.unwrap();
            let about = format!(
                "{} {} {}",
                tls.get_ref().1.server_name().unwrap_or("none"),
                String::from_utf8_lossy(tls.get_ref().1.alpn_protocol().unwrap_or_default()),
                String::from_utf8_lossy(&seen[..n]).lines().find(|l| l.starts_with("host:")).unwrap_or_default(),
            );
            tls.write_all(ok(&about).as_bytes()).await.unwrap();
            tls.shutdown().await.unwrap();
        }
    });
    let mut socket = socket("tls", SocketType::Https, "tls.test");
    socket.upstream.tls = crate::model::UpstreamTls { server_name: Some("inner.test".parse().unwrap()), verify };
    world.http.routes.put_socket(socket);
    (world, folder)
}

#[tokio::test]
async fn an_https_origin_is_verified_unless_its_socket_says_otherwise() {
    let ask = get("tls.test", "Connection: close\r\n");
    for (verify, trusted, good) in [(true, true, true), (true, false, false), (false, false, true)] {
        let (world, _folder) = https(HttpSettings::default(), verify, trusted);
        let answer = world.ask(&ask).await;
        if good {
            assert!(answer.ends_with("inner.test http/1.1 host: tls.test"), "{answer}");
        } else {
            assert!(answer.starts_with("HTTP/1.1 502"), "{answer}");
            assert_eq!(world.records(1).await[0].error, Some(Error::OriginTls));
        }
    }
    // The name must match even under a trusted CA.
    let (world, _folder) = https(HttpSettings::default(), true, true);
    let mut other = socket("tls", SocketType::Https, "tls.test");
    other.upstream.host = Some("other.test".into());
    world.http.routes.put_socket(other);
    assert!(world.ask(&ask).await.starts_with("HTTP/1.1 502"));
    // An origin that says nothing.
    let settings = HttpSettings { origin_tls: Duration::from_millis(50), ..HttpSettings::default() };
    let world = World::new(settings, |io| async move {
        let _io = io;
        std::future::pending::<()>().await;
    });
    world.http.routes.put_socket(socket("tls", SocketType::Https, "tls.test"));
    assert!(world.ask(&ask).await.starts_with("HTTP/1.1 502"));
    assert_eq!(world.records(1).await[0].error, Some(Error::OriginTls));
}

#[tokio::test]
async fn large_bodies_pass_both_ways_byte_exact() {
    const SIZE: usize = 20 << 20;
    let world = World::new(HttpSettings::default(), |mut io| async move {
        let head = read_head(&mut io).await;
        assert!(head.contains(&format!("content-length: {SIZE}")));
        io.write_all(format!("HTTP/1.1 200 OK\r\nContent-Length: {SIZE}\r\n\r\n").as_bytes()).await.unwrap();
        let (mut read, mut write) = tokio::io::split(io);
        tokio::io::copy(&mut (&mut read).take(SIZE as u64), &mut write).await.unwrap();
    });
    let sent: Bytes = (0..SIZE).map(|i| (i ^ (i >> 8) ^ (i >> 16)) as u8).collect();
    let head = format!("POST / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\nContent-Length: {SIZE}\r\n\r\n");
    let (mut read, mut write) = tokio::io::split(world.plain());
    let body = sent.clone();
    let sender = tokio::spawn(async move {
        write.write_all(head.as_bytes()).await.unwrap();
        write.write_all(&body).await.unwrap();
    });
    let mut got = Vec::new();
    tokio::time::timeout(4 * SOON, read.read_to_end(&mut got)).await.unwrap().unwrap();
    sender.await.unwrap();
    assert!(got.ends_with(&sent));

    let mut h2 = world.h2(h2_plain()).await;
    let body = Full::new(sent.clone()).map_err(|e| match e {}).boxed();
    let request = Request::post("http://a.test/").header("content-length", SIZE).body(body).unwrap();
    let answer = soon(h2.send_request(request)).await.unwrap();
    let got = tokio::time::timeout(4 * SOON, answer.into_body().collect()).await.unwrap().unwrap().to_bytes();
    assert!(got == sent);
    for record in world.records(2).await {
        assert_eq!((record.bytes_up, record.bytes_down, record.error), (SIZE as u64, SIZE as u64, None));
    }
}

/// Serves one visitor over real TCP, where ends and resets differ.
async fn over_tcp(world: &World) -> tokio::net::TcpStream {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let near = tokio::net::TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (far, addr) = listener.accept().await.unwrap();
    let (http, drain, cut) = (Arc::clone(&world.http), world.drain.clone(), world.cut.clone());
    let visitor = Visitor::new(addr, listener.local_addr().unwrap());
    let via = Via { protocol: Protocol::Http1, tls: None };
    tokio::spawn(async move { http.serve(Stream::tcp(far), visitor, via, &drain, &cut).await });
    near
}

#[tokio::test]
async fn an_unframed_answer_that_broke_off_ends_with_a_reset() {
    let world = World::echo(|_| "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n".into());
    let mut io = over_tcp(&world).await;
    io.write_all(b"GET / HTTP/1.0\r\nHost: a.test\r\n\r\n").await.unwrap();
    let end = soon(io.read_to_end(&mut Vec::new())).await;
    assert_eq!(end.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn an_early_answer_survives_an_upload_that_nobody_reads() {
    let world = World::new(HttpSettings::default(), |mut io| async move {
        read_head(&mut io).await;
        let _ = io.write_all(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 4\r\n\r\nbig!").await;
    });
    let mut io = over_tcp(&world).await;
    io.write_all(b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 4000000\r\n\r\n").await.unwrap();
    for _ in 0..40 {
        io.write_all(&[0; 100_000]).await.unwrap();
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let mut answer = Vec::new();
    soon(io.read_to_end(&mut answer)).await.unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 413") && answer.ends_with(b"big!"));
}

#[tokio::test]
async fn a_chunk_that_lies_ends_the_request_on_both_sides() {
    let (seen, mut was_seen) = mpsc::channel(1);
    let world = World::new(HttpSettings::default(), move |mut io| {
        let seen = seen.clone();
        async move {
            let mut all = Vec::new();
            let _ = io.read_to_end(&mut all).await;
            let _ = seen.send(String::from_utf8_lossy(&all).into_owned()).await;
        }
    });
    let mut io = world.plain();
    let head = "POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n";
    io.write_all(format!("{head}1\r\na\r\n").as_bytes()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(20)).await;
    io.write_all(b"1\nb\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: b.test\r\n\r\n").await.unwrap();
    let _ = read_all(&mut io).await;
    let seen = soon(was_seen.recv()).await.unwrap();
    assert!(!seen.ends_with("0\r\n\r\n") && !seen.contains("smuggled"), "{seen}");
    assert_eq!(world.records(1).await.len(), 1);
}

#[tokio::test]
async fn a_chunk_that_lies_is_the_visitors_fault() {
    let world = World::new(HttpSettings::default(), |mut io| async move {
        let _ = io.read_to_end(&mut Vec::new()).await;
    });
    let head = "POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n";
    let lies = [
        "x\r\n",
        "1\nb",
        "1\r\nab\r\n",
        "1;a\nb\r\nc\r\n0\r\n\r\n",
        "1;a\0\r\nc\r\n0\r\n\r\n",
        "1;a\r\0\nc\r\n0\r\n\r\n",
        "0\r\nX: a\nY: b",
        "0\r\n\n",
    ];
    for lie in lies {
        let answer = world.ask(&format!("{head}{lie}")).await;
        assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("connection: close"), "{lie:?}: {answer}");
    }
    assert!(world.records(lies.len()).await.iter().all(|visit| visit.error == Some(Error::BadRequest)));
}

#[tokio::test]
async fn what_follows_an_upgrade_that_was_not_made_is_no_request() {
    let world = World::echo(|_| ok("no"));
    for (upgrade, answers) in [("x", 1), ("websocket", 1), ("h2c", 2)] {
        // The second says two things of its body's end.
        let first = get("a.test", &format!("Connection: Upgrade\r\nUpgrade: {upgrade}\r\n"));
        let second =
            "POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n";
        let answer = world.ask(&(first + second)).await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("connection: close"), "{upgrade}: {answer}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), answers, "{upgrade}: {answer}");
        assert_eq!(answer.matches("HTTP/1.1 400").count(), answers - 1, "{upgrade}: {answer}");
    }
    assert_eq!(world.visits.0.lock().iter().filter(|visit| visit.socket.is_some()).count(), 3);
}

/// Origins whose connections live on: `answer` makes of each head what to say,
/// and of its number on that connection; an empty answer ends it.
fn lasting(answer: impl Fn(usize, usize, &str) -> String + Send + Sync + 'static) -> (World, Arc<AtomicUsize>) {
    let connections = Arc::new(AtomicUsize::new(0));
    let (answer, count) = (Arc::new(answer), Arc::clone(&connections));
    let world = World::new(HttpSettings::default(), move |mut io| {
        let (answer, connection) = (Arc::clone(&answer), count.fetch_add(1, SeqCst));
        async move {
            for number in 0.. {
                let mut head = Vec::new();
                let mut byte = [0];
                while !head.ends_with(b"\r\n\r\n") {
                    if !io.read(&mut byte).await.is_ok_and(|n| n > 0) {
                        return;
                    }
                    head.push(byte[0]);
                }
                let said = answer(connection, number, &String::from_utf8_lossy(&head));
                if said.is_empty() || io.write_all(said.as_bytes()).await.is_err() {
                    return;
                }
            }
        }
    });
    (world, connections)
}

/// The body, or status where it is none of the origin's, of one request each on
/// a visitor's connection of its own.
async fn fetch(world: &World, method: &str, more: &str) -> String {
    let answer = world.ask(&format!("{method} / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n{more}\r\n")).await;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    if head.starts_with("HTTP/1.1 200") { body.to_owned() } else { head[9..12].to_owned() }
}

#[tokio::test]
async fn a_connection_to_an_origin_serves_the_next_visitor() {
    let (world, connections) = lasting(|connection, number, head| {
        assert_eq!(head.contains("connection: close"), connection > 0, "{head}");
        let answer = ok(&format!("{connection}.{number}"));
        if head.starts_with("HEAD") { answer.split_inclusive("\r\n\r\n").next().unwrap().to_owned() } else { answer }
    });
    for number in 0..5 {
        assert_eq!(fetch(&world, "GET", "").await, format!("0.{number}"));
    }
    assert_eq!(fetch(&world, "POST", "Content-Length: 0\r\n").await, "0.5");
    assert_eq!(fetch(&world, "HEAD", "").await, "");
    assert_eq!(fetch(&world, "GET", "").await, "0.7");
    assert_eq!(connections.load(SeqCst), 1);
    world.http.close();
    assert_eq!(fetch(&world, "GET", "").await, "1.0");
    assert_eq!(fetch(&world, "GET", "").await, "2.0", "kept after the end");
}

#[tokio::test]
async fn requests_at_once_have_connections_of_their_own_and_all_are_kept() {
    let (world, connections) = lasting(|_, _, _| ok("fine"));
    let mut visitors: Vec<_> = (0..4).map(|_| world.plain()).collect();
    for _ in 0..2 {
        for visitor in &mut visitors {
            visitor.write_all(get("a.test", "").as_bytes()).await.unwrap();
        }
        for visitor in &mut visitors {
            assert!(read_until(visitor, "fine").await.ends_with("fine"));
        }
    }
    assert!((2..=4).contains(&connections.load(SeqCst)), "{connections:?}");
}

#[tokio::test]
async fn what_the_origin_does_not_want_kept_is_not() {
    for answer in [
        "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 4\r\n\r\nfine",
        "HTTP/1.0 200 OK\r\nContent-Length: 4\r\n\r\nfine",
        "HTTP/1.1 200 OK\r\nKeep-Alive: timeout=1, max=9\r\nContent-Length: 4\r\n\r\nfine",
        // Bytes that nobody asked for would be the next visitor's answer.
        "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfineHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil",
    ] {
        let (world, connections) = lasting(move |_, _, _| answer.to_owned());
        for n in 1..4 {
            assert_eq!(fetch(&world, "GET", "").await, "fine", "{answer}");
            assert_eq!(connections.load(SeqCst), n, "{answer}");
        }
    }
}

#[tokio::test]
async fn a_request_that_met_a_closing_connection_is_sent_again_where_that_is_safe() {
    // Serves one request a connection and ends it at the second, unanswered.
    let closing =
        || lasting(|connection, number, _| if number == 0 { ok(&connection.to_string()) } else { String::new() });
    for method in ["GET", "HEAD", "OPTIONS", "DELETE", "PUT"] {
        let (world, connections) = closing();
        fetch(&world, method, "").await;
        assert_ne!(fetch(&world, method, "").await, "502", "{method}");
        assert_eq!(connections.load(SeqCst), 2, "{method}");
    }
    let (world, connections) = closing();
    assert_eq!(fetch(&world, "GET", "").await, "0");
    assert_eq!(fetch(&world, "POST", "Content-Length: 0\r\n").await, "502", "sent twice");
    assert_eq!(connections.load(SeqCst), 1);
    // Where the new connection fails too, that is the answer.
    let (world, connections) = lasting(|connection, _, _| if connection == 0 { ok("0") } else { String::new() });
    assert_eq!(fetch(&world, "GET", "").await, "0");
    assert_eq!(fetch(&world, "GET", "").await, "0");
    let (failing, dialed) =
        lasting(|connection, number, _| if (connection, number) == (0, 0) { ok("0") } else { String::new() });
    assert_eq!(fetch(&failing, "GET", "").await, "0");
    assert_eq!(fetch(&failing, "GET", "").await, "502");
    assert_eq!((connections.load(SeqCst), dialed.load(SeqCst)), (1, 2));
}

#[tokio::test(start_paused = true)]
async fn what_must_not_be_sent_twice_takes_no_connection_that_has_waited() {
    let (world, connections) = lasting(|connection, _, _| ok(&connection.to_string()));
    assert_eq!(fetch(&world, "GET", "").await, "0");
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(fetch(&world, "POST", "Content-Length: 0\r\n").await, "1");
    assert_eq!(fetch(&world, "GET", "").await, "1", "the one used last");
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(fetch(&world, "GET", "").await, "2", "all have waited too long");
    assert_eq!(connections.load(SeqCst), 3);
}

#[tokio::test]
async fn a_connection_whose_answer_was_not_read_is_closed() {
    let (world, connections) = lasting(|_, _, head| {
        let large = head.starts_with("GET /large");
        if large {
            format!("HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n{}", "x".repeat(200_000))
        } else {
            ok("fine")
        }
    });
    let mut io = world.plain();
    io.write_all(b"GET /large HTTP/1.1\r\nHost: a.test\r\n\r\n").await.unwrap();
    read_until(&mut io, "xxxx").await;
    drop(io);
    world.records(1).await;
    assert_eq!(fetch(&world, "GET", "").await, "fine");
    assert_eq!(connections.load(SeqCst), 2);
}

#[tokio::test]
async fn a_connection_that_is_authenticated_serves_its_own_visitor_alone() {
    let challenge = "HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: NTLM x\r\nContent-Length: 0\r\n\r\n";
    let (world, _) = lasting(move |connection, number, _| match number {
        0 if connection == 0 => challenge.to_owned(),
        _ => ok(&format!("<{connection}.{number}>")),
    });
    let mut own = world.plain();
    let ask = async |io: &mut DuplexStream, more: &str, end: &str| {
        io.write_all(get("a.test", more).as_bytes()).await.unwrap();
        read_until(io, end).await.rsplit('<').next().unwrap_or_default().to_owned()
    };
    ask(&mut own, "Authorization: NTLM a\r\n", "\r\n\r\n").await;
    assert_eq!(ask(&mut own, "Authorization: NTLM b\r\n", ">").await, "0.1>");
    assert_eq!(fetch(&world, "GET", "").await, "<1.0>");
    assert_eq!(ask(&mut own, "", ">").await, "0.2>", "without a word of it, still the same");
    assert_eq!(fetch(&world, "GET", "").await, "<1.1>");
    drop(own);
    assert_eq!(fetch(&world, "GET", "Authorization: Negotiate a\r\n").await, "<1.2>");
    assert_eq!(fetch(&world, "GET", "").await, "<2.0>", "what a visitor authenticated served another");
}

/// Origins that speak HTTP/2; a path `/go` makes the connection say GOAWAY.
fn speaking_http2(bytes: usize) -> (World, Arc<AtomicUsize>) {
    let connections = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&connections);
    let world = World::new(HttpSettings::default(), move |io| {
        let connection = count.fetch_add(1, SeqCst);
        async move {
            let go = Arc::new(tokio::sync::Notify::new());
            let service = service_fn(|request: Request<Incoming>| {
                let go = Arc::clone(&go);
                async move {
                    assert_eq!(request.uri().authority().unwrap(), "two.test");
                    assert!(!request.headers().contains_key("host") && !request.headers().contains_key("connection"));
                    if request.uri().path() == "/go" {
                        go.notify_one();
                    }
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    let text = format!("{connection}{}", "x".repeat(bytes));
                    Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(text))))
                }
            });
            let served = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(io), service);
            let mut served = pin!(served);
            tokio::select! {
                _ = &mut served => return,
                () = go.notified() => served.as_mut().graceful_shutdown(),
            }
            let _ = served.await;
        }
    });
    (world, connections)
}

async fn fetch_two(world: &World, path: &str) -> String {
    let answer = world.ask(&format!("GET {path} HTTP/1.1\r\nHost: two.test\r\nConnection: close\r\n\r\n")).await;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200") && head.contains("via: 2 adit"), "{answer}");
    body.to_owned()
}

#[tokio::test]
async fn requests_at_once_share_a_connection_of_http2() {
    let (world, connections) = speaking_http2(0);
    let all = futures_util::future::join_all((0..100).map(|_| fetch_two(&world, "/"))).await;
    assert_eq!(all.iter().filter(|said| *said == "0").count(), 64);
    assert_eq!((connections.load(SeqCst), fetch_two(&world, "/").await.as_str()), (2, "0"));
}

#[tokio::test]
async fn after_goaway_what_runs_is_finished_and_the_next_goes_elsewhere() {
    let (world, _) = speaking_http2(0);
    let (before, going) = tokio::join!(fetch_two(&world, "/"), fetch_two(&world, "/go"));
    assert_eq!((before.as_str(), going.as_str()), ("0", "0"));
    assert_eq!(fetch_two(&world, "/").await, "1");
}

#[tokio::test]
async fn visitors_that_do_not_read_hold_up_nobody_on_their_connection() {
    let (world, connections) = speaking_http2(4 << 20);
    let mut stopped = Vec::new();
    for _ in 0..20 {
        let mut io = world.plain();
        io.write_all(get("two.test", "").as_bytes()).await.unwrap();
        read_until(&mut io, "xxxx").await;
        stopped.push(io);
    }
    let mut h2 = world.h2(h2_plain()).await;
    let request = Request::get("http://two.test/").body(empty()).unwrap();
    let answer = soon(h2.send_request(request)).await.unwrap();
    let read = soon(answer.into_body().collect()).await.unwrap().to_bytes().len();
    assert_eq!((read, connections.load(SeqCst)), (1 + (4 << 20), 1));
}

#[tokio::test]
async fn an_origin_that_does_not_speak_http2_is_told_from_one_that_broke_off() {
    let world = World::echo(ok);
    let answer = world.ask(&get("two.test", "Connection: close\r\nAccept: application/json\r\n")).await;
    assert!(answer.starts_with("HTTP/1.1 502") && answer.contains("origin_protocol"), "{answer}");
}

#[tokio::test]
async fn a_sockets_rules_change_what_passes_and_hsts_is_for_https_alone() {
    let world = World::echo(|head| {
        assert!(head.contains("x-key: of the record\r\n") && !head.contains("cookie"), "{head}");
        "HTTP/1.1 200 OK\r\nServer: secret/1.0\r\nContent-Length: 0\r\n\r\n".to_owned()
    });
    let request = get("ruled.test", "Connection: close\r\nX-Key: forged\r\nCookie: a=b\r\n");
    let plain = world.ask(&request).await;
    assert!(
        plain.contains("x-robots-tag: noindex\r\n") && !plain.contains("secret") && !plain.contains("strict"),
        "{plain}"
    );
    let mut io = world.visit(tls(Protocol::Http1, "ruled.test"));
    io.write_all(request.as_bytes()).await.unwrap();
    let secure = read_all(&mut io).await;
    assert!(secure.contains("strict-transport-security: max-age=600; includeSubDomains\r\n"), "{secure}");
}

#[tokio::test]
async fn a_trusted_peer_says_who_asks_and_how() {
    let settings = HttpSettings {
        trusted_peers: vec![crate::fields::Network("198.51.100.0/24".parse().unwrap())],
        ..HttpSettings::default()
    };
    let world = World::new(settings, |mut io| async move {
        let head = read_head(&mut io).await;
        let _ = io.write_all(ok(&head).as_bytes()).await;
    });
    let claims = "Connection: close\r\nX-Forwarded-For: 1.1.1.1, 203.0.113.5\r\nX-Forwarded-Proto: https\r\n";
    let seen = world.ask(&get("a.test", claims)).await;
    assert!(seen.contains("x-forwarded-for: 203.0.113.5, 198.51.100.7\r\n"), "{seen}");
    assert!(world.ask(&get("s.test", claims)).await.starts_with("HTTP/1.1 200"), "not redirected: it is HTTPS already");
    assert_eq!(world.records(1).await[0].visitor.ip().to_string(), "203.0.113.5");
}

/// An origin that takes a WebSocket with the right key and sends back what comes.
fn websocket_echo() -> World {
    World::new(HttpSettings::default(), |mut io| async move {
        let head = read_head(&mut io).await;
        let Some(key) = head.lines().find_map(|l| l.strip_prefix("sec-websocket-key: ")) else {
            let _ = io.write_all(ok("no key").as_bytes()).await;
            return;
        };
        assert!(head.starts_with("GET /chat HTTP/1.1") && head.contains("upgrade: websocket"), "{head}");
        let salted = format!("{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
        let sum = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA1_FOR_LEGACY_USE_ONLY, salted.as_bytes());
        let accept = data_encoding::BASE64.encode(sum.as_ref());
        let accept = if head.contains("x-lie") { "AAAA".to_owned() } else { accept };
        let answer = format!(
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Accept: {accept}\r\nSec-WebSocket-Protocol: chat\r\n\r\n"
        );
        io.write_all(answer.as_bytes()).await.unwrap();
        let (mut from, mut to) = tokio::io::split(io);
        let _ = tokio::io::copy(&mut from, &mut to).await;
        let _ = to.shutdown().await;
    })
}

async fn over_http2(world: &World, more: Option<(&'static str, &'static str)>) -> Response<Incoming> {
    let mut h2 = world.h2(h2_plain()).await;
    // The node's settings are known once it has answered.
    let first = Request::get("http://a.test/").body(empty()).unwrap();
    soon(h2.send_request(first)).await.unwrap();
    let mut request = Request::connect("http://a.test/chat").header("sec-websocket-version", "13");
    if let Some((name, value)) = more {
        request = request.header(name, value);
    }
    let request = request.extension(hyper::ext::Protocol::from_static("websocket")).body(empty()).unwrap();
    soon(h2.send_request(request)).await.unwrap()
}

#[tokio::test]
async fn a_websocket_over_http2_reaches_an_origin_of_http1() {
    let world = websocket_echo();
    let answer = over_http2(&world, None).await;
    assert_eq!(
        (answer.status(), answer.headers()["sec-websocket-protocol"].as_bytes()),
        (StatusCode::OK, b"chat".as_slice())
    );
    assert!(!answer.headers().contains_key("sec-websocket-accept") && !answer.headers().contains_key("upgrade"));
    let mut io = TokioIo::new(soon(hyper::upgrade::on(answer)).await.unwrap());
    let frame = [0x82, 5, b'h', b'e', b'l', b'l', b'o'];
    let mut read = [0; 7];
    for _ in 0..3 {
        io.write_all(&frame).await.unwrap();
        soon(io.read_exact(&mut read)).await.unwrap();
        assert_eq!(read, frame);
    }
    // A node that drains says so, and the record is of a visit that ended well.
    world.drain.cancel();
    let mut rest = Vec::new();
    soon(io.read_to_end(&mut rest)).await.unwrap();
    assert_eq!(rest, [0x88, 2, 0x03, 0xe9]);
    let _ = io.shutdown().await;
    let visits = world.records(2).await;
    assert_eq!((visits[1].status, visits[1].error, visits[1].bytes_up), (Some(200), None, 21 + 8));
}

#[tokio::test]
async fn an_origin_that_does_not_take_the_websocket_opens_none() {
    let lying = over_http2(&websocket_echo(), Some(("x-lie", "1"))).await;
    assert_eq!(lying.status(), 502, "the accepted key is not ours");
    for (answer, status) in
        [(ok("hello"), 502), ("HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n".to_owned(), 403)]
    {
        let world = World::echo(move |_| answer.clone());
        assert_eq!(over_http2(&world, None).await.status(), status);
    }
}

#[tokio::test]
async fn interim_answers_pass_before_the_answer_and_nowhere_else() {
    const HINTS: &str = "HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\nConnection: x\r\nX: 1\r\n\r\n";
    const HEARD: &str = "HTTP/1.1 103 Early Hints\r\nlink: </a.css>\r\n\r\n";
    // Two of them long before the answer, then one together with it.
    let world = World::new(HttpSettings::default(), |mut io| async move {
        loop {
            let head = read_head(&mut io).await;
            if head.is_empty() {
                return;
            }
            let said =
                if head.starts_with("GET /slow") { [HINTS, HINTS].concat() } else { [HINTS, &ok("fast")].concat() };
            io.write_all(said.as_bytes()).await.unwrap();
            if head.starts_with("GET /slow") {
                // The answer waits until they have been heard.
                read_until(&mut io, "heard").await;
                io.write_all(ok("slow").as_bytes()).await.unwrap();
            }
        }
    });
    let mut io = world.plain();
    let request = "GET /slow HTTP/1.1\r\nHost: a.test\r\nContent-Length: 5\r\n\r\n";
    io.write_all(request.as_bytes()).await.unwrap();
    assert_eq!(read_head(&mut io).await, HEARD);
    assert_eq!(read_head(&mut io).await, HEARD);
    io.write_all(b"heard").await.unwrap();
    assert!(read_until(&mut io, "slow").await.starts_with("HTTP/1.1 200"));
    // Pipelined: each answer is whole.
    io.write_all(get("a.test", "").repeat(3).as_bytes()).await.unwrap();
    for _ in 0..3 {
        assert_eq!(read_head(&mut io).await, HEARD);
        let answer = read_until(&mut io, "fast").await;
        assert!(answer.starts_with("HTTP/1.1 200") && !answer.contains("103"), "{answer}");
    }
    // HTTP/1.0 and HTTP/2 visitors get the answer alone.
    let old = world.ask("GET / HTTP/1.0\r\nHost: a.test\r\n\r\n").await;
    assert!(old.starts_with("HTTP/1.0 200") || old.starts_with("HTTP/1.1 200"), "{old}");
    let mut h2 = world.h2(h2_plain()).await;
    let request = Request::get("http://a.test/").body(empty()).unwrap();
    assert_eq!(soon(h2.send_request(request)).await.unwrap().status(), 200);
}
