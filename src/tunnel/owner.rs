//! An owner's SSH connection on our own engine: limits at the door, who may log
//! in, and each forward and console handed to the module that decides.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use russh::keys::ssh_key::HashAlg;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::keys::{self, Login};
use super::server::{Gone, TERMINALS, refuse};
use super::session::Engine;
use super::{Bind, Mode, Session, Tunnels, naming};
use crate::limits::{AddressPermit, Permit};
use crate::metrics::Present;
use crate::ssh::{
    Asked, Attempt, ChannelStream, Config, Driver, Ended, Fatal, Link, Method, Owner as Decides, RequestId, Verdict,
};

/// Forwards of one session that wait to be registered.
const FORWARDS_WAITING: usize = 256;

/// Serves one connection until it ends. `head` is what was read already.
pub(super) async fn serve(
    tunnels: &Arc<Tunnels>,
    config: &Arc<Config>,
    tcp: TcpStream,
    head: bytes::Bytes,
    peer: SocketAddr,
) {
    let Some(_node) = Permit::take(&tunnels.session_count, tunnels.settings.sessions) else {
        return refuse(peer, "sessions");
    };
    let Some(_share) = tunnels.per_address.admit(peer.ip()) else { return refuse(peer, "sessions_per_address") };
    let Some(unauthenticated) = tunnels.unauthenticated.admit(peer.ip()) else {
        return refuse(peer, "unauthenticated_per_address");
    };
    let _ = tcp.set_nodelay(true);
    let id = tunnels.next_id.fetch_add(1, Ordering::Relaxed);
    let session = Arc::new(Session::new(id, peer, None));
    let _gone = Gone { tunnels: Arc::clone(tunnels), session: Arc::clone(&session) };
    let link = Link::new(Arc::clone(config));
    let _ = session.engine.set(Engine::Own(Arc::clone(&link)));
    let (register, forwards) = mpsc::channel(FORWARDS_WAITING);
    let owner = Owner {
        tunnels: Arc::clone(tunnels),
        session,
        link: Arc::clone(&link),
        pending: None,
        unauthenticated: Some(unauthenticated),
        present: None,
        register,
        forwards: Some(forwards),
        consoles: HashMap::new(),
    };
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

/// What decides for one session.
struct Owner {
    tunnels: Arc<Tunnels>,
    session: Arc<Session>,
    link: Arc<Link>,
    /// The login that is accepted once the engine says so.
    pending: Option<(String, Login)>,
    unauthenticated: Option<AddressPermit>,
    present: Option<Present>,
    register: mpsc::Sender<(RequestId, Asked)>,
    forwards: Option<mpsc::Receiver<(RequestId, Asked)>>,
    /// Consoles that are shown, and what ends them.
    consoles: HashMap<u32, CancellationToken>,
}

impl Owner {
    fn rejected(&self, user: &str, why: &str) -> Verdict {
        self.session.log_refusal(user, why);
        Verdict::Reject
    }

    fn accepted(&mut self, user: &str, login: Login) -> Verdict {
        self.pending = Some((user.to_owned(), login));
        Verdict::Accept
    }

    fn lets_anybody_in(&self) -> bool {
        self.tunnels.settings.mode == Mode::Open && self.session.peer.ip().is_loopback()
    }

    fn is_trusted(&self, authority: &str) -> bool {
        self.tunnels.settings.cert_authorities.iter().any(|k| k.fingerprint == authority)
            || self.tunnels.routes.knows_authority(authority)
    }

    fn may_log_in(&self, fingerprint: &str) -> bool {
        self.tunnels.settings.mode == Mode::Open || self.tunnels.routes.knows_key(fingerprint)
    }
}

impl Decides for Owner {
    fn judge(&mut self, attempt: &Attempt<'_>) -> Verdict {
        const NOT_RECORDED: &str = "the key is not in any tunnel's record";
        let user = attempt.user;
        let checked = |this: &Self, certificate: &_| {
            keys::check_certificate(certificate, this.session.peer.ip(), SystemTime::now(), |ca| this.is_trusted(ca))
        };
        match &attempt.method {
            Method::None => Verdict::Reject,
            Method::Offer(key) if self.may_log_in(&key.fingerprint(HashAlg::Sha256).to_string()) => Verdict::Accept,
            Method::Offer(_) => self.rejected(user, NOT_RECORDED),
            Method::Key(key) => match keys::authorized(key) {
                Some(key) if self.may_log_in(&key.fingerprint) => self.accepted(user, Login::Key(key)),
                _ => self.rejected(user, NOT_RECORDED),
            },
            Method::OfferCertificate(certificate) => match checked(self, certificate) {
                Ok(_) => Verdict::Accept,
                Err(why) => self.rejected(user, &format!("the certificate is refused: {why}")),
            },
            Method::Certificate(certificate) => match checked(self, certificate) {
                Ok(login) => self.accepted(user, login),
                Err(why) => self.rejected(user, &format!("the certificate is refused: {why}")),
            },
            Method::Interactive(_) if self.lets_anybody_in() => self.accepted(user, Login::Nobody),
            Method::Sha1 => self.rejected(user, "RSA signatures over SHA-1 are off (ssh.allow_sha1_rsa)"),
            Method::Interactive(_) | Method::Other => self.rejected(user, "only keys are accepted"),
        }
    }

    fn methods(&self) -> &'static [&'static str] {
        if self.lets_anybody_in() { &["publickey", "keyboard-interactive"] } else { &["publickey"] }
    }

    fn logged_in(&mut self, client: &str) {
        let Some((user, login)) = self.pending.take() else { return };
        tracing::info!(
            session = self.session.id,
            peer = %self.session.peer,
            user = user.escape_debug().to_string(),
            key = login.fingerprint().unwrap_or("none"),
            client,
            "logged in"
        );
        let _ = self.session.user.set(user);
        let _ = self.session.login.set(login);
        let _ = self.session.order.set(self.tunnels.next_id.fetch_add(1, Ordering::Relaxed));
        self.tunnels.sessions.insert(self.session.id, Arc::clone(&self.session));
        self.unauthenticated = None;
        self.present = Some(Present::new(metrics::gauge!("adit_sessions")));
    }

    fn forward(&mut self, request: RequestId, asked: Asked) {
        // One after another: the n-th unnamed forward has the n-th name.
        if let Some(forwards) = self.forwards.take() {
            let (tunnels, session, link) = (&self.tunnels, &self.session, &self.link);
            let registrar = register(Arc::clone(tunnels), Arc::clone(session), Arc::clone(link), forwards);
            self.tunnels.tasks.spawn(registrar);
        }
        // As many may wait as the engine lets be asked at once.
        let _ = self.register.try_send((request, asked));
    }

    fn cancel(&mut self, asked: &Asked) -> bool {
        self.session.cancel_forwards(|bind| match (bind, asked) {
            (Bind::Tcp(address, port), Asked::Tcp(asked, asked_port)) => address == asked && port == asked_port,
            (Bind::Path(path), Asked::Path(asked)) => path == asked,
            _ => false,
        })
    }

    fn console(&mut self, channel: u32, pty: bool) -> bool {
        let Some(place) = Permit::take(&self.session.terminals, TERMINALS) else { return false };
        let interrupted = CancellationToken::new();
        self.consoles.retain(|_, shown| !shown.is_cancelled());
        self.consoles.insert(channel, interrupted.clone());
        let (session, link) = (Arc::clone(&self.session), Arc::clone(&self.link));
        self.tunnels.tasks.spawn(async move {
            let done = interrupted.clone().drop_guard();
            session.show_console(link.console(channel), pty, &interrupted).await;
            drop((done, place));
        });
        true
    }

    fn signal(&mut self, channel: u32) {
        if let Some(shown) = self.consoles.get(&channel) {
            shown.cancel();
        }
    }
}

