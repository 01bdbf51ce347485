use super::client_hello::{ALPN, CLIENT_HELLO, HANDSHAKE, RECORD_MAX, SERVER_NAME};
use super::*;
use proptest::prelude::*;
use rustls::pki_types::ServerName;
use std::sync::Arc;
use tokio::io::AsyncWriteExt;

const MAX: usize = 64 << 10;

/// The first flight of a real client.
fn rustls_hello(name: &str, alpn: &[&str]) -> Vec<u8> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|p| p.as_bytes().to_vec()).collect();
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let mut client = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).unwrap();
    bytes
}

fn vec16(body: &[u8]) -> Vec<u8> {
    [&u16::try_from(body.len()).unwrap().to_be_bytes(), body].concat()
}

fn extension(kind: u16, body: &[u8]) -> Vec<u8> {
    [&kind.to_be_bytes()[..], &vec16(body)].concat()
}

fn sni(name: &[u8]) -> Vec<u8> {
    extension(SERVER_NAME, &vec16(&[&[0], &vec16(name)[..]].concat()))
}

/// A hand-made ClientHello message.
fn message(extensions: &[Vec<u8>]) -> Vec<u8> {
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    body.extend([0, 0, 2, 0x13, 0x01, 1, 0]);
    body.extend(vec16(&extensions.concat()));
    let len = u32::try_from(body.len()).unwrap().to_be_bytes();
    [&[CLIENT_HELLO], &len[1..], &body].concat()
}

/// The message in records of these sizes; the last size repeats.
fn records(message: &[u8], sizes: &[usize]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = message;
    for i in 0.. {
        let size = sizes[i.min(sizes.len() - 1)].min(rest.len());
        let (body, after) = rest.split_at(size);
        out.extend([&[HANDSHAKE, 3, 1][..], &vec16(body)].concat());
        rest = after;
        if rest.is_empty() {
            return out;
        }
    }
    out
}

fn client_hello_of(verdict: Verdict) -> ClientHello {
    match verdict {
        Verdict::Hello(Hello::Tls(hello)) => hello,
        other => panic!("{other:?}"),
    }
}

fn sni_of(extensions: &[Vec<u8>]) -> Sni {
    client_hello_of(read(&records(&message(extensions), &[RECORD_MAX]), MAX)).sni
}

#[test]
fn each_protocol_is_known_by_its_first_bytes() {
    for (bytes, hello) in [
        (&b"SSH-2.0-OpenSSH_9.9\r\n"[..], Hello::Ssh),
        (b"SSH-", Hello::Ssh),
        (b"GET ", Hello::Http1),
        (b"\r\nPOST / HTTP/1.1", Hello::Http1),
        (b"SEARCH /", Hello::Http1),
        (b"PRINT / HTTP/1.1", Hello::Http1),
        (b"M-SEARCH * HTTP/1.1", Hello::Http1),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0", Hello::Http2),
    ] {
        assert_eq!(read(bytes, MAX), Verdict::Hello(hello), "{}", bytes.escape_ascii());
    }
    for bytes in [&b""[..], b"S", b"SSH", b"PRI * HTTP/2.0\r\n", b"\r", b"\r\n", b"GET", b"\x16", b"\x16\x03\x01"] {
        let verdict = read(bytes, MAX);
        assert!(matches!(verdict, Verdict::More(n) if n > bytes.len()), "{verdict:?}");
    }
    for bytes in [&b"\0"[..], b" GET", b"\r\r", b"\x80\x2e\x01", b"PRI / HTTP/1.1", &[b'A'; 33], b"\x03\0\0\x13"] {
        assert_eq!(read(bytes, MAX), Verdict::Unknown(Unknown::Protocol), "{}", bytes.escape_ascii());
    }
}

#[test]
fn a_real_hello_tells_its_name_and_protocols() {
    let bytes = rustls_hello("web.example.com", &["h2", "http/1.1"]);
    assert!(bytes.len() > 1200, "carries a post-quantum key share");
    let hello = client_hello_of(read(&bytes, MAX));
    assert_eq!(hello.sni.name().unwrap().as_str(), "web.example.com");
    assert_eq!(hello.alpn.iter().collect::<Vec<_>>(), [&b"h2"[..], b"http/1.1"]);
    assert!(hello.alpn.offers(b"h2") && !hello.alpn.offers(b"h3"));
    // rustls sends no server_name for an address.
    let hello = client_hello_of(read(&rustls_hello("192.0.2.1", &[]), MAX));
    assert_eq!(hello, ClientHello { sni: Sni::Absent, alpn: Alpn::default() });
}

