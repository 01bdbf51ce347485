//! By what somebody passed.

use std::sync::Arc;

use super::session::Session;
use crate::model::gate::TokenHash;
use crate::model::identity::PasswordHash;

/// By what somebody passed.
#[derive(Debug, Clone)]
pub enum Who {
    /// Nobody was asked.
    Nobody,
    /// A name and its password.
    User {
        /// The name.
        name: String,
        /// What the password was held against: another one since then, and they are out.
        password: PasswordHash,
    },
    /// A program's token.
    Token {
        /// The token's name.
        name: String,
        /// The same.
        hash: TokenHash,
    },
    /// A login.
    Session(Arc<Session>),
}

impl Who {
    /// The word for it in logs, metrics and towards origins.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Nobody => "open",
            Self::User { .. } => "basic",
            Self::Token { .. } => "service_token",
            Self::Session(_) => "login",
        }
    }

    /// What tells two of a kind apart.
    pub fn name(&self) -> &str {
        match self {
            Self::Nobody => "",
            Self::User { name, .. } | Self::Token { name, .. } => name,
            Self::Session(session) => &session.name,
        }
    }
}
