//! Debian's headless Chromium, led through pages by a list of steps.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use super::{Node, Program};

/// One step of it, on a busy machine.
const STEP: Duration = Duration::from_secs(20);
/// A whole run of it.
const RUN: Duration = Duration::from_secs(120);

/// What Chromium trusts, and where it finds names.
pub struct Chromium {
    ca: PathBuf,
    rules: Vec<(String, String)>,
}

impl Chromium {
    /// Every name of localhost is this node; its CA is trusted.
    pub fn at(node: &Node) -> Self {
        Self::new(&node.ca(), &[("*.localhost", &node.ip.to_string())])
    }

    /// Trusts this CA's certificate (PEM) and finds names (`*.edge.localhost`) at addresses.
    pub fn new(ca: &Path, rules: &[(&str, &str)]) -> Self {
        let rules = rules.iter().map(|(name, to)| ((*name).to_owned(), (*to).to_owned())).collect();
        Self { ca: ca.to_owned(), rules }
    }

    /// Takes these steps in one new browser: the result of each, null where it has
    /// none. Panics where one fails that has no `"try": true`.
    ///
    /// `{"goto": URL}` → status, url, headers; `{"fill": [SELECTOR, TEXT]}`;
    /// `{"click": SELECTOR}`; `{"waitForURL": REGEX}` → url; `{"waitFor": SELECTOR}`;
    /// `{"screenshot": PATH}`; `{"text": SELECTOR}`; `{"html": 0}`; `{"url": 0}`;
    /// `{"title": 0}`; `{"back": 0}` → url; `{"reload": 0}` → status;
    /// `{"evaluate": SCRIPT}`; `{"websocket": {"url", "send": [TEXT], "count", "ms"}}` →
    /// opened, messages, closed; `{"cookies": 0}`; `{"clearCookies": 0}`;
    /// `{"addCookies": [COOKIE]}`; `{"headers": {NAME: VALUE}}`; `{"as": NAME}` is
    /// another user from there on, with cookies of its own.
    pub async fn run(&self, steps: &Value) -> Vec<Value> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let home = tempfile::tempdir().unwrap();
        trust(home.path(), &self.ca).await;
        let settings = json!({"rules": self.rules, "limit": STEP.as_millis() as u64, "steps": steps});
        let mut command = Command::new("node");
        command.arg(root.join("tests/e2e/clients/chromium.mjs")).arg(settings.to_string());
        command.env("NODE_PATH", root.join("target/npm/node_modules")).env("HOME", home.path());
        let mut program = Program::start("chromium", command);
        let (status, said) = program.finished(RUN).await;
        let results: Vec<Value> =
            said.lines().filter_map(|l| l.strip_prefix("step ")).map(|l| serde_json::from_str(l).unwrap()).collect();
        let failed = || format!("{}", json!({"step": steps[results.len().max(1) - 1], "result": results.last()}));
        assert!(status.success() && said.lines().any(|l| l == "done"), "{}\n{said}", failed());
        results
    }
}

/// Makes the CA trusted where Chromium looks for it below this home.
async fn trust(home: &Path, ca: &Path) {
    let store = home.join(".pki/nssdb");
    std::fs::create_dir_all(&store).unwrap();
    let store = format!("sql:{}", store.display());
    let new = ["-d", &store, "-N", "--empty-password"];
    let ca = ca.to_str().unwrap();
    for arguments in [&new[..], &["-d", &store, "-A", "-t", "C,,", "-n", "ca", "-i", ca]] {
        let mut command = Command::new("certutil");
        command.args(arguments).env("HOME", home);
        let done = tokio::task::spawn_blocking(move || command.output().expect("certutil (libnss3-tools)")).await;
        let done = done.unwrap();
        assert!(done.status.success(), "certutil: {}", String::from_utf8_lossy(&done.stderr));
    }
}
