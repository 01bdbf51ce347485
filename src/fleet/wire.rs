//! What two nodes say to each other before, and beside, visitors' bytes: frames with
//! a version, each field with its length. A connection begins with `Hello`. It is a
//! link, of frames alone; or it waits for an `Open`, and after the answer to that it is
//! the visitor's, and bare. Pure, but for
//! reading one frame and not a byte more.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use bytes::{Buf, BufMut, TryGetError};
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::error::Error;
use crate::model::{NodeId, SocketId, TunnelId, Visitor};

/// What every frame begins with, before version, kind and the body's length (2
/// bytes): no other protocol that comes to a port does.
const MAGIC: [u8; 4] = *b"adit";
/// This version. What a later one adds goes behind what this one reads.
pub(super) const VERSION: u8 = 1;
const HEAD: usize = 8;
/// The longest body, in bytes.
const BODY_MAX: usize = 4096;

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Frame {
    /// Asks for a stream to a tunnel that is logged in at the asked node: it is opened
    /// there or refused, and never passed on.
    Open(Open),
    /// What a connection begins with: a link of pings and lines follows, or it waits
    /// for an `Open`.
    Hello {
        /// Who comes.
        from: NodeId,
        /// Whether it is a link.
        link: bool,
    },
    /// The stream is open: what follows is the visitor's and the origin's.
    Opened {
        /// How long the origin took.
        took: Duration,
    },
    /// The tunnel is not logged in here.
    NotHere {
        /// Where it was seen last, if elsewhere.
        hint: Option<NodeId>,
    },
    /// It is here, and could not be opened.
    Failed(Error),
    /// Are you there?
    Ping(u64),
    /// I am.
    Pong {
        /// Of which ping.
        of: u64,
        /// Whether it takes no new streams before long.
        draining: bool,
        /// The share of others' visitors, in percent, that had better go elsewhere:
        /// it has more to do than it can. Versions before it say nothing: 0.
        spare: u8,
    },
    /// How far the others are from the one who says it.
    Trips(Vec<(NodeId, Duration)>),
    /// A line for whoever owns a tunnel.
    Line {
        /// The tunnel.
        tunnel: TunnelId,
        /// The line, without its end.
        text: String,
    },
}

/// What a node must know of a visitor whom it takes to a tunnel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Open {
    /// The tunnel.
    pub(super) tunnel: TunnelId,
    /// The order of the login that it is asked for by.
    pub(super) login: u64,
    /// The socket that the visitor came to.
    pub(super) socket: SocketId,
    /// Who it is, and where they came in.
    pub(super) visitor: Visitor,
    /// What the visit is called in logs.
    pub(super) id: String,
}

/// Bytes that are no frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Malformed;

impl From<TryGetError> for Malformed {
    fn from(_: TryGetError) -> Self {
        Self
    }
}

impl From<Malformed> for io::Error {
    fn from(_: Malformed) -> Self {
        io::Error::new(io::ErrorKind::InvalidData, "not what a node says")
    }
}

