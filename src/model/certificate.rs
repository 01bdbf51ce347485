//! TLS certificates and the keys of session tickets.

use std::fmt;
use std::str::FromStr;

use serde_json::{Map, Value, json};

use super::{CertificateId, head, record};
use crate::fields::{Base64, Fields, Mistake};
use crate::text_field;

/// A TLS certificate with its key, chosen by its leaf's subjectAltNames.
#[derive(Clone, PartialEq)]
pub struct Certificate {
    /// Its id.
    pub id: CertificateId,
    /// PEM, leaf first.
    pub chain_pem: String,
    /// PEM; never logged, never answered in an error.
    pub key_pem: String,
    /// An OCSP response for the leaf (DER, RFC 6960), shown to visitors while
    /// it lasts.
    pub ocsp: Option<Base64>,
    /// Fields this version does not know, kept as they came.
    pub extra: Map<String, Value>,
}

impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificate").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Certificate {
    /// Reads a record; `id` is the one it is stored under. That chain and key
    /// are well-formed and belong together is checked where TLS is at hand
    /// (`tls::check`).
    ///
    /// # Errors
    /// Every mistake of the record.
    pub fn from_record(id: &CertificateId, record: Map<String, Value>) -> Result<Self, Vec<Mistake>> {
        let mut f = Fields::new(record);
        head(&mut f, id);
        let chain_pem: Option<String> = f.required("chain_pem");
        let key_pem: Option<String> = f.required("key_pem");
        let ocsp = f.optional("ocsp");
        let mistakes = f.mistakes();
        let extra = f.rest();
        match (chain_pem, key_pem) {
            (Some(chain_pem), Some(key_pem)) if mistakes.is_empty() => {
                Ok(Self { id: id.clone(), chain_pem, key_pem, ocsp, extra })
            }
            _ => Err(mistakes),
        }
    }

    /// The record as stored; `from_record` takes it back.
    pub fn to_record(&self) -> Map<String, Value> {
        record(
            &self.extra,
            json!({
                "v": 1,
                "id": self.id.as_str(),
                "chain_pem": self.chain_pem,
                "key_pem": self.key_pem,
                "ocsp": self.ocsp.as_ref().map(Base64::to_string),
            }),
        )
    }
}

/// The id of the ticket keys: there is one record of them, `default`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TicketKeysId;

impl FromStr for TicketKeysId {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        (text == "default").then_some(Self).ok_or("is not \"default\", the one record of its kind")
    }
}

impl fmt::Display for TicketKeysId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("default")
    }
}
text_field!(TicketKeysId, "\"default\"");

/// The secrets that TLS session tickets of all nodes are made from.
#[derive(Clone, PartialEq)]
pub struct TicketKeys {
    /// Its id.
    pub id: TicketKeysId,
    /// 1 to 8 secrets of 32 to 256 bytes: the first makes tickets, each one
    /// reads those that were made from it.
    pub keys: Vec<Base64>,
    /// Fields this version does not know, kept as they came.
    pub extra: Map<String, Value>,
}

impl fmt::Debug for TicketKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TicketKeys").field("keys", &self.keys.len()).finish_non_exhaustive()
    }
}

impl TicketKeys {
    /// Reads a record; `id` is the one it is stored under.
    ///
    /// # Errors
    /// Every mistake of the record; never a byte of a key.
    pub fn from_record(id: &TicketKeysId, record: Map<String, Value>) -> Result<Self, Vec<Mistake>> {
        let mut f = Fields::new(record);
        head(&mut f, id);
        let keys: Vec<Base64> = f.required("keys").unwrap_or_default();
        if !f.mistakes().iter().any(|m| m.at == "keys") && !(1..=8).contains(&keys.len()) {
            let problem = format!("holds {} keys", keys.len());
            f.mistake("keys", problem, "write 1 to 8, first the one that makes tickets".into());
        }
        for (i, key) in keys.iter().enumerate() {
            let fix = "write 32 random bytes, as `openssl rand -base64 32` makes them";
            if !(32..=256).contains(&key.0.len()) {
                f.mistake(&format!("keys[{i}]"), format!("has {} bytes", key.0.len()), fix.into());
            }
            if keys.iter().take(i).any(|earlier| earlier == key) {
                f.mistake(&format!("keys[{i}]"), "is there twice".into(), fix.into());
            }
        }
        let mistakes = f.mistakes();
        let extra = f.rest();
        if mistakes.is_empty() { Ok(Self { id: *id, keys, extra }) } else { Err(mistakes) }
    }

    /// The record as stored; `from_record` takes it back.
    pub fn to_record(&self) -> Map<String, Value> {
        let keys: Vec<String> = self.keys.iter().map(Base64::to_string).collect();
        record(&self.extra, json!({ "v": 1, "id": self.id.to_string(), "keys": keys }))
    }
}
