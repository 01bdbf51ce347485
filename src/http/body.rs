//! The two bodies of a request as hyper drives them: what the visitor uploads
//! and what it is answered. Both pass every chunk on as it comes, count it and
//! keep the request's account honest about its end.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use tokio_util::sync::CancellationToken;

use super::answer;
use super::origins::Origin;
use super::pulse::Pulse;
use super::record::{Record, Tally};
use crate::error::Error;
use crate::gate::{self, Held};

/// A visitor's request body on its way to the origin.
pub(super) struct Upload {
    /// None where there is no body.
    incoming: Option<Incoming>,
    tally: Arc<Tally>,
    pulse: Arc<Pulse>,
    /// Ready when the body may be sent: hyper says `100 Continue` to the visitor
    /// at the first poll of `incoming`.
    gate: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    announced: Option<Arc<Announced>>,
    /// The pulse counts it.
    counted: bool,
}

impl Drop for Upload {
    fn drop(&mut self) {
        if self.counted {
            self.pulse.upload_ends();
        }
    }
}

/// A body that waits for the origin's word (RFC 9110 §10.1.1): sent after a 100 or
/// when none comes, and never after another answer, because an origin that has
/// answered may take what comes for the next request.
#[derive(Default)]
pub(super) struct Announced {
    go: CancellationToken,
    decided: AtomicBool,
}

impl Announced {
    /// The origin said 100.
    pub(super) fn wanted(&self) {
        self.go.cancel();
    }

    /// The origin answered: whether the body was not sent, which it never will be
    /// then.
    pub(super) fn withdraw(&self) -> bool {
        !self.decided.swap(true, Ordering::SeqCst)
    }

    async fn wait(&self, wait: Duration) {
        let _ = tokio::time::timeout(wait, self.go.cancelled()).await;
        if self.decided.swap(true, Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
    }
}

impl Upload {
    pub(super) fn new(incoming: Incoming, tally: Arc<Tally>, pulse: Arc<Pulse>) -> Self {
        let counted = !incoming.is_end_stream();
        if counted {
            pulse.upload_begins();
        }
        Self { incoming: Some(incoming), tally, pulse, gate: None, announced: None, counted }
    }

    /// The same without a body, of which there was none.
    pub(super) fn empty_again(&self) -> Self {
        let (tally, pulse) = (Arc::clone(&self.tally), Arc::clone(&self.pulse));
        Self { incoming: None, tally, pulse, gate: None, announced: None, counted: false }
    }

    /// Keeps the body back until the origin wants it, or until `wait` has passed:
    /// not every origin says `100 Continue`.
    pub(super) fn hold(&mut self, wait: Duration) -> Arc<Announced> {
        let announced = Arc::<Announced>::default();
        let held = Arc::clone(&announced);
        self.gate = Some(Box::pin(async move { held.wait(wait).await }));
        self.announced = Some(Arc::clone(&announced));
        announced
    }

    /// What decides whether it is sent, where it is held back.
    pub(super) fn announced(&self) -> Option<Arc<Announced>> {
        self.announced.clone()
    }
}

impl HttpBody for Upload {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        if let Some(gate) = &mut self.gate {
            ready!(gate.as_mut().poll(cx));
            self.gate = None;
            self.tally.touch();
        }
        let Some(incoming) = &mut self.incoming else { return Poll::Ready(None) };
        let Poll::Ready(frame) = Pin::new(incoming).poll_frame(cx) else {
            self.tally.await_visitor();
            self.pulse.upload_waits(cx.waker());
            return Poll::Pending;
        };
        Poll::Ready(match frame {
            Some(Ok(mut frame)) => {
                self.tally.sent_up(frame.data_ref().map_or(0, Bytes::len));
                if let Some(trailers) = frame.trailers_mut() {
                    gate::strip(trailers, true);
                }
                Some(Ok(frame))
            }
            Some(Err(broken)) => {
                let error = if is_malformed(&broken) { Error::BadRequest } else { Error::VisitorGone };
                self.tally.fail(error);
                Some(Err(error))
            }
            None => {
                self.tally.sent_up(0);
                None
            }
        })
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.as_ref().is_none_or(Incoming::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.as_ref().map_or(SizeHint::with_exact(0), Incoming::size_hint)
    }
}

/// Whether a body ended because it is not framed as it says (chunks of HTTP/1.1),
/// and not because its sender is gone.
fn is_malformed(error: &hyper::Error) -> bool {
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<io::Error>() {
            return matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData);
        }
        cause = error.source();
    }
    false
}