#[test]
fn a_hello_without_extensions_is_one() {
    // RFC 5246 §7.4.1.2: presence is told by bytes behind compression_methods.
    let mut body = message(&[]);
    body.truncate(body.len() - 2);
    body[3] -= 2;
    assert_eq!(client_hello_of(read(&records(&body, &[RECORD_MAX]), MAX)).sni, Sni::Absent);
}

#[test]
fn no_name_a_good_one_and_a_bad_one_are_told_apart() {
    assert_eq!(sni_of(&[]), Sni::Absent);
    assert_eq!(sni_of(&[sni(b"Web.Example.com")]), Sni::Name("web.example.com".parse().unwrap()));
    for bad in [&b"192.0.2.1"[..], b"192.0.2.1.", b"::1", b"a b", b"\xff", b"", b"a..b", &[b'a'; 254]] {
        assert_eq!(sni_of(&[sni(bad)]), Sni::Bad, "{}", bad.escape_ascii());
    }
    // A name of an unknown type beside it is skipped.
    let two = vec16(&[&[9][..], &vec16(b"?"), &[0], &vec16(b"a.test")].concat());
    assert_eq!(sni_of(&[extension(SERVER_NAME, &two)]), Sni::Name("a.test".parse().unwrap()));
}

#[test]
fn grease_and_ech_are_skipped() {
    // RFC 8701 §2, RFC 9849 §4 (encrypted_client_hello).
    let all = [extension(0x0a0a, &[]), extension(0xfe0d, &[0; 300]), sni(b"a.test"), extension(0xfafa, &[0])];
    assert_eq!(sni_of(&all), Sni::Name("a.test".parse().unwrap()));
}

#[test]
fn a_broken_hello_is_refused() {
    let good = message(&[sni(b"a.test")]);
    let mut wrong = Vec::new();
    for (what, at, byte) in
        [("message type", 0, 2), ("session length", 38, 33), ("odd suites", 40, 3), ("extensions", 45, 9)]
    {
        let mut bad = good.clone();
        bad[at] = byte;
        wrong.push((what, records(&bad, &[RECORD_MAX])));
    }
    wrong.push(("two names", records(&message(&[sni(b"a.test"), sni(b"b.test")]), &[RECORD_MAX])));
    wrong.push(("empty alpn", records(&message(&[extension(ALPN, &[0, 0])]), &[RECORD_MAX])));
    wrong.push(("empty alpn name", records(&message(&[extension(ALPN, &[0, 1, 0])]), &[RECORD_MAX])));
    wrong.push(("alpn past its end", records(&message(&[extension(ALPN, &[0, 3, 9, 9, 9])]), &[RECORD_MAX])));
    wrong.push(("empty server_name", records(&message(&[extension(SERVER_NAME, &[])]), &[RECORD_MAX])));
    wrong.push(("empty record", vec![HANDSHAKE, 3, 1, 0, 0]));
    wrong.push(("long record", vec![HANDSHAKE, 3, 1, 0x40, 1]));
    wrong.push(("version", vec![HANDSHAKE, 4]));
    let mut other = records(&good, &[10]);
    other[15] = 21;
    wrong.push(("alert inside", other));
    for (what, bytes) in wrong {
        let verdict = read(&bytes, MAX);
        assert!(matches!(verdict, Verdict::Unknown(Unknown::Tls(_))), "{what}: {verdict:?}");
    }
}

#[test]
fn the_limit_holds_for_the_message_and_for_its_records() {
    let large = message(&[extension(0x0a0a, &[0; 20_000]), sni(b"a.test")]);
    let bytes = records(&large, &[RECORD_MAX]);
    assert!(matches!(read(&bytes, bytes.len()), Verdict::Hello(Hello::Tls(_))));
    for here in [bytes.len() - 1, bytes.len()] {
        assert_eq!(read(&bytes[..here], bytes.len() - 1), Verdict::Unknown(Unknown::TooLarge), "{here}");
    }
    assert_eq!(read(&bytes[..9], 1 << 12), Verdict::Unknown(Unknown::TooLarge));
    let absurd = [HANDSHAKE, 3, 1, 0x40, 0, CLIENT_HELLO, 0xff, 0xff, 0xff];
    assert_eq!(read(&absurd, MAX), Verdict::Unknown(Unknown::TooLarge));
}

#[test]
fn one_byte_records_cost_few_calls() {
    let bytes = records(&message(&[extension(0x0a0a, &[0; 10_000]), sni(b"a.test")]), &[1]);
    let (mut here, mut calls) = (0, 0);
    let hello = loop {
        calls += 1;
        match read(&bytes[..here], MAX) {
            Verdict::More(needed) => here = needed,
            other => break client_hello_of(other),
        }
    };
    assert_eq!(hello.sni.name().unwrap().as_str(), "a.test");
    assert!(calls < 80, "{calls} calls");
}

