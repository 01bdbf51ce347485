//! The PROXY protocol, versions 1 and 2 (haproxy.org, proxy-protocol.txt): who a
//! connection is from, said in its first bytes by a proxy that passes it on.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::error::Error;
use crate::model::Visitor;
use crate::stream::Stream;
use crate::text_field;

const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";

/// The longest header of version 1, its line end included.
const LINE_MAX: usize = 107;

/// The most that is read after the 16 bytes with which version 2 begins:
/// addresses and TLVs, a client certificate's among them.
const REST_MAX: usize = 4096;

/// The version that an origin is told in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// A line of text.
    V1,
    /// Binary, with TLVs.
    V2,
}

impl Version {
    /// As in records.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V1 => "v1",
            Self::V2 => "v2",
        }
    }
}

impl FromStr for Version {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "v1" => Ok(Self::V1),
            "v2" => Ok(Self::V2),
            _ => Err("is no version of the PROXY protocol"),
        }
    }
}
text_field!(Version, "\"v1\" or \"v2\"");

/// Whom a connection is from, and what it was made to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Told {
    /// The visitor.
    pub source: SocketAddr,
    /// The address that the visitor connected to.
    pub destination: SocketAddr,
}

/// Reads a connection's header, and not one byte of what follows. `None` where
/// the proxy speaks for itself (LOCAL, UNKNOWN, or addresses that are not TCP's).
///
/// # Errors
/// `InvalidData` where it is malformed; those of the connection. There is no
/// deadline here.
///
/// # Cancel safety
/// Not cancel safe: the connection is of no use afterwards.
pub async fn read(tcp: &mut TcpStream) -> io::Result<Option<Told>> {
    // No header is shorter: `PROXY UNKNOWN`, CR and LF are 15 bytes.
    let mut start = [0; 12];
    tcp.read_exact(&mut start).await?;
    if start != *SIGNATURE {
        return read_line(tcp, &start).await;
    }
    let mut fixed = [0; 4];
    tcp.read_exact(&mut fixed).await?;
    let [command, family, len @ ..] = fixed;
    let len = usize::from(u16::from_be_bytes(len));
    if len > REST_MAX {
        return Err(malformed());
    }
    let mut rest = vec![0; len];
    tcp.read_exact(&mut rest).await?;
    parse_v2(command, family, &rest).ok_or_else(malformed)
}

async fn read_line(tcp: &mut TcpStream, start: &[u8]) -> io::Result<Option<Told>> {
    let mut line = start.to_vec();
    if !line.starts_with(b"PROXY ") {
        return Err(malformed());
    }
    while line.last() != Some(&b'\n') {
        let mut next = [0; LINE_MAX];
        let room = next.get_mut(line.len()..).filter(|room| !room.is_empty()).ok_or_else(malformed)?;
        let there = tcp.peek(room).await?;
        let seen = room.get(..there).unwrap_or_default();
        let taken = seen.iter().position(|b| *b == b'\n').map_or(there, |at| at + 1);
        if taken == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let room = room.get_mut(..taken).unwrap_or_default();
        tcp.read_exact(room).await?;
        line.extend_from_slice(room);
    }
    parse_v1(&line).ok_or_else(malformed)
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "malformed PROXY protocol header")
}

/// A whole line of version 1. The outer `None`: malformed.
pub fn parse_v1(line: &[u8]) -> Option<Option<Told>> {
    let text = std::str::from_utf8(line).ok().filter(|line| line.len() <= LINE_MAX)?.strip_suffix("\r\n")?;
    let mut words = text.split(' ');
    let (Some("PROXY"), Some(family)) = (words.next(), words.next()) else { return None };
    if family == "UNKNOWN" {
        // What follows is nobody's concern (§2.1).
        return Some(None);
    }
    let mut ip = || -> Option<IpAddr> {
        let ip: IpAddr = words.next()?.parse().ok()?;
        match family {
            "TCP4" => Some(ip).filter(IpAddr::is_ipv4),
            "TCP6" => Some(ip).filter(IpAddr::is_ipv6),
            _ => None,
        }
    };
    let (source, destination) = (ip()?, ip()?);
    let mut port = || -> Option<u16> {
        // `str::parse` takes a sign, and leading zeros have no business here.
        let word = words.next().filter(|w| w.bytes().all(|b| b.is_ascii_digit()) && (*w == "0" || !w.starts_with('0')));
        word?.parse().ok()
    };
    let told = Told { source: SocketAddr::new(source, port()?), destination: SocketAddr::new(destination, port()?) };
    words.next().is_none().then_some(Some(told))
}

