//! # adit: the map
//!
//! One node of an edge: services behind NAT come in by `ssh -R`, visitors by
//! HTTP, TLS or a port, and each visitor is taken to the nearest live tunnel.
//!
//! ```text
//! visitor ─► ingress ─► hello ─► routes ─► dial ─► tunnel (SSH channel) ─► origin
//!           (socket2)  (SNI/     (table)    │
//!                      HTTP/raw)            └ http, or relay: splice between TCP, copy elsewhere
//! feed (embedded store, or etcd) ─► follower ─► route table and certificates (their only writer)
//! SSH sessions ─► tunnel: live tunnels, the latest login first ─► fleet ─► feed (of a fleet)
//! operator ─► control API ─► records ─► feed;  owners' mysocketctl ─► control::mysocket ─► records
//! ```
//!
//! **Begin at** `ingress/visit.rs`: the path of a visitor, top to bottom. Then
//! `tunnel/mod.rs` (what stands behind an SSH login) and `node.rs` (how the
//! parts are put together, and how they end).
//!
//! ## Words
//! *socket*: a published service (an OS socket is always `TcpStream` or
//! `Listener`); *tunnel*: one registered path to an origin; *session*: one live
//! SSH connection, of which the latest login of a tunnel serves and older ones
//! stand by; *visitor*: who connects from outside; *origin*: the service at the
//! far end of `ssh -R`; *feed*: where records come from; *fleet*: the nodes of one feed;
//! *location*: a tunnel at the node where it is logged in; *gate*: what visitors must pass.
//!
//! ## Threads
//! One runtime of one thread a core (`cores`) serves sessions and visitors, a visitor
//! where their session is: a request wakes no other thread. All else runs on a runtime
//! of its own, and the follower on its own thread.
//!
//! ## Tasks and who owns them
//! | task | started by | ends |
//! |---|---|---|
//! | accept loop, one a listener | `ingress` | closing, or the port is withdrawn |
//! | visit, one a visitor (HTTP adds one a stream) | accept loops | with the visitor; cut at the drain's deadline |
//! | owner, one an SSH connection; its registrar and consoles | accept loops, `tunnel` | with the connection |
//! | follower | `node` | stop |
//! | store's writer (a thread) | `feed::store` | `Store::close` |
//! | etcd: one a subscription, one a lease; the cache of the last state | `feed::etcd`, `feed::cache` | with who listens, or holds it |
//! | checks, one for what is due and one a check; gates' watch over what runs; fleet's follower and presence | `node` | stop |
//! | a link to each other node, what makes connections ready | `fleet` | the node is gone, or stop |
//! | a connection of another node | `fleet::Door` | with it, or stop |
//! | control connections | `control` | stop |

pub mod cores; // the threads that serve
pub mod drain; // the stages of the shutdown
pub mod error; // why a visit failed
pub mod fields; // reads settings and records, every mistake at once
pub mod fleet; // what nodes tell each other: that they live, and where tunnels are
pub mod header_rules; // what a socket changes in heads
pub mod limits; // counts that end
pub mod metrics;
pub mod model; // base: plain values
pub mod password; // hashed and checked
pub mod proxy_protocol; // whom a connection is from
pub mod secret_file; // files that hold secrets
pub mod stream; // a visitor's or origin's bytes
pub mod tcp; // options of OS sockets, listeners, dials
pub mod tls; // certificates by name, handshakes
pub mod visit_log; // the record of a visit

pub mod checks; // whether origins serve
pub mod dial; // the way to an origin
pub mod gate; // whether they may pass
pub mod http; // requests
pub mod ingress; // a visitor comes in: begin here
pub mod logins; // what logins rest on
pub mod relay; // bytes both ways
pub mod routes; // which socket, which tunnels
pub mod ssh; // the SSH engine
pub mod tunnel; // the door to SSH

pub mod control; // the operator's API, and mysocketctl's
pub mod feed; // where records come from

#[doc(hidden)]
pub mod fuzzing; // what fuzz targets assert

pub mod config;
pub mod node; // composition root
pub mod status; // a node's status for a terminal
pub mod user; // accounts, made from a terminal

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    /// Who may import whom; `base` may import only `base`.
    const MAY_IMPORT: &[(&str, &[&str])] = &[
        ("routes", &[]),
        ("logins", &[]),
        ("feed", &["routes", "logins"]), // the follower writes the tables
        ("relay", &[]),
        ("ssh", &[]),
        ("tunnel", &["ssh", "routes", "feed"]),
        ("gate", &["feed", "logins", "routes"]),
        ("fleet", &["feed", "tunnel", "relay"]),
        ("dial", &["routes", "tunnel", "fleet"]),
        ("http", &["routes", "gate", "dial", "relay"]),
        ("ingress", &["routes", "gate", "dial", "http", "relay", "tunnel"]),
        ("checks", &["routes", "tunnel", "dial", "http"]),
        ("control", &["feed", "routes", "tunnel", "logins", "gate"]),
    ];
    const BASE: &[&str] = &[
        "model",
        "fields",
        "header_rules",
        "proxy_protocol",
        "error",
        "stream",
        "tcp",
        "limits",
        "password",
        "secret_file",
        "visit_log",
        "metrics",
        "drain",
        "cores",
        "tls",
    ];

    fn imports(path: &Path, found: &mut BTreeSet<String>) {
        if path.is_dir() {
            for entry in std::fs::read_dir(path).unwrap() {
                imports(&entry.unwrap().path(), found);
            }
            return;
        }
        for line in std::fs::read_to_string(path).unwrap().lines() {
            if let Some(rest) = line.trim_start().trim_start_matches("pub ").strip_prefix("use crate::") {
                let names = rest.strip_prefix('{').map_or(vec![rest], |list| list.split(',').collect());
                let first = |n: &str| n.trim().split([':', ';', '}', ' ']).next().unwrap_or_default().to_owned();
                found.extend(names.into_iter().map(first).filter(|n| !n.is_empty()));
            }
        }
    }

    #[test]
    fn modules_import_only_what_stands_below_them() {
        let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let of = |module: &str| {
            let mut found = BTreeSet::new();
            for path in [src.join(format!("{module}.rs")), src.join(module)].iter().filter(|path| path.exists()) {
                imports(path, &mut found);
            }
            found
        };
        let mut wrong = Vec::new();
        let rules = MAY_IMPORT.iter().copied().chain(BASE.iter().map(|module| (*module, &[][..])));
        for (module, allowed) in rules {
            for import in of(module) {
                let known = BASE.contains(&import.as_str()) || allowed.contains(&import.as_str()) || import == module;
                if !known && import != "text_field" {
                    wrong.push(format!("{module} imports {import}"));
                }
            }
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
    }
}
