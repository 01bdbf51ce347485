//! What can be asked of the operator's API: one table of paths and methods, and
//! what each does. `openapi.json` describes it; a test holds the two together.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{ALLOW, CONTENT_TYPE, ETAG, HeaderMap, HeaderName, HeaderValue, IF_MATCH, IF_NONE_MATCH, LOCATION};
use hyper::{Method, Request, Response, StatusCode};
use serde_json::{Map, Value, json};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::{Answer, Body, Control, Problem, events};
use crate::feed::records::{Condition, Record, RecordError, Written};
use crate::model::{Certificate, Socket, Tunnel};

const OPENAPI: &str = include_str!("openapi.json");

/// A write is answered once the route table shows it; no later than this.
const APPLIED: Duration = Duration::from_secs(2);

/// Records of one page of a list.
const PAGE: usize = 100;
const PAGE_MAX: usize = 1000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Sockets,
    Tunnels,
    Certificates,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    List(Kind),
    Get(Kind),
    Put(Kind),
    Delete(Kind),
    Watch,
    Status,
    Drain,
    Openapi,
    Health,
    Ready,
    Metrics,
}

/// Every call: method, path, what it does.
const CALLS: &[(&str, &str, Call)] = &[
    ("GET", "/v1/sockets", Call::List(Kind::Sockets)),
    ("GET", "/v1/sockets/{id}", Call::Get(Kind::Sockets)),
    ("PUT", "/v1/sockets/{id}", Call::Put(Kind::Sockets)),
    ("DELETE", "/v1/sockets/{id}", Call::Delete(Kind::Sockets)),
    ("GET", "/v1/tunnels", Call::List(Kind::Tunnels)),
    ("GET", "/v1/tunnels/{id}", Call::Get(Kind::Tunnels)),
    ("PUT", "/v1/tunnels/{id}", Call::Put(Kind::Tunnels)),
    ("DELETE", "/v1/tunnels/{id}", Call::Delete(Kind::Tunnels)),
    ("GET", "/v1/certificates", Call::List(Kind::Certificates)),
    ("GET", "/v1/certificates/{id}", Call::Get(Kind::Certificates)),
    ("PUT", "/v1/certificates/{id}", Call::Put(Kind::Certificates)),
    ("DELETE", "/v1/certificates/{id}", Call::Delete(Kind::Certificates)),
    ("GET", "/v1/watch", Call::Watch),
    ("GET", "/v1/status", Call::Status),
    ("POST", "/v1/drain", Call::Drain),
    ("GET", "/v1/openapi.json", Call::Openapi),
    ("GET", "/healthz", Call::Health),
    ("GET", "/readyz", Call::Ready),
    ("GET", "/metrics", Call::Metrics),
];

/// The call and the id in its path.
fn find(method: &Method, path: &str) -> Result<(Call, String), Problem> {
    let matches = |template: &str| match template.strip_suffix("{id}") {
        Some(folder) => path.strip_prefix(folder).filter(|id| !id.is_empty() && !id.contains('/')),
        None => (path == template).then_some(""),
    };
    let at_path: Vec<_> = CALLS.iter().filter_map(|(m, t, call)| Some((*m, *call, matches(t)?))).collect();
    if at_path.is_empty() {
        return Err(Problem::new(StatusCode::NOT_FOUND, format!("there is no {path}; see /v1/openapi.json")));
    }
    let method = if method == Method::HEAD { "GET" } else { method.as_str() };
    match at_path.iter().find(|(m, ..)| *m == method) {
        Some((_, call, id)) => Ok((*call, unescaped(id)?)),
        None => {
            let allowed: Vec<&str> = at_path.iter().map(|(m, ..)| *m).collect();
            let allowed = allowed.join(", ");
            let detail = format!("{method} is not for {path}; allowed: {allowed}");
            Err(Problem::new(StatusCode::METHOD_NOT_ALLOWED, detail).header(ALLOW, &allowed))
        }
    }
}

/// Undoes percent-encoding; ids hold `:` and `@`, which some clients escape.
fn unescaped(text: &str) -> Result<String, Problem> {
    let bad = || Problem::new(StatusCode::BAD_REQUEST, "the path is badly escaped");
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digit = |b: Option<u8>| b.and_then(|b| char::from(b).to_digit(16)).ok_or_else(bad);
        let value = digit(rest.next())? * 16 + digit(rest.next())?;
        bytes.push(u8::try_from(value).map_err(|_| bad())?);
    }
    String::from_utf8(bytes).map_err(|_| bad())
}

