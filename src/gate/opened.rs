//! Logins whose cookies were opened a moment ago: a browser sends the same one with
//! every request, and opening and reading it costs more than all else at the gate.
//! What is kept is who somebody is; whether they may come is asked each time.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use dashmap::DashMap;

use super::session::Session;
use crate::logins::seal::{Place, Purpose, Seals};
use crate::model::identity::Moment;

/// Most that are kept, at about a kilobyte each; beyond, all are forgotten at once.
const KEPT_MAX: usize = 16_384;

/// Logins by the cookies that hold them.
#[derive(Debug, Default)]
pub(super) struct Opened {
    hasher: RandomState,
    kept: DashMap<u64, Kept>,
}

struct Kept {
    sealed: Box<str>,
    host: Box<str>,
    socket: Box<str>,
    /// What opened it: no other keyring did.
    seals: Arc<Seals>,
    session: Arc<Session>,
}

/// Logs are no place for cookies.
impl std::fmt::Debug for Kept {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.session.fmt(f)
    }
}

impl Opened {
    /// The login that is sealed in a cookie of `place`.
    pub(super) fn session(
        &self,
        seals: &Arc<Seals>,
        place: Place<'_>,
        sealed: &str,
        now: Moment,
    ) -> Option<Arc<Session>> {
        // Its end is as random as the whole: the tag of the seal. Two that meet are
        // told apart below.
        let end = sealed.as_bytes().get(sealed.len().saturating_sub(24)..);
        let at = self.hasher.hash_one((end, place.host, place.socket));
        if let Some(kept) = self.kept.get(&at)
            && (&*kept.sealed, &*kept.host, &*kept.socket) == (sealed, place.host, place.socket)
            && Arc::ptr_eq(&kept.seals, seals)
            && seals.opens(sealed, now)
        {
            return Some(Arc::clone(&kept.session));
        }
        let opened = seals.open(Purpose::Session, place, sealed, now).ok()?;
        let session: Arc<Session> = serde_json::from_slice(&opened).ok().map(Arc::new)?;
        if self.kept.len() >= KEPT_MAX {
            self.kept.clear();
        }
        let (host, socket) = (place.host.into(), place.socket.into());
        let (seals, kept) = (Arc::clone(seals), Arc::clone(&session));
        self.kept.insert(at, Kept { sealed: sealed.into(), host, socket, seals, session: kept });
        Some(session)
    }
}
