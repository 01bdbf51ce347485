//! What HTTP's rules say about a message's head, as pure functions: whom a
//! request is for, whether its framing is clear, which fields end at this hop
//! and which ones this hop adds.

use hyper::header::{
    CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, COOKIE, Entry, HOST, HeaderMap, HeaderName, HeaderValue,
    PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE, TRANSFER_ENCODING, UPGRADE, VIA,
};
use hyper::{Method, StatusCode, Uri, Version};

use super::forwarded::{self, Asked, X_REQUEST_ID};
use crate::error::Error;
use crate::model::{Visitor, authority_host};

/// How long a peer keeps an idle connection (RFC 2068 §19.7.1.1).
pub const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");
/// Whom a request is for.
#[derive(Debug, PartialEq, Eq)]
pub struct Authority {
    /// `host[:port]` as the visitor wrote it.
    pub text: String,
    /// The host alone, checked and lower-cased.
    pub host: String,
}

/// The authority that a request names: the target's own where it has one,
/// else `Host`. `None` where an HTTP/1.0 request names none.
///
/// # Errors
/// `BadRequest` where it is missing, doubled, malformed, or says two things.
pub fn authority(
    version: Version,
    method: &Method,
    uri: &Uri,
    headers: &HeaderMap,
) -> Result<Option<Authority>, Error> {
    let mut hosts = headers.get_all(HOST).iter();
    let host = hosts.next();
    // RFC 9112 §3.2: more than one Host line is refused; HTTP/1.1 needs one even
    // beside an absolute target.
    if hosts.next().is_some() || (host.is_none() && version == Version::HTTP_11) {
        return Err(Error::BadRequest);
    }
    let host = host.map(|h| h.to_str()).transpose().map_err(|_| Error::BadRequest)?;
    let own = uri.authority().map(|a| a.as_str());
    if version < Version::HTTP_2 {
        // `GET example.com HTTP/1.1` parses as a bare authority, which is CONNECT's alone.
        if own.is_some() && uri.scheme().is_none() && *method != Method::CONNECT {
            return Err(Error::BadRequest);
        }
    } else if let (Some(own), Some(host)) = (own, host)
        && !own.eq_ignore_ascii_case(host)
    {
        // RFC 9113 §8.3.1: a Host that differs from :authority is malformed.
        return Err(Error::BadRequest);
    }
    if uri.scheme_str().is_some_and(|s| s != "http" && s != "https") {
        return Err(Error::BadRequest);
    }
    // Host must be well-formed even where an absolute target overrides it (RFC 9112 §3.2.2).
    if let Some(host) = host {
        authority_host(host).map_err(|_| Error::BadRequest)?;
    }
    let Some(text) = own.or(host) else { return Ok(None) };
    let host = authority_host(text).map_err(|_| Error::BadRequest)?.into_owned();
    Ok(Some(Authority { text: text.to_owned(), host }))
}

/// Refuses an HTTP/2 head with more than `max` fields: the library counts them
/// for HTTP/1 alone. Cookies may come one a field there (RFC 9113 §8.2.3) and
/// count as the one that they become.
///
/// # Errors
/// `HeadTooLarge`.
pub fn check_count(version: Version, headers: &HeaderMap, max: usize) -> Result<(), Error> {
    let crumbs = headers.get_all(COOKIE).iter().count();
    let fields = headers.len() - crumbs.saturating_sub(1);
    if version == Version::HTTP_2 && fields > max { Err(Error::HeadTooLarge) } else { Ok(()) }
}

/// Refuses a head whose body length can be read in two ways (RFC 9112 §6.3).
///
/// # Errors
/// `BadRequest`.
pub fn check_framing(version: Version, headers: &HeaderMap) -> Result<(), Error> {
    let coded = headers.contains_key(TRANSFER_ENCODING);
    if coded && (version != Version::HTTP_11 || headers.contains_key(CONTENT_LENGTH)) {
        return Err(Error::BadRequest);
    }
    if coded {
        // `chunked` is the one coding that an edge can undo, and must come once.
        let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
        let only = codings.next().filter(|_| codings.next().is_none());
        if !only.is_some_and(|v| v.as_bytes().eq_ignore_ascii_case(b"chunked")) {
            return Err(Error::BadRequest);
        }
    }
    let mut lengths = headers.get_all(CONTENT_LENGTH).iter();
    let Some(length) = lengths.next() else { return Ok(()) };
    let digits = length.as_bytes();
    let clear = !digits.is_empty() && digits.len() <= 19 && digits.iter().all(u8::is_ascii_digit);
    if !clear || lengths.next().is_some() {
        return Err(Error::BadRequest);
    }
    Ok(())
}

