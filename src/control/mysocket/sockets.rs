//! Sockets and tunnels of one account: what clients send made into records, and records
//! shown as clients read them. Written by the code that the operator's API writes by, so
//! that names and ports belong to one record in the whole fleet.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{Mysocket, Refusal, certificates, names};
use crate::feed::records::{Condition, RecordError, Stored, Written};
use crate::fields::Mistake;
use crate::model::identity::Moment;
use crate::model::{Account, HostName, HostPattern, Provider, Socket, SocketId, SocketType, Tunnel, TunnelId};
use crate::password;

/// How often another name or relay port is made up where the last was somebody's.
const TRIES: usize = 16;

/// The body of `POST /socket` and `POST /connect`. Clients send null for what they have
/// not, and more than is read here.
#[derive(Deserialize, Default)]
#[serde(default)]
pub(super) struct Wanted {
    name: Option<String>,
    description: Option<String>,
    socket_type: Option<String>,
    protected_socket: Option<bool>,
    protected_username: Option<String>,
    protected_password: Option<String>,
    cloud_authentication_enabled: Option<bool>,
    #[serde(rename = "cloud_authentication_email_allowed_addressses")]
    cloud_emails: Option<Vec<String>>,
    #[serde(rename = "cloud_authentication_email_allowed_domains")]
    cloud_domains: Option<Vec<String>>,
    custom_domains: Option<Vec<String>>,
    upstream_type: Option<String>,
    upstream_http_hostname: Option<String>,
}

