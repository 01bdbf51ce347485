//! A login, in the order of its steps: `begin` at the socket's host, `start`,
//! `callback` and its forms at the auth host, `finish` back at the socket's host.
//! Every step may come to another node: what they need is in the browser, sealed
//! (`steps`), and bound to it by a cookie at each of the two hosts.

use std::borrow::Cow;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper::header::{HeaderValue, WWW_AUTHENTICATE};
use hyper::{Method, StatusCode};
use minijinja::context;
use openidconnect::url::form_urlencoded;

use super::cookies;
use super::pages::Reply;
use super::passwords::Checked;
use super::providers::{Ask, Failed};
use super::session::{self, LOCAL_ISSUER, Session};
use super::steps::{
    Broken, CONSENT_LIFE, CONSENTS_MAX, Consent, Flow, Form, HANDOVER_LIFE, Handover, LOGIN_LIFE, Login, Start, State,
    Step, flow_id, hash, open, random, return_to, same, seal,
};
use super::{Asked, Gates, OURS};
use crate::error::Error;
use crate::limits::share_of;
use crate::logins::seal::Place;
use crate::model::gate::{Gate, Oidc};
use crate::model::identity::{Email, Moment, ProviderKind};
use crate::model::{Account, Provider};
use crate::routes::Route;

/// Logins of one browser that may be under way at once, in several tabs.
const AT_ONCE: usize = 4;

/// An answer, or the page that says why there is none.
pub(super) type Stepped<T = Reply> = Result<T, Box<Reply>>;

/// A socket that a login is for.
pub(super) struct Destination {
    pub(super) route: Arc<Route>,
    pub(super) gate: Arc<Gate>,
}

impl Destination {
    pub(super) fn oidc(&self) -> Option<&Oidc> {
        self.gate.oidc.as_ref()
    }
}

impl Gates {
    // --- 1: the socket's host ---

    /// Sends a browser without a login to one.
    pub(super) fn begin(&self, asked: &Asked<'_>, route: &Route, to: &str, choose: bool, now: Moment) -> Reply {
        self.try_begin(asked, route, to, choose, now).unwrap_or_else(|stopped| *stopped)
    }

    fn try_begin(&self, asked: &Asked<'_>, route: &Route, to: &str, choose: bool, now: Moment) -> Stepped {
        let (id, b) = self.made(asked, flow_id().zip(random()))?;
        let place = Place { host: asked.host, socket: route.socket.id.as_str() };
        let x = now.0 + LOGIN_LIFE;
        let start = Start {
            h: asked.host.to_owned(),
            s: route.socket.id.to_string(),
            f: id.clone(),
            hb: hash(&b),
            c: choose,
            x,
        };
        let flow = self.sealed(asked, place, &Flow { b, r: return_to(to).to_owned(), x }, now)?;
        let start = self.sealed(asked, self.auth_place(), &start, now)?;
        let cookie = cookies::set(&format!("{}{id}", cookies::FLOW), &flow, LOGIN_LIFE);
        let to = self.auth_url(&format!("{OURS}start?t={start}"));
        let crowded = self.crowded_out::<Flow>(asked, cookies::FLOW, place, now);
        Ok(Reply::redirect(StatusCode::FOUND, &to).setting(crowded.into_iter().chain(cookie)))
    }

    // --- 2: the auth host ---

