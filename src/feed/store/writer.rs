//! The store's one writer: a thread that takes queued transactions in order,
//! guards each on its own, and gives a group of them one SQLite transaction, so
//! that they share the fsync. Memory changes only after the disk has it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{mpsc, oneshot};

use super::Shared;
use super::disk::{Disk, DiskOp, Failure};
use super::state::{Held, Revision, State};
use crate::feed::{Change, Entry, Expect, LeaseId, Op, Txn, WriteError};

/// What the writer is asked to do.
pub(super) enum Job {
    Commit(Txn, oneshot::Sender<Result<u64, WriteError>>),
    /// Look at the dropped leases.
    Wake,
    Close(oneshot::Sender<()>),
    #[cfg(test)]
    Probe(Box<dyn FnOnce(&mut Disk) + Send>),
}

/// Revisions reserved on disk at once for writes that live in memory only:
/// after a crash revisions must go on above every one that was seen.
const RESERVE: u64 = 1024;

type Answer = (oneshot::Sender<Result<u64, WriteError>>, Result<u64, WriteError>);

pub(super) struct Writer {
    shared: Arc<Shared>,
    disk: Disk,
    group: usize,
    failing: bool,
    /// A group whose SQLite commit failed: whether it is in the file shows
    /// when the file is opened again.
    doubt: Option<Plan>,
}

/// A group of transactions, applied to nothing yet.
#[derive(Default)]
pub(super) struct Plan {
    pub(super) rev: u64,
    pub(super) disk: Vec<DiskOp>,
    /// Set: the disk must promise revisions up to here to memory.
    pub(super) reserve: Option<u64>,
    /// The history on disk is trimmed up to here.
    pub(super) floor: u64,
    overlay: HashMap<String, Option<Held>>,
    revisions: Vec<Revision>,
    revoked: HashSet<LeaseId>,
    leased: bool,
}

impl Writer {
    pub(super) fn new(shared: Arc<Shared>, disk: Disk, group: usize) -> Self {
        Self { shared, disk, group, failing: false, doubt: None }
    }

    pub(super) fn run(mut self, mut queue: mpsc::Receiver<Job>) {
        let mut close = None;
        while close.is_none() {
            let Some(first) = queue.blocking_recv() else { break };
            let mut commits = Vec::new();
            let mut next = Some(first);
            while let Some(job) = next {
                match job {
                    Job::Commit(txn, answer) => commits.push((txn, answer)),
                    Job::Wake => {}
                    Job::Close(done) => {
                        close = Some(done);
                        queue.close();
                    }
                    #[cfg(test)]
                    Job::Probe(work) => {
                        work(&mut self.disk);
                        break;
                    }
                }
                next = if commits.len() < self.group { queue.try_recv().ok() } else { None };
            }
            self.commit(commits);
        }
        // What was queued before the close was acknowledged by nobody yet.
        while let Ok(job) = queue.try_recv() {
            if let Job::Commit(txn, answer) = job {
                self.commit(vec![(txn, answer)]);
            }
        }
        self.disk.close();
        self.shared.closed.cancel();
        if let Some(done) = close {
            let _gone = done.send(());
        }
    }

    fn commit(&mut self, commits: Vec<(Txn, oneshot::Sender<Result<u64, WriteError>>)>) {
        let dropped = std::mem::take(&mut *self.shared.dropped.lock());
        if commits.is_empty() && dropped.is_empty() {
            return;
        }
        if let Err(why) = self.recover() {
            // Leases must not be forgotten because the disk is.
            self.shared.dropped.lock().extend(dropped);
            return answer_all(commits.into_iter().map(|(_, a)| a), &WriteError::Unavailable(why));
        }
        let (mut plan, answers) = {
            let state = self.shared.state.read();
            let mut plan = Plan { rev: state.rev, floor: state.floor, ..Plan::default() };
            for lease in &dropped {
                plan.revoke(&state, *lease);
            }
            let answers: Vec<Answer> = commits
                .into_iter()
                .map(|(txn, answer)| {
                    let result = plan.add(&state, txn);
                    (answer, result)
                })
                .collect();
            (plan, answers)
        };
        if plan.leased && plan.rev > self.disk.reserved() {
            plan.reserve = Some(plan.rev + RESERVE);
        }
        let began = Instant::now();
        let written = if plan.disk.is_empty() && plan.reserve.is_none() { Ok(()) } else { self.disk.write(&plan) };
        match written {
            Ok(()) => {
                if !plan.disk.is_empty() {
                    metrics::histogram!("adit_store_commit_seconds").record(began.elapsed());
                }
                if std::mem::take(&mut self.failing) {
                    tracing::info!("the store can write again");
                }
                self.publish(plan);
                for (answer, result) in answers {
                    let _gone = answer.send(result);
                }
            }
            Err(failure) => {
                let revoked = !dropped.is_empty();
                self.shared.dropped.lock().extend(dropped);
                let error = match failure {
                    Failure::Nothing(why) => WriteError::Unavailable(why),
                    Failure::Doubt(why) => {
                        self.doubt = Some(plan);
                        let _later = self.recover();
                        WriteError::Unknown(why)
                    }
                };
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::error!(%error, "the store cannot write");
                }
                metrics::counter!("adit_store_write_failures_total").increment(1);
                let failed_commits = !answers.is_empty();
                answer_all(answers.into_iter().map(|(a, _)| a), &error);
                if revoked && failed_commits {
                    // Leased keys are no business of the disk: they go all the same.
                    self.commit(Vec::new());
                }
            }
        }
    }

    /// After a commit that failed half-way: opens the file again and believes
    /// what is in it.
    fn recover(&mut self) -> Result<(), String> {
        let rev = self.disk.reopen()?;
        if let Some(plan) = self.doubt.take()
            && rev.is_some_and(|rev| rev >= plan.rev)
        {
            self.publish(plan);
        }
        Ok(())
    }

    fn publish(&self, plan: Plan) {
        {
            let mut state = self.shared.state.write();
            for (key, held) in plan.overlay {
                state.set(&key, held);
            }
            for lease in plan.revoked {
                state.leases.remove(&lease);
            }
            for revision in plan.revisions {
                state.remember(revision);
            }
            state.rev = plan.rev;
        }
        self.shared.head.send_replace(plan.rev);
    }
}

