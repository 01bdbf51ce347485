//! Active checks: of each tunnel that is logged in here and whose socket's record asks
//! for it, whether the origin serves. What they find is kept with the tunnel
//! (`Tunnels::checked`), and told the fleet with its location.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, timeout};
use tokio_util::sync::CancellationToken;

use crate::dial::Dial;
use crate::error::Error;
use crate::http::Http;
use crate::model::{Check, Visitor};
use crate::proxy_protocol;
use crate::routes::{Route, Routes};
use crate::tunnel::{Attachment, Tunnels};

/// How often it is seen what is due.
const TICK: Duration = Duration::from_millis(250);
/// Checks under way at once; the others wait for the next tick.
const AT_ONCE: usize = 256;

/// Checks the tunnels of this node.
pub struct Checks<D> {
    routes: Arc<Routes>,
    tunnels: Arc<Tunnels>,
    http: Arc<Http<D>>,
}

/// One tunnel of a session, while its socket asks for checks.
struct Checked {
    attachment: Arc<Attachment>,
    check: Check,
    due: Instant,
    running: bool,
    /// Results in a row that differ from what the tunnel is taken for.
    against: u32,
    /// Seen at this tick.
    seen: bool,
}

/// A check of an attachment, and why it failed, if so. None: it could not be made.
type Outcome = (u64, Option<Result<(), String>>);

impl<D: Dial> Checks<D> {
    /// Checks of what these routes say, by connections as this HTTP path makes them.
    pub fn new(routes: Arc<Routes>, tunnels: Arc<Tunnels>, http: Arc<Http<D>>) -> Arc<Self> {
        Arc::new(Self { routes, tunnels, http })
    }

    /// Checks until `stop`.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        let mut all: HashMap<u64, Checked> = HashMap::new();
        let mut running: JoinSet<Outcome> = JoinSet::new();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                Some(done) = running.join_next() => {
                    let Ok((id, outcome)) = done else { continue };
                    if let Some(checked) = all.get_mut(&id) {
                        checked.running = false;
                        self.learn(checked, outcome);
                    }
                }
                _ = tick.tick() => {
                    self.take_in(&mut all);
                    for (id, checked) in all.iter_mut().filter(|(_, one)| !one.running && one.due <= Instant::now()) {
                        if running.len() >= AT_ONCE {
                            break;
                        }
                        let Some(route) = self.routes.socket_of(&checked.attachment.tunnel) else { continue };
                        checked.running = true;
                        // Not all of one record at the same time, for ever.
                        checked.due = Instant::now() + checked.check.every.mul_f64(0.9 + 0.2 * unit(*id));
                        let (checks, attachment) = (Arc::clone(&self), Arc::clone(&checked.attachment));
                        let (id, check) = (*id, checked.check.clone());
                        running.spawn(async move { (id, checks.check(&route, &attachment, &check).await) });
                    }
                }
            }
        }
    }

    /// Begins with what is new, and forgets what is gone or no longer asked for.
    fn take_in(&self, all: &mut HashMap<u64, Checked>) {
        for route in self.routes.checked() {
            let Some(check) = &route.socket.check else { continue };
            for attachment in route.tunnels.iter().flat_map(|tunnel| self.tunnels.candidates(tunnel)) {
                let id = attachment.id;
                let checked = all.entry(id).or_insert_with(|| Checked {
                    attachment,
                    check: check.clone(),
                    due: Instant::now(),
                    running: false,
                    against: 0,
                    seen: true,
                });
                checked.seen = true;
                if checked.check != *check {
                    (checked.check, checked.due, checked.against) = (check.clone(), Instant::now(), 0);
                }
            }
        }
        all.retain(|_, checked| {
            if !checked.seen {
                self.tunnels.checked(&checked.attachment, None);
            }
            std::mem::take(&mut checked.seen)
        });
    }

    fn learn(&self, checked: &mut Checked, outcome: Option<Result<(), String>>) {
        let Some(outcome) = outcome else { return };
        let result = if outcome.is_ok() { "passed" } else { "failed" };
        metrics::counter!("adit_checks_total", "result" => result).increment(1);
        let fails = checked.attachment.fails();
        if outcome.is_err() == fails {
            checked.against = 0;
            return;
        }
        checked.against += 1;
        let enough = if fails { checked.check.pass_after } else { checked.check.fail_after };
        if checked.against >= enough {
            checked.against = 0;
            self.tunnels.checked(&checked.attachment, outcome.err().as_deref());
        }
    }

    /// Makes one check.
    async fn check(&self, route: &Route, attachment: &Attachment, check: &Check) -> Option<Result<(), String>> {
        // Owners' clients are told where a connection is from: no port of a visitor is 1.
        let me = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
        let probe = async {
            let mut stream = self.tunnels.open(attachment, &Visitor::new(me, me)).await?;
            let Some(path) = &check.path else { return Ok(None) };
            if let Some(version) = route.socket.proxy_protocol {
                proxy_protocol::tell_of_none(&mut stream, version).await?;
            }
            self.http.probe(stream, &route.socket, path).await.map(Some)
        };
        match timeout(check.timeout, probe).await {
            // As many visitors as there may be, or on its way out: it says nothing of the origin.
            Ok(Err(Error::TunnelLimit | Error::NodeLimit | Error::TunnelLost)) => None,
            Ok(Ok(Some(status))) if status.as_u16() >= 400 => Some(Err(format!("the origin answered {status}"))),
            Ok(Ok(_)) => Some(Ok(())),
            Ok(Err(error)) => Some(Err(error.text().trim_end_matches('.').to_owned())),
            Err(_) => Some(Err(format!("no answer within {:?}", check.timeout))),
        }
    }
}

/// A number from 0 to 1 that differs between neighbours.
fn unit(of: u64) -> f64 {
    f64::from((of.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as u32) / f64::from(1u32 << 24)
}