    /// Sends the browser on to a provider, or lets it choose one.
    pub(super) async fn start(&self, asked: &Asked<'_>, now: Moment) -> Stepped {
        let query = Parameters::of_query(asked);
        let (sealed, wanted) = (self.one(asked, &query, "t")?, self.one(asked, &query, "p")?);
        let start: Start = self.opened(asked, sealed, None, now)?;
        let to = self.destination(asked, &start)?;
        let providers = self.providers_of(&to);
        let provider = match (wanted, providers.as_slice()) {
            (Some(wanted), all) => match all.iter().find(|one| one.id.as_str() == wanted) {
                Some(provider) => provider,
                None => return Err(self.spoiled(asked, Broken::Bad, Some(self.url(&start.h, "/")))),
            },
            (None, [only]) => only,
            (None, []) => {
                tracing::error!(socket = start.s, "none of the providers of this socket's gate is known");
                return Err(self.unready(asked));
            }
            (None, all) => {
                let sealed = sealed.unwrap_or_default();
                let href = |one: &Provider| format!("{OURS}start?t={sealed}&p={}", one.id);
                let all = all.iter().map(|one| context! { title => &one.title, href => href(one) });
                let said = context! { host => start.h, providers => all.collect::<Vec<_>>(), id => asked.id() };
                return Ok(self.pages.page(StatusCode::OK, "choose.html", said, None));
            }
        };
        self.may_begin(asked, &start.s)?;
        if provider.kind == ProviderKind::Local {
            return self.ask_for_password(asked, start, provider, None, now);
        }
        let (v, n) = self.made(asked, random().zip(random()))?;
        let x = now.0 + LOGIN_LIFE;
        let state = State { start: start.clone(), p: provider.id.to_string(), x };
        let state = self.sealed(asked, self.auth_place(), &state, now)?;
        let login = Login { v, n, h: hash(&state), x };
        let ask = Ask {
            redirect_uri: &self.callback_url(provider),
            state: &state,
            nonce: &login.n,
            verifier: &login.v,
            choose_account: start.c,
        };
        match self.providers.authorize(provider, ask).await {
            Ok(url) => {
                let cookies = self.login_cookie(asked, &start.f, &login, now)?;
                Ok(Reply::redirect(StatusCode::FOUND, &url).setting(cookies))
            }
            Err(failed) => Err(self.failed(asked, &start, provider, &failed)),
        }
    }

    // --- 3: back from the provider ---

