//! The one HTTP client towards login providers: https to verified hosts, http to
//! this machine alone, one request a connection, no redirects, no proxies of the
//! environment, and an end to everything: name, connection, answer, body.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::{CONNECTION, HOST, HeaderValue, USER_AGENT};
use hyper::{Request, Response, Uri};
use hyper_util::rt::TokioIo;
use rustls::RootCertStore;
use rustls::client::ClientConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::OnceCell;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;

use super::settings::ProviderSettings;
use crate::model::{Provider, authority_host};

/// Largest head of an answer, in bytes: hyper's smallest buffer is 8 KiB; real
/// providers send up to 10 with their policies and cookies.
const HEAD_MAX: usize = 64 << 10;

/// How many of a host's addresses are tried.
const ADDRESSES_MAX: usize = 4;

/// Asks providers over HTTP.
pub(super) struct Fetch {
    settings: ProviderSettings,
    /// Of the settings' file.
    more_roots: Vec<CertificateDer<'static>>,
    /// Made at the first https URL: the system's roots are some hundred files.
    tls: OnceCell<TlsConnector>,
}

/// What of a provider is asked: a label of metrics, and the subject of errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    Metadata,
    Keys,
    Token,
    UserInfo,
    Api,
}

impl What {
    fn label(self) -> &'static str {
        match self {
            Self::Metadata => "metadata",
            Self::Keys => "keys",
            Self::Token => "token",
            Self::UserInfo => "userinfo",
            Self::Api => "api",
        }
    }
}

/// A request without an answer that counts. The text names the host and what went
/// wrong, and nothing of what was sent or answered.
#[derive(Debug)]
pub(super) struct Unfetched(pub(super) String);

impl fmt::Display for Unfetched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unfetched {}

impl Default for Fetch {
    fn default() -> Self {
        Self { settings: ProviderSettings::default(), more_roots: Vec::new(), tls: OnceCell::new() }
    }
}

impl Fetch {
    /// # Errors
    /// The settings' CA file has no certificate, or cannot be read.
    pub(super) fn new(settings: ProviderSettings) -> Result<Self, String> {
        let mut more_roots = Vec::new();
        if let Some(path) = &settings.ca_file {
            let unusable = |why: String| format!("gate.ca_file {}: {why}", path.display());
            let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
            more_roots = read.map_err(|error| unusable(error.to_string()))?;
            if RootCertStore::empty().add_parsable_certificates(more_roots.clone()).0 == 0 {
                return Err(unusable("has no CA certificate".into()));
            }
        }
        Ok(Self { settings, more_roots, tls: OnceCell::new() })
    }

    pub(super) fn settings(&self) -> &ProviderSettings {
        &self.settings
    }

    /// Sends one request, once, and reads its answer whole. Any status but a
    /// redirect's is an answer.
    ///
    /// # Errors
    /// There is no whole answer in time, or it is a redirect.
    pub(super) async fn send(
        &self,
        provider: &Provider,
        what: What,
        request: Request<Vec<u8>>,
    ) -> Result<Response<Vec<u8>>, Unfetched> {
        let began = Instant::now();
        let host = request.uri().host().unwrap_or("?").to_owned();
        let whole = self.settings.timeout;
        let answer = match timeout(whole, Box::pin(self.exchange(request))).await {
            Ok(answer) => answer,
            Err(_) => Err(format!("did not answer within {whole:?}")),
        };
        let outcome = match &answer {
            Ok(answer) if answer.status().is_success() => "ok",
            Ok(_) => "refused",
            Err(_) => "failed",
        };
        let (id, kind) = (provider.id.to_string(), provider.kind.as_str());
        metrics::counter!(
            "adit_provider_requests_total",
            "provider" => id, "kind" => kind, "request" => what.label(), "outcome" => outcome
        )
        .increment(1);
        metrics::histogram!("adit_provider_request_seconds", "kind" => kind, "request" => what.label())
            .record(began.elapsed().as_secs_f64());
        answer.map_err(|problem| Unfetched(format!("{} at {host}: {problem}", what.label())))
    }

