//! The node's list of keys and certificates that may not log in any more: a file
//! that is read again when it has changed.

use std::fs;
use std::path::PathBuf;
use std::time::SystemTime;

use parking_lot::Mutex;

use super::keys::Login;
use crate::model::Revoked;

/// The largest file that is read.
const MOST: u64 = 1 << 20;

/// `ssh.revoked_keys`.
pub(super) struct RevokedKeys {
    path: Option<PathBuf>,
    read: Mutex<Read>,
}

/// What the file said when it was last read.
struct Read {
    stamp: Option<(SystemTime, u64)>,
    list: Result<Vec<Revoked>, String>,
}

impl RevokedKeys {
    /// Reads the file for the first time, if there is to be one.
    ///
    /// # Errors
    /// What to tell the operator.
    pub(super) fn new(path: Option<PathBuf>) -> Result<Self, String> {
        let this = Self { path, read: Mutex::new(Read { stamp: None, list: Ok(Vec::new()) }) };
        this.refusal(&Login::Nobody).map_or(Ok(this), Err)
    }

    /// Why this login is refused, if so. As OpenSSH does, everybody is while the
    /// file cannot be read: a list that is lost must not let the revoked in.
    pub(super) fn refusal(&self, login: &Login) -> Option<String> {
        let path = self.path.as_ref()?;
        let mut read = self.read.lock();
        let stamp = fs::metadata(path).and_then(|m| Ok((m.modified()?, m.len()))).ok();
        if stamp.is_none() || stamp != read.stamp {
            let list = parse(path);
            if let Err(why) = &list {
                tracing::error!("ssh.revoked_keys: {}: {why}; all logins are refused", path.display());
            }
            *read = Read { stamp, list };
        }
        match &read.list {
            Ok(list) => login.is_revoked(list).then(|| "it is revoked (ssh.revoked_keys)".to_owned()),
            Err(why) => Some(format!("ssh.revoked_keys: {}: {why}", path.display())),
        }
    }
}

fn parse(path: &std::path::Path) -> Result<Vec<Revoked>, String> {
    let size = fs::metadata(path).map_err(|e| format!("cannot be read: {e}"))?.len();
    if size > MOST {
        return Err(format!("{size} bytes are more than {MOST}; revoke a CA rather than its certificates one by one"));
    }
    let text = fs::read_to_string(path).map_err(|e| format!("cannot be read: {e}"))?;
    let lines = text.lines().enumerate().map(|(n, line)| (n + 1, line.trim()));
    let lines = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
    lines.map(|(n, line)| line.parse().map_err(|e| format!("line {n} {e}; see ssh-keygen(1)"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::AuthorizedKey;

    const LINE: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJvkAhLPPQDLmHLTMrLeBEkLTTF+ywgNRFMFR0Lb5NBz joe@laptop";

    #[test]
    fn the_file_acts_as_soon_as_it_changes_and_its_loss_refuses_everybody() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("revoked");
        assert!(RevokedKeys::new(Some(path.clone())).is_err(), "a list that is not there");
        fs::write(&path, "# nobody yet\n\nserial: 5-7\n").unwrap();
        let revoked = RevokedKeys::new(Some(path.clone())).unwrap();
        let key: AuthorizedKey = LINE.parse().unwrap();
        let (fingerprint, login) = (key.fingerprint.clone(), Login::Key(key));
        assert_eq!(revoked.refusal(&login), None);
        for line in
            [LINE, &fingerprint, &format!("key: {LINE}"), &format!("SHA256: {LINE}"), &format!("hash: {fingerprint}")]
        {
            fs::write(&path, format!("{line}\n")).unwrap();
            // Within one tick of the clock the size tells.
            assert!(revoked.refusal(&login).is_some_and(|why| why.contains("revoked")), "{line}");
            fs::write(&path, "id: joe\n").unwrap();
            assert_eq!(revoked.refusal(&login), None);
        }
        for broken in ["serial: 7-5", "key: nonsense", "SHA256:short", "id:", "from=\"::1\" ssh-ed25519 AAAA"] {
            fs::write(&path, format!("id: x\n{broken}\n")).unwrap();
            assert!(revoked.refusal(&login).is_some_and(|why| why.contains("line 2")), "{broken}");
        }
        fs::remove_file(&path).unwrap();
        assert!(revoked.refusal(&login).is_some());
        assert_eq!(RevokedKeys::new(None).unwrap().refusal(&login), None);
    }
}
