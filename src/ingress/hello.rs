//! What the first bytes of a connection speak: TLS (with the name and protocols
//! that its ClientHello asks for), HTTP or SSH. `read` is pure; `peek` is the
//! loop that feeds it. What to do with the answer is the caller's.

use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::error::Error;
use crate::fields::{self, Fields};
use crate::model::HostName;

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

/// What a ClientHello tells in the clear.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientHello {
    /// The name that it asks for.
    pub sni: Sni,
    /// The protocols that it offers, in its order of preference.
    pub alpn: Alpn,
}

/// The server name of a ClientHello (RFC 6066 §3).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sni {
    /// None was sent.
    Absent,
    /// A host name.
    Name(HostName),
    /// One was sent, and it is no host name: an IP literal, or bad bytes.
    Bad,
}

impl Sni {
    /// The name, if a good one was sent.
    pub fn name(&self) -> Option<&HostName> {
        match self {
            Sni::Name(name) => Some(name),
            Sni::Absent | Sni::Bad => None,
        }
    }
}

/// The application protocols that a ClientHello offers (RFC 7301 §3.1); none
/// where the extension is absent.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Alpn(Box<[u8]>);

impl Alpn {
    /// The protocols' names, most wanted first.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        let mut list = Input(&self.0);
        std::iter::from_fn(move || list.vec8())
    }

    /// Whether this protocol is offered.
    pub fn offers(&self, protocol: &[u8]) -> bool {
        self.iter().any(|p| p == protocol)
    }
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
        [HANDSHAKE, ..] => tls(bytes, max).map(Hello::Tls),
        _ => text(bytes),
    };
    match found {
        Ok(hello) => Verdict::Hello(hello),
        Err(Stop::More(needed)) if needed > max => Verdict::Unknown(Unknown::TooLarge),
        Err(Stop::More(needed)) => Verdict::More(needed),
        Err(Stop::Unknown(why)) => Verdict::Unknown(why),
    }
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

fn refuse<T>(rule: &'static str) -> Result<T, Stop> {
    Err(Stop::Unknown(Unknown::Tls(rule)))
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

const HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;
/// RFC 8446 §5.1.
const RECORD_MAX: usize = 1 << 14;

/// Puts the first handshake message together from its records and reads it.
fn tls(bytes: &[u8], max: usize) -> Result<ClientHello, Stop> {
    let mut rest = bytes;
    // The message's own header may be split over records too.
    let mut header = [0u8; 4];
    let mut have = 0;
    let mut first: Option<&[u8]> = None;
    loop {
        let (body, after) = match record(rest)? {
            Record::Here { body, after } => (body, after),
            Record::HeaderLacks(lacks) => {
                let message = message_len(&header, have, max)?.unwrap_or(header.len());
                return Err(Stop::More(bytes.len() + lacks + message.saturating_sub(have)));
            }
        };
        for (slot, byte) in header.iter_mut().skip(have).zip(body) {
            *slot = *byte;
        }
        have += body.len();
        let message = message_len(&header, have, max)?;
        let whole = message.filter(|len| *len <= have);
        if let Some(len) = whole {
            let end = bytes.len() - after.len() - (have - len);
            if end > max {
                return Err(Stop::Unknown(Unknown::TooLarge));
            }
            // The usual hello is in one record and is read where it lies.
            return match first {
                None => client_hello(body.get(header.len()..len).unwrap_or_default()),
                Some(_) => client_hello(joined(bytes, len).get(header.len()..).unwrap_or_default()),
            };
        }
        if after.is_empty() {
            let lacks = message.unwrap_or(header.len()).saturating_sub(have).max(1);
            return Err(Stop::More(bytes.len() + lacks));
        }
        first = first.or(Some(body));
        rest = after;
    }
}

enum Record<'a> {
    /// A record, as much of its body as is here, and what follows it.
    Here { body: &'a [u8], after: &'a [u8] },
    /// So many bytes of its header are still to come.
    HeaderLacks(usize),
}

fn record(bytes: &[u8]) -> Result<Record<'_>, Stop> {
    if bytes.first().is_some_and(|kind| *kind != HANDSHAKE) {
        return refuse("another record inside the ClientHello");
    }
    // RFC 8446 §5.1: the minor version is to be ignored.
    if bytes.get(1).is_some_and(|major| *major != 3) {
        return refuse("the record's version");
    }
    let Some(([_, _, _, hi, lo], rest)) = bytes.split_first_chunk() else {
        return Ok(Record::HeaderLacks(5 - bytes.len()));
    };
    let len = usize::from(u16::from_be_bytes([*hi, *lo]));
    if len == 0 || len > RECORD_MAX {
        return refuse("the record's length");
    }
    let (body, after) = rest.split_at_checked(len).unwrap_or((rest, &[]));
    Ok(Record::Here { body, after })
}

