//! 50 visitors of one tunnel: 10 download, 10 upload, 10 echo all the time. The
//! other 20 are quiet; then they stop in the middle of transfers; then they
//! leave. What the 30 do meanwhile, second by second.
//!
//! They are connections of a tcp socket; of HTTP/1.1 over TLS, where an echo is a
//! small request; or streams of HTTP/2, of which each of 10 connections has one of
//! each kind and two that stop.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use hyper::Response;
use hyper::body::Incoming;
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
use crate::web::{SMALL, Site, Visit};
use crate::{Bench, Outcome, within};

/// Of each kind.
const TEN: usize = 10;
/// All transfers are at full speed, or stand, after this.
const RUN_UP: Duration = Duration::from_secs(1);

/// What each kind keeps during the stop, of the mean of before and after: a machine is
/// faster in one minute than in another. The same for each CPU second that the machine's
/// other work left; its worst second.
const NAMES: [[&str; 3]; 4] = [
    ["bytes kept", "bytes kept per CPU left", "bytes' worst second"],
    ["downloads kept", "downloads kept per CPU left", "downloads' worst second"],
    ["uploads kept", "uploads kept per CPU left", "uploads' worst second"],
    ["echoes kept", "echoes kept per CPU left", "echoes' worst second"],
];

/// What a visitor of the web transfers at once.
const PIECE: u64 = 8 << 20;

const MIB: f64 = (1 << 20) as f64;

/// The time before the stop, during it, and after it.
fn phases(options: &Options) -> [u64; 3] {
    let around = (options.seconds / 4).clamp(2, 60);
    [around, options.seconds, around]
}

/// All of it, in any case.
pub fn length(options: &Options) -> Duration {
    Duration::from_secs(phases(options).iter().sum()) + 4 * RUN_UP
}

pub async fn stopped_visitors(bench: &Bench, server: &Server, way: Way) -> Outcome<Sample> {
    let mut tunnel = server.tunnel(bench, way).await?;
    let [before, during, after] = phases(&bench.options);
    let until = Instant::now() + length(&bench.options);
    let addr = tunnel.visitors;
    let (quiet, mut busy) = match way {
        Way::Orders => (Quiet::Raw(quiet(addr).await?), Busy::start(addr, until)),
        Way::Raw | Way::Https | Way::Http2 => {
            let mut tens = Tens::connect(&bench.site(way, addr, server), way).await?;
            (Quiet::Web(tens.split_off(3)), Busy::start_web(tens, until))
        }
    };
    tokio::time::sleep(RUN_UP).await;

    let calm = busy.watch(server, before).await;
    let stopped = Stopped::from(quiet, during).await?;
    tokio::time::sleep(RUN_UP).await;
    let stop = busy.watch(server, during).await;
    let alive = is_alive(&mut tunnel, way, bench, server).await;
    let reset = stopped.leave();
    tokio::time::sleep(RUN_UP).await;
    let relief = busy.watch(server, after).await;
    busy.end().await.map_err(|e| format!("a busy visitor: {e}"))?;

    let mut sample = Vec::new();
    for (kind, [kept, fair, worst]) in NAMES.into_iter().enumerate() {
        let around = |of: fn(&Phase, usize) -> f64| f64::midpoint(of(&calm, kind), of(&relief, kind));
        let mean = around(Phase::mean);
        sample.push(told(kept, "% of around", 100.0 * stop.mean(kind) / mean));
        sample.push(told(fair, "% of around", 100.0 * stop.per_cpu(kind) / around(Phase::per_cpu)));
        sample.push(told(worst, "% of around", 100.0 * stop.worst(kind) / mean));
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

/// Five times ten visitors of the web that asked for something once.
struct Tens;

impl Tens {
    async fn connect(site: &Site, way: Way) -> Outcome<Vec<Vec<Visit>>> {
        let mut tens: Vec<Vec<Visit>> = (0..5).map(|_| Vec::new()).collect();
        for _ in 0..TEN {
            let mut shared = None;
            for ten in &mut tens {
                let mut visit = match (&shared, way) {
                    (None, Way::Http2) => site.http2().await?,
                    (None, _) => site.http1().await?,
                    (Some(connection), _) => Visit::stream(connection).ok_or("no streams")?,
                };
                visit.get(SMALL).await?;
                if way == Way::Http2 {
                    shared = visit.stream();
                }
                ten.push(visit);
            }
        }
        Ok(tens)
    }
}

/// Those that are going to stop.
enum Quiet {
    Raw(Vec<TcpStream>),
    /// Ten that will not read, ten whose origin will not.
    Web(Vec<Vec<Visit>>),
}

/// Those that stopped: half do not read, the others' origin does not.
struct Stopped {
    readers: Vec<TcpStream>,
    /// Answers that nobody reads, with their connections.
    answers: Vec<(Visit, Response<Incoming>)>,
    writers: Vec<JoinHandle<()>>,
}

impl Stopped {
    async fn from(quiet: Quiet, seconds: u64) -> Outcome<Self> {
        match quiet {
            Quiet::Raw(quiet) => Self::raw(quiet, seconds).await,
            Quiet::Web(tens) => Self::web(tens).await,
        }
    }

    async fn web(mut tens: Vec<Vec<Visit>>) -> Outcome<Self> {
        let mut answers = Vec::new();
        for mut visit in tens.pop().unwrap_or_default() {
            let answer = visit.begin_get(u64::MAX >> 1).await?;
            answers.push((visit, answer));
        }
        let writers = tens.pop().unwrap_or_default().into_iter().map(|mut visit| {
            tokio::spawn(async move {
                let _ = visit.post_unread().await;
            })
        });
        Ok(Self { readers: Vec::new(), answers, writers: writers.collect() })
    }

    async fn raw(mut quiet: Vec<TcpStream>, seconds: u64) -> Outcome<Self> {
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
        Ok(Self { readers: quiet, answers: Vec::new(), writers })
    }

    /// They break off; tells how many the server had reset already, as far as they
    /// would notice without reading.
    fn leave(self) -> usize {
        let gone = |tcp: &&TcpStream| matches!(SockRef::from(*tcp).take_error(), Ok(Some(_)) | Err(_));
        let reset = self.readers.iter().filter(gone).count() + self.writers.iter().filter(|w| w.is_finished()).count();
        for writer in self.writers {
            writer.abort();
        }
        drop(self.answers);
        reset
    }
}

async fn is_alive(tunnel: &mut Tunnel, way: Way, bench: &Bench, server: &Server) -> bool {
    let addr = tunnel.visitors;
    let visit = async {
        match way {
            Way::Orders => visitor::greet(addr).await,
            Way::Raw | Way::Https => bench.site(way, addr, server).greet(false).await,
            Way::Http2 => bench.site(way, addr, server).greet(true).await,
        }
    };
    let visit = within(RUN_UP * 5, "a visit", visit).await;
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

    fn start_web(tens: Vec<Vec<Visit>>, until: Instant) -> Self {
        let tallies: [Tally; 3] = Default::default();
        let mut visits = JoinSet::new();
        for (kind, (ten, tally)) in tens.into_iter().zip(&tallies).enumerate() {
            for mut visit in ten {
                let tally = tally.clone();
                visits.spawn(async move {
                    while Instant::now() < until {
                        match kind {
                            0 => drop(visit.get_counted(PIECE, |n| tally.add(n)).await?),
                            1 => drop(visit.post_counted(PIECE, Some(tally.clone())).await?),
                            _ => visit.get(SMALL).await.map(|_| tally.add(1))?,
                        }
                    }
                    Ok(())
                });
            }
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
