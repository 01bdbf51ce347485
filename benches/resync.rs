//! A node's feed is read anew, a million records at once, while visitors are served:
//! by how much is a visitor late?
//!
//! ```text
//! cargo bench --features etcd --bench resync
//! ```
//! As in the node: the follower applies what the feed says, on the runtime that serves
//! visitors. Visitors are tasks that wait for a millisecond, look a socket up by its
//! name, and wait again; one is late by what that takes beyond the millisecond. Beside
//! each: the same while nothing is read, on the same machine in the same run.
#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing, clippy::print_stdout)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use adit::feed::follower::{Certificates, Follower};
use adit::feed::{Cursor, Entry, Epoch, Event, Subscription};
use adit::logins::Logins;
use adit::model::{Certificate, CertificateId, TicketKeys};
use adit::routes::Routes;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// As many tunnels as sockets.
const SOCKETS: u32 = 500_000;

const VISITORS: usize = 16;

struct NoCertificates;

impl Certificates for NoCertificates {
    fn put(&self, _: Certificate) -> Result<(), String> {
        Ok(())
    }
    fn remove(&self, _: &CertificateId) {}
    fn set_ticket_keys(&self, _: Option<&TicketKeys>) -> Result<(), String> {
        Ok(())
    }
}

fn name(i: u32) -> String {
    format!("name-{i}.customers.example.com")
}

/// All records, as of a revision, those below `changed` written by it.
fn state(rev: u64, changed: u32) -> Vec<Entry> {
    let rev_of = |i| if i < changed { rev } else { 1 };
    let socket = |i| Entry {
        key: format!("cfg/sock/socket-{i:07}"),
        value: format!(r#"{{"type":"http","hostnames":["{}"]}}"#, name(i)).into(),
        rev: rev_of(i),
    };
    let tunnel = |i| Entry {
        key: format!("cfg/tun/tunnel-{i:07}"),
        value: format!(r#"{{"socket":"socket-{i:07}"}}"#).into(),
        rev: rev_of(i),
    };
    (0..SOCKETS).map(socket).chain((0..SOCKETS).map(tunnel)).collect()
}

/// How late visitors were until `done`: median, 99.9 of 100, the most; and how many
/// visits there were.
async fn visits(routes: &Arc<Routes>, done: impl Future<Output = ()>) -> (Duration, Duration, Duration, usize) {
    let stop = Arc::new(AtomicBool::new(false));
    let visitors: Vec<_> = (0..VISITORS)
        .map(|n| {
            let (routes, stop) = (Arc::clone(routes), Arc::clone(&stop));
            tokio::spawn(async move {
                let mut late = Vec::new();
                let mut i = n as u32;
                while !stop.load(Ordering::Relaxed) {
                    let due = Instant::now() + Duration::from_millis(1);
                    tokio::time::sleep_until(due.into()).await;
                    i = i.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
                    std::hint::black_box(routes.by_host(&name(i % SOCKETS)));
                    late.push(due.elapsed());
                }
                late
            })
        })
        .collect();
    done.await;
    stop.store(true, Ordering::Relaxed);
    let mut all = Vec::new();
    for visitor in visitors {
        all.extend(visitor.await.unwrap());
    }
    all.sort();
    let at = |part: f64| all[((all.len() - 1) as f64 * part) as usize];
    (at(0.5), at(0.999), at(1.0), all.len())
}

fn follow(follower: Follower) {
    tokio::task::spawn_blocking(move || follower.run_alone(CancellationToken::new()));
}

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    // Visitors as tasks of the runtime, as the node has them.
    runtime.block_on(async { tokio::spawn(run()).await.unwrap() });
}

async fn run() {
    let routes = Arc::<Routes>::default();
    let (events, received) = mpsc::channel(1);
    let (follower, following) = Follower::new(
        Subscription::from(received),
        Arc::clone(&routes),
        Arc::new(NoCertificates),
        Arc::<Logins>::default(),
    );
    follow(follower);
    let all = 2 * SOCKETS;
    println!("{all} records, {VISITORS} visitors, each every millisecond; late by: median, 99.9 %, the most");
    let told = |what: &str, (p50, p999, most, count): (Duration, Duration, Duration, usize)| {
        println!("{what:42} {p50:>10.1?} {p999:>10.1?} {most:>10.1?}  of {count} visits");
    };
    told("nothing is read", visits(&routes, tokio::time::sleep(Duration::from_secs(5))).await);
    for (what, rev, changed) in [
        ("the first read", 1, SOCKETS),
        ("read anew, nothing has changed", 2, 0),
        ("read anew, every second has changed", 3, SOCKETS / 2),
        ("read anew, all have changed", 4, SOCKETS),
    ] {
        // Made on a thread of its own: that is the engine's work, not the follower's.
        let state = tokio::task::spawn_blocking(move || state(rev, changed)).await.unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
        let begun = Instant::now();
        let done = async {
            let at = Cursor { epoch: Epoch("life".into()), rev };
            events.send(Event::Reset { at, state }).await.unwrap();
            assert!(following.wait_applied(rev, Duration::from_secs(120)).await);
        };
        let late = visits(&routes, done).await;
        assert!(routes.by_host(&name(SOCKETS - 1)).is_some());
        told(&format!("{what}: {:.1?}", begun.elapsed()), late);
    }
    told("nothing is read", visits(&routes, tokio::time::sleep(Duration::from_secs(5))).await);
}
