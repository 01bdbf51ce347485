//! Passwords: hashed for the store, and checked. Both cost tens of milliseconds
//! on purpose: call them where nobody waits behind (`spawn_blocking`).

use argon2::{Argon2, PasswordHasher, PasswordVerifier};

use crate::model::identity::PasswordHash;

/// Longest password, in bytes.
pub const PASSWORD_MAX: usize = 1024;

/// The hash to store: argon2id with 19 MiB, two passes and one lane (OWASP's
/// figures), some 20 ms.
///
/// # Errors
/// There are no random bytes, or it is longer than `PASSWORD_MAX`.
pub fn hash(password: &str) -> Result<PasswordHash, String> {
    if password.is_empty() || password.len() > PASSWORD_MAX {
        return Err(format!("has {} bytes", password.len()));
    }
    let hash = Argon2::default().hash_password(password.as_bytes()).map_err(|e| e.to_string())?;
    hash.to_string().parse().map_err(str::to_owned)
}

/// Whether this is the password.
pub fn verify(hash: &PasswordHash, password: &str) -> bool {
    if password.len() > PASSWORD_MAX {
        return false;
    }
    match hash.is_bcrypt() {
        true => bcrypt::verify(password, hash.as_str()).unwrap_or(false),
        false => Argon2::default().verify_password(password.as_bytes(), hash.as_str()).is_ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_known_by_its_hash_of_either_kind() {
        let own = hash("correct horse").unwrap();
        // `htpasswd -bnBC 5 "" "correct horse"` and `argon2 -id`, made once.
        let bcrypt: PasswordHash = bcrypt::hash("correct horse", 4).unwrap().parse().unwrap();
        for hash in [&own, &bcrypt] {
            assert!(verify(hash, "correct horse"), "{}", hash.as_str());
            assert!(!verify(hash, "correct horsf") && !verify(hash, ""));
        }
        assert_ne!(own, super::hash("correct horse").unwrap(), "the salt is new each time");
        assert!(super::hash("").is_err() && super::hash(&"x".repeat(PASSWORD_MAX + 1)).is_err());
    }

    #[test]
    fn a_hash_that_would_cost_too_much_is_refused() {
        let phc = |costs: &str| format!("$argon2id$v=19${costs}$c2FsdHNhbHQ$aGFzaGhhc2hoYXNoaGFzaA");
        assert!(phc("m=19456,t=2,p=1").parse::<PasswordHash>().is_ok());
        for bad in ["m=1048576,t=1,p=1", "m=19456,t=100,p=1", "m=19456,t=2,p=64", "m=19456", "t=2,p=1"] {
            assert!(phc(bad).parse::<PasswordHash>().is_err(), "{bad}");
        }
        for bad in
            ["", "secret", "$argon2i$v=19$m=19456,t=2,p=1$c2FsdA$aGFzaA", "$2y$31$abcdefghijklmnopqrstuv", "$1$a$b"]
        {
            assert!(bad.parse::<PasswordHash>().is_err(), "{bad}");
        }
    }
}
