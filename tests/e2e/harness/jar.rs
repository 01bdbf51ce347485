//! Cookies as a browser keeps them: RFC 6265bis where a login could go wrong by
//! it, and Chromium's limits, written apart from the code that it tests.

use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use super::url::Url;

/// Chromium's: cookies of one site, and what is left once there are more.
const PER_SITE: usize = 180;
const KEPT_PER_SITE: usize = 150;
/// Chromium's: name and value together.
const LARGEST: usize = 4096;
/// Chromium's: how long a cookie that tells no SameSite goes with a cross-site POST.
const LAX_ALLOWING_POST: Duration = Duration::from_secs(120);

/// The attribute; unset, it is nearly Lax.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SameSite {
    Strict,
    Lax,
    None,
    Unset,
}

/// How a request stands to the site that it goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// Typed, or begun by a page of the same site.
    SameSite,
    /// Another site's page sends the whole tab there, with GET or HEAD.
    CrossNavigation,
    /// The same with another method.
    CrossPost,
    /// Another site's page asks, and stays.
    CrossFetch,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cookie {
    pub name: String,
    pub value: String,
    /// Without a dot.
    pub domain: String,
    /// For this host alone: it came without a Domain.
    pub host_only: bool,
    pub path: String,
    pub secure: bool,
    pub http_only: bool,
    pub same_site: SameSite,
    /// None for the browser's own session.
    pub expires: Option<SystemTime>,
    made: SystemTime,
    created: u64,
    used: u64,
}

/// A cookie jar.
#[derive(Debug, Clone, Default)]
pub struct Jar {
    cookies: Vec<Cookie>,
    /// Public suffixes besides every top level domain, as the list would have them.
    pub public_suffixes: Vec<String>,
    /// How far this browser's clock is ahead.
    pub ahead: Duration,
    turn: u64,
}

impl Jar {
    /// What it holds and has not expired.
    pub fn all(&self) -> impl Iterator<Item = &Cookie> {
        let now = self.now();
        self.cookies.iter().filter(move |c| c.expires.is_none_or(|at| at > now))
    }

    /// The cookie of this name that `host` would get at any path.
    pub fn get(&self, host: &str, name: &str) -> Option<&Cookie> {
        self.all().find(|c| c.name == name && c.goes_to(host))
    }

    /// Puts a value into the cookie of this name, or a new one in (for this host
    /// alone, Secure, HttpOnly, Lax, `/`).
    pub fn put(&mut self, host: &str, name: &str, value: &str) {
        let (now, turn) = (self.now(), self.next_turn());
        if let Some(held) = self.cookies.iter_mut().find(|c| c.name == name && c.goes_to(host)) {
            value.clone_into(&mut held.value);
            return;
        }
        self.cookies.push(Cookie {
            name: name.to_owned(),
            value: value.to_owned(),
            domain: host.to_owned(),
            host_only: true,
            path: "/".to_owned(),
            secure: true,
            http_only: true,
            same_site: SameSite::Lax,
            expires: None,
            made: now,
            created: turn,
            used: turn,
        });
    }

    /// Takes out what `host` would get by this name.
    pub fn remove(&mut self, host: &str, name: &str) {
        self.cookies.retain(|c| c.name != name || !c.goes_to(host));
    }

    pub fn clear(&mut self) {
        self.cookies.clear();
    }

    /// The Cookie header of a request, none where nothing goes with it.
    pub fn header(&mut self, url: &Url, reach: Reach) -> Option<String> {
        let (now, turn) = (self.now(), self.next_turn());
        let mut sent: Vec<&mut Cookie> = self
            .cookies
            .iter_mut()
            .filter(|c| c.expires.is_none_or(|at| at > now) && c.goes_to(&url.host) && c.covers(url.path()))
            .filter(|c| !c.secure || url.is_secure())
            .filter(|c| match (c.same_site, reach) {
                (_, Reach::SameSite) | (SameSite::None, _) => true,
                (SameSite::Lax | SameSite::Unset, Reach::CrossNavigation) => true,
                (SameSite::Unset, Reach::CrossPost) => now.duration_since(c.made).is_ok_and(|d| d < LAX_ALLOWING_POST),
                _ => false,
            })
            .collect();
        sent.sort_by_key(|c| (usize::MAX - c.path.len(), c.created));
        sent.iter_mut().for_each(|c| c.used = turn);
        let pairs: Vec<_> = sent
            .iter()
            .map(|c| if c.name.is_empty() { c.value.clone() } else { format!("{}={}", c.name, c.value) })
            .collect();
        (!pairs.is_empty()).then(|| pairs.join("; "))
    }

