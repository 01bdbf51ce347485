//! What clients ask of a new socket, made into a record: types, gates, domains. What
//! cannot be kept is refused by the name that clients have for it, and never served open.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{Mysocket, Refusal};
use crate::feed::records::RecordError;
use crate::fields::Mistake;
use crate::model::{Account, HostName, Provider, Socket, SocketType};
use crate::password;

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
    pub(super) protected_password: Option<String>,
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
    /// The record that is wanted, without what is made up.
    #[allow(clippy::indexing_slicing, reason = "a JSON value makes what it has not")]
    pub(super) async fn record_of(&self, account: &Account, wanted: &Wanted) -> Result<Map<String, Value>, Refusal> {
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
    pub(super) fn check_domains(&self, socket: &Socket, domain: &HostName) -> Result<(), Refusal> {
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

/// Mistakes of a record, by what clients call its fields.
pub(super) fn told(mistakes: Vec<Mistake>) -> Refusal {
    let named = mistakes.into_iter().map(|mut mistake| {
        if let Some((_, name)) = FIELDS.iter().find(|(field, _)| mistake.at.starts_with(field)) {
            mistake.at = (*name).to_owned();
        }
        mistake
    });
    Refusal::mistakes(named.collect())
}
