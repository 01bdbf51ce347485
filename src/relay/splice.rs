//! One direction of a relay inside the kernel, between two bare TCP
//! connections, through a pipe. A direction holds a pipe only while it moves
//! bytes; the pipes come from a pool that all relays share and that keeps the
//! process below the kernel's quota of pipe pages.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with, splice};
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::RelaySettings;
use super::way::{Broken, Step, Tally};

/// A pipe, and how many bytes are in it.
#[derive(Debug)]
struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    /// What the kernel granted.
    size: usize,
    filled: usize,
    pool: &'static Pool,
}

impl Drop for Pipe {
    fn drop(&mut self) {
        self.pool.used.fetch_sub(self.size, Ordering::Relaxed);
    }
}

/// The pipes of the process.
#[derive(Debug)]
struct Pool {
    /// Bytes of pipe that exist, idle or not.
    used: AtomicUsize,
    idle: Mutex<Vec<Pipe>>,
}

static POOL: Pool = Pool { used: AtomicUsize::new(0), idle: Mutex::new(Vec::new()) };

/// Below this a pipe moves less at once than a copy does: past its quota the
/// kernel grants two pages and reports success.
const WORTHWHILE: usize = 64 << 10;

/// Idle pipes that are kept open: more than there can be threads that need one
/// at the same instant, and 128 descriptors.
const IDLE_MAX: usize = 64;

impl Pool {
    /// An empty pipe, or none where the budget or the kernel's quota is spent.
    fn take(&'static self, settings: &RelaySettings) -> Option<Pipe> {
        if let Some(pipe) = self.idle.lock().pop() {
            return Some(pipe);
        }
        let wanted = settings.pipe_size;
        if self.used.fetch_add(wanted, Ordering::Relaxed) + wanted > settings.pipe_budget {
            self.used.fetch_sub(wanted, Ordering::Relaxed);
            return None;
        }
        let opened = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).and_then(|(read, write)| {
            // EPERM past the quota: then the size is what the pipe came with.
            let _ = fcntl_setpipe_size(&write, wanted);
            let size = fcntl_getpipe_size(&write)?;
            Ok((read, write, size))
        });
        let Ok((read, write, size)) = opened else {
            self.used.fetch_sub(wanted, Ordering::Relaxed);
            return None;
        };
        // From here on the pipe's drop gives back what was really granted.
        self.used.fetch_add(size, Ordering::Relaxed);
        self.used.fetch_sub(wanted, Ordering::Relaxed);
        let pipe = Pipe { read, write, size, filled: 0, pool: self };
        (size >= WORTHWHILE).then_some(pipe)
    }

    /// Takes an empty pipe back. One with bytes in it belongs to a connection
    /// that broke: it is closed, for its bytes must never reach another.
    fn give_back(&self, pipe: Pipe) {
        if pipe.filled == 0 {
            let mut idle = self.idle.lock();
            if idle.len() < IDLE_MAX {
                idle.push(pipe);
            }
        }
    }
}

/// One direction's pipe, while it has one.
#[derive(Debug, Default)]
pub(super) struct Splicer {
    pipe: Option<Pipe>,
}

impl Splicer {
    /// Whether every byte that was read has been written.
    pub(super) fn is_empty(&self) -> bool {
        self.pipe.as_ref().is_none_or(|pipe| pipe.filled == 0)
    }

    /// Whether a pipe could be had.
    pub(super) fn prepare(&mut self, settings: &RelaySettings) -> bool {
        if self.pipe.is_none() {
            self.pipe = POOL.take(settings);
        }
        self.pipe.is_some()
    }

    /// Gives the pipe up: back to the pool, where it is empty.
    pub(super) fn release(&mut self) {
        if let Some(pipe) = self.pipe.take() {
            POOL.give_back(pipe);
        }
    }

    /// Writes what is in the pipe, then fills it once and writes that.
    /// `Step::Unable` where there is no pipe, or these sockets cannot splice.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &TcpStream,
        to: &TcpStream,
        settings: &RelaySettings,
        tally: &mut Tally,
    ) -> Poll<Result<Step, Broken>> {
        if !self.prepare(settings) {
            return Poll::Ready(Ok(Step::Unable));
        }
        let Some(pipe) = &mut self.pipe else { return Poll::Ready(Ok(Step::Unable)) };
        ready!(pipe.poll_drain(cx, to, tally))?;
        match pipe.poll_fill(cx, from) {
            Poll::Ready(Ok(0)) => {
                self.release();
                Poll::Ready(Ok(Step::End))
            }
            Poll::Ready(Ok(read)) => {
                tally.read();
                // Pending is met again, with its waker, at the next call.
                if let Poll::Ready(Err(broken)) = pipe.poll_drain(cx, to, tally) {
                    return Poll::Ready(Err(broken));
                }
                Poll::Ready(Ok(Step::Read(read)))
            }
            Poll::Ready(Err(Errno::INVAL | Errno::NOSYS)) => {
                self.release();
                Poll::Ready(Ok(Step::Unable))
            }
            Poll::Ready(Err(_)) => Poll::Ready(Err(Broken::Read)),
            Poll::Pending => {
                self.release();
                Poll::Pending
            }
        }
    }
}