/// The length of the message, header included, once `have` bytes hold that much.
fn message_len(header: &[u8; 4], have: usize, max: usize) -> Result<Option<usize>, Stop> {
    let [kind, a, b, c] = *header;
    if have > 0 && kind != CLIENT_HELLO {
        return refuse("the first message is no ClientHello");
    }
    if have < header.len() {
        return Ok(None);
    }
    let len = header.len() + usize::try_from(u32::from_be_bytes([0, a, b, c])).unwrap_or(usize::MAX / 2);
    if len > max { Err(Stop::Unknown(Unknown::TooLarge)) } else { Ok(Some(len)) }
}

/// The first `len` bytes of the records' bodies. All of them are here, so this
/// happens once per connection.
fn joined(bytes: &[u8], len: usize) -> Vec<u8> {
    let mut message = Vec::with_capacity(len);
    let mut rest = bytes;
    while let Ok(Record::Here { body, after }) = record(rest) {
        let lacks = len.saturating_sub(message.len());
        message.extend(body.iter().take(lacks));
        if lacks <= body.len() {
            break;
        }
        rest = after;
    }
    message
}

/// RFC 8446 §4.1.2; extensions may be absent in TLS 1.2 and before (RFC 5246 §7.4.1.2).
fn client_hello(body: &[u8]) -> Result<ClientHello, Stop> {
    let mut body = Input(body);
    let fixed = (|| {
        let _version = body.take(2)?;
        let _random = body.take(32)?;
        let _session = body.vec8().filter(|s| s.len() <= 32)?;
        let _suites = body.vec16().filter(|s| s.len() >= 2 && s.len() % 2 == 0)?;
        let _compression = body.vec8().filter(|c| !c.is_empty())?;
        Some(())
    })();
    if fixed.is_none() {
        return refuse("the ClientHello's fields");
    }
    let mut found = ClientHello { sni: Sni::Absent, alpn: Alpn::default() };
    if body.0.is_empty() {
        return Ok(found);
    }
    let Some(mut extensions) = body.vec16().filter(|_| body.0.is_empty()).map(Input) else {
        return refuse("the extensions' length");
    };
    let (mut names, mut protocols) = (false, false);
    while !extensions.0.is_empty() {
        let Some((kind, value)) = extensions.u16().zip(extensions.vec16()) else {
            return refuse("an extension's length");
        };
        match kind {
            // RFC 8446 §4.2: at most one extension of each type.
            SERVER_NAME if names => return refuse("server_name twice"),
            ALPN if protocols => return refuse("ALPN twice"),
            SERVER_NAME => {
                names = true;
                found.sni = server_name(value)?;
            }
            ALPN => {
                protocols = true;
                found.alpn = alpn(value)?;
            }
            _ => {}
        }
    }
    Ok(found)
}

/// IANA, TLS ExtensionType values.
const SERVER_NAME: u16 = 0;
const ALPN: u16 = 16;

/// RFC 6066 §3. A name that is no host name is told as such and not refused
/// here: whoever ends the TLS can still send the alert that the client knows.
fn server_name(value: &[u8]) -> Result<Sni, Stop> {
    let mut value = Input(value);
    let Some(mut list) = value.vec16().filter(|l| !l.is_empty() && value.0.is_empty()).map(Input) else {
        return refuse("server_name's length");
    };
    let mut found = Sni::Absent;
    while !list.0.is_empty() {
        let Some((kind, name)) = list.u8().zip(list.vec16()) else {
            return refuse("a server name's length");
        };
        if kind != 0 {
            continue;
        }
        if found != Sni::Absent {
            return refuse("two names of one type");
        }
        let text = std::str::from_utf8(name).ok();
        // "Literal IPv4 and IPv6 addresses are not permitted."
        let text = text.filter(|t| t.trim_end_matches('.').parse::<std::net::IpAddr>().is_err());
        found = text.and_then(|t| t.parse().ok()).map_or(Sni::Bad, Sni::Name);
    }
    Ok(found)
}

/// RFC 7301 §3.1: a list of at least one name, none of them empty.
fn alpn(value: &[u8]) -> Result<Alpn, Stop> {
    let mut value = Input(value);
    let Some(list) = value.vec16().filter(|l| !l.is_empty() && value.0.is_empty()) else {
        return refuse("ALPN's length");
    };
    let mut names = Input(list);
    while !names.0.is_empty() {
        if names.vec8().is_none_or(<[u8]>::is_empty) {
            return refuse("an ALPN name's length");
        }
    }
    Ok(Alpn(list.into()))
}

