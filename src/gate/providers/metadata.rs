//! What OpenID providers say of themselves, and their keys: kept for as long as
//! they allow, fetched by one at a time, served stale while they are down, and not
//! asked again right after they failed.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use dashmap::DashMap;
use openidconnect::core::{
    CoreAuthDisplay, CoreClaimName, CoreClaimType, CoreClientAuthMethod, CoreGrantType, CoreJsonWebKey,
    CoreJweContentEncryptionAlgorithm, CoreJweKeyManagementAlgorithm, CoreResponseMode, CoreResponseType,
    CoreSubjectIdentifierType,
};
use openidconnect::{
    AdditionalProviderMetadata, AsyncHttpClient, DiscoveryError, HttpRequest, HttpResponse, IssuerUrl, JsonWebKeySet,
    ProviderMetadata,
};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::fetch::{Fetch, Unfetched, What, is_here, max_age};
use super::{Failed, Inner};
use crate::model::{Provider, ProviderId};

/// How long metadata and keys count where the provider does not say.
const FRESH: Duration = Duration::from_secs(3600);

/// The shortest and the longest that it may say: a login must not cost two more
/// requests, and a new endpoint must be heard of within a day.
const FRESH_MIN: Duration = Duration::from_secs(300);
const FRESH_MAX: Duration = Duration::from_secs(86_400);

/// How long after that they serve while the provider is down.
const STALE: Duration = Duration::from_secs(86_400);

/// After a failure it is not asked for so long: whoever comes is answered at once.
const BREAK: Duration = Duration::from_secs(10);

/// Keys are fetched before their time at most this often: anybody can send a token
/// that names a key that nobody has.
const KEYS_AGAIN: Duration = Duration::from_secs(30);

/// What of the metadata the crate does not know.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct More {
    #[serde(default)]
    pub(super) end_session_endpoint: Option<String>,
    #[serde(default)]
    pub(super) authorization_response_iss_parameter_supported: Option<bool>,
}

impl AdditionalProviderMetadata for More {}

pub(super) type Metadata = ProviderMetadata<
    More,
    CoreAuthDisplay,
    CoreClientAuthMethod,
    CoreClaimName,
    CoreClaimType,
    CoreGrantType,
    CoreJweContentEncryptionAlgorithm,
    CoreJweKeyManagementAlgorithm,
    CoreJsonWebKey,
    CoreResponseMode,
    CoreResponseType,
    CoreSubjectIdentifierType,
>;

/// What is known of one provider; its keys are in the metadata.
pub(super) struct Known {
    pub(super) metadata: Metadata,
    fresh_until: Instant,
}

/// What is known of all. Operators choose the ids, and few: what is known of one
/// whose record is gone stays.
#[derive(Default)]
pub(super) struct Metadatas {
    all: DashMap<ProviderId, Arc<Entry>>,
}

/// One provider, as long as its record names the same issuer and client.
struct Entry {
    issuer: String,
    client_id: String,
    state: Mutex<State>,
    /// Held by who fetches.
    turn: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Default)]
struct State {
    known: Option<Arc<Known>>,
    /// When it failed last, and how.
    failed: Option<(Instant, String)>,
    /// When keys were fetched before their time.
    keys_asked: Option<Instant>,
}

enum Look {
    Fresh(Arc<Known>),
    Stale(Arc<Known>),
    Missing,
}

impl Metadatas {
    /// What is known of a provider, fetched if need be.
    ///
    /// # Errors
    /// `Down`: it cannot be had, and what was known before is too old.
    pub(super) async fn known(inner: &Arc<Inner>, provider: &Arc<Provider>) -> Result<Arc<Known>, Failed> {
        let entry = inner.metadatas.entry(provider);
        let turn = match entry.look()? {
            Look::Fresh(known) => return Ok(known),
            // One asks, the others need not wait for it.
            Look::Stale(known) => match Arc::clone(&entry.turn).try_lock_owned() {
                Ok(turn) => turn,
                Err(_) => return Ok(known),
            },
            Look::Missing => Arc::clone(&entry.turn).lock_owned().await,
        };
        // While we waited, another one asked.
        let stale = match entry.look()? {
            Look::Fresh(known) => return Ok(known),
            Look::Stale(known) => Some(known),
            Look::Missing => None,
        };
        let (inner, provider) = (Arc::clone(inner), Arc::clone(provider));
        to_its_end(async move {
            let _turn = turn;
            match discover(&inner.fetch, &provider).await {
                Ok(known) => Ok(entry.learn(known)),
                Err(why) => {
                    let kept = stale.is_some();
                    tracing::warn!(provider = %provider.id, %why, kept, "a login provider's metadata cannot be had");
                    entry.fail(&why);
                    stale.ok_or(Failed::Down(why))
                }
            }
        })
        .await
    }

