//! 50 visitors of one tunnel: 10 download, 10 upload, 10 echo all the time. The
//! other 20 are quiet; then they stop in the middle of transfers; then they
//! leave. What the 30 do meanwhile, second by second.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::{JoinHandle, JoinSet};

use super::{Figure, Sample, told};
use crate::options::Options;
use crate::origin::Order;
use crate::pattern::Pattern;
use crate::system::{Server, Tunnel, Way};
use crate::usage::Share;
use crate::visitor::{self, Pace, Tally};
use crate::{Bench, Outcome, within};

/// Of each kind.
const TEN: usize = 10;
/// All transfers are at full speed, or stand, after this.
const RUN_UP: Duration = Duration::from_secs(1);

/// What each kind keeps during the stop; the same for each CPU second that the
/// machine's other work left; its worst second.
const NAMES: [[&str; 3]; 4] = [
    ["bytes kept", "bytes kept per CPU left", "bytes' worst second"],
    ["downloads kept", "downloads kept per CPU left", "downloads' worst second"],
    ["uploads kept", "uploads kept per CPU left", "uploads' worst second"],
    ["echoes kept", "echoes kept per CPU left", "echoes' worst second"],
];

const MIB: f64 = (1 << 20) as f64;

/// The time before the stop, during it, and after it.
fn phases(options: &Options) -> [u64; 3] {
    let around = (options.seconds / 4).clamp(2, 15);
    [around, options.seconds, around]
}

/// All of it, in any case.
pub fn length(options: &Options) -> Duration {
    Duration::from_secs(phases(options).iter().sum()) + 4 * RUN_UP
}

pub async fn stopped_visitors(bench: &Bench, server: &Server) -> Outcome<Sample> {
    let mut tunnel = server.tunnel(bench, Way::Orders).await?;
    let [before, during, after] = phases(&bench.options);
    let quiet = quiet(tunnel.visitors).await?;
    let mut busy = Busy::start(tunnel.visitors, Instant::now() + length(&bench.options));
    tokio::time::sleep(RUN_UP).await;

    let calm = busy.watch(server, before).await;
    let stopped = Stopped::from(quiet, during).await?;
    tokio::time::sleep(RUN_UP).await;
    let stop = busy.watch(server, during).await;
    let alive = is_alive(&mut tunnel).await;
    let reset = stopped.leave();
    tokio::time::sleep(RUN_UP).await;
    let relief = busy.watch(server, after).await;
    busy.end().await.map_err(|e| format!("a busy visitor: {e}"))?;

    let mut sample = Vec::new();
    for (kind, [kept, fair, worst]) in NAMES.into_iter().enumerate() {
        sample.push(told(kept, "% of before", 100.0 * stop.mean(kind) / calm.mean(kind)));
        sample.push(told(fair, "% of before", 100.0 * stop.per_cpu(kind) / calm.per_cpu(kind)));
        sample.push(told(worst, "% of before", 100.0 * stop.worst(kind) / calm.mean(kind)));
    }
    sample.extend([calm.rates("before"), stop.rates("during"), relief.rates("after")].concat());
    sample.extend([
        told("left by others before", "CPUs", calm.left),
        told("left by others during", "CPUs", stop.left),
        told("RSS before", "MiB", calm.rss / MIB),
        told("RSS during", "MiB", stop.rss / MIB),
        told("stopped ones that were reset", "of 20", reset as f64),
        told("session alive", "1 = yes", f64::from(u8::from(alive))),
    ]);
    Ok(sample)
}

/// 20 connections that said hello and nothing more.
async fn quiet(addr: SocketAddr) -> Outcome<Vec<TcpStream>> {
    let mut quiet = Vec::new();
    for _ in 0..2 * TEN {
        let mut tcp = visitor::connect(addr).await?;
        tcp.write_all(&Order::Send(1).bytes()).await?;
        within(RUN_UP * 10, "a hello", async { Ok(tcp.read_u8().await?) }).await?;
        quiet.push(tcp);
    }
    Ok(quiet)
}

/// Those that stopped: half do not read, the others' origin does not.
struct Stopped {
    readers: Vec<TcpStream>,
    writers: Vec<JoinHandle<()>>,
}

