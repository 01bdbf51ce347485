use std::time::Duration;

use super::*;
use crate::feed::store::{Store, StoreSettings};
use crate::model::SocketType;

fn records_with(ports: &str, domain: Option<&str>) -> (Arc<Store>, Records) {
    let store = Store::in_memory(StoreSettings::default()).unwrap();
    let settings =
        RecordSettings { ports: range(ports), domain: domain.map(|d| d.parse().unwrap()), reserved: Vec::new() };
    (store.clone(), Records::new(store, settings))
}

fn records() -> (Arc<Store>, Records) {
    records_with("20000-20009", Some("edge.test"))
}

fn named(id: &str, hosts: &[&str]) -> Socket {
    let mut socket = Socket::new(id.parse().unwrap(), SocketType::Http);
    socket.hostnames = hosts.iter().map(|h| h.parse().unwrap()).collect();
    socket
}

fn raw(id: &str, ports: &[u16]) -> Socket {
    let mut socket = Socket::new(id.parse().unwrap(), SocketType::Tcp);
    socket.ports = ports.to_vec();
    socket
}

fn tunnel(id: &str, socket: &str, relay: Option<(&str, u16)>) -> Tunnel {
    let mut tunnel = Tunnel::new(id.parse().unwrap(), socket.parse().unwrap());
    tunnel.user = relay.map(|(user, _)| user.to_owned());
    tunnel.relay_port = relay.map(|(_, port)| port);
    tunnel
}

async fn keys(store: &Store, prefix: &str) -> Vec<String> {
    store.list(prefix).await.unwrap().1.into_iter().map(|e| e.key).collect()
}