    /// Takes the provider's answer.
    pub(super) async fn callback(&self, asked: &Asked<'_>, provider: &str, now: Moment) -> Stepped {
        let query = Parameters::of_query(asked);
        let (state, code) = (self.one(asked, &query, "state")?, self.one(asked, &query, "code")?);
        let (issuer, error) = (self.one(asked, &query, "iss")?, self.one(asked, &query, "error")?);
        let opened: State = self.opened(asked, state, None, now)?;
        let start = opened.start;
        let again = || Some(self.url(&start.h, "/"));
        let to = self.destination(asked, &start)?;
        let here = self.providers_of(&to).into_iter().find(|one| one.id.as_str() == provider);
        let Some(provider) = here.filter(|one| one.id.as_str() == opened.p && one.kind != ProviderKind::Local) else {
            self.tell(&start.s, asked, "login", Err("state"));
            return Err(self.spoiled(asked, Broken::Bad, again()));
        };
        let Some(login) = self.login_of(asked, &start.f, now) else {
            self.tell(&start.s, asked, "login", Err("cookie"));
            return Err(self.no_cookie(asked, &start));
        };
        let state = state.unwrap_or_default();
        if !same(&login.h, &hash(state)) || !self.seen.first(state, Moment(now.0 + LOGIN_LIFE), now) {
            self.tell(&start.s, asked, "login", Err("state"));
            return Err(self.spoiled(asked, Broken::Bad, again()));
        }
        // RFC 9207: whose answer it is, where the provider says that it says so.
        let expected = self.providers.callback_issuer(&provider).await;
        let expected = expected.map_err(|failed| self.failed(asked, &start, &provider, &failed))?;
        let known = session::provider_issuer(&provider);
        if expected.as_deref().is_some_and(|expected| issuer != Some(expected))
            || issuer.is_some_and(|issuer| known.is_some_and(|known| known != issuer))
        {
            self.tell(&start.s, asked, "login", Err("issuer"));
            return Err(self.spoiled(asked, Broken::Bad, again()));
        }
        let done = cookies::clear(&login_name(&start.f));
        if let Some(error) = error {
            let cancelled = error == "access_denied";
            tracing::debug!(provider = %provider.id, error, "the provider sent an error");
            self.tell(&start.s, asked, "login", Err(if cancelled { "cancelled" } else { "provider_error" }));
            let (status, why) = match cancelled {
                true => (StatusCode::FORBIDDEN, format!("{} says that the login was cancelled.", provider.title)),
                false => (StatusCode::BAD_GATEWAY, format!("{} answered with an error.", provider.title)),
            };
            let page = self.again(asked, status, "You are not logged in", &why, again());
            return Ok(page.setting(done));
        }
        let Some(code) = code.filter(|code| !code.is_empty()) else {
            self.tell(&start.s, asked, "login", Err("state"));
            return Err(self.spoiled(asked, Broken::Bad, again()));
        };
        let ask = Ask {
            redirect_uri: &self.callback_url(&provider),
            state,
            nonce: &login.n,
            verifier: &login.v,
            choose_account: start.c,
        };
        let identity = self.providers.redeem(&provider, ask, code).await;
        let identity = identity.map_err(|failed| self.failed(asked, &start, &provider, &failed))?;
        let who = Session::begin(&identity, now);
        if let Some(denied) = self.denied_at(asked, &start, &to, &who, now) {
            return Ok(denied.setting(done));
        }
        let consent = self.consent_of(asked, now);
        if !self.settings.ask_consent || consent.to.contains(&consent_name(&who, &to.route)) {
            return Ok(self.hand_over(asked, &start, who, StatusCode::FOUND, now)?.setting(done));
        }
        // The same cookie for the form alone: what came with it is used up.
        let n = self.made(asked, random())?;
        let (x, hn) = (now.0 + LOGIN_LIFE, hash(&n));
        let cookies = self.login_cookie(asked, &start.f, &Login { v: String::new(), n, h: String::new(), x }, now)?;
        let (host, email, back) = (start.h.clone(), who.email.as_ref().map(Email::to_string), self.origin_of(&start));
        let form = Form { start, p: provider.id.to_string(), hn, who: Some(who), x };
        let token = self.sealed(asked, self.auth_place(), &form, now)?;
        let again = self.url(&host, &format!("{OURS}login?switch=1"));
        let said = context! { host, email, token, again, id => asked.id() };
        Ok(self.pages.page(StatusCode::OK, "continue.html", said, Some(&back)).setting(cookies))
    }

    /// Somebody lets an owner of sockets see their address.
    pub(super) fn consented(&self, asked: &Asked<'_>, body: &[u8], now: Moment) -> Stepped {
        let fields = Parameters::of(body);
        let form = self.form(asked, self.one(asked, &fields, "t")?, now)?;
        let start = form.start;
        let to = self.destination(asked, &start)?;
        let Some(who) = form.who else { return Err(self.spoiled(asked, Broken::Bad, Some(self.url(&start.h, "/")))) };
        let done = cookies::clear(&login_name(&start.f));
        // The rules may have changed while the question stood there.
        if let Some(denied) = self.denied_at(asked, &start, &to, &who, now) {
            return Ok(denied.setting(done));
        }
        let name = consent_name(&who, &to.route);
        let mut to = self.consent_of(asked, now).to;
        to.retain(|one| *one != name);
        to.insert(0, name);
        to.truncate(CONSENTS_MAX);
        let consent = self.sealed(asked, self.auth_place(), &Consent { to, x: now.0 + CONSENT_LIFE }, now)?;
        let remembered = cookies::set(cookies::CONSENT, &consent, CONSENT_LIFE);
        let reply = self.hand_over(asked, &start, who, StatusCode::SEE_OTHER, now)?;
        Ok(reply.setting(done.into_iter().chain(remembered)))
    }

    // --- 3b: accounts of our own ---

