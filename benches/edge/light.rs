//! A light SSH client in this process: logs in, registers a forward, stays.

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

use russh::client::{self, Handle};
use russh::keys::{Algorithm, PrivateKeyWithHashAlg, PublicKeyOrCertificate, load_secret_key};
use russh::{Disconnect, Preferred, cipher, kex};

use crate::Outcome;
use crate::system::Server;

/// What light clients of one server share.
pub struct Lights {
    config: Arc<client::Config>,
    key: PrivateKeyWithHashAlg,
}

impl Lights {
    /// curve25519-sha256, an ed25519 key, and this cipher.
    ///
    /// # Errors
    /// That the cipher is not known, or the key not readable.
    pub fn new(key: &Path, cipher: &str) -> Outcome<Self> {
        let cipher = cipher::Name::try_from(cipher).map_err(|()| format!("the light client knows no {cipher}"))?;
        let preferred = Preferred {
            kex: Cow::Owned(vec![
                kex::CURVE25519,
                kex::EXTENSION_SUPPORT_AS_CLIENT,
                kex::EXTENSION_OPENSSH_STRICT_KEX_AS_CLIENT,
            ]),
            key: Cow::Owned(vec![Algorithm::Ed25519]),
            cipher: Cow::Owned(vec![cipher]),
            ..Preferred::default()
        };
        let config = client::Config { preferred, nodelay: true, ..client::Config::default() };
        let key = PrivateKeyWithHashAlg::new(Arc::new(load_secret_key(key, None)?), None);
        Ok(Self { config: Arc::new(config), key })
    }

    /// Logs in.
    ///
    /// # Errors
    /// Why the server does not let it.
    pub async fn login(&self, server: &Server) -> Outcome<Light> {
        let mut handle = client::connect(Arc::clone(&self.config), server.ssh(), Quiet).await?;
        let answer = handle.authenticate_publickey(server.user(), self.key.clone()).await?;
        if answer.success() { Ok(Light { handle }) } else { Err(format!("login: {answer:?}").into()) }
    }
}

/// A client that is logged in. Dropping it ends the session.
pub struct Light {
    handle: Handle<Quiet>,
}

impl Light {
    /// Asks for a forward.
    ///
    /// # Errors
    /// That the server refused.
    pub async fn register(&self, (address, port): (String, u32)) -> Outcome<()> {
        self.handle.tcpip_forward(address, port).await?;
        Ok(())
    }

    /// # Errors
    /// That the session ended.
    pub fn lives(&self) -> Outcome<()> {
        if self.handle.is_closed() { Err("an idle session ended".into()) } else { Ok(()) }
    }

    /// Ends the session in good order.
    pub async fn leave(self) {
        let _ = self.handle.disconnect(Disconnect::ByApplication, "", "").await;
    }
}

/// Trusts any server, and takes no visitors.
struct Quiet;

impl client::Handler for Quiet {
    type Error = russh::Error;

    async fn check_server_key(&mut self, _: &PublicKeyOrCertificate) -> Result<bool, Self::Error> {
        Ok(true)
    }
}