impl Frame {
    /// The frame's bytes.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEAD + 160);
        out.put_slice(&MAGIC);
        out.put_u8(VERSION);
        out.put_u8(self.kind());
        out.put_u16(0);
        match self {
            Self::Open(open) => {
                text(&mut out, open.tunnel.as_str());
                out.put_u64(open.login);
                text(&mut out, open.socket.as_str());
                address(&mut out, open.visitor.addr);
                address(&mut out, open.visitor.local);
                text(&mut out, &open.id);
            }
            Self::Hello { from, link } => {
                text(&mut out, from.as_str());
                out.put_u8(u8::from(*link));
            }
            Self::Opened { took } => out.put_u64(u64::try_from(took.as_micros()).unwrap_or(u64::MAX)),
            Self::NotHere { hint } => text(&mut out, hint.as_ref().map_or("", NodeId::as_str)),
            Self::Failed(error) => text(&mut out, error.label()),
            Self::Ping(of) => out.put_u64(*of),
            Self::Pong { of, draining, spare } => {
                out.put_u64(*of);
                out.put_u8(u8::from(*draining));
                out.put_u8(*spare);
            }
            Self::Trips(trips) => {
                // Each within 141 bytes; what has no room is told nobody.
                let room = (BODY_MAX - 2) / 141;
                out.put_u16(u16::try_from(trips.len().min(room)).unwrap_or(0));
                for (node, trip) in trips.iter().take(room) {
                    text(&mut out, node.as_str());
                    out.put_u64(u64::try_from(trip.as_micros()).unwrap_or(u64::MAX));
                }
            }
            Self::Line { tunnel, text: line } => {
                text(&mut out, tunnel.as_str());
                text(&mut out, line);
            }
        }
        let len = u16::try_from(out.len() - HEAD).unwrap_or(u16::MAX);
        if let Some(place) = out.get_mut(6..HEAD) {
            place.copy_from_slice(&len.to_be_bytes());
        }
        out
    }

    fn kind(&self) -> u8 {
        match self {
            Self::Open(_) => 1,
            Self::Hello { .. } => 2,
            Self::Opened { .. } => 3,
            Self::NotHere { .. } => 4,
            Self::Failed(_) => 5,
            Self::Ping(_) => 6,
            Self::Pong { .. } => 7,
            Self::Line { .. } => 8,
            Self::Trips(_) => 9,
        }
    }

    /// Reads a body. `None`: of a kind that this version does not know.
    ///
    /// # Errors
    /// It is not of its kind.
    fn from_body(kind: u8, mut body: &[u8]) -> Result<Option<Self>, Malformed> {
        let body = &mut body;
        Ok(Some(match kind {
            1 => Self::Open(Open {
                tunnel: name(body)?,
                login: body.try_get_u64()?,
                socket: name(body)?,
                visitor: Visitor::new(read_address(body)?, read_address(body)?),
                id: read_text(body)?.to_owned(),
            }),
            2 => Self::Hello { from: name(body)?, link: body.try_get_u8()? != 0 },
            3 => Self::Opened { took: Duration::from_micros(body.try_get_u64()?) },
            4 => match read_text(body)? {
                "" => Self::NotHere { hint: None },
                hint => Self::NotHere { hint: Some(hint.parse().map_err(|_| Malformed)?) },
            },
            5 => Self::Failed(failure(read_text(body)?)),
            6 => Self::Ping(body.try_get_u64()?),
            7 => Self::Pong {
                of: body.try_get_u64()?,
                draining: body.try_get_u8()? != 0,
                spare: body.try_get_u8().unwrap_or(0).min(100),
            },
            9 => {
                let count = body.try_get_u16()?;
                let mut trip = || Ok((name(body)?, Duration::from_micros(body.try_get_u64()?)));
                Self::Trips((0..count).map(|_| trip()).collect::<Result<_, Malformed>>()?)
            }
            8 => Self::Line { tunnel: name(body)?, text: read_text(body)?.to_owned() },
            _ => return Ok(None),
        }))
    }

    /// Reads the next frame of a kind that this version knows.
    ///
    /// # Errors
    /// Those of the stream; `InvalidData` for what is no frame of this version.
    ///
    /// # Cancel safety
    /// Not cancel safe: the stream is of no use afterwards.
    pub(super) async fn read(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Self> {
        let mut body = [0; BODY_MAX];
        loop {
            let mut head = [0; HEAD];
            from.read_exact(&mut head).await?;
            let [m0, m1, m2, m3, version, kind, len @ ..] = head;
            let body = body.get_mut(..usize::from(u16::from_be_bytes(len))).ok_or(Malformed)?;
            if [m0, m1, m2, m3] != MAGIC || version != VERSION {
                return Err(Malformed.into());
            }
            from.read_exact(body).await?;
            if let Some(frame) = Self::from_body(kind, body)? {
                return Ok(frame);
            }
        }
    }

    /// Whether a connection's first byte may be a frame's, and not that of TLS.
    pub(super) fn begins_with(byte: u8) -> bool {
        byte == MAGIC[0]
    }
}

/// At most as much of a text as has room.
fn text(out: &mut Vec<u8>, text: &str) {
    let mut end = text.len().min(BODY_MAX - 512);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    out.put_u16(u16::try_from(end).unwrap_or(0));
    out.put_slice(text.get(..end).unwrap_or_default().as_bytes());
}

fn read_text<'a>(body: &mut &'a [u8]) -> Result<&'a str, Malformed> {
    let len = usize::from(body.try_get_u16()?);
    let (text, rest) = body.split_at_checked(len).ok_or(Malformed)?;
    *body = rest;
    std::str::from_utf8(text).map_err(|_| Malformed)
}

fn name<T: std::str::FromStr>(body: &mut &[u8]) -> Result<T, Malformed> {
    read_text(body)?.parse().map_err(|_| Malformed)
}

/// 16 bytes, IPv4 mapped, and the port.
fn address(out: &mut Vec<u8>, addr: SocketAddr) {
    let ip = match addr.ip() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    };
    out.put_slice(&ip.octets());
    out.put_u16(addr.port());
}

fn read_address(body: &mut &[u8]) -> Result<SocketAddr, Malformed> {
    let ip = Ipv6Addr::from(body.try_get_u128()?);
    Ok(SocketAddr::new(ip.into(), body.try_get_u16()?))
}

