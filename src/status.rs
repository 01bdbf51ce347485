//! What `adit status` shows: what a node of this machine tells by its control API, for
//! people. The node says where it listens in its state folder, and keeps a token there.
//! `adit user` asks it by the same way.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

/// How long the node may take.
const WAIT: Duration = Duration::from_secs(5);
/// The longest answer that is read, in bytes.
const ANSWER_MAX: u64 = 256 << 20;

/// Asks the node whose state folder this is how it is; `token` is the file of its
/// operators' token, where that is not the one that the node made.
///
/// # Errors
/// Why there is no answer, for people.
pub fn ask(state: &Path, token: Option<&Path>) -> Result<Value, String> {
    match call(state, token, "GET /v1/status", None)? {
        (200, told) if !told.is_null() => Ok(told),
        (status, _) => Err(format!("the node answers {status}, and no status")),
    }
}

/// One call of the node's control API, `METHOD PATH`: the status of the answer, and its
/// JSON. A record that is sent is to be a new one.
///
/// # Errors
/// Why there is no answer, for people.
#[allow(clippy::indexing_slicing, reason = "a JSON value answers null for what it has not")]
pub fn call(state: &Path, token: Option<&Path>, what: &str, record: Option<&Value>) -> Result<(u16, Value), String> {
    let listening = state.join("listening.json");
    let text = std::fs::read_to_string(&listening).map_err(|error| {
        format!("{}: {error}: no node runs on this state folder; name its --state", listening.display())
    })?;
    let listening: Value = serde_json::from_str(&text).unwrap_or_default();
    let addr: Option<SocketAddr> = listening["control"][0].as_str().and_then(|addr| addr.parse().ok());
    let mut addr = addr.ok_or("the node has no control API: write control.listen")?;
    if addr.ip().is_unspecified() {
        addr.set_ip(if addr.is_ipv4() { [127, 0, 0, 1].into() } else { std::net::Ipv6Addr::LOCALHOST.into() });
    }
    let made = state.join("control.token");
    let token = std::fs::read_to_string(token.unwrap_or(&made)).ok();
    let authorization = token.map_or_else(String::new, |token| format!("Authorization: Bearer {}\r\n", token.trim()));
    let failed = |error: std::io::Error| format!("the node at {addr} does not answer: {error}");
    let mut tcp = TcpStream::connect_timeout(&addr, WAIT).map_err(failed)?;
    tcp.set_read_timeout(Some(WAIT)).map_err(failed)?;
    // HTTP/1.0: the answer ends with the connection.
    let body = record.map(Value::to_string).unwrap_or_default();
    let new = format!("Content-Type: application/json\r\nContent-Length: {}\r\nIf-None-Match: *\r\n", body.len());
    let fields = if record.is_some() { new } else { String::new() };
    write!(tcp, "{what} HTTP/1.0\r\nHost: {addr}\r\n{authorization}{fields}\r\n{body}").map_err(failed)?;
    let mut answer = String::new();
    tcp.take(ANSWER_MAX).read_to_string(&mut answer).map_err(failed)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
    match head.split(' ').nth(1).map(str::parse) {
        Some(Ok(401)) => Err(format!("the node at {addr} wants its token: name its file by --token")),
        Some(Ok(status)) => Ok((status, serde_json::from_str(body).unwrap_or_default())),
        _ => Err(format!("the node at {addr} answers nothing")),
    }
}