/// The target as the origin gets it: path and query, byte for byte.
///
/// # Errors
/// `BadRequest` where the target is neither a path nor `OPTIONS *`.
pub fn origin_target(method: &Method, uri: &Uri) -> Result<Uri, Error> {
    let target = uri.path_and_query().map_or("/", |p| p.as_str());
    if target.starts_with('/') {
        let mut parts = uri.clone().into_parts();
        (parts.scheme, parts.authority) = (None, None);
        return Uri::from_parts(parts).map_err(|_| Error::BadRequest);
    }
    match target {
        "*" if *method == Method::OPTIONS => Ok(Uri::from_static("*")),
        // An absolute target whose path is empty: `http://host?query`.
        query if query.starts_with('?') => format!("/{query}").parse().map_err(|_| Error::BadRequest),
        _ => Err(Error::BadRequest),
    }
}

/// The `Upgrade` that a request asks for, where it is one that can be passed on.
pub fn wanted_upgrade(version: Version, method: &Method, headers: &HeaderMap) -> Option<HeaderValue> {
    if version != Version::HTTP_11 || *method == Method::CONNECT || !names(headers, CONNECTION, "upgrade") {
        return None;
    }
    let mut lines = headers.get_all(UPGRADE).iter();
    let wanted = lines.next().filter(|_| lines.next().is_none())?;
    // An origin that switched to h2c would read later requests that no route was
    // asked for.
    let text = wanted.to_str().ok()?;
    let h2c = text.split(',').any(|t| {
        let name = t.trim().split('/').next().unwrap_or_default();
        name.eq_ignore_ascii_case("h2c") || name.eq_ignore_ascii_case("http") || name.eq_ignore_ascii_case("tls")
    });
    (!h2c && !text.trim().is_empty()).then(|| wanted.clone())
}

/// The content type of a gRPC call, if a message is one.
pub fn grpc(headers: &HeaderMap) -> Option<&HeaderValue> {
    const GRPC: &[u8] = b"application/grpc";
    let kind = headers.get(CONTENT_TYPE)?;
    let (start, rest) = kind.as_bytes().split_at_checked(GRPC.len())?;
    let ends = rest.first().is_none_or(|b| b"+;-".contains(b));
    (ends && start.eq_ignore_ascii_case(GRPC)).then_some(kind)
}

/// Whether a comma-separated field has this token.
pub fn names(headers: &HeaderMap, field: HeaderName, token: &str) -> bool {
    headers
        .get_all(field)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .any(|v| v.split(',').any(|t| t.trim().eq_ignore_ascii_case(token)))
}

/// Removes what ends at this hop: the fields that RFC 9110 §7.6.1 names and
/// those that `Connection` lists. What this hop adds is added afterwards.
pub fn strip_hop_by_hop(headers: &mut HeaderMap) {
    if headers.contains_key(CONNECTION) {
        let listed: Vec<HeaderName> = headers
            .get_all(CONNECTION)
            .iter()
            .filter_map(|v| v.to_str().ok())
            .flat_map(|v| v.split(','))
            .filter_map(|t| t.trim().parse().ok())
            .collect();
        for name in listed {
            headers.remove(name);
        }
        headers.remove(CONNECTION);
    }
    for name in [
        KEEP_ALIVE,
        PROXY_CONNECTION,
        TE,
        TRANSFER_ENCODING,
        UPGRADE,
        HTTP2_SETTINGS,
        PROXY_AUTHENTICATE,
        PROXY_AUTHORIZATION,
    ] {
        headers.remove(name);
    }
}

/// One `Cookie` line from several (RFC 9113 §8.2.3, before an HTTP/1.1 hop).
pub fn join_cookies(headers: &mut HeaderMap) {
    let mut crumbs = headers.get_all(COOKIE).iter();
    let (Some(first), Some(second)) = (crumbs.next(), crumbs.next()) else { return };
    let mut joined = first.as_bytes().to_vec();
    for crumb in std::iter::once(second).chain(crumbs) {
        joined.extend_from_slice(b"; ");
        joined.extend_from_slice(crumb.as_bytes());
    }
    if let Ok(joined) = HeaderValue::from_bytes(&joined) {
        headers.insert(COOKIE, joined);
    }
}