impl Stopped {
    async fn from(mut quiet: Vec<TcpStream>, seconds: u64) -> Outcome<Self> {
        let mut writers = Vec::new();
        for mut tcp in quiet.split_off(TEN) {
            tcp.write_all(&Order::Hold(seconds + 60).bytes()).await?;
            writers.push(tokio::spawn(async move {
                // As much as anybody takes; ends by a reset alone.
                let mut sent = Pattern::default();
                while let Ok(n) = tcp.write(sent.peek(64 << 10)).await {
                    sent.advance(n);
                }
            }));
        }
        for tcp in &mut quiet {
            tcp.write_all(&Order::Send(u64::MAX >> 1).bytes()).await?;
        }
        Ok(Self { readers: quiet, writers })
    }

    /// They break off; tells how many the server had reset already.
    fn leave(self) -> usize {
        let gone = |tcp: &&TcpStream| matches!(SockRef::from(*tcp).take_error(), Ok(Some(_)) | Err(_));
        let reset = self.readers.iter().filter(gone).count() + self.writers.iter().filter(|w| w.is_finished()).count();
        for writer in self.writers {
            writer.abort();
        }
        reset
    }
}

async fn is_alive(tunnel: &mut Tunnel) -> bool {
    let visit = within(RUN_UP * 5, "a visit", visitor::greet(tunnel.visitors)).await;
    tunnel.runs().is_ok() && visit.is_ok()
}

/// The 30, with what each kind did: bytes down, bytes up, round trips.
struct Busy {
    tallies: [Tally; 3],
    visits: JoinSet<Outcome<()>>,
}

impl Busy {
    fn start(addr: SocketAddr, until: Instant) -> Self {
        let tallies: [Tally; 3] = Default::default();
        let mut visits = JoinSet::new();
        for _ in 0..TEN {
            let [down, up, echo] = tallies.clone();
            visits.spawn(async move { visitor::download(addr, until, Pace::Full, down).await.map(drop) });
            visits.spawn(async move { visitor::upload(addr, until, Pace::Full, up).await.map(drop) });
            visits.spawn(async move { visitor::echo(addr, until, echo).await.map(drop) });
        }
        Self { tallies, visits }
    }

    async fn watch(&self, server: &Server, seconds: u64) -> Phase {
        let mut phase = Phase { each: Vec::new(), rss: 0.0, left: 0.0 };
        let read = || self.tallies.each_ref().map(Tally::read);
        let share = Share::now();
        let (mut last, mut since) = (read(), Instant::now());
        for _ in 0..seconds {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let (now, time) = (read(), since.elapsed().as_secs_f64());
            let [down, up, echo] = [0, 1, 2].map(|kind| (now[kind] - last[kind]) as f64 / time);
            phase.each.push([down + up, down, up, echo]);
            phase.rss = phase.rss.max(server.memory().rss as f64);
            (last, since) = (now, Instant::now());
        }
        phase.left = Share::now().left_since(share).as_secs_f64() / seconds as f64;
        phase
    }

    async fn end(&mut self) -> Outcome<()> {
        while let Some(visit) = self.visits.join_next().await {
            visit??;
        }
        Ok(())
    }
}

/// What happened in each second, in the order of `NAMES`; the most memory; the CPUs left by others.
struct Phase {
    each: Vec<[f64; 4]>,
    rss: f64,
    left: f64,
}

impl Phase {
    fn mean(&self, kind: usize) -> f64 {
        self.each.iter().map(|second| second[kind]).sum::<f64>() / self.each.len() as f64
    }

    fn per_cpu(&self, kind: usize) -> f64 {
        self.mean(kind) / self.left
    }

    fn worst(&self, kind: usize) -> f64 {
        self.each.iter().map(|second| second[kind]).fold(f64::INFINITY, f64::min)
    }

    fn rates(&self, when: &'static str) -> [Figure; 3] {
        let [down, up, echo] = match when {
            "before" => ["downloads before", "uploads before", "echoes before"],
            "during" => ["downloads during", "uploads during", "echoes during"],
            _ => ["downloads after", "uploads after", "echoes after"],
        };
        [
            told(down, "MB/s", self.mean(1) / 1e6),
            told(up, "MB/s", self.mean(2) / 1e6),
            told(echo, "trips/s", self.mean(3)),
        ]
    }
}
