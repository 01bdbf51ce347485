//! The origins: a thread that does what each visitor's order says (a letter and a
//! number of 8 bytes), and serves the web: `GET /bytes/N`, `POST /check`, `POST /hold`.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::Duration;

use http_body_util::{Either, Full};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::Outcome;
use crate::pattern::{CHUNK, Pattern};
use crate::web::{HOLD, Sent, came, verdict};

/// What a visitor wants of the origin.
#[derive(Debug, Clone, Copy)]
pub enum Order {
    /// So many bytes of the pattern, which goes on from order to order.
    Send(u64),
    /// Check all that comes as the pattern; then say how much it was.
    Check,
    /// Everything back.
    Echo,
    /// Read nothing for so many seconds.
    Hold(u64),
}

impl Order {
    /// As it is sent.
    pub fn bytes(self) -> [u8; 9] {
        let (letter, number) = match self {
            Order::Send(n) => (b's', n),
            Order::Check => (b'c', 0),
            Order::Echo => (b'e', 0),
            Order::Hold(n) => (b'h', n),
        };
        let mut bytes = [letter; 9];
        bytes[1..].copy_from_slice(&number.to_be_bytes());
        bytes
    }

    fn read(letter: u8, number: u64) -> Outcome<Self> {
        match letter {
            b's' => Ok(Order::Send(number)),
            b'c' => Ok(Order::Check),
            b'e' => Ok(Order::Echo),
            b'h' => Ok(Order::Hold(number)),
            other => Err(format!("no order: {other}").into()),
        }
    }
}

/// Where they are reached.
#[derive(Debug, Clone, Copy)]
pub struct Origins {
    pub orders: SocketAddr,
    /// HTTP/1.1.
    pub web: SocketAddr,
}

/// Starts them; they end with the process.
pub fn start() -> Origins {
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async move {
            let orders = TcpListener::bind("127.0.0.1:6000").await.unwrap();
            let web = TcpListener::bind("127.0.0.1:6001").await.unwrap();
            let [a, b] = [&orders, &web].map(|listener| listener.local_addr().unwrap());
            tell.send(Origins { orders: a, web: b }).unwrap();
            // Who breaks off, knows; wrong bytes are told in the answer.
            tokio::join!(
                each(orders, |tcp| async { serve(tcp).await.ok() }),
                each(web, |tcp| async {
                    http1::Builder::new().serve_connection(TokioIo::new(tcp), service_fn(answer)).await.ok()
                }),
            )
        })
    });
    told.recv().unwrap()
}

async fn each<F>(listener: TcpListener, visit: impl Fn(TcpStream) -> F)
where
    F: Future<Output = Option<()>> + Send + 'static,
{
    loop {
        let Ok((tcp, _)) = listener.accept().await else { continue };
        if tcp.set_nodelay(true).is_ok() {
            tokio::spawn(visit(tcp));
        }
    }
}

async fn answer(request: Request<Incoming>) -> Result<Response<Either<Sent, Full<Bytes>>>, Infallible> {
    let wanted = request.uri().path().strip_prefix("/bytes/").and_then(|wanted| wanted.parse().ok());
    if request.uri().path() == HOLD {
        // Until somebody breaks it off.
        std::future::pending::<()>().await;
    }
    let (status, body) = match (request.method(), wanted) {
        (&Method::GET, Some(bytes)) => (StatusCode::OK, Either::Left(Sent::new(bytes))),
        (&Method::POST, None) => match came(request.into_body(), u64::MAX, |_| ()).await {
            Ok((bytes, right)) => (StatusCode::OK, Either::Right(Full::from(verdict(bytes, right)))),
            Err(why) => (StatusCode::BAD_REQUEST, Either::Right(Full::from(why.to_string()))),
        },
        _ => (StatusCode::NOT_FOUND, Either::Right(Full::default())),
    };
    let mut answer = Response::new(body);
    *answer.status_mut() = status;
    Ok(answer)
}

async fn serve(mut tcp: TcpStream) -> Outcome<()> {
    let mut sent = Pattern::default();
    while let Ok(letter) = tcp.read_u8().await {
        match Order::read(letter, tcp.read_u64().await?)? {
            Order::Send(n) => {
                let end = sent.len().saturating_add(n);
                while sent.len() < end {
                    let max = usize::try_from(end - sent.len()).unwrap_or(CHUNK);
                    let n = tcp.write(sent.peek(max)).await?;
                    sent.advance(n);
                }
            }
            Order::Check => return check(tcp).await,
            Order::Echo => return echo(tcp).await,
            Order::Hold(seconds) => {
                tokio::time::sleep(Duration::from_secs(seconds)).await;
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Answers with the number of right bytes, and whether there were wrong ones.
async fn check(mut tcp: TcpStream) -> Outcome<()> {
    let mut came = Pattern::default();
    let mut buffer = vec![0; CHUNK];
    let mut wrong = 0;
    loop {
        match tcp.read(&mut buffer).await? {
            0 => break,
            n if came.check(&buffer[..n]).is_err() => wrong = 1,
            _ => {}
        }
    }
    tcp.write_u64(came.len()).await?;
    tcp.write_u8(wrong).await?;
    tcp.shutdown().await?;
    Ok(())
}

async fn echo(mut tcp: TcpStream) -> Outcome<()> {
    let mut buffer = vec![0; 4 << 10];
    loop {
        match tcp.read(&mut buffer).await? {
            0 => return Ok(tcp.shutdown().await?),
            n => tcp.write_all(&buffer[..n]).await?,
        }
    }
}
