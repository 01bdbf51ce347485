//! The harness against itself, without a node: a checker that lets anything
//! pass would make every other scenario worthless.

use std::process::Command;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::*;

#[test]
fn a_wrong_a_lost_and_a_doubled_byte_are_found_with_their_place() {
    let good: Vec<u8> = Pattern::default().next(100_000).to_vec();
    assert_eq!(Pattern::default().check(&good), Ok(()));
    for (damage, place) in [(70_000, 70_000), (0, 0)] {
        let mut bad = good.clone();
        bad[damage] ^= 1;
        assert_eq!(Pattern::default().check(&bad), Err(format!("byte {place} is wrong")));
    }
    let mut lost = good.clone();
    lost.drain(500..564);
    assert!(Pattern::default().check(&lost).is_err());
}

#[tokio::test]
async fn a_pattern_that_ends_early_is_not_exact() {
    let (mut near, mut far) = tokio::io::duplex(1 << 20);
    Pattern::write(1000, &mut near).await.unwrap();
    drop(near);
    assert!(Pattern::read(Some(1001), &mut far).await.unwrap_err().contains("ended after 1000"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_raw_origin_does_what_it_is_told() {
    let mut origin = Origin::raw().await;
    let mut io = TcpStream::connect(origin.addr).await.unwrap();
    io.write_all(b"DOWN 3000000\n").await.unwrap();
    assert_eq!(Pattern::read(None, &mut io).await, Ok(3_000_000));
    for (command, wrong, said) in [("UP 5000", false, "exact 5000\n"), ("EOF", true, "byte 5000 is wrong\n")] {
        let mut io = TcpStream::connect(origin.addr).await.unwrap();
        io.write_all(format!("{command}\n").as_bytes()).await.unwrap();
        Pattern::write(5000, &mut io).await.unwrap();
        if wrong {
            io.write_all(b"\0\0\0\0").await.unwrap();
        }
        io.shutdown().await.unwrap();
        let mut answer = String::new();
        io.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, said);
    }
    let mut io = TcpStream::connect(origin.addr).await.unwrap();
    io.write_all(b"CLOSE\n").await.unwrap();
    let mut answer = String::new();
    io.read_to_string(&mut answer).await.unwrap();
    Pattern::write(10, &mut io).await.unwrap();
    io.shutdown().await.unwrap();
    assert_eq!((answer.as_str(), origin.reports.recv().await.as_deref()), ("bye\n", Some("exact 10\n")));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_http_origin_answers_and_upgrades() {
    let origin = Origin::http().await;
    let connect = async || TcpStream::connect(origin.addr).await.unwrap();
    let (status, _, body) = request(&mut connect().await, "GET /bytes/70000 HTTP/1.1\r\n", "a", b"").await;
    assert_eq!((status, Pattern::default().check(&body), body.len()), (200, Ok(()), 70_000));
    let (_, headers, body) = request(&mut connect().await, "GET /sse HTTP/1.1\r\n", "a", b"").await;
    assert!(headers.contains("text/event-stream") && body.ends_with(b"data: 2\n\n"), "{headers}");
    let (_, _, body) = request(&mut connect().await, "POST /sink HTTP/1.1\r\n", "a", b"no pattern").await;
    assert_eq!(body, b"byte 0 is wrong\n");
    let mut socket = WebSocket::connect(Box::new(connect().await), "a", "/ws").await;
    socket.write(1, b"echo").await;
    assert_eq!(socket.read().await, Some((1, b"echo".to_vec())));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tls_origin_is_reached_with_its_own_certificate_alone() {
    let origin = Origin::raw_tls("a.test").await;
    let pem = origin.certificate.clone().unwrap();
    let mut io = tls_connect(origin.addr, "a.test", trusting(pem.as_bytes(), &[])).await.unwrap();
    io.write_all(b"DOWN 10\n").await.unwrap();
    assert_eq!(Pattern::read(None, &mut io).await, Ok(10));
    let other = Origin::raw_tls("a.test").await.certificate.clone().unwrap();
    assert!(tls_connect(origin.addr, "a.test", trusting(other.as_bytes(), &[])).await.is_err());
}

#[tokio::test]
async fn a_program_is_waited_for_and_reaped() {
    let mut command = Command::new("sh");
    command.args(["-c", "echo one; echo two >&2; exec cat"]);
    let mut program = Program::start("sh", command);
    program.wait_for("one", 1, DEADLINE).await;
    program.wait_for("two", 1, DEADLINE).await;
    assert!(program.runs());
    program.signal("TERM");
    assert!(!program.ended(DEADLINE).await.success());
    let dir = tempfile::tempdir().unwrap();
    let (ca, user) = (Key::new(dir.path(), "ed25519"), Key::new(dir.path(), "ecdsa"));
    ca.certify(&user, "alice", &["-V", "+1h"]);
    assert!(user.line().starts_with("ecdsa-sha2-nistp256 "));
}