    fn ask_for_password(
        &self,
        asked: &Asked<'_>,
        start: Start,
        provider: &Provider,
        wrong: Option<(&str, &str)>,
        now: Moment,
    ) -> Stepped {
        let n = self.made(asked, random())?;
        let (x, hn) = (now.0 + LOGIN_LIFE, hash(&n));
        let cookies = self.login_cookie(asked, &start.f, &Login { v: String::new(), n, h: String::new(), x }, now)?;
        let (host, back) = (start.h.clone(), self.origin_of(&start));
        let form = Form { start, p: provider.id.to_string(), hn, who: None, x };
        let token = self.sealed(asked, self.auth_place(), &form, now)?;
        let (wrong, email) = wrong.unzip();
        let said = context! { host, token, wrong, email, title => &provider.title, id => asked.id() };
        let status = if wrong.is_some() { StatusCode::UNAUTHORIZED } else { StatusCode::OK };
        let page = self.pages.page(status, "local.html", said, Some(&back)).setting(cookies);
        Ok(match wrong {
            Some(_) => page.with(WWW_AUTHENTICATE, HeaderValue::from_static("Adit-Login")),
            None => page,
        })
    }

    /// Somebody gives address and password of an account of ours.
    pub(super) async fn password(&self, asked: &Asked<'_>, body: &[u8], now: Moment) -> Stepped {
        let fields = Parameters::of(body);
        let form = self.form(asked, self.one(asked, &fields, "t")?, now)?;
        let start = form.start;
        let to = self.destination(asked, &start)?;
        let here = self.providers_of(&to).into_iter().find(|one| one.id.as_str() == form.p);
        let Some(provider) = here.filter(|one| one.kind == ProviderKind::Local && form.who.is_none()) else {
            return Err(self.spoiled(asked, Broken::Bad, Some(self.url(&start.h, "/"))));
        };
        let given = self.one(asked, &fields, "email")?.unwrap_or_default().trim();
        let password = self.one(asked, &fields, "password")?.unwrap_or_default();
        let (checked, account) = self.check_account(given, password, asked.ip).await;
        let account = account.filter(|account| !account.signed_up);
        let (Checked::Right { .. }, Some(account)) = (checked, account) else {
            let (why, text) = match checked {
                Checked::Busy(_) => ("busy", "Too many passwords were tried. Wait a moment."),
                _ => ("password", "There is no such account, or this is not its password."),
            };
            self.tell(&start.s, asked, "login", Err(why));
            let mut page = self.ask_for_password(asked, start, &provider, Some((text, given)), now)?;
            if let Checked::Busy(wait) = checked {
                page.status = StatusCode::TOO_MANY_REQUESTS;
                page.headers.remove(WWW_AUTHENTICATE);
                page = page.retry_after(wait.as_secs());
            }
            return Ok(page);
        };
        let who = session_of(&provider, &account, now);
        let done = cookies::clear(&login_name(&start.f));
        if let Some(denied) = self.denied_at(asked, &start, &to, &who, now) {
            return Ok(denied.setting(done));
        }
        // Who types an address into a page that names the host need not be asked
        // whether its owner may see it.
        Ok(self.hand_over(asked, &start, who, StatusCode::SEE_OTHER, now)?.setting(done))
    }

    /// Whether this is the password of the account that logs in by this address; and the
    /// account, unless it may not.
    pub async fn check_account(&self, given: &str, password: &str, ip: IpAddr) -> (Checked, Option<Arc<Account>>) {
        let email = given.parse::<Email>().ok();
        let account = email.as_ref().and_then(|email| self.logins.account(email));
        let (name, hash) = (email.as_ref().map_or(given, Email::as_str), account.as_ref().map(|a| &a.password));
        // Names that do not exist are one place: else each would have a budget of its own.
        let place = account.as_ref().map_or("no account".to_owned(), |account| format!("account {}", account.id));
        let checked = self.passwords.check(&place, ip, name, password, hash.ok_or(None)).await;
        (checked, account.filter(|account| !account.disabled))
    }

    // --- 4: back to the socket's host ---