/// Fields of records, and what clients call them.
const FIELDS: &[(&str, &str)] = &[
    ("gate.basic.users[0].name", "protected_username"),
    ("gate.basic", "protected_socket"),
    ("gate.oidc.allow_emails", "cloud_authentication_email_allowed_addressses"),
    ("gate.oidc.allow_email_domains", "cloud_authentication_email_allowed_domains"),
    ("gate.oidc", "cloud_authentication_enabled"),
    ("upstream.host", "upstream_http_hostname"),
    ("hostnames", "custom_domains"),
    ("title", "name"),
    ("type", "socket_type"),
];

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

    /// The record that is wanted, without what is made up.
    #[allow(clippy::indexing_slicing, reason = "a JSON value makes what it has not")]
    async fn record_of(&self, account: &Account, wanted: &Wanted) -> Result<Map<String, Value>, Refusal> {
        let kind = self.kind_of(wanted)?;
        let text =
            |text: &Option<String>| text.as_deref().map(str::trim).filter(|text| !text.is_empty()).map(String::from);
        let domains: Vec<&str> = wanted.custom_domains.iter().flatten().map(|name| name.trim()).collect();
        if !domains.is_empty() && !self.settings.custom_domains {
            return Err(Refusal::invalid("custom_domains", "are off here", "leave them out, or ask the operator"));
        }
        let mut record = json!({
            "type": kind.as_str(),
            "hostnames": domains,
            "owner": account.id.as_str(),
            "created_by": "mysocket",
            "title": text(&wanted.name),
            "description": text(&wanted.description),
        });
        if let Some(host) = text(&wanted.upstream_http_hostname) {
            if !matches!(kind, SocketType::Http | SocketType::Https) {
                let problem = format!("does not go with type {kind}");
                return Err(Refusal::invalid("upstream_http_hostname", &problem, "leave it out"));
            }
            record["upstream"]["host"] = host.into();
        }
        if kind == SocketType::Https {
            // The origin is at the far end of its owner's own tunnel, under a name that no
            // CA knows.
            record["upstream"]["tls"]["verify"] = false.into();
        }
        let protected = wanted.protected_socket.unwrap_or(false);
        let by_cloud = wanted.cloud_authentication_enabled.unwrap_or(false);
        if protected && by_cloud {
            let problem =
                "does not go together with cloud_authentication_enabled: one of them would be enough to come in";
            return Err(Refusal::invalid("protected_socket", problem, "choose one of them"));
        }
        if protected {
            record["gate"]["basic"] = self.basic_of(wanted).await?;
        }
        if by_cloud {
            record["gate"]["oidc"] = self.oidc_of(wanted).await?;
        }
        match record {
            Value::Object(record) => Ok(record),
            _ => Err(Refusal::down("No record could be made.")),
        }
    }

    fn kind_of(&self, wanted: &Wanted) -> Result<SocketType, Refusal> {
        let given = wanted.socket_type.as_deref().unwrap_or("http").to_ascii_lowercase();
        let fix = "send \"http\", \"https\", \"tcp\" or \"tls\"";
        let kind = match given.as_str() {
            "" | "http" => SocketType::Http,
            "https" => SocketType::Https,
            "tcp" => SocketType::Tcp,
            "tls" => SocketType::Tls,
            _ => return Err(Refusal::invalid("socket_type", "is not a type", fix)),
        };
        match (wanted.upstream_type.as_deref().unwrap_or_default(), kind) {
            ("", kind) => Ok(kind),
            ("http", SocketType::Http) => Ok(SocketType::Http),
            ("https", SocketType::Http | SocketType::Https) => Ok(SocketType::Https),
            ("http", SocketType::Https) => {
                let fix = "send socket_type \"http\": visitors reach it by HTTP and HTTPS";
                Err(Refusal::invalid("upstream_type", "contradicts socket_type", fix))
            }
            ("http" | "https", _) => {
                let problem = format!("does not go with type {kind}");
                Err(Refusal::invalid("upstream_type", &problem, "leave it out"))
            }
            _ => Err(Refusal::invalid("upstream_type", "is not a type", "send \"http\" or \"https\"")),
        }
    }

    async fn basic_of(&self, wanted: &Wanted) -> Result<Value, Refusal> {
        let user = wanted.protected_username.as_deref().unwrap_or_default();
        let given = wanted.protected_password.clone().unwrap_or_default();
        for (field, text) in [("protected_username", user), ("protected_password", &given)] {
            if text.is_empty() {
                return Err(Refusal::invalid(field, "is missing", "send it beside protected_socket"));
            }
        }
        let _turn = self.hashing.acquire().await;
        let hashed = tokio::task::spawn_blocking(move || password::hash(&given)).await;
        let hash = hashed
            .unwrap_or_else(|_| Err("could not be hashed".to_owned()))
            .map_err(|why| Refusal::invalid("protected_password", &why, "send another one"))?;
        Ok(json!({ "users": [{ "name": user, "password_hash": hash.as_str() }] }))
    }

    async fn oidc_of(&self, wanted: &Wanted) -> Result<Value, Refusal> {
        let field = "cloud_authentication_enabled";
        let mut there = Vec::new();
        for id in &self.settings.providers {
            match self.records.get::<Provider>(id).await {
                Ok(_) => there.push(id.as_str()),
                Err(RecordError::NotFound | RecordError::Unreadable(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        if there.is_empty() {
            let fix = "leave it out, or ask the operator for a login provider (mysocket.providers)";
            return Err(Refusal::invalid(field, "has nowhere to log in: this node has no provider", fix));
        }
        let listed = |list: &Option<Vec<String>>| -> Vec<String> {
            let texts = list.iter().flatten().map(|text| text.trim().to_owned());
            texts.filter(|text| !text.is_empty()).collect()
        };
        let (emails, domains) = (listed(&wanted.cloud_emails), listed(&wanted.cloud_domains));
        if emails.is_empty() && domains.is_empty() {
            let fix = "send cloud_authentication_email_allowed_addressses or …_domains";
            return Err(Refusal::invalid(field, "would let nobody in", fix));
        }
        Ok(json!({ "providers": there, "allow_emails": emails, "allow_email_domains": domains }))
    }

    /// Owners name domains of their own; what is below the node's is made up.
    fn check_domains(&self, socket: &Socket, domain: &HostName) -> Result<(), Refusal> {
        let own = |name: &str| {
            let below = name.strip_suffix(domain.as_str()).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
            below || name == self.hooks.public_host
        };
        for name in &socket.hostnames {
            if name.is_wildcard() || own(name.as_str()) || !name.as_str().contains('.') {
                let problem = format!("\"{name}\" is not a domain of yours");
                let fix = "send whole names of your own domains, without wildcards";
                return Err(Refusal::invalid("custom_domains", &problem, fix));
            }
        }
        Ok(())
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

/// Mistakes of a record, by what clients call its fields.
fn told(mistakes: Vec<Mistake>) -> Refusal {
    let named = mistakes.into_iter().map(|mut mistake| {
        if let Some((_, name)) = FIELDS.iter().find(|(field, _)| mistake.at.starts_with(field)) {
            mistake.at = (*name).to_owned();
        }
        mistake
    });
    Refusal::mistakes(named.collect())
}
