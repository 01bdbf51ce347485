//! Who a visitor is, as a provider vouches for it.

use crate::model::ProviderId;
use crate::model::identity::Email;

/// Who logged in.
#[derive(Clone, PartialEq, Eq)]
pub struct Identity {
    /// The provider's record.
    pub provider: ProviderId,
    /// Who vouches: the provider's issuer.
    pub issuer: String,
    /// The subject at that issuer: what tells two people apart.
    pub subject: String,
    /// Their address; none where there is none, or none that counts: not verified
    /// and not to be trusted without (`Provider::trust_email`).
    pub email: Option<Email>,
    /// Whether domain rules may go by the address (Google: `hd` names its domain).
    pub domain_vouched: bool,
    /// The provider's own session (`sid`), for back-channel logout.
    pub provider_session: Option<String>,
    /// When they proved who they are, in seconds of Unix time, where it is told.
    pub auth_time: Option<u64>,
}

/// Logs are no place for addresses and subjects.
impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity").field("provider", &self.provider).finish_non_exhaustive()
    }
}
