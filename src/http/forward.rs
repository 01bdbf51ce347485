//! One request: whom it is for, whether it may pass, the way to the origin and
//! the origin's answer. Every outcome is an answer; the account of the request
//! travels in its body.

use std::future::poll_fn;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Limited};
use hyper::body::{Body as _, Incoming};
use hyper::header::{
    CONNECTION, CONTENT_LENGTH, EXPECT, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY,
    STRICT_TRANSPORT_SECURITY, TRANSFER_ENCODING, UPGRADE,
};
use hyper::http::request::Parts;
use hyper::upgrade::OnUpgrade;
use hyper::{Method, Request, Response, StatusCode, Version};
use tokio::time::Instant;
use tokio_util::sync::DropGuard;

use super::answer::{self, Asker, Form};
use super::body::{Body, Upload};
use super::forwarded::{self, Asked};
use super::framing;
use super::headers::{self, Authority, Rewrite};
use super::origin_tls;
use super::origins::{Key, Origin};
use super::pulse::Pulse;
use super::record::{Record, Tally};
use super::upgrade::Upgrade;
use super::{Connection, Dial, Http, Protocol, websocket};
use crate::dial::{Errand, Way};
use crate::error::{Chain, Error};
use crate::gate::{self, Pass, Verdict};
use crate::metrics::held;
use crate::model::{HostName, SocketType};
use crate::proxy_protocol::{self, Extras};
use crate::routes::{Route, Routes};

/// An answer, and the upgrade that follows it where it is a 101.
struct Answer {
    response: Response<Body>,
    switch: Option<Switch>,
}

/// Both sides' promises to give up their streams.
struct Switch {
    visitor: OnUpgrade,
    origin: OnUpgrade,
    guard: Option<DropGuard>,
    websocket: bool,
}

/// A visitor that wants to switch protocols.
struct Wanted {
    visitor: OnUpgrade,
    /// The key of the handshake that is ours, where the visitor's is that of
    /// HTTP/2 (RFC 8441).
    key: Option<HeaderValue>,
}

impl From<Response<Body>> for Answer {
    fn from(response: Response<Body>) -> Self {
        Self { response, switch: None }
    }
}

/// How a connection to an origin is come by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum By {
    /// A kept one where there is one; for what must not be sent twice none that
    /// has waited.
    Any { repeatable: bool },
    /// A new one.
    Dialing,
}

