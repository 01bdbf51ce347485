//! HTTP's edge cases by other people's tools: varnishtest scripts of ours, real
//! clients, and a browser.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::harness::*;

fn root(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(file)
}

/// A port of 127.0.0.1 where nobody listens now.
async fn free_port() -> u16 {
    Origin::refusing().await.port()
}

/// Plays a script of `tests/vtc` against a node of its own.
async fn script(name: &str) {
    let node = Node::start().await;
    let origin = free_port().await;
    let _ssh = Ssh::start(&node, &[&format!("web:80:127.0.0.1:{origin}")]).await;
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new("varnishtest");
    command.arg(format!("-Dhttp={}", node.addr("http"))).arg(format!("-Dorigin={origin}"));
    // Its own deadline, in seconds; and it says what it did only where it failed.
    command.args(["-t", "60"]).arg(root(&format!("tests/vtc/{name}.vtc"))).env("TMPDIR", dir.path());
    let mut program = Program::start("varnishtest", command);
    let ended = program.ended(DEADLINE * 4).await;
    assert!(ended.success(), "{name}:\n{}\n{}", program.output(), node.log());
}

macro_rules! scripts {
    ($($name:ident),*) => {$(
        #[tokio::test(flavor = "multi_thread")]
        async fn $name() {
            script(stringify!($name)).await;
        }
    )*};
}
scripts!(h1_passes, h1_answers, h1_refused, h1_chunks, h2_passes, h2_refused);

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_smuggled_and_floods_end_their_own_connection() {
    let node = Node::start().await;
    let mut command = Command::new(root("target/venv/bin/python"));
    command.arg(root("tests/e2e/clients/http_attacks.py"));
    let mut attacks = Program::start("attacks", command);
    let port: u16 = eventually("the origin's port", async || {
        assert!(attacks.runs(), "{}", attacks.output());
        attacks.output().lines().find_map(|line| line.strip_prefix("port ")?.parse().ok())
    })
    .await;
    let mut ssh = Ssh::start(&node, &[&format!("web:80:127.0.0.1:{port}")]).await;
    let before = node.usage().memory;
    attacks.tell(&format!("{} {}", node.ip, node.addr("http").port()));
    let mut most = before;
    eventually_within(DEADLINE * 8, "the attacks' end", async || {
        most = most.max(node.usage().memory);
        attacks.output().lines().any(|line| line == "done").then_some(())
    })
    .await;
    let output = attacks.output();
    eprintln!("{output}\nmemory: {} MiB before, {} MiB at most", before >> 20, most >> 20);
    assert!(!output.contains("wrong "), "{output}");
    assert!(most - before < 64 << 20, "{} MiB more", (most - before) >> 20);
    assert!(ssh.program.runs() && !node.log().contains("panicked"), "{}", node.log());
}
