//! TCP as visitors, origins and peers meet it: the options of every OS socket,
//! listeners, dials, and the accept loop that outlives a full file table. What
//! is spoken on the connections is elsewhere.

use std::io;
use std::net::SocketAddr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::io::Errno;
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::fields::Fields;

/// The options of every TCP socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TcpSettings {
    /// Connections that may wait to be accepted, per listener. 4096: a burst of
    /// a second at 4000 connections per second; the kernel cuts it to
    /// `net.core.somaxconn`, which has the same default.
    pub backlog: u32,
    /// Send small writes at once (`TCP_NODELAY`). On: we relay what others have
    /// batched already, and waiting for more costs up to 40 ms a message.
    pub nodelay: bool,
    /// Quiet time before the kernel asks whether the far end is still there.
    /// 30 s: below the idle limit of common NATs and load balancers (60 s and up).
    pub keepalive_time: Duration,
    /// Time between such questions once one stays unanswered. 10 s.
    pub keepalive_interval: Duration,
    /// Unanswered questions after which the connection is lost. 3, so that a
    /// dead far end is noticed a minute after its last sign of life; where
    /// `user_timeout` is set it decides instead (tcp(7)).
    pub keepalive_retries: u32,
    /// How long sent bytes may stay unacknowledged, or the far end may keep its
    /// receive window shut, before the connection is lost; `0s` leaves it to
    /// the kernel (about 15 minutes). 2 min: a path comes back within that or
    /// not at all. Not shorter, for it also ends visitors that stop reading so
    /// long, and a paused terminal or download is no fault.
    pub user_timeout: Duration,
    /// The congestion control; `""` leaves the system's own. `"bbr"`: it keeps
    /// its pace on paths that lose packets, where cubic falls to a fraction.
    /// Never set where the far end is on loopback: there BBR's pacing costs two
    /// to three times the CPU for nothing.
    pub congestion: String,
}

impl Default for TcpSettings {
    fn default() -> Self {
        Self {
            backlog: 4096,
            nodelay: true,
            keepalive_time: Duration::from_secs(30),
            keepalive_interval: Duration::from_secs(10),
            keepalive_retries: 3,
            user_timeout: Duration::from_secs(120),
            congestion: "bbr".into(),
        }
    }
}

impl TcpSettings {
    /// Reads the settings' table.
    pub fn read(f: &mut Fields) -> Self {
        let d = Self::default();
        let settings = Self {
            backlog: f.take("backlog", d.backlog),
            nodelay: f.take("nodelay", d.nodelay),
            keepalive_time: f.take("keepalive_time", d.keepalive_time),
            keepalive_interval: f.take("keepalive_interval", d.keepalive_interval),
            keepalive_retries: f.take("keepalive_retries", d.keepalive_retries),
            user_timeout: f.take("user_timeout", d.user_timeout),
            congestion: f.take("congestion", d.congestion),
        };
        // tcp(7): whole seconds up to 32767, and at most 127 probes.
        for (key, value) in
            [("keepalive_time", settings.keepalive_time), ("keepalive_interval", settings.keepalive_interval)]
        {
            if value.subsec_nanos() != 0 || !(1..=32_767).contains(&value.as_secs()) {
                f.mistake(key, "is not whole seconds from 1 to 32767".into(), "write a duration like \"30s\"".into());
            }
        }
        if !(1..=127).contains(&settings.keepalive_retries) {
            f.mistake("keepalive_retries", "is out of range".into(), "write a whole number from 1 to 127".into());
        }
        if !(1..=65_535).contains(&settings.backlog) {
            f.mistake("backlog", "is out of range".into(), "write a whole number from 1 to 65535".into());
        }
        if settings.user_timeout.as_millis() > u128::from(u32::MAX / 2) {
            f.mistake("user_timeout", "is longer than the kernel takes".into(), "write at most \"24d\"".into());
        }
        // linux/tcp.h: TCP_CA_NAME_MAX is 16 with its NUL.
        if settings.congestion.len() > 15 || !settings.congestion.bytes().all(|b| b.is_ascii_graphic()) {
            f.mistake("congestion", "is not a congestion control".into(), "write a name like \"bbr\", or \"\"".into());
        }
        settings
    }

    fn keepalive(&self) -> TcpKeepalive {
        TcpKeepalive::new()
            .with_time(self.keepalive_time)
            .with_interval(self.keepalive_interval)
            .with_retries(self.keepalive_retries)
    }

