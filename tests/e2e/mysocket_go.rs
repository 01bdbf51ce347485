//! mysocketctl in Go of 2021-2022 by an emulator of our own: what it does that other
//! clients do not, and what a node owes it.

use std::borrow::Cow;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use russh::client::{self, ChannelOpenHandle, Handle, Msg, Session as RusshSession};
use russh::keys::{Algorithm, Certificate, PrivateKey, PrivateKeyWithHashAlg, PublicKeyOrCertificate, load_secret_key};
use russh::{Channel, ChannelMsg, ChannelOpenFailure, Preferred, SshId, cipher, kex, mac};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::*;
use crate::mysocket::{Caller, opts, text};

/// A visitor's connection, as it was announced.
#[derive(Debug, Clone, PartialEq)]
struct Announced {
    bound: (String, u32),
    from: (String, u32),
}

/// What an emulator has met.
#[derive(Default)]
struct Met {
    /// Connections that it made to the node.
    dialed: AtomicUsize,
    /// Those that went through all steps.
    served: AtomicUsize,
    /// When it dialed.
    at: Mutex<Vec<Instant>>,
    announced: Mutex<Vec<Announced>>,
    /// What its terminal shows.
    terminal: Mutex<String>,
}

/// A running client; dropping it ends it without a word.
struct GoClient {
    met: Arc<Met>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for GoClient {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Which tunnel of which account, at which node, to which origin.
#[derive(Clone)]
struct Job {
    node: SocketAddr,
    ann: Caller,
    signkey: String,
    relay_port: u32,
    target: SocketAddr,
    key: Arc<PrivateKey>,
    /// What it says it is, and where it asks to listen: two ways in two years.
    says: (&'static str, &'static str),
}

const OF_2021: (&str, &str) = ("SSH-2.0-Go", "127.0.0.1");
const OF_2022: (&str, &str) = ("SSH-2.0-Mysocketctl-v1.0-85-gcf8f537", "localhost");

impl Job {
    fn new(node: &Node, ann: &Caller, socket: &Value, tunnel: &Value, target: SocketAddr, key: &Key) -> Self {
        let signkey = format!("/socket/{}/tunnel/{}/signkey", text(socket, "socket_id"), text(tunnel, "tunnel_id"));
        let relay_port = u32::try_from(tunnel["local_port"].as_u64().unwrap()).unwrap();
        let key = Arc::new(load_secret_key(&key.path, None).unwrap());
        Self { node: node.addr("ssh"), ann: ann.clone(), signkey, relay_port, target, key, says: OF_2021 }
    }

    /// Connects, and again 1.0 s after each end, without backoff, for ever.
    fn start(self) -> GoClient {
        let met = Arc::<Met>::default();
        let task = tokio::spawn({
            let met = Arc::clone(&met);
            async move {
                loop {
                    met.dialed.fetch_add(1, Ordering::Relaxed);
                    met.at.lock().unwrap().push(Instant::now());
                    let _ = self.connection(&met).await;
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        });
        GoClient { met, task }
    }

    /// One connection, step by step; any step refused ends it.
    async fn connection(&self, met: &Arc<Met>) -> Result<(), russh::Error> {
        let csr = json!({"ssh_public_key": self.key.public_key().to_openssh().unwrap()});
        let signed = self.ann.call("POST", &self.signkey, &csr).await;
        let line = signed.1["signed_ssh_cert"].as_str().ok_or(russh::Error::NotAuthenticated)?;
        let certificate = Certificate::from_openssh(line).unwrap();
        let handler = Emulator { met: Arc::clone(met), target: self.target, bound: self.says.1 };
        let mut handle = client::connect(Arc::new(algorithms_of_2021(self.says.0)), self.node, handler).await?;
        let user = self.ann.user.clone();
        assert!(!handle.authenticate_none(user.clone()).await?.success());
        if !handle.authenticate_openssh_cert(user, Arc::clone(&self.key), certificate).await?.success() {
            return Err(russh::Error::NotAuthenticated);
        }
        self.serve(handle, met).await
    }

    async fn serve(&self, handle: Handle<Emulator>, met: &Met) -> Result<(), russh::Error> {
        handle.tcpip_forward(self.says.1, self.relay_port).await?;
        let mut shell = handle.channel_open_session().await?;
        // Its arguments are swapped: 40 columns, 80 rows.
        shell.request_pty(true, "xterm-256color", 40, 80, 0, 0, &[]).await?;
        granted(&mut shell).await?;
        shell.request_shell(true).await?;
        granted(&mut shell).await?;
        met.served.fetch_add(1, Ordering::Relaxed);
        let mut keepalive = tokio::time::interval(Duration::from_secs(10));
        loop {
            tokio::select! {
                _ = keepalive.tick() => handle.send_keepalive(true).await?,
                message = shell.wait() => match message {
                    Some(ChannelMsg::Data { data }) => {
                        met.terminal.lock().unwrap().push_str(&String::from_utf8_lossy(&data));
                    }
                    Some(ChannelMsg::Eof | ChannelMsg::Close) | None => return Ok(()),
                    Some(_) => {}
                }
            }
        }
    }
}

async fn granted(shell: &mut Channel<Msg>) -> Result<(), russh::Error> {
    loop {
        match shell.wait().await {
            Some(ChannelMsg::Success) => return Ok(()),
            Some(ChannelMsg::Failure) | None => return Err(russh::Error::RequestDenied),
            Some(_) => {}
        }
    }
}

/// What golang.org/x/crypto/ssh offered then.
fn algorithms_of_2021(says: &'static str) -> client::Config {
    let preferred = Preferred {
        kex: Cow::Owned(vec![kex::CURVE25519_PRE_RFC_8731, kex::ECDH_SHA2_NISTP256]),
        key: Cow::Owned(vec![Algorithm::Ed25519]),
        cipher: Cow::Owned(vec![cipher::AES_128_GCM, cipher::CHACHA20_POLY1305, cipher::AES_128_CTR]),
        mac: Cow::Owned(vec![mac::HMAC_SHA256_ETM, mac::HMAC_SHA256]),
        ..Preferred::default()
    };
    client::Config { client_id: SshId::Standard(says.into()), preferred, ..client::Config::default() }
}

/// What answers the node: channels of visitors.
struct Emulator {
    met: Arc<Met>,
    target: SocketAddr,
    bound: &'static str,
}

impl client::Handler for Emulator {
    type Error = russh::Error;

    async fn check_server_key(&mut self, _: &PublicKeyOrCertificate) -> Result<bool, Self::Error> {
        Ok(true)
    }

    async fn server_channel_open_forwarded_tcpip(
        &mut self,
        channel: Channel<Msg>,
        address: &str,
        port: u32,
        from: &str,
        from_port: u32,
        reply: ChannelOpenHandle,
        _: &mut RusshSession,
    ) -> Result<(), Self::Error> {
        let announced = Announced { bound: (address.to_owned(), port), from: (from.to_owned(), from_port) };
        self.met.announced.lock().unwrap().push(announced);
        // It parses the originator as an address, and takes no port 0.
        if from.parse::<IpAddr>().is_err() || from_port == 0 || address != self.bound {
            reply.reject(ChannelOpenFailure::ConnectFailed).await;
            return Ok(());
        }
        reply.accept().await;
        let target = self.target;
        tokio::spawn(async move {
            // Where nobody listens it stays silent, and keeps the channel.
            let Ok(mut origin) = TcpStream::connect(target).await else {
                tokio::time::sleep(Duration::from_secs(3600)).await;
                drop(channel);
                return;
            };
            let mut stream = channel.into_stream();
            let (mut from_node, mut to_node) = tokio::io::split(&mut stream);
            let (mut from_origin, mut to_origin) = origin.split();
            // Whichever way ends first ends both: an early EOF drops the response.
            tokio::select! {
                _ = tokio::io::copy(&mut from_node, &mut to_origin) => {}
                _ = tokio::io::copy(&mut from_origin, &mut to_node) => {}
            }
            let _ = stream.shutdown().await;
        });
        Ok(())
    }
}

/// A node, an account, and a key such as the client makes for each run.
async fn scene(opts: NodeOpts) -> (Node, Caller, Key, tempfile::TempDir) {
    let node = Node::with(opts).await;
    let ann = Caller::signed_up(&node, "ann", None).await;
    let dir = tempfile::tempdir().unwrap();
    let key = Key::new(dir.path(), "ecdsa");
    (node, ann, key, dir)
}

async fn served(client: &GoClient, times: usize) {
    eventually("all steps of the client", async || (client.met.served.load(Ordering::Relaxed) >= times).then_some(()))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_go_client_is_given_all_that_it_needs() {
    let (node, ann, key, _dir) = scene(opts()).await;
    let (origin, raw) = (Origin::http().await, Origin::raw().await);
    let socket = ann.ok("POST", "/connect", &json!({"name": "web"})).await;
    let client = Job::new(&node, &ann, &socket, &socket["tunnels"][0], origin.addr, &key).start();
    served(&client, 1).await;
    let name = text(&socket, "dnsname");
    let long = "x".repeat(100);
    let (status, body) = curl(&node, &[&format!("https://{name}:8443/?{long}")]).await;
    assert_eq!((status, body.as_str()), (200, "hello from the origin\n"));

    // The forward is echoed as it was asked for, the visitor is an address with a port.
    let port = u32::try_from(socket["tunnels"][0]["local_port"].as_u64().unwrap()).unwrap();
    let announced = client.met.announced.lock().unwrap()[0].clone();
    assert_eq!(announced.bound, ("127.0.0.1".to_owned(), port));
    assert!(announced.from.0 == "127.0.0.1" && announced.from.1 != 0, "{announced:?}");
    // Nothing is really bound there.
    let relay = SocketAddr::new(node.ip, u16::try_from(port).unwrap());
    assert!(TcpStream::connect(relay).await.is_err());
    // A line of its log is one line, whatever its terminal's size.
    let shown = eventually("the visit in its terminal", async || {
        let terminal = client.met.terminal.lock().unwrap().clone();
        terminal.lines().find(|line| line.contains(&long)).map(str::to_owned)
    })
    .await;
    assert!(shown.contains(&format!("GET {name}/?{long} 200")), "{shown:?}");
    assert!(client.met.terminal.lock().unwrap().replace("\r\n", "").find(['\r', '\n']).is_none());

    // More than its window of 2 MiB goes up, and down.
    let tcp = ann.ok("POST", "/connect", &json!({"name": "raw", "socket_type": "tcp"})).await;
    let second = Job { says: OF_2022, ..Job::new(&node, &ann, &tcp, &tcp["tunnels"][0], raw.addr, &key) }.start();
    served(&second, 1).await;
    let addr = SocketAddr::new(node.ip, u16::try_from(tcp["socket_tcp_ports"][0].as_u64().unwrap()).unwrap());
    let n = 5 << 20;
    let mut visitor = TcpStream::connect(addr).await.unwrap();
    visitor.write_all(format!("UP {n}\n").as_bytes()).await.unwrap();
    within(DEADLINE, "an upload", Pattern::write(n, &mut visitor)).await.unwrap();
    let mut said = String::new();
    // The visitor's FIN stays here until the answer is over, or the client drops it.
    visitor.shutdown().await.unwrap();
    within(DEADLINE, "its answer", visitor.read_to_string(&mut said)).await.unwrap();
    assert_eq!(said, format!("exact {n}\n"));
    let mut visitor = TcpStream::connect(addr).await.unwrap();
    visitor.write_all(format!("DOWN {n}\n").as_bytes()).await.unwrap();
    visitor.shutdown().await.unwrap();
    assert_eq!(within(DEADLINE, "a download", Pattern::read(None, &mut visitor)).await, Ok(n));
    assert!(second.met.announced.lock().unwrap().iter().all(|one| one.bound.0 == "localhost"));
    for client in [&client, &second] {
        assert_eq!(client.met.dialed.load(Ordering::Relaxed), 1, "it never had to come again");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_go_client_comes_back_after_a_second_and_the_other_serves_meanwhile() {
    let (mut node, ann, key, _dir) = scene(opts()).await;
    let origin = Origin::http().await;
    let socket = ann.ok("POST", "/connect", &json!({"name": "web"})).await;
    let job = Job::new(&node, &ann, &socket, &socket["tunnels"][0], origin.addr, &key);
    let first = job.clone().start();
    served(&first, 1).await;
    let second = job.start();
    served(&second, 1).await;
    let url = format!("https://{}:8443/", text(&socket, "dnsname"));
    assert_eq!(curl(&node, &[&url]).await.0, 200);
    assert_eq!(second.met.announced.lock().unwrap().len(), 1, "the latest login serves");
    // Gone without a word: the standby serves at once.
    drop(second);
    assert_eq!(curl(&node, &[&url]).await.0, 200);
    assert_eq!(first.met.announced.lock().unwrap().len(), 1);
    // The node goes and comes; so does the client, each second.
    node.restart().await;
    served(&first, 2).await;
    assert_eq!(curl(&node, &[&url]).await.0, 200);
    // Its tunnel is removed: it is refused, and asks again each second, for ever.
    let socket_path = format!("/socket/{}", text(&socket, "socket_id"));
    assert_eq!(ann.status("DELETE", &socket_path, &Value::Null).await, 204);
    node.restart().await;
    let before = first.met.dialed.load(Ordering::Relaxed);
    eventually("three more tries", async || (first.met.dialed.load(Ordering::Relaxed) >= before + 3).then_some(()))
        .await;
    assert_eq!(first.met.served.load(Ordering::Relaxed), 2);
    let at = first.met.at.lock().unwrap().clone();
    assert!(at.windows(2).all(|pair| pair[1] - pair[0] >= Duration::from_secs(1)));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_origin_that_is_down_behind_the_go_client_is_told_in_time() {
    let (node, ann, key, _dir) = scene(opts().set("http", "first_byte = \"2s\"")).await;
    let socket = ann.ok("POST", "/connect", &json!({"name": "web"})).await;
    let client = Job::new(&node, &ann, &socket, &socket["tunnels"][0], Origin::refusing().await, &key).start();
    served(&client, 1).await;
    let begun = Instant::now();
    let (status, _) = curl(&node, &[&format!("https://{}:8443/", text(&socket, "dnsname"))]).await;
    assert!(status == 504 && begun.elapsed() < Duration::from_secs(10), "{status} in {:?}", begun.elapsed());
    // The silence of an origin is no reason to lose the client.
    assert_eq!(client.met.dialed.load(Ordering::Relaxed), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_early_client_finds_the_key_of_its_account_among_ten() {
    let node = Node::with(opts().set("ssh", "allow_sha1_rsa = true")).await;
    let dir = tempfile::tempdir().unwrap();
    let rsa = Key::new(dir.path(), "rsa");
    let ann = Caller::signed_up(&node, "ann", Some(&rsa)).await;
    let origin = Origin::http().await;
    let socket = ann.ok("POST", "/connect", &json!({"name": "web"})).await;
    let met = Arc::<Met>::default();
    let handler = Emulator { met: Arc::clone(&met), target: origin.addr, bound: OF_2021.1 };
    let mut handle = client::connect(Arc::new(algorithms_of_2021(OF_2021.0)), node.addr("ssh"), handler).await.unwrap();
    assert!(!handle.authenticate_none(ann.user.clone()).await.unwrap().success());
    for _ in 0..9 {
        let other = load_secret_key(&Key::new(dir.path(), "ed25519").path, None).unwrap();
        let other = PrivateKeyWithHashAlg::new(Arc::new(other), None);
        assert!(!handle.authenticate_publickey(ann.user.clone(), other).await.unwrap().success());
    }
    // Go signed by ssh-rsa alone: SHA-1.
    let key = PrivateKeyWithHashAlg::new(Arc::new(load_secret_key(&rsa.path, None).unwrap()), None);
    assert!(handle.authenticate_publickey(ann.user.clone(), key).await.unwrap().success());
    let job = Job::new(&node, &ann, &socket, &socket["tunnels"][0], origin.addr, &Key::new(dir.path(), "ecdsa"));
    let served_by = tokio::spawn({
        let met = Arc::clone(&met);
        async move { job.serve(handle, &met).await }
    });
    eventually("all steps of the client", async || (met.served.load(Ordering::Relaxed) == 1).then_some(())).await;
    assert_eq!(curl(&node, &[&format!("https://{}:8443/", text(&socket, "dnsname"))]).await.0, 200);
    served_by.abort();

    // Elsewhere SHA-1 is not good enough, whatever the key.
    let strict = Node::with(opts()).await;
    let bob = Caller::signed_up(&strict, "bob", Some(&rsa)).await;
    bob.ok("POST", "/connect", &json!({"name": "web"})).await;
    let handler = Emulator { met, target: origin.addr, bound: OF_2021.1 };
    let config = Arc::new(algorithms_of_2021(OF_2021.0));
    let mut handle = client::connect(config, strict.addr("ssh"), handler).await.unwrap();
    let key = PrivateKeyWithHashAlg::new(Arc::new(load_secret_key(&rsa.path, None).unwrap()), None);
    assert!(!handle.authenticate_publickey(bob.user.clone(), key).await.unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn two_go_clients_on_one_tunnel_never_flap_and_lose_no_visitor() {
    let (node, ann, key, _dir) = scene(opts()).await;
    let origin = Origin::http().await;
    let socket = ann.ok("POST", "/connect", &json!({"name": "web"})).await;
    let job = Job::new(&node, &ann, &socket, &socket["tunnels"][0], origin.addr, &key);
    let clients = [job.clone().start(), job.start()];
    for client in &clients {
        served(client, 1).await;
    }
    let until = Instant::now() + Duration::from_secs(60);
    let name = text(&socket, "dnsname");
    let visitors = (0..4).map(|visitor| {
        let (node, name) = (&node, name);
        async move {
            let mut served = 0;
            while Instant::now() < until {
                // A new connection each time, and one kept for some.
                let mut sender = h2(node, name).await;
                for _ in 0..20 {
                    get_exact(
                        &mut sender,
                        &format!("https://{name}/bytes/{}", 1000 * (visitor + 1)),
                        1000 * (visitor + 1),
                    )
                    .await;
                    served += 1;
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
            served
        }
    });
    let served: Vec<u64> = futures_util::future::join_all(visitors).await;
    assert!(served.iter().all(|count| *count > 100), "{served:?}");
    for client in &clients {
        assert_eq!(client.met.dialed.load(Ordering::Relaxed), 1, "a client had to come again");
    }
    eprintln!("{} visits served, none lost", served.iter().sum::<u64>());
}
