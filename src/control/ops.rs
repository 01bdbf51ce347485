//! What the node tells of itself: health, readiness, status, metrics, drain.

use hyper::{Response, StatusCode};
use serde_json::{Value, json};

use super::problem::Problem;
use super::{Answer, Body, ControlState, json, routing, text};

/// The process answers.
pub(super) fn health() -> Answer {
    Ok(json(StatusCode::OK, &json!({ "status": "ok" })))
}

/// The node takes visitors: its table is filled, and it is not leaving.
pub(super) fn ready(state: &ControlState) -> Answer {
    if state.following.applied() == 0 && state.following.stale_for().is_some() {
        return Err(Problem::unavailable("not_ready", "The records are not loaded yet."));
    }
    (state.node.ready)().map_err(|why| Problem::unavailable("not_ready", why))?;
    Ok(json(StatusCode::OK, &json!({ "status": "ready" })))
}

pub(super) fn status(state: &ControlState) -> Answer {
    let stale = state.following.stale_for();
    let mut status = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "uptime_s": state.started.elapsed().as_secs(),
        "ready": (state.node.ready)().is_ok(),
        "revision": state.following.applied(),
        "stale_ms": stale.map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX)),
        "refused_records": state.following.refused(),
        "watchers": state.settings.watchers.saturating_sub(state.watchers.available_permits()),
    });
    if let Value::Object(own) = &mut status {
        own.extend((state.node.status)());
    }
    Ok(json(StatusCode::OK, &status))
}

pub(super) fn metrics(state: &ControlState) -> Answer {
    Ok(text(StatusCode::OK, routing::TEXT, (state.node.metrics)().into()))
}

/// Begins the drain; `/readyz` turns at once, the rest follows in its steps.
pub(super) fn drain(state: &ControlState) -> Result<Response<Body>, Problem> {
    (state.node.drain)();
    Ok(json(StatusCode::ACCEPTED, &json!({ "status": "draining" })))
}
