//! A provider on loopback that answers what a test puts there, and remembers what it
//! was asked; and keys to sign tokens with.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{
    self, ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair,
};
use data_encoding::BASE64URL_NOPAD;
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::HeaderMap;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::Notify;

/// What is answered at a path.
#[derive(Clone)]
pub(super) enum Answer {
    Json(Value),
    /// A status, a field, a body.
    Raw(u16, (&'static str, String), Vec<u8>),
    /// Reads the request and says nothing.
    Silent,
    /// Reads the request and closes.
    Lost,
}

/// A request as it came.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    pub(super) method: String,
    pub(super) path: String,
    pub(super) query: String,
    pub(super) headers: HeaderMap,
    pub(super) body: String,
}

#[derive(Default)]
struct State {
    /// The last one of a path stays.
    answers: Mutex<HashMap<String, VecDeque<Answer>>>,
    seen: Mutex<Vec<Seen>>,
    came: Notify,
}

pub(super) struct Fake {
    pub(super) address: std::net::SocketAddr,
    /// Without a slash at its end.
    pub(super) url: String,
    state: Arc<State>,
}

impl Fake {
    pub(super) async fn new() -> Self {
        Self::over(None).await
    }

    /// Speaks TLS, if given.
    pub(super) async fn over(tls: Option<tokio_rustls::TlsAcceptor>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::<State>::default();
        let serving = Arc::clone(&state);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (state, tls) = (Arc::clone(&serving), tls.clone());
                tokio::spawn(async move {
                    match tls {
                        None => serve(stream, state).await,
                        Some(tls) => {
                            if let Ok(stream) = tls.accept(stream).await {
                                serve(stream, state).await;
                            }
                        }
                    }
                });
            }
        });
        Self { address, url: format!("http://{address}"), state }
    }

    /// From now on, this at a path.
    pub(super) fn answer(&self, path: &str, answer: Answer) {
        self.state.answers.lock().insert(path.to_owned(), VecDeque::from([answer]));
    }

    pub(super) fn json(&self, path: &str, json: Value) {
        self.answer(path, Answer::Json(json));
    }

    /// What came for a path.
    pub(super) fn seen(&self, path: &str) -> Vec<Seen> {
        self.state.seen.lock().iter().filter(|seen| seen.path == path).cloned().collect()
    }

    pub(super) fn count(&self, path: &str) -> usize {
        self.seen(path).len()
    }

    /// When so many have come for a path.
    pub(super) async fn asked(&self, path: &str, times: usize) {
        while self.count(path) < times {
            self.state.came.notified().await;
        }
    }
}

async fn serve<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(stream: S, state: Arc<State>) {
    let service = hyper::service::service_fn(move |request| answer(request, Arc::clone(&state)));
    let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}

async fn answer(request: Request<Incoming>, state: Arc<State>) -> Result<Response<Full<Bytes>>, std::io::Error> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.map_err(std::io::Error::other)?.to_bytes();
    let path = head.uri.path().to_owned();
    state.seen.lock().push(Seen {
        method: head.method.to_string(),
        path: path.clone(),
        query: head.uri.query().unwrap_or_default().to_owned(),
        headers: head.headers,
        body: String::from_utf8(body.to_vec()).unwrap(),
    });
    state.came.notify_one();
    let found = {
        let mut answers = state.answers.lock();
        answers.get_mut(&path).and_then(|all| if all.len() > 1 { all.pop_front() } else { all.front().cloned() })
    };
    match found {
        Some(Answer::Json(json)) => {
            Ok(Response::builder().header("content-type", "application/json").body(json.to_string().into()).unwrap())
        }
        Some(Answer::Raw(status, (name, value), body)) => {
            Ok(Response::builder().status(status).header(name, value).body(body.into()).unwrap())
        }
        Some(Answer::Silent) => std::future::pending().await,
        Some(Answer::Lost) => Err(std::io::Error::other("lost")),
        None => Ok(Response::builder().status(404).body(Full::default()).unwrap()),
    }
}