/// What follows the signature of version 2: command, family, and the rest whole.
/// The outer `None`: malformed.
pub fn parse_v2(command: u8, family: u8, rest: &[u8]) -> Option<Option<Told>> {
    match command {
        0x20 => return Some(None),
        0x21 => {}
        _ => return None,
    }
    fn addresses<const LEN: usize>(rest: &[u8]) -> Option<(IpAddr, IpAddr, &[u8])>
    where
        IpAddr: From<[u8; LEN]>,
    {
        let (source, rest) = rest.split_first_chunk::<LEN>()?;
        let (destination, rest) = rest.split_first_chunk::<LEN>()?;
        Some((IpAddr::from(*source), IpAddr::from(*destination), rest))
    }
    let all = rest;
    let (source, destination, rest) = match family {
        0x11 => addresses::<4>(rest)?,
        0x21 => addresses::<16>(rest)?,
        // Not given, datagrams, or a socket of the file system (§2.2).
        0x00 | 0x12 | 0x22 | 0x31 | 0x32 => return Some(None),
        _ => return None,
    };
    let (ports, mut tlvs) = rest.split_first_chunk::<4>()?;
    let [a, b, c, d] = *ports;
    while !tlvs.is_empty() {
        let ([kind, high, low], after) = tlvs.split_first_chunk::<3>()?;
        let (value, after) = after.split_at_checked(usize::from(u16::from_be_bytes([*high, *low])))?;
        if *kind == CRC32C {
            // §2.2.4: whoever knows it must refuse what does not agree with it.
            let len = u16::try_from(all.len()).ok()?.to_be_bytes();
            let mut whole = [SIGNATURE.as_slice(), &[command, family], &len, all].concat();
            let at = whole.len() - tlvs.len() + 3;
            whole.get_mut(at..at + value.len())?.fill(0);
            if value != crc32c(&whole).to_be_bytes() {
                return None;
            }
        }
        tlvs = after;
    }
    Some(Some(Told {
        source: SocketAddr::new(source, u16::from_be_bytes([a, b])),
        destination: SocketAddr::new(destination, u16::from_be_bytes([c, d])),
    }))
}

/// What version 2 can say beside the addresses.
#[derive(Debug, Clone, Copy, Default)]
pub struct Extras<'a> {
    /// The protocol that was agreed on in the visitor's TLS handshake.
    pub alpn: Option<&'a [u8]>,
    /// The name that the visitor asked for in it.
    pub authority: Option<&'a str>,
    /// What this connection is called, at most 128 bytes.
    pub unique_id: &'a [u8],
}

/// The visitor's TLS connection, where it ended here (§2.2.6).
#[derive(Debug, Clone, Copy, Default)]
pub struct Ssl<'a> {
    /// `TLSv1.3`.
    pub version: Option<&'a str>,
    /// The cipher suite, as OpenSSL calls it.
    pub cipher: Option<&'a str>,
    /// Whether the visitor showed a certificate, which then was verified.
    pub certified: bool,
    /// The common name of its subject.
    pub common_name: Option<&'a str>,
}

/// The longest common name that is told (X.520 has them end at 64).
const NAME_MAX: usize = 256;

impl Ssl<'_> {
    fn value(&self) -> Vec<u8> {
        // PP2_CLIENT_SSL, and PP2_CLIENT_CERT_CONN with _SESS: sessions that show a
        // certificate are never resumed.
        let client = if self.certified { 0x07 } else { 0x01 };
        let mut value = vec![client];
        value.extend_from_slice(&u32::from(!self.certified).to_be_bytes());
        tlv(&mut value, 0x21, self.version.unwrap_or_default().as_bytes());
        // A name that an origin could take for another by half is left out.
        let name = self.common_name.filter(|cn| cn.len() <= NAME_MAX && !cn.chars().any(char::is_control));
        tlv(&mut value, 0x22, name.unwrap_or_default().as_bytes());
        tlv(&mut value, 0x23, self.cipher.unwrap_or_default().as_bytes());
        value
    }
}

/// Type, length, value; nothing where there is none.
fn tlv(to: &mut Vec<u8>, kind: u8, value: &[u8]) {
    if let (false, Ok(len)) = (value.is_empty(), u16::try_from(value.len())) {
        to.push(kind);
        to.extend_from_slice(&len.to_be_bytes());
        to.extend_from_slice(value);
    }
}

