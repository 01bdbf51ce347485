//! Why a record was not written or read; by field where it is the record's fault.

use std::fmt;

use crate::feed::{ReadError, WriteError};
use crate::fields::Mistake;
use crate::model::TunnelId;

/// Why a record was not written or read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RecordError {
    /// The record itself is wrong.
    Mistakes(Vec<Mistake>),
    /// Names or ports belong to others; each with its field.
    Taken(Vec<Mistake>),
    /// The condition does not hold.
    Precondition {
        /// The revision it has; `None`: it does not exist.
        rev: Option<u64>,
    },
    /// There is no such record.
    NotFound,
    /// The socket is named by tunnels.
    InUse(Vec<TunnelId>),
    /// What is stored cannot be read by this version.
    Unreadable(Vec<Mistake>),
    /// Too many writers at once; nothing was written.
    Contended,
    /// The feed did not write.
    Write(WriteError),
    /// The feed did not read.
    Read(ReadError),
}

impl fmt::Display for RecordError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |f: &mut fmt::Formatter<'_>, mistakes: &[Mistake]| {
            let all: Vec<String> = mistakes.iter().map(ToString::to_string).collect();
            f.write_str(&all.join("; "))
        };
        match self {
            Self::Mistakes(mistakes) | Self::Taken(mistakes) => list(f, mistakes),
            Self::Precondition { rev: Some(rev) } => write!(f, "the record is at revision {rev}"),
            Self::Precondition { rev: None } => f.write_str("the record does not exist"),
            Self::NotFound => f.write_str("there is no such record"),
            Self::InUse(tunnels) => {
                let ids: Vec<&str> = tunnels.iter().map(TunnelId::as_str).collect();
                write!(f, "tunnels still name this socket: {}", ids.join(", "))
            }
            Self::Unreadable(mistakes) => {
                f.write_str("the stored record cannot be read by this version: ")?;
                list(f, mistakes)
            }
            Self::Contended => f.write_str("too many writers at once"),
            Self::Write(error) => error.fmt(f),
            Self::Read(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for RecordError {}

impl From<ReadError> for RecordError {
    fn from(error: ReadError) -> Self {
        Self::Read(error)
    }
}

pub(super) fn mistake(at: impl Into<String>, problem: impl Into<String>, fix: impl Into<String>) -> Mistake {
    Mistake { at: at.into(), problem: problem.into(), fix: fix.into() }
}