/// Bytes taken from the front; `None` where there are too few.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (front, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(front)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }

    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(*self.take(2)?.first_chunk()?))
    }

    /// A vector behind one byte of length.
    fn vec8(&mut self) -> Option<&'a [u8]> {
        let len = self.u8()?;
        self.take(len.into())
    }

    /// A vector behind two bytes of length.
    fn vec16(&mut self) -> Option<&'a [u8]> {
        let len = self.u16()?;
        self.take(len.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rustls::pki_types::ServerName;
    use std::sync::Arc;
    use tokio::io::AsyncWriteExt;

    const MAX: usize = 64 << 10;

    /// The first flight of a real client.
    fn rustls_hello(name: &str, alpn: &[&str]) -> Vec<u8> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(rustls::RootCertStore::empty())
            .with_no_client_auth();
        config.alpn_protocols = alpn.iter().map(|p| p.as_bytes().to_vec()).collect();
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let mut client = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        bytes
    }

    fn vec16(body: &[u8]) -> Vec<u8> {
        [&u16::try_from(body.len()).unwrap().to_be_bytes(), body].concat()
    }

    fn extension(kind: u16, body: &[u8]) -> Vec<u8> {
        [&kind.to_be_bytes()[..], &vec16(body)].concat()
    }

    fn sni(name: &[u8]) -> Vec<u8> {
        extension(SERVER_NAME, &vec16(&[&[0], &vec16(name)[..]].concat()))
    }

    /// A hand-made ClientHello message.
    fn message(extensions: &[Vec<u8>]) -> Vec<u8> {
        let mut body = vec![3, 3];
        body.extend([7; 32]);
        body.extend([0, 0, 2, 0x13, 0x01, 1, 0]);
        body.extend(vec16(&extensions.concat()));
        let len = u32::try_from(body.len()).unwrap().to_be_bytes();
        [&[CLIENT_HELLO], &len[1..], &body].concat()
    }

    /// The message in records of these sizes; the last size repeats.
    fn records(message: &[u8], sizes: &[usize]) -> Vec<u8> {
        let mut out = Vec::new();
        let mut rest = message;
        for i in 0.. {
            let size = sizes[i.min(sizes.len() - 1)].min(rest.len());
            let (body, after) = rest.split_at(size);
            out.extend([&[HANDSHAKE, 3, 1][..], &vec16(body)].concat());
            rest = after;
            if rest.is_empty() {
                return out;
            }
        }
        out
    }

    fn client_hello_of(verdict: Verdict) -> ClientHello {
        match verdict {
            Verdict::Hello(Hello::Tls(hello)) => hello,
            other => panic!("{other:?}"),
        }
    }

    fn sni_of(extensions: &[Vec<u8>]) -> Sni {
        client_hello_of(read(&records(&message(extensions), &[RECORD_MAX]), MAX)).sni
    }

    #[test]
    fn each_protocol_is_known_by_its_first_bytes() {
        for (bytes, hello) in [
            (&b"SSH-2.0-OpenSSH_9.9\r\n"[..], Hello::Ssh),
            (b"SSH-", Hello::Ssh),
            (b"GET ", Hello::Http1),
            (b"\r\nPOST / HTTP/1.1", Hello::Http1),
            (b"SEARCH /", Hello::Http1),
            (b"PRINT / HTTP/1.1", Hello::Http1),
            (b"M-SEARCH * HTTP/1.1", Hello::Http1),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0", Hello::Http2),
        ] {
            assert_eq!(read(bytes, MAX), Verdict::Hello(hello), "{}", bytes.escape_ascii());
        }
        for bytes in [&b""[..], b"S", b"SSH", b"PRI * HTTP/2.0\r\n", b"\r", b"\r\n", b"GET", b"\x16", b"\x16\x03\x01"] {
            let verdict = read(bytes, MAX);
            assert!(matches!(verdict, Verdict::More(n) if n > bytes.len()), "{verdict:?}");
        }
        for bytes in [&b"\0"[..], b" GET", b"\r\r", b"\x80\x2e\x01", b"PRI / HTTP/1.1", &[b'A'; 33], b"\x03\0\0\x13"] {
            assert_eq!(read(bytes, MAX), Verdict::Unknown(Unknown::Protocol), "{}", bytes.escape_ascii());
        }
    }

    #[test]
    fn a_real_hello_tells_its_name_and_protocols() {
        let bytes = rustls_hello("web.example.com", &["h2", "http/1.1"]);
        assert!(bytes.len() > 1200, "carries a post-quantum key share");
        let hello = client_hello_of(read(&bytes, MAX));
        assert_eq!(hello.sni.name().unwrap().as_str(), "web.example.com");
        assert_eq!(hello.alpn.iter().collect::<Vec<_>>(), [&b"h2"[..], b"http/1.1"]);
        assert!(hello.alpn.offers(b"h2") && !hello.alpn.offers(b"h3"));
        // rustls sends no server_name for an address.
        let hello = client_hello_of(read(&rustls_hello("192.0.2.1", &[]), MAX));
        assert_eq!(hello, ClientHello { sni: Sni::Absent, alpn: Alpn::default() });
    }

    #[test]
    fn a_hello_without_extensions_is_one() {
        // RFC 5246 §7.4.1.2: presence is told by bytes behind compression_methods.
        let mut body = message(&[]);
        body.truncate(body.len() - 2);
        body[3] -= 2;
        assert_eq!(client_hello_of(read(&records(&body, &[RECORD_MAX]), MAX)).sni, Sni::Absent);
    }

    #[test]
    fn no_name_a_good_one_and_a_bad_one_are_told_apart() {
        assert_eq!(sni_of(&[]), Sni::Absent);
        assert_eq!(sni_of(&[sni(b"Web.Example.com")]), Sni::Name("web.example.com".parse().unwrap()));
        for bad in [&b"192.0.2.1"[..], b"192.0.2.1.", b"::1", b"a b", b"\xff", b"", b"a..b", &[b'a'; 254]] {
            assert_eq!(sni_of(&[sni(bad)]), Sni::Bad, "{}", bad.escape_ascii());
        }
        // A name of an unknown type beside it is skipped.
        let two = vec16(&[&[9][..], &vec16(b"?"), &[0], &vec16(b"a.test")].concat());
        assert_eq!(sni_of(&[extension(SERVER_NAME, &two)]), Sni::Name("a.test".parse().unwrap()));
    }

    #[test]
    fn grease_and_ech_are_skipped() {
        // RFC 8701 §2, RFC 9849 §4 (encrypted_client_hello).
        let all = [extension(0x0a0a, &[]), extension(0xfe0d, &[0; 300]), sni(b"a.test"), extension(0xfafa, &[0])];
        assert_eq!(sni_of(&all), Sni::Name("a.test".parse().unwrap()));
    }

    #[test]
    fn a_broken_hello_is_refused() {
        let good = message(&[sni(b"a.test")]);
        let mut wrong = Vec::new();
        for (what, at, byte) in
            [("message type", 0, 2), ("session length", 38, 33), ("odd suites", 40, 3), ("extensions", 45, 9)]
        {
            let mut bad = good.clone();
            bad[at] = byte;
            wrong.push((what, records(&bad, &[RECORD_MAX])));
        }
        wrong.push(("two names", records(&message(&[sni(b"a.test"), sni(b"b.test")]), &[RECORD_MAX])));
        wrong.push(("empty alpn", records(&message(&[extension(ALPN, &[0, 0])]), &[RECORD_MAX])));
        wrong.push(("empty alpn name", records(&message(&[extension(ALPN, &[0, 1, 0])]), &[RECORD_MAX])));
        wrong.push(("alpn past its end", records(&message(&[extension(ALPN, &[0, 3, 9, 9, 9])]), &[RECORD_MAX])));
        wrong.push(("empty server_name", records(&message(&[extension(SERVER_NAME, &[])]), &[RECORD_MAX])));
        wrong.push(("empty record", vec![HANDSHAKE, 3, 1, 0, 0]));
        wrong.push(("long record", vec![HANDSHAKE, 3, 1, 0x40, 1]));
        wrong.push(("version", vec![HANDSHAKE, 4]));
        let mut other = records(&good, &[10]);
        other[15] = 21;
        wrong.push(("alert inside", other));
        for (what, bytes) in wrong {
            let verdict = read(&bytes, MAX);
            assert!(matches!(verdict, Verdict::Unknown(Unknown::Tls(_))), "{what}: {verdict:?}");
        }
    }

    #[test]
    fn the_limit_holds_for_the_message_and_for_its_records() {
        let large = message(&[extension(0x0a0a, &[0; 20_000]), sni(b"a.test")]);
        let bytes = records(&large, &[RECORD_MAX]);
        assert!(matches!(read(&bytes, bytes.len()), Verdict::Hello(Hello::Tls(_))));
        for here in [bytes.len() - 1, bytes.len()] {
            assert_eq!(read(&bytes[..here], bytes.len() - 1), Verdict::Unknown(Unknown::TooLarge), "{here}");
        }
        assert_eq!(read(&bytes[..9], 1 << 12), Verdict::Unknown(Unknown::TooLarge));
        let absurd = [HANDSHAKE, 3, 1, 0x40, 0, CLIENT_HELLO, 0xff, 0xff, 0xff];
        assert_eq!(read(&absurd, MAX), Verdict::Unknown(Unknown::TooLarge));
    }

    #[test]
    fn one_byte_records_cost_few_calls() {
        let bytes = records(&message(&[extension(0x0a0a, &[0; 10_000]), sni(b"a.test")]), &[1]);
        let (mut here, mut calls) = (0, 0);
        let hello = loop {
            calls += 1;
            match read(&bytes[..here], MAX) {
                Verdict::More(needed) => here = needed,
                other => break client_hello_of(other),
            }
        };
        assert_eq!(hello.sni.name().unwrap().as_str(), "a.test");
        assert!(calls < 80, "{calls} calls");
    }

    #[tokio::test]
    async fn peeked_bytes_come_back_whole() {
        let mut sent = rustls_hello("a.test", &["h2"]);
        sent.extend(b"what follows");
        let (mut near, mut far) = tokio::io::duplex(7);
        let writer = tokio::spawn({
            let sent = sent.clone();
            async move {
                for byte in sent {
                    near.write_all(&[byte]).await.unwrap();
                }
                near
            }
        });
        let (hello, mut head) = peek(&mut far, &HelloSettings::default()).await.unwrap();
        assert!(matches!(hello, Hello::Tls(_)));
        let mut rest = vec![0; sent.len() - head.len()];
        far.read_exact(&mut rest).await.unwrap();
        assert_eq!([head.split_to(head.len()), rest.into()].concat(), sent);
        drop(writer);
    }

    #[tokio::test]
    async fn a_visitor_that_says_nothing_whole_is_told_why() {
        let settings = HelloSettings { max: 5000, deadline: Duration::from_millis(100) };
        for (sent, close, error) in [
            (&b""[..], true, Error::VisitorGone),
            (b"\x16\x03", true, Error::VisitorGone),
            (b"\x16\x03", false, Error::HelloTimeout),
            (b"\0", false, Error::HelloUnknown),
            (b"\x16\x03\x01\x20\0\x01\0\x20\0", false, Error::HelloUnknown),
        ] {
            let (mut near, mut far) = tokio::io::duplex(64);
            near.write_all(sent).await.unwrap();
            let _near = (!close).then_some(near);
            assert_eq!(peek(&mut far, &settings).await.unwrap_err(), error, "{}", sent.escape_ascii());
        }
    }

    proptest! {
        #[test]
        fn any_split_gives_the_same_verdict(
            name in "[a-z]{1,10}(\\.[a-z]{1,10}){0,3}",
            alpn in proptest::collection::vec("[ -~]{1,20}", 0..4),
            pad in 0usize..5000,
            sizes in proptest::collection::vec(1usize..700, 1..5),
            cuts in proptest::collection::vec(1usize..400, 1..6),
        ) {
            let mut extensions = vec![extension(0x1a1a, &vec![0; pad]), sni(name.as_bytes())];
            if !alpn.is_empty() {
                let list: Vec<u8> = alpn.iter().flat_map(|p| [&[p.len() as u8], p.as_bytes()].concat()).collect();
                extensions.push(extension(ALPN, &vec16(&list)));
            }
            let message = message(&extensions);
            let bytes = records(&message, &sizes);
            let whole = client_hello_of(read(&bytes, MAX));
            prop_assert_eq!(whole.sni.name().unwrap().as_str(), name);
            prop_assert!(whole.alpn.iter().eq(alpn.iter().map(String::as_bytes)));
            let mut here = 0;
            for cut in cuts.iter().cycle() {
                here = (here + cut).min(bytes.len());
                match read(&bytes[..here], MAX) {
                    Verdict::More(needed) => {
                        prop_assert!(here < bytes.len() && needed > here && needed <= bytes.len());
                    }
                    other => {
                        prop_assert_eq!(here, bytes.len());
                        prop_assert_eq!(client_hello_of(other), whole);
                        break;
                    }
                }
            }
        }

        #[test]
        fn hostile_bytes_never_panic_and_always_move_on(mut bytes in proptest::collection::vec(any::<u8>(), 0..300), tls: bool) {
            if tls {
                bytes.splice(0..0, [HANDSHAKE, 3, 1, 1, 0, CLIENT_HELLO, 0]);
            }
            if let Verdict::More(needed) = read(&bytes, MAX) {
                prop_assert!(needed > bytes.len() && needed <= MAX);
            }
        }
    }
}