    async fn exchange(&self, request: Request<Vec<u8>>) -> Result<Response<Vec<u8>>, String> {
        let target = Target::of(request.uri())?;
        let request = for_origin(request, &target)?;
        let stream = self.connect(&target).await?;
        if !target.tls {
            return self.exchange_over(stream, request).await;
        }
        let tls = self.tls.get_or_try_init(|| self.connector()).await?;
        let name = ServerName::try_from(target.host.clone()).map_err(|_| "has no name for TLS".to_owned())?;
        // What rustls says names certificates and alerts, no bytes of ours.
        let stream = tls.connect(name, stream).await.map_err(|error| format!("TLS failed: {error}"))?;
        self.exchange_over(stream, request).await
    }

    async fn exchange_over<S>(&self, stream: S, request: Request<Full<Bytes>>) -> Result<Response<Vec<u8>>, String>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let mut builder = http1::Builder::new();
        builder.max_buf_size(HEAD_MAX);
        let (mut requests, driver) =
            builder.handshake(TokioIo::new(stream)).await.map_err(|_| "closed the connection".to_owned())?;
        let answered = async {
            let answer = requests.send_request(request).await.map_err(|error| unanswered(&error))?;
            let (head, body) = answer.into_parts();
            if head.status.is_redirection() {
                // It would have us ask where nobody configured.
                return Err(format!("answered {}, and redirects are not followed", head.status.as_u16()));
            }
            let max = self.settings.body_max;
            let body = Limited::new(body, max).collect().await.map_err(|error| match error
                .downcast_ref::<http_body_util::LengthLimitError>(
            ) {
                Some(_) => format!("answered with more than {max} bytes"),
                None => "closed the connection amid its answer".to_owned(),
            })?;
            Ok(Response::from_parts(head, body.to_bytes().to_vec()))
        };
        // No task of its own: the connection ends with this future.
        let (mut answered, mut driver) = (std::pin::pin!(answered), std::pin::pin!(driver));
        tokio::select! {
            answer = &mut answered => answer,
            _ = &mut driver => answered.await,
        }
    }

    async fn connect(&self, target: &Target) -> Result<TcpStream, String> {
        let until = Instant::now() + self.settings.connect_timeout;
        let late = |_| format!("cannot be connected to within {:?}", self.settings.connect_timeout);
        let found = match self.settings.resolve.iter().find(|known| known.host == target.host) {
            Some(known) => vec![known.at],
            None => tokio::time::timeout_at(until, target.lookup()).await.map_err(late)??,
        };
        let mut why = "has no address".to_owned();
        let mut left = u32::try_from(found.len()).unwrap_or(u32::MAX);
        for address in found {
            // An address that is silent leaves time for the others.
            let share = until.saturating_duration_since(Instant::now()) / left.max(1);
            left = left.saturating_sub(1);
            match timeout(share, TcpStream::connect(address)).await {
                Ok(Ok(stream)) => {
                    let _ = stream.set_nodelay(true);
                    return Ok(stream);
                }
                Ok(Err(error)) => why = format!("cannot be connected to: {}", error.kind()),
                Err(elapsed) => why = late(elapsed),
            }
        }
        Err(why)
    }

    async fn connector(&self) -> Result<TlsConnector, String> {
        let more = self.more_roots.clone();
        // Reads some hundred files on some systems: not on a runtime thread.
        let roots = tokio::task::spawn_blocking(move || roots(more)).await.map_err(|_| "no roots".to_owned())?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|_| "no TLS version".to_owned())?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(TlsConnector::from(Arc::new(config)))
    }
}

fn roots(more: Vec<CertificateDer<'static>>) -> RootCertStore {
    let mut roots = RootCertStore::empty();
    let system = rustls_native_certs::load_native_certs();
    for error in &system.errors {
        tracing::warn!(%error, "a system root certificate is unreadable");
    }
    roots.add_parsable_certificates(system.certs);
    roots.add_parsable_certificates(more);
    if roots.is_empty() {
        tracing::warn!("no root certificate is known: login providers by https cannot be verified");
    }
    roots
}