    /// Sets what a listener hands on to the sockets that it accepts (Linux
    /// clones them from it), and what a dialling socket needs itself.
    fn apply(&self, socket: &SockRef<'_>) -> io::Result<()> {
        socket.set_tcp_nodelay(self.nodelay)?;
        socket.set_tcp_keepalive(&self.keepalive())?;
        socket.set_tcp_user_timeout(Some(self.user_timeout).filter(|t| !t.is_zero()))
    }
}

/// Opens a listener on `addr`. An IPv6 wildcard takes IPv4 visitors too unless
/// `only_v6` says otherwise: see [`only_v6`].
///
/// # Errors
/// What the kernel says: address in use, no such address, no permission.
pub fn bind(addr: SocketAddr, only_v6: bool, settings: &TcpSettings) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    // A restart must not wait for the old connections' TIME_WAIT.
    socket.set_reuse_address(true)?;
    if addr.is_ipv6() {
        socket.set_only_v6(only_v6)?;
    }
    settings.apply(&SockRef::from(&socket))?;
    if !addr.ip().to_canonical().is_loopback() {
        set_congestion(&SockRef::from(&socket), &settings.congestion);
    }
    socket.bind(&addr.into())?;
    socket.listen(i32::try_from(settings.backlog).unwrap_or(i32::MAX))?;
    TcpListener::from_std(socket.into())
}

/// Whether the listener on `addr` must leave IPv4 alone, because another of
/// `all` is there for it: `0.0.0.0:443` beside `[::]:443` would clash.
pub fn only_v6(addr: SocketAddr, all: &[SocketAddr]) -> bool {
    let unspecified = addr.is_ipv6() && addr.ip().is_unspecified();
    unspecified && all.iter().any(|other| other.is_ipv4() && other.port() == addr.port())
}

/// Whether binding failed because this machine has no such address family (no
/// IPv6), not because of anything that somebody could mend in the settings.
pub fn lacks_family(error: &io::Error) -> bool {
    let none = [Errno::AFNOSUPPORT, Errno::ADDRNOTAVAIL];
    none.iter().any(|e| error.raw_os_error() == Some(e.raw_os_error()))
}

/// Sets what a connection does not inherit from the listener that accepted it:
/// a visitor on loopback gets the system's own congestion control back.
pub fn prepare_accepted(stream: &TcpStream, settings: &TcpSettings) {
    let system = system_congestion();
    if settings.congestion.is_empty() || system.is_empty() || settings.congestion == system {
        return;
    }
    if stream.peer_addr().is_ok_and(|peer| peer.ip().to_canonical().is_loopback()) {
        set_congestion(&SockRef::from(stream), system);
    }
}

/// Connects to `addr`.
///
/// # Errors
/// What the kernel says; `TimedOut` at the deadline.
///
/// # Cancel safety
/// Dropping it gives the connection up.
pub async fn dial(addr: SocketAddr, settings: &TcpSettings, deadline: Instant) -> io::Result<TcpStream> {
    let socket = if addr.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    settings.apply(&SockRef::from(&socket))?;
    if !addr.ip().to_canonical().is_loopback() {
        set_congestion(&SockRef::from(&socket), &settings.congestion);
    }
    let late = |_| io::Error::new(io::ErrorKind::TimedOut, "no connection before the deadline");
    tokio::time::timeout_at(deadline, socket.connect(addr)).await.map_err(late)?
}

/// Hands every connection to `on_accept`, which must not block, until `cancel`.
/// A failing accept never ends it: what is wrong with one connection is passed
/// over, and where the process or the system is out of descriptors or memory
/// it waits a little longer each time. The listener is closed at the end.
pub async fn accept_loop(
    listener: TcpListener,
    cancel: CancellationToken,
    mut on_accept: impl FnMut(TcpStream, SocketAddr),
) {
    let mut burst = Burst::default();
    loop {
        let accepted = tokio::select! {
            biased;
            () = cancel.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, addr)) => {
                burst.recovered();
                on_accept(stream, addr);
            }
            Err(error) => {
                ::metrics::counter!("adit_accept_failures_total").increment(1);
                let Some(pause) = burst.failed(&error, Instant::now()) else { continue };
                tokio::select! {
                    () = cancel.cancelled() => return,
                    () = tokio::time::sleep(pause) => {}
                }
            }
        }
    }
}

/// Failed accepts in a row, and when they were last told.
#[derive(Debug, Default)]
struct Burst {
    pause: Duration,
    told: Option<Instant>,
    failures: u64,
}

impl Burst {
    const FIRST_PAUSE: Duration = Duration::from_millis(10);
    /// Longer would make visitors wait after descriptors are free again.
    const LONGEST_PAUSE: Duration = Duration::from_secs(1);
    /// Where single accepts succeed in between it is still the same shortage.
    const TELL_EVERY: Duration = Duration::from_secs(10);