impl<D: Dial> Http<D> {
    /// Answers one request.
    pub(super) async fn request(
        &self,
        connection: &Arc<Connection>,
        request: Request<Incoming>,
        mut record: Record,
    ) -> Response<Body> {
        let (parts, incoming) = request.into_parts();
        let upload = Upload::new(incoming, Arc::clone(&record.tally), Arc::clone(&connection.pulse));
        let (method, version) = (parts.method.clone(), parts.version);
        let id = forwarded::request_id(&parts.headers);
        record.id = Some(id.clone());
        record.legs.tls = connection.via.tls.as_ref().map(|tls| tls.took);
        let grpc = headers::grpc(&parts.headers).cloned();
        let mut upgrades = parts.headers.get_all(UPGRADE).iter();
        let unguarded = version < Version::HTTP_2 && upgrades.any(|u| framing::may_switch(u.as_bytes()));
        let asker = Asker {
            method: &method,
            version,
            accept: Form::of(&parts.headers),
            html: Form::names_html(&parts.headers),
            grpc: grpc.as_ref(),
            template: &self.template,
            id: &id,
        };
        let mut pass = None;
        let mut answer = match self.answer(connection, &asker, parts, upload, &mut record, &mut pass).await {
            Ok(answer) => answer,
            Err(error) => {
                record.tally.fail(error);
                answer::failed(&asker, error).into()
            }
        };
        if let Some(hsts) = record.route.as_ref().and_then(|route| route.socket.hsts.as_ref())
            && connection.via.tls.is_some()
        {
            answer.response.headers_mut().entry(STRICT_TRANSPORT_SECURITY).or_insert_with(|| hsts.value().clone());
        }
        let held = pass.map(|pass: Pass| {
            pass.answered(answer.response.headers_mut());
            pass.held
        });
        if unguarded && answer.switch.is_none() {
            answer.response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        record.status = Some(answer.response.status().as_u16());
        let pulse = &connection.pulse;
        pulse.answers();
        match answer.switch {
            Some(Switch { visitor, origin, guard, websocket }) => {
                let upgrade = Upgrade { visitor, origin, guard, websocket, record, held };
                match version {
                    Version::HTTP_2 => {
                        let (drain, cut) = (connection.drain.clone(), connection.cut.clone());
                        self.tracker.spawn(upgrade.run(None, self.settings.upgrade_idle, drain, cut));
                    }
                    _ => pulse.set_upgrade(upgrade),
                }
                answer.response
            }
            None => answer.response.map(|body| {
                // HTTP/1.0 has no chunks: there the connection's end is the body's.
                let framed = version != Version::HTTP_10 || body.size_hint().exact().is_some();
                let body = if framed { body } else { body.unframed(Arc::clone(pulse)) };
                let body = if grpc.is_some() && version == Version::HTTP_2 { body.grpc() } else { body };
                match held {
                    Some(held) if !body.is_end_stream() => body.accounted(record).held(held),
                    _ => body.accounted(record),
                }
            }),
        }
    }

    async fn answer(
        &self,
        connection: &Arc<Connection>,
        asker: &Asker<'_>,
        mut parts: Parts,
        mut upload: Upload,
        record: &mut Record,
        passed: &mut Option<Pass>,
    ) -> Result<Answer, Error> {
        let tunnelled = parts.method == Method::CONNECT
            && parts
                .extensions
                .get::<hyper::ext::Protocol>()
                .is_some_and(|p| p.as_str().eq_ignore_ascii_case("websocket"));
        if parts.method == Method::CONNECT && !tunnelled {
            record.tally.fail(Error::BadRequest);
            return Ok(answer::no_connect(asker).into());
        }
        headers::check_count(parts.version, &parts.headers, self.settings.headers_max)?;
        headers::check_framing(parts.version, &parts.headers)?;
        let target = headers::origin_target(&parts.method, &parts.uri)?;
        let authority = headers::authority(parts.version, &parts.method, &parts.uri, &parts.headers)?;
        let Authority { text: authority, host } = authority.ok_or(Error::NoSocket)?;
        record.host.clone_from(&host);
        let route = self.route(connection, &host)?;
        record.route.clone_from(&route);
        let secure = connection.via.tls.is_some();
        let asked = Asked::of(&parts.headers, &connection.visitor, secure, &self.settings.trusted_peers);
        if let Some(ip) = asked.instead_of_peer() {
            record.visitor.addr.set_ip(ip);
        }
        if route.as_ref().is_some_and(|route| route.socket.redirect_https) && !asked.secure {
            return Ok(answer::redirect(asker, &host, self.settings.public_https_port, &target.to_string()).into());
        }
        if let Some(own) = self.own.get().filter(|own| route.is_none() && own.has(&host)) {
            if !asked.secure {
                return Ok(answer::redirect(asker, &host, self.settings.public_https_port, &target.to_string()).into());
            }
            parts.uri = target;
            let answered = Box::pin(own.answer(parts, upload, record.visitor.ip()));
            return Ok(answer::gate(asker, answered.await?).into());
        }
        let gate = gate::Asked {
            route: route.as_ref(),
            host: &host,
            authority: &authority,
            method: &parts.method,
            target: &target,
            headers: &parts.headers,
            ip: record.visitor.ip(),
            secure: asked.secure,
            upgrade: tunnelled || parts.headers.contains_key(UPGRADE),
            empty: upload.is_end_stream(),
            id: asker.id,
        };
        let verdict = match self.gates.is_ours(&gate) {
            // Boxed, as all that is rare: a request's state is moved about as a whole.
            true => {
                let form = Box::pin(form(&parts.method, &mut upload)).await?;
                Box::pin(self.gates.serve(&gate, &form)).await
            }
            false => self.gates.admit(&gate).await,
        };
        let pass = match verdict {
            Verdict::Passes(pass) => passed.insert(pass),
            Verdict::Answers(reply) => return Ok(answer::gate(asker, reply).into()),
            Verdict::Refuses { error, headers } => {
                record.tally.fail(error);
                return Ok(answer::refused(asker, error, headers).into());
            }
        };
        let Some(route) = route else { return Err(Error::NoSocket) };
        let mut protocol = match tunnelled {
            true => Some(HeaderValue::from_static("websocket")),
            false => headers::wanted_upgrade(parts.version, &parts.method, &parts.headers),
        };
        protocol = protocol.filter(|_| upload.is_end_stream());
        let visitor_side = protocol.is_some().then(|| parts.extensions.remove::<OnUpgrade>()).flatten();
        let key = tunnelled.then(websocket::new_key);
        // Before anything is added: there is less to look through.
        self.gates.strip(pass, &mut parts.headers);
        headers::rewrite_request(
            &mut parts.headers,
            &Rewrite {
                peer: &connection.visitor,
                asked: &asked,
                version: parts.version,
                authority: &authority,
                host: route.socket.upstream.host.as_deref().unwrap_or(&authority),
                id: asker.id,
                upgrade: protocol.filter(|_| visitor_side.is_some()),
                chunked: !upload.is_end_stream() && upload.size_hint().exact().is_none(),
                keep: self.origins.keeps(),
            },
        );
        if upload.is_end_stream() && matches!(parts.method, Method::POST | Method::PUT | Method::PATCH) {
            // RFC 9110 §8.6: some origins refuse these without a length (HTTP/2 needs none).
            parts.headers.entry(CONTENT_LENGTH).or_insert(HeaderValue::from_static("0"));
        }
        self.gates.tell_origin(pass, &mut parts.headers, &host);
        route.socket.request_headers.apply(&mut parts.headers);
        if let Some(key) = &key {
            parts.method = Method::GET;
            parts.headers.insert(SEC_WEBSOCKET_KEY, key.clone());
        }
        let wanted = visitor_side.map(|visitor| Wanted { visitor, key });
        let mut request = Request::new(upload);
        *request.method_mut() = parts.method;
        *request.uri_mut() = target;
        *request.headers_mut() = parts.headers;
        let http2 = route.socket.upstream.http2;
        self.hear_interim(&mut request, parts.version, http2, &connection.pulse);

        tokio::select! {
            biased;
            forwarded = self.forward(connection, &route, &host, request, wanted, record) => forwarded,
            () = poll_fn(|cx| pass.held.poll_cut(cx)) => Err(Error::GateClosed),
        }
    }

    /// The socket that a request for `host` on this connection reaches; none: a
    /// host of the node's own. What is not reachable here answers as what does
    /// not exist.
    fn route(&self, connection: &Arc<Connection>, host: &str) -> Result<Option<Arc<Route>>, Error> {
        if let Some(tls) = &connection.via.tls
            && !Routes::same_name(tls.sni.as_ref(), host)
            && !(tls.covers)(host)
        {
            return Err(Error::Misdirected);
        }
        if self.is_own_host(host) {
            return Ok(None);
        }
        let route = self.routes.by_host(host);
        let route = route.filter(|r| matches!(r.socket.kind, SocketType::Http | SocketType::Https));
        route.map(Some).ok_or(Error::NoSocket)
    }

    /// Leaves it to the origin to ask for an announced body, where the visitor
    /// can be told so, and passes other interim answers on.
    fn hear_interim(&self, request: &mut Request<Upload>, version: Version, http2: bool, pulse: &Arc<Pulse>) {
        let expects = headers::names(request.headers(), EXPECT, "100-continue");
        // hyper has no way to say 1xx over HTTP/2, or to hear it; HTTP/1.0 does not know it.
        let deaf = version != Version::HTTP_11 || http2;
        if expects && (deaf || request.body().is_end_stream()) {
            request.headers_mut().remove(EXPECT);
        }
        if deaf {
            return;
        }
        let announced = request.headers().contains_key(EXPECT);
        let announced = announced.then(|| request.body_mut().hold(self.settings.continue_wait));
        let pulse = Arc::clone(pulse);
        hyper::ext::on_informational(request, move |interim| match (interim.status(), &announced) {
            (StatusCode::CONTINUE, Some(announced)) => announced.wanted(),
            (StatusCode::CONTINUE, None) => {}
            (status, _) => pulse.interim(&headers::interim(status, interim.headers())),
        });
    }

    /// A connection to the origin, kept or new.
    async fn connect(
        &self,
        connection: &Connection,
        route: &Arc<Route>,
        host: &str,
        (by, http2): (By, bool),
        record: &mut Record,
    ) -> Result<(Origin, Option<D::Way>), Error> {
        let ways = self.dialer.ways(route, record.visitor.ip());
        let first = ways.first().ok_or(Error::NoTunnel)?;
        let tls = match route.socket.kind {
            SocketType::Https => {
                Some((origin_tls::server_name(&route.socket, host)?, route.socket.upstream.tls.verify))
            }
            _ => None,
        };
        let key = Key { way: first.id(), tls, http2 };
        let mut _turn = None;
        if let By::Any { repeatable } = by {
            let own = connection.own.lock().take_if(|own| own.reaches(ways.iter().map(|way| way.id()), &key));
            // A connection that says who its visitor is serves no other.
            let private = route.socket.proxy_protocol.is_some();
            let mut kept = own.or_else(|| if private { None } else { self.origins.take(&key, repeatable) });
            if kept.is_none() && http2 && !private {
                _turn = self.origins.turn_to_open(key.way).await;
                kept = self.origins.take(&key, repeatable);
            }
            if let Some(origin) = kept {
                let way = ways.into_iter().find(|way| way.id() == origin.way());
                if let Some(way) = &way {
                    record.goes(way);
                }
                held!(counter: "adit_origin_requests_total", "connection" => "kept").increment(1);
                return Ok((origin, way));
            }
        }
        held!(counter: "adit_origin_requests_total", "connection" => "new").increment(1);
        let (origin, way) = Box::pin(self.dial(connection, route, (ways, key), record)).await?;
        Ok((origin, Some(way)))
    }

    /// A new connection to the origin, by the first of these ways that leads there.
    async fn dial(
        &self,
        connection: &Connection,
        route: &Route,
        (ways, key): (Vec<D::Way>, Key),
        record: &mut Record,
    ) -> Result<(Origin, D::Way), Error> {
        let id = record.id.as_ref().and_then(|id| id.to_str().ok()).unwrap_or_default();
        let errand = Errand { socket: &route.socket.id, visitor: &connection.visitor, id };
        let mut dialed = self.dialer.dial(ways, errand).await?;
        if let Some(version) = route.socket.proxy_protocol {
            let sni = connection.via.tls.as_ref().and_then(|tls| tls.sni.as_ref());
            let extras = Extras {
                alpn: connection.via.tls.as_ref().map(|_| connection.via.protocol.alpn()),
                authority: sni.map(HostName::as_str),
                unique_id: &proxy_protocol::unique_id(),
            };
            proxy_protocol::tell(&mut dialed.stream, version, &record.visitor, extras).await?;
        }
        record.goes(&dialed.way);
        record.legs.tunnel = dialed.took;
        let key = Key { way: dialed.way.id(), ..key };
        let (stream, http2) = match &key.tls {
            Some((name, _)) => self.origin_tls.connect(dialed.stream, &route.socket, name.clone(), key.http2).await?,
            // By prior knowledge (RFC 9113 §3.3).
            None => (dialed.stream, key.http2),
        };
        let private = route.socket.proxy_protocol.is_some();
        let origin = self.origins.handshake(stream, key, http2, private).await?;
        Ok((origin, dialed.way))
    }

    /// Sends the request, twice where the first connection ended under it and
    /// that is safe (RFC 9110 §9.2.2), and makes the origin's answer the visitor's.
    async fn forward(
        &self,
        connection: &Arc<Connection>,
        route: &Arc<Route>,
        host: &str,
        request: Request<Upload>,
        wanted: Option<Wanted>,
        record: &mut Record,
    ) -> Result<Answer, Error> {
        record.place = Some(self.dialer.admit(route)?);
        let (again, announced) = (again(&request), request.body().announced());
        let by = By::Any { repeatable: again.is_some() };
        // An upgrade is HTTP/1.1's alone.
        let http2 = route.socket.upstream.http2 && !request.headers().contains_key(UPGRADE);
        record.routed();
        let (mut origin, way) = self.connect(connection, route, host, (by, http2), record).await?;
        record.dialed();
        // What may not be sent twice waits on: the node may come back.
        let way = way.filter(|_| again.is_some());
        let response = match self.send(&mut origin, request, &record.tally, way.as_ref()).await {
            Ok(response) => response,
            Err((error, unsent)) => {
                // Another node does not say what ended the stream.
                let unsure = origin.reused() || record.node.is_some();
                let ended = (error == Error::OriginReset && unsure) || error == Error::TunnelLost;
                let request = unsent.map(|unsent| *unsent).or(again).filter(|_| ended).ok_or(error)?;
                drop(origin);
                metrics::counter!("adit_origin_retries_total").increment(1);
                let again = async {
                    let (mut origin, _) = self.connect(connection, route, host, (By::Dialing, http2), record).await?;
                    let sent = self.send(&mut origin, request, &record.tally, None).await;
                    sent.map(|response| (origin, response)).map_err(|(error, _)| error)
                };
                let response;
                (origin, response) = Box::pin(again).await?;
                response
            }
        };
        record.answered();
        if announced.is_some_and(|announced| announced.withdraw()) {
            origin.serves_no_more();
        }
        // HTTP/2 streams share a visitor's connection, and so cannot own another.
        let owner = Some(connection).filter(|c| c.via.protocol == Protocol::Http1);
        origin.learn(response.headers(), owner);
        let mut answer = Self::answer_of(origin, response, wanted)?;
        route.socket.response_headers.apply(answer.response.headers_mut());
        Ok(answer)
    }

    /// Makes the origin's answer the visitor's.
    fn answer_of(origin: Origin, mut response: Response<Incoming>, wanted: Option<Wanted>) -> Result<Answer, Error> {
        let received = response.version();
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            // An answer to a question that was not asked would turn what the
            // visitor sends next into whatever the origin takes it for.
            let Wanted { visitor, key } = wanted.ok_or(Error::OriginProtocol)?;
            let origin_side = hyper::upgrade::on(&mut response);
            let (mut head, _) = response.into_parts();
            let protocol = head.headers.get(UPGRADE).cloned().ok_or(Error::OriginProtocol)?;
            let websocket = protocol.as_bytes().eq_ignore_ascii_case(b"websocket");
            headers::rewrite_response(&mut head.headers, received);
            head.headers.remove(CONTENT_LENGTH);
            match key {
                // RFC 8441 §5: what was 101 and an accepted key is 200.
                Some(key) if websocket && websocket::accepts(&head.headers, &key) => {
                    head.status = StatusCode::OK;
                    head.headers.remove(SEC_WEBSOCKET_ACCEPT);
                }
                Some(_) => return Err(Error::OriginProtocol),
                None => {
                    head.headers.insert(hyper::header::CONNECTION, HeaderValue::from_static("upgrade"));
                    head.headers.insert(UPGRADE, protocol);
                }
            }
            let switch = Switch { visitor, origin: origin_side, guard: origin.into_guard(), websocket };
            return Ok(Answer { response: Response::from_parts(head, Body::empty()), switch: Some(switch) });
        }
        if response.status().is_success() && wanted.is_some_and(|wanted| wanted.key.is_some()) {
            // It would tell the visitor that a WebSocket is open.
            return Err(Error::OriginProtocol);
        }
        let (mut head, incoming) = response.into_parts();
        // RFC 9112 §7: a coding that is not undone here would be lost with its field.
        let undone =
            |c: &HeaderValue| [&b"chunked"[..], b"identity"].iter().any(|u| c.as_bytes().eq_ignore_ascii_case(u));
        if !head.headers.get_all(TRANSFER_ENCODING).iter().all(undone) {
            return Err(Error::OriginProtocol);
        }
        headers::rewrite_response(&mut head.headers, received);
        head.version = Version::HTTP_11;
        Ok(Response::from_parts(head, Body::origin(incoming, origin)).into())
    }