impl Control {
    pub(super) async fn call(self: &Arc<Self>, request: Request<Incoming>, stop: &CancellationToken) -> Answer {
        let (call, id) = find(request.method(), request.uri().path())?;
        match call {
            Call::List(Kind::Sockets) => self.list::<Socket>(&request).await,
            Call::List(Kind::Tunnels) => self.list::<Tunnel>(&request).await,
            Call::List(Kind::Certificates) => self.list::<Certificate>(&request).await,
            Call::Get(Kind::Sockets) => self.get::<Socket>(&id).await,
            Call::Get(Kind::Tunnels) => self.get::<Tunnel>(&id).await,
            Call::Get(Kind::Certificates) => self.get::<Certificate>(&id).await,
            Call::Put(kind) => {
                let condition = condition(request.headers())?;
                let fields = self.fields(request).await?;
                match kind {
                    Kind::Sockets => {
                        let socket = read::<Socket>(&id, fields)?;
                        self.written(self.parts.records.put_socket(socket, condition).await).await
                    }
                    Kind::Tunnels => {
                        let tunnel = read::<Tunnel>(&id, fields)?;
                        self.written(self.parts.records.put(tunnel, condition).await).await
                    }
                    Kind::Certificates => {
                        let certificate = read::<Certificate>(&id, fields)?;
                        self.written(self.parts.records.put(certificate, condition).await).await
                    }
                }
            }
            Call::Delete(kind) => {
                let condition = condition(request.headers())?;
                match kind {
                    Kind::Sockets => self.delete::<Socket>(&id, condition).await,
                    Kind::Tunnels => self.delete::<Tunnel>(&id, condition).await,
                    Kind::Certificates => self.delete::<Certificate>(&id, condition).await,
                }
            }
            Call::Watch => {
                let last = request.headers().get("last-event-id").and_then(|v| v.to_str().ok());
                let from = match last.or(query(&request, "from")) {
                    Some(text) => {
                        let bad = "from is EPOCH:REVISION, as the events' ids are";
                        Some(events::cursor(text).ok_or_else(|| Problem::new(StatusCode::BAD_REQUEST, bad))?)
                    }
                    None => None,
                };
                Ok(events::answer(&self.parts.feed, from, stop))
            }
            Call::Status => {
                let mut status = (self.parts.status)();
                if let Some(fields) = status.as_object_mut() {
                    fields.insert("revision".to_owned(), json!(*self.parts.applied.borrow()));
                }
                Ok(json_answer(StatusCode::OK, &status))
            }
            Call::Drain => {
                self.parts.drain.cancel();
                Ok(json_answer(StatusCode::ACCEPTED, &json!({ "draining": true })))
            }
            Call::Openapi => Ok(typed("application/json", OPENAPI)),
            Call::Health => Ok(typed("text/plain", "ok\n")),
            Call::Ready if (self.parts.ready)() => Ok(typed("text/plain", "ready\n")),
            Call::Ready => Err(Problem::new(StatusCode::SERVICE_UNAVAILABLE, "starting or draining")),
            Call::Metrics => Ok(typed("text/plain; version=0.0.4", (self.parts.metrics)())),
        }
    }

    async fn list<R: Shown>(&self, request: &Request<Incoming>) -> Answer {
        let limit = match query(request, "limit").map(str::parse::<usize>) {
            None => PAGE,
            Some(Ok(limit @ 1..=PAGE_MAX)) => limit,
            Some(_) => return Err(Problem::new(StatusCode::BAD_REQUEST, format!("limit is 1 to {PAGE_MAX}"))),
        };
        let after = query(request, "after").map(unescaped).transpose()?.unwrap_or_default();
        let (records, next) = self.parts.records.list::<R>(&after, limit).await?;
        let items: Vec<Value> = records.iter().map(|r| Value::Object(self.shown(r, true))).collect();
        Ok(json_answer(StatusCode::OK, &json!({ "items": items, "next": next })))
    }

    async fn get<R: Shown>(&self, id: &str) -> Answer {
        let known = id_of::<R>(id)?;
        match self.parts.records.get::<R>(&known).await? {
            Some((record, rev)) => Ok(tagged(StatusCode::OK, &Value::Object(self.shown(&record, false)), rev)),
            None => Err(missing::<R>(id)),
        }
    }

    async fn written<R: Shown>(&self, written: Result<Written<R>, RecordError>) -> Answer {
        let Written { record, rev, created } = written?;
        self.wait_applied(rev).await;
        let status = if created { StatusCode::CREATED } else { StatusCode::OK };
        let mut answer = tagged(status, &Value::Object(self.shown(&record, false)), rev);
        if let Ok(location) = HeaderValue::from_str(&format!("/v1/{}/{}", R::PLURAL, record.id())) {
            answer.headers_mut().insert(LOCATION, location);
        }
        Ok(answer)
    }

