//! What a record is: its type, where it is kept, and what reading and writing
//! it answers.

use std::fmt;
use std::str::FromStr;

use serde_json::{Map, Value};

use super::error::{RecordError, mistake};
use crate::feed::Cursor;
use crate::fields::Mistake;
use crate::model::{
    Account, AccountId, Certificate, CertificateId, Keyring, KeyringId, Provider, ProviderId, Revocation, RevocationId,
    Socket, SocketId, TicketKeys, TicketKeysId, Tunnel, TunnelId,
};

/// What must hold of a record for a write to happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Condition {
    /// Nothing.
    Any,
    /// It does not exist.
    Absent,
    /// It exists.
    Present,
    /// Its last write was this revision.
    Rev(u64),
}

impl Condition {
    pub(super) fn check(self, rev: Option<u64>) -> Result<(), RecordError> {
        let holds = match self {
            Self::Any => true,
            Self::Absent => rev.is_none(),
            Self::Present => rev.is_some(),
            Self::Rev(wanted) => rev == Some(wanted),
        };
        if holds { Ok(()) } else { Err(RecordError::Precondition { rev }) }
    }
}

/// A record that was written.
#[derive(Debug, Clone, PartialEq)]
pub struct Written<R> {
    /// As stored: names and ports filled in.
    pub record: R,
    /// The revision it has now.
    pub rev: u64,
    /// Whether it did not exist before.
    pub created: bool,
}

/// A record that was read.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored<R> {
    /// The record.
    pub record: R,
    /// The revision of its last write.
    pub rev: u64,
}

/// Some records of one type, in the order of their ids.
#[derive(Debug, Clone)]
pub struct Page<R> {
    /// The records.
    pub items: Vec<Stored<R>>,
    /// The id to go on after, if there are more.
    pub next: Option<String>,
    /// Ids of stored records that this version cannot read.
    pub unreadable: Vec<String>,
    /// The state's place in history.
    pub at: Cursor,
}

/// A type of record, by where it is kept.
pub trait Record: Sized + Clone + Send + Sync + 'static {
    /// Its id.
    type Id: FromStr<Err = &'static str> + fmt::Display + Clone + Send + Sync;
    /// Where it is kept: `<prefix><id>`.
    const PREFIX: &'static str;
    /// The word for it.
    const NOUN: &'static str;
    /// Fields, at any depth, that only one who asks for this very record is shown.
    const SECRET: &'static [&'static str];
    /// Its id.
    fn id(&self) -> &Self::Id;
    /// # Errors
    /// Every mistake of the record.
    fn from_record(id: &Self::Id, record: Map<String, Value>) -> Result<Self, Vec<Mistake>>;
    /// The record as stored.
    fn to_record(&self) -> Map<String, Value>;

    /// The key of the record with this id.
    fn key(id: &Self::Id) -> String {
        format!("{}{id}", Self::PREFIX)
    }

    /// Reads a stored value.
    ///
    /// # Errors
    /// Every mistake of the record.
    fn from_value(id: &Self::Id, value: &str) -> Result<Self, Vec<Mistake>> {
        match serde_json::from_str(value) {
            Ok(Value::Object(map)) => Self::from_record(id, map),
            Ok(_) => Err(vec![mistake("", "is not a table", "write a JSON object")]),
            Err(error) => Err(vec![mistake("", format!("is not JSON: {error}"), "write a JSON object")]),
        }
    }
}

macro_rules! record_type {
    ($t:ty, $id:ty, $prefix:literal, $noun:literal, $secret:expr) => {
        impl Record for $t {
            type Id = $id;
            const PREFIX: &'static str = $prefix;
            const NOUN: &'static str = $noun;
            const SECRET: &'static [&'static str] = $secret;
            fn id(&self) -> &$id {
                &self.id
            }
            fn from_record(id: &$id, record: Map<String, Value>) -> Result<Self, Vec<Mistake>> {
                <$t>::from_record(id, record)
            }
            fn to_record(&self) -> Map<String, Value> {
                <$t>::to_record(self)
            }
        }
    };
}
record_type!(Socket, SocketId, "cfg/sock/", "socket", &["password_hash", "token_hash"]);
record_type!(Tunnel, TunnelId, "cfg/tun/", "tunnel", &[]);
record_type!(Certificate, CertificateId, "cert/", "certificate", &["key_pem"]);
record_type!(TicketKeys, TicketKeysId, "ticket/", "ticket_keys", &["keys"]);
record_type!(Provider, ProviderId, "cfg/provider/", "provider", &["client_secret"]);
record_type!(Account, AccountId, "cfg/account/", "account", &["password_hash"]);
record_type!(Keyring, KeyringId, "cfg/keyring/", "keyring", &["secret"]);
record_type!(Revocation, RevocationId, "live/revoked/", "revocation", &[]);

/// Takes the fields out that `secret` names, at any depth.
pub fn without(record: &mut Map<String, Value>, secret: &[&str]) {
    fn strip(value: &mut Value, secret: &[&str]) {
        match value {
            Value::Object(fields) => without(fields, secret),
            Value::Array(list) => list.iter_mut().for_each(|item| strip(item, secret)),
            _ => {}
        }
    }
    record.retain(|field, _| !secret.contains(&field.as_str()));
    record.values_mut().for_each(|value| strip(value, secret));
}