    fn hand_over(&self, asked: &Asked<'_>, start: &Start, who: Session, status: StatusCode, now: Moment) -> Stepped {
        let j = self.made(asked, random())?;
        let handover = Handover { j, f: start.f.clone(), hb: start.hb.clone(), who, x: now.0 + HANDOVER_LIFE };
        let place = Place { host: &start.h, socket: &start.s };
        let sealed = self.sealed(asked, place, &handover, now)?;
        Ok(Reply::redirect(status, &self.url(&start.h, &format!("{OURS}finish?h={sealed}"))))
    }

    /// Takes the login from the auth host, and lets in the browser that began it.
    pub(super) fn finish(&self, asked: &Asked<'_>, to: &Destination, now: Moment) -> Stepped {
        let socket = &to.route.socket.id;
        let place = Place { host: asked.host, socket: socket.as_str() };
        let (home, query) = (self.url(asked.host, "/"), Parameters::of_query(asked));
        let sealed = self.one(asked, &query, "h")?;
        let handover: Handover = self.opened_at(asked, place, sealed, Some(home.clone()), now)?;
        let name = format!("{}{}", cookies::FLOW, handover.f);
        let seals = self.seals(asked)?;
        let flow = cookies::values(asked.headers, &name).find_map(|flow| open::<Flow>(&seals, place, flow, now).ok());
        let Some(flow) = flow else {
            // Back and forth in the history of who is logged in by now.
            if self.session(asked, socket, now).is_some_and(|session| self.may(to, &session, now)) {
                return Ok(Reply::redirect(StatusCode::SEE_OTHER, &home));
            }
            self.tell(socket, asked, "login", Err("cookie"));
            let said = context! { host => asked.host, again => home, id => asked.id() };
            return Err(Box::new(self.pages.page(StatusCode::BAD_REQUEST, "cookies.html", said, None)));
        };
        let until = Moment(handover.x + session::SKEW);
        if !same(&hash(&flow.b), &handover.hb) || !self.seen.first(&handover.j, until, now) {
            self.tell(socket, asked, "login", Err("handover"));
            return Err(self.spoiled(asked, Broken::Bad, Some(home)));
        }
        let mut session = handover.who;
        let login = format!("{}\n{}\n{}", handover.f, session.issuer, session.subject);
        let id = sealed.and_then(|sealed| seals.session_name(sealed, login.as_bytes()));
        session.name = data_encoding::HEXLOWER.encode(&self.made(asked, id)?);
        let done = cookies::clear(&name);
        if let Err(denied) = to.oidc().map_or(Ok(()), |oidc| session.passes(oidc, &[], &self.logins, now)) {
            self.tell(socket, asked, "login", Err(denied.label()));
            return Ok(self.denied_page(asked, asked.host, session.email.as_ref(), denied).setting(done));
        }
        let Some(cookie) = self.seal_session(asked.host, socket, &session, &to.gate, now) else {
            return Err(self.unready(asked));
        };
        self.tell(socket, asked, "login", Ok(&session.whose()));
        let back = self.url(asked.host, return_to(&flow.r));
        Ok(Reply::redirect(StatusCode::SEE_OTHER, &back).setting(done.into_iter().chain([cookie])))
    }

    // --- what the steps share ---

    /// The socket that a login is for, if it still asks for one.
    fn destination(&self, asked: &Asked<'_>, start: &Start) -> Stepped<Destination> {
        let route = self.routes.by_host(&start.h).filter(|route| route.socket.id.as_str() == start.s);
        let gate = route.as_ref().and_then(|route| route.socket.gate.clone()).filter(|gate| gate.oidc.is_some());
        match route.zip(gate) {
            Some((route, gate)) => Ok(Destination { route, gate }),
            None => {
                let why = format!("{} does not ask for a login any more.", start.h);
                let home = Some(self.url(&start.h, "/"));
                Err(Box::new(self.again(asked, StatusCode::NOT_FOUND, "No login is needed", &why, home)))
            }
        }
    }

    fn providers_of(&self, to: &Destination) -> Vec<Arc<Provider>> {
        let ids = to.oidc().map(|oidc| oidc.providers.as_slice()).unwrap_or_default();
        ids.iter().filter_map(|id| self.logins.provider(id)).collect()
    }

