//! Two nodes with plain TCP between them: visitors come to one, the tunnel is at the
//! other. HAProxy may stand in the first one's place.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::Command;

use super::{CONTROL, Kind, Login, SSH, START, Server, System, keygen, listens, pause, raw_port, servers};
use crate::program::Program;
use crate::{Bench, Outcome, visitor, within};

const ENTRY: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2));
const OWNER: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 3));
const ETCD: &str = "http://127.0.0.1:2379";
const PEERS: &str = "http://127.0.0.1:2380";
/// Where HAProxy's visitors come.
const RELAY: SocketAddr = SocketAddr::new(ENTRY, 7000);

/// They run until it is dropped.
pub struct Fleet {
    /// What is measured: where visitors come in.
    pub entry: Server,
    /// Where they do.
    pub visitors: SocketAddr,
    others: Vec<Program>,
}

impl Fleet {
    /// Starts all; returns when a visitor reaches the origin that takes orders.
    ///
    /// # Errors
    /// Why none does.
    pub async fn start(bench: &Bench, system: &System) -> Outcome<Self> {
        let temp = tempfile::tempdir_in("/run")?;
        let dir = temp.path();
        keygen(&dir.join("key"))?;
        let mut others = vec![Program::start("etcd", etcd(dir), dir)?];
        let etcd_clients = ETCD.trim_start_matches("http://").parse()?;
        within(START, "etcd", listens(&mut others, etcd_clients)).await?;

        // The one beside HAProxy is the one under test.
        let binary = match &system.kind {
            Kind::Adit { binary, .. } => binary.clone(),
            _ => bench.options.adit.clone().into(),
        };
        others.push(Program::start("owner", node(&binary, dir, "owner", OWNER, true)?, dir)?);
        within(START, "the node", listens(&mut others, SocketAddr::new(OWNER, SSH.port()))).await?;
        let mut login = Login::new(SocketAddr::new(OWNER, SSH.port()), dir.join("key"), &bench.options.cipher);
        login.forward = ["-R".to_owned(), format!("tcp/raw:{}", bench.origins.orders)];
        others.push(Program::start("ssh", login.command(), dir)?);
        let port = within(START, "the tunnel", async {
            loop {
                others.iter_mut().try_for_each(Program::runs)?;
                if let Ok(port) = raw_port(SocketAddr::new(OWNER, CONTROL.port())).await {
                    return Ok(port);
                }
                pause().await;
            }
        });
        let port = port.await?;

        let (command, visitors) = match system.kind {
            Kind::Haproxy { splice } => (servers::haproxy(dir, RELAY, SocketAddr::new(OWNER, port), splice)?, RELAY),
            Kind::Adit { splice, .. } => (node(&binary, dir, "entry", ENTRY, splice)?, SocketAddr::new(ENTRY, port)),
            _ => return Err("it is no relay".into()),
        };
        let entry = Program::start("the entry", command, dir)?;
        let entry = Server { name: system.name.clone(), kind: system.kind.clone(), programs: vec![entry], dir: temp };
        let mut fleet = Self { entry, visitors, others };
        match within(START, "the fleet", fleet.serves()).await {
            Ok(()) => Ok(fleet),
            Err(why) => Err(format!("{why}{}", fleet.entry.last_words()).into()),
        }
    }

    async fn serves(&mut self) -> Outcome<()> {
        loop {
            self.runs()?;
            if visitor::greet(self.visitors).await.is_ok() {
                return Ok(());
            }
            pause().await;
        }
    }

    /// # Errors
    /// What ended.
    pub fn runs(&mut self) -> Outcome<()> {
        self.entry.programs.iter_mut().chain(&mut self.others).try_for_each(Program::runs)
    }
}

fn node(binary: &Path, dir: &Path, name: &str, ip: IpAddr, splice: bool) -> Outcome<Command> {
    let more = format!(
        "[ingress]\nhttp = []\nhttps = []\nraw = [\"{ip}\"]\n\
         [etcd]\nendpoints = [\"{ETCD}\"]\n\
         [fleet]\nlisten = [\"{ip}:7443\"]\nprivate = [\"127.0.0.0/8\"]\n\
         [relay]\nsplice = {splice}\n"
    );
    servers::adit(binary, dir, name, ip, &more)
}

/// One member, in memory, that believes everybody of this namespace.
fn etcd(dir: &Path) -> Command {
    let mut command = Command::new(servers::ETCD);
    command.env_clear().arg("--name").arg("edge").arg("--data-dir").arg(dir.join("etcd")).arg("--unsafe-no-fsync");
    for (flag, url) in [
        ("--listen-client-urls", ETCD),
        ("--advertise-client-urls", ETCD),
        ("--listen-peer-urls", PEERS),
        ("--initial-advertise-peer-urls", PEERS),
        ("--initial-cluster", &format!("edge={PEERS}")),
    ] {
        command.arg(flag).arg(url);
    }
    command
}
