//! Visitors of the web, and the body that they and the origin send: the pattern.
//! An answer counts only if its status, its length and its bytes are right.

use std::convert::Infallible;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use hyper::client::conn::{http1, http2};
use hyper::header::{ACCEPT, CONTENT_LENGTH, HOST, USER_AGENT};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;

use crate::pattern::{CHUNK, Pattern};
use crate::visitor::Tally;
use crate::{Outcome, visitor, within};

/// What sockets made on demand have names below.
pub const DOMAIN: &str = "edge.localhost";
const WEB: &str = "web.edge.localhost";

/// Of an answer, or its next bytes.
const PATIENCE: Duration = Duration::from_secs(30);

/// Where the origin reads nothing of what it is sent.
pub const HOLD: &str = "/hold";

/// The size of a small answer, in bytes.
pub const SMALL: u64 = 100;

/// One certificate for all systems, P-256; and how visitors meet it.
pub struct Tls {
    chain: String,
    key: String,
    http1: Arc<ClientConfig>,
    http2: Arc<ClientConfig>,
}

impl Tls {
    /// TLS 1.3 with AES-256-GCM and X25519 alone, which every system has; nothing is
    /// resumed.
    ///
    /// # Errors
    /// That no certificate could be made.
    pub fn new() -> Outcome<Self> {
        let made = rcgen::generate_simple_self_signed([WEB.to_owned(), format!("*.{DOMAIN}")])?;
        let provider = CryptoProvider {
            cipher_suites: vec![aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384],
            kx_groups: vec![aws_lc_rs::kx_group::X25519],
            ..aws_lc_rs::default_provider()
        };
        let mut roots = RootCertStore::empty();
        roots.add(made.cert.der().clone())?;
        let mut config = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.resumption = Resumption::disabled();
        let speaks = |protocols: &[&[u8]]| {
            let mut config = config.clone();
            config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
            Arc::new(config)
        };
        Ok(Self {
            chain: made.cert.pem(),
            key: made.signing_key.serialize_pem(),
            http1: speaks(&[b"http/1.1"]),
            // As browsers do: there are servers that end the handshake otherwise.
            http2: speaks(&[b"h2", b"http/1.1"]),
        })
    }

    /// Writes certificate and key as PEM files.
    pub fn write(&self, dir: &Path) -> Outcome<(PathBuf, PathBuf)> {
        let (chain, key) = (dir.join("chain.pem"), dir.join("web.key"));
        std::fs::write(&chain, &self.chain)?;
        std::fs::write(&key, &self.key)?;
        Ok((chain, key))
    }

    /// What visitors come with.
    pub fn visitors(&self, http2: bool) -> Arc<ClientConfig> {
        Arc::clone(if http2 { &self.http2 } else { &self.http1 })
    }
}

/// That a system ends TLS but speaks no HTTP/2.
#[derive(Debug)]
pub struct NoHttp2;

impl fmt::Display for NoHttp2 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("it speaks no HTTP/2")
    }
}

impl std::error::Error for NoHttp2 {}

/// Where something is published.
#[derive(Clone)]
pub struct Site {
    pub addr: SocketAddr,
    /// None: plain HTTP.
    pub tls: Option<Arc<ClientConfig>>,
}

trait Io: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

impl Site {
    /// A connection of HTTP/1.1.
    ///
    /// # Errors
    /// Why there is none.
    pub async fn http1(&self) -> Outcome<Visit> {
        let io = TokioIo::new(self.connect().await?);
        let (sender, connection) = http1::handshake(io).await?;
        tokio::spawn(connection);
        Ok(Visit::Http1(sender))
    }

    /// A connection of HTTP/2; clones of it are streams.
    ///
    /// # Errors
    /// Why there is none.
    pub async fn http2(&self) -> Outcome<Visit> {
        let io = TokioIo::new(self.connect().await?);
        let (sender, connection) = http2::handshake(TokioExecutor::new(), io).await?;
        tokio::spawn(connection);
        Ok(Visit::Http2(sender))
    }

    /// One connection with one small request.
    ///
    /// # Errors
    /// Why it was not answered as it should be.
    pub async fn greet(&self, http2: bool) -> Outcome<()> {
        let mut visit = if http2 { self.http2().await? } else { self.http1().await? };
        visit.get(SMALL).await.map(drop)
    }

    async fn connect(&self) -> Outcome<Box<dyn Io>> {
        let connect = async {
            let tcp = visitor::connect(self.addr).await?;
            let Some(config) = &self.tls else { return Ok(Box::new(tcp) as Box<dyn Io>) };
            let tls = TlsConnector::from(Arc::clone(config)).connect(ServerName::try_from(WEB)?, tcp).await?;
            let wants_http2 = config.alpn_protocols.iter().any(|protocol| protocol == b"h2");
            if wants_http2 && tls.get_ref().1.alpn_protocol() != Some(b"h2") {
                return Err(NoHttp2.into());
            }
            Ok(Box::new(tls) as Box<dyn Io>)
        };
        match tokio::time::timeout(PATIENCE, connect).await {
            Ok(connected) => connected,
            Err(_) => Err(format!("no connection within {PATIENCE:?}").into()),
        }
    }
}

/// A connection, or a stream of one.
pub enum Visit {
    Http1(http1::SendRequest<Sent>),
    Http2(http2::SendRequest<Sent>),
}

impl Visit {
    /// Another stream; none of HTTP/1.1.
    pub fn stream(&self) -> Option<Self> {
        match self {
            Visit::Http1(_) => None,
            Visit::Http2(sender) => Some(Visit::Http2(sender.clone())),
        }
    }