    /// The same with keys that are newer than those of `old`, which lack one.
    ///
    /// # Errors
    /// `Refused`: they were fetched just now, so the key is not the provider's.
    /// `Down`: they cannot be had.
    pub(super) async fn newer_keys(
        inner: &Arc<Inner>,
        provider: &Arc<Provider>,
        old: &Arc<Known>,
    ) -> Result<Arc<Known>, Failed> {
        let entry = inner.metadatas.entry(provider);
        let turn = Arc::clone(&entry.turn).lock_owned().await;
        {
            let mut state = entry.state.lock();
            match &state.known {
                Some(known) if Arc::ptr_eq(known, old) => {}
                Some(newer) => return Ok(Arc::clone(newer)),
                None => return Err(Failed::Down("its record changed amid a login".into())),
            }
            if let Some(why) = state.broken() {
                return Err(Failed::Down(why));
            }
            if state.keys_asked.is_some_and(|asked| asked.elapsed() < KEYS_AGAIN) {
                return Err(Failed::Refused("the token is signed by a key that the provider does not publish".into()));
            }
            state.keys_asked = Some(Instant::now());
        }
        let (inner, provider, old) = (Arc::clone(inner), Arc::clone(provider), Arc::clone(old));
        to_its_end(async move {
            let _turn = turn;
            let asker = Asker::new(&inner.fetch, &provider);
            match JsonWebKeySet::fetch_async(old.metadata.jwks_uri(), &asker).await {
                Ok(keys) => {
                    let metadata = old.metadata.clone().set_jwks(keys);
                    Ok(entry.learn(Known { metadata, fresh_until: old.fresh_until }))
                }
                Err(error) => {
                    let why = undiscovered(error);
                    tracing::warn!(provider = %provider.id, %why, "a login provider's keys cannot be had");
                    entry.fail(&why);
                    // Its pause is the shorter one: the key may be a good one.
                    entry.state.lock().keys_asked = None;
                    Err(Failed::Down(why))
                }
            }
        })
        .await
    }

    fn entry(&self, provider: &Provider) -> Arc<Entry> {
        let issuer = provider.issuer.as_ref().map(|issuer| issuer.as_str()).unwrap_or_default();
        let same = |entry: &Entry| entry.issuer == issuer && entry.client_id == provider.client_id;
        if let Some(entry) = self.all.get(&provider.id)
            && same(&entry)
        {
            return Arc::clone(&entry);
        }
        let mut entry = self.all.entry(provider.id.clone()).or_insert_with(|| Arc::new(Entry::new(provider, issuer)));
        if !same(&entry) {
            *entry = Arc::new(Entry::new(provider, issuer));
        }
        Arc::clone(&entry)
    }
}

impl Entry {
    fn new(provider: &Provider, issuer: &str) -> Self {
        Self {
            issuer: issuer.to_owned(),
            client_id: provider.client_id.clone(),
            state: Mutex::default(),
            turn: Arc::default(),
        }
    }

    fn look(&self) -> Result<Look, Failed> {
        let state = self.state.lock();
        let now = Instant::now();
        let broken = state.broken();
        match (&state.known, broken) {
            (Some(known), _) if now < known.fresh_until => Ok(Look::Fresh(Arc::clone(known))),
            // While it is not asked, the stale one is as good as it gets.
            (Some(known), Some(_)) if now < known.fresh_until + STALE => Ok(Look::Fresh(Arc::clone(known))),
            (Some(known), None) if now < known.fresh_until + STALE => Ok(Look::Stale(Arc::clone(known))),
            (_, Some(why)) => Err(Failed::Down(why)),
            (_, None) => Ok(Look::Missing),
        }
    }

    fn learn(&self, known: Known) -> Arc<Known> {
        let known = Arc::new(known);
        let mut state = self.state.lock();
        (state.known, state.failed) = (Some(Arc::clone(&known)), None);
        known
    }

    fn fail(&self, why: &str) {
        self.state.lock().failed = Some((Instant::now(), why.to_owned()));
    }
}

