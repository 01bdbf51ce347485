//! The gate's pages: small, without scripts, from templates that an operator can
//! replace file by file.

use std::path::Path;

use bytes::Bytes;
use hyper::StatusCode;
use hyper::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, LOCATION,
    REFERRER_POLICY, RETRY_AFTER, SET_COOKIE, X_CONTENT_TYPE_OPTIONS,
};
use minijinja::{AutoEscape, Environment, UndefinedBehavior, Value};

/// Every template, built in.
const TEMPLATES: &[(&str, &str)] = &[
    ("layout.html", include_str!("pages/layout.html")),
    ("choose.html", include_str!("pages/choose.html")),
    ("continue.html", include_str!("pages/continue.html")),
    ("local.html", include_str!("pages/local.html")),
    ("denied.html", include_str!("pages/denied.html")),
    ("cookies.html", include_str!("pages/cookies.html")),
    ("down.html", include_str!("pages/down.html")),
    ("again.html", include_str!("pages/again.html")),
    ("logout.html", include_str!("pages/logout.html")),
    ("out.html", include_str!("pages/out.html")),
    ("frame.html", include_str!("pages/frame.html")),
];

/// The largest template, in bytes.
const TEMPLATE_MAX: u64 = 256 << 10;

/// An answer of the gate's own.
#[derive(Debug, Clone)]
pub struct Reply {
    /// Its status.
    pub status: StatusCode,
    /// Its fields, but for the length.
    pub headers: HeaderMap,
    /// Its content.
    pub body: Bytes,
}

impl Reply {
    /// An answer without content that nobody may keep.
    pub fn bare(status: StatusCode) -> Self {
        let mut headers = HeaderMap::new();
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
        headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        Self { status, headers, body: Bytes::new() }
    }

    /// Sends the browser elsewhere; `303` after a POST.
    pub fn redirect(status: StatusCode, to: &str) -> Self {
        let reply = Self::bare(status);
        match HeaderValue::from_str(to) {
            Ok(to) => reply.with(LOCATION, to),
            Err(_) => Self::bare(StatusCode::INTERNAL_SERVER_ERROR),
        }
    }

