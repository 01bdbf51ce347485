//! Accepts owners' SSH connections: limits, the login's deadline, algorithms,
//! and the library's callbacks, each handed to the module that decides.

use std::borrow::Cow;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use bytes::BytesMut;
use russh::keys::ssh_key::{Algorithm, EcdsaCurve, HashAlg, LineEnding};
use russh::keys::{Certificate, PrivateKey};
use russh::server::{Auth, ChannelOpenHandle, Config, Handler, Msg, PublicKeyOffer, Response, VerifiedPublicKey};
use russh::{Channel, ChannelId, Limits, MethodKind, MethodSet, Preferred, Pty, SshId, cipher, kex, mac};
use tokio::io::{AsyncReadExt, BufReader};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::channel::Wire;
use super::keys::{self, Login};
use super::session::Engine;
use super::{Bind, EngineKind, Mode, Session, SshSettings, Tunnels, naming};
use crate::limits::Permit;
use crate::metrics::Present;
use crate::ssh;
use crate::stream::Stream;

/// How long the client's banner is waited for before ours is sent: most clients
/// speak at once, PuTTY waits for us.
const BANNER_PATIENCE: Duration = Duration::from_millis(200);

/// The longest banner line (RFC 4253 §4.2: 255 bytes).
const BANNER_BYTES: usize = 255;

/// Bytes read from the connection at once: the library reads packet by packet.
const READ_BYTES: usize = 32 * 1024;

/// The library's configurations, made once.
pub struct Server {
    tunnels: Arc<Tunnels>,
    /// For OpenSSH, whose own order prefers ciphers that cost twice as much.
    gcm_only: Arc<Config>,
    all_ciphers: Arc<Config>,
    own: Arc<ssh::Config>,
}

impl Server {
    /// A server that proves itself with `host_key`.
    ///
    /// # Errors
    /// Where the key is of a type that is not served.
    pub fn new(tunnels: Arc<Tunnels>, host_key: &PrivateKey) -> Result<Self, String> {
        let settings = tunnels.settings();
        let own = Arc::new(own_config(settings, host_key)?);
        let gcm: &'static [cipher::Name] = &[cipher::AES_128_GCM, cipher::AES_256_GCM];
        let all: &'static [cipher::Name] = &[
            cipher::AES_128_GCM,
            cipher::AES_256_GCM,
            cipher::CHACHA20_POLY1305,
            cipher::AES_256_CTR,
            cipher::AES_128_CTR,
        ];
        let gcm_only = Arc::new(config(settings, host_key, gcm));
        let all_ciphers = Arc::new(config(settings, host_key, all));
        Ok(Self { tunnels, gcm_only, all_ciphers, own })
    }

    /// Serves one connection until it ends. `head` is what was read already.
    pub async fn serve(self: Arc<Self>, tcp: TcpStream, head: bytes::Bytes, peer: SocketAddr) {
        let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
        let tunnels = &self.tunnels;
        if tunnels.settings.engine == EngineKind::Adit {
            return super::owner::serve(tunnels, &self.own, tcp, head, peer).await;
        }
        let Some(_node) = Permit::take(&tunnels.session_count, tunnels.settings.sessions) else {
            return refuse(peer, "sessions");
        };
        let Some(_share) = tunnels.per_address.admit(peer.ip()) else { return refuse(peer, "sessions_per_address") };
        let Some(unauthenticated) = tunnels.unauthenticated.admit(peer.ip()) else {
            return refuse(peer, "unauthenticated_per_address");
        };
        let deadline = tokio::time::Instant::now() + tunnels.settings.login_deadline;
        let _ = tcp.set_nodelay(true);
        // Without a hold on the connection no deadline could end it.
        let Ok(wire) = socket2::SockRef::from(&tcp).try_clone() else { return refuse(peer, "descriptors") };
        let mut stream = Stream::tcp(tcp).with_head(head);
        let banner = peek_banner(&mut stream).await;
        let id = tunnels.next_id.fetch_add(1, Ordering::Relaxed);
        let client = String::from_utf8_lossy(&banner).trim_end().to_owned();
        let session = Arc::new(Session::new(id, peer, Some(wire)));
        let _gone = Gone { tunnels: Arc::clone(tunnels), session: Arc::clone(&session) };
        let config = if client.starts_with("SSH-2.0-OpenSSH_") { &self.gcm_only } else { &self.all_ciphers };
        let handler = Owner {
            tunnels: Arc::clone(tunnels),
            session: Arc::clone(&session),
            terminals: HashMap::new(),
            pending: None,
        };
        let wire = Wire { stream: stream.with_head(banner.freeze()), shared: Arc::clone(&session.shared) };
        let stream = BufReader::with_capacity(READ_BYTES, wire);
        let starting = russh::server::run_stream(Arc::clone(config), stream, handler);
        let running = match tokio::time::timeout_at(deadline, starting).await {
            Ok(Ok(running)) => running,
            Ok(Err(error)) => return tracing::debug!(%peer, client, ?error, "no SSH session"),
            Err(_) => return tracing::debug!(%peer, client, "no SSH banner in time"),
        };
        tokio::pin!(running);
        // The library has no login deadline of its own.
        let mut ended = None;
        tokio::select! {
            end = &mut running => ended = Some(end),
            logged_in = tokio::time::timeout_at(deadline, session.authenticated.notified()) => {
                if logged_in.is_err() {
                    tracing::info!(%peer, client, "no login in time");
                    metrics::counter!("adit_ssh_login_timeouts_total").increment(1);
                    session.kill();
                }
            }
        }
        drop(unauthenticated);
        let _present = session.login.get().map(|_| Present::new(metrics::gauge!("adit_sessions")));
        let ended = match ended {
            Some(ended) => ended,
            None => {
                let watch = session.watch(tunnels.settings.keepalive, tunnels.settings.keepalive_deadline);
                tokio::select! {
                    ended = &mut running => ended,
                    () = watch => running.await,
                }
            }
        };
        match ended {
            Ok(()) => tracing::info!(session = id, %peer, client, "session ended"),
            Err(error) => tracing::info!(session = id, %peer, client, %error, "session ended"),
        }
    }
}

