//! Cookies as the gate needs them: its own are found, and taken out of what goes on
//! to the origin, byte for byte the others; an origin cannot set one of ours. Pure.

use std::sync::LazyLock;

use hyper::header::{COOKIE, HeaderMap, HeaderValue, SET_COOKIE};
use memchr::memmem;

/// What all cookies of ours begin with. `__Host-` binds them to one host and to
/// https (RFC 6265bis §4.1.3.2).
pub(super) const OURS: &str = "__Host-adit_";
/// A login.
pub(super) const SESSION: &str = "__Host-adit_s";
/// A login that was begun, on a socket's host; its id follows.
pub(super) const FLOW: &str = "__Host-adit_f_";
/// The same on the auth host.
pub(super) const LOGIN: &str = "__Host-adit_l_";
/// Whom somebody let see their address, on the auth host.
pub(super) const CONSENT: &str = "__Host-adit_k";

/// The values of the cookies of this name, in the order in which they came.
pub(super) fn values<'a>(headers: &'a HeaderMap, name: &'a str) -> impl Iterator<Item = &'a str> {
    pairs(headers).filter_map(move |(key, value)| (key == name).then_some(value))
}

/// The cookies whose names begin so.
pub(super) fn named<'a>(headers: &'a HeaderMap, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
    pairs(headers).filter(move |(key, _)| key.starts_with(prefix))
}

/// Names and values; one that is not text is none of ours, and hides no other.
fn pairs(headers: &HeaderMap) -> impl Iterator<Item = (&str, &str)> {
    let lines = headers.get_all(COOKIE).iter();
    lines.flat_map(|line| split(line.as_bytes())).filter_map(|pair| {
        let (key, value) = pair.split_at_checked(memchr::memchr(b'=', pair)?)?;
        let text = |bytes| std::str::from_utf8(bytes).ok().map(str::trim_ascii);
        Some((text(key)?, text(value.get(1..)?)?))
    })
}

/// A line's pairs.
fn split(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = Some(line);
    std::iter::from_fn(move || {
        let line = rest?;
        let (pair, after) = match memchr::memchr(b';', line) {
            Some(end) => (line.get(..end), line.get(end + 1..)),
            None => (Some(line), None),
        };
        rest = after;
        pair
    })
}

/// Takes our cookies out of a request.
pub(super) fn strip(headers: &mut HeaderMap) {
    static FINDER: LazyLock<memmem::Finder<'_>> = LazyLock::new(|| memmem::Finder::new(OURS));
    let mut lines = headers.get_all(COOKIE).iter();
    if !lines.any(|line| FINDER.find(line.as_bytes()).is_some()) {
        return;
    }
    let mut lines = headers.get_all(COOKIE).iter().map(|line| without_ours(line.as_bytes()));
    let first = lines.next().unwrap_or_default();
    let more: Vec<Vec<u8>> = lines.collect();
    headers.remove(COOKIE);
    for line in std::iter::once(first).chain(more).filter(|line| !line.is_empty()) {
        if let Ok(line) = HeaderValue::from_maybe_shared(bytes::Bytes::from(line)) {
            headers.append(COOKIE, line);
        }
    }
}

/// A line's pairs but ours; bytes that are not text pass.
fn without_ours(line: &[u8]) -> Vec<u8> {
    let mut kept: Vec<u8> = Vec::new();
    for pair in split(line) {
        if name_of(pair).starts_with(OURS.as_bytes()) {
            continue;
        }
        let pair = if kept.is_empty() { pair.trim_ascii_start() } else { pair };
        if !kept.is_empty() {
            kept.push(b';');
        }
        kept.extend_from_slice(pair);
    }
    kept
}

