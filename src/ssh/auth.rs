//! Logging in (RFC 4252, RFC 4256): signatures are verified here; who may log
//! in is the owner's to judge. The same is done for every user name.

use std::time::Instant;

use ssh_key::{Certificate, HashAlg, PublicKey};

use super::core::Core;
use super::hostkey::{self, SignatureAlgorithm};
use super::wire::{Put, Reader};
use super::{Fatal, Owner, msg};

const CERTIFICATE: &str = "-cert-v01@openssh.com";

/// The longest user name, in bytes.
const USER_BYTES: usize = 256;

/// Requests of one connection, also those that do not count as failed: an agent
/// asks for each of its keys.
const REQUESTS: usize = 100;

/// Prompts of one question that we read answers to.
const ANSWERS: u32 = 8;

/// One attempt to log in.
pub struct Attempt<'a> {
    /// As whom.
    pub user: &'a str,
    /// By what.
    pub method: Method<'a>,
}

/// By what somebody logs in.
pub enum Method<'a> {
    /// Asks what is possible; counts as no attempt.
    None,
    /// Would this key do? Not proven yet.
    Offer(&'a PublicKey),
    /// Would this certificate do? Its CA's signature holds; not proven yet.
    OfferCertificate(&'a Certificate),
    /// The client has the private key.
    Key(&'a PublicKey),
    /// The client has the private key, and the CA's signature holds.
    Certificate(&'a Certificate),
    /// The answers to a question; empty at first.
    Interactive(&'a [String]),
    /// An RSA signature over SHA-1, which is not allowed.
    Sha1,
    /// Something that is not done here, a password for example.
    Other,
}

impl Method<'_> {
    /// The fingerprint of the key that is shown, certified or not.
    pub fn fingerprint(&self) -> Option<String> {
        let key = match self {
            Self::Offer(key) | Self::Key(key) => key.key_data(),
            Self::OfferCertificate(certificate) | Self::Certificate(certificate) => certificate.public_key(),
            _ => return None,
        };
        Some(key.fingerprint(HashAlg::Sha256).to_string())
    }
}

/// What the owner makes of an attempt.
pub enum Verdict {
    /// In. For an offer: worth a signature.
    Accept,
    /// Not with this.
    Reject,
    /// After an answer (keyboard-interactive alone).
    Ask(Question),
}

/// What a person is asked.
pub struct Question {
    /// The text before the prompts.
    pub instruction: String,
    /// Each with whether the answer is shown.
    pub prompts: Vec<(String, bool)>,
}

/// How far the login is.
#[derive(Default)]
pub(super) struct Login {
    service: bool,
    done: bool,
    failed: usize,
    requests: usize,
    /// Whose question is open.
    asked: Option<String>,
    /// An answer that is held back, until when.
    pub(super) delayed: Option<(Instant, Vec<u8>)>,
}

impl Login {
    pub(super) fn is_done(&self) -> bool {
        self.done
    }

    /// As if somebody had logged in, for tests of what comes after.
    pub(super) fn complete() -> Self {
        Self { service: true, done: true, ..Self::default() }
    }

    pub(super) fn started(&self) -> bool {
        self.service
    }
}

impl Core {
    pub(super) fn signature_algorithms(&self) -> impl Iterator<Item = SignatureAlgorithm> + use<> {
        let sha1 = self.config.sha1_rsa;
        SignatureAlgorithm::ALL.iter().copied().filter(move |a| sha1 || *a != SignatureAlgorithm::RsaSha1)
    }

    pub(super) fn service(&mut self, mut read: Reader<'_>) -> Result<(), Fatal> {
        if read.text()? != "ssh-userauth" || self.login.done {
            return Err(Fatal::PROTOCOL);
        }
        self.login.service = true;
        self.send(|out| {
            out.put_u8(msg::SERVICE_ACCEPT);
            out.put_string(b"ssh-userauth");
        });
        Ok(())
    }

    pub(super) fn userauth(&mut self, number: u8, mut read: Reader<'_>, owner: &mut dyn Owner) -> Result<(), Fatal> {
        if self.login.done {
            return Ok(()); // RFC 4252 §5.1: ignored
        }
        self.login.requests += 1;
        if !self.login.service || self.login.requests > REQUESTS {
            return Err(if self.login.service { Fatal::FLOOD } else { Fatal::PROTOCOL });
        }
        let asked = self.login.asked.take();
        if number == msg::USERAUTH_INFO_RESPONSE {
            let user = asked.ok_or(Fatal::PROTOCOL)?;
            let count = read.u32()?;
            if count > ANSWERS {
                return Err(Fatal::FLOOD);
            }
            let answers = (0..count).map(|_| read.text().map(str::to_owned)).collect::<Result<Vec<_>, _>>()?;
            return self.judged(&user, Method::Interactive(&answers), owner);
        }
        let (user, service) = (read.text()?, read.text()?);
        if user.len() > USER_BYTES || service != "ssh-connection" {
            return Err(Fatal::PROTOCOL);
        }
        match read.text()? {
            "none" => self.judged(user, Method::None, owner),
            "publickey" => self.publickey(user, read, owner),
            "keyboard-interactive" => self.judged(user, Method::Interactive(&[]), owner),
            _ => self.judged(user, Method::Other, owner),
        }
    }

    fn publickey(&mut self, user: &str, mut read: Reader<'_>, owner: &mut dyn Owner) -> Result<(), Fatal> {
        let signed = read.bool()?;
        let (name, blob) = (read.text()?, read.string()?);
        let certified = name.strip_suffix(CERTIFICATE);
        let algorithm = SignatureAlgorithm::of(certified.unwrap_or(name));
        let Some(algorithm) = algorithm else { return self.judged(user, Method::Other, owner) };
        if algorithm == SignatureAlgorithm::RsaSha1 && !self.config.sha1_rsa {
            return self.judged(user, Method::Sha1, owner);
        }
        let certificate = match certified {
            Some(_) => match hostkey::certificate(blob) {
                Some(certificate) => Some(certificate),
                None => return self.judged(user, Method::Other, owner),
            },
            None => None,
        };
        let key = match &certificate {
            Some(certificate) => Some(PublicKey::from(certificate.public_key().clone())),
            None => hostkey::public_key(blob),
        };
        let Some(key) = key else { return self.judged(user, Method::Other, owner) };
        if !signed {
            let offer = match &certificate {
                Some(certificate) => Method::OfferCertificate(certificate),
                None => Method::Offer(&key),
            };
            if !matches!(owner.judge(&Attempt { user, method: offer }), Verdict::Accept) {
                return self.reject(owner, true);
            }
            self.send(|out| {
                out.put_u8(msg::USERAUTH_PK_OK);
                out.put_string(name.as_bytes());
                out.put_string(blob);
            });
            return Ok(());
        }
        // RFC 4252 §7.
        let mut message = Vec::with_capacity(blob.len() + 256);
        message.put_string(&self.session_id);
        message.put_u8(msg::USERAUTH_REQUEST);
        message.put_string(user.as_bytes());
        message.put_string(b"ssh-connection");
        message.put_string(b"publickey");
        message.put_bool(true);
        message.put_string(name.as_bytes());
        message.put_string(blob);
        if !hostkey::verify(algorithm, key.key_data(), &message, read.string()?) {
            return self.judged(user, Method::Other, owner);
        }
        match &certificate {
            Some(certificate) => self.judged(user, Method::Certificate(certificate), owner),
            None => self.judged(user, Method::Key(&key), owner),
        }
    }

    fn judged(&mut self, user: &str, method: Method<'_>, owner: &mut dyn Owner) -> Result<(), Fatal> {
        let counts = !matches!(method, Method::None);
        let may_ask = matches!(method, Method::Interactive(_));
        match owner.judge(&Attempt { user, method }) {
            Verdict::Accept => {
                self.login.done = true;
                self.send(|out| out.put_u8(msg::USERAUTH_SUCCESS));
                self.opened();
                owner.logged_in(self.client_version());
                self.announce_host_keys();
                Ok(())
            }
            Verdict::Ask(question) if may_ask => {
                self.login.asked = Some(user.to_owned());
                self.send(|out| {
                    out.put_u8(msg::USERAUTH_INFO_REQUEST);
                    out.put_string(b"");
                    out.put_string(question.instruction.as_bytes());
                    out.put_string(b"");
                    out.put_u32(u32::try_from(question.prompts.len()).unwrap_or(0));
                    for (prompt, shown) in &question.prompts {
                        out.put_string(prompt.as_bytes());
                        out.put_bool(*shown);
                    }
                });
                Ok(())
            }
            _ => self.reject(owner, counts),
        }
    }

    fn reject(&mut self, owner: &mut dyn Owner, counts: bool) -> Result<(), Fatal> {
        let mut failure = vec![msg::USERAUTH_FAILURE];
        failure.put_names(owner.methods().iter().copied());
        failure.put_bool(false);
        if counts {
            self.login.failed += 1;
            if self.login.failed > self.config.auth_attempts {
                return Err(Fatal::AUTH_ATTEMPTS);
            }
            self.login.delayed = Some((self.now + self.config.reject_delay, failure));
        } else {
            self.send(|out| out.put_bytes(&failure));
        }
        Ok(())
    }

    pub(super) fn reject_now(&mut self) {
        if let Some((_, failure)) = self.login.delayed.take() {
            self.send(|out| out.put_bytes(&failure));
        }
    }
}
