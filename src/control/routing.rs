//! Paths, methods, queries and conditions of requests. Pure.

use std::borrow::Cow;

use hyper::header::{self, HeaderMap};

use super::problem::Problem;
use crate::feed::records::Condition;
use crate::fields::Mistake;

pub(super) const JSON: &str = "application/json";
pub(super) const EVENTS: &str = "text/event-stream";
pub(super) const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What a path leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Endpoint {
    Sockets,
    Socket,
    Tunnels,
    Tunnel,
    Certificates,
    Certificate,
    TicketKeysList,
    TicketKeys,
    Providers,
    Provider,
    Accounts,
    Account,
    Keyrings,
    Keyring,
    Revocations,
    Revocation,
    Watch,
    Status,
    Drain,
    OpenApi,
    Health,
    Ready,
    Metrics,
}

/// One path of the API.
pub(super) struct Route {
    pub(super) path: &'static str,
    /// HEAD goes with GET.
    pub(super) methods: &'static [&'static str],
    pub(super) endpoint: Endpoint,
    pub(super) produces: &'static str,
}

const fn route(
    path: &'static str,
    methods: &'static [&'static str],
    endpoint: Endpoint,
    produces: &'static str,
) -> Route {
    Route { path, methods, endpoint, produces }
}

const RECORD: &[&str] = &["GET", "PUT", "DELETE"];

/// Every path there is; the OpenAPI document has the same.
pub(super) const ROUTES: &[Route] = &[
    route("/v1/sockets", &["GET"], Endpoint::Sockets, JSON),
    route("/v1/sockets/{id}", RECORD, Endpoint::Socket, JSON),
    route("/v1/tunnels", &["GET"], Endpoint::Tunnels, JSON),
    route("/v1/tunnels/{id}", RECORD, Endpoint::Tunnel, JSON),
    route("/v1/certificates", &["GET"], Endpoint::Certificates, JSON),
    route("/v1/certificates/{id}", RECORD, Endpoint::Certificate, JSON),
    route("/v1/ticket-keys", &["GET"], Endpoint::TicketKeysList, JSON),
    route("/v1/ticket-keys/{id}", RECORD, Endpoint::TicketKeys, JSON),
    route("/v1/providers", &["GET"], Endpoint::Providers, JSON),
    route("/v1/providers/{id}", RECORD, Endpoint::Provider, JSON),
    route("/v1/accounts", &["GET"], Endpoint::Accounts, JSON),
    route("/v1/accounts/{id}", RECORD, Endpoint::Account, JSON),
    route("/v1/keyrings", &["GET"], Endpoint::Keyrings, JSON),
    route("/v1/keyrings/{id}", RECORD, Endpoint::Keyring, JSON),
    route("/v1/revocations", &["GET"], Endpoint::Revocations, JSON),
    route("/v1/revocations/{id}", RECORD, Endpoint::Revocation, JSON),
    route("/v1/watch", &["GET"], Endpoint::Watch, EVENTS),
    route("/v1/status", &["GET"], Endpoint::Status, JSON),
    route("/v1/drain", &["POST"], Endpoint::Drain, JSON),
    route("/v1/openapi.json", &["GET"], Endpoint::OpenApi, JSON),
    route("/healthz", &["GET"], Endpoint::Health, JSON),
    route("/readyz", &["GET"], Endpoint::Ready, JSON),
    route("/metrics", &["GET"], Endpoint::Metrics, TEXT),
];

/// The route of a path and the id in it.
pub(super) fn find(path: &str) -> Option<(&'static Route, Option<String>)> {
    ROUTES.iter().find_map(|route| match route.path.strip_suffix("{id}") {
        Some(prefix) => {
            let id = path.strip_prefix(prefix).filter(|id| !id.is_empty() && !id.contains('/'))?;
            Some((route, Some(decoded(id, false).into_owned())))
        }
        None => (route.path == path).then_some((route, None)),
    })
}

/// Percent-decoding; what is not an escape stays as it is. `+` is a space in
/// queries alone.
fn decoded(text: &str, query: bool) -> Cow<'_, str> {
    if !text.contains(['%', '+']) {
        return Cow::Borrowed(text);
    }
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let escaped = match (first, tail) {
            (b'%', [a, b, ..]) => {
                let digit = |c: u8| char::from(c).to_digit(16).and_then(|d| u8::try_from(d).ok());
                digit(*a).zip(digit(*b)).map(|(high, low)| high << 4 | low)
            }
            _ => None,
        };
        match escaped {
            Some(byte) => {
                out.push(byte);
                rest = tail.get(2..).unwrap_or_default();
            }
            None => {
                out.push(if first == b'+' && query { b' ' } else { first });
                rest = tail;
            }
        }
    }
    Cow::Owned(String::from_utf8_lossy(&out).into_owned())
}

