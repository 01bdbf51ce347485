//! A visit in one line, as its owner reads it in a terminal.

use std::fmt::Write as _;
use std::time::{Duration, SystemTime};

use time::OffsetDateTime;
use time::macros::format_description;

use super::{Visit, What};

/// The largest part of a path that one line shows, in characters.
const PATH_CHARS: usize = 512;

/// One visit as one line: time, visitor, what, status, bytes up and down, time
/// to the origin's first byte, total; and where it went to another node, where it came
/// in, and how long the way there and the opening of the tunnel took.
pub(crate) fn write(out: &mut String, visit: &Visit) {
    let at = clock(visit.at);
    let _ = write!(out, "{at} {} ", visit.visitor.ip());
    match &visit.what {
        What::Request { method, host, path } => {
            let path: String = path.chars().take(PATH_CHARS).collect();
            let _ = write!(out, "{} {}{}", method.escape_debug(), host.escape_debug(), path.escape_debug());
        }
        What::Connection => out.push_str(visit.kind),
    }
    match (visit.status, visit.error) {
        (Some(status), None) => {
            let _ = write!(out, " {status}");
        }
        (Some(status), Some(error)) => {
            let _ = write!(out, " {status} ({error})");
        }
        (None, Some(error)) => {
            let _ = write!(out, " ({error})");
        }
        (None, None) => out.push_str(" ok"),
    }
    let _ = write!(out, " up {} down {}", Size(visit.bytes_up), Size(visit.bytes_down));
    match visit.first_byte {
        Some(first) => {
            let _ = write!(out, " first {}", Ms(first));
        }
        None => out.push_str(" first -"),
    }
    let _ = write!(out, " total {}", Ms(visit.total));
    if let Some(far) = &visit.node {
        let _ = write!(out, " at {} by {}", far.owner, far.entry);
        // On a connection that was kept there was no way to be opened.
        let opened = visit.legs.tunnel.zip(visit.legs.dial).map(|(tunnel, dial)| dial.saturating_sub(tunnel));
        if let Some(between) = opened.or(far.between) {
            let _ = write!(out, " between {}", Ms(between));
        }
        if let Some(tunnel) = visit.legs.tunnel {
            let _ = write!(out, " tunnel {}", Ms(tunnel));
        }
    }
}

fn clock(at: SystemTime) -> String {
    OffsetDateTime::from(at)
        .format(format_description!("[hour]:[minute]:[second]"))
        .unwrap_or_else(|_| "--:--:--".to_owned())
}

struct Size(u64);

impl std::fmt::Display for Size {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            n if n < 10_000 => write!(f, "{n}B"),
            n if n < 10_000_000 => write!(f, "{}kB", n / 1000),
            n => write!(f, "{}MB", n / 1_000_000),
        }
    }
}

struct Ms(Duration);

impl std::fmt::Display for Ms {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ms = self.0.as_secs_f64() * 1000.0;
        if ms < 10.0 { write!(f, "{ms:.1}ms") } else { write!(f, "{ms:.0}ms") }
    }
}