fn answer_all(answers: impl Iterator<Item = oneshot::Sender<Result<u64, WriteError>>>, error: &WriteError) {
    for answer in answers {
        let _gone = answer.send(Err(error.clone()));
    }
}

impl Plan {
    /// Adds one transaction if its guards hold; answers its revision.
    fn add(&mut self, state: &State, txn: Txn) -> Result<u64, WriteError> {
        for (key, expect) in &txn.expect {
            let rev = self.current(state, key).map(|h| h.rev);
            let holds = match expect {
                Expect::Absent => rev.is_none(),
                Expect::Present => rev.is_some(),
                Expect::Rev(wanted) => rev == Some(*wanted),
            };
            if !holds {
                return Err(WriteError::Conflict { key: key.clone(), rev });
            }
        }
        let gone = |l: &LeaseId| !state.leases.contains_key(l) || self.revoked.contains(l);
        if txn.ops.iter().any(|op| matches!(op, Op::Put { lease: Some(l), .. } if gone(l))) {
            return Err(WriteError::LeaseLost);
        }
        let rev = self.rev + 1;
        let changes: Vec<Change> = txn.ops.into_iter().filter_map(|op| self.apply(state, op, rev)).collect();
        self.finish(rev, changes);
        Ok(self.rev)
    }

    /// Removes all that lives under a lease, at one revision.
    fn revoke(&mut self, state: &State, lease: LeaseId) {
        let Some(keys) = state.leases.get(&lease) else { return };
        let rev = self.rev + 1;
        let mut keys: Vec<String> = keys.iter().map(|k| k.as_ref().to_owned()).collect();
        keys.sort();
        let changes = keys.into_iter().filter_map(|key| self.apply(state, Op::Delete { key }, rev)).collect();
        self.finish(rev, changes);
        self.revoked.insert(lease);
    }

    /// A transaction without effect takes no revision.
    fn finish(&mut self, rev: u64, changes: Vec<Change>) {
        if !changes.is_empty() {
            self.rev = rev;
            self.revisions.push(Revision { rev, changes });
        }
    }

    fn current<'a>(&'a self, state: &'a State, key: &str) -> Option<&'a Held> {
        match self.overlay.get(key) {
            Some(planned) => planned.as_ref(),
            None => state.kv.get(key),
        }
    }

    fn apply(&mut self, state: &State, op: Op, rev: u64) -> Option<Change> {
        let (key, value, lease) = match op {
            Op::Put { key, value, lease } => (key, Some(value), lease),
            Op::Delete { key } => (key, None, None),
        };
        let old = self.current(state, &key);
        let (existed, on_disk) = (old.is_some(), old.is_some_and(|h| h.lease.is_none()));
        let Some(value) = value else {
            if !existed {
                return None;
            }
            if on_disk {
                self.disk.push(DiskOp::Delete { key: key.clone(), rev });
            }
            self.leased |= !on_disk;
            self.overlay.insert(key.clone(), None);
            return Some(Change::Delete { key, rev });
        };
        let value: Arc<str> = value.into();
        if lease.is_none() {
            self.disk.push(DiskOp::Put { key: key.clone(), value: Arc::clone(&value), rev });
        } else if on_disk {
            self.disk.push(DiskOp::Delete { key: key.clone(), rev });
        }
        self.leased |= lease.is_some();
        self.overlay.insert(key.clone(), Some(Held { value: Arc::clone(&value), rev, lease }));
        Some(Change::Put(Entry { key, value, rev }))
    }
}
