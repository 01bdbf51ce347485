//! Records of every kind: PUT, GET, DELETE and lists. A PUT takes back what a GET
//! answered; lists leave out secrets; passwords and tokens are hashed on their way in.

use std::future::Future;

use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use serde_json::{Map, Value, json};

use super::problem::Problem;
use super::{Answer, Body, ControlState, json, mysocket, routing, secrets};
use crate::feed::records::{Condition, Record, RecordError, Records, Written, without};
use crate::fields::Mistake;
use crate::model::{Account, Certificate, Keyring, Provider, Revocation, Socket, TicketKeys, Tunnel};

/// Records of a page where none is asked for, and at most.
const PAGE: usize = 100;
const PAGE_MAX: usize = 1000;

/// A record that the API shows and takes.
pub(super) trait Resource: Record {
    /// The collection's path.
    const PATH: &'static str;
    /// Whether DELETE takes `cascade`.
    const CASCADES: bool = false;

    /// The record as answered to one who asks for it.
    fn shown(&self, records: &Records) -> impl Future<Output = Result<Map<String, Value>, RecordError>> + Send {
        let _ = records;
        let record = self.to_record();
        async move { Ok(record) }
    }
    /// The record as answered in lists.
    fn listed(&self, records: &Records) -> impl Future<Output = Result<Map<String, Value>, RecordError>> + Send {
        let shown = self.shown(records);
        async move {
            let mut record = shown.await?;
            without(&mut record, Self::SECRET);
            Ok(record)
        }
    }
    fn put(
        self,
        records: &Records,
        condition: Condition,
    ) -> impl Future<Output = Result<Written<Self>, RecordError>> + Send;
    fn delete(
        id: &Self::Id,
        records: &Records,
        condition: Condition,
        cascade: bool,
    ) -> impl Future<Output = Result<u64, RecordError>> + Send;
}

impl Resource for Socket {
    const PATH: &'static str = "/v1/sockets";
    const CASCADES: bool = true;

    async fn shown(&self, records: &Records) -> Result<Map<String, Value>, RecordError> {
        let mut record = self.to_record();
        let tunnels = records.tunnels_of(&self.id).await?;
        record.insert("tunnels".into(), tunnels.iter().map(|t| t.as_str()).collect());
        Ok(record)
    }

    async fn put(mut self, records: &Records, condition: Condition) -> Result<Written<Self>, RecordError> {
        self.created_by.get_or_insert_with(|| "api".to_owned());
        records.put_socket(self, condition).await
    }

    async fn delete(id: &Self::Id, records: &Records, condition: Condition, cascade: bool) -> Result<u64, RecordError> {
        records.delete_socket(id, condition, cascade).await
    }
}

impl Resource for Tunnel {
    const PATH: &'static str = "/v1/tunnels";

    async fn put(self, records: &Records, condition: Condition) -> Result<Written<Self>, RecordError> {
        records.put_tunnel(self, condition).await
    }

    async fn delete(id: &Self::Id, records: &Records, condition: Condition, _: bool) -> Result<u64, RecordError> {
        records.delete_tunnel(id, condition).await
    }
}

impl Resource for Certificate {
    const PATH: &'static str = "/v1/certificates";

    async fn put(self, records: &Records, condition: Condition) -> Result<Written<Self>, RecordError> {
        records.put_certificate(self, condition).await
    }

    async fn delete(id: &Self::Id, records: &Records, condition: Condition, _: bool) -> Result<u64, RecordError> {
        records.delete_unclaimed::<Self>(id, condition).await
    }
}

impl Resource for Account {
    const PATH: &'static str = "/v1/accounts";

    async fn put(self, records: &Records, condition: Condition) -> Result<Written<Self>, RecordError> {
        let written = records.put_account(self, condition).await?;
        mysocket::rekey(records, &written.record.id, Some(&written.record)).await?;
        Ok(written)
    }

    async fn delete(id: &Self::Id, records: &Records, condition: Condition, _: bool) -> Result<u64, RecordError> {
        let rev = records.delete_account(id, condition).await?;
        mysocket::rekey(records, id, None).await?;
        Ok(rev)
    }
}

macro_rules! unclaimed {
    ($($t:ty => $path:literal),*) => {$(
        impl Resource for $t {
            const PATH: &'static str = $path;

            async fn put(self, records: &Records, condition: Condition) -> Result<Written<Self>, RecordError> {
                records.put_unclaimed(self, condition).await
            }

            async fn delete(
                id: &Self::Id,
                records: &Records,
                condition: Condition,
                _: bool,
            ) -> Result<u64, RecordError> {
                records.delete_unclaimed::<Self>(id, condition).await
            }
        }
    )*};
}
unclaimed!(
    TicketKeys => "/v1/ticket-keys",
    Provider => "/v1/providers",
    Keyring => "/v1/keyrings",
    Revocation => "/v1/revocations"
);

/// GET of a collection.
pub(super) async fn list<R: Resource>(state: &ControlState, request: &Request<Incoming>) -> Answer {
    let [limit, after] = routing::query(request.uri().query(), ["limit", "after"])?;
    let limit = match limit {
        None => PAGE,
        Some(text) => text.parse().ok().filter(|n| (1..=PAGE_MAX).contains(n)).ok_or_else(|| {
            let fix = format!("write a whole number from 1 to {PAGE_MAX}");
            Problem::invalid(vec![Mistake { at: "?limit".into(), problem: "is out of range".into(), fix }])
        })?,
    };
    let page = state.records.list::<R>(after.as_deref().unwrap_or_default(), limit).await?;
    let mut items = Vec::with_capacity(page.items.len());
    for stored in &page.items {
        items.push(Value::Object(stored.record.listed(&state.records).await?));
    }
    let body = json!({
        "items": items,
        "next": page.next,
        "unreadable": page.unreadable,
        "cursor": super::watch::cursor_text(&page.at),
    });
    Ok(json(StatusCode::OK, &body))
}