/// Fetches whether or not who wanted it stays: whoever asks and leaves would
/// otherwise use up the one try that all others wait for. Both fetches end by
/// themselves, within their deadlines.
async fn to_its_end<T: Send + 'static>(
    fetching: impl Future<Output = Result<T, Failed>> + Send + 'static,
) -> Result<T, Failed> {
    match tokio::spawn(fetching).await {
        Ok(done) => done,
        Err(_) => Err(Failed::Down("it could not be asked".into())),
    }
}

impl State {
    fn broken(&self) -> Option<String> {
        let (at, why) = self.failed.as_ref()?;
        (at.elapsed() < BREAK).then(|| format!("not asked again yet: {why}"))
    }
}

async fn discover(fetch: &Fetch, provider: &Arc<Provider>) -> Result<Known, String> {
    let issuer = provider.issuer.as_ref().ok_or("the record names no issuer")?;
    let issuer = IssuerUrl::new(issuer.as_str().to_owned()).map_err(|_| "the issuer is no URL")?;
    let asker = Asker::new(fetch, provider);
    let metadata = Metadata::discover_async(issuer, &asker).await.map_err(undiscovered)?;
    let here = asker.here;
    let more = metadata.additional_metadata();
    let endpoints = [
        Some(metadata.authorization_endpoint().as_str()),
        metadata.token_endpoint().map(|at| at.as_str()),
        metadata.userinfo_endpoint().map(|at| at.as_str()),
        more.end_session_endpoint.as_deref(),
    ];
    if endpoints.into_iter().flatten().any(|at| !may_be_asked(at, here)) {
        return Err("its metadata names an endpoint that is not https".into());
    }
    let fresh = asker.heard.lock().unwrap_or(FRESH).clamp(FRESH_MIN, FRESH_MAX);
    Ok(Known { metadata, fresh_until: Instant::now() + fresh })
}

/// Our HTTP as the crate wants it.
struct Asker<'a> {
    fetch: &'a Fetch,
    provider: &'a Provider,
    /// Whether the issuer is on this machine without TLS.
    here: bool,
    /// The shortest that an answer may be kept.
    heard: Mutex<Option<Duration>>,
}

impl<'a> Asker<'a> {
    fn new(fetch: &'a Fetch, provider: &'a Provider) -> Self {
        let here = provider.issuer.as_ref().is_some_and(|issuer| issuer.as_str().starts_with("http://"));
        Self { fetch, provider, here, heard: Mutex::default() }
    }

    async fn ask(&self, request: HttpRequest) -> Result<HttpResponse, Unfetched> {
        if !may_be_asked(&request.uri().to_string(), self.here) {
            return Err(Unfetched("its metadata names an endpoint that is not https".into()));
        }
        let keys = !request.uri().path().ends_with("/.well-known/openid-configuration");
        let what = if keys { What::Keys } else { What::Metadata };
        let answer = self.fetch.send(self.provider, what, request).await?;
        if let Some(age) = max_age(&answer) {
            let mut heard = self.heard.lock();
            *heard = Some(heard.map_or(age, |before| before.min(age)));
        }
        Ok(answer)
    }
}

impl<'c> AsyncHttpClient<'c> for Asker<'_> {
    type Error = Unfetched;
    type Future = Pin<Box<dyn Future<Output = Result<HttpResponse, Unfetched>> + Send + 'c>>;

    fn call(&'c self, request: HttpRequest) -> Self::Future {
        Box::pin(self.ask(request))
    }
}

/// Whether an endpoint of a provider's metadata may be asked, or browsers be sent
/// there: https, and where the issuer itself is on this machine, http on it too. A
/// provider elsewhere has no business with what listens here.
fn may_be_asked(at: &str, here: bool) -> bool {
    let Ok(at) = openidconnect::url::Url::parse(at) else { return false };
    match at.scheme() {
        "https" => true,
        "http" => here && at.host_str().is_some_and(is_here),
        _ => false,
    }
}

/// The crate's errors, in words of ours: theirs quote what was received.
fn undiscovered(error: DiscoveryError<Unfetched>) -> String {
    match error {
        DiscoveryError::Request(error) => error.to_string(),
        DiscoveryError::Response(status, ..) if status == hyper::StatusCode::OK => {
            "its metadata or keys are not sent as JSON".into()
        }
        DiscoveryError::Response(status, ..) => {
            format!("answered {} to who asks for metadata or keys", status.as_u16())
        }
        DiscoveryError::Parse(_) => "its metadata or keys are unreadable".into(),
        DiscoveryError::Validation(_) => "its metadata names another issuer".into(),
        DiscoveryError::UrlParse(_) => "its issuer is no URL".into(),
        _ => "its metadata cannot be asked for".into(),
    }
}