    /// Whether one more login may begin: of this address, and at this socket.
    fn may_begin(&self, asked: &Asked<'_>, socket: &str) -> Stepped<()> {
        let (ip, now) = (asked.ip.to_canonical(), Instant::now());
        let exempt = self.exempt_loopback && ip.is_loopback();
        let taken = if exempt { Ok(()) } else { self.begun_by_address.take(share_of(ip), now) };
        let taken = taken.and_then(|()| self.begun_at_socket.take(socket.to_owned(), now));
        taken.map_err(|wait: Duration| {
            self.tell(socket, asked, "login", Err("busy"));
            let (status, text) = (StatusCode::TOO_MANY_REQUESTS, Error::TooManyLogins.text());
            Box::new(self.again(asked, status, "Too many logins", text, None).retry_after(wait.as_secs()))
        })
    }

    pub(super) fn may(&self, to: &Destination, session: &Session, now: Moment) -> bool {
        to.oidc().is_some_and(|oidc| session.passes(oidc, &[], &self.logins, now).is_ok())
    }

    /// The page for who logged in, and may not visit.
    fn denied_at(
        &self,
        asked: &Asked<'_>,
        start: &Start,
        to: &Destination,
        who: &Session,
        now: Moment,
    ) -> Option<Reply> {
        let denied = who.passes(to.oidc()?, &[], &self.logins, now).err()?;
        self.tell(&start.s, asked, "login", Err(denied.label()));
        Some(self.denied_page(asked, &start.h, who.email.as_ref(), denied))
    }

    /// A form of ours, as it comes back from the browser that it was shown to.
    fn form(&self, asked: &Asked<'_>, sealed: Option<&str>, now: Moment) -> Stepped<Form> {
        // Another site's page cannot send our forms: it can neither know the token
        // nor hide where it is.
        if !asked.is_own_form() {
            return Err(self.spoiled(asked, Broken::Bad, None));
        }
        let form: Form = self.opened(asked, sealed, None, now)?;
        let Some(login) = self.login_of(asked, &form.start.f, now) else {
            self.tell(&form.start.s, asked, "login", Err("cookie"));
            return Err(self.no_cookie(asked, &form.start));
        };
        if !login.h.is_empty() || !same(&hash(&login.n), &form.hn) {
            self.tell(&form.start.s, asked, "login", Err("form"));
            return Err(self.spoiled(asked, Broken::Bad, Some(self.url(&form.start.h, "/"))));
        }
        Ok(form)
    }

    fn login_of(&self, asked: &Asked<'_>, flow: &str, now: Moment) -> Option<Login> {
        let seals = self.logins.seals()?;
        let place = self.auth_place();
        cookies::values(asked.headers, &login_name(flow)).find_map(|sealed| open(&seals, place, sealed, now).ok())
    }

    fn login_cookie(&self, asked: &Asked<'_>, flow: &str, login: &Login, now: Moment) -> Stepped<Vec<HeaderValue>> {
        let sealed = self.sealed(asked, self.auth_place(), login, now)?;
        let mut lines = self.crowded_out::<Login>(asked, cookies::LOGIN, self.auth_place(), now);
        lines.retain(|line| !line.as_bytes().starts_with(format!("{}=", login_name(flow)).as_bytes()));
        lines.extend(cookies::set(&login_name(flow), &sealed, LOGIN_LIFE));
        Ok(lines)
    }

    fn consent_of(&self, asked: &Asked<'_>, now: Moment) -> Consent {
        let opened = self.logins.seals().and_then(|seals| {
            let place = self.auth_place();
            cookies::values(asked.headers, cookies::CONSENT).find_map(|sealed| open(&seals, place, sealed, now).ok())
        });
        opened.unwrap_or(Consent { to: Vec::new(), x: 0 })
    }

