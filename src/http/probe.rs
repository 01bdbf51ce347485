//! Asks an origin whether it serves: one GET over a stream of its own.

use std::pin::pin;

use bytes::Bytes;
use futures_util::future::{Either, select};
use http_body_util::Empty;
use hyper::client::conn::{http1, http2};
use hyper::header::{HOST, USER_AGENT};
use hyper::http::uri::Scheme;
use hyper::{Request, StatusCode, Uri};
use hyper_util::rt::{TokioExecutor, TokioIo};

use super::{Http, origin_tls};
use crate::dial::Dial;
use crate::error::Error;
use crate::model::{Socket, SocketType};
use crate::stream::Stream;

/// What origins find in their logs.
const AGENT: &str = concat!("adit-check/", env!("CARGO_PKG_VERSION"));

impl<D: Dial> Http<D> {
    /// The status of an origin's answer to GET `path`, spoken to as visitors' requests
    /// are: by its `Host`, over TLS, by HTTP/2, as the socket says. The body is not
    /// waited for.
    ///
    /// # Errors
    /// `OriginTls`, `OriginReset`; `Internal` where `path` is none.
    pub async fn probe(&self, stream: Stream, socket: &Socket, path: &str) -> Result<StatusCode, Error> {
        let first = socket.hostnames.first().map_or("localhost", |name| name.as_str().trim_start_matches("*."));
        let host = socket.upstream.host.as_deref().unwrap_or(first);
        let asked = socket.upstream.http2;
        let (stream, http2) = match socket.kind {
            SocketType::Https => {
                let name = origin_tls::server_name(socket, first)?;
                self.origin_tls.connect(stream, socket, name, asked).await?
            }
            _ => (stream, asked),
        };
        let scheme = if socket.kind == SocketType::Https { Scheme::HTTPS } else { Scheme::HTTP };
        let uri = match http2 {
            true => Uri::builder().scheme(scheme).authority(host).path_and_query(path).build(),
            false => Uri::builder().path_and_query(path).build(),
        };
        let mut request = Request::get(uri.map_err(|_| Error::Internal)?).header(USER_AGENT, AGENT);
        if !http2 {
            request = request.header(HOST, host);
        }
        let request = request.body(Empty::<Bytes>::new()).map_err(|_| Error::Internal)?;
        let io = TokioIo::new(stream);
        // Neither answers unless the other runs.
        let answer = if http2 {
            let (mut requests, driver) =
                http2::handshake(TokioExecutor::new(), io).await.map_err(|_| Error::OriginReset)?;
            match select(pin!(requests.send_request(request)), pin!(driver)).await {
                Either::Left((answer, _)) => answer,
                Either::Right((_, answer)) => answer.await,
            }
        } else {
            let (mut requests, driver) = http1::handshake(io).await.map_err(|_| Error::OriginReset)?;
            match select(pin!(requests.send_request(request)), pin!(driver)).await {
                Either::Left((answer, _)) => answer,
                Either::Right((_, answer)) => answer.await,
            }
        };
        answer.map(|answer| answer.status()).map_err(|_| Error::OriginReset)
    }
}
