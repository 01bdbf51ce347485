//! What must hold for any bytes of a peer: the bodies of fuzz targets.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use super::cipher::{Front, Opener};
use super::connection::To;
use super::core::{Core, Handled};
use super::{Asked, Attempt, Config, HostKey, Owner, RequestId, Verdict, hostkey, msg};

/// Small figures, so that short inputs reach the limits.
pub(super) fn config() -> Arc<Config> {
    let pair = ssh_key::private::Ed25519Keypair::from_seed(&[1; 32]);
    Arc::new(Config {
        version: "SSH-2.0-adit_test",
        host_keys: HostKey::new(&pair.into()).into_iter().collect(),
        nist: true,
        sha1_rsa: false,
        login_deadline: Duration::from_secs(20),
        auth_attempts: 3,
        reject_delay: Duration::from_millis(100),
        keepalive: Duration::from_secs(10),
        keepalive_deadline: Duration::from_secs(15),
        rekey_bytes: 1 << 30,
        rekey_after: Duration::from_secs(3600),
        channels: 4096,
        window: 128 << 10,
        window_max: 1 << 20,
        session_buffer: 4 << 20,
        node_buffer: 64 << 20,
        outstanding: Arc::default(),
    })
}

/// Lets everybody in, and grants every second forward.
#[derive(Default)]
pub(super) struct Anybody {
    pub(super) forwards: Vec<RequestId>,
    pub(super) consoles: Vec<u32>,
}

impl Owner for Anybody {
    fn judge(&mut self, attempt: &Attempt<'_>) -> Verdict {
        if attempt.user == "nobody" { Verdict::Reject } else { Verdict::Accept }
    }
    fn methods(&self) -> &'static [&'static str] {
        &["publickey"]
    }
    fn logged_in(&mut self, _: &str) {}
    fn forward(&mut self, request: RequestId, _: Asked) {
        self.forwards.push(request);
    }
    fn cancel(&mut self, _: &Asked) -> bool {
        true
    }
    fn console(&mut self, channel: u32, _: bool) -> bool {
        self.consoles.push(channel);
        true
    }
    fn signal(&mut self, _: u32) {}
}

/// A connection before its login, byte by byte.
pub fn preauth(bytes: &[u8]) {
    let now = Instant::now();
    let mut core = Core::new(config(), now);
    let (mut owner, mut opener) = (Anybody::default(), Opener::plain());
    let mut rest = bytes.to_vec();
    match core.version(bytes) {
        Ok(Some(taken)) => drop(rest.drain(..taken)),
        _ => return,
    }
    loop {
        let seq = opener.seq();
        let Ok(Front::Packet { payload, len }) = opener.open(&mut rest) else { return };
        let payload = rest.get(payload).unwrap_or_default().to_vec();
        match core.packet(&payload, seq, &mut owner) {
            Ok(Handled::Done) => {}
            Ok(Handled::NewKeys) | Err(_) => return,
        }
        assert!(core.out.len() < 2 << 20);
        rest.drain(..len);
    }
}

/// A session after its login: packets of the peer, and what visitors do between.
pub fn session(bytes: &[u8]) {
    let now = Instant::now();
    let config = config();
    let outstanding = Arc::clone(&config.outstanding);
    let mut core = Core::in_the_clear(config, now);
    let (mut owner, mut seq, mut rest) = (Anybody::default(), 0, bytes);
    let mut cx = Context::from_waker(Waker::noop());
    while let Some((&[what, len], after)) = rest.split_first_chunk() {
        let (payload, after) = after.split_at(usize::from(len).min(after.len()));
        rest = after;
        let id = u32::from(payload.first().copied().unwrap_or_default());
        match what % 8 {
            0 => drop(core.open(To::Path("x"), None)),
            1 => drop(core.poll_write(id, &mut cx, payload)),
            2 => drop(core.poll_read(id, &mut cx, 1 << 20)),
            3 => core.leave(id),
            4 => core.shutdown(id),
            5 => {
                if let Some(request) = owner.forwards.pop() {
                    core.reply(request, (id % 2 == 0).then_some(None));
                }
            }
            _ => {
                seq += 1;
                if !matches!(core.packet(payload, seq, &mut owner), Ok(Handled::Done)) || core.ended.is_some() {
                    break;
                }
            }
        }
        assert!(core.channels.queued() <= outstanding.load(Ordering::Relaxed));
        if core.out.len() > 1 << 20 {
            core.out.clear();
            core.wake_writers();
        }
    }
    core.wake_all();
    for id in 0..=u32::from(u8::MAX) {
        core.leave(id);
    }
    drop(core);
    assert_eq!(outstanding.load(Ordering::Relaxed), 0);
}

/// Keys, certificates and signatures of anybody.
pub fn keys(bytes: &[u8]) {
    let (blob, signature) = bytes.split_at(bytes.len() / 2);
    for blob in [bytes, blob] {
        let _ = hostkey::certificate(blob);
        if let Some(key) = hostkey::public_key(blob) {
            for algorithm in hostkey::SignatureAlgorithm::ALL {
                assert!(!hostkey::verify(*algorithm, key.key_data(), b"never signed", signature));
            }
        }
    }
    let _ = msg::PONG;
}