/// hyper's errors, in words of ours: theirs may quote what was received.
fn unanswered(error: &hyper::Error) -> String {
    let what = if error.is_parse_too_large() {
        "answered with a head that is too large"
    } else if error.is_parse() {
        "answered, but not in HTTP"
    } else {
        "closed the connection without an answer"
    };
    what.to_owned()
}

/// Whether a host is this machine: what may be asked without TLS.
pub(super) fn is_here(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost"
        || host.ends_with(".localhost")
        || host.parse::<IpAddr>().is_ok_and(|ip| ip.to_canonical().is_loopback())
}

/// Where a URL leads.
struct Target {
    tls: bool,
    /// In lower case, IPv6 without brackets.
    host: String,
    port: u16,
}

impl Target {
    fn of(uri: &Uri) -> Result<Self, String> {
        let authority = uri.authority().ok_or("is no absolute URL")?;
        let host = authority_host(authority.as_str()).map_err(|_| "is no host of a URL")?.into_owned();
        let tls = match uri.scheme_str() {
            Some("https") => true,
            Some("http") if is_here(&host) => false,
            _ => return Err("is neither https nor http on this machine".into()),
        };
        Ok(Self { tls, host, port: uri.port_u16().unwrap_or(if tls { 443 } else { 80 }) })
    }

    async fn lookup(&self) -> Result<Vec<SocketAddr>, String> {
        let unknown = |_| "its name cannot be resolved".to_owned();
        let mut found: Vec<SocketAddr> =
            tokio::net::lookup_host((self.host.as_str(), self.port)).await.map_err(unknown)?.collect();
        // Whoever answers for these names, plain text does not leave the machine.
        found.retain(|address| self.tls || address.ip().to_canonical().is_loopback());
        found.truncate(ADDRESSES_MAX);
        Ok(found)
    }
}

/// The request as it goes to the host itself (RFC 9112 §3.2.1).
fn for_origin(request: Request<Vec<u8>>, target: &Target) -> Result<Request<Full<Bytes>>, String> {
    let (mut head, body) = request.into_parts();
    let bad = "is no URL that can be asked";
    let usual = if target.tls { 443 } else { 80 };
    let host = if target.host.contains(':') { format!("[{}]", target.host) } else { target.host.clone() };
    let host = if target.port == usual { host } else { format!("{host}:{}", target.port) };
    head.headers.insert(HOST, HeaderValue::try_from(host).map_err(|_| bad)?);
    head.headers.insert(CONNECTION, HeaderValue::from_static("close"));
    // GitHub answers nobody who does not name itself.
    head.headers.insert(USER_AGENT, HeaderValue::from_static("adit"));
    let path = head.uri.path_and_query().map_or("/", |path| path.as_str());
    head.uri = path.parse().map_err(|_| bad)?;
    Ok(Request::from_parts(head, Full::new(Bytes::from(body))))
}

/// How long an answer may be kept by its `Cache-Control` (RFC 9111 §5.2.2), if it
/// says; zero where it says not at all.
pub(super) fn max_age(answer: &Response<Vec<u8>>) -> Option<Duration> {
    let mut age = None;
    for value in answer.headers().get_all(hyper::header::CACHE_CONTROL) {
        for directive in value.to_str().unwrap_or_default().split(',').map(str::trim) {
            if directive.eq_ignore_ascii_case("no-store") || directive.eq_ignore_ascii_case("no-cache") {
                return Some(Duration::ZERO);
            }
            let Some((name, seconds)) = directive.split_once('=') else { continue };
            if name.eq_ignore_ascii_case("max-age") {
                // RFC 9111 §1.2.2: more than fits is a long time.
                let digits = seconds.trim_matches('"');
                let all = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
                age = all.then(|| Duration::from_secs(digits.parse().unwrap_or(u64::from(u32::MAX))));
            }
        }
    }
    age
}