    async fn delete<R: Shown>(&self, id: &str, condition: Condition) -> Answer {
        let known = id_of::<R>(id)?;
        match self.parts.records.delete::<R>(&known, condition).await {
            Ok(rev) => self.wait_applied(rev).await,
            Err(RecordError::Missing) => return Err(missing::<R>(id)),
            Err(error) => return Err(error.into()),
        }
        let mut answer = Response::new(empty());
        *answer.status_mut() = StatusCode::NO_CONTENT;
        Ok(answer)
    }

    async fn wait_applied(&self, rev: u64) {
        let mut applied = self.parts.applied.clone();
        if !matches!(timeout(APPLIED, applied.wait_for(|seen| *seen >= rev)).await, Ok(Ok(_))) {
            tracing::error!(rev, "a record was written and does not act yet");
        }
    }

    /// The body of a call, which must be one JSON object.
    async fn fields(&self, request: Request<Incoming>) -> Result<Map<String, Value>, Problem> {
        let max = self.settings.body_max.0;
        let body = Limited::new(request.into_body(), max).collect();
        let body = match timeout(self.settings.deadline, body).await {
            Ok(Ok(body)) => body.to_bytes(),
            Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => {
                let detail = format!("a body has at most {max} bytes (control.body_max)");
                return Err(Problem::new(StatusCode::PAYLOAD_TOO_LARGE, detail));
            }
            Ok(Err(_)) => return Err(Problem::new(StatusCode::BAD_REQUEST, "the body broke off")),
            Err(_) => return Err(Problem::new(StatusCode::REQUEST_TIMEOUT, "the body did not come in time")),
        };
        match serde_json::from_slice(&body) {
            Ok(Value::Object(fields)) => Ok(fields),
            Ok(_) => Err(Problem::new(StatusCode::BAD_REQUEST, "the body is not a JSON object")),
            Err(error) => Err(Problem::new(StatusCode::BAD_REQUEST, format!("the body is not JSON: {error}"))),
        }
    }

    fn shown<R: Shown>(&self, record: &R, in_list: bool) -> Map<String, Value> {
        let mut fields = record.write();
        record.derive(self, in_list, &mut fields);
        fields
    }
}

/// A kind of record as the API shows it.
trait Shown: Record {
    const PLURAL: &'static str;
    const SINGULAR: &'static str;
    /// Adds what is derived and takes out what is not shown here.
    fn derive(&self, _control: &Control, _in_list: bool, _fields: &mut Map<String, Value>) {}
}

impl Shown for Socket {
    const PLURAL: &'static str = "sockets";
    const SINGULAR: &'static str = "socket";
    fn derive(&self, control: &Control, _: bool, fields: &mut Map<String, Value>) {
        let tunnels = control.parts.routes.tunnels_of(&self.id);
        let ids: Vec<&str> = tunnels.iter().map(|t| t.id.as_str()).collect();
        fields.insert("tunnels".to_owned(), json!(ids));
    }
}

impl Shown for Tunnel {
    const PLURAL: &'static str = "tunnels";
    const SINGULAR: &'static str = "tunnel";
}

impl Shown for Certificate {
    const PLURAL: &'static str = "certificates";
    const SINGULAR: &'static str = "certificate";
    fn derive(&self, _: &Control, in_list: bool, fields: &mut Map<String, Value>) {
        if in_list {
            fields.remove("key_pem");
        }
    }
}

fn id_of<R: Shown>(id: &str) -> Result<R::Id, Problem> {
    R::id_of(id).ok_or_else(|| {
        let detail = format!("\"{}\" is not an id: 1 to 128 letters, digits and . _ - : @", id.escape_debug());
        Problem::new(StatusCode::BAD_REQUEST, detail)
    })
}

fn read<R: Shown>(id: &str, fields: Map<String, Value>) -> Result<R, Problem> {
    R::read(&id_of::<R>(id)?, fields).map_err(|mistakes| Problem::of_mistakes(&mistakes))
}

fn missing<R: Shown>(id: &str) -> Problem {
    Problem::new(StatusCode::NOT_FOUND, format!("there is no {} \"{}\"", R::SINGULAR, id.escape_debug()))
}

