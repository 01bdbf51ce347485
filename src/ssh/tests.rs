//! A session against peers that break the rules, and visitors who share it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use super::connection::{OUT_BYTES, OpenError, To};
use super::core::{Core, Ended, Handled};
use super::fuzzing::{Anybody, config};
use super::wire::Put;
use super::{Fatal, msg};

struct Peer {
    core: Core,
    owner: Anybody,
    start: Instant,
}

impl Peer {
    fn new() -> Self {
        let start = Instant::now();
        Self { core: Core::in_the_clear(config(), start), owner: Anybody::default(), start }
    }

    fn says(&mut self, write: impl FnOnce(&mut Vec<u8>)) -> Result<Handled, Fatal> {
        let mut payload = Vec::new();
        write(&mut payload);
        self.core.packet(&payload, 9, &mut self.owner)
    }

    /// An open channel whose number at the peer is 1000 more than ours.
    fn channel(&mut self, room: u32) -> u32 {
        let id = self.core.open(To::Path("x"), None).unwrap();
        self.confirms(id, room).unwrap();
        id
    }

    fn confirms(&mut self, id: u32, room: u32) -> Result<Handled, Fatal> {
        self.says(|out| {
            out.put_u8(msg::CHANNEL_OPEN_CONFIRMATION);
            [id, id + 1000, room, 32 << 10].iter().for_each(|n| out.put_u32(*n));
        })
    }

    fn sends(&mut self, id: u32, data: &[u8]) -> Result<Handled, Fatal> {
        self.says(|out| {
            out.put_u8(msg::CHANNEL_DATA);
            out.put_u32(id);
            out.put_string(data);
        })
    }

    fn about(&mut self, number: u8, id: u32) -> Result<Handled, Fatal> {
        self.says(|out| {
            out.put_u8(number);
            out.put_u32(id);
        })
    }

    fn writes(&mut self, id: u32, data: &[u8]) -> Poll<Result<usize, OpenError>> {
        self.core.poll_write(id, &mut Context::from_waker(Waker::noop()), data)
    }

    fn reads(&mut self, id: u32) -> Poll<Result<bytes::Bytes, OpenError>> {
        self.core.poll_read(id, &mut Context::from_waker(Waker::noop()), 1 << 20)
    }
}

#[test]
fn who_breaks_the_rules_ends_its_session_alone() {
    type Breaks = fn(&mut Peer, u32) -> Result<Handled, Fatal>;
    let ways: &[(&str, Fatal, Breaks)] = &[
        ("more than the window", Fatal::WINDOW, |p, id| {
            (0..5).try_fold(Handled::Done, |_, _| p.sends(id, &[0; 32 << 10]))
        }),
        ("data for nobody", Fatal::CHANNEL, |p, _| p.sends(u32::MAX, b"x")),
        ("data after its end", Fatal::PROTOCOL, |p, id| p.about(msg::CHANNEL_EOF, id).and_then(|_| p.sends(id, b"x"))),
        ("data after its close", Fatal::CHANNEL, |p, id| {
            p.about(msg::CHANNEL_CLOSE, id).and_then(|_| p.sends(id, b"x"))
        }),
        ("a second confirmation", Fatal::PROTOCOL, |p, id| p.confirms(id, 1)),
        ("a window of more than 4 GiB", Fatal::WINDOW, |p, id| {
            let adjust = |out: &mut Vec<u8>| {
                out.put_u8(msg::CHANNEL_WINDOW_ADJUST);
                out.put_u32(id);
                out.put_u32(u32::MAX);
            };
            p.says(adjust).and_then(|_| p.says(adjust))
        }),
        ("requests without end", Fatal::FLOOD, |p, _| {
            (0..10_000).try_fold(Handled::Done, |_, _| {
                p.says(|out| {
                    out.put_u8(msg::GLOBAL_REQUEST);
                    out.put_string(b"tcpip-forward");
                    out.put_bool(true);
                    out.put_string(b"web");
                    out.put_u32(80);
                })
            })
        }),
        ("a cut message", Fatal::MALFORMED, |p, _| p.says(|out| out.put_bytes(&[msg::CHANNEL_DATA, 0, 0]))),
        ("an empty message", Fatal::MALFORMED, |p, _| p.says(|_| ())),
        ("a key exchange out of place", Fatal::PROTOCOL, |p, _| p.says(|out| out.put_u8(msg::NEWKEYS))),
    ];
    for (what, fatal, breaks) in ways {
        let mut peer = Peer::new();
        let outstanding = Arc::clone(&peer.core.config.outstanding);
        let id = peer.channel(1 << 20);
        assert_eq!(breaks(&mut peer, id), Err(*fatal), "{what}");
        peer.core.fail(*fatal);
        peer.core.wake_all();
        assert_eq!(peer.core.ended, Some(Ended::Fault(*fatal)));
        while let Poll::Ready(Ok(bytes)) = peer.reads(id)
            && !bytes.is_empty()
        {}
        drop(peer);
        assert_eq!(outstanding.load(Ordering::Relaxed), 0, "{what}");
    }
}

