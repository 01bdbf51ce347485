//! The stepwise shutdown: not ready, wait, stop accepting, let connections
//! finish, tell the owners, cut the rest. Each step has its deadline; hurrying
//! skips to the next.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::fields::Fields;

/// The knobs of `[drain]`.
#[derive(Debug, Clone, PartialEq)]
pub struct DrainSettings {
    /// From "not ready" until listeners close: time for routes to be withdrawn.
    pub notice: Duration,
    /// From closed listeners until connections are cut.
    pub deadline: Duration,
    /// Owners' sessions are ended over this time, so that they do not all come
    /// back elsewhere at once.
    pub spread: Duration,
}

impl Default for DrainSettings {
    fn default() -> Self {
        Self { notice: Duration::from_secs(5), deadline: Duration::from_secs(30), spread: Duration::from_secs(10) }
    }
}

impl DrainSettings {
    /// Reads `[drain]`.
    pub fn read(f: &mut Fields) -> Self {
        let d = Self::default();
        Self {
            notice: f.take("notice", d.notice),
            deadline: f.take("deadline", d.deadline),
            spread: f.take("spread", d.spread),
        }
    }
}

/// The stages that connections listen to.
#[derive(Debug, Clone, Default)]
pub struct Stages {
    /// Accept nothing new; finish what runs (`Connection: close`, GOAWAY).
    pub close: CancellationToken,
    /// End now.
    pub cut: CancellationToken,
    /// Visitors' connections.
    pub visitors: TaskTracker,
}

impl Stages {
    /// Waits for `time`, or until hurried.
    pub async fn wait(&self, time: Duration, hurry: &CancellationToken) {
        tokio::select! {
            () = tokio::time::sleep(time) => {}
            () = hurry.cancelled() => {}
        }
    }

    /// Closes to new visitors and waits until the last has finished, the
    /// deadline, or hurry. Answers how many were left, now told to end.
    pub async fn finish_visitors(&self, deadline: Duration, hurry: &CancellationToken) -> usize {
        self.close.cancel();
        self.visitors.close();
        let end = Instant::now() + deadline;
        tokio::select! {
            () = self.visitors.wait() => {}
            () = sleep_until(end) => {}
            () = hurry.cancelled() => {}
        }
        let left = self.visitors.len();
        self.cut.cancel();
        // Cutting is prompt; this only bounds a fault of ours.
        let _ = tokio::time::timeout(Duration::from_secs(2), self.visitors.wait()).await;
        left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn visitors_finish_or_are_cut_at_the_deadline_or_when_hurried() {
        for (hurried, wanted) in [(false, Duration::from_secs(30)), (true, Duration::from_secs(5))] {
            let (stages, hurry) = (Stages::default(), CancellationToken::new());
            let cut = stages.cut.clone();
            stages.visitors.spawn(async move { cut.cancelled().await });
            let close = stages.close.clone();
            stages.visitors.spawn(async move { close.cancelled().await });
            if hurried {
                let hurry = hurry.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_secs(5)).await;
                    hurry.cancel();
                });
            }
            let start = Instant::now();
            assert_eq!(stages.finish_visitors(Duration::from_secs(30), &hurry).await, 1);
            assert_eq!(start.elapsed(), wanted);
            assert!(stages.visitors.is_empty());
        }
    }
}