/// Takes out of an answer what would set a cookie of ours.
pub(super) fn keep_ours(headers: &mut HeaderMap) {
    let sets_ours = |line: &HeaderValue| name_of(line.as_bytes()).to_ascii_lowercase().starts_with(b"__host-adit_");
    if !headers.get_all(SET_COOKIE).iter().any(sets_ours) {
        return;
    }
    let lines: Vec<HeaderValue> = headers.get_all(SET_COOKIE).iter().filter(|line| !sets_ours(line)).cloned().collect();
    headers.remove(SET_COOKIE);
    for line in lines {
        headers.append(SET_COOKIE, line);
    }
}

/// The name of a pair. Without `=` a browser takes the whole for a nameless
/// cookie's value, and sends it back bare: it would read as a name (RFC 6265bis
/// §5.6).
fn name_of(pair: &[u8]) -> &[u8] {
    let pair = pair.trim_ascii_start();
    let pair = pair.strip_prefix(b"=").unwrap_or(pair).trim_ascii_start();
    let end = pair.iter().position(|b| matches!(b, b'=' | b';')).unwrap_or(pair.len());
    pair.get(..end).unwrap_or_default().trim_ascii_end()
}

/// A line that sets a cookie of ours, for so many seconds.
pub(super) fn set(name: &str, value: &str, seconds: u64) -> Option<HeaderValue> {
    HeaderValue::from_str(&format!("{name}={value}; Path=/; Secure; HttpOnly; SameSite=Lax; Max-Age={seconds}")).ok()
}

/// A line that takes a cookie of ours out of the jar.
pub(super) fn clear(name: &str) -> Option<HeaderValue> {
    set(name, "", 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cookies(lines: &[&[u8]]) -> HeaderMap {
        lines.iter().map(|line| (COOKIE, HeaderValue::from_bytes(line).unwrap())).collect()
    }

    fn left(lines: &[&[u8]]) -> Vec<Vec<u8>> {
        let mut headers = cookies(lines);
        strip(&mut headers);
        headers.get_all(COOKIE).iter().map(|line| line.as_bytes().to_vec()).collect()
    }

    #[test]
    fn the_origin_gets_all_cookies_but_ours_as_they_came() {
        assert_eq!(left(&[b"a=1; b=\"x y\";c=\xff"]), [b"a=1; b=\"x y\";c=\xff"]);
        assert_eq!(left(&[b"__Host-adit_s=v1.x; a=1"]), [b"a=1"]);
        assert_eq!(left(&[b"a=1; __Host-adit_s=v1.x; b=2"]), [b"a=1; b=2"]);
        assert_eq!(left(&[b"a=1;__Host-adit_f_00=x"]), [b"a=1"]);
        assert_eq!(left(&[b"a=__Host-adit_s"]), [b"a=__Host-adit_s"]);
        assert!(left(&[b"__Host-adit_s=1", b"  __Host-adit_s = 2 ;"]).is_empty());
        assert!(left(&[b"__Host-adit_s"]).is_empty());
        assert_eq!(left(&[b"__Host-adit_s=1", b"a=1", b"b=2"]), [b"a=1", b"b=2"]);
    }

    #[test]
    fn every_value_of_a_name_is_found_and_no_other() {
        let headers =
            cookies(&[b"x=1; __Host-adit_s=one", b"__Host-adit_s2=no;__Host-adit_s=two; y=__Host-adit_s=three"]);
        assert_eq!(values(&headers, SESSION).collect::<Vec<_>>(), ["one", "two"]);
    }

    #[test]
    fn an_origin_cannot_set_a_cookie_of_ours() {
        let mut headers = HeaderMap::new();
        let lines = [
            "a=1",
            "__Host-adit_s=x; Path=/",
            " __host-ADIT_s =y",
            "=__Host-adit_s=z",
            "b=__Host-adit_s",
            "__Host-adit_f",
        ];
        for line in lines {
            headers.append(SET_COOKIE, line.parse().unwrap());
        }
        keep_ours(&mut headers);
        let left: Vec<_> = headers.get_all(SET_COOKIE).iter().collect();
        assert_eq!(left, ["a=1", "b=__Host-adit_s"]);
    }
}
