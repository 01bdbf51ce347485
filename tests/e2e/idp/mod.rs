//! Providers of logins for tests: real ones as real processes, and fakes of those
//! that nobody can run. Each listens on a loopback address of its own, so that
//! one that goes down can come up again on the same port.

mod fakes;
mod glewlwyd;
mod mock;
mod oidc;
mod relying;
mod saml;

use std::net::IpAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::*;

#[allow(unused_imports)]
pub use fakes::{Asked, FakeFacebook, FakeGithub};
pub use glewlwyd::Glewlwyd;
pub use mock::MockProvider;
pub use oidc::{OidcOpts, OidcProvider};
pub use relying::{Login, claims_of};
pub use saml::SamlBroker;

/// A start of node or of glewlwyd, with the making of keys.
const START: Duration = Duration::from_secs(60);

/// Whether the providers of npm run on this machine's node; says so where they do not.
pub fn node_is_new_enough() -> bool {
    let said = Command::new("node").arg("--version").output().map(|o| String::from_utf8_lossy(&o.stdout).into_owned());
    let said = said.unwrap_or_default();
    let version = said.trim().trim_start_matches('v');
    let mut numbers = version.split('.').map(|n| n.parse::<u32>().unwrap_or(0));
    let new = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (20, 19);
    if !new {
        eprintln!("skipped: node is {version:?} here, not 20.19 or newer");
    }
    new
}

/// A provider in node that takes orders on its standard input.
struct NodeServer {
    program: Program,
    host: IpAddr,
    port: u16,
    orders: usize,
}

impl NodeServer {
    async fn start(script: &str, mut settings: Value) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let host = own_address();
        settings["host"] = json!(host);
        let mut command = Command::new("node");
        command.arg(root.join("tests/e2e/clients").join(script)).arg(settings.to_string());
        command.env("NODE_PATH", root.join("target/npm/node_modules"));
        let mut program = Program::start(script, command);
        let port = eventually_within(START, "the provider's port", async || {
            assert!(program.runs(), "{}", program.output());
            program.output().lines().find_map(|line| line.strip_prefix("port ")?.parse().ok())
        });
        Self { port: port.await, program, host, orders: 0 }
    }

    fn issuer(&self) -> String {
        format!("http://{}:{}", self.host, self.port)
    }

    /// Gives an order and awaits what it comes to.
    async fn order(&mut self, what: &str, mut order: Value) -> Value {
        self.orders += 1;
        order["do"] = json!(what);
        order["n"] = json!(self.orders);
        self.program.tell(&order.to_string());
        let did = format!("did {} ", self.orders);
        eventually(what, async || {
            assert!(self.program.runs(), "{}", self.program.output());
            let said = self.program.output();
            // Not half a line.
            let whole = said.rfind('\n').map_or("", |end| &said[..end]);
            whole.lines().find_map(|line| serde_json::from_str(line.strip_prefix(&did)?).ok())
        })
        .await
    }
}
