//! How busy this node is, so that others send it no more than it can serve.

use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

/// How often it is measured.
const LOOK: Duration = Duration::from_secs(1);

/// The share of the processors' time that this process uses.
#[derive(Debug)]
pub(super) struct Load {
    /// In percent.
    spare_from: f64,
    spare: AtomicU8,
}

impl Load {
    /// Not measured yet; visitors are spared above `spare_from` percent.
    pub(super) fn new(spare_from: usize) -> Self {
        Self { spare_from: spare_from as f64, spare: AtomicU8::new(0) }
    }

    /// The share of others' visitors, in percent, that had better go elsewhere.
    pub(super) fn spare(&self) -> u8 {
        self.spare.load(Ordering::Relaxed)
    }

    /// Measures until `stop`. The share rises with the load, and falls with it: visitors
    /// do not all leave at once, to come back all at once.
    pub(super) async fn watch(&self, stop: &CancellationToken) {
        let cores = std::thread::available_parallelism().map_or(1.0, |cores| cores.get() as f64);
        let (mut smooth, mut before) = (0.0, (Instant::now(), crate::metrics::processor_time()));
        let mut look = tokio::time::interval(LOOK);
        loop {
            tokio::select! {
                _ = look.tick() => {}
                () = stop.cancelled() => return,
            }
            let now = (Instant::now(), crate::metrics::processor_time());
            let took = (now.0 - before.0).as_secs_f64();
            if let (Some(then), Some(used)) = (before.1, now.1)
                && took > 0.1
            {
                let busy = 100.0 * used.saturating_sub(then).as_secs_f64() / took / cores;
                smooth = (smooth * 2.0 + busy) / 3.0;
                self.spare.store(share(smooth, self.spare_from), Ordering::Relaxed);
                before = now;
            }
        }
    }
}

/// None up to `from` percent, all at 100.
fn share(busy: f64, from: f64) -> u8 {
    let above = (busy.min(100.0) - from).max(0.0);
    // Of 0 to 100; nothing where `from` is 100.
    (100.0 * above / (100.0 - from).max(1.0)) as u8
}

#[cfg(test)]
mod tests {
    use super::share;

    #[test]
    fn the_more_is_to_do_the_more_visitors_are_spared() {
        assert_eq!([0.0, 85.0, 92.5, 100.0, 130.0].map(|busy| share(busy, 85.0)), [0, 0, 50, 100, 100]);
        assert_eq!(share(100.0, 100.0), 0);
        assert_eq!(share(50.0, 0.0), 50);
    }
}
