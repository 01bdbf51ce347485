//! What the origin is told of who asked: `X-Forwarded-*` and `Forwarded`
//! (RFC 7239), the request's id, and its trace (W3C Trace Context).

use std::cell::RefCell;
use std::net::{IpAddr, SocketAddr};

use data_encoding::HEXLOWER;
use hyper::header::{FORWARDED, HOST, HeaderMap, HeaderName, HeaderValue, VIA};

use crate::fields::Network;
use crate::model::{Visitor, authority_host};

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const X_FORWARDED_PORT: HeaderName = HeaderName::from_static("x-forwarded-port");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
/// The name under which a request is known on both sides.
pub const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The longest request id that is kept, in characters.
const REQUEST_ID_MAX: usize = 128;

/// The most hops that are believed.
const HOPS_MAX: usize = 16;

/// Who asked, as far as it may be believed: the peer itself, or whom a trusted
/// peer asks for.
#[derive(Debug, PartialEq, Eq)]
pub struct Asked {
    /// The visitor, then the trusted peers that passed the request on, the one
    /// that is connected to us last.
    hops: Vec<IpAddr>,
    /// Whether the visitor came by HTTPS.
    pub secure: bool,
    /// The authority that a trusted peer was asked for.
    host: Option<HeaderValue>,
    /// The port that a trusted peer was reached at.
    port: Option<HeaderValue>,
}

impl Asked {
    /// Reads it off a request. Nobody is believed who is not of a trusted
    /// network; of the hops that are told, none before the first that is not.
    pub fn of(headers: &HeaderMap, peer: &Visitor, secure: bool, trusted: &[Network]) -> Self {
        let is_trusted = |ip: IpAddr| trusted.iter().any(|network| network.contains(ip));
        let mut asked = Self { hops: vec![peer.ip()], secure, host: None, port: None };
        if !is_trusted(peer.ip()) {
            return asked;
        }
        let lines = headers.get_all(X_FORWARDED_FOR).iter().rev().filter_map(|line| line.to_str().ok());
        let told = lines.flat_map(|line| line.rsplit(',')).map_while(|hop| address(hop.trim()));
        for hop in told.take(HOPS_MAX) {
            asked.hops.push(hop);
            if !is_trusted(hop) {
                break;
            }
        }
        asked.hops.reverse();
        let one = |name: HeaderName| {
            let mut lines = headers.get_all(name).iter();
            lines.next().filter(|_| lines.next().is_none())
        };
        match one(X_FORWARDED_PROTO).map(HeaderValue::as_bytes) {
            Some(b"https") => asked.secure = true,
            Some(b"http") => asked.secure = false,
            _ => {}
        }
        let is_host = |host: &&HeaderValue| host.to_str().is_ok_and(|host| authority_host(host).is_ok());
        asked.host = one(X_FORWARDED_HOST).filter(is_host).cloned();
        let is_port = |port: &&HeaderValue| port.to_str().is_ok_and(|port| port.parse::<u16>().is_ok());
        asked.port = one(X_FORWARDED_PORT).filter(is_port).cloned();
        asked
    }

    /// The visitor's address, where it is not the peer's.
    pub fn instead_of_peer(&self) -> Option<IpAddr> {
        self.hops.first().copied().filter(|_| self.hops.len() > 1)
    }

    /// Says it to the origin, in place of whatever the request claimed.
    pub fn tell(&self, headers: &mut HeaderMap, peer: &Visitor, authority: &str) {
        drop_lookalikes(headers);
        let proto = if self.secure { "https" } else { "http" };
        let host = self.host.as_ref().and_then(|host| host.to_str().ok()).unwrap_or(authority);
        let (mut list, mut forwarded) = (String::new(), String::new());
        for (at, ip) in self.hops.iter().enumerate() {
            let comma = if at == 0 { "" } else { ", " };
            let text = ip.to_string();
            list.extend([comma, &text]);
            // RFC 7239 §6: an IPv6 node is bracketed and quoted.
            let (open, close) = if ip.is_ipv4() { ("", "") } else { ("\"[", "]\"") };
            forwarded.extend([comma, "for=", open, &text, close]);
            if at == 0 {
                // So is a host with a port.
                let quote = if host.bytes().all(is_token) { "" } else { "\"" };
                forwarded.extend([";host=", quote, host, quote, ";proto=", proto]);
            }
        }
        let port = self.port.clone().unwrap_or_else(|| HeaderValue::from(peer.local.port()));
        set(headers, X_FORWARDED_FOR, &list);
        headers.insert(X_FORWARDED_PROTO, HeaderValue::from_static(proto));
        set(headers, X_FORWARDED_HOST, host);
        headers.insert(X_FORWARDED_PORT, port);
        set(headers, FORWARDED, &forwarded);
    }
}

