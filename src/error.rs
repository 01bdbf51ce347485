//! Why a visit failed, in one table: whose fault, the metric label, the HTTP
//! status, the log level. Codecs and stores have small errors of their own and
//! convert at their module's door.

use std::fmt;
use std::io;

use tracing::Level;

/// Whose fault a failed visit is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    /// The visitor's: bad bytes, too slow, gone, over a limit.
    Visitor,
    /// The service behind the tunnel.
    Origin,
    /// The SSH session that carries the tunnel, or that there is none.
    Tunnel,
    /// Ours.
    Node,
}

macro_rules! errors {
    ($($(#[$doc:meta])* $name:ident: $fault:ident, $label:literal, $status:literal, $level:ident, $text:literal;)*) => {
        /// Why a visit failed.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Error {
            $($(#[$doc])* $name,)*
        }

        impl Error {
            /// Every reason, for docs and metrics.
            pub const ALL: &'static [Error] = &[$(Error::$name,)*];

            /// Whose fault it is.
            pub fn fault(self) -> Fault {
                match self { $(Error::$name => Fault::$fault,)* }
            }
            /// The metric label and log word: a short stable identifier.
            pub fn label(self) -> &'static str {
                match self { $(Error::$name => $label,)* }
            }
            /// The HTTP status that tells the visitor, where HTTP is spoken.
            pub fn status(self) -> u16 {
                match self { $(Error::$name => $status,)* }
            }
            /// The level at which one such visit is logged.
            pub fn level(self) -> Level {
                match self { $(Error::$name => Level::$level,)* }
            }
            /// One sentence for people; says nothing about other tenants.
            pub fn text(self) -> &'static str {
                match self { $(Error::$name => $text,)* }
            }
        }
    };
}

errors! {
    /// No socket answers to this name.
    NoSocket: Visitor, "no_socket", 404, DEBUG, "Nothing is published here.";
    /// The name asked for is not one that this TLS connection was made for (RFC 9110 §15.5.20).
    Misdirected: Visitor, "misdirected", 421, DEBUG, "This connection does not serve that name.";
    /// The request itself is malformed.
    BadRequest: Visitor, "bad_request", 400, DEBUG, "The request is malformed.";
    /// The request's head is larger than the limit.
    HeadTooLarge: Visitor, "head_too_large", 431, DEBUG, "The request's header is too large.";
    /// The visitor sent no complete first bytes within the deadline.
    HelloTimeout: Visitor, "hello_timeout", 408, DEBUG, "The connection said nothing in time.";
    /// The first bytes are no protocol that is served here.
    HelloUnknown: Visitor, "hello_unknown", 400, DEBUG, "This protocol is not served here.";
    /// A proxy's connection begins with no PROXY protocol header, or a malformed one.
    ProxyHeader: Visitor, "proxy_header", 400, DEBUG, "The connection does not say whom it is from.";
    /// The TLS handshake failed or timed out.
    TlsHandshake: Visitor, "tls_handshake", 400, DEBUG, "The TLS handshake failed.";
    /// The visitor's certificate is not one that may come, or there is none.
    ClientCertificate: Visitor, "client_certificate", 403, DEBUG, "Your certificate is not accepted here.";
    /// The socket's rules keep this visitor out.
    Forbidden: Visitor, "forbidden", 403, DEBUG, "You may not visit this service.";
    /// The visitor went away or reset the connection.
    VisitorGone: Visitor, "visitor_gone", 499, DEBUG, "The visitor went away.";
    /// The visitor stopped reading while it held up its tunnel.
    VisitorStalled: Visitor, "visitor_stalled", 499, DEBUG, "The visitor stopped reading.";
    /// Too many connections from this address.
    VisitorLimit: Visitor, "visitor_limit", 429, DEBUG, "Too many connections from this address.";
    /// Whoever asks must say who they are.
    Unauthorized: Visitor, "unauthorized", 401, DEBUG, "You have to log in to visit this service.";
    /// More passwords came than are looked at.
    TooManyLogins: Visitor, "too_many_logins", 429, DEBUG, "Too many logins were tried. Wait a moment.";
    /// It was let in, and no longer passes the gate.
    GateClosed: Visitor, "gate_closed", 403, DEBUG, "You may no longer visit this service.";
    /// Nothing moved for the idle limit.
    Idle: Visitor, "idle", 408, DEBUG, "Nothing was sent for too long.";
    /// The socket has all the connections it may have.
    SocketLimit: Tunnel, "socket_limit", 503, INFO, "This service has too many connections.";
    /// The tunnel has all the connections it may have.
    TunnelLimit: Tunnel, "tunnel_limit", 503, INFO, "This service has too many connections.";
    /// The socket is known, and no tunnel serves it now.
    NoTunnel: Tunnel, "no_tunnel", 503, INFO, "This service is not connected at the moment.";
    /// The tunnel's client did not answer the request to open a connection.
    TunnelSilent: Tunnel, "tunnel_silent", 504, INFO, "The tunnel to this service does not answer.";
    /// The tunnel's SSH session ended in the middle of the visit.
    TunnelLost: Tunnel, "tunnel_lost", 502, INFO, "The tunnel to this service was lost.";
    /// The origin refused the connection.
    OriginRefused: Origin, "origin_refused", 502, INFO, "The service behind the tunnel refused the connection.";
    /// The origin accepted and then sent nothing within the deadline.
    OriginSilent: Origin, "origin_silent", 504, INFO, "The service behind the tunnel did not answer in time.";
    /// The origin broke off in the middle of an answer.
    OriginReset: Origin, "origin_reset", 502, INFO, "The service behind the tunnel broke off the connection.";
    /// TLS to the origin failed.
    OriginTls: Origin, "origin_tls", 502, INFO, "TLS to the service behind the tunnel failed.";
    /// What the origin answered is not HTTP.
    OriginProtocol: Origin, "origin_protocol", 502, INFO, "The service behind the tunnel did not answer in HTTP.";
    /// The node is shutting down.
    Draining: Node, "draining", 503, INFO, "This node is shutting down.";
    /// The node has all the connections it may have.
    NodeLimit: Node, "node_limit", 503, WARN, "This node has too many connections.";
    /// The socket asks for logins, and this node cannot serve them.
    GateUnready: Node, "gate_unready", 503, ERROR, "Logging in is not possible at the moment.";
    /// A fault of this program.
    Internal: Node, "internal", 500, ERROR, "Something went wrong at the edge.";
}

impl Fault {
    /// The word for it in logs, metrics and our own pages.
    pub fn as_str(self) -> &'static str {
        match self {
            Fault::Visitor => "visitor",
            Fault::Origin => "origin",
            Fault::Tunnel => "tunnel",
            Fault::Node => "node",
        }
    }
}

impl Error {
    /// This reason as an I/O error, for streams that know why they broke.
    pub fn into_io(self, kind: io::ErrorKind) -> io::Error {
        io::Error::new(kind, self)
    }

    /// The reason that a stream gave for breaking, if it knew one: looked for in
    /// an error and all that caused it.
    pub fn within(error: &(dyn std::error::Error + 'static)) -> Option<Self> {
        let mut next = Some(error);
        while let Some(error) = next {
            // An I/O error's source is its content's source: look inside.
            if let Some(known) = error.downcast_ref() {
                return Some(*known);
            }
            next = match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
                Some(inside) => Some(inside),
                None => error.source(),
            };
        }
        None
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

impl std::error::Error for Error {}

/// An error with its causes, in one line.
pub(crate) struct Chain<'a>(pub(crate) &'a (dyn std::error::Error + 'static));

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_found_inside_what_it_caused() {
        let inner = Error::TunnelLost.into_io(io::ErrorKind::ConnectionReset);
        assert_eq!(Error::within(&inner), Some(Error::TunnelLost));
        assert_eq!(Error::within(&io::Error::other(inner)), Some(Error::TunnelLost));
        assert_eq!(Error::within(&io::Error::from(io::ErrorKind::ConnectionReset)), None);
    }
}
