//! What `adit user add` does: makes an account at a running node of this machine, by its
//! control API.

use std::io::{self, IsTerminal, Write};
use std::path::Path;

use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};
use serde_json::{Value, json};

use crate::control;
use crate::model::AccountId;
use crate::status;

/// An account that is to be made.
#[derive(Debug)]
pub struct New<'a> {
    /// The address by which they log in.
    pub email: &'a str,
    /// Whose it is.
    pub name: Option<&'a str>,
    /// The file of their public SSH key.
    pub ssh_key: Option<&'a Path>,
    /// Its id, if it is not to be made up.
    pub id: Option<&'a AccountId>,
}

/// Makes the account at the node whose state folder this is, with a password from
/// standard input; answers its id. `token` is the file of the operators' token, where that
/// is not the one that the node made.
///
/// # Errors
/// Why there is none, for people.
#[allow(clippy::indexing_slicing, reason = "a JSON value answers null for what it has not")]
pub fn add(state: &Path, token: Option<&Path>, new: &New<'_>) -> Result<String, String> {
    let keys: Vec<String> = match new.ssh_key {
        None => Vec::new(),
        Some(file) => {
            let text = std::fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()))?;
            text.lines().map(|line| line.trim().to_owned()).filter(|line| !line.is_empty()).collect()
        }
    };
    // Clients in Go log in by the id without its dashes.
    if let Some(id) = new.id.filter(|id| id.as_str().contains('-')) {
        return Err(format!("the id {id} has a -, which mysocketctl leaves out; choose one without"));
    }
    let made_up = || control::made_up_user().ok_or("the system has no random bytes");
    let id = new.id.map_or_else(made_up, |id| Ok(id.to_string()))?;
    let password = password().map_err(|error| format!("no password: {error}"))?;
    let record = json!({ "email": new.email, "password": password, "name": new.name, "ssh_keys": keys });
    match status::call(state, token, &format!("PUT /v1/accounts/{id}"), Some(&record))? {
        (201, _) => Ok(id),
        (412, _) => Err(format!("there is an account {id} already")),
        (status, problem) => match &problem["detail"] {
            Value::String(detail) => Err(detail.clone()),
            _ => Err(format!("the node answers {status}")),
        },
    }
}

/// The first line of standard input; at a terminal it is asked for, and not shown.
fn password() -> io::Result<String> {
    let stdin = io::stdin();
    let mut line = String::new();
    if !stdin.is_terminal() {
        stdin.read_line(&mut line)?;
    } else {
        eprint!("Password: ");
        io::stderr().flush()?;
        let shown = tcgetattr(&stdin)?;
        let mut hidden = shown.clone();
        hidden.local_modes.remove(LocalModes::ECHO);
        tcsetattr(&stdin, OptionalActions::Flush, &hidden)?;
        let read = stdin.read_line(&mut line);
        tcsetattr(&stdin, OptionalActions::Flush, &shown)?;
        eprintln!();
        read?;
    }
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}