/// An address as `X-Forwarded-For` has them: with a port at times.
fn address(text: &str) -> Option<IpAddr> {
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    let ip = bare.parse().or_else(|_| text.parse::<SocketAddr>().map(|addr| addr.ip()));
    ip.ok().map(|ip: IpAddr| ip.to_canonical())
}

/// CGI-like origins read `X_Forwarded_For` as `X-Forwarded-For`: drop what would
/// pass for a field that is ours to set.
fn drop_lookalikes(headers: &mut HeaderMap) {
    let ours =
        [X_FORWARDED_FOR, X_FORWARDED_HOST, X_FORWARDED_PORT, X_FORWARDED_PROTO, X_REQUEST_ID, VIA, HOST, FORWARDED];
    let same = |a: &str, b: &str| {
        a.len() == b.len() && a.bytes().zip(b.bytes()).all(|(a, b)| a == b || (a == b'_' && b == b'-'))
    };
    let fakes: Vec<HeaderName> = headers
        .keys()
        .filter(|name| name.as_str().contains('_') && ours.iter().any(|o| same(name.as_str(), o.as_str())))
        .cloned()
        .collect();
    for fake in fakes {
        headers.remove(fake);
    }
}

/// The request's id: its own where that is sane (1 to 128 token characters),
/// else a random one.
pub fn request_id(headers: &HeaderMap) -> HeaderValue {
    let mut ids = headers.get_all(X_REQUEST_ID).iter();
    match (ids.next(), ids.next()) {
        (Some(id), None) if (1..=REQUEST_ID_MAX).contains(&id.len()) && id.as_bytes().iter().copied().all(is_token) => {
            id.clone()
        }
        _ => {
            let mut hex = [0; 32];
            random_hex(&mut hex);
            HeaderValue::from_bytes(&hex).unwrap_or_else(|_| HeaderValue::from_static("none"))
        }
    }
}

/// Keeps a request's trace, or begins one where it has none that is valid
/// (Trace Context §3.2). One that begins here is marked as sampled: that is what
/// an origin makes of a request without a trace by default, and "not sampled"
/// would silence it.
pub fn trace(headers: &mut HeaderMap) {
    let mut lines = headers.get_all(TRACEPARENT).iter();
    let parent = lines.next().filter(|_| lines.next().is_none());
    if parent.is_some_and(|parent| is_traceparent(parent.as_bytes())) {
        return;
    }
    headers.remove(TRACESTATE);
    let mut parent = *b"00-00000000000000000000000000000000-0000000000000000-01";
    if let [_, _, _, rest @ ..] = &mut parent
        && let Some((trace, [_, span @ ..])) = rest.split_at_mut_checked(32)
    {
        random_hex(trace);
        random_hex(span.split_at_mut(16).0);
    }
    if let Ok(parent) = HeaderValue::from_bytes(&parent) {
        headers.insert(TRACEPARENT, parent);
    }
}

/// Version, trace, span and flags, of which later versions may have more.
fn is_traceparent(text: &[u8]) -> bool {
    let mut parts = text.splitn(5, |b| *b == b'-');
    let mut part = |len: usize| {
        let hex = |part: &&[u8]| part.len() == len && part.iter().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        parts.next().filter(hex)
    };
    let (Some(version), Some(trace), Some(span), Some(_flags)) = (part(2), part(32), part(16), part(2)) else {
        return false;
    };
    let nothing = |part: &[u8]| part.iter().all(|b| *b == b'0');
    version != b"ff" && !nothing(trace) && !nothing(span) && (version != b"00" || parts.next().is_none())
}

/// Fills with random digits, an even number of up to 64. Bytes for them are asked for a
/// kilobyte at a time: a call of the generator costs 0.8 us, whether for 8 or for 1000.
fn random_hex(digits: &mut [u8]) {
    thread_local!(static STOCK: RefCell<([u8; 1024], usize)> = const { RefCell::new(([0; 1024], 0)) });
    STOCK.with_borrow_mut(|(bytes, left)| {
        let wanted = digits.len() / 2;
        if *left < wanted {
            // Fails only where the system has no randomness at all; an id need not be secret.
            let _ = aws_lc_rs::rand::fill(bytes);
            *left = bytes.len();
        }
        *left = left.saturating_sub(wanted);
        let bytes = bytes.get(*left..).and_then(|rest| rest.get(..wanted)).unwrap_or_default();
        HEXLOWER.encode_mut(bytes, digits);
    });
}