    /// Takes the oldest of a browser's logins that are under way, and those that
    /// ended, out of its jar, where one more would be too many.
    fn crowded_out<T: Step>(&self, asked: &Asked<'_>, prefix: &str, place: Place<'_>, now: Moment) -> Vec<HeaderValue> {
        let Some(seals) = self.logins.seals() else { return Vec::new() };
        let mut all: Vec<(u64, &str)> = Vec::new();
        for (name, value) in cookies::named(asked.headers, prefix).take(32) {
            let ours = name.len() == prefix.len() + 16
                && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b));
            if ours && !all.iter().any(|(_, other)| *other == name) {
                let ends = open::<T>(&seals, place, value, now).map_or(0, |step| step.ends());
                all.push((ends, name));
            }
        }
        all.sort_by(|a, b| b.cmp(a));
        let kept = all.iter().take(AT_ONCE - 1).filter(|(ends, _)| *ends > 0).count();
        all.iter().skip(kept).filter_map(|(_, name)| cookies::clear(name)).collect()
    }

    pub(super) fn auth_place(&self) -> Place<'_> {
        Place { host: self.settings.host.as_ref().map_or("", |host| host.as_str()), socket: "" }
    }

    fn callback_url(&self, provider: &Provider) -> String {
        self.auth_url(&format!("{OURS}cb/{}", provider.id))
    }

    /// The host that a form leads to in the end, as policies name it.
    fn origin_of(&self, start: &Start) -> String {
        self.url(&start.h, "")
    }

    pub(super) fn seals(&self, asked: &Asked<'_>) -> Stepped<Arc<crate::logins::seal::Seals>> {
        self.logins.seals().ok_or_else(|| self.unready(asked))
    }

    /// A sealed step, or the page that says that no key seals.
    pub(super) fn sealed<T: Step>(
        &self,
        asked: &Asked<'_>,
        place: Place<'_>,
        step: &T,
        now: Moment,
    ) -> Stepped<String> {
        let seals = self.seals(asked)?;
        seal(&seals, place, step, now).ok_or_else(|| self.unready(asked))
    }

    /// A step of the auth host, or the page that says why it cannot be taken.
    pub(super) fn opened<T: Step>(
        &self,
        asked: &Asked<'_>,
        sealed: Option<&str>,
        again: Option<String>,
        now: Moment,
    ) -> Stepped<T> {
        self.opened_at(asked, self.auth_place(), sealed, again, now)
    }

    fn opened_at<T: Step>(
        &self,
        asked: &Asked<'_>,
        place: Place<'_>,
        sealed: Option<&str>,
        again: Option<String>,
        now: Moment,
    ) -> Stepped<T> {
        let seals = self.seals(asked)?;
        open(&seals, place, sealed.unwrap_or_default(), now).map_err(|broken| {
            let why = match broken {
                Broken::UnknownKey => "unknown_key",
                Broken::Bad => "forged",
                Broken::Old => "expired",
            };
            self.tell(place.socket, asked, "login", Err(why));
            self.spoiled(asked, broken, again)
        })
    }

    /// Something made of random bytes.
    fn made<T>(&self, asked: &Asked<'_>, made: Option<T>) -> Stepped<T> {
        made.ok_or_else(|| self.unready(asked))
    }

    /// The one value of a parameter: two could be read in two ways.
    pub(super) fn one<'p>(&self, asked: &Asked<'_>, from: &'p Parameters<'_>, name: &str) -> Stepped<Option<&'p str>> {
        let mut values = from.0.iter().filter(|(key, _)| key == name).map(|(_, value)| value.as_ref());
        match (values.next(), values.next()) {
            (value, None) => Ok(value),
            (_, Some(_)) => Err(self.spoiled(asked, Broken::Bad, None)),
        }
    }

    // --- pages ---

    pub(super) fn again(
        &self,
        asked: &Asked<'_>,
        status: StatusCode,
        title: &str,
        why: &str,
        again: Option<String>,
    ) -> Reply {
        let said = context! { title, why, again, id => asked.id() };
        self.pages.page(status, "again.html", said, None)
    }

    pub(super) fn spoiled(&self, asked: &Asked<'_>, broken: Broken, again: Option<String>) -> Box<Reply> {
        let title = "This login cannot go on";
        Box::new(match broken {
            Broken::UnknownKey => {
                let why = "This part of the network has not heard of it yet. Try again in a moment.";
                let here = (*asked.method == Method::GET).then(|| self.here(asked));
                self.again(asked, StatusCode::SERVICE_UNAVAILABLE, title, why, here).retry_after(1)
            }
            Broken::Bad => {
                let why = "It was begun in another window or browser, was used already, or came here incomplete.";
                self.again(asked, StatusCode::BAD_REQUEST, title, why, again)
            }
            Broken::Old => {
                let why = "It took too long.";
                self.again(asked, StatusCode::BAD_REQUEST, title, why, again)
            }
        })
    }

    pub(super) fn unready(&self, asked: &Asked<'_>) -> Box<Reply> {
        tracing::error!("there is no keyring that seals now: logins are not possible");
        let error = Error::GateUnready;
        let status = StatusCode::SERVICE_UNAVAILABLE;
        Box::new(self.again(asked, status, "No login at the moment", error.text(), None).retry_after(5))
    }

    fn no_cookie(&self, asked: &Asked<'_>, start: &Start) -> Box<Reply> {
        let said = context! { host => asked.host, again => self.url(&start.h, "/"), id => asked.id() };
        Box::new(self.pages.page(StatusCode::BAD_REQUEST, "cookies.html", said, None))
    }

    fn failed(&self, asked: &Asked<'_>, start: &Start, provider: &Provider, failed: &Failed) -> Box<Reply> {
        let again = self.url(&start.h, "/");
        tracing::warn!(provider = %provider.id, reason = failed.text(), "a login failed at its provider");
        Box::new(match failed {
            Failed::Down(_) => {
                self.tell(&start.s, asked, "login", Err("provider_down"));
                let said = context! { provider => &provider.title, again, id => asked.id() };
                self.pages.page(StatusCode::SERVICE_UNAVAILABLE, "down.html", said, None).retry_after(10)
            }
            Failed::Refused(_) => {
                self.tell(&start.s, asked, "login", Err("provider_refused"));
                let why = format!("What {} answered does not prove who you are.", provider.title);
                self.again(asked, StatusCode::BAD_GATEWAY, "You are not logged in", &why, Some(again))
            }
        })
    }
}