pub(super) fn refuse(peer: SocketAddr, limit: &'static str) {
    metrics::counter!("adit_ssh_refused_total", "limit" => limit).increment(1);
    tracing::debug!(%peer, limit, "SSH connection refused");
}

/// Gives back what a session held, however it ended.
pub(super) struct Gone {
    pub(super) tunnels: Arc<Tunnels>,
    pub(super) session: Arc<Session>,
}

impl Drop for Gone {
    fn drop(&mut self) {
        self.session.kill();
        self.session.finish();
        self.tunnels.sessions.remove(&self.session.id);
    }
}

/// What the client says first, as far as it comes within `BANNER_PATIENCE`.
async fn peek_banner(stream: &mut Stream) -> BytesMut {
    let mut banner = BytesMut::with_capacity(BANNER_BYTES);
    let reading = async {
        while banner.len() < BANNER_BYTES && !banner.contains(&b'\n') {
            let room = BANNER_BYTES - banner.len();
            match (&mut *stream).take(room as u64).read_buf(&mut banner).await {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
        }
    };
    let _ = timeout(BANNER_PATIENCE, reading).await;
    banner
}

fn own_config(settings: &SshSettings, host_key: &PrivateKey) -> Result<ssh::Config, String> {
    Ok(ssh::Config {
        version: concat!("SSH-2.0-adit_", env!("CARGO_PKG_VERSION")),
        host_keys: vec![ssh::HostKey::new(host_key)?],
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
    })
}

fn config(settings: &SshSettings, host_key: &PrivateKey, ciphers: &'static [cipher::Name]) -> Config {
    let rsa = |hash| Algorithm::Rsa { hash };
    let mut keys = vec![
        Algorithm::Ed25519,
        Algorithm::Ecdsa { curve: EcdsaCurve::NistP256 },
        Algorithm::Ecdsa { curve: EcdsaCurve::NistP384 },
        rsa(Some(HashAlg::Sha512)),
        rsa(Some(HashAlg::Sha256)),
    ];
    if settings.allow_sha1_rsa {
        keys.push(rsa(None));
    }
    Config {
        server_id: SshId::Standard(Cow::Borrowed(concat!("SSH-2.0-adit_", env!("CARGO_PKG_VERSION")))),
        methods: MethodSet::from(&[MethodKind::PublicKey, MethodKind::KeyboardInteractive][..]),
        auth_rejection_time: settings.reject_delay,
        // OpenSSH's probe with "none" is no attempt.
        auth_rejection_time_initial: Some(Duration::ZERO),
        keys: vec![host_key.clone()],
        // The library's own rekey kills busy sessions; the client's works. A far
        // limit stays for the cipher's sake (chacha20's nonce is 32 bits of packets).
        limits: Limits {
            rekey_write_limit: 1 << 35,
            rekey_read_limit: 1 << 35,
            rekey_time_limit: Duration::from_secs(u32::MAX.into()),
        },
        window_size: u32::try_from(settings.window).unwrap_or(u32::MAX),
        maximum_packet_size: 32768,
        // The channel's own queue is bounded in bytes; the library's only hands over.
        channel_buffer_size: 4,
        event_buffer_size: 64,
        preferred: Preferred {
            // No finite-field groups: one handshake with group 18 costs a second of CPU.
            kex: Cow::Borrowed(&[
                kex::MLKEM768X25519_SHA256,
                kex::CURVE25519,
                kex::CURVE25519_PRE_RFC_8731,
                kex::EXTENSION_SUPPORT_AS_SERVER,
                kex::EXTENSION_OPENSSH_STRICT_KEX_AS_SERVER,
            ]),
            key: Cow::Owned(keys),
            cipher: Cow::Borrowed(ciphers),
            mac: Cow::Borrowed(&[mac::HMAC_SHA256_ETM, mac::HMAC_SHA512_ETM, mac::HMAC_SHA256, mac::HMAC_SHA512]),
            compression: Cow::Borrowed(&[russh::compression::NONE]),
            ..Preferred::DEFAULT
        },
        max_auth_attempts: settings.auth_attempts,
        // Our own watch replaces both.
        inactivity_timeout: None,
        keepalive_interval: None,
        ..Config::default()
    }
}

/// Loads the host key, or makes one and keeps it.
///
/// # Errors
/// What to tell the operator.
pub fn host_key(path: &std::path::Path) -> Result<PrivateKey, String> {
    let at = path.display();
    match std::fs::read_to_string(path) {
        Ok(text) => PrivateKey::from_openssh(&text).map_err(|e| format!("{at} is not an OpenSSH private key: {e}")),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let mut seed = [0; 32];
            aws_lc_rs::rand::fill(&mut seed).map_err(|_| "no random bytes".to_owned())?;
            let pair = russh::keys::ssh_key::private::Ed25519Keypair::from_seed(&seed);
            let key = PrivateKey::from(pair);
            let text = key.to_openssh(LineEnding::LF).map_err(|e| e.to_string())?;
            crate::secret_file::write(path, text.as_bytes()).map_err(|e| format!("{at} cannot be written: {e}"))?;
            Ok(key)
        }
        Err(error) => Err(format!("{at} cannot be read: {error}")),
    }
}