    /// Sends a request and waits for the head of the origin's answer: for the
    /// first byte deadline, counted from the last progress of the upload, where
    /// the origin owes the next step, and as long as a body may pause where the
    /// visitor does; and not past the loss of what carries `way`. The request comes
    /// back where nothing of it was sent.
    async fn send(
        &self,
        origin: &mut Origin,
        request: Request<Upload>,
        tally: &Tally,
        way: Option<&D::Way>,
    ) -> Result<Response<Incoming>, (Error, Option<Box<Request<Upload>>>)> {
        tally.touch();
        // A server of gRPC may say nothing until its first message.
        let silent = match headers::grpc(request.headers()) {
            Some(_) => self.settings.body_idle,
            None => self.settings.first_byte,
        };
        let (http2, reused) = (origin.is_http2(), origin.reused());
        let mut answered = std::pin::pin!(origin.send(request));
        let mut lost = std::pin::pin!(async {
            match way {
                Some(way) => way.lost().await,
                None => std::future::pending().await,
            }
        });
        loop {
            let now = Instant::now();
            let (wait, late) = match tally.visitor_owes() {
                true => (self.settings.body_idle, Error::Idle),
                false => (silent, Error::OriginSilent),
            };
            let due = tally.moved() + wait;
            if due <= now {
                return Err((late, None));
            }
            tokio::select! {
                answered = &mut answered => {
                    return answered.map_err(|failed| match unanswered(&failed.error, tally) {
                        // It may not speak HTTP/2 at all.
                        Error::OriginReset if http2 && !reused => (Error::OriginProtocol, failed.unsent),
                        error => (error, failed.unsent),
                    });
                }
                () = &mut lost => return Err((Error::TunnelLost, None)),
                // Who owes may change meanwhile.
                () = tokio::time::sleep_until(due.min(now + silent)) => {}
            }
        }
    }
}

