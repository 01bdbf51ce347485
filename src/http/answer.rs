//! The only writer of our own pages: what a visitor reads when no origin
//! answers. Why it failed comes from `error`; nothing here tells of any other
//! socket, of this program or of its version.

use bytes::Bytes;
use hyper::header::{
    ACCEPT, ALLOW, CACHE_CONTROL, CONNECTION, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderMap, HeaderName,
    HeaderValue, LOCATION, RETRY_AFTER, X_CONTENT_TYPE_OPTIONS,
};
use hyper::{Method, Response, StatusCode, Version};

use super::body::Body;
use super::forwarded::X_REQUEST_ID;
use super::page::{Said, Template};
use crate::error::{Error, Fault};
use crate::gate::Reply;

/// When to come back after a 503, in seconds: tunnel clients come back in one.
const RETRY_AFTER_SECONDS: HeaderValue = HeaderValue::from_static("5");

/// What an answer of ours depends on, beside the reason.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asker<'a> {
    /// The request's method; HEAD gets no body.
    pub(super) method: &'a Method,
    /// The version that it came in.
    pub(super) version: Version,
    /// Its `Accept`, as far as it has one.
    pub(super) accept: Form,
    /// Whether that names HTML.
    pub(super) html: bool,
    /// Its content type, where it is a gRPC call.
    pub(super) grpc: Option<&'a HeaderValue>,
    /// What our pages look like.
    pub(super) template: &'a Template,
    /// Its id.
    pub(super) id: &'a HeaderValue,
}