/// Registers what is asked for, in order, until the session ends.
async fn register(
    tunnels: Arc<Tunnels>,
    session: Arc<Session>,
    link: Arc<Link>,
    mut forwards: mpsc::Receiver<(RequestId, Asked)>,
) {
    while let Some((request, asked)) = forwards.recv().await {
        let granted = match &asked {
            Asked::Tcp(address, port) => {
                let bind = |public: u16| Bind::Tcp(address.clone(), if *port == 0 { u32::from(public) } else { *port });
                tunnels.grant(&session, naming::of_tcpip(address, *port), bind).await
            }
            Asked::Path(path) => {
                tunnels.grant(&session, naming::of_streamlocal(path), |_| Bind::Path(path.clone())).await
            }
        };
        let what = match &asked {
            Asked::Tcp(address, port) => format!("{address}:{port}"),
            Asked::Path(path) => path.clone(),
        };
        let answer = match granted {
            Ok(public) => Some(matches!(asked, Asked::Tcp(_, 0)).then_some(u32::from(public))),
            Err(why) => {
                session.refuse_forward(&what, &why);
                None
            }
        };
        link.reply(request, answer);
    }
}

impl Session {
    /// Serves the owner's terminal until it closes or asks to leave.
    async fn show_console(&self, stream: ChannelStream, pty: bool, interrupted: &CancellationToken) {
        let line_end = if pty { "\r\n" } else { "\n" };
        self.console.attach();
        let (mut read, mut write) = tokio::io::split(stream);
        let show = async {
            loop {
                let text = self.console.next(line_end).await;
                if write.write_all(text.as_bytes()).await.is_err() {
                    return;
                }
            }
        };
        let listen = async {
            let mut typed = [0; 256];
            loop {
                match read.read(&mut typed).await {
                    Ok(0) if !pty => std::future::pending().await, // `ssh -T` with its input closed
                    Ok(0) | Err(_) => return false,
                    // Ctrl-C and Ctrl-D come as bytes: the client's terminal is raw.
                    Ok(n) if pty && typed.iter().take(n).any(|b| matches!(b, 3 | 4)) => return true,
                    Ok(_) => {}
                }
            }
        };
        let leave = tokio::select! {
            () = show => false,
            leave = listen => leave,
            () = interrupted.cancelled() => true,
            () = self.ended.cancelled() => false,
        };
        read.unsplit(write).exit(0);
        if leave {
            // The client leaves by itself when its shell has closed; be sure of it.
            let _ = tokio::time::timeout(std::time::Duration::from_secs(1), self.ended.cancelled()).await;
            self.disconnect("bye").await;
        }
    }
}
