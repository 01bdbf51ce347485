//! What a record gets before it is written: default names, chosen ports, and
//! the checks that only this layer can make.

use std::collections::HashSet;
use std::fmt;

use super::Records;
use super::claims;
use super::error::{RecordError, mistake};
use crate::feed::Entry;
use crate::fields::Mistake;
use crate::model::{HostName, HostPattern, Socket, SocketId, SocketType, Tunnel};

/// Most names and ports of one socket: each is a key of one transaction.
const CLAIMS_MAX: usize = 100;
/// Longest SSH user name of a record; keys hold it escaped.
const USER_MAX: usize = 128;

impl Records {
    /// Fills in names and ports, and checks what only this layer knows.
    pub(super) async fn completed(&self, mut socket: Socket, old: Option<&Entry>) -> Result<Socket, RecordError> {
        let mut mistakes = Vec::new();
        if socket.kind != SocketType::Tcp && socket.hostnames.is_empty() {
            match self.default_name(&socket) {
                Ok(name) => socket.hostnames.push(name),
                Err(wrong) => mistakes.push(wrong),
            }
        }
        repeated("hostnames", &socket.hostnames, &mut mistakes);
        for (i, name) in socket.hostnames.iter().enumerate() {
            if self.settings.reserved.iter().any(|reserved| reserved.as_str() == name.as_str()) {
                let fix = "choose another name, or change gate.host or mysocket.hosts";
                mistakes.push(mistake(format!("hostnames[{i}]"), format!("\"{name}\" is the node's own"), fix));
            }
        }
        repeated("ports", &socket.ports, &mut mistakes);
        let kept = old.map(|e| claims::ports_of_record(&e.value)).unwrap_or_default();
        let range = self.settings.ports;
        for (i, port) in socket.ports.iter().enumerate() {
            // What it has already it may keep, whatever the range is today.
            if !range.contains(*port) && !kept.contains(port) {
                let problem = format!("{port} is outside the range {}", self.settings.ports);
                let fix = "choose one inside it, or leave ports out to have one chosen";
                mistakes.push(mistake(format!("ports[{i}]"), problem, fix));
            }
        }
        if !mistakes.is_empty() {
            return Err(RecordError::Mistakes(mistakes));
        }
        if !socket.kind.by_name() && socket.ports.is_empty() {
            socket.ports = if kept.is_empty() { vec![self.free_port(&socket.id).await?] } else { kept };
        }
        Ok(socket)
    }

    fn default_name(&self, socket: &Socket) -> Result<HostPattern, Mistake> {
        let at = "hostnames";
        let Some(domain) = &self.settings.domain else {
            let problem = format!("is empty, and type {} is known by name", socket.kind);
            return Err(mistake(at, problem, "write a host name, or set node.domain"));
        };
        let id = socket.id.as_str();
        let name: Option<HostName> = if id.contains(['.', '_']) { None } else { format!("{id}.{domain}").parse().ok() };
        name.map(Into::into).ok_or_else(|| {
            let problem = format!("is empty, and the id \"{id}\" cannot be a name under {domain}");
            mistake(at, problem, "write a host name, or choose an id of letters, digits and -")
        })
    }

    /// A port that nobody has; the same one for the same id while it is free.
    async fn free_port(&self, id: &SocketId) -> Result<u16, RecordError> {
        let range = self.settings.ports;
        let (_, entries) = self.feed.list(claims::PORTS).await?;
        let taken: HashSet<u16> =
            entries.iter().filter_map(|e| e.key.strip_prefix(claims::PORTS)?.parse().ok()).collect();
        let size = u64::from(range.last - range.first) + 1;
        let start = claims::stable_hash(id.as_str()) % size;
        (0..size)
            .filter_map(|i| u16::try_from(u64::from(range.first) + (start + i) % size).ok())
            .find(|port| !taken.contains(port))
            .ok_or_else(|| {
                let problem = format!("all {size} ports of the range {} are taken", self.settings.ports);
                RecordError::Taken(vec![mistake("ports", problem, "delete a socket, or widen ingress.ports")])
            })
    }
}

pub(super) fn check_user(tunnel: &Tunnel) -> Result<(), RecordError> {
    let Some(user) = &tunnel.user else { return Ok(()) };
    if user.is_empty() || user.len() > USER_MAX || user.chars().any(char::is_control) {
        let problem = "is not an SSH user name";
        let fix = format!("write 1 to {USER_MAX} bytes without control characters, or leave it out");
        return Err(RecordError::Mistakes(vec![mistake("user", problem, fix)]));
    }
    Ok(())
}

/// Records what a list names twice, and a list that is too long.
fn repeated<T: PartialEq + fmt::Display>(field: &str, items: &[T], mistakes: &mut Vec<Mistake>) {
    if items.len() > CLAIMS_MAX {
        mistakes.push(mistake(field, format!("has {} items", items.len()), format!("write at most {CLAIMS_MAX}")));
        return;
    }
    for (i, item) in items.iter().enumerate() {
        if items.iter().take(i).any(|earlier| earlier == item) {
            mistakes.push(mistake(format!("{field}[{i}]"), format!("\"{item}\" is named twice"), "name it once"));
        }
    }
}