/// The login of an account of our own.
fn session_of(provider: &Provider, account: &Account, now: Moment) -> Session {
    Session {
        name: String::new(),
        provider: provider.id.clone(),
        issuer: LOCAL_ISSUER.to_owned(),
        subject: account.id.to_string(),
        email: Some(account.email.clone()),
        domain_vouched: true,
        // Another password, and this login is out.
        provider_session: Some(account.password.digest().to_owned()),
        issued: now.0,
        auth_time: Some(now.0),
        seen: now.0,
        named: Default::default(),
        told: Default::default(),
    }
}

fn login_name(flow: &str) -> String {
    format!("{}{flow}", cookies::LOGIN)
}

/// Account and owner of sockets. Who is not known by a name or a key owns one
/// socket alone.
fn consent_name(who: &Session, route: &Route) -> String {
    let socket = &route.socket;
    let made_by = socket.created_by.as_deref().filter(|by| by.starts_with("SHA256:"));
    let owner = match socket.owner.as_deref().or(made_by) {
        Some(owner) => format!("owner {owner}"),
        None => format!("socket {}", socket.id),
    };
    session::identity_digest(&who.issuer, &owner, &who.subject)
}

/// The fields of a query or a form.
pub(super) struct Parameters<'a>(Vec<(Cow<'a, str>, Cow<'a, str>)>);

impl<'a> Parameters<'a> {
    pub(super) fn of(body: &'a [u8]) -> Self {
        Self(form_urlencoded::parse(body).take(64).collect())
    }

    pub(super) fn of_query(asked: &'a Asked<'_>) -> Self {
        Self::of(asked.target.query().unwrap_or_default().as_bytes())
    }
}