fn fields(error: RecordError) -> Vec<String> {
    match error {
        RecordError::Mistakes(m) | RecordError::Taken(m) => m.into_iter().map(|m| m.at).collect(),
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn a_name_belongs_to_one_socket_until_it_lets_go() {
    let (store, records) = records();
    records.put_socket(named("a", &["x.test", "y.test"]), Condition::Any).await.unwrap();
    let refused = records.put_socket(named("b", &["z.test", "y.test", "x.test"]), Condition::Any).await.unwrap_err();
    assert!(refused.to_string().contains("\"y.test\" is taken by socket \"a\""), "{refused}");
    assert_eq!(fields(refused), ["hostnames[1]", "hostnames[2]"]);
    assert_eq!(keys(&store, "cfg/host/").await, ["cfg/host/x.test", "cfg/host/y.test"]);
    records.put_socket(named("a", &["x.test"]), Condition::Any).await.unwrap();
    records.put_socket(named("b", &["y.test"]), Condition::Any).await.unwrap();
    records.delete_socket(&"a".parse().unwrap(), Condition::Any, false).await.unwrap();
    assert_eq!(keys(&store, "cfg/").await, ["cfg/host/y.test", "cfg/sock/b"]);
}

#[tokio::test]
async fn ports_are_chosen_kept_and_given_back() {
    let (_, records) = records();
    let first = records.put_socket(raw("db", &[]), Condition::Any).await.unwrap();
    let [port] = first.record.ports[..] else { panic!() };
    let again = records.put_socket(raw("db", &[]), Condition::Any).await.unwrap();
    assert_eq!((again.record.ports, first.created, again.created), (vec![port], true, false));
    let taken = records.put_socket(raw("other", &[port]), Condition::Any).await.unwrap_err();
    assert_eq!(fields(taken), ["ports[0]"]);
    let outside = records.put_socket(raw("other", &[80, 20001, 20001]), Condition::Any).await.unwrap_err();
    assert!(outside.to_string().contains("20000-20009"));
    assert_eq!(fields(outside), ["ports[2]", "ports[0]"]);
    records.delete_socket(&"db".parse().unwrap(), Condition::Any, false).await.unwrap();
    let anew = records.put_socket(raw("db", &[]), Condition::Any).await.unwrap();
    assert_eq!(anew.record.ports, [port], "the same id gets the same port while it is free");
}

#[tokio::test]
async fn a_kept_port_outside_a_changed_range_is_accepted_back() {
    let (store, records) = records();
    let had = records.put_socket(raw("db", &[]), Condition::Any).await.unwrap().record;
    let ports = crate::fields::PortRange { first: 30000, last: 30001 };
    let moved = RecordSettings { ports, ..RecordSettings::default() };
    let records = Records::new(store, moved);
    assert_eq!(records.put_socket(had.clone(), Condition::Any).await.unwrap().record, had);
}

#[tokio::test]
async fn an_exhausted_range_is_told_and_racing_sockets_share_it_without_clash() {
    let (_, records) = records();
    let records = Arc::new(records);
    let racers: Vec<_> = (0..12)
        .map(|i| {
            let records = Arc::clone(&records);
            tokio::spawn(async move { records.put_socket(raw(&format!("s{i}"), &[]), Condition::Any).await })
        })
        .collect();
    let (mut ports, mut refused) = (Vec::new(), 0);
    for racer in racers {
        match racer.await.unwrap() {
            Ok(written) => ports.extend(written.record.ports),
            Err(error) => {
                assert!(error.to_string().contains("all 10 ports of the range 20000-20009 are taken"), "{error}");
                refused += 1;
            }
        }
    }
    ports.sort();
    assert_eq!((ports, refused), ((20000..=20009).collect(), 2));
}

#[tokio::test]
async fn a_socket_without_names_is_named_after_its_id() {
    let (_, records) = records();
    let socket = records.put_socket(named("web", &[]), Condition::Any).await.unwrap().record;
    assert_eq!(socket.hostnames[0].as_str(), "web.edge.test");
    assert_eq!(fields(records.put_socket(named("a.b", &[]), Condition::Any).await.unwrap_err()), ["hostnames"]);
    let (_, undomained) = records_with("20000-20009", None);
    assert_eq!(fields(undomained.put_socket(named("web", &[]), Condition::Any).await.unwrap_err()), ["hostnames"]);
}

#[tokio::test]
async fn conditions_hold() {
    let (_, records) = records();
    let first = records.put_socket(named("a", &[]), Condition::Absent).await.unwrap();
    for wrong in [Condition::Absent, Condition::Rev(first.rev + 7)] {
        let refused = records.put_socket(named("a", &[]), wrong).await.unwrap_err();
        assert_eq!(refused, RecordError::Precondition { rev: Some(first.rev) });
    }
    let second = records.put_socket(named("a", &[]), Condition::Rev(first.rev)).await.unwrap();
    let id: SocketId = "a".parse().unwrap();
    let refused = records.delete_socket(&id, Condition::Rev(first.rev), false).await.unwrap_err();
    assert_eq!(refused, RecordError::Precondition { rev: Some(second.rev) });
    let refused = records.put_socket(named("new", &[]), Condition::Present).await.unwrap_err();
    assert_eq!(refused, RecordError::Precondition { rev: None });
    assert_eq!(records.get::<Socket>(&id).await.unwrap().rev, second.rev);
    records.delete_socket(&id, Condition::Rev(second.rev), false).await.unwrap();
    assert_eq!(records.get::<Socket>(&id).await.unwrap_err(), RecordError::NotFound);
    assert_eq!(records.delete_socket(&id, Condition::Any, false).await.unwrap_err(), RecordError::NotFound);
}

#[tokio::test]
async fn tunnels_claim_their_relay_port_and_are_known_to_their_socket() {
    let (store, records) = records();
    // Its socket may come later.
    records.put_tunnel(tunnel("t1", "s", Some(("me", 8080))), Condition::Any).await.unwrap();
    records.put_tunnel(tunnel("t2", "s", None), Condition::Any).await.unwrap();
    let refused = records.put_tunnel(tunnel("t3", "s", Some(("me", 8080))), Condition::Any).await.unwrap_err();
    assert!(refused.to_string().contains("by tunnel \"t1\""), "{refused}");
    records.put_socket(named("s", &[]), Condition::Any).await.unwrap();
    let id: SocketId = "s".parse().unwrap();
    let tunnels = records.tunnels_of(&id).await.unwrap();
    assert_eq!(tunnels.iter().map(TunnelId::as_str).collect::<Vec<_>>(), ["t1", "t2"]);
    records.put_tunnel(tunnel("t2", "elsewhere", None), Condition::Any).await.unwrap();
    let refused = records.delete_socket(&id, Condition::Any, false).await.unwrap_err();
    assert_eq!(refused, RecordError::InUse(vec!["t1".parse().unwrap()]));
    records.delete_socket(&id, Condition::Any, true).await.unwrap();
    assert_eq!(keys(&store, "cfg/").await, ["cfg/of/elsewhere/t2", "cfg/tun/t2"]);
    records.delete_tunnel(&"t2".parse().unwrap(), Condition::Any).await.unwrap();
    assert!(keys(&store, "").await.is_empty());
    let refused = records.put_tunnel(tunnel("t", "s", Some(("a\nb", 1))), Condition::Any).await.unwrap_err();
    assert_eq!(fields(refused), ["user"]);
}

#[tokio::test]
async fn on_demand_takes_all_or_nothing() {
    let (store, records) = records();
    let claimed = records.claim_on_demand(raw("db", &[]), tunnel("db", "db", None), None).await.unwrap();
    assert_eq!(claimed.0.record.ports.len(), 1);
    let refused = records.claim_on_demand(named("db", &[]), tunnel("t", "db", None), None).await.unwrap_err();
    assert_eq!(fields(refused), ["id"]);
    records.put_socket(named("holder", &["web.edge.test"]), Condition::Any).await.unwrap();
    let before = keys(&store, "").await;
    let refused = records.claim_on_demand(named("web", &[]), tunnel("web", "web", None), None).await.unwrap_err();
    assert!(refused.to_string().contains("taken by socket \"holder\""), "{refused}");
    assert_eq!(keys(&store, "").await, before);
}

#[tokio::test]
async fn a_claim_under_a_lease_ends_with_it_unless_it_was_replaced() {
    let (store, records) = records();
    let lease = store.lease(Duration::from_secs(5)).await.unwrap();
    for name in ["gone", "kept"] {
        records.claim_on_demand(named(name, &[]), tunnel(name, name, None), Some(lease.id)).await.unwrap();
    }
    let kept = records.get::<Socket>(&"kept".parse().unwrap()).await.unwrap().record;
    records.put_socket(kept, Condition::Any).await.unwrap();
    drop(lease);
    let gone = "gone".parse().unwrap();
    for _ in 0..200 {
        if records.get::<Socket>(&gone).await.is_err() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(keys(&store, "").await, ["cfg/host/kept.edge.test", "cfg/sock/kept"]);
}

#[tokio::test]
async fn of_racing_claims_of_one_name_one_wins() {
    let (_, records) = records();
    let records = Arc::new(records);
    let racers: Vec<_> = (0..8)
        .map(|i| {
            let records = Arc::clone(&records);
            let socket = named(&format!("s{i}"), &["prize.test"]);
            tokio::spawn(async move { records.put_socket(socket, Condition::Any).await })
        })
        .collect();
    let mut won = 0;
    for racer in racers {
        match racer.await.unwrap() {
            Ok(_) => won += 1,
            Err(error) => assert_eq!(fields(error), ["hostnames[0]"]),
        }
    }
    assert_eq!(won, 1);
}

#[tokio::test]
async fn lists_come_in_pages_and_tell_what_they_cannot_read() {
    let (store, records) = records();
    for i in 0..5 {
        records.put_socket(named(&format!("s{i}"), &[]), Condition::Any).await.unwrap();
    }
    let op = Op::Put { key: "cfg/sock/s1x".into(), value: r#"{"v":9}"#.into(), lease: None };
    store.commit(Txn { expect: vec![], ops: vec![op] }).await.unwrap();
    let first = records.list::<Socket>("", 3).await.unwrap();
    assert_eq!((first.items.len(), first.next.as_deref()), (2, Some("s1x")));
    assert_eq!(first.unreadable, ["s1x"]);
    let rest = records.list::<Socket>("s1x", 3).await.unwrap();
    assert_eq!((rest.items.len(), rest.next), (3, None));
}

#[tokio::test]
async fn a_change_of_type_changes_what_is_claimed() {
    let (store, records) = records();
    records.put_socket(named("a", &["x.test"]), Condition::Any).await.unwrap();
    let port = records.put_socket(raw("a", &[]), Condition::Any).await.unwrap().record.ports[0];
    assert_eq!(keys(&store, "cfg/").await, [format!("cfg/port/{port}"), "cfg/sock/a".into()]);
    let mut tls = Socket::new("a".parse().unwrap(), SocketType::Tls);
    tls.hostnames = vec!["x.test".parse().unwrap()];
    assert_eq!(records.put_socket(tls, Condition::Any).await.unwrap().record.ports, [port]);
    // A browser would send what it keeps for b to a's port.
    let taken = records.put_socket(named("b", &["x.test"]), Condition::Any).await.unwrap_err();
    assert!(matches!(taken, RecordError::Taken(mistakes) if mistakes[0].at == "hostnames[0]"));
    records.put_socket(named("a", &["y.test"]), Condition::Any).await.unwrap();
    records.put_socket(named("b", &["x.test"]), Condition::Any).await.unwrap();
    assert_eq!(keys(&store, "cfg/host/").await, ["cfg/host/x.test", "cfg/host/y.test"]);
    assert_eq!(records.get::<Socket>(&"b".parse().unwrap()).await.unwrap().record.hostnames[0].as_str(), "x.test");
}

#[tokio::test]
async fn nobody_gets_the_name_of_the_host_where_visitors_log_in() {
    let store = Store::in_memory(Default::default()).unwrap();
    let reserved = vec!["auth.edge.test".parse().unwrap()];
    let records = Records::new(store, RecordSettings { reserved, ..RecordSettings::default() });
    for kind in ["http", "https", "passthrough", "tls"] {
        let mut socket = Socket::new("a".parse().unwrap(), kind.parse().unwrap());
        socket.hostnames = vec!["b.edge.test".parse().unwrap(), "auth.edge.test".parse().unwrap()];
        let refused = records.put_socket(socket, Condition::Any).await.unwrap_err();
        assert!(matches!(refused, RecordError::Mistakes(mistakes) if mistakes[0].at == "hostnames[1]"), "{kind}");
    }
}

/// "20000-20009" as a range.
fn range(text: &str) -> crate::fields::PortRange {
    let (first, last) = text.split_once('-').unwrap();
    crate::fields::PortRange { first: first.parse().unwrap(), last: last.parse().unwrap() }
}
