//! What logins rest on: the providers that vouch for visitors, accounts of our
//! own, the keys that steps and sessions are sealed with, and logins that no
//! longer count. Written by the feed's follower alone, read by the gate.

pub mod seal;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use dashmap::DashMap;
use parking_lot::RwLock;

use self::seal::Seals;
use crate::model::identity::{Email, Moment, Whose};
use crate::model::{Account, AccountId, Keyring, Provider, ProviderId, Revocation, RevocationId};

/// The table. Cheap to read from any thread.
#[derive(Debug, Default)]
pub struct Logins {
    providers: DashMap<ProviderId, Arc<Provider>>,
    accounts: DashMap<AccountId, Arc<Account>>,
    by_email: DashMap<Email, AccountId>,
    seals: RwLock<Option<Arc<Seals>>>,
    revocations: DashMap<RevocationId, Arc<Revocation>>,
    revoked: DashMap<Whose, Vec<Arc<Revocation>>>,
    /// How many revocations there are: most nodes have none most of the time.
    revocation_count: AtomicUsize,
}

impl Logins {
    /// The provider with this id.
    pub fn provider(&self, id: &ProviderId) -> Option<Arc<Provider>> {
        self.providers.get(id).map(|p| Arc::clone(&p))
    }

    /// The account that logs in by this address.
    pub fn account(&self, email: &Email) -> Option<Arc<Account>> {
        let id = self.by_email.get(email)?.clone();
        self.accounts.get(&id).map(|account| Arc::clone(&account))
    }

    /// How many accounts there are.
    pub fn accounts(&self) -> usize {
        self.accounts.len()
    }

    /// The account with this id.
    pub fn account_by_id(&self, id: &str) -> Option<Arc<Account>> {
        self.accounts.get(id).map(|account| Arc::clone(&account))
    }

    /// The keys; none before the first keyring came.
    pub fn seals(&self) -> Option<Arc<Seals>> {
        self.seals.read().clone()
    }

    /// Whether any login is revoked at all.
    pub fn any_revoked(&self) -> bool {
        self.revocation_count.load(Ordering::Acquire) > 0
    }

    /// Whether a login of one of these, made at `issued`, is revoked.
    pub fn is_revoked(&self, whose: &[Whose], issued: Moment) -> bool {
        self.any_revoked()
            && whose.iter().any(|whose| {
                self.revoked.get(whose).is_some_and(|all| all.iter().any(|one| issued < one.issued_before))
            })
    }

    /// Revocations that have done their work by `now`.
    pub fn spent_revocations(&self, now: Moment) -> Vec<RevocationId> {
        self.revocations.iter().filter(|one| one.until < now).map(|one| one.id.clone()).collect()
    }

    /// Puts a provider in, in place of its former version.
    pub fn put_provider(&self, provider: Provider) {
        self.providers.insert(provider.id.clone(), Arc::new(provider));
    }

    /// Takes a provider out.
    pub fn remove_provider(&self, id: &ProviderId) {
        self.providers.remove(id);
    }

    /// Puts an account in, in place of its former version.
    pub fn put_account(&self, account: Account) {
        let account = Arc::new(account);
        self.by_email.insert(account.email.clone(), account.id.clone());
        if let Some(old) = self.accounts.insert(account.id.clone(), Arc::clone(&account))
            && old.email != account.email
        {
            self.by_email.remove_if(&old.email, |_, id| *id == old.id);
        }
    }

    /// Takes an account out.
    pub fn remove_account(&self, id: &AccountId) {
        if let Some((_, old)) = self.accounts.remove(id) {
            self.by_email.remove_if(&old.email, |_, id| *id == old.id);
        }
    }

    /// Takes the keyring in, or out.
    ///
    /// # Errors
    /// It cannot be used; the former one stays.
    pub fn set_keyring(&self, keyring: Option<&Keyring>) -> Result<(), String> {
        let seals = keyring.map(Seals::new).transpose()?.map(Arc::new);
        *self.seals.write() = seals;
        Ok(())
    }

    /// Puts a revocation in, in place of its former version.
    pub fn put_revocation(&self, revocation: Revocation) {
        self.remove_revocation(&revocation.id);
        let revocation = Arc::new(revocation);
        self.revoked.entry(revocation.whose.clone()).or_default().push(Arc::clone(&revocation));
        self.revocations.insert(revocation.id.clone(), revocation);
        self.revocation_count.fetch_add(1, Ordering::AcqRel);
    }

    /// Takes a revocation out.
    pub fn remove_revocation(&self, id: &RevocationId) {
        let Some((_, old)) = self.revocations.remove(id) else { return };
        if let Some(mut all) = self.revoked.get_mut(&old.whose) {
            all.retain(|one| one.id != old.id);
        }
        self.revoked.remove_if(&old.whose, |_, all| all.is_empty());
        self.revocation_count.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn revocation(id: &str, email: &str, issued_before: &str) -> Revocation {
        let record = json!({ "email": email, "issued_before": issued_before, "until": "2030-01-01T00:00:00Z" });
        Revocation::from_record(&id.parse().unwrap(), record.as_object().cloned().unwrap()).unwrap()
    }

    #[test]
    fn a_revoked_login_is_out_and_a_later_one_in() {
        let logins = Logins::default();
        let whose = [Whose::Email("ann@example.com".parse().unwrap())];
        let at = |text: &str| text.parse::<Moment>().unwrap();
        assert!(!logins.is_revoked(&whose, Moment(0)));
        logins.put_revocation(revocation("a", "ann@example.com", "2026-01-02T00:00:00Z"));
        logins.put_revocation(revocation("b", "Ann@Example.com", "2026-01-03T00:00:00Z"));
        assert!(logins.is_revoked(&whose, at("2026-01-02T12:00:00Z")));
        assert!(!logins.is_revoked(&whose, at("2026-01-03T00:00:00Z")));
        logins.remove_revocation(&"b".parse().unwrap());
        assert!(logins.is_revoked(&whose, at("2026-01-01T12:00:00Z")));
        assert!(!logins.is_revoked(&whose, at("2026-01-02T12:00:00Z")));
        assert_eq!(logins.spent_revocations(at("2030-01-02T00:00:00Z")).len(), 1);
        logins.remove_revocation(&"a".parse().unwrap());
        assert!(!logins.any_revoked() && logins.revoked.is_empty());
    }

    #[test]
    fn an_account_is_found_by_its_present_address_alone() {
        let logins = Logins::default();
        let hash = "$argon2id$v=19$m=19456,t=2,p=1$c2FsdHNhbHQ$aGFzaGhhc2hoYXNoaGFzaA";
        let put = |email: &str| {
            let record = json!({ "email": email, "password_hash": hash }).as_object().cloned().unwrap();
            logins.put_account(Account::from_record(&"a".parse().unwrap(), record).unwrap());
        };
        let finds = |email: &str| logins.account(&email.parse().unwrap()).is_some();
        put("old@example.com");
        put("new@example.com");
        assert!(finds("NEW@example.com") && !finds("old@example.com"));
        logins.remove_account(&"a".parse().unwrap());
        assert!(!finds("new@example.com"));
    }
}
