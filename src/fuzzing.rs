//! What must hold for any bytes: the bodies of the fuzz targets (`fuzz/`),
//! replayed over their seeds by the tests here. Each returns quietly or panics.

use serde_json::{Map, Value};

use crate::fields::{self, Field, Fields};
use crate::http::framing::Framing;
use crate::ingress::hello::{Hello, HelloSettings, Verdict, read};
use crate::model::{
    Certificate, CertificateId, HostName, Socket, SocketId, TicketKeys, TicketKeysId, Tunnel, TunnelId, authority_host,
};
use crate::relay::RelaySettings;
use crate::tcp::TcpSettings;
use crate::tunnel::keys;
use crate::tunnel::naming::{self, Wanted};

/// A verdict over the first bytes is final, and waiting for what `More` asks
/// for misses nothing.
pub fn hello(bytes: &[u8]) {
    let max = 4 << 10;
    let whole = read(bytes, max);
    let (mut here, mut calls) = (0, 0);
    let fed = loop {
        calls += 1;
        match read(bytes.get(..here).unwrap_or(bytes), max) {
            Verdict::More(needed) if here < bytes.len() => {
                assert!(needed > here && needed <= max, "{needed} after {here}");
                here = needed.min(bytes.len());
            }
            verdict => break verdict,
        }
    };
    // The rule that is broken may be another one: more of them are in sight.
    match (&fed, &whole) {
        (Verdict::Unknown(_), Verdict::Unknown(_)) => {}
        _ => assert_eq!(fed, whole),
    }
    assert!(calls <= 100, "{calls} calls");
    if let Verdict::Hello(Hello::Tls(hello)) = fed {
        assert!(hello.alpn.iter().all(|name| !name.is_empty() && hello.alpn.offers(name)));
    }
}

/// A record that is taken comes back as it was.
pub fn records(bytes: &[u8]) {
    let Ok(record) = serde_json::from_slice::<Map<String, Value>>(bytes) else { return };
    macro_rules! round_trip {
        ($record:ty, $id:ty, $text:literal) => {
            let id: Option<$id> = $text.parse().ok();
            if let Some(id) = id
                && let Ok(first) = <$record>::from_record(&id, record.clone())
            {
                assert_eq!(<$record>::from_record(&id, first.to_record()).as_ref(), Ok(&first));
            }
        };
    }
    round_trip!(Socket, SocketId, "a");
    round_trip!(Tunnel, TunnelId, "a");
    round_trip!(Certificate, CertificateId, "a");
    round_trip!(TicketKeys, TicketKeysId, "default");
}

/// The host of an authority is one itself, in its normal form.
pub fn authority(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(host) = authority_host(text) else { return };
    if host.contains(':') {
        assert_eq!(authority_host(&format!("[{host}]:1")).as_deref(), Ok(&*host));
    } else {
        assert!(!host.bytes().any(|b| b.is_ascii_uppercase() || b <= b' ' || b == b'/' || b == b'@'), "{host}");
        assert_eq!(authority_host(&host).as_deref(), Ok(&*host));
        assert_eq!(authority_host(&format!("{host}.:65535")).as_deref(), Ok(&*host));
    }
}

/// Settings are read or refused with their mistakes.
pub fn settings(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        let value = Value::String(text.to_owned());
        let _ = std::time::Duration::from_value(&value);
        let _ = fields::Bytes::from_value(&value);
    }
    let Ok(table) = serde_json::from_slice::<Map<String, Value>>(bytes) else { return };
    let mut f = Fields::new(table);
    HelloSettings::read(&mut f.section("hello"));
    TcpSettings::read(&mut f.section("tcp"));
    RelaySettings::read(&mut f.section("relay"));
    let told = f.mistakes();
    assert!(told.iter().all(|mistake| !mistake.fix.is_empty()), "{told:?}");
    f.refuse_rest();
}

/// An HTTP/1 message is framed alike however its bytes are split.
pub fn framing(bytes: &[u8]) {
    let whole = Framing::default().read(bytes);
    let mut pieces = Framing::default();
    let mut before = 0;
    let mut split = Ok(());
    for piece in bytes.chunks(3) {
        if let Err(at) = pieces.read(piece) {
            split = Err(before + at);
            break;
        }
        before += piece.len();
    }
    assert_eq!(split, whole);
}

/// A forward is a name, a port or refused; a name is a host name, and no
/// address to listen on is one.
pub fn naming(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let (address, port) = text.split_once('\n').unwrap_or((text, "80"));
    let port = port.parse().unwrap_or(0);
    for wanted in [naming::of_tcpip(address, port), naming::of_streamlocal(address)] {
        match wanted {
            Ok(Wanted::Named { name, .. }) => {
                assert!(name.parse::<HostName>().is_ok_and(|n| n.as_str() == name), "{name}");
            }
            Ok(_) => {}
            Err(why) => assert!(!why.is_empty() && !why.contains('\u{1b}'), "{why:?}"),
        }
    }
    let _ = keys::source_matches(address, std::net::IpAddr::from([192, 0, 2, 1]));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_seed_passes() {
        for (name, target) in [
            ("hello", hello as fn(&[u8])),
            ("records", records),
            ("authority", authority),
            ("settings", settings),
            ("framing", framing),
            ("naming", naming),
            ("ssh_preauth", crate::ssh::fuzzing::preauth),
            ("ssh_session", crate::ssh::fuzzing::session),
            ("ssh_keys", crate::ssh::fuzzing::keys),
            ("fleet_wire", crate::fleet::fuzz_wire),
        ] {
            let seeds = std::fs::read_dir(format!("{}/fuzz/corpus/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap();
            let replayed = seeds.map(|seed| target(&std::fs::read(seed.unwrap().path()).unwrap())).count();
            assert!(replayed >= 4, "{name}");
        }
    }
}