    /// JSON.
    pub fn json(status: StatusCode, value: &serde_json::Value) -> Self {
        let mut reply = Self::bare(status).with(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        reply.body = Bytes::from(format!("{value}\n"));
        reply
    }

    /// The same with one more field.
    #[must_use]
    pub fn with(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.append(name, value);
        self
    }

    /// The same, setting these cookies.
    #[must_use]
    pub fn setting(mut self, lines: impl IntoIterator<Item = HeaderValue>) -> Self {
        for line in lines {
            self.headers.append(SET_COOKIE, line);
        }
        self
    }

    /// The same, with when to come back, in seconds.
    #[must_use]
    pub fn retry_after(self, seconds: u64) -> Self {
        self.with(RETRY_AFTER, HeaderValue::from(seconds.max(1)))
    }
}

/// The templates.
#[derive(Debug)]
pub(super) struct Pages(Environment<'static>);

impl Pages {
    /// The built-in ones, and those of a folder in their place.
    ///
    /// # Errors
    /// What is wrong with the folder or a template.
    pub(super) fn read(folder: Option<&Path>) -> Result<Self, String> {
        let mut environment = Environment::new();
        environment.set_auto_escape_callback(|_| AutoEscape::Html);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        for (name, built_in) in TEMPLATES {
            let text = match folder.map(|folder| folder.join(name)).filter(|file| file.exists()) {
                Some(file) => {
                    let at = |problem: String| format!("gate.pages: {}: {problem}", file.display());
                    let size = file.metadata().map_err(|e| at(e.to_string()))?.len();
                    if size > TEMPLATE_MAX {
                        return Err(at(format!("is larger than {} KiB", TEMPLATE_MAX >> 10)));
                    }
                    std::fs::read_to_string(&file).map_err(|e| at(e.to_string()))?
                }
                None => (*built_in).to_owned(),
            };
            environment.add_template_owned(*name, text).map_err(|e| format!("gate.pages: {name}: {e:#}"))?;
        }
        if let Some(folder) = folder
            && !folder.is_dir()
        {
            return Err(format!("gate.pages: {} is not a folder", folder.display()));
        }
        let pages = Self(environment);
        for (name, _) in TEMPLATES {
            // A mistake that only rendering finds must not be a visitor's.
            pages.render(name, Value::UNDEFINED).map_err(|e| format!("gate.pages: {name}: {e}"))?;
        }
        Ok(pages)
    }

    fn render(&self, name: &str, said: Value) -> Result<String, String> {
        let template = self.0.get_template(name).map_err(|e| e.to_string())?;
        template.render(said).map_err(|e| format!("{e:#}"))
    }

    /// A page; `form_action` is where its forms lead beside its own host.
    pub(super) fn page(&self, status: StatusCode, name: &str, said: Value, form_action: Option<&str>) -> Reply {
        let mut reply = Reply::bare(status);
        match self.render(name, said) {
            Ok(text) => reply.body = Bytes::from(text),
            Err(error) => {
                tracing::error!(name, error, "a page cannot be written");
                reply.status = StatusCode::INTERNAL_SERVER_ERROR;
            }
        }
        let forms = match form_action {
            // Browsers hold the redirects after a form to this too.
            Some(elsewhere) => format!("form-action 'self' {elsewhere}; "),
            None => String::new(),
        };
        let policy = format!(
            "default-src 'none'; style-src 'unsafe-inline'; img-src data:; {forms}frame-ancestors 'none'; base-uri 'none'"
        );
        if let Ok(policy) = HeaderValue::from_str(&policy) {
            reply.headers.insert(CONTENT_SECURITY_POLICY, policy);
        }
        // `no-referrer` would make the Origin of our own forms `null` (Fetch §3.1).
        reply.headers.insert(REFERRER_POLICY, HeaderValue::from_static("same-origin"));
        reply.headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
        reply
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use minijinja::context;

    #[test]
    fn whatever_is_said_on_a_page_is_text() {
        let pages = Pages::read(None).unwrap();
        let evil = "<script>alert(1)</script>\"' onx=";
        for (name, _) in TEMPLATES {
            let said = context! { host => evil, email => evil, why => evil, title => evil, again => evil, token => evil,
            provider => evil, wrong => evil, id => evil, providers => vec![context! { href => evil, title => evil }] };
            let reply = pages.page(StatusCode::OK, name, said, None);
            let text = String::from_utf8(reply.body.to_vec()).unwrap();
            assert!(!text.contains("<script") && !text.contains("\"' onx"), "{name}: {text}");
            assert!(*name == "layout.html" || text.contains("&lt;script&gt;"), "{name}: {text}");
            assert!(text.contains("<title>") && text.contains("lang=\"en\""), "{name}");
        }
    }

    #[test]
    fn an_operator_can_replace_one_page_and_is_told_what_is_wrong_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let write = |text: &str| std::fs::write(folder.path().join("denied.html"), text).unwrap();
        write("{% extends \"layout.html\" %}{% block main %}No, {{ host }}.{% endblock %}");
        let pages = Pages::read(Some(folder.path())).unwrap();
        let said = context! { host => "a.test" };
        let text = pages.page(StatusCode::FORBIDDEN, "denied.html", said, None).body;
        assert!(String::from_utf8_lossy(&text).contains("No, a.test."));
        for bad in ["{% block", "{{ host | nonsense }}", "{% extends \"none.html\" %}"] {
            write(bad);
            let problem = Pages::read(Some(folder.path())).unwrap_err();
            assert!(problem.contains("denied.html"), "{problem}");
        }
        assert!(Pages::read(Some(Path::new("/nonexistent"))).unwrap_err().contains("gate.pages"));
    }
}