    /// How long to wait before the next accept, if at all.
    fn failed(&mut self, error: &io::Error, now: Instant) -> Option<Duration> {
        let short = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
        if !short.iter().any(|e| error.raw_os_error() == Some(e.raw_os_error())) {
            // accept(2): network errors of the new connection are reported here.
            tracing::debug!(%error, "a connection broke before it was accepted");
            return None;
        }
        self.failures += 1;
        if self.told.is_none_or(|told| now.duration_since(told) >= Self::TELL_EVERY) {
            tracing::error!(%error, failures = self.failures, "cannot accept connections; visitors wait");
            self.told = Some(now);
            self.failures = 0;
        }
        self.pause = (self.pause * 2).clamp(Self::FIRST_PAUSE, Self::LONGEST_PAUSE);
        Some(self.pause)
    }

    fn recovered(&mut self) {
        self.pause = Duration::ZERO;
    }
}

/// Sets the congestion control; where the kernel refuses, the system's own
/// stays, and the log says so once.
fn set_congestion(socket: &SockRef<'_>, wanted: &str) {
    static TOLD: AtomicBool = AtomicBool::new(false);
    if wanted.is_empty() {
        return;
    }
    if let Err(error) = socket.set_tcp_congestion(wanted.as_bytes())
        && !TOLD.swap(true, Ordering::Relaxed)
    {
        tracing::warn!(
            %error, wanted, system = system_congestion(),
            "the kernel refuses this congestion control; load its module (tcp_{wanted}) and allow it \
             (net.ipv4.tcp_allowed_congestion_control)",
        );
    }
}