/// Adds this hop to `Via` (RFC 9110 §7.6.3) under a name that tells nothing else.
pub fn append_via(headers: &mut HeaderMap, received: Version) {
    headers.append(
        VIA,
        HeaderValue::from_static(match received {
            Version::HTTP_2 => "2 adit",
            Version::HTTP_10 => "1.0 adit",
            _ => "1.1 adit",
        }),
    );
}

/// Makes the head of a forwarded request out of a visitor's. `host` is what the
/// origin gets as `Host`; `chunked` says that the body's length is unknown.
pub fn rewrite_request(headers: &mut HeaderMap, rewrite: &Rewrite<'_>) {
    // All that is told to the origin, here and by a gate: the map grows once.
    headers.reserve(16);
    let trailers = names(headers, TE, "trailers");
    let upgrade = rewrite.upgrade.clone();
    strip_hop_by_hop(headers);
    join_cookies(headers);
    rewrite.asked.tell(headers, rewrite.peer, rewrite.authority);
    append_via(headers, rewrite.version);
    headers.insert(X_REQUEST_ID, rewrite.id.clone());
    forwarded::trace(headers);
    set(headers, HOST, rewrite.host);
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    match (upgrade, trailers) {
        (Some(upgrade), _) => {
            headers.insert(UPGRADE, upgrade);
            headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        }
        (None, _) => {
            let connection = match (rewrite.keep, trailers) {
                (true, true) => Some("te"),
                (true, false) => None,
                // Made for this request alone, and the origin may know it.
                (false, true) => Some("close, te"),
                (false, false) => Some("close"),
            };
            if let Some(connection) = connection {
                headers.insert(CONNECTION, HeaderValue::from_static(connection));
            }
        }
    }
    if rewrite.chunked {
        headers.remove(CONTENT_LENGTH);
        headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
}

/// What `rewrite_request` needs to know of the request and its way.
#[derive(Debug)]
pub struct Rewrite<'a> {
    /// Who is connected.
    pub peer: &'a Visitor,
    /// Who asks.
    pub asked: &'a Asked,
    /// The protocol version that the request came in.
    pub version: Version,
    /// The authority as the visitor wrote it.
    pub authority: &'a str,
    /// `Host` towards the origin.
    pub host: &'a str,
    /// The request's id.
    pub id: &'a HeaderValue,
    /// The upgrade to pass on.
    pub upgrade: Option<HeaderValue>,
    /// Whether the body's length is unknown.
    pub chunked: bool,
    /// Whether the connection to the origin may serve another request.
    pub keep: bool,
}

/// Makes the head of the answer to the visitor out of the origin's.
pub fn rewrite_response(headers: &mut HeaderMap, received: Version) {
    // RFC 9112 §6.3: where both came, the coding was what framed the body, and the
    // length must not frame what goes on.
    if headers.contains_key(TRANSFER_ENCODING) {
        headers.remove(CONTENT_LENGTH);
    }
    if let Entry::Occupied(mut lengths) = headers.entry(CONTENT_LENGTH) {
        // Several equal ones (unequal ones never get here) become one.
        let one = lengths.get().clone();
        lengths.insert(one);
    }
    strip_hop_by_hop(headers);
    append_via(headers, received);
}

/// An interim answer (RFC 9110 §15.2) in HTTP/1.1's form.
pub fn interim(status: StatusCode, headers: &HeaderMap) -> Vec<u8> {
    let mut headers = headers.clone();
    strip_hop_by_hop(&mut headers);
    headers.remove(CONTENT_LENGTH);
    let reason = status.canonical_reason().unwrap_or("Interim");
    let mut head = format!("HTTP/1.1 {} {reason}\r\n", status.as_str()).into_bytes();
    for (name, value) in &headers {
        for part in [name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"] {
            head.extend_from_slice(part);
        }
    }
    head.extend_from_slice(b"\r\n");
    head
}

