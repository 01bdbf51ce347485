//! Accounts of owners: sign-up, login, and who asks. The records are the accounts that
//! the operator's API has too.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use serde::Deserialize;
use serde_json::{Value, json};

use super::{Mysocket, Refusal, certificates, names, sessions};
use crate::feed::records::{Condition, RecordError, Records, Stored};
use crate::gate::Checked;
use crate::limits::share_of;
use crate::model::identity::{Email, Moment};
use crate::model::{Account, AccountId, AuthorizedKey, Tunnel, TunnelId};
use crate::password;

/// Fewest characters of a password.
const PASSWORD_MIN: usize = 8;
/// How often a tunnel's record is read again that somebody else changed meanwhile.
const REKEYS: usize = 8;

/// The body of `POST /user`.
#[derive(Deserialize)]
#[serde(default)]
#[derive(Default)]
pub(super) struct SignUp {
    name: Option<String>,
    email: String,
    password: String,
    sshkey: Option<String>,
}

/// The body of `POST /login`.
#[derive(Deserialize, Default)]
#[serde(default)]
pub(super) struct Login {
    email: String,
    password: String,
}

impl Mysocket {
    /// Makes an account, where the operator lets anybody.
    pub(super) async fn sign_up(&self, asked: SignUp, ip: IpAddr) -> Result<Value, Refusal> {
        if !self.settings.sign_up {
            return Err(Refusal::forbidden("Sign-up is off here. Ask the operator for an account (adit user add)."));
        }
        let email: Email = asked
            .email
            .trim()
            .parse()
            .map_err(|why: &str| Refusal::invalid("email", why, "send an address like ann@example.com"))?;
        if asked.password.chars().count() < PASSWORD_MIN || asked.password.len() > password::PASSWORD_MAX {
            let fix = format!("send {PASSWORD_MIN} characters or more");
            return Err(Refusal::invalid("password", "is too short, or too long", &fix));
        }
        let ssh_keys = asked.sshkey.as_deref().map(keys_of).transpose()?.unwrap_or_default();
        if self.logins.accounts() >= self.settings.accounts {
            return Err(Refusal::forbidden("This node takes no more accounts."));
        }
        if !self.is_exempt(ip) {
            let taken = self.sign_ups.take(share_of(ip.to_canonical()), Instant::now());
            taken.map_err(|wait| Refusal::busy("Too many accounts were made from your address.", wait))?;
        }
        let _turn = self.hashing.acquire().await;
        let password = asked.password;
        let hashed = tokio::task::spawn_blocking(move || password::hash(&password)).await;
        let password = hashed
            .unwrap_or_else(|_| Err("could not be hashed".to_owned()))
            .map_err(|why| Refusal::invalid("password", &why, "send another one"))?;
        let id = names::user().and_then(|id| id.parse().ok()).ok_or_else(Refusal::no_random)?;
        let name = asked.name.map(|name| name.trim().to_owned()).filter(|name| !name.is_empty());
        let account = Account {
            id,
            email,
            password,
            disabled: false,
            name,
            ssh_keys,
            signed_up: true,
            extra: Default::default(),
        };
        // What is stored is what can be read.
        let account = Account::from_record(&account.id, account.to_record()).map_err(Refusal::mistakes)?;
        match self.records.put_account(account, Condition::Absent).await {
            Ok(written) => {
                self.applied(written.rev).await;
                tracing::info!(account = %written.record.id, "signed up");
                Ok(shown(&written.record))
            }
            Err(RecordError::Taken(_)) => Err(Refusal::conflict("There is an account with this address already.")),
            Err(error) => Err(error.into()),
        }
    }

    /// A token for address and password; wrong ones are slowed by account and address.
    pub(super) async fn login(&self, asked: Login, ip: IpAddr) -> Result<Value, Refusal> {
        let email = asked.email.trim();
        let name = email.parse::<Email>().map_or_else(|_| "no address".to_owned(), |email| email.to_string());
        let (now, from) = (Instant::now(), share_of(ip.to_canonical()));
        let taken = self.logins_of_both.take((name.clone(), from), now);
        taken
            .and_then(|()| self.logins_of_account.take(name, now))
            .map_err(|wait| Refusal::busy("Too many passwords were tried. Wait a moment.", wait))?;
        match self.gates.check_account(email, &asked.password, ip).await {
            (Checked::Right { .. }, Some(account)) => {
                let now = Moment::now();
                tracing::info!(account = %account.id, "logged in at the mysocket API");
                self.token(&account, now, now)
            }
            (Checked::Busy(wait), _) => Err(Refusal::busy("Too many passwords were tried. Wait a moment.", wait)),
            _ => {
                tracing::info!(%ip, "no login at the mysocket API");
                Err(Refusal::unauthorized("There is no such account, or this is not its password."))
            }
        }
    }