#[tokio::test]
async fn peeked_bytes_come_back_whole() {
    let mut sent = rustls_hello("a.test", &["h2"]);
    sent.extend(b"what follows");
    let (mut near, mut far) = tokio::io::duplex(7);
    let writer = tokio::spawn({
        let sent = sent.clone();
        async move {
            for byte in sent {
                near.write_all(&[byte]).await.unwrap();
            }
            near
        }
    });
    let (hello, mut head) = peek(&mut far, &HelloSettings::default()).await.unwrap();
    assert!(matches!(hello, Hello::Tls(_)));
    let mut rest = vec![0; sent.len() - head.len()];
    far.read_exact(&mut rest).await.unwrap();
    assert_eq!([head.split_to(head.len()), rest.into()].concat(), sent);
    drop(writer);
}

#[tokio::test]
async fn a_visitor_that_says_nothing_whole_is_told_why() {
    let settings = HelloSettings { max: 5000, deadline: Duration::from_millis(100) };
    for (sent, close, error) in [
        (&b""[..], true, Error::VisitorGone),
        (b"\x16\x03", true, Error::VisitorGone),
        (b"\x16\x03", false, Error::HelloTimeout),
        (b"\0", false, Error::HelloUnknown),
        (b"\x16\x03\x01\x20\0\x01\0\x20\0", false, Error::HelloUnknown),
    ] {
        let (mut near, mut far) = tokio::io::duplex(64);
        near.write_all(sent).await.unwrap();
        let _near = (!close).then_some(near);
        assert_eq!(peek(&mut far, &settings).await.unwrap_err(), error, "{}", sent.escape_ascii());
    }
}

proptest! {
    #[test]
    fn any_split_gives_the_same_verdict(
        name in "[a-z]{1,10}(\\.[a-z]{1,10}){0,3}",
        alpn in proptest::collection::vec("[ -~]{1,20}", 0..4),
        pad in 0usize..5000,
        sizes in proptest::collection::vec(1usize..700, 1..5),
        cuts in proptest::collection::vec(1usize..400, 1..6),
    ) {
        let mut extensions = vec![extension(0x1a1a, &vec![0; pad]), sni(name.as_bytes())];
        if !alpn.is_empty() {
            let list: Vec<u8> = alpn.iter().flat_map(|p| [&[p.len() as u8], p.as_bytes()].concat()).collect();
            extensions.push(extension(ALPN, &vec16(&list)));
        }
        let message = message(&extensions);
        let bytes = records(&message, &sizes);
        let whole = client_hello_of(read(&bytes, MAX));
        prop_assert_eq!(whole.sni.name().unwrap().as_str(), name);
        prop_assert!(whole.alpn.iter().eq(alpn.iter().map(String::as_bytes)));
        let mut here = 0;
        for cut in cuts.iter().cycle() {
            here = (here + cut).min(bytes.len());
            match read(&bytes[..here], MAX) {
                Verdict::More(needed) => {
                    prop_assert!(here < bytes.len() && needed > here && needed <= bytes.len());
                }
                other => {
                    prop_assert_eq!(here, bytes.len());
                    prop_assert_eq!(client_hello_of(other), whole);
                    break;
                }
            }
        }
    }

    #[test]
    fn hostile_bytes_never_panic_and_always_move_on(mut bytes in proptest::collection::vec(any::<u8>(), 0..300), tls: bool) {
        if tls {
            bytes.splice(0..0, [HANDSHAKE, 3, 1, 1, 0, CLIENT_HELLO, 0]);
        }
        if let Verdict::More(needed) = read(&bytes, MAX) {
            prop_assert!(needed > bytes.len() && needed <= MAX);
        }
    }
}

#[test]
fn the_host_of_a_plain_request_is_seen_where_it_is_there_already() {
    for (head, expected) in [
        ("GET / HTTP/1.1\r\nHost: Web.Example.com\r\n\r\n", Some("web.example.com")),
        ("GET / HTTP/1.1\nA: b\nhOST:web.example.com:8080 \n", Some("web.example.com")),
        ("GET / HTTP/1.1\r\nX-Host: web.example.com\r\n\r\n", None),
        ("POST / HTTP/1.1\r\n\r\nHost: web.example.com\r\n", None),
        ("GET / HTTP/1.1\r\nHost: not a host\r\n\r\n", None),
        ("GET / HTTP/1.1\r\nHo", None),
        ("", None),
    ] {
        assert_eq!(host(head.as_bytes()).as_ref().map(HostName::as_str), expected, "{head:?}");
    }
    assert_eq!(host(b"GET / HTTP/1.1\r\nHost: \xff\r\n\r\n"), None);
}
