//! A real etcd cluster with TLS and roles: each node is known by the common name of
//! its certificate, and may write what is its own.

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::Command;

use etcd_client::{Certificate, Client, ConnectOptions, Identity, TlsOptions, Txn, TxnOp};
use futures_util::{StreamExt, stream};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

use super::{DEADLINE, NodeOpts, Program, Usage, eventually_within, own_address};

/// What the nodes' keys stand below.
pub const ROOT: &str = "/adit/1/";

struct Member {
    ip: IpAddr,
    program: Option<Program>,
}

/// A cluster. Its members end with it.
pub struct EtcdCluster {
    dir: tempfile::TempDir,
    ca: Issuer<'static, KeyPair>,
    members: Vec<Member>,
}

impl EtcdCluster {
    /// So many members, with a role of each node (reads all, writes what is its own)
    /// and `control`.
    pub async fn start(members: usize) -> Self {
        Self::at((0..members).map(|_| own_address()).collect()).await
    }

    /// The same with a member at each of these addresses.
    pub async fn at(addresses: Vec<IpAddr>) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "etcd test CA");
        let key = KeyPair::generate().unwrap();
        // Not the disk that others of this machine keep busy.
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        std::fs::write(dir.path().join("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
        let ca = Issuer::new(params, key);
        let members = addresses.into_iter().map(|ip| Member { ip, program: None }).collect();
        let mut cluster = Self { dir, ca, members };
        let mut names: Vec<String> = cluster.members.iter().map(|member| member.ip.to_string()).collect();
        // Members come from there to each other, and a peer's certificate must be for it.
        names.push("127.0.0.1".into());
        cluster.certificate("member", &names);
        cluster.certificate("root", &[]);
        for i in 0..cluster.members.len() {
            cluster.run(i);
        }
        eventually_within(DEADLINE, "etcd's health", async || {
            cluster.try_ctl(&["endpoint", "health", "--cluster"]).ok()
        })
        .await;
        for line in [
            "user add root --no-password",
            "role add root",
            "user grant-role root root",
            "role add control",
            "role grant-permission control readwrite /adit/1/ --prefix",
            "user add control --no-password",
            "user grant-role control control",
        ] {
            cluster.ctl(&line.split(' ').collect::<Vec<_>>());
        }
        cluster.certificate("control", &[]);
        cluster.ctl(&["auth", "enable"]);
        cluster
    }

    /// A file of the cluster: certificates of nodes, of its members, of the fleet.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A certificate of this common name, for these addresses.
    fn certificate(&self, name: &str, addresses: &[String]) {
        let mut params = CertificateParams::new(addresses.to_vec()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let made = params.signed_by(&key, &self.ca).unwrap();
        std::fs::write(self.path(&format!("{name}.pem")), made.pem()).unwrap();
        std::fs::write(self.path(&format!("{name}.key")), key.serialize_pem()).unwrap();
    }

    fn run(&mut self, i: usize) {
        let url = |member: &Member, port: u16| format!("https://{}:{port}", member.ip);
        let all: Vec<String> =
            self.members.iter().enumerate().map(|(i, member)| format!("m{i}={}", url(member, 2380))).collect();
        let member = &self.members[i];
        let (client, peer) = (url(member, 2379), url(member, 2380));
        let mut command = Command::new("etcd");
        command.env_clear().arg("--name").arg(format!("m{i}")).arg("--data-dir").arg(self.path(&format!("data{i}")));
        for (flag, value) in [
            ("--listen-client-urls", client.as_str()),
            ("--advertise-client-urls", &client),
            ("--listen-peer-urls", &peer),
            ("--initial-advertise-peer-urls", &peer),
            ("--initial-cluster", &all.join(",")),
        ] {
            command.arg(flag).arg(value);
        }
        for side in ["", "peer-"] {
            command.arg(format!("--{side}client-cert-auth"));
            for (flag, file) in [("trusted-ca-file", "ca.pem"), ("cert-file", "member.pem"), ("key-file", "member.key")]
            {
                command.arg(format!("--{side}{flag}")).arg(self.path(file));
            }
        }
        self.members[i].program = Some(Program::start("etcd", command));
    }

    /// Ends a member by kill -9.
    pub fn kill(&mut self, i: usize) {
        self.members[i].program = None;
    }

    /// Starts a member that was killed, with what it had.
    pub fn restart(&mut self, i: usize) {
        self.run(i);
    }

    /// etcdctl as root.
    pub fn ctl(&self, arguments: &[&str]) -> String {
        self.try_ctl(arguments).unwrap_or_else(|error| panic!("etcdctl {arguments:?}: {error}"))
    }

    /// Whether etcdctl ends well.
    pub fn ctl_if_healthy(&self, arguments: &[&str]) -> bool {
        self.try_ctl(arguments).is_ok()
    }

    fn try_ctl(&self, arguments: &[&str]) -> Result<String, String> {
        let mut command = Command::new("etcdctl");
        command.env("ETCDCTL_API", "3").arg("--endpoints").arg(self.endpoints().join(","));
        command.arg("--cacert").arg(self.path("ca.pem"));
        command.arg("--cert").arg(self.path("root.pem")).arg("--key").arg(self.path("root.key"));
        let done = command.args(["--dial-timeout", "2s", "--command-timeout", "5s"]).args(arguments).output().unwrap();
        let said = String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
        if done.status.success() { Ok(said) } else { Err(said) }
    }

    /// A client that may do all.
    pub async fn client(&self) -> Client {
        let read = |name: &str| std::fs::read(self.path(name)).unwrap();
        let identity = Identity::from_pem(read("root.pem"), read("root.key"));
        let tls = TlsOptions::new().ca_certificate(Certificate::from_pem(read("ca.pem"))).identity(identity);
        Client::connect(self.endpoints(), Some(ConnectOptions::new().with_tls(tls))).await.unwrap()
    }

    /// Writes many records, past the nodes and their checks: keys below the nodes'
    /// prefix, and values.
    pub async fn put_all(&self, records: impl Iterator<Item = (String, String)>) {
        let client = self.client().await;
        let puts: Vec<TxnOp> = records.map(|(key, value)| TxnOp::put(format!("{ROOT}{key}"), value, None)).collect();
        // etcd takes 128 of one transaction.
        let written = stream::iter(puts.chunks(120)).for_each_concurrent(8, |some| {
            let mut kv = client.kv_client();
            async move {
                kv.txn(Txn::new().and_then(some)).await.unwrap();
            }
        });
        written.await;
    }

    /// What a member uses now.
    pub fn usage(&self, i: usize) -> Usage {
        Usage::of(self.members[i].program.as_ref().unwrap().pid())
    }

    fn endpoints(&self) -> Vec<String> {
        self.members.iter().map(|member| format!("https://{}:2379", member.ip)).collect()
    }

    /// A node of this name whose feed this is; with `control` it may write all records.
    pub fn node(&self, name: &str, control: bool) -> NodeOpts {
        self.certificate(name, &[]);
        self.ctl(&["user", "add", name, "--no-password"]);
        let role = format!("node-{name}");
        self.ctl(&["role", "add", &role]);
        self.ctl(&["role", "grant-permission", &role, "read", "/adit/1/", "--prefix"]);
        self.ctl(&["role", "grant-permission", &role, "readwrite", &format!("/adit/1/up/node/{name}")]);
        for below in [format!("/adit/1/up/loc/{name}/"), "/adit/1/live/revoked/".into()] {
            self.ctl(&["role", "grant-permission", &role, "readwrite", &below, "--prefix"]);
        }
        self.ctl(&["user", "grant-role", name, &role]);
        let file = |name: &str| format!("{:?}", self.path(name));
        let mut opts = NodeOpts::default()
            .set("node", &format!("name = \"{name}\""))
            .set("etcd", &format!("endpoints = {:?}", self.endpoints()))
            .set("etcd", &format!("ca = {}", file("ca.pem")))
            .set("etcd", &format!("certificate = {}", file(&format!("{name}.pem"))))
            .set("etcd", &format!("key = {}", file(&format!("{name}.key"))));
        // Made by the node's own helper.
        let fleet = self.path("fleet");
        let mut command = Command::new(env!("CARGO_BIN_EXE_adit"));
        let made = command.arg("ca").arg("--dir").arg(&fleet).arg(name).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        opts = opts.set("fleet", "listen = [\"{ip}:7443\"]");
        for (key, file) in [("ca", "ca.pem"), ("certificate", &format!("{name}.pem")), ("key", &format!("{name}.key"))]
        {
            opts = opts.set("fleet", &format!("{key} = {:?}", fleet.join(file)));
        }
        if control {
            opts = opts
                .set("etcd", &format!("control_certificate = {}", file("control.pem")))
                .set("etcd", &format!("control_key = {}", file("control.key")));
        }
        opts
    }
}
