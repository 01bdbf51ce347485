//! The services behind tunnels: HTTP by path, raw by a command line, and the
//! awkward ones (silent, refusing, speaking first).

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::HeaderValue;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;

use super::{Io, Pattern, WebSocket, websocket};

pub type Body = BoxBody<Bytes, Infallible>;

/// A listening service in this process; ends with the test.
pub struct Origin {
    /// Where it listens.
    pub addr: SocketAddr,
    /// Its certificate (PEM), where it speaks TLS.
    pub certificate: Option<String>,
    /// Connections accepted so far.
    pub accepted: Arc<AtomicUsize>,
    /// HTTP requests so far.
    pub requests: Arc<AtomicUsize>,
    /// What raw connections that ended on their own report: `exact N`, or what was wrong.
    pub reports: mpsc::UnboundedReceiver<String>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Origin {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Http,
    Raw,
    Greeting,
    Silent,
}

impl Origin {
    /// HTTP/1.1: `/`, `/bytes/N`, `POST /sink`, `/slow/MS`, `/headers`, `/sse`, `/ws`.
    pub async fn http() -> Self {
        Self::start(Kind::Http, "127.0.0.1", None).await
    }

    /// The same over TLS, self-signed for `name`.
    pub async fn https(name: &str) -> Self {
        Self::start(Kind::Http, "127.0.0.1", Some(name)).await
    }

    /// Raw: the first line says what it does, see `raw`.
    pub async fn raw() -> Self {
        Self::start(Kind::Raw, "127.0.0.1", None).await
    }

    /// The same on ::1.
    pub async fn raw_on_ipv6() -> Self {
        Self::start(Kind::Raw, "[::1]", None).await
    }

    /// The same over TLS, self-signed for `name`.
    pub async fn raw_tls(name: &str) -> Self {
        Self::start(Kind::Raw, "127.0.0.1", Some(name)).await
    }

    /// Speaks first, as SMTP does.
    pub async fn greeting() -> Self {
        Self::start(Kind::Greeting, "127.0.0.1", None).await
    }

    /// Accepts and says nothing.
    pub async fn silent() -> Self {
        Self::start(Kind::Silent, "127.0.0.1", None).await
    }

    /// An address where nobody listens.
    pub async fn refusing() -> SocketAddr {
        TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
    }

    /// What stands behind the last colon pair of `-R`: `127.0.0.1:PORT`.
    pub fn target(&self) -> String {
        self.addr.to_string()
    }