/// `If-Match` and `If-None-Match` (RFC 9110 §13.1); none: no condition.
fn condition(headers: &HeaderMap) -> Result<Condition, Problem> {
    let value = |name: HeaderName| headers.get(name).map(|v| v.to_str().unwrap_or_default().trim().to_owned());
    match (value(IF_MATCH), value(IF_NONE_MATCH)) {
        (None, None) => Ok(Condition::Any),
        (None, Some(any)) if any == "*" => Ok(Condition::Absent),
        (Some(any), None) if any == "*" => Ok(Condition::Present),
        (Some(tag), None) => {
            let rev = tag.strip_prefix('"').and_then(|t| t.strip_suffix('"')).and_then(|t| t.parse().ok());
            // A tag that we never gave matches nothing.
            Ok(Condition::Rev(rev.unwrap_or(u64::MAX)))
        }
        _ => Err(Problem::new(StatusCode::BAD_REQUEST, "write If-Match: \"REVISION\" or *, or If-None-Match: *")),
    }
}

fn query<'a>(request: &'a Request<Incoming>, name: &str) -> Option<&'a str> {
    let pairs = request.uri().query()?.split('&');
    pairs.filter_map(|pair| pair.split_once('=')).find(|(key, _)| *key == name).map(|(_, value)| value)
}

pub(super) fn empty() -> Body {
    Full::new(Bytes::new()).boxed()
}

fn typed(kind: &'static str, text: impl Into<Bytes>) -> Response<Body> {
    let mut answer = Response::new(Full::new(text.into()).boxed());
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    answer
}

fn json_answer(status: StatusCode, value: &Value) -> Response<Body> {
    let mut answer = typed("application/json", value.to_string());
    *answer.status_mut() = status;
    answer
}

fn tagged(status: StatusCode, value: &Value, rev: u64) -> Response<Body> {
    let mut answer = json_answer(status, value);
    if let Ok(tag) = HeaderValue::from_str(&format!("\"{rev}\"")) {
        answer.headers_mut().insert(ETAG, tag);
    }
    answer
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::SocketType;

    fn document() -> Value {
        serde_json::from_str(OPENAPI).unwrap()
    }

    #[test]
    fn the_document_has_every_call_and_no_other() {
        let mut described = Vec::new();
        for (path, methods) in document()["paths"].as_object().unwrap() {
            for method in methods.as_object().unwrap().keys().filter(|m| *m != "parameters") {
                described.push((method.to_uppercase(), path.clone()));
            }
        }
        let mut real: Vec<_> = CALLS.iter().map(|(m, p, _)| ((*m).to_owned(), (*p).to_owned())).collect();
        described.sort();
        real.sort();
        assert_eq!(described, real);
    }

    #[test]
    fn the_documents_records_have_the_fields_that_records_have() {
        let names = |v: &Value| v.as_object().unwrap().keys().cloned().collect::<std::collections::BTreeSet<_>>();
        let schema = |name: &str| document()["components"]["schemas"][name]["properties"].clone();
        let mut socket = Value::Object(Socket::new("a".parse().unwrap(), SocketType::Http).to_record());
        socket["tunnels"] = json!([]);
        assert_eq!(names(&schema("Socket")), names(&socket));
        assert_eq!(names(&schema("Socket")["upstream"]["properties"]), names(&socket["upstream"]));
        let tunnel = Tunnel::new("t".parse().unwrap(), "a".parse().unwrap()).to_record();
        assert_eq!(names(&schema("Tunnel")), names(&Value::Object(tunnel)));
        let certificate = Certificate {
            id: "c".parse().unwrap(),
            chain_pem: String::new(),
            key_pem: String::new(),
            extra: Map::new(),
        };
        assert_eq!(names(&schema("Certificate")), names(&Value::Object(certificate.to_record())));
    }

    #[test]
    fn a_path_finds_its_call_or_says_what_is_allowed() {
        assert_eq!(find(&Method::GET, "/v1/sockets/a%3Ab").unwrap(), (Call::Get(Kind::Sockets), "a:b".to_owned()));
        assert_eq!(find(&Method::HEAD, "/healthz").unwrap().0, Call::Health);
        let status = |m: Method, p: &str| find(&m, p).unwrap_err().into_answer();
        assert_eq!(status(Method::POST, "/v1/sockets/a").status(), 405);
        assert_eq!(status(Method::POST, "/v1/sockets/a").headers()[ALLOW], "GET, PUT, DELETE");
        assert_eq!(status(Method::GET, "/v1/sockets/a/b").status(), 404);
        assert_eq!(status(Method::GET, "/v1/sockets/%zz").status(), 400);
    }
}