    /// Asks for so many bytes, and looks at them; returns how many they were.
    ///
    /// # Errors
    /// What was wrong.
    pub async fn get(&mut self, bytes: u64) -> Outcome<u64> {
        self.get_counted(bytes, |_| ()).await
    }

    /// The same, and tells of each piece how much it was.
    ///
    /// # Errors
    /// What was wrong.
    pub async fn get_counted(&mut self, bytes: u64, count: impl Fn(u64)) -> Outcome<u64> {
        let answer = self.begin_get(bytes).await?;
        let told = answer.headers().get(CONTENT_LENGTH).and_then(|told| told.to_str().ok()?.parse::<u64>().ok());
        // HTTP/1.1 may have it in chunks instead.
        if told.is_some_and(|told| told != bytes) {
            return Err(format!("a length of {told:?} was told, not {bytes}").into());
        }
        let (came, right) = came(answer.into_body(), bytes, count).await?;
        match (came == bytes, right) {
            (true, true) => Ok(bytes),
            (false, _) => Err(format!("{came} bytes came of {bytes}").into()),
            (_, false) => Err(format!("wrong bytes among {bytes}").into()),
        }
    }

    /// Asks for so many bytes, and reads none.
    ///
    /// # Errors
    /// What was wrong.
    pub async fn begin_get(&mut self, bytes: u64) -> Outcome<Response<Incoming>> {
        let request = self.request(Method::GET, &format!("/bytes/{bytes}"), Sent::new(0))?;
        self.ask(request).await
    }

    /// Sends as much as anybody takes, of which the origin reads nothing; ends where
    /// somebody breaks it off.
    ///
    /// # Errors
    /// What was wrong.
    pub async fn post_unread(&mut self) -> Outcome<()> {
        let request = self.request(Method::POST, HOLD, Sent::new(u64::MAX >> 1))?;
        match self {
            Visit::Http1(sender) => sender.send_request(request).await.map(drop)?,
            Visit::Http2(sender) => sender.send_request(request).await.map(drop)?,
        }
        Ok(())
    }

    /// Sends so many bytes, which the origin looks at; returns how many they were.
    ///
    /// # Errors
    /// What was wrong.
    pub async fn post(&mut self, bytes: u64) -> Outcome<u64> {
        self.post_counted(bytes, None).await
    }

    /// The same, and counts what leaves.
    ///
    /// # Errors
    /// What was wrong.
    pub async fn post_counted(&mut self, bytes: u64, tally: Option<Tally>) -> Outcome<u64> {
        let request = self.request(Method::POST, "/check", Sent { tally, ..Sent::new(bytes) })?;
        let sent = self.ask(request).await?.into_body().collect();
        let answer = within(PATIENCE, "the origin's count", async { Ok(sent.await?.to_bytes()) }).await?;
        match answer == verdict(bytes, true).as_bytes() {
            true => Ok(bytes),
            false => Err(format!("sent {bytes}, and of them arrived: {}", answer.escape_ascii()).into()),
        }
    }

    fn request(&self, method: Method, path: &str, body: Sent) -> Outcome<Request<Sent>> {
        let request = Request::builder().method(method).header(USER_AGENT, "edge").header(ACCEPT, "*/*");
        let request = match self {
            Visit::Http1(_) => request.uri(path).header(HOST, WEB),
            Visit::Http2(_) => request.uri(format!("https://{WEB}{path}")),
        };
        Ok(request.body(body)?)
    }

    async fn ask(&mut self, request: Request<Sent>) -> Outcome<Response<Incoming>> {
        // A body is as slow as the system; that something moves, the origin sees to.
        let limit = PATIENCE + Duration::from_secs(request.body().left >> 20);
        let answer = async {
            match self {
                Visit::Http1(sender) => {
                    sender.ready().await?;
                    Ok(sender.send_request(request).await?)
                }
                Visit::Http2(sender) => {
                    sender.ready().await?;
                    Ok(sender.send_request(request).await?)
                }
            }
        };
        let answer = within(limit, "an answer", answer).await?;
        if answer.status() != StatusCode::OK {
            return Err(format!("answered {}", answer.status()).into());
        }
        Ok(answer)
    }
}

/// Reads a body of at most so many bytes to its end: how many came, and whether they
/// are the pattern. `count` hears of each piece.
pub async fn came(mut body: Incoming, most: u64, count: impl Fn(u64)) -> Outcome<(u64, bool)> {
    let (mut pattern, mut came, mut right) = (Pattern::default(), 0, true);
    while let Some(frame) = within(PATIENCE, "a body", async { Ok(body.frame().await.transpose()?) }).await? {
        let Ok(bytes) = frame.into_data() else { continue };
        came += bytes.len() as u64;
        count(bytes.len() as u64);
        right = right && bytes.chunks(CHUNK).all(|chunk| pattern.check(chunk).is_ok());
        if came > most {
            break;
        }
    }
    Ok((came, right))
}

/// What the origin says of a body.
pub fn verdict(bytes: u64, right: bool) -> String {
    format!("{bytes} bytes, {}\n", if right { "right" } else { "wrong" })
}

/// So many bytes of the pattern, from its begin.
#[derive(Debug)]
pub struct Sent {
    pattern: Pattern,
    left: u64,
    tally: Option<Tally>,
}

impl Sent {
    pub fn new(left: u64) -> Self {
        Self { pattern: Pattern::default(), left, tally: None }
    }
}

impl Body for Sent {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.left == 0 {
            return Poll::Ready(None);
        }
        let max = usize::try_from(self.left).unwrap_or(CHUNK);
        let bytes = self.pattern.peek(max);
        self.pattern.advance(bytes.len());
        self.left -= bytes.len() as u64;
        if let Some(tally) = &self.tally {
            tally.add(bytes.len() as u64);
        }
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(bytes)))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}