/// The callbacks of one session.
struct Owner {
    tunnels: Arc<Tunnels>,
    session: Arc<Session>,
    /// Session channels that have no shell yet, and whether they have a pty.
    terminals: HashMap<ChannelId, (Channel<Msg>, bool)>,
    /// The login that is accepted once the library says so.
    pending: Option<Login>,
}

/// Session channels of one connection that wait for a shell, and that show the
/// console.
pub(super) const TERMINALS: usize = 4;

impl Owner {
    fn reject() -> Auth {
        Auth::Reject { proceed_with_methods: None, partial_success: false }
    }

    fn log_refusal(&self, user: &str, why: &str) {
        self.session.log_refusal(user, why);
    }

    fn accept(&mut self, user: &str, login: Login) -> Auth {
        let _ = self.session.user.set(user.to_owned());
        self.pending = Some(login);
        Auth::Accept
    }

    /// Whether a client without any key is let in: open mode, from this machine.
    fn lets_anybody_in(&self) -> bool {
        self.tunnels.settings.mode == Mode::Open && self.session.peer.ip().is_loopback()
    }

    fn start_console(&mut self, id: ChannelId, session: &mut russh::server::Session) -> Result<(), russh::Error> {
        let Some((channel, pty)) = self.terminals.remove(&id) else { return session.channel_failure(id) };
        match Permit::take(&self.session.terminals, TERMINALS) {
            Some(place) => {
                session.channel_success(id)?;
                let owner = Arc::clone(&self.session);
                self.tunnels.tasks.spawn(owner.serve_console(channel, pty, place));
                Ok(())
            }
            None => {
                session.channel_failure(id)?;
                session.close(id)
            }
        }
    }
}