impl Drop for Splicer {
    fn drop(&mut self) {
        self.release();
    }
}

// SPLICE_F_MORE is left out on purpose: it would hold back the last segment.
const FLAGS: SpliceFlags = SpliceFlags::MOVE.union(SpliceFlags::NONBLOCK);

impl Pipe {
    /// Fills the empty pipe from the socket. Only an empty one: then EAGAIN can
    /// only mean that the socket has nothing.
    fn poll_fill(&mut self, cx: &mut Context<'_>, from: &TcpStream) -> Poll<Result<usize, Errno>> {
        loop {
            ready!(from.poll_read_ready(cx)).map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?;
            let moved = from
                .try_io(Interest::READABLE, || Ok(retry(|| splice(from, None, &self.write, None, self.size, FLAGS))?));
            match moved {
                Ok(n) => {
                    self.filled = n;
                    return Poll::Ready(Ok(n));
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(Errno::from_io_error(&error).unwrap_or(Errno::IO))),
            }
        }
    }

    /// Empties the pipe into the socket.
    fn poll_drain(&mut self, cx: &mut Context<'_>, to: &TcpStream, tally: &mut Tally) -> Poll<Result<(), Broken>> {
        while self.filled > 0 {
            ready!(to.poll_write_ready(cx)).map_err(|_| Broken::Write)?;
            let moved =
                to.try_io(Interest::WRITABLE, || Ok(retry(|| splice(&self.read, None, to, None, self.filled, FLAGS))?));
            match moved {
                Ok(n) if n > 0 => {
                    self.filled = self.filled.saturating_sub(n);
                    tally.moved += n as u64;
                    tally.spliced += n as u64;
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                _ => return Poll::Ready(Err(Broken::Write)),
            }
        }
        Poll::Ready(Ok(()))
    }
}

fn retry(mut call: impl FnMut() -> rustix::io::Result<usize>) -> rustix::io::Result<usize> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool() -> &'static Pool {
        Box::leak(Box::new(Pool { used: AtomicUsize::new(0), idle: Mutex::default() }))
    }

    #[test]
    fn a_pipe_with_bytes_in_it_is_never_pooled() {
        let (pool, settings) = (pool(), RelaySettings::default());
        let (empty, mut full) = (pool.take(&settings).unwrap(), pool.take(&settings).unwrap());
        assert_eq!(pool.used.load(Ordering::Relaxed), empty.size + full.size);
        full.filled = 1;
        pool.give_back(full);
        assert!(pool.idle.lock().is_empty());
        pool.give_back(empty);
        assert_eq!(pool.idle.lock().len(), 1);
        assert_eq!(pool.used.load(Ordering::Relaxed), settings.pipe_size);
    }

    #[test]
    fn the_budget_bounds_all_pipes_together() {
        let settings = RelaySettings { pipe_budget: 600 << 10, ..RelaySettings::default() };
        let pool = pool();
        let pipes: Vec<Pipe> = std::iter::from_fn(|| pool.take(&settings)).collect();
        assert_eq!(pipes.len(), 2);
        drop(pipes);
        assert!(pool.used.load(Ordering::Relaxed) == 0 && pool.take(&settings).is_some());
    }

    #[test]
    fn a_pipe_that_the_kernel_grants_too_small_is_not_used() {
        // More than fs.pipe-max-size or than any pipe can have: refused like a spent quota.
        let settings = RelaySettings { pipe_size: 1 << 40, pipe_budget: 1 << 41, ..RelaySettings::default() };
        let pool = pool();
        let granted = pool.take(&settings).map(|pipe| pipe.size);
        assert!(granted.is_none_or(|size| size >= WORTHWHILE), "{granted:?}");
        assert_eq!(pool.used.load(Ordering::Relaxed), 0, "what was not granted is not counted");
    }
}
