//! Passwords and tokens on their way into the store: hashed, so that neither it
//! nor an answer ever holds one.

use aws_lc_rs::digest;
use serde_json::{Map, Value};

use super::problem::Problem;
use crate::feed::records::{RecordError, Records};
use crate::fields::Mistake;
use crate::password;

/// Fewest characters of a service token: what 128 random bits take in hex.
const TOKEN_MIN: usize = 32;
/// Most passwords of one write: each takes some 20 ms.
const PASSWORDS_MAX: usize = 100;

/// Hashes what `record`, to be written at `key`, has in plain: `password` becomes
/// `password_hash`, `token` becomes `token_hash`. A user, token or account without
/// either keeps what it has.
pub(super) async fn hash(records: &Records, key: String, record: &mut Map<String, Value>) -> Result<(), Problem> {
    let account = key.starts_with("cfg/account/");
    if !account && !key.starts_with("cfg/sock/") {
        return Ok(());
    }
    let former = records.raw(&key).await.map_err(RecordError::from)?.unwrap_or_default();
    let mut plain = Vec::new();
    let mut mistakes = Vec::new();
    if account {
        plain.extend(password_of(record, "password", Some(&former), &mut mistakes).map(|text| (None, text)));
    }
    for (i, user, former) in named(list(record, USERS), former_list(&former, USERS)) {
        let text = password_of(user, &format!("gate.basic.users[{i}].password"), former, &mut mistakes);
        plain.extend(text.map(|text| (Some(i), text)));
    }
    for (i, token, former) in named(list(record, TOKENS), former_list(&former, TOKENS)) {
        token_of(token, &format!("gate.service_tokens[{i}].token"), former, &mut mistakes);
    }
    if plain.len() > PASSWORDS_MAX {
        let problem = format!("there are {} passwords to hash", plain.len());
        let fix = format!("write at most {PASSWORDS_MAX} at once, or `password_hash`");
        mistakes.push(Mistake { at: "gate.basic.users".into(), problem, fix });
    }
    if !mistakes.is_empty() {
        return Err(Problem::invalid(mistakes));
    }
    for (user, text) in plain {
        let hashed = tokio::task::spawn_blocking(move || password::hash(&text)).await;
        let hashed = hashed.unwrap_or_else(|_| Err("could not be hashed".to_owned())).map_err(|problem| {
            let at = user.map_or("password".to_owned(), |i| format!("gate.basic.users[{i}].password"));
            let fix = format!("write 1 to {} bytes", password::PASSWORD_MAX);
            Problem::invalid(vec![Mistake { at, problem, fix }])
        })?;
        let fields = match user {
            None => Some(&mut *record),
            Some(i) => list(record, USERS).get_mut(i).and_then(Value::as_object_mut),
        };
        if let Some(fields) = fields {
            fields.insert("password_hash".into(), hashed.as_str().into());
        }
    }
    Ok(())
}

/// Where lists with secrets are in a socket's record.
const USERS: &[&str] = &["gate", "basic", "users"];
const TOKENS: &[&str] = &["gate", "service_tokens"];

fn list<'a>(record: &'a mut Map<String, Value>, path: &[&str]) -> &'a mut [Value] {
    let (first, rest) = path.split_first().map_or(("", path), |(first, rest)| (*first, rest));
    let found = record.get_mut(first).and_then(|value| rest.iter().try_fold(value, |value, key| value.get_mut(key)));
    found.and_then(Value::as_array_mut).map(Vec::as_mut_slice).unwrap_or_default()
}

fn former_list<'a>(record: &'a Map<String, Value>, path: &[&str]) -> &'a [Value] {
    let (first, rest) = path.split_first().map_or(("", path), |(first, rest)| (*first, rest));
    let found = record.get(first).and_then(|value| rest.iter().try_fold(value, |value, key| value.get(key)));
    found.and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

/// The tables of a list, each with the one of the same name in the former record.
fn named<'a>(
    list: &'a mut [Value],
    former: &'a [Value],
) -> impl Iterator<Item = (usize, &'a mut Map<String, Value>, Option<&'a Map<String, Value>>)> {
    list.iter_mut().enumerate().filter_map(move |(i, item)| {
        let item = item.as_object_mut()?;
        let same = former.iter().filter_map(Value::as_object).find(|old| old.get("name") == item.get("name"));
        Some((i, item, same))
    })
}

/// The password in plain, if it is there.
fn password_of(
    fields: &mut Map<String, Value>,
    at: &str,
    former: Option<&Map<String, Value>>,
    mistakes: &mut Vec<Mistake>,
) -> Option<String> {
    let mut mistake = |problem: &str, fix: &str| {
        mistakes.push(Mistake { at: at.to_owned(), problem: problem.to_owned(), fix: fix.to_owned() });
    };
    match fields.remove("password") {
        Some(Value::String(text)) if fields.get("password_hash").is_none_or(Value::is_null) => return Some(text),
        Some(Value::String(_)) => mistake("is there beside password_hash", "write one of them"),
        Some(Value::Null) | None => keep("password_hash", fields, former),
        Some(_) => mistake("is not a string", "write a string"),
    }
    None
}

fn token_of(
    fields: &mut Map<String, Value>,
    at: &str,
    former: Option<&Map<String, Value>>,
    mistakes: &mut Vec<Mistake>,
) {
    match fields.remove("token") {
        Some(Value::String(text)) if text.len() >= TOKEN_MIN && text.bytes().all(|b| b.is_ascii_graphic()) => {
            let hash = digest::digest(&digest::SHA256, text.as_bytes());
            let hash = format!("sha256:{}", data_encoding::HEXLOWER.encode(hash.as_ref()));
            fields.insert("token_hash".into(), hash.into());
        }
        Some(Value::Null) | None => keep("token_hash", fields, former),
        Some(_) => {
            let fix = format!("write {TOKEN_MIN} characters or more of ASCII, as `openssl rand -hex 32` makes them");
            mistakes.push(Mistake { at: at.to_owned(), problem: "is too easily guessed".into(), fix });
        }
    }
}

fn keep(field: &str, fields: &mut Map<String, Value>, former: Option<&Map<String, Value>>) {
    if fields.get(field).is_none_or(Value::is_null)
        && let Some(hash) = former.and_then(|former| former.get(field))
    {
        fields.insert(field.to_owned(), hash.clone());
    }
}