    async fn start(kind: Kind, ip: &str, tls: Option<&str>) -> Self {
        let listener = TcpListener::bind(format!("{ip}:0")).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (certificate, acceptor) = tls.map(self_signed).unzip();
        let accepted = Arc::<AtomicUsize>::default();
        let (report, reports) = mpsc::unbounded_channel();
        let requests = Arc::<AtomicUsize>::default();
        let (count, asked) = (Arc::clone(&accepted), Arc::clone(&requests));
        let task = tokio::spawn(async move {
            // Dropped with the task: no connection outlives its origin.
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((tcp, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::Relaxed);
                let _ = tcp.set_nodelay(true);
                connections.spawn(serve(kind, tcp, acceptor.clone(), report.clone(), Arc::clone(&asked)));
                while connections.try_join_next().is_some() {}
            }
        });
        Self { addr, certificate, accepted, requests, reports, task }
    }
}

async fn serve(
    kind: Kind,
    tcp: TcpStream,
    tls: Option<TlsAcceptor>,
    report: mpsc::UnboundedSender<String>,
    requests: Arc<AtomicUsize>,
) {
    let io: Io = match tls {
        None => Box::new(tcp),
        Some(tls) => match tls.accept(tcp).await {
            Ok(io) => Box::new(io),
            Err(_) => return,
        },
    };
    match kind {
        Kind::Http => {
            let http = hyper::server::conn::http1::Builder::new();
            let service = service_fn(|request| {
                requests.fetch_add(1, Ordering::Relaxed);
                answer(request)
            });
            let _ = http.serve_connection(TokioIo::new(io), service).with_upgrades().await;
        }
        Kind::Raw => {
            let _ = raw(io, &report).await;
        }
        Kind::Greeting => {
            let mut io = io;
            let _ = io.write_all(b"220 mail.test ESMTP\r\n").await;
            let _ = io.flush().await;
            let _ = io.read(&mut [0; 64]).await;
        }
        Kind::Silent => {
            let _io = io;
            std::future::pending::<()>().await;
        }
    }
}

/// Does what the first line says:
/// `DOWN n` sends n bytes and ends; `UP n` takes n bytes, says `exact n` and
/// ends; `EOF` takes all there is, and answers only then; `CLOSE ms` ends its
/// own side first and reports what still arrives, read only after so long,
/// `SLOW` likewise but at 16 MB/s; `ECHO` sends back; `HOLD` takes
/// nothing more and keeps the connection.
async fn raw(io: Io, report: &mpsc::UnboundedSender<String>) -> std::io::Result<()> {
    let mut io = BufReader::new(io);
    let mut line = String::new();
    io.read_line(&mut line).await?;
    let (command, n) = line.trim().split_once(' ').unwrap_or((line.trim(), "0"));
    let n: u64 = n.parse().unwrap_or(0);
    match command {
        "DOWN" => Pattern::write(n, &mut io).await?,
        "UP" | "EOF" => {
            let read = Pattern::read((command == "UP").then_some(n), &mut io).await;
            say(&mut io, verdict(read)).await?;
        }
        "CLOSE" | "SLOW" => {
            say(&mut io, "bye\n".into()).await?;
            io.shutdown().await?;
            // Milliseconds in which the visitor's bytes back up.
            tokio::time::sleep(Duration::from_millis(n)).await;
            let read = match command {
                "SLOW" => read_slowly(&mut io).await,
                _ => Pattern::read(None, &mut io).await,
            };
            let _ = report.send(verdict(read));
        }
        "ECHO" => {
            let (mut from, mut to) = tokio::io::split(io);
            tokio::io::copy(&mut from, &mut to).await?;
            return to.shutdown().await;
        }
        "HOLD" => std::future::pending().await,
        other => say(&mut io, format!("unknown command {other:?}\n")).await?,
    }
    io.shutdown().await?;
    // Until the other side ends too: a close with unread bytes would be a reset.
    tokio::io::copy(&mut io, &mut tokio::io::sink()).await.map(|_| ())
}

async fn read_slowly(io: &mut (impl AsyncRead + Unpin)) -> Result<u64, String> {
    let mut pattern = Pattern::default();
    let mut buffer = vec![0; 64 << 10];
    loop {
        tokio::time::sleep(Duration::from_millis(4)).await;
        match io.read(&mut buffer).await.map_err(|e| e.to_string())? {
            0 => return Ok(pattern.len()),
            n => pattern.check(&buffer[..n])?,
        }
    }
}

fn verdict(read: Result<u64, String>) -> String {
    read.map_or_else(|wrong| format!("{wrong}\n"), |n| format!("exact {n}\n"))
}

async fn say(io: &mut (impl AsyncRead + AsyncWrite + Unpin), text: String) -> std::io::Result<()> {
    io.write_all(text.as_bytes()).await?;
    io.flush().await
}

async fn answer(mut request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let path = request.uri().path().to_owned();
    let number = || path.rsplit('/').next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
    Ok(match path.split('/').nth(1).unwrap_or_default() {
        "" => text("hello from the origin\n".into()),
        "bytes" => {
            // An end that comes in a frame of its own too: with it unread, hyper ends the
            // connection behind the answer, and the kernel's reset takes the answer's end.
            while request.body_mut().frame().await.is_some() {}
            let mut answer = Response::new(pattern_body(number()));
            answer.headers_mut().insert("content-length", HeaderValue::from(number()));
            answer
        }
        "sink" => {
            let mut pattern = Pattern::default();
            let mut wrong = None;
            while let Some(Ok(frame)) = request.body_mut().frame().await {
                let Some(bytes) = frame.data_ref() else { continue };
                wrong = wrong.or(pattern.check(bytes).err());
            }
            text(verdict(wrong.map_or(Ok(pattern.len()), Err)))
        }
        "slow" => {
            tokio::time::sleep(Duration::from_millis(number())).await;
            text("late\n".into())
        }
        "headers" => {
            let head =
                request.headers().iter().map(|(k, v)| format!("{k}: {}\n", String::from_utf8_lossy(v.as_bytes())));
            text(format!("{} {}\n{}", request.method(), request.uri(), head.collect::<String>()))
        }
        "sse" => {
            let events = stream::unfold(0, |n| async move {
                if n == 3 {
                    return None;
                }
                tokio::time::sleep(Duration::from_millis(if n == 0 { 0 } else { 300 })).await;
                Some((Ok(Frame::data(Bytes::from(format!("data: {n}\n\n")))), n + 1))
            });
            let mut answer = Response::new(BodyExt::boxed(StreamBody::new(events)));
            answer.headers_mut().insert("content-type", HeaderValue::from_static("text/event-stream"));
            answer
        }
        "ws" => {
            let Some(key) = request.headers().get("sec-websocket-key") else { return Ok(status(400)) };
            let accept = websocket::accept_of(key.as_bytes());
            let upgrade = hyper::upgrade::on(&mut request);
            tokio::spawn(async move {
                let Ok(io) = upgrade.await else { return };
                let mut socket = WebSocket::server(TokioIo::new(io));
                while let Some((opcode, message)) = socket.read().await {
                    socket.write(opcode, &message).await;
                }
            });
            let mut answer = status(101);
            let head = answer.headers_mut();
            head.insert("upgrade", HeaderValue::from_static("websocket"));
            head.insert("connection", HeaderValue::from_static("upgrade"));
            head.insert("sec-websocket-accept", HeaderValue::from_str(&accept).unwrap());
            answer
        }
        _ => status(404),
    })
}

fn text(text: String) -> Response<Body> {
    Response::new(Full::new(Bytes::from(text)).boxed())
}

fn status(code: u16) -> Response<Body> {
    let mut answer = text(String::new());
    *answer.status_mut() = StatusCode::from_u16(code).unwrap();
    answer
}

/// `n` bytes of the pattern as a body.
pub fn pattern_body(n: u64) -> Body {
    let chunks = stream::unfold(Pattern::default(), move |mut pattern| async move {
        let left = usize::try_from(n - pattern.len()).unwrap();
        (left > 0).then(|| (Ok(Frame::data(Bytes::from_static(pattern.next(left.min(64 << 10))))), pattern))
    });
    StreamBody::new(chunks).boxed()
}

fn self_signed(name: &str) -> (String, TlsAcceptor) {
    let made = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    (made.cert.pem(), TlsAcceptor::from(Arc::new(config)))
}
