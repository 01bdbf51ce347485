//! One runtime a core. A session and its visitors are served by one thread, so that a
//! request wakes no other: threads that take tasks from each other cost a small request
//! 13 to 22 % more (docs/speed.md). A visitor is moved once, when it is known whose they
//! are; a core that is busy gets no more of them.

use std::cell::Cell;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

/// A core that works more than this share of the time gets no more visitors for the
/// sake of their session.
const BUSY: f64 = 0.8;
/// The same for the sake of company.
const HALF: f64 = 0.5;
/// A difference that is no chance.
const CLEARLY: f64 = 0.1;
/// Over how long it is measured, at least.
const LOOK: Duration = Duration::from_millis(100);
/// What a visitor takes of it at least: a TLS handshake.
const VISITOR: f64 = 0.0025;

/// Which core.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Core(usize);

thread_local! {
    static HERE: Cell<Option<Core>> = const { Cell::new(None) };
}

impl Core {
    /// The one whose thread this is; none where nobody is served.
    pub fn here() -> Option<Self> {
        HERE.get()
    }
}

/// All cores of this node.
#[derive(Debug, Clone)]
pub struct Cores(Arc<All>);

#[derive(Debug)]
struct All {
    runtimes: Vec<Handle>,
    next: AtomicUsize,
    load: Mutex<Load>,
}

/// How busy each was, when it was looked at last.
#[derive(Debug)]
struct Load {
    at: Instant,
    cores: Vec<Work>,
}

/// What one core has to do.
#[derive(Debug, Clone, Default)]
struct Work {
    /// How long it has worked, and for which share of the time before the last look.
    worked: Duration,
    share: f64,
    /// What those take, at least, who came since.
    came: f64,
}

impl Work {
    /// Not the sum: who come at the same pace as before are in the share already.
    fn busy(&self) -> f64 {
        self.share.max(self.came)
    }
}

impl Load {
    fn of(count: usize) -> Self {
        Self { at: Instant::now(), cores: vec![Work::default(); count] }
    }

    fn busy(&self, core: usize) -> f64 {
        self.cores.get(core).map_or(f64::INFINITY, Work::busy)
    }

    fn choose(&self, home: Option<Core>) -> Core {
        let all = 0..self.cores.len();
        let chosen = home
            .map(|home| home.0)
            .filter(|home| self.busy(*home) <= BUSY)
            .or_else(|| all.clone().find(|core| self.busy(*core) <= HALF))
            .or_else(|| all.min_by(|a, b| self.busy(*a).total_cmp(&self.busy(*b))));
        Core(chosen.unwrap_or(0))
    }
}

impl Cores {
    /// So many runtimes, of one thread each.
    ///
    /// # Errors
    /// No threads are to be had.
    pub fn start(count: usize) -> io::Result<(Self, Vec<Runtime>)> {
        let start = |number: usize| {
            Builder::new_multi_thread()
                .worker_threads(1)
                .enable_all()
                .thread_name(format!("adit-{number}"))
                .on_thread_start(move || HERE.set(Some(Core(number))))
                .build()
        };
        let runtimes = (0..count.max(1)).map(start).collect::<io::Result<Vec<_>>>()?;
        Ok((Self::of(runtimes.iter().map(|runtime| runtime.handle().clone()).collect()), runtimes))
    }

    /// The caller's runtime and no other.
    pub fn one() -> Self {
        Self::of(vec![Handle::current()])
    }

    fn of(runtimes: Vec<Handle>) -> Self {
        let count = runtimes.len();
        Self(Arc::new(All { runtimes, next: AtomicUsize::new(0), load: Mutex::new(Load::of(count)) }))
    }

    /// Where to serve a visitor whose session is at `home`. Who has none there, or finds
    /// it busy, goes to the first core that is idle half of the time: few threads that
    /// work wake up less often than many that do not.
    pub fn for_visitor(&self, home: Option<Core>) -> Core {
        let mut load = self.look();
        let chosen = load.choose(home);
        // Not all of a crowd go there.
        if let Some(core) = load.cores.get_mut(chosen.0) {
            core.came += VISITOR;
        }
        chosen
    }

