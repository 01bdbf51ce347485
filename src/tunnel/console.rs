//! The live log in an owner's SSH session. Lines wait in a ring: where the
//! terminal is slow the oldest are dropped and counted, and the data path never
//! waits. Lines are never wrapped to the pty (some clients send its size wrong).

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::visit_log::{Sink, Visit, line};

/// Lines kept for a terminal that is slow or not there yet.
const RING_LINES: usize = 256;

enum Line {
    Text(String),
    Visit(Arc<Visit>),
}

#[derive(Default)]
struct Ring {
    lines: VecDeque<Line>,
    dropped: u64,
}

/// The console of one SSH session.
#[derive(Default)]
pub struct Console {
    ring: Mutex<Ring>,
    wake: Notify,
    attached: AtomicBool,
}

impl Console {
    /// Says something to the owner; kept until a terminal is there.
    pub fn say(&self, text: String) {
        self.push(Line::Text(text));
    }

    /// Shows a line about a visit that came in at another node. What could move the
    /// terminal is left out.
    pub fn visit_elsewhere(&self, line: &str) {
        if self.attached.load(Ordering::Acquire) {
            self.push(Line::Text(line.chars().filter(|c| !c.is_control()).collect()));
        }
    }

    /// From now on visits are shown too.
    pub fn attach(&self) {
        self.attached.store(true, Ordering::Release);
    }

    /// The next text to write to the terminal: all lines that wait now.
    ///
    /// # Cancel safety
    /// Cancel safe: lines are taken only when it returns.
    pub async fn next(&self, line_end: &str) -> String {
        loop {
            let wake = self.wake.notified();
            let (lines, dropped) = {
                let mut ring = self.ring.lock();
                (std::mem::take(&mut ring.lines), std::mem::take(&mut ring.dropped))
            };
            if lines.is_empty() && dropped == 0 {
                wake.await;
                continue;
            }
            let mut out = String::new();
            if dropped > 0 {
                let _ = write!(out, "... {dropped} lines dropped: this terminal is too slow{line_end}");
            }
            for line in lines {
                match line {
                    Line::Text(text) => text.lines().for_each(|l| out.extend([l, line_end])),
                    Line::Visit(visit) => {
                        line::write(&mut out, &visit);
                        out.push_str(line_end);
                    }
                }
            }
            return out;
        }
    }

    fn push(&self, line: Line) {
        {
            let mut ring = self.ring.lock();
            if ring.lines.len() >= RING_LINES {
                ring.lines.pop_front();
                ring.dropped += 1;
            }
            ring.lines.push_back(line);
        }
        self.wake.notify_one();
    }
}

impl Sink for Console {
    fn record(&self, visit: &Arc<Visit>) {
        if self.attached.load(Ordering::Acquire) {
            self.push(Line::Visit(Arc::clone(visit)));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;
    use crate::error::Error;
    use crate::visit_log::What;

    fn visit(path: &str, error: Option<Error>) -> Arc<Visit> {
        Arc::new(Visit {
            at: SystemTime::UNIX_EPOCH,
            visitor: "[2001:db8::1]:4000".parse().unwrap(),
            kind: "http",
            protocol: "h1",
            id: None,
            legs: crate::visit_log::Legs::default(),
            socket: None,
            tunnel: None,
            node: None,
            what: What::Request { method: "GET".into(), host: "web.test".into(), path: path.into() },
            status: Some(error.map_or(200, Error::status)),
            bytes_up: 0,
            bytes_down: 123_456,
            first_byte: Some(Duration::from_micros(4_200)),
            total: Duration::from_millis(35),
            error,
        })
    }

    #[tokio::test]
    async fn a_line_tells_the_visit_and_cannot_move_the_terminal() {
        let console = Console::default();
        console.attach();
        console.record(&visit("/a?b=\u{1b}[2J", None));
        console.record(&visit("/c", Some(Error::OriginRefused)));
        assert_eq!(
            console.next("\r\n").await,
            "00:00:00 2001:db8::1 GET web.test/a?b=\\u{1b}[2J 200 up 0B down 123kB first 4.2ms total 35ms\r\n\
             00:00:00 2001:db8::1 GET web.test/c 502 (origin_refused) up 0B down 123kB first 4.2ms total 35ms\r\n"
        );
    }

    #[tokio::test]
    async fn a_slow_terminal_loses_the_oldest_lines_and_is_told_how_many() {
        let console = Console::default();
        console.say("hello".into());
        console.record(&visit("/not-shown-before-a-terminal-is-there", None));
        console.attach();
        for _ in 0..RING_LINES + 9 {
            console.record(&visit("/", None));
        }
        let text = console.next("\n").await;
        assert!(text.starts_with("... 10 lines dropped"), "{text}");
        assert_eq!(text.lines().count(), RING_LINES + 1);
    }
}
