//! Problem documents (RFC 9457): what went wrong, and for records every field
//! that is wrong with how to mend it.

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use hyper::{Response, StatusCode};
use serde_json::{Value, json};

use super::Body;
use crate::feed::WriteError;
use crate::feed::records::RecordError;
use crate::fields::Mistake;

/// A call that failed.
#[derive(Debug)]
pub(super) struct Problem {
    status: StatusCode,
    detail: String,
    errors: Vec<Value>,
    header: Option<Box<(HeaderName, HeaderValue)>>,
}

impl Problem {
    pub(super) fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        Self { status, detail: detail.into(), errors: Vec::new(), header: None }
    }

    pub(super) fn header(mut self, name: HeaderName, value: &str) -> Self {
        self.header = HeaderValue::from_str(value).ok().map(|value| Box::new((name, value)));
        self
    }

    /// A record with mistakes: 422, each named by its field.
    pub(super) fn of_mistakes(mistakes: &[Mistake]) -> Self {
        let error = |m: &Mistake| json!({ "field": m.at, "problem": m.problem, "fix": m.fix });
        let fields: Vec<&str> = mistakes.iter().map(|m| m.at.as_str()).collect();
        let mut problem = Self::new(StatusCode::UNPROCESSABLE_ENTITY, format!("wrong: {}", fields.join(", ")));
        problem.errors = mistakes.iter().map(error).collect();
        problem
    }

    pub(super) fn into_answer(self) -> Response<Body> {
        let mut document = json!({
            "type": "about:blank",
            "title": self.status.canonical_reason().unwrap_or("Error"),
            "status": self.status.as_u16(),
            "detail": self.detail,
        });
        if let (Some(document), false) = (document.as_object_mut(), self.errors.is_empty()) {
            document.insert("errors".to_owned(), Value::Array(self.errors));
        }
        let mut answer = Response::new(Full::new(Bytes::from(document.to_string())).boxed());
        *answer.status_mut() = self.status;
        answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if let Some(header) = self.header {
            let (name, value) = *header;
            answer.headers_mut().insert(name, value);
        }
        answer
    }
}

impl From<RecordError> for Problem {
    fn from(error: RecordError) -> Self {
        let detail = error.to_string();
        match error {
            RecordError::Invalid(mistakes) => Self::of_mistakes(&mistakes),
            RecordError::Taken { field, what, holder } => {
                let mut problem = Self::new(StatusCode::CONFLICT, detail);
                let fix = format!("choose another, or take it from {holder} first");
                problem.errors =
                    vec![json!({ "field": field, "problem": format!("{what} is taken by {holder}"), "fix": fix })];
                problem
            }
            RecordError::Precondition(_) => Self::new(StatusCode::PRECONDITION_FAILED, detail),
            RecordError::Missing => Self::new(StatusCode::NOT_FOUND, detail),
            RecordError::NoPort(_) | RecordError::Contended => Self::new(StatusCode::CONFLICT, detail),
            RecordError::Feed(WriteError::Denied(_)) => Self::new(StatusCode::FORBIDDEN, detail),
            RecordError::Feed(_) | RecordError::Read(_) => Self::new(StatusCode::SERVICE_UNAVAILABLE, detail),
        }
    }
}
