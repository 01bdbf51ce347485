//! The ClientHello that starts every TLS connection: put together from its
//! records, and read for what routing needs. Nothing is negotiated here.

use super::{Stop, Unknown};
use crate::model::HostName;

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

fn refuse<T>(rule: &'static str) -> Result<T, Stop> {
    Err(Stop::Unknown(Unknown::Tls(rule)))
}

/// The content type of a handshake record, the first byte of TLS.
pub(super) const HANDSHAKE: u8 = 22;
pub(super) const CLIENT_HELLO: u8 = 1;
/// RFC 8446 §5.1.
pub(super) const RECORD_MAX: usize = 1 << 14;

/// Puts the first handshake message together from its records and reads it.
pub(super) fn read(bytes: &[u8], max: usize) -> Result<ClientHello, Stop> {
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
pub(super) const SERVER_NAME: u16 = 0;
pub(super) const ALPN: u16 = 16;

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