/// Why a tunnel could not be opened: what a node may be told by another one.
fn failure(label: &str) -> Error {
    let told = [
        Error::OriginRefused,
        Error::TunnelSilent,
        Error::TunnelLost,
        Error::TunnelLimit,
        Error::NodeLimit,
        Error::Draining,
    ];
    told.into_iter().find(|error| error.label() == label).unwrap_or(Error::TunnelLost)
}

/// What the fuzzer asserts: any bytes are a frame or an error, and a frame that is
/// written is read as what it was.
#[doc(hidden)]
pub fn fuzz(data: &[u8]) {
    let Some((kind, body)) = data.split_first() else { return };
    if let Ok(Some(frame)) = Frame::from_body(*kind, body) {
        let bytes = frame.to_bytes();
        let again = bytes.get(HEAD..).map(|body| Frame::from_body(*kind, body));
        // A text that was cut to what has room is another one.
        if body.len() < BODY_MAX - 512 {
            assert_eq!(again, Some(Ok(Some(frame))));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn open() -> Open {
        Open {
            tunnel: "web-1".parse().unwrap(),
            login: 7,
            socket: "web".parse().unwrap(),
            visitor: Visitor::new("192.0.2.1:5000".parse().unwrap(), "[2001:db8::1]:443".parse().unwrap()),
            id: "0af7651916cd43dd".into(),
        }
    }

    fn frames() -> Vec<Frame> {
        vec![
            Frame::Open(open()),
            Frame::Hello { from: "ams-1".parse().unwrap(), link: true },
            Frame::Opened { took: Duration::from_micros(1234) },
            Frame::NotHere { hint: None },
            Frame::NotHere { hint: Some("fra-1".parse().unwrap()) },
            Frame::Failed(Error::OriginRefused),
            Frame::Ping(9),
            Frame::Pong { of: 9, draining: true, spare: 40 },
            Frame::Trips(vec![("ams-1".parse().unwrap(), Duration::from_micros(5123))]),
            Frame::Line { tunnel: "web-1".parse().unwrap(), text: "GET / 200 ä".into() },
        ]
    }

    #[tokio::test]
    async fn what_one_node_says_the_other_reads_and_not_a_byte_more() {
        let mut said: Vec<u8> = frames().iter().flat_map(Frame::to_bytes).collect();
        said.extend_from_slice(b"GET / HTTP/1.1");
        let mut said = said.as_slice();
        for frame in frames() {
            assert_eq!(Frame::read(&mut said).await.unwrap(), frame);
        }
        assert_eq!(said, b"GET / HTTP/1.1");
    }

    #[tokio::test]
    async fn what_a_later_version_adds_is_passed_over_and_its_own_frames_are_refused() {
        let mut added = Frame::Ping(9).to_bytes();
        added.extend_from_slice(b"more");
        added[7] += 4;
        let mut unknown = Frame::Ping(1).to_bytes();
        unknown[5] = 99;
        let said = [unknown, added].concat();
        assert_eq!(Frame::read(&mut said.as_slice()).await.unwrap(), Frame::Ping(9));
        for (at, byte) in [(0, b'x'), (4, 2), (6, 0xff)] {
            let mut said = Frame::Ping(9).to_bytes();
            said[at] = byte;
            assert_eq!(Frame::read(&mut said.as_slice()).await.unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
    }

    #[test]
    fn a_line_without_end_is_cut_and_an_unknown_reason_is_one_of_ours() {
        let frame = Frame::Line { tunnel: "t".parse().unwrap(), text: "ä".repeat(9000) };
        let bytes = frame.to_bytes();
        assert!(bytes.len() <= HEAD + BODY_MAX);
        let Ok(Some(Frame::Line { text, .. })) = Frame::from_body(8, &bytes[HEAD..]) else { panic!() };
        assert!(text.len() > 3000 && text.chars().all(|c| c == 'ä'));
        assert_eq!(failure("tunnel_silent"), Error::TunnelSilent);
        assert_eq!(failure("internal"), Error::TunnelLost);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_frame_or_an_error(data in proptest::collection::vec(any::<u8>(), 0..200)) {
            fuzz(&data);
        }

        #[test]
        fn a_frame_with_a_byte_changed_is_never_a_panic(which in 0..10usize, at in 0..100usize, byte: u8) {
            let mut bytes = frames()[which].to_bytes();
            if let Some(place) = bytes.get_mut(at + 5) {
                *place = byte;
                fuzz(&bytes[5..6].iter().chain(&bytes[HEAD..]).copied().collect::<Vec<_>>());
            }
        }
    }
}
