//! `GET /v1/watch`: the records' changes as server-sent events, from a cursor.
//! Pulled by the connection: a client that reads slowly holds nothing but its
//! subscription, and starts over by `reset` if history has moved on.
//!
//! Events: `reset` (forget what you knew; a `put` for each record follows, then
//! `synced`), `change` (all changes of one revision), `live` (up to date),
//! `stale`. `id` is the cursor to resume from; none while a reset is under way.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::unfold;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{self, HeaderValue};
use hyper::{Method, Request, Response};
use serde_json::{Value, json};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Interval, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::problem::Problem;
use super::{Answer, ControlState, routing};
use crate::feed::records::{Record, without};
use crate::feed::{Change, Cursor, Entry, Epoch, Event, Subscription};
use crate::fields::Mistake;
use crate::model::{Account, Certificate, Keyring, Provider, Revocation, Socket, TicketKeys, Tunnel};

/// Records of a reset that are written at once.
const CHUNK: usize = 64;

/// A cursor as clients hold it: `<epoch>:<revision>`.
pub(super) fn cursor_text(at: &Cursor) -> String {
    format!("{}:{}", at.epoch.0, at.rev)
}

fn cursor_from(text: &str) -> Option<Cursor> {
    let (epoch, rev) = text.rsplit_once(':')?;
    Some(Cursor { epoch: Epoch(epoch.into()), rev: rev.parse().ok()? })
}

pub(super) fn watch(state: &Arc<ControlState>, request: &Request<Incoming>, ends: CancellationToken) -> Answer {
    let [from] = routing::query(request.uri().query(), ["from"])?;
    // What a reconnecting client saw last counts more than where it began.
    let last = request.headers().get("last-event-id").map(|v| v.to_str().unwrap_or("?").to_owned());
    let from = match last.filter(|l| !l.is_empty()).map(|l| ("Last-Event-ID", l)).or(from.map(|f| ("?from", f))) {
        None => None,
        Some((at, text)) => Some(cursor_from(&text).ok_or_else(|| {
            let fix = "send the id of an event or the cursor of a list, or leave it out".into();
            Problem::invalid(vec![Mistake { at: at.into(), problem: "is not a cursor".into(), fix }])
        })?),
    };
    let permit = Arc::clone(&state.watchers).try_acquire_owned().map_err(|_| {
        Problem::unavailable("watchers", "There are as many watches as this node allows (control.watchers).")
    })?;
    let mut response = if request.method() == Method::HEAD {
        Response::new(http_body_util::Empty::new().boxed_unsync())
    } else {
        let prefixes = KINDS.map(|(prefix, ..)| prefix);
        let mut heartbeat = tokio::time::interval(state.settings.heartbeat);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        heartbeat.reset();
        let events = state.feed.subscribe(&prefixes, from);
        let watcher = Watcher { events, heartbeat, ends, rest: VecDeque::new(), after: None, _permit: permit };
        let frames = unfold(watcher, |mut w| async move {
            let text = w.next().await?;
            Some((Ok::<_, Infallible>(Frame::data(Bytes::from(text))), w))
        });
        Response::new(StreamBody::new(frames).boxed_unsync())
    };
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(routing::EVENTS));
    Ok(response)
}

struct Watcher {
    events: Subscription,
    heartbeat: Interval,
    ends: CancellationToken,
    /// Records of a reset that are not written yet.
    rest: VecDeque<Entry>,
    /// Where the reset under way ends.
    after: Option<Cursor>,
    _permit: OwnedSemaphorePermit,
}

impl Watcher {
    /// The next text of the stream; `None` ends it.
    async fn next(&mut self) -> Option<String> {
        if self.ends.is_cancelled() {
            return None;
        }
        if let Some(at) = &self.after {
            let chunk = self.rest.len().min(CHUNK);
            let mut text: String = self.rest.drain(..chunk).map(|e| event("put", None, &put(&e))).collect();
            if self.rest.is_empty() {
                text.push_str(&event("synced", Some(at), &json!({ "revision": at.rev })));
                self.after = None;
            }
            return Some(text);
        }
        let next = tokio::select! {
            () = self.ends.cancelled() => return None,
            next = self.events.next() => next?,
            _ = self.heartbeat.tick() => return Some(": alive\n\n".to_owned()),
        };
        self.heartbeat.reset();
        Some(match next {
            Event::Reset { at, state } => {
                let text = event("reset", None, &json!({ "revision": at.rev, "records": state.len() }));
                self.rest = state.into();
                self.after = Some(at);
                text
            }
            Event::Batch { at, changes } => {
                let changes: Vec<Value> = changes.iter().map(told).collect();
                event("change", Some(&at), &json!({ "revision": at.rev, "changes": changes }))
            }
            Event::Live { at } => event("live", Some(&at), &json!({ "revision": at.rev })),
            Event::Stale { why } => event("stale", None, &json!({ "detail": why })),
        })
    }
}

/// One event; JSON text has no line breaks of its own.
fn event(name: &str, id: Option<&Cursor>, data: &Value) -> String {
    let id = id.map(|at| format!("id: {}\n", cursor_text(at))).unwrap_or_default();
    format!("{id}event: {name}\ndata: {data}\n\n")
}

fn told(change: &Change) -> Value {
    match change {
        Change::Put(entry) => put(entry),
        Change::Delete { key, rev } => {
            let (kind, id, _) = described(key);
            json!({ "op": "delete", "type": kind, "id": id, "revision": rev })
        }
    }
}

/// A record as stored, without the derived fields of a GET and without secrets.
fn put(entry: &Entry) -> Value {
    let (kind, id, secret) = described(&entry.key);
    let mut record: Value = serde_json::from_str(&entry.value).unwrap_or_default();
    if let Value::Object(fields) = &mut record {
        without(fields, secret);
    }
    json!({ "op": "put", "type": kind, "id": id, "revision": entry.rev, "record": record })
}

/// Prefix, word and secret fields of a kind.
type Kind = (&'static str, &'static str, &'static [&'static str]);

const fn kind<R: Record>() -> Kind {
    (R::PREFIX, R::NOUN, R::SECRET)
}

/// Each kind that is told.
const KINDS: [Kind; 8] = [
    kind::<Socket>(),
    kind::<Tunnel>(),
    kind::<Certificate>(),
    kind::<TicketKeys>(),
    kind::<Provider>(),
    kind::<Account>(),
    kind::<Keyring>(),
    kind::<Revocation>(),
];

/// The word, the id and the secret fields of the record at a key.
fn described(key: &str) -> (&'static str, &str, &'static [&'static str]) {
    KINDS
        .into_iter()
        .find_map(|(prefix, noun, secret)| key.strip_prefix(prefix).map(|id| (noun, id, secret)))
        .unwrap_or(("other", key, &[]))
}
