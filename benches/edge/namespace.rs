//! Namespaces of the bench's own: a loopback with one congestion control, and
//! processes that end with the bench. The bench starts itself again in them.

use std::os::unix::process::CommandExt;
use std::process::Command;

use tokio::signal::unix::{SignalKind, signal};

const INSIDE: &str = "ADIT_EDGE_INSIDE";

/// As root, in the new namespaces: 10,000 visitors want as many descriptors, where they
/// may be had. /run becomes a folder in memory for all that
/// the servers write; sshd wants an empty one of its own there.
const PREPARE: &str = "set -e
ulimit -n 200000 2>/dev/null || ulimit -n \"$(ulimit -Hn)\"
mount -t tmpfs edge /run
mkdir -m 755 /run/sshd
ip link set lo up
echo \"$1\" > /proc/sys/net/ipv4/tcp_congestion_control
shift
exec \"$0\" \"$@\"";

/// Whether this process is the one in the namespaces.
pub fn inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Becomes the process in the namespaces; returns only why that failed.
pub fn enter(congestion: &str) -> String {
    let Ok(exe) = std::env::current_exe() else { return "this program has no path".into() };
    let root = std::fs::read_to_string("/proc/self/status").is_ok_and(|s| {
        s.lines().any(|l| l.strip_prefix("Uid:").is_some_and(|u| u.split_whitespace().nth(1) == Some("0")))
    });
    if !root {
        return "must be root, for a network namespace and for sshd: sudo -E cargo bench --bench edge".into();
    }
    let failed = Command::new("unshare")
        .args(["--net", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", PREPARE])
        .arg(exe)
        .arg(congestion)
        .args(std::env::args_os().skip(1))
        .env(INSIDE, "1")
        .exec();
    format!("unshare (util-linux): {failed}")
}

/// Returns when somebody wants the bench to end, with the signal that said so.
pub async fn told_to_end() -> &'static str {
    let [mut int, mut term, mut hup] =
        [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()].map(|kind| signal(kind).unwrap());
    tokio::select! {
        _ = int.recv() => "SIGINT",
        _ = term.recv() => "SIGTERM",
        _ = hup.recv() => "SIGHUP",
    }
}

/// The congestion control in force.
pub fn congestion() -> String {
    std::fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control").unwrap_or_default().trim().to_owned()
}