    /// A token of an account that gave its password at `auth_time`.
    pub(super) fn token(&self, account: &Account, auth_time: Moment, now: Moment) -> Result<Value, Refusal> {
        let until = auth_time.after(self.settings.session_max);
        if now >= until {
            return Err(Refusal::unauthorized("Your login is too old to be refreshed. Please login."));
        }
        let seals = self.logins.seals().ok_or_else(Refusal::no_keyring)?;
        let token = sessions::issue(&seals, account, auth_time, now, (self.settings.session, until));
        Ok(json!({ "token": token.ok_or_else(Refusal::no_keyring)? }))
    }

    /// Whose token this is, and when its password was given.
    pub(super) fn owner(&self, token: Option<&str>) -> Result<(Arc<Account>, Moment), Refusal> {
        let refused = || Refusal::unauthorized("Please login: the token is missing, over or not known here.");
        let seals = self.logins.seals().ok_or_else(Refusal::no_keyring)?;
        let claims = sessions::check(&seals, token.ok_or_else(refused)?, Moment::now()).ok_or_else(refused)?;
        let account = self.logins.account_by_id(&claims.user_id).filter(|account| claims.is_of(account));
        let account = account.ok_or_else(refused)?;
        let calls = self.calls.take(account.id.clone(), Instant::now());
        calls.map_err(|wait| Refusal::busy("Too many calls of this account.", wait))?;
        Ok((account, Moment(claims.auth_time)))
    }
}

/// Gives the tunnels that were made for an account its keys as they are now; where it
/// is gone (`None`) or disabled, nobody serves them.
///
/// # Errors
/// See [`RecordError`]; some may have been written.
pub(in super::super) async fn rekey(
    records: &Records,
    id: &AccountId,
    account: Option<&Account>,
) -> Result<(), RecordError> {
    let account = account.filter(|account| !account.disabled);
    for socket in records.sockets_of(id.as_str()).await? {
        for tunnel in records.tunnels_of(&socket).await? {
            rekey_one(records, &tunnel, id, account).await?;
        }
    }
    Ok(())
}

async fn rekey_one(
    records: &Records,
    tunnel: &TunnelId,
    id: &AccountId,
    account: Option<&Account>,
) -> Result<(), RecordError> {
    for _ in 0..REKEYS {
        let Stored { record, rev } = match records.get::<Tunnel>(tunnel).await {
            Err(RecordError::NotFound) => return Ok(()),
            found => found?,
        };
        let made = record.user.as_deref() == Some(id.as_str())
            && record.principals.contains(&certificates::of_tunnel(&record.id));
        let mut rekeyed = record.clone();
        rekeyed.keys = account.map(|account| account.ssh_keys.clone()).unwrap_or_default();
        if account.is_none() {
            rekeyed.cert_authorities.clear();
        }
        if !made || rekeyed == record {
            return Ok(());
        }
        match records.put_tunnel(rekeyed, Condition::Rev(rev)).await {
            Err(RecordError::Precondition { .. }) => {}
            written => return written.map(drop),
        }
    }
    Err(RecordError::Contended)
}

/// An account as clients read it.
pub(super) fn shown(account: &Account) -> Value {
    let keys: Vec<&str> = account.ssh_keys.iter().map(|key| key.line.as_str()).collect();
    json!({
        "name": account.name.as_deref().unwrap_or_default(),
        "email": account.email.as_str(),
        "user_id": account.id.as_str(),
        "user_name": account.id.as_str(),
        "sshkey": keys.join("\n"),
    })
}

/// Lines of public keys; empty ones are none.
fn keys_of(text: &str) -> Result<Vec<AuthorizedKey>, Refusal> {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    lines
        .map(|line| line.parse())
        .collect::<Result<_, &str>>()
        .map_err(|why| Refusal::invalid("sshkey", why, "send the public key, as in ~/.ssh/id_ed25519.pub"))
}