/// PP2_TYPE_CRC32C: over the whole header, itself as zeros (§2.2.4).
const CRC32C: u8 = 0x03;

/// RFC 9260 appendix A: the polynomial 0x1EDC6F41, reflected.
fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { (crc >> 1) ^ 0x82F6_3B78 } else { crc >> 1 })
    };
    !bytes.iter().fold(!0, step)
}

/// The header that an origin gets.
pub fn write(version: Version, told: Told, extras: Extras<'_>, ssl: Option<Ssl<'_>>) -> Vec<u8> {
    let (mut source, mut destination) = (told.source, told.destination);
    if source.is_ipv4() != destination.is_ipv4() {
        // One family for both: what is IPv4 has a form in IPv6.
        let mapped = |addr: SocketAddr| match addr.ip() {
            IpAddr::V4(ip) => SocketAddr::new(ip.to_ipv6_mapped().into(), addr.port()),
            IpAddr::V6(_) => addr,
        };
        (source, destination) = (mapped(source), mapped(destination));
    }
    match version {
        Version::V1 => {
            let family = if source.is_ipv4() { "TCP4" } else { "TCP6" };
            let (s, d) = (source, destination);
            format!("PROXY {family} {} {} {} {}\r\n", s.ip(), d.ip(), s.port(), d.port()).into_bytes()
        }
        Version::V2 => {
            let mut rest = Vec::with_capacity(128);
            for ip in [source.ip(), destination.ip()] {
                match ip {
                    IpAddr::V4(ip) => rest.extend_from_slice(&ip.octets()),
                    IpAddr::V6(ip) => rest.extend_from_slice(&ip.octets()),
                }
            }
            for port in [source.port(), destination.port()] {
                rest.extend_from_slice(&port.to_be_bytes());
            }
            tlv(&mut rest, 0x01, extras.alpn.unwrap_or_default());
            tlv(&mut rest, 0x02, extras.authority.unwrap_or_default().as_bytes());
            tlv(&mut rest, 0x05, extras.unique_id);
            tlv(&mut rest, 0x20, &ssl.map(|ssl| ssl.value()).unwrap_or_default());
            // Last, so that its value is the end of the header.
            tlv(&mut rest, CRC32C, &[0; 4]);
            let family = if source.is_ipv4() { 0x11 } else { 0x21 };
            let len = u16::try_from(rest.len()).unwrap_or(u16::MAX).to_be_bytes();
            let mut header = [SIGNATURE.as_slice(), &[0x21, family], &len, &rest].concat();
            let crc = crc32c(&header).to_be_bytes();
            header.truncate(header.len() - crc.len());
            header.extend_from_slice(&crc);
            header
        }
    }
}

/// Tells an origin who the visitor is, before anything else.
///
/// # Errors
/// `OriginReset`, or what the stream knows.
pub async fn tell(stream: &mut Stream, version: Version, visitor: &Visitor, extras: Extras<'_>) -> Result<(), Error> {
    tell_of_tls(stream, version, visitor, extras, None).await
}

/// Tells an origin that the connection is our own, of no visitor (§2.1, `UNKNOWN`;
/// §2.2, `LOCAL`).
///
/// # Errors
/// As of `tell`.
pub async fn tell_of_none(stream: &mut Stream, version: Version) -> Result<(), Error> {
    send(stream, &none(version)).await
}

fn none(version: Version) -> Vec<u8> {
    match version {
        Version::V1 => b"PROXY UNKNOWN\r\n".to_vec(),
        Version::V2 => [SIGNATURE.as_slice(), &[0x20, 0, 0, 0]].concat(),
    }
}

/// The same of a visitor whose TLS ended here.
///
/// # Errors
/// As of `tell`.
pub async fn tell_of_tls(
    stream: &mut Stream,
    version: Version,
    visitor: &Visitor,
    extras: Extras<'_>,
    ssl: Option<Ssl<'_>>,
) -> Result<(), Error> {
    let told = Told { source: visitor.addr, destination: visitor.local };
    send(stream, &write(version, told, extras, ssl)).await
}

