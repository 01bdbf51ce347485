//! Composition root: builds every part, hands each its handles, runs, drains.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use crate::config::Config;

/// Why the node ended other than by being told to.
#[derive(Debug)]
pub enum Failure {
    /// A listener of the settings could not be opened.
    Listen {
        /// The key that names it: `ingress.https`.
        key: &'static str,
        /// The address wanted.
        addr: SocketAddr,
        /// What the system said.
        error: io::Error,
    },
    /// The state folder cannot be used.
    State {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// Anything else that keeps the node from starting.
    Start(String),
    /// The node ran and then failed.
    Run(String),
}

impl Failure {
    /// Whether the node never became ready.
    pub fn at_start(&self) -> bool {
        !matches!(self, Failure::Run(_))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Listen { key, addr, error } => {
                write!(f, "cannot listen on {addr} ({key}): {error}; ")?;
                match error.kind() {
                    io::ErrorKind::AddrInUse => write!(f, "stop what holds the port or change {key}"),
                    io::ErrorKind::PermissionDenied => {
                        write!(f, "ports below 1024 need CAP_NET_BIND_SERVICE; grant it or change {key}")
                    }
                    io::ErrorKind::AddrNotAvailable => {
                        write!(f, "this machine does not have that address; change {key}")
                    }
                    _ => write!(f, "change {key}"),
                }
            }
            Failure::State { path, error } => write!(
                f,
                "cannot use the state folder {}: {error}; make it writable, or name another by --state or node.state",
                path.display()
            ),
            Failure::Start(why) | Failure::Run(why) => f.write_str(why),
        }
    }
}

impl std::error::Error for Failure {}

/// Runs the node until it is told to stop (SIGTERM, SIGINT) and has drained.
///
/// # Errors
/// Why it could not start, or what broke it.
pub async fn run(config: Config) -> Result<(), Failure> {
    let _ = config;
    Err(Failure::Start("this build has no node yet".into()))
}