/// GET, PUT and DELETE of one record.
pub(super) async fn one<R: Resource>(
    state: &ControlState,
    id: &str,
    method: Method,
    request: Request<Incoming>,
) -> Answer {
    let id: R::Id = id.parse().map_err(|why: &str| {
        let mistake = Mistake { at: "id".into(), problem: why.into(), fix: "choose another id in the path".into() };
        Problem::invalid(vec![mistake])
    })?;
    match method {
        Method::PUT => put::<R>(state, &id, request).await,
        Method::DELETE => delete::<R>(state, &id, &request).await,
        _ => {
            let [] = routing::query(request.uri().query(), [])?;
            let stored = state.records.get::<R>(&id).await?;
            let shown = stored.record.shown(&state.records).await?;
            Ok(tagged(json(StatusCode::OK, &Value::Object(shown)), stored.rev))
        }
    }
}

async fn put<R: Resource>(state: &ControlState, id: &R::Id, request: Request<Incoming>) -> Answer {
    let [] = routing::query(request.uri().query(), [])?;
    let condition = routing::condition(request.headers())?;
    let mut body = record_body(state, request).await?;
    secrets::hash(&state.records, R::key(id), &mut body).await?;
    let record = R::from_record(id, body).map_err(Problem::invalid)?;
    let written = record.put(&state.records, condition).await?;
    let shown = written.record.shown(&state.records).await?;
    let status = if written.created { StatusCode::CREATED } else { StatusCode::OK };
    let mut response = tagged(json(status, &Value::Object(shown)), written.rev);
    if written.created
        && let Ok(location) = format!("{}/{id}", R::PATH).parse()
    {
        response.headers_mut().insert(header::LOCATION, location);
    }
    Ok(applied(state, response, written.rev).await)
}

async fn delete<R: Resource>(state: &ControlState, id: &R::Id, request: &Request<Incoming>) -> Answer {
    let cascade = if R::CASCADES {
        let [cascade] = routing::query(request.uri().query(), ["cascade"])?;
        match cascade.as_deref() {
            None | Some("false") => false,
            Some("true") => true,
            Some(_) => {
                let (problem, fix) = ("is neither true nor false".into(), "write true or false".into());
                return Err(Problem::invalid(vec![Mistake { at: "?cascade".into(), problem, fix }]));
            }
        }
    } else {
        let [] = routing::query(request.uri().query(), [])?;
        false
    };
    let condition = routing::condition(request.headers())?;
    let rev = R::delete(id, &state.records, condition, cascade).await?;
    let mut response = Response::new(http_body_util::Empty::new().boxed_unsync());
    *response.status_mut() = StatusCode::NO_CONTENT;
    Ok(applied(state, response, rev).await)
}

/// Waits until this node acts on the write, so that who wrote it may rely on it.
async fn applied(state: &ControlState, mut response: Response<Body>, rev: u64) -> Response<Body> {
    let mut acting = state.acting.clone();
    let acts = tokio::time::timeout(state.settings.apply_deadline, acting.wait_for(|at| *at >= rev));
    let done = matches!(acts.await, Ok(Ok(_)));
    if !done {
        tracing::warn!(rev, "a write is stored and not yet applied");
    }
    let told = HeaderValue::from_static(if done { "true" } else { "false" });
    response.headers_mut().insert("adit-applied", told);
    response
}

fn tagged(mut response: Response<Body>, rev: u64) -> Response<Body> {
    if let Ok(tag) = format!("\"{rev}\"").parse() {
        response.headers_mut().insert(header::ETAG, tag);
    }
    response
}

async fn record_body(state: &ControlState, request: Request<Incoming>) -> Result<Map<String, Value>, Problem> {
    is_json(request.headers())?;
    let limit = state.settings.body_limit.0;
    let too_large = || {
        let detail = format!("The body may have {limit} bytes (control.body_limit).");
        Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", "The body is too large", detail)
    };
    let declared = request.headers().get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if declared.is_some_and(|n| n > u64::try_from(limit).unwrap_or(u64::MAX)) {
        return Err(too_large());
    }
    let collected =
        tokio::time::timeout(state.settings.body_deadline, Limited::new(request.into_body(), limit).collect());
    let body: Bytes = match collected.await {
        Err(_) => {
            let detail = "The body did not arrive in time (control.body_deadline).";
            return Err(Problem::new(StatusCode::REQUEST_TIMEOUT, "timeout", "Too slow", detail));
        }
        Ok(Err(error)) if error.is::<LengthLimitError>() => return Err(too_large()),
        Ok(Err(error)) => return Err(not_a_record(format!("could not be read: {error}"))),
        Ok(Ok(body)) => body.to_bytes(),
    };
    match serde_json::from_slice(&body) {
        Ok(Value::Object(record)) => Ok(record),
        Ok(_) => Err(not_a_record("is JSON, and not an object".into())),
        Err(error) => Err(not_a_record(format!("is not JSON: {error}"))),
    }
}

fn not_a_record(problem: String) -> Problem {
    let fix = "send one record as a JSON object".to_owned();
    Problem::invalid(vec![Mistake { at: String::new(), problem: format!("the body {problem}"), fix }])
}

/// Only JSON: a web form cannot write here.
fn is_json(headers: &HeaderMap) -> Result<(), Problem> {
    let media = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let media = media.split(';').next().unwrap_or_default().trim();
    if media.eq_ignore_ascii_case(routing::JSON) {
        return Ok(());
    }
    let detail = "Send `Content-Type: application/json`.";
    Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", "Not JSON", detail))
}
