//! The door from both sides: visitors who open ways, and a client of our own
//! making that answers as it likes.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use russh::client::{self, ChannelOpenHandle, Msg};
use russh::keys::{PrivateKey, PublicKeyOrCertificate, ssh_key};
use russh::{Channel, ChannelMsg, SshId};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::*;
use crate::feed::Feed;
use crate::feed::follower::{Follower, prefixes};
use crate::feed::records::RecordSettings;
use crate::feed::store::{Store, StoreSettings};
use crate::fields::PortRange;
use crate::tls::Certificates;

const SOON: Duration = Duration::from_secs(10);

struct Door {
    tunnels: Arc<Tunnels>,
    addr: SocketAddr,
}

impl Door {
    async fn open(settings: SshSettings) -> Self {
        let settings = SshSettings { mode: Mode::Open, ..settings };
        let (tasks, ports) = (TaskTracker::new(), PortRange { first: 20000, last: 20099 });
        let feed: Arc<dyn Feed> = Store::in_memory(StoreSettings::default()).unwrap();
        let routes = Arc::new(Routes::default());
        let tls = crate::config::Config::default().tls;
        let certificates = Arc::new(Certificates::new(&tls).unwrap());
        let events = feed.subscribe(&prefixes(), None);
        let (follower, following) = Follower::new(events, Arc::clone(&routes), certificates, Arc::default());
        tasks.spawn(follower.run(CancellationToken::new()));
        let domain = Some("edge.test".to_owned());
        let knobs = RecordSettings { ports, domain: Some("edge.test".parse().unwrap()), reserved: Vec::new() };
        let parts = Parts {
            routes,
            records: Arc::new(Records::new(Arc::clone(&feed), knobs)),
            feed,
            applied: following.revisions(),
            port_trouble: Box::new(|_| None),
            urls: Urls { domain, host: "edge.test".to_owned(), http_port: Some(80), https_port: None, ports },
            name_key: [7; 32],
            tasks: tasks.clone(),
            exempt_loopback: true,
        };
        let tunnels = Tunnels::new(settings, parts).unwrap();
        let pair = ssh_key::private::Ed25519Keypair::from_seed(&[1; 32]);
        let server = Arc::new(Server::new(Arc::clone(&tunnels), &[PrivateKey::from(pair)]).unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((tcp, peer)) = listener.accept().await {
                tasks.spawn(Arc::clone(&server).serve(tcp, bytes::Bytes::new(), peer));
            }
        });
        Self { tunnels, addr }
    }

    /// A client that serves `web`, logged in without a key.
    async fn client(&self, id: &'static str, tcp: TcpStream) -> Client {
        let config = client::Config { client_id: SshId::Standard(Cow::Borrowed(id)), ..client::Config::default() };
        let (opened, channels) = mpsc::unbounded_channel();
        let login = async {
            let mut handle = client::connect_stream(Arc::new(config), tcp, Opened(opened)).await.unwrap();
            handle.authenticate_keyboard_interactive_start("u", None).await.unwrap();
            handle.tcpip_forward("web", 80).await.unwrap();
            Client { handle, channels }
        };
        timeout(SOON, login).await.unwrap()
    }

    async fn usual_client(&self) -> Client {
        let tcp = TcpStream::connect(self.addr).await.unwrap();
        self.client("SSH-2.0-test", tcp).await
    }

    fn candidate(&self) -> Arc<Attachment> {
        self.tunnels.candidates(&"web".parse().unwrap()).remove(0)
    }
}

fn visitor() -> Visitor {
    Visitor::new("192.0.2.1:4000".parse().unwrap(), "192.0.2.2:80".parse().unwrap())
}

struct Client {
    handle: client::Handle<Opened>,
    channels: mpsc::UnboundedReceiver<Channel<Msg>>,
}

struct Opened(mpsc::UnboundedSender<Channel<Msg>>);

impl client::Handler for Opened {
    type Error = russh::Error;

    async fn check_server_key(&mut self, _: &PublicKeyOrCertificate) -> Result<bool, Self::Error> {
        Ok(true)
    }

    async fn server_channel_open_forwarded_tcpip(
        &mut self,
        channel: Channel<Msg>,
        _: &str,
        _: u32,
        _: &str,
        _: u32,
        reply: ChannelOpenHandle,
        _: &mut client::Session,
    ) -> Result<(), Self::Error> {
        reply.accept().await;
        let _ = self.0.send(channel);
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_way_that_opened_for_a_caller_who_left_is_closed() {
    let door = Door::open(SshSettings::default()).await;
    let mut client = door.usual_client().await;
    let (attachment, visitor) = (door.candidate(), visitor());
    let mut open = Box::pin(door.tunnels.open(&attachment, &visitor));
    // Asked for, and then answered while nobody looks, as where another tunnel
    // was faster.
    let early = open.as_mut().now_or_never();
    let mut channel = timeout(SOON, client.channels.recv()).await.unwrap().unwrap();
    sleep(Duration::from_millis(300)).await;
    // On a busy machine the answer may even have come within that one look.
    drop(early);
    drop(open);
    let closed = async {
        while let Some(message) = channel.wait().await {
            if matches!(message, ChannelMsg::Close) {
                return;
            }
        }
    };
    timeout(SOON, closed).await.expect("the channel stays open");
    let released = async {
        while attachment.session.channels() > 0 {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(SOON, released).await.expect("its place is not given back");
}

#[tokio::test(flavor = "multi_thread")]
async fn gos_client_keeps_the_answer_however_late_its_banner_comes() {
    let door = Door::open(SshSettings::default()).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (mut link, _) = listener.accept().await.unwrap();
    let addr = door.addr;
    tokio::spawn(async move {
        let mut far = TcpStream::connect(addr).await.unwrap();
        sleep(Duration::from_millis(400)).await;
        tokio::io::copy_bidirectional(&mut link, &mut far).await
    });
    let mut client = door.client("SSH-2.0-Go", near).await;
    let (attachment, visitor) = (door.candidate(), visitor());
    let mut stream = door.tunnels.open(&attachment, &visitor).await.unwrap();
    let mut channel = timeout(SOON, client.channels.recv()).await.unwrap().unwrap();
    stream.write_all(b"question").await.unwrap();
    stream.shutdown().await.unwrap();
    let told = async {
        loop {
            match channel.wait().await {
                Some(ChannelMsg::Data { .. }) => {}
                other => return other,
            }
        }
    };
    let told = timeout(Duration::from_millis(500), told).await;
    assert!(told.is_err(), "told of the visitor's end before the answer: {told:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_consoles_of_one_session_are_few() {
    let door = Door::open(SshSettings::default()).await;
    let client = door.usual_client().await;
    let (mut shown, mut refused) = (Vec::new(), 0);
    for _ in 0..20 {
        let asked = async {
            let mut channel = client.handle.channel_open_session().await.ok()?;
            channel.request_shell(true).await.ok()?;
            while let Some(message) = channel.wait().await {
                match message {
                    ChannelMsg::Success => return Some(channel),
                    ChannelMsg::Failure | ChannelMsg::Close => return None,
                    _ => {}
                }
            }
            None
        };
        match timeout(SOON, asked).await.unwrap() {
            Some(channel) => shown.push(channel),
            None => refused += 1,
        }
    }
    assert!((1..=4).contains(&shown.len()) && refused == 20 - shown.len(), "{} consoles", shown.len());
}