    /// Takes one Set-Cookie line of an answer from `url`; says why where it does not.
    pub fn take(&mut self, url: &Url, line: &str, reach: Reach) -> Result<(), &'static str> {
        if line.bytes().any(|b| matches!(b, 0..=8 | 10..=31 | 127)) {
            return Err("control characters");
        }
        let mut parts = line.split(';');
        let pair = parts.next().unwrap();
        let (name, value) = pair.split_once('=').map_or(("", pair.trim()), |(n, v)| (n.trim(), v.trim()));
        if name.is_empty() && value.is_empty() {
            return Err("nothing in it");
        }
        if name.len() + value.len() > LARGEST {
            return Err("too large");
        }
        let (now, turn) = (self.now(), self.next_turn());
        let mut new = Cookie {
            name: name.to_owned(),
            value: value.to_owned(),
            domain: url.host.clone(),
            host_only: true,
            path: String::new(),
            secure: false,
            http_only: false,
            same_site: SameSite::Unset,
            expires: None,
            made: now,
            created: turn,
            used: turn,
        };
        let (mut max_age, mut domain) = (None, "");
        for attribute in parts {
            let (key, value) = attribute.split_once('=').unwrap_or((attribute, ""));
            let value = value.trim();
            if value.len() > 1024 {
                continue;
            }
            match key.trim().to_ascii_lowercase().as_str() {
                "secure" => new.secure = true,
                "httponly" => new.http_only = true,
                "path" => new.path = if value.starts_with('/') { value.to_owned() } else { String::new() },
                "domain" => domain = value,
                "max-age" => max_age = value.parse::<i64>().ok().or(max_age),
                "expires" => new.expires = date(value).or(new.expires),
                "samesite" => {
                    new.same_site = match value.to_ascii_lowercase().as_str() {
                        "strict" => SameSite::Strict,
                        "lax" => SameSite::Lax,
                        "none" => SameSite::None,
                        _ => SameSite::Unset,
                    }
                }
                _ => {}
            }
        }
        let attribute_path = new.path.clone();
        if new.path.is_empty() {
            // RFC 6265bis, 5.1.4: the folder that the request's path is in.
            let end = url.path().rfind('/').unwrap_or(0);
            new.path = if end == 0 { "/".to_owned() } else { url.path()[..end].to_owned() };
        }
        if let Some(seconds) = max_age {
            let span = Duration::from_secs(seconds.max(0).unsigned_abs().min(400 * 86_400));
            new.expires = Some(if seconds <= 0 { SystemTime::UNIX_EPOCH } else { now + span });
        }
        let domain = domain.strip_prefix('.').unwrap_or(domain).to_ascii_lowercase();
        if !domain.is_empty() {
            if !domain_matches(&url.host, &domain) {
                return Err("another domain");
            }
            if self.is_public_suffix(&domain) && domain != url.host {
                return Err("a public suffix");
            }
            new.host_only = self.is_public_suffix(&domain) || is_address(&domain);
            new.domain = domain.clone();
        }
        if new.secure && !url.is_secure() {
            return Err("Secure over plain HTTP");
        }
        if new.same_site == SameSite::None && !new.secure {
            return Err("SameSite=None without Secure");
        }
        if new.same_site != SameSite::None && reach == Reach::CrossFetch {
            return Err("SameSite of another site's answer");
        }
        // Of a cookie without a name too: what is sent reads the same.
        let whole = if name.is_empty() { value } else { name }.to_ascii_lowercase();
        if whole.starts_with("__host-") && (!new.secure || !domain.is_empty() || attribute_path != "/") {
            return Err("__Host- without what it promises");
        }
        if whole.starts_with("__secure-") && !new.secure {
            return Err("__Secure- without Secure");
        }
        if (whole.starts_with("__host-http-") || whole.starts_with("__http-")) && !new.http_only {
            return Err("an Http prefix without HttpOnly");
        }
        if name.is_empty() && (whole.starts_with("__host-") || whole.starts_with("__secure-")) {
            return Err("a prefix without a name");
        }
        let shadows = |c: &Cookie| {
            let over = domain_matches(&c.domain, &new.domain) || domain_matches(&new.domain, &c.domain);
            c.secure && c.name == new.name && over && c.covers(&new.path)
        };
        if !url.is_secure() && self.cookies.iter().any(shadows) {
            return Err("a Secure one stands");
        }
        let same = |c: &Cookie| {
            (&c.name, &c.domain, c.host_only, &c.path) == (&new.name, &new.domain, new.host_only, &new.path)
        };
        if let Some(at) = self.cookies.iter().position(same) {
            new.created = self.cookies.remove(at).created;
        }
        if new.expires.is_none_or(|at| at > now) {
            self.cookies.push(new);
        }
        self.evict(&url.host);
        Ok(())
    }

    /// The least recently used of a site go once there are too many, insecure ones first.
    fn evict(&mut self, host: &str) {
        let (site, now) = (self.site(host), self.now());
        self.cookies.retain(|c| c.expires.is_none_or(|at| at > now));
        let mut of_site: Vec<_> = self.cookies.iter().filter(|c| self.site(&c.domain) == site).collect();
        if of_site.len() <= PER_SITE {
            return;
        }
        of_site.sort_by_key(|c| (c.secure, c.used));
        let gone: Vec<u64> = of_site[..of_site.len() - KEPT_PER_SITE].iter().map(|c| c.created).collect();
        self.cookies.retain(|c| !gone.contains(&c.created));
    }

    /// The registrable domain, or the address.
    pub fn site(&self, host: &str) -> String {
        if is_address(host) || self.is_public_suffix(host) {
            return host.to_owned();
        }
        let mut site = host;
        while let Some((_, parent)) = site.split_once('.') {
            if self.is_public_suffix(parent) {
                break;
            }
            site = parent;
        }
        site.to_owned()
    }

    fn is_public_suffix(&self, domain: &str) -> bool {
        !is_address(domain) && (!domain.contains('.') || self.public_suffixes.iter().any(|s| s == domain))
    }

    /// The browser's clock.
    pub fn now(&self) -> SystemTime {
        SystemTime::now() + self.ahead
    }

    fn next_turn(&mut self) -> u64 {
        self.turn += 1;
        self.turn
    }
}

