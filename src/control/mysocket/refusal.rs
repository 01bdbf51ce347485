//! Why a call is refused, in words that clients print. The only writer of the adapter's
//! errors.

use std::time::Duration;

use hyper::StatusCode;
use hyper::header::{ALLOW, HeaderValue, WWW_AUTHENTICATE};
use serde_json::{Value, json};

use crate::feed::WriteError;
use crate::feed::records::RecordError;
use crate::fields::Mistake;
use crate::gate::Reply;

/// Why a call is refused, as clients print it.
#[derive(Debug)]
pub(super) struct Refusal {
    status: StatusCode,
    message: String,
    errors: Vec<Mistake>,
    wait: Option<Duration>,
    allow: Option<&'static [&'static str]>,
}

impl Refusal {
    fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), errors: Vec::new(), wait: None, allow: None }
    }

    pub(super) fn unauthorized(message: &str) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, message)
    }

    pub(super) fn forbidden(message: &str) -> Self {
        Self::new(StatusCode::FORBIDDEN, message)
    }

    pub(super) fn not_found(what: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, format!("There is no such {what}."))
    }

    pub(super) fn conflict(message: &str) -> Self {
        Self::new(StatusCode::CONFLICT, message)
    }

    pub(super) fn invalid(field: &str, problem: &str, fix: &str) -> Self {
        Self::mistakes(vec![Mistake { at: field.to_owned(), problem: problem.to_owned(), fix: fix.to_owned() }])
    }

    pub(super) fn mistakes(errors: Vec<Mistake>) -> Self {
        let message = errors.iter().map(Mistake::to_string).collect::<Vec<_>>().join(". ");
        Self { errors, ..Self::new(StatusCode::UNPROCESSABLE_ENTITY, message) }
    }

    pub(super) fn method(allow: &'static [&'static str]) -> Self {
        let message = format!("This path takes {}.", allow.join(", "));
        Self { allow: Some(allow), ..Self::new(StatusCode::METHOD_NOT_ALLOWED, message) }
    }

    pub(super) fn busy(message: &str, wait: Duration) -> Self {
        Self { wait: Some(wait), ..Self::new(StatusCode::TOO_MANY_REQUESTS, message) }
    }

    pub(super) fn down(message: &str) -> Self {
        Self { wait: Some(Duration::from_secs(1)), ..Self::new(StatusCode::SERVICE_UNAVAILABLE, message) }
    }

    pub(super) fn no_random() -> Self {
        Self::down("The node has no random bytes.")
    }

    pub(super) fn no_keyring() -> Self {
        Self::down("The node has no keyring yet (gate.make_keyring, or the control plane's).")
    }

    pub(super) fn into_reply(self) -> Reply {
        // Clients print it as it is: a sentence, and little else.
        let mut told = json!({ "message": self.message });
        if let (Value::Object(told), false) = (&mut told, self.errors.is_empty()) {
            told.insert("wrong".into(), self.errors.iter().map(|one| one.at.as_str()).collect());
        }
        let mut reply = Reply::json(self.status, &told);
        if self.status == StatusCode::UNAUTHORIZED {
            reply = reply.with(WWW_AUTHENTICATE, HeaderValue::from_static("x-access-token"));
        }
        if let Some(allow) = self.allow.and_then(|allow| HeaderValue::from_str(&allow.join(", ")).ok()) {
            reply = reply.with(ALLOW, allow);
        }
        match self.wait {
            Some(wait) => reply.retry_after(wait.as_secs().saturating_add(1)),
            None => reply,
        }
    }
}

impl From<RecordError> for Refusal {
    fn from(error: RecordError) -> Self {
        match error {
            RecordError::Mistakes(mistakes) => Self::mistakes(mistakes),
            RecordError::Taken(_) | RecordError::Precondition { .. } | RecordError::InUse(_) => {
                Self::conflict("Somebody else was quicker. Look again.")
            }
            RecordError::NotFound => Self::not_found("record"),
            RecordError::Write(WriteError::Denied(why)) => {
                tracing::error!(why, "the mysocket API is on at a node that may not write records");
                Self::down("This node does not write records.")
            }
            RecordError::Unreadable(_) => {
                tracing::error!(%error, "a stored record cannot be read");
                Self::down("What is stored cannot be read by this node.")
            }
            RecordError::Contended | RecordError::Write(_) | RecordError::Read(_) => {
                tracing::warn!(%error, "a call of mysocketctl failed");
                Self::down("The records cannot be written or read now. Try again.")
            }
        }
    }
}
