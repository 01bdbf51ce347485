//! Out again: here, everywhere, at the provider, and when the provider says so.
//! A login that ends is a record of the feed, so that no node takes its cookie.

use std::time::{Duration, Instant};

use hyper::StatusCode;
use minijinja::context;

use super::login::{Destination, Parameters, Stepped};
use super::pages::Reply;
use super::providers::Failed;
use super::session::{Session, identity_digest};
use super::steps::{Broken, LOGIN_LIFE, Logout};
use super::{Asked, Gates, OURS, cookies};
use crate::feed::records::{Condition, RecordError};
use crate::limits::share_of;
use crate::model::identity::{Email, Moment, Whose};
use crate::model::{Provider, Revocation};

/// No login lasts longer.
const LONGEST: Duration = Duration::from_secs(31 * 86_400);
/// How long a logout token may be used again, in seconds: they are believed for
/// minutes.
const JTI_LIFE: u64 = 3600;

impl Gates {
    /// Asks whether to log out: a link alone must not.
    pub(super) fn ask_to_log_out(&self, asked: &Asked<'_>, to: &Destination, now: Moment) -> Reply {
        match self.session(asked, &to.route.socket.id, now) {
            Some(session) => {
                let said = context! { host => asked.host, email => session.email.as_ref().map(Email::as_str), id => asked.id() };
                self.pages.page(StatusCode::OK, "logout.html", said, None)
            }
            None => self.out(asked),
        }
    }

    /// Ends the login that a browser has here, and all of the same person if asked.
    pub(super) async fn log_out(&self, asked: &Asked<'_>, to: &Destination, body: &[u8], now: Moment) -> Stepped {
        if !asked.is_own_form() {
            return Err(self.spoiled(asked, Broken::Bad, Some(self.url(asked.host, &format!("{OURS}logout")))));
        }
        let fields = Parameters::of(body);
        let everywhere = self.one(asked, &fields, "where")? == Some("everywhere");
        let socket = &to.route.socket.id;
        let out = Reply::redirect(StatusCode::SEE_OTHER, &self.url(asked.host, &format!("{OURS}out")));
        // What has ended needs no end.
        let session = self.session(asked, socket, now).filter(|session| self.may(to, session, now));
        let Some(session) = session else {
            return Ok(out.setting(cookies::clear(cookies::SESSION)));
        };
        let mut ended = vec![Whose::Session(session.name.clone())];
        if everywhere {
            ended.push(Whose::Identity(session.whose()));
        }
        for whose in ended {
            // It may have been issued by a clock that is ahead of this one.
            if let Err(error) = self.revoke(whose, now, now.max(Moment(session.issued))).await {
                tracing::error!(%error, "a login that was ended could not be revoked");
                let why = "You are logged out here. Other devices could not be told: try again in a moment.";
                let here = Some(self.url(asked.host, &format!("{OURS}logout")));
                let page = self.again(asked, StatusCode::SERVICE_UNAVAILABLE, "Not everywhere", why, here);
                return Err(Box::new(page.retry_after(5)));
            }
        }
        tracing::info!(target: "adit::audit", %socket, kind = "login", decision = "logout", everywhere, "gate");
        let provider = self.provider_of(&session).filter(|_| everywhere);
        let reply = match provider {
            Some(provider) => {
                let logout = Logout { p: provider.id.to_string(), x: now.0 + LOGIN_LIFE };
                let sealed = self.sealed(asked, self.auth_place(), &logout, now)?;
                Reply::redirect(StatusCode::SEE_OTHER, &self.auth_url(&format!("{OURS}logout?t={sealed}")))
            }
            None => out,
        };
        Ok(reply.setting(cookies::clear(cookies::SESSION)))
    }

    /// Ends the provider's own session too, where it has a place for that
    /// (RP-Initiated Logout 1.0).
    pub(super) async fn end_session(&self, asked: &Asked<'_>, now: Moment) -> Stepped {
        let query = Parameters::of_query(asked);
        let logout: Logout = self.opened(asked, self.one(asked, &query, "t")?, None, now)?;
        let provider = logout.p.parse().ok().and_then(|id| self.logins.provider(&id));
        let back = self.auth_url(&format!("{OURS}out"));
        let end = match &provider {
            Some(provider) => self.providers.end_session(provider, &back).await,
            None => None,
        };
        Ok(Reply::redirect(StatusCode::FOUND, &end.unwrap_or(back)))
    }

    /// Says that one is out.
    pub(super) fn out(&self, asked: &Asked<'_>) -> Reply {
        let host = asked.route.map(|_| asked.host);
        let again = host.map(|host| self.url(host, "/"));
        let said = context! { host, again, id => asked.id() };
        self.pages.page(StatusCode::OK, "out.html", said, None)
    }