impl Cookie {
    fn goes_to(&self, host: &str) -> bool {
        if self.host_only { self.domain == host } else { domain_matches(host, &self.domain) }
    }

    fn covers(&self, path: &str) -> bool {
        let rest = path.strip_prefix(&self.path);
        rest.is_some_and(|rest| rest.is_empty() || self.path.ends_with('/') || rest.starts_with('/'))
    }
}

fn is_address(host: &str) -> bool {
    host.starts_with('[') || host.parse::<IpAddr>().is_ok()
}

fn domain_matches(host: &str, domain: &str) -> bool {
    host == domain || (!is_address(host) && host.strip_suffix(domain).is_some_and(|rest| rest.ends_with('.')))
}

/// A date as servers write it: RFC 6265bis, 5.1.1, all of its fields by their looks.
fn date(text: &str) -> Option<SystemTime> {
    let (mut clock, mut day, mut month, mut year) = (None, None, None, None);
    for word in text.split(|c: char| !c.is_ascii_alphanumeric() && c != ':').filter(|w| !w.is_empty()) {
        let number = word.parse::<u64>().ok();
        if let [h, m, s] = word.split(':').collect::<Vec<_>>()[..] {
            clock = Some(h.parse::<u64>().ok()? * 3600 + m.parse::<u64>().ok()? * 60 + s.parse::<u64>().ok()?);
        } else if let (Some(n), None, 1..=2) = (number, day, word.len()) {
            day = Some(n);
        } else if let (Some(n), None) = (number, year) {
            year = Some(match n {
                70..=99 => n + 1900,
                0..=69 => n + 2000,
                n => n,
            });
        } else if let Some(n) =
            word.get(..3).and_then(|w| "janfebmaraprmayjunjulaugsepoctnovdec".find(&w.to_lowercase()))
        {
            month = month.or(Some(n as u64 / 3 + 1));
        }
    }
    let (clock, day, month, year) = (clock?, day?, month?, year?);
    let leap = |y: u64| y.is_multiple_of(4) && (!y.is_multiple_of(100) || y.is_multiple_of(400));
    let lengths = [31, if leap(year) { 29 } else { 28 }, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let years: u64 = (1970..year).map(|y| if leap(y) { 366 } else { 365 }).sum();
    let months: u64 = lengths.iter().take(usize::try_from(month).ok()? - 1).sum();
    let days = years + months + day.checked_sub(1)?;
    Some(SystemTime::UNIX_EPOCH + Duration::from_secs(days * 86_400 + clock))
}