/// The system's own congestion control, as it was when first asked; empty
/// where it cannot be read.
fn system_congestion() -> &'static str {
    static SYSTEM: OnceLock<String> = OnceLock::new();
    SYSTEM.get_or_init(|| {
        let text = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control");
        text.map(|t| t.trim().to_owned()).unwrap_or_default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn congestion_of(socket: SockRef<'_>) -> String {
        let name = socket.tcp_congestion().unwrap();
        String::from_utf8(name.into_iter().take_while(|b| *b != 0).collect()).unwrap()
    }

    /// One that this kernel has and that is not its default.
    fn another_congestion() -> String {
        let known = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_available_congestion_control").unwrap();
        known.split_whitespace().find(|name| *name != system_congestion()).unwrap().to_owned()
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    #[tokio::test]
    async fn an_accepted_socket_has_its_listeners_options() {
        let settings = TcpSettings { keepalive_retries: 7, ..TcpSettings::default() };
        let listener = bind("127.0.0.1:0".parse().unwrap(), false, &settings).unwrap();
        let near = dial(listener.local_addr().unwrap(), &settings, soon()).await.unwrap();
        let (far, _) = listener.accept().await.unwrap();
        for stream in [&near, &far] {
            let socket = SockRef::from(stream);
            assert!(socket.tcp_nodelay().unwrap() && socket.keepalive().unwrap());
            assert_eq!(socket.tcp_keepalive_time().unwrap(), settings.keepalive_time);
            assert_eq!(socket.tcp_keepalive_interval().unwrap(), settings.keepalive_interval);
            assert_eq!(socket.tcp_keepalive_retries().unwrap(), 7);
            assert_eq!(socket.tcp_user_timeout().unwrap(), Some(settings.user_timeout));
        }
    }

    #[tokio::test]
    async fn loopback_keeps_the_systems_congestion_control() {
        let settings = TcpSettings { congestion: another_congestion(), ..TcpSettings::default() };
        let local = bind("127.0.0.1:0".parse().unwrap(), false, &settings).unwrap();
        assert_eq!(congestion_of(SockRef::from(&local)), system_congestion());

        let public = bind("[::]:0".parse().unwrap(), false, &settings).unwrap();
        assert_eq!(congestion_of(SockRef::from(&public)), settings.congestion);
        let port = public.local_addr().unwrap().port();
        let near = dial(SocketAddr::from(([127, 0, 0, 1], port)), &settings, soon()).await.unwrap();
        assert_eq!(congestion_of(SockRef::from(&near)), system_congestion());
        let (far, _) = public.accept().await.unwrap();
        assert_eq!(congestion_of(SockRef::from(&far)), settings.congestion, "inherited");
        prepare_accepted(&far, &settings);
        assert_eq!(congestion_of(SockRef::from(&far)), system_congestion());
    }

    #[tokio::test]
    async fn a_congestion_control_that_the_kernel_lacks_is_no_failure() {
        let settings = TcpSettings { congestion: "no-such".into(), ..TcpSettings::default() };
        let listener = bind("0.0.0.0:0".parse().unwrap(), false, &settings).unwrap();
        assert_eq!(congestion_of(SockRef::from(&listener)), system_congestion());
    }

    #[tokio::test]
    async fn both_wildcards_fit_on_one_port_and_one_takes_both_families() {
        let settings = TcpSettings::default();
        let v4 = bind("0.0.0.0:0".parse().unwrap(), false, &settings).unwrap().local_addr().unwrap();
        let v6 = SocketAddr::new("::".parse().unwrap(), v4.port());
        let all = [v4, v6];
        let _both: Vec<_> = all.iter().map(|a| bind(*a, only_v6(*a, &all), &settings).unwrap()).collect();
        assert!(only_v6(v6, &all) && !only_v6(v6, &[v6]) && !only_v6(v4, &all));

        let dual = bind("[::]:0".parse().unwrap(), false, &settings).unwrap();
        let port = dual.local_addr().unwrap().port();
        dial(SocketAddr::from(([127, 0, 0, 1], port)), &settings, soon()).await.unwrap();
        let (_, addr) = dual.accept().await.unwrap();
        assert!(addr.ip().to_canonical().is_ipv4());
    }

    #[tokio::test]
    async fn a_dial_ends_at_its_deadline() {
        // A listener with a full backlog answers nothing.
        let full = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        full.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        full.listen(0).unwrap();
        let addr = full.local_addr().unwrap().as_socket().unwrap();
        let _first = dial(addr, &TcpSettings::default(), soon()).await.unwrap();
        let deadline = Instant::now() + Duration::from_millis(50);
        let error = dial(addr, &TcpSettings::default(), deadline).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn a_shortage_is_waited_out_and_a_broken_connection_passed_over() {
        let now = Instant::now();
        let mut burst = Burst::default();
        let short = io::Error::from_raw_os_error(Errno::MFILE.raw_os_error());
        let broken = io::Error::from_raw_os_error(Errno::CONNABORTED.raw_os_error());
        assert_eq!(burst.failed(&broken, now), None);
        let pauses: Vec<u128> = (0..9).map(|_| burst.failed(&short, now).unwrap().as_millis()).collect();
        assert_eq!(pauses, [10, 20, 40, 80, 160, 320, 640, 1000, 1000]);
        assert_eq!(burst.failures, 8, "told once");
        burst.recovered();
        assert_eq!(burst.failed(&short, now).unwrap(), Burst::FIRST_PAUSE);
        assert_eq!(burst.failures, 9, "the same burst");
        burst.failed(&short, now + Burst::TELL_EVERY);
        assert_eq!(burst.failures, 0, "told again");
    }

    /// Set where `out_of_descriptors` runs under the limit.
    const IN_CHILD: &str = "ADIT_TEST_FULL_FILE_TABLE";

    /// In a process of its own, for the limit is the process's.
    #[test]
    fn the_accept_loop_outlives_a_full_file_table() {
        let child = std::process::Command::new("sh")
            .args(["-c", r#"ulimit -n 40 && exec "$0" --exact "$1""#])
            .arg(std::env::current_exe().unwrap())
            .arg(format!("{}::out_of_descriptors", module_path!().split_once("::").unwrap().1))
            .env(IN_CHILD, "1")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&child.stdout);
        assert!(child.status.success() && said.contains("1 passed"), "{said}");
    }

    /// The child of the test above; by itself there is nothing to run.
    #[tokio::test]
    async fn out_of_descriptors() {
        if std::env::var_os(IN_CHILD).is_none() {
            return;
        }
        let listener = bind("127.0.0.1:0".parse().unwrap(), false, &TcpSettings::default()).unwrap();
        let addr = listener.local_addr().unwrap();
        let cancel = CancellationToken::new();
        let (told, mut accepted) = tokio::sync::mpsc::unbounded_channel();
        let tokens = cancel.clone();
        let accepting = tokio::spawn(accept_loop(listener, tokens, move |stream, _| drop(told.send(stream))));

        let visitor = TcpSocket::new_v4().unwrap();
        let mut hoard = Vec::new();
        while let Ok(file) = std::fs::File::open("/dev/null") {
            hoard.push(file);
        }
        let visitor = visitor.connect(addr).await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(accepted.try_recv().is_err(), "there was no descriptor for it");
        drop(hoard);
        let served = tokio::time::timeout(Duration::from_secs(2), accepted.recv()).await.unwrap().unwrap();
        assert_eq!(served.peer_addr().unwrap(), visitor.local_addr().unwrap());
        cancel.cancel();
        accepting.await.unwrap();
    }
}