/// An answer's body on its way to the visitor. Dropping it ends the request.
pub(super) struct Body {
    source: Source,
    /// The connection that it comes over: closed, unless the body ends in order.
    /// Above `record`: dropped first.
    origin: Option<Origin>,
    record: Option<Record>,
    /// Where an end of the connection would pass for the body's end: what to
    /// tell that it must be a reset.
    unframed: Option<Arc<Pulse>>,
    /// A gRPC call's answer: breaks off with a status.
    grpc: bool,
    /// What breaks it off once its visitor no longer passes the gate. The permit
    /// outlives the future that waits for it.
    held: Option<Held>,
}

enum Source {
    Empty,
    Page(Bytes),
    Origin(Incoming),
}

impl Body {
    pub(super) fn empty() -> Self {
        Self::of(Source::Empty)
    }

    /// A page of our own.
    pub(super) fn page(page: Bytes) -> Self {
        Self::of(if page.is_empty() { Source::Empty } else { Source::Page(page) })
    }

    /// The origin's body and the connection that it comes over.
    pub(super) fn origin(incoming: Incoming, origin: Origin) -> Self {
        Self {
            source: Source::Origin(incoming),
            origin: Some(origin),
            record: None,
            unframed: None,
            grpc: false,
            held: None,
        }
    }

    fn of(source: Source) -> Self {
        Self { source, origin: None, record: None, unframed: None, grpc: false, held: None }
    }

    /// Ties the request's account to this body.
    pub(super) fn accounted(mut self, record: Record) -> Self {
        self.record = Some(record);
        self
    }

    /// The visitor will take the connection's end for this body's end.
    pub(super) fn unframed(mut self, pulse: Arc<Pulse>) -> Self {
        self.unframed = Some(pulse);
        self
    }

    /// Where it breaks off it is to end as a failed gRPC call.
    pub(super) fn grpc(mut self) -> Self {
        self.grpc = true;
        self
    }

    /// Breaks off once its visitor no longer passes the gate.
    pub(super) fn held(mut self, held: Held) -> Self {
        self.held = Some(held);
        self
    }

    fn count(&mut self, bytes: usize) {
        if let Some(record) = &self.record {
            record.tally.sent_down(bytes);
        }
    }

    fn finish(&mut self) {
        if let Some(mut record) = self.record.take() {
            record.complete();
        }
        if let Some(origin) = self.origin.take() {
            origin.give_back();
        }
    }

    /// The origin's body broke off: so must ours, visibly.
    fn break_off(&mut self, why: Error) -> Error {
        let error = match &self.record {
            Some(record) => {
                record.tally.fail(why);
                record.tally.failed().unwrap_or(why)
            }
            None => why,
        };
        if let Some(pulse) = self.unframed.take() {
            pulse.abort();
        }
        error
    }
}

impl Body {
    /// What a body that broke off ends with.
    fn broken(&mut self, error: Error) -> Result<Frame<Bytes>, Error> {
        self.held = None;
        if !self.grpc {
            return Err(error);
        }
        self.source = Source::Empty;
        self.origin = None;
        Ok(Frame::trailers(answer::trailers(error)))
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let closed = self.held.as_ref().is_some_and(|held| held.poll_cut(cx).is_ready());
        if closed && !self.is_end_stream() {
            let error = self.break_off(Error::GateClosed);
            return Poll::Ready(Some(self.broken(error)));
        }
        let frame = match &mut self.source {
            Source::Empty => None,
            Source::Page(page) => {
                let page = std::mem::take(page);
                self.source = Source::Empty;
                Some(Ok(Frame::data(page)))
            }
            Source::Origin(incoming) => {
                let Poll::Ready(frame) = Pin::new(incoming).poll_frame(cx) else {
                    if let Some(record) = &self.record {
                        record.tally.await_origin();
                    }
                    return Poll::Pending;
                };
                frame
            }
        };
        Poll::Ready(match frame {
            Some(Ok(frame)) => {
                self.count(frame.data_ref().map_or(0, Bytes::len));
                if frame.is_trailers() || self.is_end_stream() {
                    self.finish();
                }
                Some(Ok(frame))
            }
            Some(Err(why)) => {
                let error = self.break_off(Error::within(&why).unwrap_or(Error::OriginReset));
                Some(self.broken(error))
            }
            None => {
                self.finish();
                None
            }
        })
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Source::Empty => true,
            Source::Page(_) => false,
            Source::Origin(incoming) => incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Empty => SizeHint::with_exact(0),
            Source::Page(page) => SizeHint::with_exact(page.len() as u64),
            Source::Origin(incoming) => incoming.size_hint(),
        }
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        // A body without content (HEAD, 204, 304) is never polled.
        if self.is_end_stream() {
            self.finish();
        }
    }
}