/// The request once more, if it may be sent twice and has no body that would be
/// gone.
fn again(request: &Request<Upload>) -> Option<Request<Upload>> {
    let method = request.method();
    // Idempotent, or safe and so idempotent.
    if !request.body().is_end_stream() || !method.is_idempotent() {
        return None;
    }
    let mut again = Request::new(request.body().empty_again());
    again.method_mut().clone_from(method);
    again.uri_mut().clone_from(request.uri());
    again.headers_mut().clone_from(request.headers());
    Some(again)
}

/// Why there is no answer.
fn unanswered(error: &hyper::Error, tally: &Tally) -> Error {
    tracing::debug!(error = %Chain(error), "an origin gave no answer");
    match tally.failed().or_else(|| Error::within(error)) {
        Some(known) => known,
        None if error.is_parse() => Error::OriginProtocol,
        None => Error::OriginReset,
    }
}

/// The whole body of a form for the gate itself.
async fn form(method: &Method, upload: &mut Upload) -> Result<Bytes, Error> {
    if *method != Method::POST {
        return Ok(Bytes::new());
    }
    let collected = Limited::new(upload, gate::FORM_MAX).collect();
    match tokio::time::timeout(gate::FORM_WAIT, collected).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(_)) => Err(Error::BadRequest),
        Err(_) => Err(Error::Idle),
    }
}