/// The query's values, in the order of `names`; a parameter that is not among
/// them is a mistake.
pub(super) fn query<const N: usize>(query: Option<&str>, names: [&str; N]) -> Result<[Option<String>; N], Problem> {
    let mut values = [const { None }; N];
    for pair in query.unwrap_or_default().split('&').filter(|p| !p.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let name = decoded(name, true);
        let slot = names.iter().position(|n| *n == name).and_then(|i| values.get_mut(i));
        let Some(slot) = slot else {
            let fix =
                if N == 0 { "this path takes none".to_owned() } else { format!("known here: {}", names.join(", ")) };
            let problem = "is not a query parameter of this path".to_owned();
            return Err(Problem::invalid(vec![Mistake { at: format!("?{}", name.escape_debug()), problem, fix }]));
        };
        *slot = Some(decoded(value, true).into_owned());
    }
    Ok(values)
}

/// The condition of a write (RFC 9110 §13.1).
pub(super) fn condition(headers: &HeaderMap) -> Result<Condition, Problem> {
    let value =
        |name: header::HeaderName| headers.get(&name).map(|v| v.to_str().map(str::trim).unwrap_or("?").to_owned());
    let wrong = |at: &str, fix: &str| {
        let problem = "is not a condition that is known here".to_owned();
        Problem::invalid(vec![Mistake { at: at.to_owned(), problem, fix: fix.to_owned() }])
    };
    match (value(header::IF_MATCH), value(header::IF_NONE_MATCH)) {
        (None, None) => Ok(Condition::Any),
        (Some(tag), None) if tag == "*" => Ok(Condition::Present),
        (Some(tag), None) => tag
            .strip_prefix('"')
            .and_then(|t| t.strip_suffix('"'))
            .and_then(|t| t.parse().ok())
            .map(Condition::Rev)
            .ok_or_else(|| wrong("If-Match", "send one ETag as it was answered, or *")),
        (None, Some(tag)) if tag == "*" => Ok(Condition::Absent),
        (None, Some(_)) => Err(wrong("If-None-Match", "send * to create only")),
        (Some(_), Some(_)) => Err(wrong("If-Match", "send If-Match or If-None-Match, not both")),
    }
}

/// Whether the client takes what the route produces (RFC 9110 §12.5.1); errors
/// are told as problem documents in any case.
pub(super) fn acceptable(headers: &HeaderMap, produces: &'static str) -> Result<(), Problem> {
    let media = produces.split(';').next().unwrap_or(produces);
    let range = media.split('/').next().map(|kind| format!("{kind}/*")).unwrap_or_default();
    let mut any = false;
    for item in headers.get_all(header::ACCEPT).iter().filter_map(|v| v.to_str().ok()).flat_map(|v| v.split(',')) {
        any = true;
        let mut parts = item.split(';').map(str::trim);
        let wanted = parts.next().unwrap_or_default().to_ascii_lowercase();
        let refused = parts.any(|p| p.strip_prefix("q=").is_some_and(|q| q.trim_matches(['0', '.']).is_empty()));
        if !refused && (wanted == "*/*" || wanted == range || wanted == media) {
            return Ok(());
        }
    }
    if any { Err(Problem::not_acceptable(media)) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_found_with_its_id_decoded() {
        let id = |path: &str| find(path).and_then(|(route, id)| id.map(|id| (route.endpoint, id)));
        assert_eq!(id("/v1/sockets/a%3Ab"), Some((Endpoint::Socket, "a:b".into())));
        assert_eq!(id("/v1/tunnels/a@b"), Some((Endpoint::Tunnel, "a@b".into())));
        assert_eq!(id("/v1/sockets/100%"), Some((Endpoint::Socket, "100%".into())));
        for none in ["/v1/sockets/", "/v1/sockets/a/b", "/v1", "/", "*", "/v1/socketsx", "/V1/sockets"] {
            assert!(find(none).is_none(), "{none}");
        }
    }

    #[test]
    fn conditions_and_accept_are_read_by_the_book() {
        let with = |pairs: &[(header::HeaderName, &str)]| {
            pairs.iter().map(|(n, v)| (n.clone(), v.parse().unwrap())).collect::<HeaderMap>()
        };
        let of = |n, v| condition(&with(&[(n, v)])).ok();
        assert_eq!(of(header::IF_MATCH, "\"17\""), Some(Condition::Rev(17)));
        assert_eq!(of(header::IF_MATCH, "*"), Some(Condition::Present));
        assert_eq!(of(header::IF_NONE_MATCH, "*"), Some(Condition::Absent));
        assert_eq!(of(header::IF_MATCH, "17"), None);
        assert_eq!(of(header::IF_MATCH, "W/\"17\""), None);
        let takes = |accept: &str| acceptable(&with(&[(header::ACCEPT, accept)]), JSON).is_ok();
        assert!(takes("*/*") && takes("text/html, application/*;q=0.5") && takes("Application/JSON"));
        assert!(!takes("text/html") && !takes("application/json;q=0, text/*"));
    }

    #[test]
    fn unknown_query_parameters_are_mistakes() {
        let [limit, after] = query(Some("after=a%2Fb+c&limit=5"), ["limit", "after"]).unwrap();
        assert_eq!((limit.as_deref(), after.as_deref()), (Some("5"), Some("a/b c")));
        assert!(query(Some("limti=5"), ["limit"]).is_err());
    }
}
