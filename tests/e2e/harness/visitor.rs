//! Visitors: bytes on a connection, TLS with a given trust, HTTP/1.1 by hand,
//! HTTP/2 by hyper, and curl.

use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;

use http_body_util::BodyExt;
use hyper::Request;
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::ClientConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::origin::Body;
use super::{Node, Pattern};

/// Both directions of a connection.
pub trait ReadWrite: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> ReadWrite for T {}

/// A connection of any kind.
pub type Io = Box<dyn ReadWrite>;

/// A client that trusts one CA alone and offers these protocols.
pub fn trusting(ca_pem: &[u8], alpn: &[&str]) -> Arc<ClientConfig> {
    let mut roots = rustls::RootCertStore::empty();
    for ca in CertificateDer::pem_slice_iter(ca_pem) {
        roots.add(ca.unwrap()).unwrap();
    }
    let mut config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|p| p.as_bytes().to_vec()).collect();
    Arc::new(config)
}

/// Connects and makes TLS for `name`.
pub async fn tls_connect(addr: SocketAddr, name: &str, config: Arc<ClientConfig>) -> std::io::Result<Io> {
    let tcp = TcpStream::connect(addr).await?;
    tcp.set_nodelay(true)?;
    let name = ServerName::try_from(name.to_owned()).unwrap();
    Ok(Box::new(TlsConnector::from(config).connect(name, tcp).await?))
}

/// One request on a connection that ends with it: status, header lines, body.
/// `head` is the request line and what headers it wants besides host and length.
pub async fn request<S: AsyncRead + AsyncWrite + Unpin>(
    io: &mut S,
    head: &str,
    host: &str,
    body: &[u8],
) -> (u16, String, Vec<u8>) {
    let length = body.len();
    let head = format!("{head}host: {host}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n");
    io.write_all(head.as_bytes()).await.unwrap();
    io.write_all(body).await.unwrap();
    io.flush().await.unwrap();
    let (status, headers) = read_answer(io).await;
    let mut rest = Vec::new();
    io.read_to_end(&mut rest).await.unwrap();
    let chunked = headers.to_lowercase().contains("transfer-encoding: chunked");
    (status, headers, if chunked { unchunked(&rest) } else { rest })
}

/// Status and header lines of an answer, not a byte of its body.
pub async fn read_answer<S: AsyncRead + Unpin>(io: &mut S) -> (u16, String) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(io.read_u8().await.unwrap_or_else(|e| panic!("{e} after {}", String::from_utf8_lossy(&head))));
    }
    let head = String::from_utf8(head).unwrap();
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok());
    (status.unwrap_or_else(|| panic!("no status: {head}")), head)
}

fn unchunked(mut bytes: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    loop {
        let end = bytes.windows(2).position(|w| w == b"\r\n").expect("a chunk's size");
        let size = std::str::from_utf8(&bytes[..end]).unwrap().split(';').next().unwrap();
        let size = usize::from_str_radix(size, 16).expect("a chunk's size in hex");
        if size == 0 {
            return body;
        }
        body.extend(&bytes[end + 2..end + 2 + size]);
        bytes = &bytes[end + 4 + size..];
    }
}

/// An HTTP/2 connection to the node's HTTPS port.
pub async fn h2(node: &Node, name: &str) -> SendRequest<Body> {
    let ca = std::fs::read(node.ca()).unwrap();
    let io = tls_connect(node.addr("https"), name, trusting(&ca, &["h2"])).await.unwrap();
    let (sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(io)).await.unwrap();
    tokio::spawn(connection);
    sender
}

/// A request over HTTP/2 whose answer must be `n` bytes of the pattern.
pub async fn get_exact(sender: &mut SendRequest<Body>, url: &str, n: u64) {
    let request = Request::get(url).body(super::origin::pattern_body(0)).unwrap();
    let mut answer = sender.send_request(request).await.unwrap();
    assert_eq!(answer.status(), 200, "{url}");
    let mut pattern = Pattern::default();
    while let Some(frame) = answer.body_mut().frame().await {
        if let Some(bytes) = frame.unwrap().data_ref() {
            pattern.check(bytes).unwrap();
        }
    }
    assert_eq!(pattern.len(), n, "{url}");
}

/// curl against the node, names resolved to it: status and body.
pub async fn curl(node: &Node, arguments: &[&str]) -> (u16, String) {
    let mut command = Command::new("curl");
    command.args(["-sS", "--max-time", "20", "--noproxy", "*", "-w", "\n%{http_code}", "--cacert"]).arg(node.ca());
    // Whatever the name, to this node, on the port that the URL has.
    command.args(["--connect-to", &format!("::{}:", node.ip)]);
    command.args(arguments);
    let done = tokio::task::spawn_blocking(move || command.output().expect("curl")).await.unwrap();
    let out = String::from_utf8_lossy(&done.stdout).into_owned();
    let (body, status) = out.rsplit_once('\n').unwrap_or(("", "000"));
    assert!(status != "000", "curl {arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    (status.parse().unwrap(), body.to_owned())
}