/// The status in lines for a terminal.
#[allow(clippy::indexing_slicing, reason = "a JSON value answers null for what it has not")]
pub fn render(status: &Value) -> String {
    let text = |value: &Value| match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let mut out = String::new();
    let ready = if status["ready"] == true { "ready" } else { "not ready" };
    let _ = writeln!(
        out,
        "{} {}, {ready}, up {}",
        text(&status["name"]),
        text(&status["version"]),
        age(&status["uptime_s"])
    );
    let feed = match status["stale_ms"].as_u64() {
        None => "live".to_owned(),
        Some(ms) => format!("out of reach for {}", age(&Value::from(ms / 1000))),
    };
    let _ = writeln!(out, "feed {feed}, revision {}", text(&status["revision"]));
    let _ = writeln!(
        out,
        "{} sockets, {} tunnels, {} sessions here",
        text(&status["sockets"]),
        text(&status["tunnels"]),
        text(&status["sessions"])
    );
    for failing in status["failing"].as_array().into_iter().flatten() {
        let _ = writeln!(out, "checks fail: {}", text(failing));
    }
    for refused in status["refused_records"].as_array().into_iter().flatten() {
        let _ = writeln!(out, "refused record: {}", text(refused));
    }
    let Some(nodes) = status["fleet"]["nodes"].as_array() else { return out };
    let _ = writeln!(out, "\n{} logins of tunnels in the fleet\n", text(&status["fleet"]["locations"]));
    let me = &status["name"];
    let names: Vec<String> = nodes.iter().map(|node| text(&node["node"])).collect();
    let mut first: Vec<String> = ["node", "version", "state", "tunnels", "place"].map(String::from).to_vec();
    first.extend(names.iter().map(|name| format!("to {name}")));
    let mut rows = vec![first];
    for node in nodes {
        let state = match (&node["node"] == me, node["draining"] == true, &node["linked"]) {
            (_, true, _) => "draining",
            (true, ..) if node["spared"].as_u64() > Some(0) => "this one, busy",
            (true, ..) => "this one",
            (_, _, Value::Bool(true)) if node["spared"].as_u64() > Some(0) => "linked, busy",
            (_, _, Value::Bool(true)) => "linked",
            _ if node["addresses"].as_array().is_none_or(Vec::is_empty) => "no door",
            _ => "no link",
        };
        let mut row = vec![
            text(&node["node"]),
            text(&node["version"]),
            state.to_owned(),
            text(&node["tunnels"]),
            text(&node["place"]),
        ];
        let trip = |to: &String| match node["round_trips_ms"][to.as_str()].as_f64() {
            Some(ms) => format!("{ms:.1} ms"),
            None if node["node"] == to.as_str() => String::new(),
            None => "-".to_owned(),
        };
        row.extend(names.iter().map(trip));
        rows.push(row);
    }
    table(&mut out, &rows);
    out
}

/// Columns as wide as what is in them.
fn table(out: &mut String, rows: &[Vec<String>]) {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let cell = |row: &Vec<String>, column: usize| row.get(column).cloned().unwrap_or_default();
    let widths: Vec<usize> =
        (0..columns).map(|at| rows.iter().map(|row| cell(row, at).chars().count()).max().unwrap_or(0)).collect();
    for row in rows {
        let cells = widths.iter().enumerate().map(|(at, width)| format!("{:<width$}", cell(row, at)));
        let line = cells.collect::<Vec<_>>().join("  ");
        let _ = writeln!(out, "{}", line.trim_end());
    }
}

fn age(seconds: &Value) -> String {
    match seconds.as_u64().unwrap_or(0) {
        s if s < 120 => format!("{s} s"),
        s if s < 7200 => format!("{} min", s / 60),
        s if s < 172_800 => format!("{} h", s / 3600),
        s => format!("{} d", s / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_fleet_is_a_table_with_all_round_trips() {
        let node = |name: &str, linked: Value, trips: Value| {
            json!({"node": name, "version": "1", "draining": false, "tunnels": 2, "place": "52.37, 4.9",
                "addresses": ["192.0.2.1:7443"], "linked": linked, "round_trips_ms": trips})
        };
        let status = json!({"name": "ams1", "version": "1", "ready": true, "uptime_s": 7300, "stale_ms": null,
            "revision": 9, "sockets": 3, "tunnels": 4, "sessions": 2, "refused_records": ["cfg/sock/x"],
            "fleet": {"locations": 4, "nodes": [
                node("ams1", Value::Null, json!({"nyc1": 80.04})),
                node("nyc1", json!(false), json!({}))]}});
        assert_eq!(
            render(&status),
            "ams1 1, ready, up 2 h\nfeed live, revision 9\n3 sockets, 4 tunnels, 2 sessions here\n\
             refused record: cfg/sock/x\n\n4 logins of tunnels in the fleet\n\n\
             node  version  state     tunnels  place       to ams1  to nyc1\n\
             ams1  1        this one  2        52.37, 4.9           80.0 ms\n\
             nyc1  1        no link   2        52.37, 4.9  -\n"
        );
        assert!(!render(&json!({"name": "a", "stale_ms": 65_000})).contains("fleet"));
    }

    #[test]
    fn who_asks_where_no_node_runs_is_told_so() {
        let dir = tempfile::tempdir().unwrap();
        assert!(ask(dir.path(), None).unwrap_err().contains("no node runs"));
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        std::fs::write(dir.path().join("listening.json"), json!({"control": [taken.to_string()]}).to_string()).unwrap();
        assert!(ask(dir.path(), None).unwrap_err().contains("does not answer"));
    }
}