/// RFC 9110 §5.6.2 `tchar`.
fn is_token(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b)
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

    fn peer(ip: &str) -> Visitor {
        Visitor::new(SocketAddr::new(ip.parse().unwrap(), 5), "192.0.2.1:8443".parse().unwrap())
    }

    /// What the origin is told where a peer of 10.0.0.0/8 is trusted.
    fn told(ip: &str, lines: &[(&'static str, &str)]) -> (Option<String>, bool, Vec<String>) {
        let mut headers = map(lines);
        let trusted = [Network("10.0.0.0/8".parse().unwrap()), Network("fd00::/8".parse().unwrap())];
        let asked = Asked::of(&headers, &peer(ip), true, &trusted);
        asked.tell(&mut headers, &peer(ip), "a.test");
        let mut all: Vec<String> = headers.iter().map(|(n, v)| format!("{n}: {}", v.to_str().unwrap())).collect();
        all.sort();
        (asked.instead_of_peer().map(|ip| ip.to_string()), asked.secure, all)
    }

    const CLAIMS: &[(&str, &str)] = &[
        ("x-forwarded-for", "6.6.6.6, 10.9.9.9"),
        ("x-forwarded-for", "203.0.113.7:4000 , 10.0.0.2"),
        ("x-forwarded-proto", "http"),
        ("x-forwarded-host", "outer.test:81"),
        ("x-forwarded-port", "81"),
        ("forwarded", "for=7.7.7.7"),
        ("x_forwarded_for", "8.8.8.8"),
    ];

    #[test]
    fn a_peer_that_is_not_trusted_is_the_visitor_whatever_it_claims() {
        let (instead, secure, lines) = told("203.0.113.9", CLAIMS);
        assert_eq!((instead, secure), (None, true));
        assert_eq!(
            lines,
            [
                "forwarded: for=203.0.113.9;host=a.test;proto=https",
                "x-forwarded-for: 203.0.113.9",
                "x-forwarded-host: a.test",
                "x-forwarded-port: 8443",
                "x-forwarded-proto: https",
            ]
        );
    }

    #[test]
    fn a_trusted_peer_is_believed_up_to_the_first_hop_that_is_not() {
        let (instead, secure, lines) = told("10.0.0.1", CLAIMS);
        assert_eq!((instead.as_deref(), secure), (Some("203.0.113.7"), false));
        assert_eq!(
            lines,
            [
                "forwarded: for=203.0.113.7;host=\"outer.test:81\";proto=http, for=10.0.0.2, for=10.0.0.1",
                "x-forwarded-for: 203.0.113.7, 10.0.0.2, 10.0.0.1",
                "x-forwarded-host: outer.test:81",
                "x-forwarded-port: 81",
                "x-forwarded-proto: http",
            ]
        );
        // Without a word of it, and with nonsense, it speaks for itself.
        for lines in
            [&[][..], &[("x-forwarded-for", "unknown"), ("x-forwarded-host", "a b"), ("x-forwarded-port", "x")]]
        {
            let (instead, secure, lines) = told("fd00::1", lines);
            assert_eq!((instead, secure, lines[1].as_str()), (None, true, "x-forwarded-for: fd00::1"));
        }
        let (instead, ..) = told("10.0.0.1", &[("x-forwarded-for", "[2001:db8::1]:5")]);
        assert_eq!(instead.as_deref(), Some("2001:db8::1"));
    }

    #[test]
    fn a_sane_request_id_is_kept() {
        assert_eq!(request_id(&map(&[("x-request-id", "abc-1.2_3~")])), "abc-1.2_3~");
        assert_eq!(request_id(&map(&[("x-request-id", &"a".repeat(129))])).len(), 32);
        assert_eq!(request_id(&map(&[("x-request-id", "a"), ("x-request-id", "b")])).len(), 32);
        assert_ne!(request_id(&map(&[])), request_id(&map(&[])));
    }

    #[test]
    fn a_valid_trace_is_kept_and_another_begun_anew() {
        let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";
        let later = "01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00-more";
        for good in [parent, later] {
            let mut headers = map(&[("traceparent", good), ("tracestate", "a=1")]);
            trace(&mut headers);
            assert_eq!(headers, map(&[("traceparent", good), ("tracestate", "a=1")]));
        }
        for bad in [
            "",
            "00-0AF7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00",
            "00-00000000000000000000000000000000-b7ad6b7169203331-00",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-00",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00-more",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
        ] {
            let mut headers = map(&[("traceparent", bad), ("tracestate", "a=1")]);
            trace(&mut headers);
            let begun = headers["traceparent"].clone();
            assert!(begun != bad && is_traceparent(begun.as_bytes()) && headers.len() == 1, "{bad}: {headers:?}");
        }
    }
}
