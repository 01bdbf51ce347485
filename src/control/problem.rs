//! Errors as problem documents (RFC 9457): a stable type, a sentence, and every
//! bad field with how to mend it. The only writer of the API's errors.

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::header::{self, HeaderName, HeaderValue};
use hyper::{Response, StatusCode};
use serde_json::{Value, json};

use super::Body;
use super::routing::Route;
use crate::feed::WriteError;
use crate::feed::records::RecordError;
use crate::fields::Mistake;

/// An error on its way to the client.
#[derive(Debug)]
pub(super) struct Problem {
    status: StatusCode,
    /// The last part of the document's `type`.
    code: &'static str,
    title: &'static str,
    detail: String,
    errors: Vec<Mistake>,
    /// Boxed: a problem is the error of every handler, and rare.
    header: Option<Box<(HeaderName, String)>>,
}

impl Problem {
    pub(super) fn new(status: StatusCode, code: &'static str, title: &'static str, detail: impl Into<String>) -> Self {
        Self { status, code, title, detail: detail.into(), errors: Vec::new(), header: None }
    }

    fn with_header(mut self, name: HeaderName, value: impl Into<String>) -> Self {
        self.header = Some(Box::new((name, value.into())));
        self
    }

    pub(super) fn invalid(errors: Vec<Mistake>) -> Self {
        let detail = errors.iter().map(Mistake::to_string).collect::<Vec<_>>().join(". ");
        let status = StatusCode::BAD_REQUEST;
        Self { errors, ..Self::new(status, "invalid", "The request has mistakes", detail) }
    }

    pub(super) fn no_such_path() -> Self {
        let detail = "There is nothing at this path; /v1/openapi.json lists what there is.";
        Self::new(StatusCode::NOT_FOUND, "not_found", "No such path", detail)
    }

    pub(super) fn method_not_allowed(route: &Route) -> Self {
        let mut allow = route.methods.join(", ");
        if route.methods.contains(&"GET") {
            allow.push_str(", HEAD");
        }
        let status = StatusCode::METHOD_NOT_ALLOWED;
        Self::new(status, "method_not_allowed", "Method not allowed", format!("This path takes {allow}."))
            .with_header(header::ALLOW, allow)
    }

    pub(super) fn not_acceptable(media: &str) -> Self {
        let status = StatusCode::NOT_ACCEPTABLE;
        Self::new(
            status,
            "not_acceptable",
            "Not acceptable",
            format!("This path answers {media}; send `Accept: {media}`."),
        )
    }

    pub(super) fn unauthorized(detail: &str) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "unauthorized", "A token is needed", detail)
            .with_header(header::WWW_AUTHENTICATE, "Bearer realm=\"adit\"")
    }

    pub(super) fn forbidden(detail: &str) -> Self {
        Self::new(StatusCode::FORBIDDEN, "forbidden", "Refused", detail)
    }

    /// Names who does what this node may not, where it is a write that was denied.
    pub(super) fn naming(mut self, writers: impl FnOnce() -> Vec<String>) -> Self {
        if self.code == "read_only" {
            let writers = writers();
            let who = if writers.is_empty() { "No node that lives does.".into() } else { writers.join(", ") };
            self.detail = format!("{}. Nodes that write records: {who}", self.detail);
        }
        self
    }

    pub(super) fn unavailable(code: &'static str, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, code, "Not available now", detail)
            .with_header(header::RETRY_AFTER, "1")
    }

    pub(super) fn into_response(self) -> Response<Body> {
        let mut document = json!({
            "type": format!("urn:adit:problem:{}", self.code),
            "title": self.title,
            "status": self.status.as_u16(),
            "detail": self.detail,
        });
        if let (Value::Object(members), false) = (&mut document, self.errors.is_empty()) {
            members.insert("errors".into(), self.errors.iter().map(told).collect());
        }
        let mut response = Response::new(Full::new(Bytes::from(document.to_string())).boxed_unsync());
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if let Some((name, value)) = self.header.map(|h| *h)
            && let Ok(value) = value.parse()
        {
            headers.insert(name, value);
        }
        response
    }
}

fn told(mistake: &Mistake) -> Value {
    json!({ "field": mistake.at, "pointer": pointer(&mistake.at), "detail": mistake.problem, "fix": mistake.fix })
}

/// `hostnames[1]` as `/hostnames/1` (RFC 6901).
fn pointer(at: &str) -> String {
    let mut out = String::new();
    for part in at.split(['.', '[']).filter(|p| !p.is_empty()) {
        out.push('/');
        out.push_str(&part.trim_end_matches(']').replace('~', "~0").replace('/', "~1"));
    }
    out
}

impl From<RecordError> for Problem {
    fn from(error: RecordError) -> Self {
        let detail = error.to_string();
        match error {
            RecordError::Mistakes(errors) => Self::invalid(errors),
            RecordError::Taken(errors) => {
                Self { errors, ..Self::new(StatusCode::CONFLICT, "taken", "A name or port is taken", detail) }
            }
            RecordError::Precondition { rev } => {
                let problem = Self::new(
                    StatusCode::PRECONDITION_FAILED,
                    "precondition_failed",
                    "The condition does not hold",
                    detail,
                );
                match rev {
                    Some(rev) => problem.with_header(header::ETAG, format!("\"{rev}\"")),
                    None => problem,
                }
            }
            RecordError::NotFound => {
                Self::new(StatusCode::NOT_FOUND, "not_found", "No such record", "There is no record with this id.")
            }
            RecordError::InUse(_) => {
                let detail = format!("{detail}. Delete them first, or send ?cascade=true to delete them too.");
                Self::new(StatusCode::CONFLICT, "in_use", "The socket is in use", detail)
            }
            RecordError::Unreadable(errors) => {
                tracing::error!(%detail, "a stored record cannot be read");
                let status = StatusCode::INTERNAL_SERVER_ERROR;
                Self { errors, ..Self::new(status, "unreadable", "The stored record cannot be read", detail) }
            }
            RecordError::Write(WriteError::Denied(why)) => {
                Self::new(StatusCode::FORBIDDEN, "read_only", "This node does not write records", why)
            }
            RecordError::Contended => Self::unavailable("contended", detail),
            RecordError::Write(WriteError::Unknown(_)) => {
                Self::unavailable("unknown", format!("{detail}. Read the record to see whether it was written."))
            }
            RecordError::Write(_) | RecordError::Read(_) => Self::unavailable("unavailable", detail),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::pointer;

    #[test]
    fn a_field_becomes_a_json_pointer() {
        assert_eq!(pointer("upstream.tls.verify"), "/upstream/tls/verify");
        assert_eq!(pointer("hostnames[1]"), "/hostnames/1");
        assert_eq!(pointer("x/y"), "/x~1y");
        assert_eq!(pointer(""), "");
    }
}
