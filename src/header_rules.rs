//! What a socket's record changes in the heads of requests and answers.

use hyper::header::{
    CONNECTION, CONTENT_LENGTH, HOST, HeaderMap, HeaderName, HeaderValue, TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
};
use serde_json::{Map, Value, json};

use crate::fields::{Field, Fields};

/// Most names in the rules of one direction.
const RULES_MAX: usize = 64;

/// Longest value, in bytes.
const VALUE_MAX: usize = 4096;

/// Fields removed, then set, then added, in the heads of one direction.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct HeaderRules {
    remove: Vec<Name>,
    set: Lines,
    add: Lines,
}

impl HeaderRules {
    /// Reads the table; mistakes gather in `f`.
    pub fn read(f: &mut Fields) -> Self {
        let rules = Self {
            remove: f.take("remove", Vec::new()),
            set: f.take("set", Lines::default()),
            add: f.take("add", Lines::default()),
        };
        f.refuse_rest();
        if rules.remove.len() + rules.set.0.len() + rules.add.0.len() > RULES_MAX {
            f.mistake("remove", format!("there are more than {RULES_MAX} rules"), "leave some out".into());
        }
        rules
    }

    /// As in the record.
    pub fn to_value(&self) -> Value {
        json!({
            "remove": self.remove.iter().map(|name| name.0.as_str()).collect::<Vec<_>>(),
            "set": self.set.to_value(),
            "add": self.add.to_value(),
        })
    }

    /// Changes a head.
    pub fn apply(&self, headers: &mut HeaderMap) {
        for Name(name) in &self.remove {
            headers.remove(name);
        }
        for (name, value) in &self.set.0 {
            headers.insert(name, value.clone());
        }
        for (name, value) in &self.add.0 {
            headers.append(name, value.clone());
        }
    }
}

/// A name that rules may speak of.
#[derive(Debug, Clone, PartialEq)]
struct Name(HeaderName);

impl Field for Name {
    const EXPECTED: &'static str = "a field name like \"X-Robots-Tag\"";
    fn from_value(value: &Value) -> Result<Self, String> {
        name(&String::from_value(value)?).map(Self)
    }
}

/// Names and values: `{"X-A": "one", "X-B": "two"}`.
#[derive(Debug, Clone, Default, PartialEq)]
struct Lines(Vec<(HeaderName, HeaderValue)>);

impl Lines {
    fn to_value(&self) -> Value {
        let text = |value: &HeaderValue| Value::from(String::from_utf8_lossy(value.as_bytes()).into_owned());
        Value::Object(self.0.iter().map(|(name, value)| (name.to_string(), text(value))).collect::<Map<_, _>>())
    }
}

impl Field for Lines {
    const EXPECTED: &'static str = "a table like {\"X-Robots-Tag\": \"noindex\"}";
    fn from_value(value: &Value) -> Result<Self, String> {
        let table = value.as_object().ok_or("is not a table")?;
        let line = |(key, value): (&String, &Value)| {
            let name = name(key)?;
            let text = value.as_str().ok_or_else(|| format!("\"{name}\" is not a string"))?;
            let bad = || format!("the value of \"{name}\" is longer than {VALUE_MAX} bytes or has control characters");
            let value = HeaderValue::from_str(text).ok().filter(|_| text.len() <= VALUE_MAX).ok_or_else(bad)?;
            Ok((name, value))
        };
        table.iter().map(line).collect::<Result<_, String>>().map(Self)
    }
}

/// Whatever frames a message or ends at this hop is not for rules to change.
fn name(text: &str) -> Result<HeaderName, String> {
    let name: HeaderName = text.parse().map_err(|_| format!("\"{}\" is not a field name", text.escape_debug()))?;
    if name == HOST {
        return Err("\"host\" is not changed by rules (upstream.host is)".into());
    }
    let framing = [CONNECTION, CONTENT_LENGTH, TE, TRAILER, TRANSFER_ENCODING, UPGRADE];
    if framing.contains(&name) || name.as_str() == "keep-alive" || name.as_str().starts_with("proxy-") {
        return Err(format!("\"{name}\" is the connection's own"));
    }
    Ok(name)
}

/// `Strict-Transport-Security` (RFC 6797 §6.1) for visitors who came by HTTPS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hsts {
    max_age: u32,
    include_subdomains: bool,
    preload: bool,
    value: HeaderValue,
}

impl Hsts {
    /// Reads the table; mistakes gather in `f`.
    pub fn read(f: &mut Fields) -> Option<Self> {
        let max_age: u32 = f.required("max_age")?;
        let include_subdomains = f.take("include_subdomains", false);
        let preload = f.take("preload", false);
        f.refuse_rest();
        let mut text = format!("max-age={max_age}");
        text.push_str(if include_subdomains { "; includeSubDomains" } else { "" });
        text.push_str(if preload { "; preload" } else { "" });
        Some(Self { max_age, include_subdomains, preload, value: HeaderValue::from_str(&text).ok()? })
    }

    /// As in the record.
    pub fn to_value(&self) -> Value {
        json!({
            "max_age": self.max_age,
            "include_subdomains": self.include_subdomains,
            "preload": self.preload,
        })
    }

    /// The field's value.
    pub fn value(&self) -> &HeaderValue {
        &self.value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(rules: Value) -> Result<HeaderRules, Vec<String>> {
        let mut f = Fields::new(rules.as_object().unwrap().clone());
        let rules = HeaderRules::read(&mut f);
        let mistakes: Vec<String> = f.mistakes().iter().map(ToString::to_string).collect();
        if mistakes.is_empty() { Ok(rules) } else { Err(mistakes) }
    }

    #[test]
    fn rules_remove_then_set_then_add() {
        let record = json!({"remove": ["x-gone"], "set": {"X-Set": "new"}, "add": {"x-more": "2"}});
        let rules = read(record).unwrap();
        let mut headers = HeaderMap::new();
        for (name, value) in [("x-gone", "1"), ("x-set", "old"), ("x-set", "older"), ("x-more", "1")] {
            headers.append(name, value.parse().unwrap());
        }
        rules.apply(&mut headers);
        let mut lines: Vec<String> = headers.iter().map(|(n, v)| format!("{n}: {}", v.to_str().unwrap())).collect();
        lines.sort();
        assert_eq!(lines, ["x-more: 1", "x-more: 2", "x-set: new"]);
        assert_eq!(read(rules.to_value()), Ok(rules));
    }

    #[test]
    fn what_frames_a_message_and_what_is_no_field_is_refused_by_name() {
        for (rules, word) in [
            (json!({"remove": ["Content-Length"]}), "connection's own"),
            (json!({"set": {"Transfer-Encoding": "chunked"}}), "connection's own"),
            (json!({"set": {"Host": "a"}}), "upstream.host"),
            (json!({"set": {"a b": "c"}}), "not a field name"),
            (json!({"add": {"X": "a\r\nY: b"}}), "control characters"),
            (json!({"add": {"X": 1}}), "not a string"),
            (json!({"sett": {}}), "did you mean \"set\"?"),
        ] {
            let mistakes = read(rules.clone()).unwrap_err();
            assert!(mistakes[0].contains(word), "{rules}: {mistakes:?}");
        }
    }
}