impl Handler for Owner {
    type Error = russh::Error;

    async fn auth_none(&mut self, _user: &str) -> Result<Auth, Self::Error> {
        let mut methods = MethodSet::from(&[MethodKind::PublicKey][..]);
        if self.lets_anybody_in() {
            methods.push(MethodKind::KeyboardInteractive);
        }
        Ok(Auth::Reject { proceed_with_methods: Some(methods), partial_success: false })
    }

    async fn auth_keyboard_interactive<'a>(
        &'a mut self,
        user: &str,
        _submethods: &str,
        _response: Option<Response<'a>>,
    ) -> Result<Auth, Self::Error> {
        if self.lets_anybody_in() {
            return Ok(self.accept(user, Login::Nobody));
        }
        self.log_refusal(user, "only keys are accepted");
        Ok(Self::reject())
    }

    async fn auth_publickey_offered(&mut self, user: &str, offer: PublicKeyOffer<'_>) -> Result<Auth, Self::Error> {
        let settings = &self.tunnels.settings;
        if matches!(offer.algorithm, Algorithm::Rsa { hash: None }) && !settings.allow_sha1_rsa {
            self.log_refusal(user, "RSA signatures over SHA-1 are off (ssh.allow_sha1_rsa)");
            return Ok(Self::reject());
        }
        let fingerprint = offer.public_key.fingerprint(HashAlg::Sha256).to_string();
        // The probe does not tell a bare key from a certificate's: where CAs
        // are trusted the decision falls after the signature.
        let any_authority = !settings.cert_authorities.is_empty() || self.tunnels.routes.has_authorities();
        if settings.mode == Mode::Open || any_authority || self.tunnels.routes.knows_key(&fingerprint) {
            return Ok(Auth::Accept);
        }
        self.log_refusal(user, "the key is not in any tunnel's record");
        Ok(Self::reject())
    }

    async fn auth_publickey(&mut self, user: &str, key: VerifiedPublicKey<'_>) -> Result<Auth, Self::Error> {
        let Some(key) = keys::authorized(key.public_key) else { return Ok(Self::reject()) };
        if self.tunnels.settings.mode == Mode::Closed && !self.tunnels.routes.knows_key(&key.fingerprint) {
            self.log_refusal(user, "the key is not in any tunnel's record");
            return Ok(Self::reject());
        }
        Ok(self.accept(user, Login::Key(key)))
    }

    async fn auth_openssh_certificate(&mut self, user: &str, certificate: &Certificate) -> Result<Auth, Self::Error> {
        let tunnels = Arc::clone(&self.tunnels);
        let is_trusted = |ca: &str| {
            tunnels.settings.cert_authorities.iter().any(|k| k.fingerprint == ca) || tunnels.routes.knows_authority(ca)
        };
        match keys::check_certificate(certificate, self.session.peer.ip(), SystemTime::now(), is_trusted) {
            Ok(login) => Ok(self.accept(user, login)),
            Err(why) => {
                self.log_refusal(user, &format!("the certificate is refused: {why}"));
                Ok(Self::reject())
            }
        }
    }

    async fn auth_succeeded(&mut self, session: &mut russh::server::Session) -> Result<(), Self::Error> {
        if let Some(login) = self.pending.take() {
            tracing::info!(
                session = self.session.id,
                peer = %self.session.peer,
                user = self.session.user().escape_debug().to_string(),
                key = login.fingerprint().unwrap_or("none"),
                "logged in"
            );
            let _ = self.session.login.set(login);
        }
        self.session.meet(session.remote_sshid());
        let _ = self.session.order.set(self.tunnels.next_id.fetch_add(1, Ordering::Relaxed));
        let _ = self.session.engine.set(Engine::Library(session.handle()));
        self.tunnels.sessions.insert(self.session.id, Arc::clone(&self.session));
        self.session.authenticated.notify_one();
        Ok(())
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        _session: &mut russh::server::Session,
    ) -> Result<(), Self::Error> {
        if self.terminals.len() < TERMINALS {
            self.terminals.insert(channel.id(), (channel, false));
            reply.accept().await;
        }
        Ok(())
    }

    async fn channel_close(&mut self, id: ChannelId, _: &mut russh::server::Session) -> Result<(), Self::Error> {
        self.terminals.remove(&id);
        Ok(())
    }

    async fn pty_request(
        &mut self,
        id: ChannelId,
        _term: &str,
        _columns: u32,
        _rows: u32,
        _width: u32,
        _height: u32,
        _modes: &[(Pty, u32)],
        session: &mut russh::server::Session,
    ) -> Result<(), Self::Error> {
        match self.terminals.get_mut(&id) {
            Some((_, pty)) => {
                *pty = true;
                session.channel_success(id)
            }
            None => session.channel_failure(id),
        }
    }

    async fn env_request(
        &mut self,
        id: ChannelId,
        _name: &str,
        _value: &str,
        session: &mut russh::server::Session,
    ) -> Result<(), Self::Error> {
        session.channel_failure(id)
    }

    async fn shell_request(&mut self, id: ChannelId, session: &mut russh::server::Session) -> Result<(), Self::Error> {
        self.start_console(id, session)
    }

    async fn exec_request(
        &mut self,
        id: ChannelId,
        _command: &[u8],
        session: &mut russh::server::Session,
    ) -> Result<(), Self::Error> {
        // There is no command to run; the log is what any command shows.
        self.start_console(id, session)
    }

    async fn subsystem_request(
        &mut self,
        id: ChannelId,
        _name: &str,
        session: &mut russh::server::Session,
    ) -> Result<(), Self::Error> {
        session.channel_failure(id)
    }

    async fn tcpip_forward(
        &mut self,
        address: &str,
        port: &mut u32,
        _session: &mut russh::server::Session,
    ) -> Result<bool, Self::Error> {
        let asked = *port;
        let bind = |public: u16| Bind::Tcp(address.to_owned(), if asked == 0 { u32::from(public) } else { asked });
        match self.tunnels.grant(&self.session, naming::of_tcpip(address, asked), bind).await {
            Ok(public) => {
                if asked == 0 {
                    *port = u32::from(public);
                }
                Ok(true)
            }
            Err(why) => {
                self.session.refuse_forward(&format!("{address}:{asked}"), &why);
                Ok(false)
            }
        }
    }

    async fn cancel_tcpip_forward(
        &mut self,
        address: &str,
        port: u32,
        _session: &mut russh::server::Session,
    ) -> Result<bool, Self::Error> {
        Ok(self.session.cancel_forwards(|bind| matches!(bind, Bind::Tcp(a, p) if a == address && *p == port)))
    }

    async fn streamlocal_forward(
        &mut self,
        path: &str,
        _session: &mut russh::server::Session,
    ) -> Result<bool, Self::Error> {
        match self.tunnels.grant(&self.session, naming::of_streamlocal(path), |_| Bind::Path(path.to_owned())).await {
            Ok(_) => Ok(true),
            Err(why) => {
                self.session.refuse_forward(path, &why);
                Ok(false)
            }
        }
    }

    async fn cancel_streamlocal_forward(
        &mut self,
        path: &str,
        _session: &mut russh::server::Session,
    ) -> Result<bool, Self::Error> {
        Ok(self.session.cancel_forwards(|bind| matches!(bind, Bind::Path(p) if p == path)))
    }
}