fn set(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    match HeaderValue::from_str(value) {
        Ok(value) => headers.insert(name, value),
        Err(_) => headers.remove(name),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(lines: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(*name, value.parse().unwrap());
        }
        headers
    }

    fn host_of(version: Version, uri: &str, lines: &[(&'static str, &str)]) -> Result<Option<String>, Error> {
        let uri: Uri = uri.parse().unwrap();
        authority(version, &Method::GET, &uri, &map(lines)).map(|a| a.map(|a| a.host))
    }

    #[test]
    fn a_request_names_one_host_or_is_refused() {
        use Version as V;
        let ok = |v, uri, lines: &[_]| host_of(v, uri, lines).unwrap();
        assert_eq!(ok(V::HTTP_11, "/", &[("host", "A.test:8443")]).as_deref(), Some("a.test"));
        assert_eq!(ok(V::HTTP_11, "http://b.test/x", &[("host", "a.test")]).as_deref(), Some("b.test"));
        assert_eq!(ok(V::HTTP_2, "https://b.test/x", &[("host", "B.test")]).as_deref(), Some("b.test"));
        assert_eq!(ok(V::HTTP_2, "/", &[("host", "b.test")]).as_deref(), Some("b.test"));
        assert_eq!(ok(V::HTTP_10, "/", &[]), None);
        for (version, uri, lines) in [
            (V::HTTP_11, "/", &[][..]),
            (V::HTTP_11, "http://a.test/", &[]),
            (V::HTTP_11, "/", &[("host", "a.test"), ("host", "a.test")]),
            (V::HTTP_11, "/", &[("host", "")]),
            (V::HTTP_11, "/", &[("host", "a.test@b.test")]),
            (V::HTTP_11, "http://a.test/", &[("host", "a b")]),
            (V::HTTP_11, "a.test", &[("host", "a.test")]),
            (V::HTTP_11, "ftp://a.test/", &[("host", "a.test")]),
            (V::HTTP_11, "http://u:p@a.test/", &[("host", "a.test")]),
            (V::HTTP_2, "https://a.test/", &[("host", "b.test")]),
        ] {
            assert_eq!(host_of(version, uri, lines), Err(Error::BadRequest), "{version:?} {uri} {lines:?}");
        }
    }

    #[test]
    fn fields_are_counted_with_all_cookies_as_one() {
        let fits = |version, lines: &[_]| check_count(version, &map(lines), 2).is_ok();
        assert!(fits(Version::HTTP_2, &[("a", "1"), ("a", "2")]));
        assert!(!fits(Version::HTTP_2, &[("a", "1"), ("a", "2"), ("b", "3")]));
        assert!(fits(Version::HTTP_2, &[("cookie", "1"), ("cookie", "2"), ("cookie", "3"), ("a", "4")]));
        assert!(fits(Version::HTTP_11, &[("a", "1"), ("b", "2"), ("c", "3")]), "counted before");
    }

    #[test]
    fn unclear_framing_is_refused() {
        let ok = |v, lines: &[_]| check_framing(v, &map(lines)).is_ok();
        assert!(ok(Version::HTTP_11, &[]));
        assert!(ok(Version::HTTP_11, &[("content-length", "12")]));
        assert!(ok(Version::HTTP_11, &[("transfer-encoding", "Chunked")]));
        for lines in [
            &[("content-length", "1"), ("content-length", "1")][..],
            &[("content-length", "1, 1")],
            &[("content-length", "+1")],
            &[("content-length", "")],
            &[("content-length", "99999999999999999999")],
            &[("transfer-encoding", "chunked"), ("content-length", "1")],
            &[("transfer-encoding", "chunked"), ("transfer-encoding", "chunked")],
            &[("transfer-encoding", "gzip, chunked")],
            &[("transfer-encoding", "identity")],
        ] {
            assert!(!ok(Version::HTTP_11, lines), "{lines:?}");
        }
        assert!(!ok(Version::HTTP_10, &[("transfer-encoding", "chunked")]));
        assert!(!ok(Version::HTTP_2, &[("transfer-encoding", "chunked")]));
    }

    #[test]
    fn the_target_goes_on_byte_for_byte() {
        let target = |m: Method, uri: &str| origin_target(&m, &uri.parse().unwrap()).map(|u| u.to_string());
        for path in ["/", "/a//b/../c", "/%2e%2E/%zz?q=%20&x=/?", "/ä?ö", "/?"] {
            assert_eq!(target(Method::GET, path).unwrap(), path);
            assert_eq!(target(Method::GET, &format!("http://a.test:80{path}")).unwrap(), path);
        }
        assert_eq!(target(Method::GET, "http://a.test").unwrap(), "/");
        assert_eq!(target(Method::GET, "http://a.test?q").unwrap(), "/?q");
        assert_eq!(target(Method::OPTIONS, "*").unwrap(), "*");
        assert!(target(Method::GET, "*").is_err());
    }

    #[test]
    fn what_ends_at_this_hop_is_removed_and_nothing_we_add() {
        let mut headers = map(&[
            ("connection", "close, X-Mine, X-Forwarded-For, host"),
            ("connection", "keep-alive, x-more"),
            ("keep-alive", "timeout=5"),
            ("x-mine", "1"),
            ("x-more", "1"),
            ("x-kept", "1"),
            ("te", "trailers, deflate"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "foo"),
            ("proxy-connection", "keep-alive"),
            ("x-forwarded-for", "6.6.6.6"),
            ("x_forwarded_for", "6.6.6.6"),
            ("x-forwarded-proto", "https"),
            ("forwarded", "for=6.6.6.6"),
            ("forwarded", "for=7.7.7.7"),
            ("x-request-id", "bad id"),
            ("via", "1.1 other"),
            ("host", "a.test:8080"),
        ]);
        let visitor = Visitor::new("[2001:db8::1]:5".parse().unwrap(), "10.0.0.1:8080".parse().unwrap());
        let id = forwarded::request_id(&headers);
        let asked = Asked::of(&headers, &visitor, false, &[]);
        rewrite_request(
            &mut headers,
            &Rewrite {
                peer: &visitor,
                asked: &asked,
                version: Version::HTTP_11,
                authority: "a.test:8080",
                host: "inner.test",
                id: &id,
                upgrade: None,
                chunked: false,
                keep: false,
            },
        );
        let mut left: Vec<String> = headers
            .iter()
            .map(|(n, v)| format!("{n}: {}", v.to_str().unwrap()))
            .filter(|l| !l.starts_with("x-request-id") && !l.starts_with("traceparent"))
            .collect();
        left.sort();
        assert_eq!(
            left,
            [
                "connection: close, te",
                "forwarded: for=\"[2001:db8::1]\";host=\"a.test:8080\";proto=http",
                "host: inner.test",
                "te: trailers",
                "via: 1.1 adit",
                "via: 1.1 other",
                "x-forwarded-for: 2001:db8::1",
                "x-forwarded-host: a.test:8080",
                "x-forwarded-port: 8080",
                "x-forwarded-proto: http",
                "x-kept: 1",
            ]
        );
        assert_eq!(id.len(), 32);
    }

    #[test]
    fn crumbs_become_one_cookie() {
        let mut headers = map(&[("cookie", "a=1"), ("cookie", "b=2"), ("cookie", "c=3")]);
        join_cookies(&mut headers);
        assert_eq!(headers.get_all("cookie").iter().collect::<Vec<_>>(), ["a=1; b=2; c=3"]);
    }

    #[test]
    fn only_upgrades_that_cannot_hide_requests_pass() {
        let wants = |lines: &[_]| wanted_upgrade(Version::HTTP_11, &Method::GET, &map(lines)).is_some();
        assert!(wants(&[("connection", "keep-alive, Upgrade"), ("upgrade", "websocket")]));
        assert!(!wants(&[("upgrade", "websocket")]));
        assert!(!wants(&[("connection", "upgrade"), ("upgrade", "h2c")]));
        assert!(!wants(&[("connection", "upgrade"), ("upgrade", "websocket, HTTP/2.0")]));
    }

    #[test]
    fn an_answer_is_framed_by_one_rule() {
        let mut headers =
            map(&[("transfer-encoding", "chunked"), ("content-length", "5"), ("connection", "x-a"), ("x-a", "1")]);
        rewrite_response(&mut headers, Version::HTTP_11);
        assert_eq!(headers, map(&[("via", "1.1 adit")]));
        let mut headers = map(&[("content-length", "5"), ("content-length", "5")]);
        rewrite_response(&mut headers, Version::HTTP_10);
        assert_eq!(headers, map(&[("content-length", "5"), ("via", "1.0 adit")]));
    }
}