    /// Where to read a visitor's first bytes: here, unless it is busy.
    pub fn for_hello(&self) -> Core {
        self.look().choose(Core::here())
    }

    /// Where to serve a session, which stays: the less busy of two, in turn.
    pub fn for_session(&self) -> Core {
        let count = self.0.runtimes.len();
        let turn = self.0.next.fetch_add(1, Ordering::Relaxed);
        let (one, other) = (turn % count, (turn + 1) % count);
        let load = self.look();
        Core(if load.busy(other) + CLEARLY < load.busy(one) { other } else { one })
    }

    /// Serves a connection as a task on `core`.
    pub fn serve<F>(&self, core: Core, tasks: &TaskTracker, tcp: TcpStream, serve: impl FnOnce(TcpStream) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        if Core::here() == Some(core) {
            tasks.spawn(serve(tcp));
            return;
        }
        let moved = tcp.into_std().and_then(|tcp| self.spawn(core, tasks, || Ok(serve(TcpStream::from_std(tcp)?))));
        if let Err(error) = moved {
            // It is closed.
            metrics::counter!("adit_accept_failures_total").increment(1);
            tracing::debug!(%error, "a connection cannot be moved to its thread");
        }
    }

    /// Serves a listener as a task on the first core, where visitors without a session
    /// are the likeliest to be.
    ///
    /// # Errors
    /// It cannot be watched there.
    pub fn listen<F>(
        &self,
        tasks: &TaskTracker,
        listener: TcpListener,
        serve: impl FnOnce(TcpListener) -> F,
    ) -> io::Result<()>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = listener.into_std()?;
        self.spawn(Core(0), tasks, || Ok(serve(TcpListener::from_std(listener)?)))
    }

    /// Runs `task` on `core` while the caller waits, and no longer.
    ///
    /// # Errors
    /// The task panicked, or that core has ended.
    pub async fn run<T: Send + 'static>(
        &self,
        core: Option<Core>,
        task: impl Future<Output = T> + Send + 'static,
    ) -> io::Result<T> {
        match core.filter(|_| core != Core::here()).and_then(|core| self.0.runtimes.get(core.0)) {
            Some(runtime) => AbortOnDropHandle::new(runtime.spawn(task)).await.map_err(io::Error::other),
            None => Ok(task.await),
        }
    }

    /// Tells the metrics how busy they are.
    pub fn tell(&self) {
        for (number, core) in self.look().cores.iter().enumerate() {
            metrics::gauge!("adit_core_busy_ratio", "core" => number.to_string()).set(core.share);
        }
    }

    /// Spawns what `make` makes there: what it opens is told of bytes by that runtime.
    fn spawn<F>(&self, core: Core, tasks: &TaskTracker, make: impl FnOnce() -> io::Result<F>) -> io::Result<()>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let runtime = self.0.runtimes.get(core.0).ok_or(io::ErrorKind::NotFound)?;
        let _there = runtime.enter();
        tasks.spawn_on(make()?, runtime);
        Ok(())
    }

    /// How busy they are.
    fn look(&self) -> MutexGuard<'_, Load> {
        let mut load = self.0.load.lock();
        let passed = load.at.elapsed();
        if passed >= LOOK {
            load.at = Instant::now();
            for (runtime, core) in self.0.runtimes.iter().zip(&mut load.cores) {
                let now = runtime.metrics().worker_total_busy_duration(0);
                let share = now.saturating_sub(core.worked).div_duration_f64(passed);
                *core = Work { worked: now, share, came: 0.0 };
            }
        }
        load
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::sync::oneshot;

    use super::*;

    /// Two cores, as long as a test needs them.
    struct Two {
        cores: Cores,
        runtimes: Vec<Runtime>,
    }

    impl Two {
        fn start() -> Self {
            let (cores, runtimes) = Cores::start(2).unwrap();
            Self { cores, runtimes }
        }
    }

    impl Drop for Two {
        fn drop(&mut self) {
            self.runtimes.drain(..).for_each(Runtime::shutdown_background);
        }
    }

    async fn in_time<T>(what: &str, future: impl Future<Output = T>) -> T {
        tokio::time::timeout(Duration::from_secs(10), future).await.unwrap_or_else(|_| panic!("{what} did not happen"))
    }

    #[tokio::test]
    async fn a_connection_is_served_on_the_core_that_was_chosen() {
        let two = Two::start();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        for core in [Core(0), Core(1)] {
            let mut visitor = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            let (tcp, _) = listener.accept().await.unwrap();
            let (tell, told) = oneshot::channel();
            two.cores.serve(core, &TaskTracker::new(), tcp, move |mut tcp| async move {
                let mut said = [0; 5];
                tcp.read_exact(&mut said).await.unwrap();
                tcp.write_all(&said).await.unwrap();
                tell.send(Core::here()).unwrap();
            });
            visitor.write_all(b"hello").await.unwrap();
            let mut heard = [0; 5];
            in_time("an answer", visitor.read_exact(&mut heard)).await.unwrap();
            assert_eq!((&heard, told.await.unwrap()), (b"hello", Some(core)));
        }
    }

    #[tokio::test]
    async fn a_core_that_is_busy_gets_no_more_visitors_until_it_is_not() {
        let two = Two::start();
        let home = Core(0);
        assert_eq!(two.cores.for_visitor(Some(home)), home);
        let chosen = async |core: Core| {
            while two.cores.for_visitor(Some(home)) != core {
                tokio::time::sleep(LOOK).await;
            }
        };
        let working = two.runtimes[0].spawn(async {
            loop {
                let begun = Instant::now();
                while begun.elapsed() < LOOK / 50 {}
                tokio::task::yield_now().await;
            }
        });
        in_time("the other core", chosen(Core(1))).await;
        working.abort();
        in_time("the home again", chosen(home)).await;
    }

    #[tokio::test]
    async fn a_crowd_is_spread_and_a_few_keep_each_other_company() {
        let two = Two::start();
        // At one instant, before anything is measured.
        let begin = || *two.cores.0.load.lock() = Load { at: Instant::now() + LOOK * 1000, ..Load::of(2) };
        let count = |home, core| (0..1000).filter(|_| two.cores.for_visitor(home) == core).count();
        begin();
        assert!((0..10).all(|_| two.cores.for_visitor(None) == Core(0)));
        assert!((300..700).contains(&count(None, Core(0))), "a thousand at once without a session");
        begin();
        assert!((300..700).contains(&count(Some(Core(1)), Core(1))), "a thousand at once of one session");
    }

    #[tokio::test]
    async fn who_come_as_before_are_not_counted_twice() {
        let two = Two::start();
        let busy = Work { share: 0.7, ..Work::default() };
        *two.cores.0.load.lock() = Load { at: Instant::now() + LOOK * 1000, cores: vec![busy; 2] };
        assert!((0..200).all(|_| two.cores.for_visitor(Some(Core(0))) == Core(0)));
    }

    #[tokio::test]
    async fn sessions_are_spread() {
        let two = Two::start();
        let chosen: Vec<Core> = (0..4).map(|_| two.cores.for_session()).collect();
        assert_eq!(chosen, [Core(0), Core(1), Core(0), Core(1)]);
    }

    #[tokio::test]
    async fn what_runs_for_a_caller_ends_with_it() {
        let two = Two::start();
        assert_eq!(two.cores.run(Some(Core(1)), async { Core::here() }).await.unwrap(), Some(Core(1)));
        let (held, ended) = oneshot::channel::<()>();
        let running = two.cores.run(Some(Core(1)), async {
            let _held = held;
            std::future::pending::<()>().await;
        });
        tokio::time::timeout(LOOK, running).await.unwrap_err();
        in_time("its end", ended).await.unwrap_err();
    }
}