#[test]
fn a_lost_session_is_no_end_of_an_answer() {
    let mut peer = Peer::new();
    let (whole, cut) = (peer.channel(1 << 20), peer.channel(1 << 20));
    peer.sends(whole, b"answer").unwrap();
    peer.about(msg::CHANNEL_EOF, whole).unwrap();
    peer.sends(cut, b"ans").unwrap();
    peer.core.wake_all();
    assert_eq!(peer.reads(whole), Poll::Ready(Ok("answer".into())));
    assert_eq!(peer.reads(whole), Poll::Ready(Ok("".into())));
    assert_eq!(peer.reads(cut), Poll::Ready(Ok("ans".into())));
    assert_eq!(peer.reads(cut), Poll::Ready(Err(OpenError::Lost)));
}

#[test]
fn a_window_is_granted_when_bytes_are_read_and_not_before() {
    let mut peer = Peer::new();
    let (stuck, read) = (peer.channel(1 << 20), peer.channel(1 << 20));
    for _ in 0..4 {
        peer.sends(stuck, &[0; 32 << 10]).unwrap();
    }
    // 128 KiB are all that the one may send; the other goes on for ever.
    for _ in 0..100 {
        peer.sends(read, &[0; 32 << 10]).unwrap();
        assert!(matches!(peer.reads(read), Poll::Ready(Ok(b)) if !b.is_empty()));
    }
    assert_eq!(peer.sends(stuck, b"x"), Err(Fatal::WINDOW));
}

#[test]
fn a_fast_reader_gets_a_larger_window() {
    let mut peer = Peer::new();
    let id = peer.channel(1 << 20);
    let mut sent = 0;
    for ms in 0..200 {
        peer.core.heard(peer.start + Duration::from_millis(ms * 25));
        // As much as the window lets be sent at once.
        sent = 0;
        while peer.sends(id, &[0; 8 << 10]).is_ok() {
            sent += 8 << 10;
        }
        while matches!(peer.reads(id), Poll::Ready(Ok(b)) if !b.is_empty()) {}
    }
    assert!((900 << 10..=1 << 20).contains(&sent), "{sent}");
}

struct Count(AtomicUsize);

impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn uploads_take_turns_and_a_keystroke_passes_them() {
    let mut peer = Peer::new();
    let bulk: Vec<(u32, Arc<Count>)> = (0..8).map(|_| (peer.channel(1 << 30), Arc::new(Count(0.into())))).collect();
    let key = peer.channel(1 << 20);
    let mut taken = [0; 8];
    for _ in 0..800 {
        for ((id, woken), taken) in bulk.iter().zip(&mut taken) {
            let waker = Waker::from(Arc::clone(woken));
            while let Poll::Ready(done) = peer.core.poll_write(*id, &mut Context::from_waker(&waker), &[0; 32 << 10]) {
                *taken += done.unwrap();
            }
        }
        assert!(peer.core.out.len() < OUT_BYTES * 2);
        assert_eq!(peer.writes(key, b"k"), Poll::Ready(Ok(1)), "a keystroke waits");
        peer.core.out.clear();
        peer.core.wake_writers();
    }
    let (least, most) = (taken.iter().min().unwrap(), taken.iter().max().unwrap());
    // The first finds an empty output, once.
    assert!(most - least <= OUT_BYTES + (64 << 10), "{taken:?}");
}

