//! Everything that fails, one after the other, while visitors come without a pause and
//! each answer is looked at: nodes, members of the feed, owners, links, the feed out of
//! reach, a compacted history, clocks, slow links, bad records.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::fleet_links::places;
use crate::fleet_ways::{Visitors, comes_to_be, linked, named, tunnel};
use crate::harness::*;

/// From the end of a fault until all is as before.
const RECOVERS: Duration = Duration::from_secs(45);

/// Numbers that are the same for the same seed.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 33).unwrap() % sides
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fleet_whatever_fails_visitors_of_other_nodes_do_not_notice() {
    if !long() {
        return;
    }
    let test = "fleet_chaos::fleet_whatever_fails_visitors_of_other_nodes_do_not_notice";
    let Some(mut net) = Net::of(test, [5, 20, 30]).await else { return };
    let seed: u64 = std::env::var("ADIT_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(20_261);
    let seconds: u64 = std::env::var("ADIT_CHAOS_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(600);
    let mut dice = Dice(seed | 1);
    let mut etcd = net.feed_of(3).await;
    let clock = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(clock.path(), "+0").unwrap();
    let clock_file = clock.path().to_str().unwrap().to_owned();
    let mut nodes = places(&net, &etcd, |opts| {
        let opts = opts.set("log", "level = \"info\"");
        if opts.is_named("c") { opts.with_clock(&clock_file) } else { opts }
    })
    .await;
    // All go to the one at b, then to c, then to a: over the links that fail.
    for (i, priority) in [2, 0, 1].into_iter().enumerate() {
        let record = json!({"socket": "web", "keys": [nodes[i].key.line()], "priority": priority});
        nodes[0].put(&format!("tunnels/web-{i}"), record).await;
    }
    let origins = [named("a").await, named("b").await, named("c").await];
    let mut owners = Vec::new();
    for (node, origin) in nodes.iter().zip(origins) {
        owners.push(Some(tunnel(node, node, origin).await));
    }
    for node in &nodes {
        comes_to_be(node, DEADLINE, "b").await;
    }
    let visitors: Vec<Visitors> = nodes.iter().map(Visitors::of).collect();
    let begun = Instant::now();
    // When a node was not there, so that its own visitors are excused.
    let mut away: Vec<(usize, Instant, Instant)> = Vec::new();
    let (mut told, mut slowest) = (String::new(), std::collections::BTreeMap::<&str, Duration>::new());
    let mut events = 0;
    while begun.elapsed() < Duration::from_secs(seconds) {
        let (at, hold) = (dice.roll(3), Duration::from_millis(1500 + dice.roll(6000) as u64));
        let other = (at + 1 + dice.roll(2)) % 3;
        let fault = [
            "a node is killed",
            "an owner is killed",
            "a member is killed",
            "a link is cut",
            "the feed is out of reach",
            "the history is compacted",
            "a clock jumps",
            "a link is slow",
            "a bad record",
            "a node stops for a while",
        ][dice.roll(10)];
        let _ = writeln!(told, "{:>6.1} s {fault} ({at}, {other})", begun.elapsed().as_secs_f64());
        println!("{}", told.lines().last().unwrap());
        events += 1;
        let since = Instant::now();
        match fault {
            "a node is killed" => {
                nodes[at].kill9();
                tokio::time::sleep(hold).await;
                nodes[at].restart().await;
                linked(&nodes[at], 2).await;
                owners[at] = Some(tunnel(&nodes[at], &nodes[at], origins[at]).await);
                away.push((at, since, Instant::now()));
            }
            "an owner is killed" => {
                owners[at] = None;
                tokio::time::sleep(hold).await;
                owners[at] = Some(tunnel(&nodes[at], &nodes[at], origins[at]).await);
            }
            "a member is killed" => {
                etcd.kill(at);
                tokio::time::sleep(hold).await;
                etcd.restart(at);
            }
            "a link is cut" => {
                net.cut(at, other).await;
                tokio::time::sleep(hold).await;
                net.heal(at, other).await;
            }
            "the feed is out of reach" => {
                net.feed_reaches(at, false);
                tokio::time::sleep(hold * 2).await;
                net.feed_reaches(at, true);
            }
            "the history is compacted" => {
                let said = etcd.ctl(&["get", "/adit/1/cfg", "--limit", "1", "-w", "json"]);
                let head =
                    serde_json::from_str::<serde_json::Value>(said.trim()).unwrap()["header"]["revision"].clone();
                // Another one may have been there first.
                let _ = etcd.ctl_if_healthy(&["compact", &head.to_string()]);
            }
            "a clock jumps" => {
                let minutes = [-7200, -90, 90, 7200][dice.roll(4)];
                std::fs::write(clock.path(), format!("{minutes:+}")).unwrap();
                tokio::time::sleep(hold).await;
                std::fs::write(clock.path(), "+0").unwrap();
            }
            "a link is slow" => {
                net.set(at, other, "rate", 0.2).await;
                net.set(at, other, "loss", 10.0).await;
                tokio::time::sleep(hold).await;
                net.set(at, other, "rate", 0.0).await;
                net.set(at, other, "loss", 0.0).await;
            }
            "a bad record" => {
                for (key, value) in [
                    ("/adit/1/cfg/sock/web", "{\"v\":1,\"type\":\"nonsense\"}"),
                    ("/adit/1/cfg/sock/poison", "not json"),
                    ("/adit/1/up/loc/a/web-0", "{\"v\":9}"),
                ] {
                    assert!(etcd.ctl_if_healthy(&["put", key, value]), "{key}");
                }
                tokio::time::sleep(hold).await;
                let record = json!({"type": "http", "hostnames": ["web.edge.localhost"]});
                eventually("the record is good again", async || {
                    (nodes[0].api("PUT", "/v1/sockets/web", Some(&record)).await.0 == 200).then_some(())
                })
                .await;
            }
            _ => {
                nodes[at].program().signal("STOP");
                tokio::time::sleep(hold).await;
                nodes[at].program().signal("CONT");
                away.push((at, since, Instant::now() + Duration::from_secs(1)));
            }
        }
        let healed = Instant::now();
        for node in &nodes {
            comes_to_be(node, RECOVERS, "b").await;
        }
        let took = healed.elapsed();
        let worst = slowest.entry(fault).or_default();
        *worst = took.max(*worst);
    }
    println!("seed {seed}: {events} faults in {:.0} s\n{told}", begun.elapsed().as_secs_f64());
    println!("all as before after, at most: {slowest:?}");
    for (at, visitors) in visitors.into_iter().enumerate() {
        let all = visitors.end().await;
        let is_excused = |took: Duration, asked: Instant| {
            away.iter().any(|(of, from, to)| *of == at && asked < *to && asked + took > *from)
        };
        let good = |who: &str| matches!(who, "a" | "b" | "c");
        let slow = all.iter().filter(|(took, asked, _)| !is_excused(*took, *asked)).map(|(took, ..)| *took).max();
        let failed: Vec<String> = all
            .iter()
            .filter(|(took, asked, who)| !good(who) && !is_excused(*took, *asked))
            .map(|(took, asked, who)| format!("{who} at {:.1} s after {took:?}", (*asked - begun).as_secs_f64()))
            .collect();
        println!("place {at}: {} visits, {} failed, the slowest took {slow:?}", all.len(), failed.len());
        assert!(failed.is_empty(), "{failed:?}\n{told}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fleet_a_rolling_restart_under_load_loses_nobody() {
    let test = "fleet_chaos::fleet_a_rolling_restart_under_load_loses_nobody";
    let Some(net) = Net::of(test, [5, 20, 30]).await else { return };
    let etcd = net.feed().await;
    let mut nodes = places(&net, &etcd, |opts| opts.set("drain", "notice = \"1500ms\"")).await;
    let origins = [named("a").await, named("b").await, named("c").await];
    let mut owners = Vec::new();
    for (node, origin) in nodes.iter().zip(origins) {
        owners.push(tunnel(node, node, origin).await);
    }
    for (node, name) in nodes.iter().zip(["a", "b", "c"]) {
        comes_to_be(node, DEADLINE, name).await;
    }
    // As packets follow a BGP speaker that asks /readyz.
    let visitors: Vec<Visitors> = nodes.iter().map(Visitors::while_ready).collect();
    for at in 0..3 {
        nodes[at].drain();
        nodes[at].program().ended(DEADLINE).await;
        nodes[at].restart().await;
        linked(&nodes[at], 2).await;
        owners[at] = tunnel(&nodes[at], &nodes[at], origins[at]).await;
        for (node, name) in nodes.iter().zip(["a", "b", "c"]) {
            comes_to_be(node, DEADLINE, name).await;
        }
    }
    for visitors in visitors {
        let all = visitors.end().await;
        let failed: Vec<_> = all.iter().filter(|(_, _, who)| !matches!(who.as_str(), "a" | "b" | "c")).collect();
        assert!(failed.is_empty() && all.len() > 100, "{failed:?} of {}", all.len());
    }
}
