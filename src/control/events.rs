//! `GET /v1/watch`: the records' changes as server-sent events, from a place in
//! history on. Keys of certificates are never told here.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt, StreamBody};
use hyper::Response;
use hyper::body::Frame;
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::Body;
use crate::feed::{Change, Cursor, Entry, Epoch, Event, Feed, Subscription};

/// A comment is sent after this much silence, so that middle boxes keep the
/// connection and a dead reader is noticed.
const HEARTBEAT: Duration = Duration::from_secs(15);

/// Reads `EPOCH:REVISION`, as the events' ids are.
pub(super) fn cursor(text: &str) -> Option<Cursor> {
    let (epoch, rev) = text.rsplit_once(':')?;
    Some(Cursor { epoch: Epoch(Arc::from(epoch)), rev: rev.parse().ok()? })
}

/// The stream's answer; ends with `stop`.
pub(super) fn answer(feed: &Arc<dyn Feed>, from: Option<Cursor>, stop: &CancellationToken) -> Response<Body> {
    let events = feed.subscribe(&["cfg/sock/", "cfg/tun/", "cert/"], from);
    let frames = stream::unfold((events, stop.clone()), |(mut events, stop)| async move {
        let text = tokio::select! {
            text = next(&mut events) => text?,
            () = stop.cancelled() => return None,
        };
        Some((Ok::<_, Infallible>(Frame::data(Bytes::from(text))), (events, stop)))
    });
    let mut answer = Response::new(BodyExt::boxed(StreamBody::new(SyncStream(Box::pin(frames)))));
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    answer.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    answer
}

async fn next(events: &mut Subscription) -> Option<String> {
    match tokio::time::timeout(HEARTBEAT, events.next()).await {
        Err(_) => Some(": still here\n\n".to_owned()),
        Ok(event) => Some(written(&event?)),
    }
}

fn written(event: &Event) -> String {
    let id = |at: &Cursor| format!("{}:{}", at.epoch.0, at.rev);
    match event {
        Event::Reset { at, state } => {
            let records: Vec<Value> = state.iter().filter_map(put).collect();
            format!("event: reset\nid: {}\ndata: {}\n\n", id(at), json!({ "records": records }))
        }
        Event::Batch { at, changes } => {
            let changes: Vec<Value> = changes.iter().filter_map(change).collect();
            format!("event: change\nid: {}\ndata: {}\n\n", id(at), json!({ "changes": changes }))
        }
        Event::Live { at } => format!("event: live\nid: {}\ndata: {{}}\n\n", id(at)),
        Event::Stale { why } => format!("event: stale\ndata: {}\n\n", json!({ "why": why })),
    }
}

fn change(change: &Change) -> Option<Value> {
    match change {
        Change::Put(entry) => put(entry),
        Change::Delete { key, rev } => {
            let (kind, id) = kind_of(key)?;
            Some(json!({ "op": "delete", "kind": kind, "id": id, "revision": rev }))
        }
    }
}

fn put(entry: &Entry) -> Option<Value> {
    let (kind, id) = kind_of(&entry.key)?;
    let mut record: Value = serde_json::from_str(&entry.value).ok()?;
    if let Some(fields) = record.as_object_mut() {
        fields.remove("key_pem");
    }
    Some(json!({ "op": "put", "kind": kind, "id": id, "revision": entry.rev, "record": record }))
}

fn kind_of(key: &str) -> Option<(&'static str, &str)> {
    let kinds = [("cfg/sock/", "socket"), ("cfg/tun/", "tunnel"), ("cert/", "certificate")];
    kinds.into_iter().find_map(|(prefix, kind)| Some((kind, key.strip_prefix(prefix)?)))
}

/// A boxed body must be `Sync`; a stream that only one task polls always is.
struct SyncStream<S>(std::pin::Pin<Box<S>>);

impl<S: stream::Stream + Sync> stream::Stream for SyncStream<S> {
    type Item = S::Item;
    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<S::Item>> {
        self.0.as_mut().poll_next(cx)
    }
}
