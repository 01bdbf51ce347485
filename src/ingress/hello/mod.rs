//! What the first bytes of a connection speak: TLS (with the name and protocols
//! that its ClientHello asks for), HTTP or SSH. `read` is pure; `peek` is the
//! loop that feeds it. What to do with the answer is the caller's.

mod client_hello;

use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::error::Error;
use crate::fields::{self, Fields};
use crate::model::{HostName, authority_host};

pub use client_hello::{Alpn, ClientHello, Sni};

/// Bounds on the first bytes of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HelloSettings {
    /// How long a visitor may take from connecting to the end of its hello.
    /// 10 s: a ClientHello is one flight, so even two lost packets on a slow
    /// path fit (RFC 6298: retransmission after 1 s, 2 s, 4 s).
    pub deadline: Duration,
    /// The most bytes a hello may have, record headers included. 64 KiB: a
    /// ClientHello with post-quantum key shares and ECH has about 2 KB, and
    /// nothing honest comes near; also what one silent visitor can make us hold.
    pub max: usize,
}

impl Default for HelloSettings {
    fn default() -> Self {
        Self { deadline: Duration::from_secs(10), max: 64 << 10 }
    }
}

impl HelloSettings {
    /// Reads the settings' table.
    pub fn read(f: &mut Fields) -> Self {
        let d = Self::default();
        let settings = Self { deadline: f.take("deadline", d.deadline), max: f.take("max", fields::Bytes(d.max)).0 };
        if settings.deadline.is_zero() {
            f.mistake("deadline", "would refuse every visitor".into(), "write a duration like \"10s\"".into());
        }
        if settings.max < MIN_MAX {
            f.mistake("max", "is less than what browsers send".into(), "write at least \"4KiB\"".into());
        }
        settings
    }
}

/// A post-quantum ClientHello of a browser has about 2 KB.
const MIN_MAX: usize = 4 << 10;

/// What a connection speaks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hello {
    /// TLS, and what its ClientHello asks for.
    Tls(ClientHello),
    /// SSH (RFC 4253 §4.2).
    Ssh,
    /// HTTP/1 in the clear.
    Http1,
    /// HTTP/2 in the clear, with prior knowledge (RFC 9113 §3.3).
    Http2,
}

/// What the bytes so far tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// They are a whole hello.
    Hello(Hello),
    /// They may become one; it is pointless to ask again before there are this
    /// many bytes in all. Waiting for them bounds the work of all calls
    /// together: see `read`.
    More(usize),
    /// They never will.
    Unknown(Unknown),
}

/// Why first bytes are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unknown {
    /// They belong to no protocol that is served here.
    Protocol,
    /// They start as TLS does, and break its rules; the rule.
    Tls(&'static str),
    /// The hello is larger than the limit.
    TooLarge,
}

/// Tells what `bytes`, the first of a connection, speak. `max` bounds the bytes
/// that a hello may have. Bytes behind the hello are allowed and ignored.
///
/// A caller that calls again only once `More(n)` bytes are there does linear
/// work but for a logarithmic factor: `n` asks for all bytes that the message
/// still lacks, so even where each record brings one byte of it, what is
/// missing shrinks by a sixth from call to call.
pub fn read(bytes: &[u8], max: usize) -> Verdict {
    let found = match bytes {
        [client_hello::HANDSHAKE, ..] => client_hello::read(bytes, max).map(Hello::Tls),
        _ => text(bytes),
    };
    match found {
        Ok(hello) => Verdict::Hello(hello),
        Err(Stop::More(needed)) if needed > max => Verdict::Unknown(Unknown::TooLarge),
        Err(Stop::More(needed)) => Verdict::More(needed),
        Err(Stop::Unknown(why)) => Verdict::Unknown(why),
    }
}

/// The host that the first request of plain HTTP/1 names, as far as its head is here: a
/// hint of where it goes, by which nobody is let in.
pub fn host(head: &[u8]) -> Option<HostName> {
    let lines = head.split(|byte| *byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    let value = lines.take_while(|line| !line.is_empty()).find_map(|line| {
        let (name, value) = line.split_at_checked(5)?;
        name.eq_ignore_ascii_case(b"host:").then_some(value)
    })?;
    authority_host(std::str::from_utf8(value).ok()?.trim()).ok()?.parse().ok()
}

/// Reads a connection's first bytes until they tell what it speaks. Returns
/// them too: put them back with `Stream::with_head`.
///
/// # Errors
/// `HelloTimeout`, `HelloUnknown`, or `VisitorGone` where the connection ends
/// or breaks before its hello is whole.
///
/// # Cancel safety
/// Not cancel safe: bytes read so far are lost.
pub async fn peek<S>(stream: &mut S, settings: &HelloSettings) -> Result<(Hello, Bytes), Error>
where
    S: AsyncRead + Unpin,
{
    let reading = async {
        let mut head = BytesMut::with_capacity(2 << 10);
        loop {
            let needed = match read(&head, settings.max) {
                Verdict::Hello(hello) => return Ok((hello, head.freeze())),
                Verdict::Unknown(why) => {
                    tracing::debug!(?why, "first bytes refused");
                    return Err(Error::HelloUnknown);
                }
                Verdict::More(needed) => needed,
            };
            while head.len() < needed {
                let room = settings.max.saturating_sub(head.len());
                match stream.read_buf(&mut (&mut head).limit(room)).await {
                    Ok(0) | Err(_) => return Err(Error::VisitorGone),
                    Ok(_) => {}
                }
            }
        }
    };
    tokio::time::timeout(settings.deadline, reading).await.unwrap_or(Err(Error::HelloTimeout))
}

enum Stop {
    More(usize),
    Unknown(Unknown),
}

/// RFC 9113 §3.4.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The longest registered method has 17 letters (`UPDATEREDIRECTREF`).
const METHOD_MAX: usize = 32;

fn text(bytes: &[u8]) -> Result<Hello, Stop> {
    if bytes.starts_with(b"SSH-") {
        return Ok(Hello::Ssh);
    }
    if bytes.starts_with(PREFACE) {
        return Ok(Hello::Http2);
    }
    let more = || Err(Stop::More(bytes.len() + 1));
    if PREFACE.starts_with(bytes) {
        return more();
    }
    // RFC 9112 §2.2: one empty line before the request line is ignored.
    let line = bytes.strip_prefix(b"\r\n").unwrap_or(bytes);
    if line.is_empty() || bytes == b"\r" {
        return more();
    }
    let method = line.iter().take(METHOD_MAX + 1).take_while(|b| is_tchar(**b)).count();
    match line.get(method) {
        // `PRI` is HTTP/2's alone (RFC 9113 §11.6), and this is not its preface.
        Some(b' ') if (1..=METHOD_MAX).contains(&method) && !line.starts_with(b"PRI ") => Ok(Hello::Http1),
        None if method <= METHOD_MAX => more(),
        _ => Err(Stop::Unknown(Unknown::Protocol)),
    }
}

/// What a token is made of (RFC 9110 §5.6.2).
fn is_tchar(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b)
}

#[cfg(test)]
mod tests;