/// The page for a failed request.
pub(super) fn failed(asker: &Asker<'_>, error: Error) -> Response<Body> {
    let status = StatusCode::from_u16(error.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = page(asker, status, error.label(), error.fault(), error.text());
    if status == StatusCode::SERVICE_UNAVAILABLE {
        response.headers_mut().insert(RETRY_AFTER, RETRY_AFTER_SECONDS);
    }
    // What follows on a connection whose request was unclear cannot be trusted
    // to start where it seems to.
    if error == Error::BadRequest && asker.version < Version::HTTP_2 {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// The page for a request that a gate refuses, with the gate's own fields. Who does
/// not ask for HTML by name is a program, and gets what programs read.
pub(super) fn refused(asker: &Asker<'_>, error: Error, headers: HeaderMap) -> Response<Body> {
    let asker = Asker { accept: if asker.html { Form::Html } else { asker.accept.for_programs() }, ..*asker };
    let mut response = failed(&asker, error);
    for (name, value) in headers.iter() {
        response.headers_mut().append(name, value.clone());
    }
    response
}

/// An answer of the gate's own.
pub(super) fn gate(asker: &Asker<'_>, reply: Reply) -> Response<Body> {
    let len = reply.body.len();
    let body = if *asker.method == Method::HEAD { Body::empty() } else { Body::page(reply.body) };
    let mut response = Response::new(body);
    *response.status_mut() = reply.status;
    *response.headers_mut() = reply.headers;
    response.headers_mut().insert(hyper::header::CONTENT_LENGTH, HeaderValue::from(len));
    response.headers_mut().insert(X_REQUEST_ID, asker.id.clone());
    response
}

/// The page for CONNECT: this is no forward proxy.
pub(super) fn no_connect(asker: &Asker<'_>) -> Response<Body> {
    let status = StatusCode::METHOD_NOT_ALLOWED;
    let mut response = page(asker, status, "bad_request", Fault::Visitor, "This is not a proxy for other hosts.");
    response
        .headers_mut()
        .insert(ALLOW, HeaderValue::from_static("GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS, TRACE"));
    if asker.version < Version::HTTP_2 {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// Sends a plain HTTP visitor to the same place over HTTPS. 308 keeps method
/// and body (RFC 9110 §15.4.9).
pub(super) fn redirect(asker: &Asker<'_>, host: &str, port: u16, target: &str) -> Response<Body> {
    let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
    let target = if target == "*" { "/" } else { target };
    let to = match port {
        443 => format!("https://{host}{target}"),
        port => format!("https://{host}:{port}{target}"),
    };
    let mut response = page(
        asker,
        StatusCode::PERMANENT_REDIRECT,
        "redirect_https",
        Fault::Visitor,
        "This service is reached over HTTPS.",
    );
    if let Ok(to) = HeaderValue::from_bytes(to.as_bytes()) {
        response.headers_mut().insert(LOCATION, to);
    }
    response
}

fn page(asker: &Asker<'_>, status: StatusCode, label: &str, fault: Fault, text: &str) -> Response<Body> {
    if let Some(kind) = asker.grpc {
        return trailers_only(asker, kind, grpc_status(status), text);
    }
    let id = asker.id.to_str().unwrap_or_default();
    let title = status.canonical_reason().unwrap_or("Error");
    let (kind, content) = match asker.accept {
        Form::Html => {
            let said = Said { status: status.as_u16(), title, text, id };
            ("text/html; charset=utf-8", asker.template.fill(said))
        }
        Form::Json => ("application/json", json(status, title, label, fault, text, id)),
        Form::Text => ("text/plain; charset=utf-8", format!("{} {title}\n{text}\nRequest {id}\n", status.as_u16())),
    };
    let mut response = Response::new(if *asker.method == Method::HEAD {
        Body::empty()
    } else {
        Body::page(Bytes::from(content.clone()))
    });
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(hyper::header::CONTENT_LENGTH, HeaderValue::from(content.len()));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(
        CONTENT_SECURITY_POLICY,
        HeaderValue::from_static(
            "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'",
        ),
    );
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(X_REQUEST_ID, asker.id.clone());
    response
}

/// A failed gRPC call: HTTP's own status tells such a client nothing (gRPC over
/// HTTP/2, "Trailers-Only").
fn trailers_only(asker: &Asker<'_>, kind: &HeaderValue, status: u16, text: &str) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, kind.clone());
    headers.insert(GRPC_STATUS, HeaderValue::from(status));
    if let Ok(message) = HeaderValue::from_str(text) {
        headers.insert(GRPC_MESSAGE, message);
    }
    headers.insert(X_REQUEST_ID, asker.id.clone());
    response
}

/// What a gRPC call that broke off ends with.
pub(super) fn trailers(error: Error) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    trailers.insert(GRPC_STATUS, HeaderValue::from(UNAVAILABLE));
    trailers.insert(GRPC_MESSAGE, HeaderValue::from_static(error.text()));
    trailers
}

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
const UNAVAILABLE: u16 = 14;

/// gRPC's word for a status of HTTP ("HTTP to gRPC Status Code Mapping"); a
/// gateway that waited in vain is a deadline exceeded.
fn grpc_status(status: StatusCode) -> u16 {
    match status.as_u16() {
        400 | 431 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        408 | 504 => 4,
        429 | 502 | 503 => UNAVAILABLE,
        _ => 2,
    }
}

fn json(status: StatusCode, title: &str, label: &str, fault: Fault, text: &str, id: &str) -> String {
    let page = serde_json::json!({
        "status": status.as_u16(),
        "title": title,
        "error": label,
        "fault": fault.as_str(),
        "detail": text,
        "request_id": id,
    });
    format!("{page}\n")
}

/// The form in which a page is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// For browsers, and for whoever does not say.
    Html,
    /// For programs that ask for it before HTML.
    Json,
    /// For terminals that ask for it before HTML.
    Text,
}

impl Form {
    /// The form for who did not ask for HTML by name.
    fn for_programs(self) -> Self {
        if self == Self::Html { Self::Json } else { self }
    }

    /// Whether `Accept` names HTML.
    pub(super) fn names_html(headers: &HeaderMap) -> bool {
        headers.get_all(ACCEPT).iter().any(|line| line.to_str().is_ok_and(|line| line.contains("text/html")))
    }

    /// The form that `Accept` likes best (RFC 9110 §12.5.1), of equals the one it
    /// names; HTML where it is a draw, so that `*/*` and no word at all give HTML.
    pub(super) fn of(headers: &HeaderMap) -> Self {
        let forms = [(Self::Html, "text", "html"), (Self::Json, "application", "json"), (Self::Text, "text", "plain")];
        let mut best = (Self::Html, (0, 0));
        for (form, kind, sub) in forms {
            let liked = liking(headers, kind, sub);
            if liked > best.1 {
                best = (form, liked);
            }
        }
        best.0
    }
}

/// How well `Accept` likes a media type, in thousandths, and by how specific a
/// range: the most specific that matches decides.
fn liking(headers: &HeaderMap, kind: &str, sub: &str) -> (u16, u8) {
    let mut best = (0u8, 0u16);
    for range in headers.get_all(ACCEPT).iter().filter_map(|v| v.to_str().ok()).flat_map(|v| v.split(',')) {
        let mut parts = range.split(';').map(str::trim);
        let Some((k, s)) = parts.next().and_then(|r| r.split_once('/')) else { continue };
        let matches = |a: &str, b: &str| a.eq_ignore_ascii_case(b);
        let specific = match (k, s) {
            ("*", "*") => 1,
            (k, "*") if matches(k, kind) => 2,
            (k, s) if matches(k, kind) && (matches(s, sub) || (sub == "json" && matches(s, "problem+json"))) => 3,
            _ => continue,
        };
        let weight =
            parts.find_map(|p| p.strip_prefix("q=").or_else(|| p.strip_prefix("Q="))).map_or(1000, thousandths);
        if specific > best.0 {
            best = (specific, weight);
        }
    }
    (best.1, if best.1 == 0 { 0 } else { best.0 })
}

fn thousandths(q: &str) -> u16 {
    let q: f32 = q.parse().unwrap_or(0.0);
    // Saturating by definition of `as`; NaN becomes 0.
    (q.clamp(0.0, 1.0) * 1000.0) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    fn form(accept: &str) -> Form {
        let mut headers = HeaderMap::new();
        if !accept.is_empty() {
            headers.insert(ACCEPT, accept.parse().unwrap());
        }
        Form::of(&headers)
    }

    #[test]
    fn browsers_read_html_and_programs_json() {
        assert_eq!(form(""), Form::Html);
        assert_eq!(form("*/*"), Form::Html);
        assert_eq!(form("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"), Form::Html);
        assert_eq!(form("application/json"), Form::Json);
        assert_eq!(form("application/json, text/plain, */*"), Form::Json);
        assert_eq!(form("application/json, */*;q=0.5"), Form::Json);
        assert_eq!(form("application/problem+json, */*;q=0"), Form::Json);
        assert_eq!(form("text/plain"), Form::Text);
        assert_eq!(form("text/*;q=0.3, application/json;q=0.2"), Form::Html);
        assert_eq!(form("application/json;q=x"), Form::Html);
    }

    #[test]
    fn pages_say_what_to_do_and_are_not_kept() {
        let (id, template) = (HeaderValue::from_static("a"), Template::read(None).unwrap());
        let template = &template;
        let asker = Asker {
            method: &Method::GET,
            version: Version::HTTP_11,
            accept: Form::Json,
            html: false,
            grpc: None,
            template,
            id: &id,
        };
        let response = failed(&asker, Error::NoTunnel);
        assert_eq!(response.status(), 503);
        assert_eq!(response.headers()["retry-after"], "5");
        assert_eq!(response.headers()["cache-control"], "no-store");
        let response = redirect(&asker, "::1", 8443, "/a?b");
        assert_eq!(response.headers()["location"], "https://[::1]:8443/a?b");
    }
}
