//! Accepts owners' SSH connections: the limits at the door, our host keys, and
//! the engine's run of each; `owner` decides who may log in and what for.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use aws_lc_rs::encoding::{AsBigEndian, EcPrivateKeyBin};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair};
use ssh_key::private::{EcdsaKeypair, EcdsaPrivateKey, Ed25519Keypair, KeypairData};
use ssh_key::public::EcdsaPublicKey;
use ssh_key::{LineEnding, PrivateKey};
use tokio::net::TcpStream;

use super::owner::Owner;
use super::{Session, SshSettings, Tunnels};
use crate::limits::Permit;
use crate::ssh::{Config, Driver, Ended, Fatal, HostKey, Link};

/// What owners connect to.
pub struct Server {
    tunnels: Arc<Tunnels>,
    config: Arc<Config>,
}

impl Server {
    /// A server that proves itself with one of these keys: ed25519 first.
    ///
    /// # Errors
    /// Where a key is of a type that is not served.
    pub fn new(tunnels: Arc<Tunnels>, host_keys: &[PrivateKey]) -> Result<Self, String> {
        let host_keys = host_keys.iter().map(HostKey::new).collect::<Result<_, _>>()?;
        let config = Arc::new(config(tunnels.settings(), host_keys));
        Ok(Self { tunnels, config })
    }

    /// What all sessions have promised to their peers or hold for visitors, in bytes.
    pub fn outstanding_bytes(&self) -> usize {
        self.config.outstanding.load(Ordering::Relaxed)
    }

    /// Serves one connection until it ends. `head` is what was read already.
    pub async fn serve(self: Arc<Self>, tcp: TcpStream, head: bytes::Bytes, peer: SocketAddr) {
        let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
        let tunnels = &self.tunnels;
        let Some(_node) = Permit::take(&tunnels.session_count, tunnels.settings.sessions) else {
            return refuse(peer, "sessions");
        };
        let Some(_share) = tunnels.per_address.admit(peer.ip()) else { return refuse(peer, "sessions_per_address") };
        let Some(unauthenticated) = tunnels.unauthenticated.admit(peer.ip()) else {
            return refuse(peer, "unauthenticated_per_address");
        };
        let _ = tcp.set_nodelay(true);
        let id = tunnels.next_id.fetch_add(1, Ordering::Relaxed);
        let link = Link::new(Arc::clone(&self.config));
        let session = Arc::new(Session::new(id, peer, Arc::clone(&link)));
        let _gone = Gone { tunnels: Arc::clone(tunnels), session: Arc::clone(&session) };
        let owner = Owner::new(Arc::clone(tunnels), session, unauthenticated);
        let (ended, client) = Driver::new(link, tcp, &head, Box::new(owner)).await;
        match ended {
            Ended::Fault(fatal) => {
                if fatal == Fatal::SILENT {
                    metrics::counter!("adit_sessions_dead_total").increment(1);
                } else if fatal == Fatal::LOGIN_DEADLINE {
                    metrics::counter!("adit_ssh_login_timeouts_total").increment(1);
                }
                metrics::counter!("adit_ssh_faults_total", "fault" => fatal.label).increment(1);
                tracing::info!(session = id, %peer, client, fault = fatal.label, "session ended: {}", fatal.text);
            }
            Ended::Peer | Ended::Us => tracing::info!(session = id, %peer, client, "session ended"),
        }
    }
}

fn refuse(peer: SocketAddr, limit: &'static str) {
    metrics::counter!("adit_ssh_refused_total", "limit" => limit).increment(1);
    tracing::debug!(%peer, limit, "SSH connection refused");
}

/// Gives back what a session held, however it ended.
struct Gone {
    tunnels: Arc<Tunnels>,
    session: Arc<Session>,
}

impl Drop for Gone {
    fn drop(&mut self) {
        self.session.kill();
        self.session.finish();
        self.tunnels.sessions.remove(&self.session.id);
    }
}

fn config(settings: &SshSettings, host_keys: Vec<HostKey>) -> Config {
    Config {
        version: concat!("SSH-2.0-adit_", env!("CARGO_PKG_VERSION")),
        host_keys,
        nist: settings.nist_curves,
        sha1_rsa: settings.allow_sha1_rsa,
        login_deadline: settings.login_deadline,
        auth_attempts: settings.auth_attempts,
        reject_delay: settings.reject_delay,
        keepalive: settings.keepalive,
        keepalive_deadline: settings.keepalive_deadline,
        rekey_bytes: settings.rekey_bytes as u64,
        rekey_after: settings.rekey_after,
        channels: settings.connections_per_tunnel,
        window: settings.window,
        window_max: settings.window_max.max(settings.window),
        session_buffer: settings.tunnel_buffer,
        node_buffer: settings.node_buffer,
        outstanding: Arc::default(),
    }
}

/// A type of host key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostKeyType {
    /// For every client of this decade.
    Ed25519,
    /// NIST P-256, for clients that know no better (`ssh.ecdsa_host_key`).
    Ecdsa,
}

/// Loads a host key, or makes one of this type and keeps it.
///
/// # Errors
/// What to tell the operator.
pub fn host_key(path: &Path, kind: HostKeyType) -> Result<PrivateKey, String> {
    let at = path.display();
    match std::fs::read_to_string(path) {
        Ok(text) => PrivateKey::from_openssh(&text).map_err(|e| format!("{at} is not an OpenSSH private key: {e}")),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let key = new_host_key(kind)?;
            let text = key.to_openssh(LineEnding::LF).map_err(|e| e.to_string())?;
            crate::secret_file::write(path, text.as_bytes()).map_err(|e| format!("{at} cannot be written: {e}"))?;
            Ok(key)
        }
        Err(error) => Err(format!("{at} cannot be read: {error}")),
    }
}

fn new_host_key(kind: HostKeyType) -> Result<PrivateKey, String> {
    match kind {
        HostKeyType::Ed25519 => {
            let mut seed = [0; 32];
            aws_lc_rs::rand::fill(&mut seed).map_err(|_| "no random bytes".to_owned())?;
            Ok(PrivateKey::from(Ed25519Keypair::from_seed(&seed)))
        }
        HostKeyType::Ecdsa => {
            let failed = |_| "no ECDSA key could be made".to_owned();
            let made = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).map_err(failed)?;
            let secret: EcPrivateKeyBin<'_> = made.private_key().as_be_bytes().map_err(failed)?;
            let secret: [u8; 32] = secret.as_ref().try_into().map_err(|_| "an ECDSA key of another size".to_owned())?;
            let point = EcdsaPublicKey::from_sec1_bytes(made.public_key().as_ref()).map_err(|e| e.to_string())?;
            let EcdsaPublicKey::NistP256(public) = point else {
                return Err("an ECDSA key of another curve".to_owned());
            };
            let pair = EcdsaKeypair::NistP256 { public, private: EcdsaPrivateKey::from(secret) };
            PrivateKey::new(KeypairData::Ecdsa(pair), "").map_err(|e| e.to_string())
        }
    }
}
