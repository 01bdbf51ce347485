//! Kills a writing process at random points and looks for what it had
//! acknowledged. The child is this test binary again.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::*;

const CHILD: &str = "ADIT_TEST_STORE_CHILD";

/// Not a test of its own: the process that is killed. Four writers, each key
/// acknowledged is a line.
#[test]
fn child_that_writes_until_it_is_killed() {
    let Ok(path) = std::env::var(CHILD) else { return };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let store = Store::open(Path::new(&path), StoreSettings { history: 50, ..StoreSettings::default() }).unwrap();
        let from = store.list("k/").await.unwrap().1.len();
        let lease = store.lease(Duration::from_secs(5)).await.unwrap();
        let writers: Vec<_> = (0..4)
            .map(|w| {
                let (store, lease) = (Arc::clone(&store), lease.id);
                tokio::spawn(async move {
                    for i in from.. {
                        let key = format!("k/{w}/{i}");
                        let ops = vec![
                            Op::Put { key: key.clone(), value: key.clone(), lease: None },
                            Op::Put { key: format!("pair/{w}/{i}"), value: key.clone(), lease: None },
                            Op::Put { key: format!("leased/{w}"), value: key.clone(), lease: Some(lease) },
                        ];
                        let rev = store.commit(Txn { expect: vec![], ops }).await.unwrap();
                        let mut out = std::io::stdout().lock();
                        writeln!(out, "acked {key} {rev}").unwrap();
                        out.flush().unwrap();
                    }
                })
            })
            .collect();
        for writer in writers {
            let _ = writer.await;
        }
    });
}

#[test]
fn kill_9_at_random_points_loses_nothing_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.db");
    let mut seed = std::process::id() as u64 ^ 0x9E37_79B9_7F4A_7C15;
    println!("seed {seed}");
    let mut acked: Vec<(String, u64)> = Vec::new();
    let began = Instant::now();
    let mut rounds = 0;
    while rounds < 8 && began.elapsed() < Duration::from_secs(9) {
        rounds += 1;
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["feed::store::durability::child_that_writes_until_it_is_killed", "--exact", "--nocapture"])
            .env(CHILD, &path)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let reader = std::thread::spawn(move || {
            // The last line may be cut by the kill: it counts only if whole.
            lines
                .map_while(Result::ok)
                .filter_map(|l| {
                    let at = l.find("acked ")?;
                    let mut words = l[at..].split(' ').skip(1);
                    Some((words.next()?.to_owned(), words.next()?.parse().ok()?))
                })
                .collect::<Vec<(String, u64)>>()
        });
        std::thread::sleep(Duration::from_millis(60 + seed % 400));
        child.kill().unwrap();
        child.wait().unwrap();
        acked.extend(reader.join().unwrap());

        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let store = Store::open(&path, StoreSettings { history: 50, ..StoreSettings::default() }).unwrap();
            let (now, all) = store.list("").await.unwrap();
            for (key, rev) in &acked {
                let entry = store.read(key).await.unwrap();
                assert_eq!(entry.as_ref().map(|e| e.value.as_ref()), Some(key.as_str()));
                assert!(*rev <= now.rev, "revision {rev} was acknowledged, the store is at {}", now.rev);
                let pair = format!("pair/{}", key.trim_start_matches("k/"));
                assert!(store.read(&pair).await.unwrap().is_some(), "half a transaction");
            }
            assert!(!all.iter().any(|e| e.key.starts_with("leased/")));
            store.close().await;
        });
    }
    println!("{} acknowledged writes over {rounds} kills", acked.len());
    assert!(acked.len() > 20);
}