#[test]
fn a_turn_that_is_not_used_is_passed_on() {
    let mut peer = Peer::new();
    // Each of these has room for one packet and no more.
    let spent: Vec<u32> = (0..8).map(|_| peer.channel(32 << 10)).collect();
    let other = peer.channel(1 << 30);
    while peer.writes(other, &[0; 32 << 10]).is_ready() {}
    spent.iter().for_each(|id| assert!(peer.writes(*id, &[0; 40 << 10]).is_pending()));
    let mut moved = 0;
    for _ in 0..20 {
        peer.core.out.clear();
        peer.core.wake_writers();
        for id in &spent {
            while peer.writes(*id, &[0; 40 << 10]).is_ready() {}
        }
        moved += usize::from(peer.writes(other, &[0; 32 << 10]).is_ready());
    }
    assert!(moved >= 15, "{moved}");
}

#[test]
fn a_visitor_who_leaves_gives_all_back_even_where_the_peer_never_closes() {
    let mut peer = Peer::new();
    let outstanding = Arc::clone(&peer.core.config.outstanding);
    let count = Arc::new(AtomicUsize::new(0));
    let permit = crate::limits::Permit::take(&count, 1).unwrap();
    let id = peer.core.open(To::Path("x"), Some(permit)).unwrap();
    peer.confirms(id, 1 << 20).unwrap();
    peer.sends(id, &[0; 1000]).unwrap();
    peer.core.leave(id);
    assert_eq!(count.load(Ordering::Relaxed), 0);
    peer.sends(id, &[0; 1000]).unwrap();
    peer.about(msg::CHANNEL_CLOSE, id).unwrap();
    assert_eq!(outstanding.load(Ordering::Relaxed), 0);
    assert_eq!(peer.core.open(To::Path("x"), None), Ok(id), "its number is free again");
}

#[test]
fn a_peer_that_does_not_answer_is_dead_and_one_that_says_anything_is_not() {
    let mut peer = Peer::new();
    let at = |s| peer.start + Duration::from_secs(s);
    peer.core.timeout(at(0)).unwrap();
    peer.core.heard(at(14));
    assert_eq!(peer.core.timeout(at(28)), Ok(()));
    assert_eq!(peer.core.timeout(at(29)), Err(Fatal::SILENT));
}

#[test]
fn what_a_peer_asks_and_does_not_read_is_bounded() {
    let mut peer = Peer::new();
    let mut asked = 0;
    while !peer.core.paused() {
        peer.says(|out| {
            out.put_u8(msg::PING);
            out.put_string(&[0; 1000]);
        })
        .unwrap();
        asked += 1;
    }
    assert!(peer.core.out.len() < 2 << 20 && asked < 2000);
}

#[test]
fn failed_logins_are_answered_late_and_are_few() {
    let start = Instant::now();
    let mut core = Core::in_the_clear(config(), start);
    core.login = super::auth::Login::default();
    let mut peer = Peer { core, owner: Anybody::default(), start };
    peer.says(|out| {
        out.put_u8(msg::SERVICE_REQUEST);
        out.put_string(b"ssh-userauth");
    })
    .unwrap();
    for n in 1.. {
        let tried = peer.says(|out| {
            out.put_u8(msg::USERAUTH_REQUEST);
            ["nobody", "ssh-connection", "password"].iter().for_each(|s| out.put_string(s.as_bytes()));
        });
        if tried == Err(Fatal::AUTH_ATTEMPTS) {
            assert_eq!(n, 4);
            break;
        }
        assert!(tried.is_ok() && peer.core.paused(), "{n}: {tried:?}");
        let by = peer.core.deadline().unwrap();
        peer.core.timeout(by).unwrap();
        assert!(!peer.core.paused());
    }
    let mut late = Core::new(config(), start);
    assert_eq!(late.timeout(start + Duration::from_secs(20)), Err(Fatal::LOGIN_DEADLINE));
}

#[test]
fn nobody_has_keys_exchanged_twice_before_the_login() {
    let start = Instant::now();
    let mut core = Core::in_the_clear(config(), start);
    core.login = super::auth::Login::default();
    let mut peer = Peer { core, owner: Anybody::default(), start };
    assert_eq!(peer.says(|out| out.put_u8(msg::KEXINIT)), Err(Fatal::PROTOCOL));
    // Who has logged in is heard: this one is only cut short.
    assert_eq!(Peer::new().says(|out| out.put_u8(msg::KEXINIT)), Err(Fatal::MALFORMED));
}
