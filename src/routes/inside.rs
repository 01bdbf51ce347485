//! The raw connections that are inside, by socket: a change of a socket's record
//! puts out whom it no longer lets in. They take one lock when they come and one
//! when they go, and none for what they carry.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, OnceLock};

use dashmap::DashMap;
use tokio_util::sync::CancellationToken;

use crate::error::Error;
use crate::model::SocketId;
use crate::tls::Client;

/// Who is inside.
#[derive(Debug, Default)]
pub(super) struct Inside {
    by_socket: DashMap<SocketId, HashMap<usize, Arc<Guest>>>,
}

/// One connection, as far as rules go by it.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) ip: IpAddr,
    pub(super) client: Option<Client>,
    cut: CancellationToken,
    refused: OnceLock<Error>,
}

/// A place inside; dropping it gives it back.
#[derive(Debug)]
pub struct Stay {
    inside: Arc<Inside>,
    socket: SocketId,
    guest: Arc<Guest>,
}

impl Inside {
    pub(super) fn enter(
        self: &Arc<Self>,
        socket: &SocketId,
        ip: IpAddr,
        client: Option<Client>,
        cut: CancellationToken,
    ) -> Stay {
        let guest = Arc::new(Guest { ip, client, cut, refused: OnceLock::new() });
        let stay = Stay { inside: Arc::clone(self), socket: socket.clone(), guest };
        let mut guests = self.by_socket.entry(socket.clone()).or_default();
        guests.insert(stay.number(), Arc::clone(&stay.guest));
        drop(guests);
        stay
    }

    /// How many sockets have somebody inside.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.by_socket.len()
    }

    /// Puts out whom `may_stay` refuses. None of the map's locks is held meanwhile.
    pub(super) fn sift(&self, socket: &SocketId, may_stay: impl Fn(&Guest) -> Result<(), Error>) {
        let guests: Vec<Arc<Guest>> = match self.by_socket.get(socket) {
            Some(guests) => guests.values().cloned().collect(),
            None => return,
        };
        for guest in guests {
            if let Err(error) = may_stay(&guest) {
                let _ = guest.refused.set(error);
                guest.cut.cancel();
            }
        }
    }
}

impl Stay {
    /// Who this is, as far as a certificate tells.
    pub fn client(&self) -> Option<&Client> {
        self.guest.client.as_ref()
    }

    /// Cancelled when the connection has to end, here or with all others.
    pub fn cut(&self) -> &CancellationToken {
        &self.guest.cut
    }

    /// Why it may not stay, once it may not.
    ///
    /// # Errors
    /// `Forbidden` or `ClientCertificate`.
    pub fn allowed(&self) -> Result<(), Error> {
        self.guest.refused.get().map_or(Ok(()), |error| Err(*error))
    }

    /// No two that live have the same address.
    fn number(&self) -> usize {
        Arc::as_ptr(&self.guest).addr()
    }
}

impl Drop for Stay {
    fn drop(&mut self) {
        let Some(mut guests) = self.inside.by_socket.get_mut(&self.socket) else { return };
        guests.remove(&self.number());
        let last = guests.is_empty();
        drop(guests);
        if last {
            self.inside.by_socket.remove_if(&self.socket, |_, guests| guests.is_empty());
        }
    }
}
