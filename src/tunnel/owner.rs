//! What the engine asks of one session: who may log in, and each forward and
//! console handed to the module that decides.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::keys::{self, Login};
use super::{Bind, Mode, Session, Tunnels, naming};
use crate::limits::{AddressPermit, Permit};
use crate::metrics::Present;
use crate::model::AuthorizedKey;
use crate::ssh::{Asked, Attempt, ChannelStream, Method, Owner as Decides, Question, RequestId, Verdict};

/// Forwards of one session that wait to be registered.
const FORWARDS_WAITING: usize = 256;

/// Refused keys that a client is told of.
const REFUSALS: usize = 16;

/// Consoles of one session.
const TERMINALS: usize = 4;

/// What decides for one session.
pub(super) struct Owner {
    tunnels: Arc<Tunnels>,
    session: Arc<Session>,
    /// The login that is accepted once the engine says so.
    pending: Option<(String, Login)>,
    /// Why keys were refused that nobody was told of yet.
    refusals: Vec<String>,
    unauthenticated: Option<AddressPermit>,
    present: Option<Present>,
    register: mpsc::Sender<(RequestId, Asked)>,
    forwards: Option<mpsc::Receiver<(RequestId, Asked)>>,
    /// Consoles that are shown, and what ends them.
    consoles: HashMap<u32, CancellationToken>,
}

impl Owner {
    pub(super) fn new(tunnels: Arc<Tunnels>, session: Arc<Session>, unauthenticated: AddressPermit) -> Self {
        let (register, forwards) = mpsc::channel(FORWARDS_WAITING);
        Self {
            tunnels,
            session,
            pending: None,
            refusals: Vec::new(),
            unauthenticated: Some(unauthenticated),
            present: None,
            register,
            forwards: Some(forwards),
            consoles: HashMap::new(),
        }
    }

    fn lets_anybody_in(&self) -> bool {
        self.tunnels.settings.mode == Mode::Open && self.session.peer.ip().is_loopback()
    }

    fn is_trusted(&self, authority: &str) -> bool {
        self.tunnels.settings.cert_authorities.iter().any(|k| k.fingerprint == authority)
            || self.tunnels.routes.knows_authority(authority)
    }

    /// Whom a key or certificate logs in, or why nobody.
    fn login(&self, method: &Method<'_>) -> Result<Login, Cow<'static, str>> {
        let settings = &self.tunnels.settings;
        let login = match method {
            Method::Offer(key) | Method::Key(key) => {
                let known = |key: &AuthorizedKey| {
                    settings.mode == Mode::Open || self.tunnels.routes.knows_key(&key.fingerprint)
                };
                let key = keys::authorized(key).filter(known).ok_or("the key is not in any tunnel's record")?;
                Login::Key(key)
            }
            Method::OfferCertificate(certificate) | Method::Certificate(certificate) => {
                let (peer, now) = (self.session.peer.ip(), SystemTime::now());
                keys::check_certificate(certificate, peer, now, |ca| self.is_trusted(ca))
                    .map_err(|why| format!("the certificate is refused: {why}"))?
            }
            Method::Interactive(_) if self.lets_anybody_in() => Login::Nobody,
            Method::Sha1 => return Err("RSA signatures over SHA-1 are off (ssh.allow_sha1_rsa)".into()),
            Method::None | Method::Interactive(_) | Method::Other => return Err("only keys are accepted".into()),
        };
        self.tunnels.revoked.refusal(&login).map_or(Ok(login), |why| Err(why.into()))
    }
}

impl Decides for Owner {
    fn judge(&mut self, attempt: &Attempt<'_>) -> Verdict {
        if matches!(attempt.method, Method::None) {
            return Verdict::Reject;
        }
        match self.login(&attempt.method) {
            Ok(login) => {
                if !matches!(attempt.method, Method::Offer(_) | Method::OfferCertificate(_)) {
                    self.pending = Some((attempt.user.to_owned(), login));
                }
                Verdict::Accept
            }
            // What was wrong with the keys, for clients that show it; it can be asked once.
            Err(_) if matches!(attempt.method, Method::Interactive(_)) && !self.refusals.is_empty() => {
                let refusals = std::mem::take(&mut self.refusals).join("\n");
                Verdict::Ask(Question { instruction: format!("adit: no login.\n{refusals}\n"), prompts: Vec::new() })
            }
            Err(why) => {
                self.session.log_refusal(attempt.user, &why);
                if let Some(key) = attempt.method.fingerprint()
                    && self.refusals.len() < REFUSALS
                {
                    self.refusals.push(format!("{key}: {why}"));
                }
                Verdict::Reject
            }
        }
    }

    fn methods(&self) -> &'static [&'static str] {
        if self.lets_anybody_in() || !self.refusals.is_empty() {
            &["publickey", "keyboard-interactive"]
        } else {
            &["publickey"]
        }
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
            self.tunnels.tasks.spawn(register(Arc::clone(&self.tunnels), Arc::clone(&self.session), forwards));
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
        let session = Arc::clone(&self.session);
        self.tunnels.tasks.spawn(async move {
            let done = interrupted.clone().drop_guard();
            session.show_console(session.link.console(channel), pty, &interrupted).await;
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
async fn register(tunnels: Arc<Tunnels>, session: Arc<Session>, mut forwards: mpsc::Receiver<(RequestId, Asked)>) {
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
        session.link.reply(request, answer);
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
            self.disconnect("bye");
        }
    }
}
