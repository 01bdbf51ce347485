//! Sockets and tunnels of one account: found, made, shown as clients read them, removed;
//! and keys signed for them. Written by the code that the operator's API writes by, so
//! that names and ports belong to one record in the whole fleet.

use serde_json::{Map, Value, json};

use super::wanted::{Wanted, told};
use super::{Mysocket, Refusal, certificates, names};
use crate::feed::records::{Condition, RecordError, Stored, Written};
use crate::fields::Mistake;
use crate::model::identity::Moment;
use crate::model::{Account, HostName, HostPattern, Socket, SocketId, SocketType, Tunnel, TunnelId};

/// How often another name or relay port is made up where the last was somebody's.
const TRIES: usize = 16;

impl Mysocket {
    /// All sockets of an account.
    pub(super) async fn list(&self, account: &Account) -> Result<Value, Refusal> {
        let mut shown = Vec::new();
        for id in self.records.sockets_of(account.id.as_str()).await? {
            match self.records.get::<Socket>(&id).await {
                Ok(stored) if is_of(&stored.record, account) => shown.push(self.shown(account, &stored.record).await?),
                // Gone meanwhile, or not readable by this version.
                Ok(_) | Err(RecordError::NotFound | RecordError::Unreadable(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Value::Array(shown))
    }

    /// One socket of an account; somebody else's is as none.
    pub(super) async fn socket_of(&self, account: &Account, id: &str) -> Result<Stored<Socket>, Refusal> {
        let id: SocketId = id.parse().map_err(|_| Refusal::not_found("socket"))?;
        match self.records.get::<Socket>(&id).await {
            Ok(stored) if is_of(&stored.record, account) => Ok(stored),
            Ok(_) | Err(RecordError::NotFound) => Err(Refusal::not_found("socket")),
            Err(error) => Err(error.into()),
        }
    }

    /// One tunnel of a socket of an account.
    pub(super) async fn tunnel_of(&self, socket: &Socket, id: &str) -> Result<Stored<Tunnel>, Refusal> {
        let id: TunnelId = id.parse().map_err(|_| Refusal::not_found("tunnel"))?;
        match self.records.get::<Tunnel>(&id).await {
            Ok(stored) if stored.record.socket == socket.id => Ok(stored),
            Ok(_) | Err(RecordError::NotFound) => Err(Refusal::not_found("tunnel")),
            Err(error) => Err(error.into()),
        }
    }

    /// Makes a socket, with a tunnel if asked for. The password is in this answer alone.
    pub(super) async fn make_socket(
        &self,
        account: &Account,
        wanted: Wanted,
        with_tunnel: bool,
    ) -> Result<Value, Refusal> {
        let record = self.record_of(account, &wanted).await?;
        let Written { record: socket, rev, .. } = self.claim_socket(account, record, with_tunnel).await?;
        self.applied(rev).await;
        let mut shown = self.shown(account, &socket).await?;
        if let (Value::Object(shown), Some(password)) = (&mut shown, wanted.protected_password)
            && socket.gate.as_ref().is_some_and(|gate| gate.basic.is_some())
        {
            shown.insert("protected_password".into(), password.into());
        }
        Ok(shown)
    }

    /// Writes a record under made-up names that nobody has, one after another, so that
    /// the count is right.
    async fn claim_socket(
        &self,
        account: &Account,
        record: Map<String, Value>,
        with_tunnel: bool,
    ) -> Result<Written<Socket>, Refusal> {
        let domain = self.hooks.domain.as_ref();
        let domain = domain.ok_or_else(|| Refusal::down("This node has no domain for names (node.domain)."))?;
        let _turn = self.making.lock().await;
        if self.records.sockets_of(account.id.as_str()).await?.len() >= self.settings.sockets_per_account {
            let most = self.settings.sockets_per_account;
            return Err(Refusal::conflict(&format!("You have {most} sockets, and may have no more. Delete one.")));
        }
        for _ in 0..TRIES {
            let id: SocketId = names::id().and_then(|id| id.parse().ok()).ok_or_else(Refusal::no_random)?;
            let mut socket = Socket::from_record(&id, record.clone()).map_err(told)?;
            self.check_domains(&socket, domain)?;
            if socket.kind != SocketType::Tcp {
                let name = names::label().ok_or_else(Refusal::no_random)?;
                let name: HostName = format!("{name}.{domain}")
                    .parse()
                    .map_err(|_| Refusal::down("No name fits below this node's domain."))?;
                socket.hostnames.insert(0, HostPattern::from(name));
            }
            let made = match with_tunnel {
                true => {
                    let tunnel = self.new_tunnel(account, &id)?;
                    self.records.claim_on_demand(socket, tunnel, None).await.map(|(socket, _)| socket)
                }
                false => self.records.put_socket(socket, Condition::Absent).await,
            };
            match made {
                Ok(written) => return Ok(written),
                Err(RecordError::Taken(taken)) if taken.iter().all(is_made_up) => {}
                Err(RecordError::Taken(taken)) => return Err(refused(&taken)),
                Err(RecordError::Mistakes(mistakes)) => return Err(told(mistakes)),
                Err(error) => return Err(error.into()),
            }
        }
        Err(RecordError::Contended.into())
    }

    pub(super) async fn delete_socket(&self, account: &Account, id: &str) -> Result<(), Refusal> {
        let Stored { record, rev } = self.socket_of(account, id).await?;
        let rev = self.records.delete_socket(&record.id, Condition::Rev(rev), true).await?;
        self.applied(rev).await;
        Ok(())
    }

    pub(super) async fn make_tunnel(&self, account: &Account, socket: &Socket) -> Result<Value, Refusal> {
        let Written { record: tunnel, rev, .. } = self.claim_tunnel(account, socket).await?;
        self.applied(rev).await;
        Ok(self.shown_tunnel(&tunnel))
    }

    async fn claim_tunnel(&self, account: &Account, socket: &Socket) -> Result<Written<Tunnel>, Refusal> {
        let _turn = self.making.lock().await;
        if self.records.tunnels_of(&socket.id).await?.len() >= self.settings.tunnels_per_socket {
            let most = self.settings.tunnels_per_socket;
            return Err(Refusal::conflict(&format!(
                "The socket has {most} tunnels, and may have no more. Delete one."
            )));
        }
        for _ in 0..TRIES {
            match self.records.put_tunnel(self.new_tunnel(account, &socket.id)?, Condition::Absent).await {
                Err(RecordError::Taken(_)) => {}
                made => return Ok(made?),
            }
        }
        Err(RecordError::Contended.into())
    }

    pub(super) async fn delete_tunnel(&self, tunnel: Stored<Tunnel>) -> Result<(), Refusal> {
        let rev = self.records.delete_tunnel(&tunnel.record.id, Condition::Rev(tunnel.rev)).await?;
        self.applied(rev).await;
        Ok(())
    }

    /// The tunnels of a socket, as clients read them.
    pub(super) async fn tunnels(&self, socket: &Socket) -> Result<Vec<Value>, Refusal> {
        let mut shown = Vec::new();
        for id in self.records.tunnels_of(&socket.id).await? {
            match self.records.get::<Tunnel>(&id).await {
                Ok(stored) => shown.push(self.shown_tunnel(&stored.record)),
                Err(RecordError::NotFound | RecordError::Unreadable(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(shown)
    }

    fn new_tunnel(&self, account: &Account, socket: &SocketId) -> Result<Tunnel, Refusal> {
        let id: TunnelId = names::id().and_then(|id| id.parse().ok()).ok_or_else(Refusal::no_random)?;
        let mut tunnel = Tunnel::new(id, socket.clone());
        tunnel.user = Some(account.id.to_string());
        tunnel.relay_port = Some(names::relay_port().ok_or_else(Refusal::no_random)?);
        tunnel.keys.clone_from(&account.ssh_keys);
        tunnel.cert_authorities = vec![self.authority()?.line];
        tunnel.principals = certificates::principals(&tunnel.id, socket).to_vec();
        Ok(tunnel)
    }

    /// Signs a key for these tunnels of an account, whose records then trust the CA.
    pub(super) async fn sign_key(
        &self,
        account: &Account,
        key: &str,
        (tunnels, principal): (Vec<Stored<Tunnel>>, String),
    ) -> Result<Value, Refusal> {
        let authority = self.authority()?;
        let valid = (Moment::now(), self.settings.certificate_life);
        let signed = authority.sign(key, account.id.as_str(), &[principal], valid)?;
        for Stored { record, rev } in tunnels.into_iter().filter(|one| is_tunnel_of(&one.record, account)) {
            let mut trusting = record.clone();
            trusting.cert_authorities.retain(|line| !certificates::is_ours(line));
            trusting.cert_authorities.push(authority.line.clone());
            for principal in certificates::principals(&record.id, &record.socket) {
                if !trusting.principals.contains(&principal) {
                    trusting.principals.push(principal);
                }
            }
            if trusting != record {
                let written = self.records.put_tunnel(trusting, Condition::Rev(rev)).await?;
                self.applied(written.rev).await;
            }
        }
        Ok(json!({ "signed_ssh_cert": signed }))
    }

    /// A socket as clients read it. Its password is nobody's to read.
    pub(super) async fn shown(&self, account: &Account, socket: &Socket) -> Result<Value, Refusal> {
        let gate = socket.gate.as_deref();
        let basic = gate.and_then(|gate| gate.basic.as_ref());
        let oidc = gate.and_then(|gate| gate.oidc.as_ref());
        let user = basic.and_then(|basic| basic.users.first()).map_or("", |user| user.name.as_str());
        let allowed = oidc.map(|oidc| &oidc.allow);
        let emails: Vec<&str> = allowed.iter().flat_map(|rules| &rules.emails).map(|email| email.as_str()).collect();
        let domains: Vec<String> = allowed.iter().flat_map(|rules| &rules.domains).map(ToString::to_string).collect();
        let (first, others) = socket.hostnames.split_first().map_or((None, &[][..]), |(one, rest)| (Some(one), rest));
        Ok(json!({
            "socket_id": socket.id.as_str(),
            "user_id": account.id.as_str(),
            "user_name": account.id.as_str(),
            "name": socket.title.as_deref().unwrap_or(socket.id.as_str()),
            "description": socket.description.as_deref().unwrap_or_default(),
            "dnsname": first.map_or(self.hooks.public_host.as_str(), HostPattern::as_str),
            "custom_domains": others.iter().map(HostPattern::as_str).collect::<Vec<_>>(),
            "socket_type": socket.kind.as_str(),
            "socket_tcp_ports": if socket.kind.by_name() { &self.hooks.public_ports } else { &socket.ports },
            "protected_socket": basic.is_some(),
            "protected_username": user,
            "protected_password": "",
            "cloud_authentication_enabled": oidc.is_some(),
            "cloud_authentication_email_allowed_addressses": emails,
            "cloud_authentication_email_allowed_domains": domains,
            "upstream_type": match socket.kind { SocketType::Http => "http", SocketType::Https => "https", _ => "" },
            "upstream_http_hostname": socket.upstream.host.as_deref().unwrap_or_default(),
            "tunnels": self.tunnels(socket).await?,
        }))
    }

    /// A tunnel as clients read it.
    pub(super) fn shown_tunnel(&self, tunnel: &Tunnel) -> Value {
        json!({
            "tunnel_id": tunnel.id.as_str(),
            "socket_id": tunnel.socket.as_str(),
            "local_port": tunnel.relay_port,
            "tunnel_server": (self.hooks.tunnel_server)(&tunnel.id),
        })
    }
}

/// Whether a socket is of this account.
fn is_of(socket: &Socket, account: &Account) -> bool {
    socket.owner.as_deref() == Some(account.id.as_str())
}

/// Whether a tunnel is one that this account logs in for.
pub(super) fn is_tunnel_of(tunnel: &Tunnel, account: &Account) -> bool {
    tunnel.user.as_deref() == Some(account.id.as_str())
}

/// Whether what is taken was made up, so that another may be.
fn is_made_up(taken: &Mistake) -> bool {
    matches!(taken.at.as_str(), "hostnames[0]" | "relay_port" | "id" | "socket")
}

/// What is somebody's already: by whom is nobody's business.
fn refused(taken: &[Mistake]) -> Refusal {
    match taken.iter().any(|one| one.at.starts_with("hostnames")) {
        true => Refusal::conflict("One of custom_domains is published by somebody already."),
        false => Refusal::conflict("There is no free port. Try again later, or ask the operator."),
    }
}
