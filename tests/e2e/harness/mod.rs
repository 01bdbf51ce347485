//! What scenarios stand on: nodes and ssh clients as real processes, origins in
//! this process, visitors, and a pattern of bytes that is checked as it flows.

mod browser;
mod chromium;
#[cfg(feature = "etcd")]
mod etcd;
mod jar;
#[cfg(feature = "etcd")]
mod net;
mod node;
mod origin;
mod pattern;
mod program;
mod ssh;
pub mod url;
mod visitor;
mod websocket;

use std::time::Duration;

#[allow(unused_imports)]
pub use browser::{Answer, Browser, Form, Manner};
#[allow(unused_imports)]
pub use chromium::Chromium;
#[cfg(feature = "etcd")]
pub use etcd::{EtcdCluster, ROOT};
#[allow(unused_imports)]
pub use jar::{Cookie, Jar, Reach, SameSite};
#[cfg(feature = "etcd")]
pub use net::Net;
#[allow(unused_imports)]
pub use node::{Node, NodeOpts, Usage, own_address};
pub use origin::{Body, Origin, pattern_body};
pub use pattern::Pattern;
pub use program::Program;
pub use ssh::{Key, Session, Ssh, SshOpts};
#[allow(unused_imports)]
pub use url::Url;
pub use visitor::{Io, curl, get_exact, h2, read_answer, request, tls_connect, trusting};
pub use websocket::WebSocket;

/// No single step of a scenario takes longer on a busy machine.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// The full size with `ADIT_LONG=1`, else the short one.
pub fn size(full: u64, short: u64) -> u64 {
    if std::env::var_os("ADIT_LONG").is_some_and(|v| v == "1") { full } else { short }
}

/// Whether the long scenarios are asked for; says so where they are not.
pub fn long() -> bool {
    let asked = size(1, 0) == 1;
    if !asked {
        eprintln!("skipped: only with ADIT_LONG=1");
    }
    asked
}

/// Awaits `step`; panics by `what` where it takes too long.
pub async fn within<T>(limit: Duration, what: &str, step: impl Future<Output = T>) -> T {
    tokio::time::timeout(limit, step).await.unwrap_or_else(|_| panic!("{what}: not within {limit:?}"))
}

/// Whether this machine has ::1; a scenario that needs it says so and passes.
pub fn has_ipv6() -> bool {
    let has = std::net::TcpListener::bind("[::1]:0").is_ok();
    if !has {
        eprintln!("skipped: this machine has no ::1");
    }
    has
}

/// Repeats `step` until it gives something; panics by `what` at the deadline.
pub async fn eventually<T>(what: &str, step: impl AsyncFnMut() -> Option<T>) -> T {
    eventually_within(DEADLINE, what, step).await
}

/// The same with a deadline of its own.
pub async fn eventually_within<T>(limit: Duration, what: &str, mut step: impl AsyncFnMut() -> Option<T>) -> T {
    let polled = async {
        loop {
            if let Some(found) = step().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    within(limit, what, polled).await
}
