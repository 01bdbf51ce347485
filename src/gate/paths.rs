//! Which rule a path falls under. An origin may read a path in other ways than we
//! do (case, escapes, dots, doubled slashes), so a path that can be read in two ways
//! is never public and has to pass every stricter rule. Pure.

use std::borrow::Cow;

use crate::model::gate::{Asks, PathRule};

/// What a request's path asks for beside the gate's own rules.
#[derive(Debug, PartialEq)]
pub(super) enum Found<'a> {
    /// No identity at all.
    Public,
    /// What each of these asks for; none: nothing more.
    Stricter(Vec<&'a PathRule>),
}

/// The rule for a path, as it was sent.
pub(super) fn find<'a>(rules: &'a [PathRule], path: &str) -> Found<'a> {
    let strict = |rule: &&PathRule| rule.asks != Asks::Nothing;
    if rules.is_empty() {
        return Found::Stricter(Vec::new());
    }
    let Some(plain) = plain(path) else {
        return Found::Stricter(rules.iter().filter(strict).collect());
    };
    let longest = |rules: &mut dyn Iterator<Item = &'a PathRule>| rules.max_by_key(|rule| rule.path.len());
    let public = longest(&mut rules.iter().filter(|rule| !strict(rule) && covers(&rule.path, path)));
    let lower = plain.to_ascii_lowercase();
    let stricter =
        longest(&mut rules.iter().filter(strict).filter(|rule| covers(&rule.path.to_ascii_lowercase(), &lower)));
    match (public, stricter) {
        (Some(public), Some(stricter)) if public.path.len() > stricter.path.len() => Found::Public,
        (Some(_), None) => Found::Public,
        (_, stricter) => Found::Stricter(stricter.into_iter().collect()),
    }
}

/// Whether a rule's path is this one or above it.
fn covers(rule: &str, path: &str) -> bool {
    match path.strip_prefix(rule) {
        Some(rest) => rest.is_empty() || rest.starts_with('/') || rule.ends_with('/'),
        // `/admin/` is about `/admin` too, which origins take for it.
        None => rule.strip_suffix('/') == Some(path),
    }
}

/// A path with its escapes undone, if it can be read in one way alone.
fn plain(path: &str) -> Option<Cow<'_, str>> {
    let decoded = if path.contains('%') { Cow::Owned(decoded(path)?) } else { Cow::Borrowed(path) };
    let two_ways = |c: char| matches!(c, '\\' | ';' | '%' | '?' | '#') || c.is_control() || !c.is_ascii();
    let dots = decoded.split('/').any(|part| part == "." || part == "..");
    // An escaped slash is one to some origins, and none to others.
    let slashes = |text: &str| text.bytes().filter(|b| *b == b'/').count();
    let ambiguous = decoded.contains(two_ways) || decoded.contains("//") || dots || slashes(path) != slashes(&decoded);
    (!ambiguous && decoded.starts_with('/')).then_some(decoded)
}

fn decoded(path: &str) -> Option<String> {
    let mut out = Vec::with_capacity(path.len());
    let mut bytes = path.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let mut digit = || char::from(bytes.next()?).to_digit(16).and_then(|d| u8::try_from(d).ok());
        out.push(digit()? << 4 | digit()?);
    }
    String::from_utf8(out).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::gate::EmailRules;

    fn rules() -> Vec<PathRule> {
        let strict = |path: &str| PathRule {
            path: path.to_owned(),
            asks: Asks::OneOf {
                allow: EmailRules::default(),
                providers: Vec::new(),
                users: vec!["ann".into()],
                service_tokens: Vec::new(),
            },
        };
        let public = |path: &str| PathRule { path: path.to_owned(), asks: Asks::Nothing };
        vec![
            public("/public/"),
            strict("/admin"),
            public("/admin/logo.png"),
            strict("/public/secret"),
            public("/favicon.ico"),
        ]
    }

    fn at(path: &str) -> String {
        match find(&rules(), path) {
            Found::Public => "public".to_owned(),
            Found::Stricter(rules) => rules.iter().map(|rule| rule.path.as_str()).collect::<Vec<_>>().join(" "),
        }
    }

    #[test]
    fn the_longest_rule_decides() {
        for (path, found) in [
            ("/", ""),
            ("/public/a/b.css", "public"),
            ("/public", "public"),
            ("/publicity", ""),
            ("/favicon.ico", "public"),
            ("/favicon.icon", ""),
            ("/admin", "/admin"),
            ("/admin/", "/admin"),
            ("/admin/x", "/admin"),
            ("/administrator", ""),
            ("/admin/logo.png", "public"),
            ("/public/secret", "/public/secret"),
            ("/public/secret/x", "/public/secret"),
        ] {
            assert_eq!(at(path), found, "{path}");
        }
    }

    #[test]
    fn no_spelling_of_a_path_makes_it_public_or_less_strict() {
        for path in ["/ADMIN", "/Admin/x", "/%61dmin", "/adm%69n/x", "/Public/Secret"] {
            assert!(at(path).starts_with('/'), "{path}: {}", at(path));
        }
        let all = "/admin /public/secret";
        for path in [
            "/public/../admin",
            "/public/%2e%2e/admin",
            "/public/..%2fadmin",
            "/public//admin",
            "//admin",
            "/public/./secret",
            "/public/..\\admin",
            "/public/%5c..%5cadmin",
            "/admin;x=1",
            "/public/;/../admin",
            "/public/%252e%252e/admin",
            "/public/%00",
            "/public/%zz",
            "/public/%",
            "/public/a%2Fb",
            "/public/\u{e4}",
            "/public/%c3%a4",
            "/public/%ff",
        ] {
            assert_eq!(at(path), all, "{path}");
        }
        // Case alone opens nothing.
        assert_eq!(at("/PUBLIC/a"), "");
    }
}