async fn send(stream: &mut Stream, header: &[u8]) -> Result<(), Error> {
    let written = async {
        stream.write_all(header).await?;
        stream.flush().await
    };
    // Fits any window: it waits where the session itself is stuck, and no longer.
    match tokio::time::timeout(TELL, written).await {
        Ok(written) => written.map_err(|error| Error::within(&error).unwrap_or(Error::OriginReset)),
        Err(_) => Err(Error::TunnelSilent),
    }
}

/// The time in which a session must take a header.
const TELL: Duration = Duration::from_secs(10);

/// A new name for a connection: 16 random bytes in hex.
pub fn unique_id() -> [u8; 32] {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let mut bits = [0u8; 16];
    // Fails only where the system has no randomness at all; it is no secret.
    let _ = aws_lc_rs::rand::fill(&mut bits);
    let mut id = [0; 32];
    for (pair, byte) in id.chunks_exact_mut(2).zip(bits) {
        for (digit, half) in pair.iter_mut().zip([byte >> 4, byte & 15]) {
            *digit = HEX.get(usize::from(half)).copied().unwrap_or(b'0');
        }
    }
    id
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::net::TcpListener;

    use super::*;

    fn told(source: &str, destination: &str) -> Told {
        Told { source: source.parse().unwrap(), destination: destination.parse().unwrap() }
    }

    /// What is read of these bytes, sent in such pieces; and what is left.
    async fn reads(bytes: &[u8], step: usize) -> (io::Result<Option<Told>>, Vec<u8>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        near.set_nodelay(true).unwrap();
        let (mut far, _) = listener.accept().await.unwrap();
        let bytes = bytes.to_vec();
        let sending = tokio::spawn(async move {
            for piece in bytes.chunks(step) {
                if near.write_all(piece).await.is_err() {
                    return;
                }
                tokio::task::yield_now().await;
            }
            let _ = near.shutdown().await;
        });
        let read = tokio::time::timeout(Duration::from_secs(5), read(&mut far)).await.expect("it hangs");
        let mut rest = Vec::new();
        let _ = far.read_to_end(&mut rest).await;
        sending.await.unwrap();
        (read, rest)
    }

    const SSL: Ssl<'_> = Ssl {
        version: Some("TLSv1.3"),
        cipher: Some("TLS_AES_128_GCM_SHA256"),
        certified: true,
        common_name: Some("ann"),
    };

    #[test]
    fn the_checksum_is_crc32c_and_no_changed_bit_passes() {
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8A91_36AA);
        let told = told("203.0.113.7:40000", "192.0.2.1:443");
        let whole = write(Version::V2, told, Extras { unique_id: b"id", ..Extras::default() }, Some(SSL));
        let (_, rest) = whole.split_at(16);
        assert_eq!(parse_v2(0x21, 0x11, rest), Some(Some(told)));
        for bit in 0..rest.len() * 8 {
            let mut changed = rest.to_vec();
            changed[bit / 8] ^= 1 << (bit % 8);
            // Of these the checksum's own type would leave nothing to be checked.
            let own_type = bit / 8 == rest.len() - 7;
            assert!(own_type || parse_v2(0x21, 0x11, &changed).is_none(), "bit {bit}");
        }
    }

    /// Byte by byte, as §2.2.6 has it.
    #[test]
    fn tls_and_a_certificate_are_told_in_pp2_type_ssl() {
        let sub = |kind: u8, text: &str| [&[kind, 0, u8::try_from(text.len()).unwrap()], text.as_bytes()].concat();
        let version_and_cipher = (sub(0x21, "TLSv1.3"), sub(0x23, "TLS_AES_128_GCM_SHA256"));
        let (version, cipher) = &version_and_cipher;
        assert_eq!(SSL.value(), [&[7, 0, 0, 0, 0], &version[..], &sub(0x22, "ann"), cipher].concat());
        let none = Ssl { certified: false, common_name: None, ..SSL };
        assert_eq!(none.value(), [&[1, 0, 0, 0, 1], &version[..], cipher].concat());
        let long = "a".repeat(NAME_MAX + 1);
        for odd in ["ann\0.evil", "ann\nx", long.as_str()] {
            let odd = Ssl { common_name: Some(odd), ..SSL };
            assert_eq!(odd.value(), [&[7, 0, 0, 0, 0], &version[..], cipher].concat());
        }
    }

    #[tokio::test]
    async fn a_header_is_read_and_not_one_byte_more() {
        let four = told("203.0.113.7:40000", "192.0.2.1:443");
        let six = told("[2001:db8::7]:40000", "[2001:db8::1]:443");
        let extras = Extras { alpn: Some(b"h2"), authority: Some("web.test"), unique_id: b"id" };
        for (version, told) in [(Version::V1, four), (Version::V1, six), (Version::V2, four), (Version::V2, six)] {
            for step in [1, 5, 1000] {
                let bytes = [write(version, told, extras, Some(SSL)), b"PROXY is what follows\n".to_vec()].concat();
                let (read, rest) = reads(&bytes, step).await;
                assert_eq!((read.unwrap(), rest.as_slice()), (Some(told), b"PROXY is what follows\n".as_slice()));
            }
        }
        let ours = [Version::V1, Version::V2].map(|version| [none(version).as_slice(), b"x"].concat());
        let unknown = b"PROXY UNKNOWN whatever there is\r\nx".to_vec();
        for bytes in ours.into_iter().chain([unknown]) {
            let (read, rest) = reads(&bytes, 3).await;
            assert_eq!((read.unwrap(), rest.as_slice()), (None, b"x".as_slice()));
        }
    }

    #[tokio::test]
    async fn whatever_else_comes_is_malformed_or_cut_off() {
        let v2 = |command: u8, family: u8, len: u16, rest: &[u8]| {
            [SIGNATURE.as_slice(), &[command, family], &len.to_be_bytes(), rest].concat()
        };
        let long = format!("PROXY TCP4 {}", "1".repeat(200)).into_bytes();
        for bytes in [
            b"GET / HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(),
            b"PROXY TCP4 203.0.113.7 192.0.2.1 1 2\n".to_vec(),
            b"PROXY TCP4 203.0.113.7 192.0.2.1 1\r\n".to_vec(),
            b"PROXY TCP4 203.0.113.7 192.0.2.1 1 2 3\r\n".to_vec(),
            b"PROXY TCP4 203.0.113.7 192.0.2.1 +1 2\r\n".to_vec(),
            b"PROXY TCP4 203.0.113.7 192.0.2.1 01 2\r\n".to_vec(),
            b"PROXY TCP4 203.0.113.7 192.0.2.1 1 65536\r\n".to_vec(),
            b"PROXY TCP4 203.0.113.7  192.0.2.1 1 2\r\n".to_vec(),
            b"PROXY TCP4 2001:db8::1 2001:db8::2 1 2\r\n".to_vec(),
            b"PROXY TCP6 203.0.113.7 192.0.2.1 1 2\r\n".to_vec(),
            b"PROXY UDP4 203.0.113.7 192.0.2.1 1 2\r\n".to_vec(),
            b"proxy TCP4 203.0.113.7 192.0.2.1 1 2\r\n".to_vec(),
            long,
            v2(0x22, 0x11, 12, &[0; 12]),
            v2(0x11, 0x11, 12, &[0; 12]),
            v2(0x21, 0x41, 12, &[0; 12]),
            v2(0x21, 0x11, 11, &[0; 11]),
            v2(0x21, 0x21, 12, &[0; 12]),
            v2(0x21, 0x11, 14, &[0; 14]),
            v2(0x21, 0x11, 16, &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 2, 9]),
            v2(0x21, 0x11, 5000, &[0; 5000]),
            v2(0x21, 0x11, 100, &[0; 12]),
            b"PROXY".to_vec(),
            SIGNATURE.to_vec(),
        ] {
            assert!(reads(&bytes, 1000).await.0.is_err(), "{:?}", String::from_utf8_lossy(&bytes));
        }
    }

    #[test]
    fn families_are_not_mixed() {
        let mixed = told("203.0.113.7:1", "[2001:db8::1]:2");
        let line = write(Version::V1, mixed, Extras::default(), None);
        assert_eq!(line, b"PROXY TCP6 ::ffff:203.0.113.7 2001:db8::1 1 2\r\n");
        assert!(parse_v1(&line).is_some());
        assert_eq!(write(Version::V2, mixed, Extras::default(), None)[13], 0x21);
        assert_ne!(unique_id(), unique_id());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(line in prop::collection::vec(any::<u8>(), 0..120), command: u8, family: u8) {
            let _ = parse_v1(&line);
            let _ = parse_v1(&[b"PROXY TCP4 ".as_slice(), &line, b"\r\n"].concat());
            let _ = parse_v2(command, family, &line);
            let _ = parse_v2(0x21, 0x11, &line);
        }
    }
}
