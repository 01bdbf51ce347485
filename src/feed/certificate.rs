//! Whether a certificate record can be presented: said before it is stored, so
//! that a bad one never replaces a good one.

use crate::fields::Mistake;
use crate::model::Certificate;

/// What is wrong with chain or key, if anything; says nothing of the key's bytes.
pub(super) fn certificate_mistake(certificate: &Certificate) -> Option<Mistake> {
    let problem = crate::tls::check(certificate).err()?;
    let at = if problem.contains("key") { "key_pem" } else { "chain_pem" };
    Some(Mistake {
        at: at.to_owned(),
        problem,
        fix: "write the chain in PEM, leaf first, and the leaf's own key in PEM".to_owned(),
    })
}
