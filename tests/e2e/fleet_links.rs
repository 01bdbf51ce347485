//! Nodes that are far from each other: round trips of 5, 40 and 120 ms between three
//! places, links that are cut, and a feed out of reach.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::fleet_feed::becomes;
use crate::fleet_ways::{Visitors, comes_to_be, linked, named, tunnel};
use crate::harness::*;

/// Nodes a, b and c of one socket, whose tunnels `web-0` to `web-2` are served by their
/// keys.
pub async fn places(net: &Net, etcd: &EtcdCluster, change: impl Fn(NodeOpts) -> NodeOpts) -> [Node; 3] {
    let [a, b, c] = [0, 1, 2].map(|place| change(net.node(etcd, place)));
    let (a, b, c) = tokio::join!(Node::with(a), Node::with(b), Node::with(c));
    a.put("sockets/web", json!({"type": "http", "hostnames": ["web.edge.localhost"]})).await;
    for (i, node) in [&a, &b, &c].into_iter().enumerate() {
        a.put(&format!("tunnels/web-{i}"), json!({"socket": "web", "keys": [node.key.line()]})).await;
    }
    for node in [&a, &b, &c] {
        becomes(node, 503).await;
        linked(node, 2).await;
    }
    [a, b, c]
}

#[tokio::test(flavor = "multi_thread")]
async fn fleet_visitors_reach_the_nearest_tunnel_and_the_next_when_it_dies() {
    let test = "fleet_links::fleet_visitors_reach_the_nearest_tunnel_and_the_next_when_it_dies";
    let Some(net) = Net::of(test, [5, 40, 120]).await else { return };
    let etcd = net.feed().await;
    let nodes = places(&net, &etcd, |opts| opts).await;
    let [a, b, c] = &nodes;
    // What is measured is what the links do.
    for (node, expected) in [(a, [("b", 5.0), ("c", 40.0)]), (c, [("a", 40.0), ("b", 120.0)])] {
        for (to, trip) in expected {
            let measured = async || {
                let (_, status) = node.api("GET", "/v1/status", None).await;
                let nodes = status["fleet"]["nodes"].as_array()?.clone();
                nodes.iter().find(|one| one["node"] == to)?["round_trip_ms"].as_f64()
            };
            let near = |ms: &f64| (trip..trip + 15.0).contains(ms);
            eventually("the round trip is measured", async || measured().await.filter(near)).await;
        }
    }
    let origins = [named("a").await, named("b").await, named("c").await];
    let mut owners = Vec::new();
    for (node, origin) in nodes.iter().zip(origins) {
        owners.push(Some(tunnel(node, node, origin).await));
    }
    let serve = async |expected: [&str; 3]| {
        for (node, name) in nodes.iter().zip(expected) {
            comes_to_be(node, DEADLINE, name).await;
        }
    };
    serve(["a", "b", "c"]).await;
    // 0 is 5 ms from 1 and 40 ms from 2; 1 is 120 ms from 2.
    owners[0] = None;
    serve(["b", "b", "c"]).await;
    owners[1] = None;
    serve(["c", "c", "c"]).await;
    owners[0] = Some(tunnel(a, a, origins[0]).await);
    serve(["a", "a", "c"]).await;
    owners[2] = None;
    serve(["a", "a", "a"]).await;
    owners[1] = Some(tunnel(b, b, origins[1]).await);
    owners[2] = Some(tunnel(c, c, origins[2]).await);
    serve(["a", "b", "c"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fleet_a_cut_link_is_noticed_within_a_moment_and_used_again_when_it_heals() {
    let test = "fleet_links::fleet_a_cut_link_is_noticed_within_a_moment_and_used_again_when_it_heals";
    let Some(mut net) = Net::of(test, [5, 40, 120]).await else { return };
    let etcd = net.feed().await;
    let nodes = places(&net, &etcd, |opts| opts).await;
    let [a, b, c] = &nodes;
    let (_b, _c) = (tunnel(b, b, named("b").await).await, tunnel(c, c, named("c").await).await);
    comes_to_be(a, DEADLINE, "b").await;
    let visitors = Visitors::of(a);
    tokio::time::sleep(Duration::from_millis(500)).await;
    let cut = Instant::now();
    net.cut(0, 1).await;
    comes_to_be(a, Duration::from_secs(5), "c").await;
    net.heal(0, 1).await;
    comes_to_be(a, DEADLINE, "b").await;
    let all = visitors.end().await;
    let failed: Vec<_> = all.iter().filter(|(_, _, who)| who != "b" && who != "c").collect();
    assert!(failed.is_empty(), "{failed:?}");
    let (took, at, _) = all.iter().find(|(_, at, who)| *at + Duration::from_millis(100) > cut && who == "c").unwrap();
    println!("a cut link was left after {:?}", *at + *took - cut);
    assert!(*at + *took - cut < Duration::from_secs(3), "{took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn fleet_a_node_cut_off_from_the_feed_serves_its_own_and_comes_back() {
    let test = "fleet_links::fleet_a_node_cut_off_from_the_feed_serves_its_own_and_comes_back";
    let Some(net) = Net::of(test, [5, 40, 120]).await else { return };
    let etcd = net.feed().await;
    let nodes = places(&net, &etcd, |opts| opts).await;
    let [a, b, c] = &nodes;
    let origins = [named("old").await, named("new").await, named("c").await];
    // Tunnel web-0 at b, and another tunnel at c.
    let _old = tunnel(b, a, origins[0]).await;
    let _c = tunnel(c, c, origins[2]).await;
    comes_to_be(a, DEADLINE, "old").await;
    let visitors = [Visitors::of(a), Visitors::of(b), Visitors::of(c)];
    net.feed_reaches(1, false);
    // Its lease ends, and the others go elsewhere; it serves on.
    comes_to_be(a, Duration::from_secs(20), "c").await;
    comes_to_be(b, DEADLINE, "old").await;
    // The same tunnel logs in elsewhere meanwhile: that is the later login, also when
    // the node is back.
    let _new = tunnel(a, a, origins[1]).await;
    comes_to_be(a, DEADLINE, "new").await;
    net.feed_reaches(1, true);
    comes_to_be(b, Duration::from_secs(40), "new").await;
    for (visitors, may) in visitors.into_iter().zip([["old", "new", "c"]; 3]) {
        let all = visitors.end().await;
        let failed: Vec<_> = all.iter().filter(|(_, _, who)| !may.contains(&who.as_str())).collect();
        assert!(failed.is_empty(), "{failed:?}");
    }
    // And the earlier one takes over when it ends.
    drop(_new);
    comes_to_be(b, DEADLINE, "old").await;
}