    /// A provider says that somebody logged out there (OpenID Connect Back-Channel
    /// Logout 1.0).
    pub(super) async fn backchannel(&self, asked: &Asked<'_>, provider: &str, body: &[u8], now: Moment) -> Reply {
        let refused = |status: StatusCode, why: &str| {
            if self.audit.take((), Instant::now()).is_ok() {
                tracing::warn!(provider, why, "a logout by the provider was refused");
            }
            Reply::json(status, &serde_json::json!({ "error": "invalid_request", "error_description": why }))
        };
        let found = provider.parse().ok().and_then(|id| self.logins.provider(&id));
        let Some(provider) = found else {
            return Reply::json(StatusCode::NOT_FOUND, &serde_json::json!({ "error": "not_found" }));
        };
        // Of the sender: else anybody could use up what the provider has.
        if let Err(wait) = self.logged_out_by.take(share_of(asked.ip.to_canonical()), Instant::now()) {
            let told = Reply::json(StatusCode::TOO_MANY_REQUESTS, &serde_json::json!({ "error": "slow_down" }));
            return told.retry_after(wait.as_secs());
        }
        let fields = Parameters::of(body);
        let token = match self.one(asked, &fields, "logout_token") {
            Ok(Some(token)) => token,
            _ => return refused(StatusCode::BAD_REQUEST, "there is not one logout_token"),
        };
        let out = match self.providers.logout_token(&provider, token).await {
            Ok(out) => out,
            Err(Failed::Down(why)) => return refused(StatusCode::SERVICE_UNAVAILABLE, &why).retry_after(5),
            Err(Failed::Refused(why)) => return refused(StatusCode::BAD_REQUEST, &why),
        };
        let jti = format!("{} {}", out.issuer, out.jti);
        if !self.seen.first(&jti, Moment(now.0 + JTI_LIFE), now) {
            return refused(StatusCode::BAD_REQUEST, "the logout token was used before");
        }
        // With `sid` it is one session of the provider's; without, all of the subject's.
        let ended = match (&out.provider_session, &out.subject) {
            (Some(session), _) => identity_digest(&out.issuer, "session", session),
            (None, Some(subject)) => identity_digest(&out.issuer, "subject", subject),
            (None, None) => return refused(StatusCode::BAD_REQUEST, "the logout token names nobody"),
        };
        if let Err(error) = self.revoke(Whose::Identity(ended), now, now).await {
            tracing::error!(%error, "a logout by the provider could not be written");
            return refused(StatusCode::SERVICE_UNAVAILABLE, "it could not be written").retry_after(5);
        }
        tracing::info!(target: "adit::audit", provider = %provider.id, kind = "login", decision = "logout", "gate");
        Reply::bare(StatusCode::OK)
    }

    /// Who is logged in, for a page's own scripts.
    pub(super) fn identity(&self, asked: &Asked<'_>, to: &Destination, now: Moment) -> Reply {
        let session = self.session(asked, &to.route.socket.id, now);
        let session = session.filter(|session| self.may(to, session, now));
        match (session, to.oidc()) {
            (Some(session), Some(oidc)) => Reply::json(
                StatusCode::OK,
                &serde_json::json!({
                    "email": session.email.as_ref().map(Email::as_str),
                    "sub": session.subject,
                    "idp": session.provider.as_str(),
                    "issued": session.issued,
                    "expires": session.issued + oidc.absolute.as_secs(),
                }),
            ),
            _ => Reply::json(StatusCode::UNAUTHORIZED, &serde_json::json!({ "error": "unauthorized" })),
        }
    }

    fn provider_of(&self, session: &Session) -> Option<std::sync::Arc<Provider>> {
        self.logins.provider(&session.provider)
    }

    /// Revokes what was issued until `last`, on all nodes.
    async fn revoke(&self, whose: Whose, now: Moment, last: Moment) -> Result<(), RecordError> {
        let id = match &whose {
            Whose::Session(name) => format!("session-{name}"),
            Whose::Identity(digest) => format!("identity-{digest}"),
            // Only by the API.
            Whose::Email(_) => return Ok(()),
        };
        let Ok(id) = id.parse() else { return Ok(()) };
        let (issued_before, until) = (Moment(last.0 + 1), now.after(LONGEST));
        let revocation = Revocation { id, whose, issued_before, until, extra: serde_json::Map::new() };
        self.records.put_unclaimed(revocation, Condition::Any).await.map(|_| ())
    }
}