/// A key of a provider.
pub(super) enum Key {
    Ed25519(Ed25519KeyPair),
    P256(EcdsaKeyPair),
    P384(EcdsaKeyPair),
    Rsa(signature::RsaKeyPair),
}

fn b64(bytes: &[u8]) -> String {
    BASE64URL_NOPAD.encode(bytes)
}

impl Key {
    pub(super) fn ed25519() -> Self {
        Self::Ed25519(Ed25519KeyPair::generate().unwrap())
    }

    pub(super) fn p256() -> Self {
        Self::P256(EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap())
    }

    pub(super) fn p384() -> Self {
        Self::P384(EcdsaKeyPair::generate(&ECDSA_P384_SHA384_FIXED_SIGNING).unwrap())
    }

    pub(super) fn rsa() -> Self {
        Self::Rsa(signature::RsaKeyPair::generate(aws_lc_rs::rsa::KeySize::Rsa2048).unwrap())
    }

    /// As a JSON Web Key.
    pub(super) fn public(&self, kid: &str) -> Value {
        let ec = |key: &EcdsaKeyPair, curve: &str| {
            let (x, y) = key.public_key().as_ref()[1..].split_at((key.public_key().as_ref().len() - 1) / 2);
            json!({"kty": "EC", "crv": curve, "x": b64(x), "y": b64(y), "use": "sig", "kid": kid})
        };
        match self {
            Self::Ed25519(key) => {
                json!({"kty": "OKP", "crv": "Ed25519", "x": b64(key.public_key().as_ref()), "use": "sig", "kid": kid})
            }
            Self::P256(key) => ec(key, "P-256"),
            Self::P384(key) => ec(key, "P-384"),
            Self::Rsa(key) => {
                // RSAPublicKey of 2048 bits in DER: a sequence of two integers, the
                // first with a zero before it.
                let der = key.public_key().as_ref();
                assert_eq!(der[4..9], [0x02, 0x82, 0x01, 0x01, 0x00]);
                json!({"kty": "RSA", "n": b64(&der[9..9 + 256]), "e": "AQAB", "use": "sig", "kid": kid})
            }
        }
    }

    pub(super) fn algorithm(&self) -> &'static str {
        match self {
            Self::Ed25519(_) => "EdDSA",
            Self::P256(_) => "ES256",
            Self::P384(_) => "ES384",
            Self::Rsa(_) => "RS256",
        }
    }

    fn sign(&self, algorithm: &str, message: &[u8]) -> Vec<u8> {
        let random = SystemRandom::new();
        match self {
            Self::Ed25519(key) => key.sign(message).as_ref().to_vec(),
            Self::P256(key) | Self::P384(key) => key.sign(&random, message).unwrap().as_ref().to_vec(),
            Self::Rsa(key) => {
                let padding: &dyn signature::RsaEncoding = match algorithm {
                    "RS512" => &signature::RSA_PKCS1_SHA512,
                    "PS256" => &signature::RSA_PSS_SHA256,
                    _ => &signature::RSA_PKCS1_SHA256,
                };
                let mut made = vec![0; key.public_modulus_len()];
                key.sign(padding, &random, message, &mut made).unwrap();
                made
            }
        }
    }

    /// A token with this head and these claims.
    pub(super) fn token(&self, head: &Value, claims: &Value) -> String {
        let signed = format!("{}.{}", b64(head.to_string().as_bytes()), b64(claims.to_string().as_bytes()));
        let signature = self.sign(head["alg"].as_str().unwrap(), signed.as_bytes());
        format!("{signed}.{}", b64(&signature))
    }
}

/// A token signed by a shared secret.
pub(super) fn hs256(secret: &str, head: &Value, claims: &Value) -> String {
    use aws_lc_rs::hmac;
    let signed = format!("{}.{}", b64(head.to_string().as_bytes()), b64(claims.to_string().as_bytes()));
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes()), signed.as_bytes());
    format!("{signed}.{}", b64(tag.as_ref()))
}

/// A token signed by nobody.
pub(super) fn unsigned(claims: &Value) -> String {
    format!("{}.{}.", b64(br#"{"alg":"none"}"#), b64(claims.to_string().as_bytes()))
}
