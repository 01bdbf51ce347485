//! Hosts of the node's own: whole requests in, whole answers out. What they answer
//! is somebody else's; here a request is read, within its bounds, and answered.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::http::request::Parts;
use hyper::{Request, StatusCode};
use serde_json::json;

use super::body::Upload;
use crate::error::Error;
use crate::gate::Reply;
use crate::model::HostName;

/// Longest body of a request, in bytes: a socket with all its rules has less.
const BODY_MAX: usize = 64 << 10;
/// How long a body may take to come.
const BODY_WAIT: Duration = Duration::from_secs(10);

/// What answers there: a request, and from where it came.
type Answers = dyn Fn(Request<Bytes>, IpAddr) -> BoxFuture<'static, Reply> + Send + Sync;

/// Hosts that this node answers for itself, by HTTPS alone.
#[derive(Clone)]
pub struct OwnHosts {
    /// Their names.
    pub names: Vec<HostName>,
    /// What answers there.
    pub answers: Arc<Answers>,
}

impl OwnHosts {
    pub(super) fn has(&self, host: &str) -> bool {
        self.names.iter().any(|name| name.as_str() == host)
    }

    /// Answers a request for one of them.
    ///
    /// # Errors
    /// `BadRequest`: its body broke off; `Idle`: it did not come in time.
    pub(super) async fn answer(&self, parts: Parts, upload: Upload, ip: IpAddr) -> Result<Reply, Error> {
        let collected = tokio::time::timeout(BODY_WAIT, Limited::new(upload, BODY_MAX).collect());
        let body = match collected.await {
            Ok(Ok(body)) => body.to_bytes(),
            Ok(Err(error)) if error.is::<LengthLimitError>() => {
                let told = json!({ "message": format!("The body may have {BODY_MAX} bytes.") });
                return Ok(Reply::json(StatusCode::PAYLOAD_TOO_LARGE, &told));
            }
            Ok(Err(_)) => return Err(Error::BadRequest),
            Err(_) => return Err(Error::Idle),
        };
        Ok((self.answers)(Request::from_parts(parts, body), ip).await)
    }
}
