//! Watches what takes a while, a migration or a snapshot as a rule: tells its client how far it is, and answers the others
//! meanwhile.

use std::collections::VecDeque;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmm_migration::channel::Flow;
use vmm_migration::report::{Observer, Progress, Stage};

use crate::config::Config;
use crate::event::{ApiError, Event, Reply, Request};
use crate::vm::Vm;

/// How often a client hears of the progress, beside each stage's beginning.
const PROGRESS_PERIOD: Duration = Duration::from_millis(100);

/// What is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Errand {
    /// The VM moves to another host.
    Migration,
    /// It is written to a directory.
    Snapshot,
    /// It is being paused: its devices are at some I/O.
    Pause,
    /// It ends, or resets: its devices are at some I/O.
    End,
}

impl Errand {
    /// The VM's state meanwhile, and the field of `vmm info` that tells how far it is.
    fn names(self) -> (&'static str, Option<&'static str>) {
        match self {
            Self::Migration => ("migrating", Some("migration")),
            Self::Snapshot => ("snapshotting", Some("snapshot")),
            Self::Pause => ("pausing", None),
            Self::End => ("stopping", None),
        }
    }

    /// What a client hears whose request has to wait.
    fn busy(self) -> &'static str {
        match self {
            Self::Migration => {
                "the VM is migrating: wait for the end, or cancel it (vmm migrate --cancel VM)"
            }
            Self::Snapshot => {
                "a snapshot of the VM is being written: wait for the end, or cancel it (Ctrl-C there)"
            }
            Self::Pause => {
                "the VM is being paused, once its devices' I/O has ended: wait, or let it go on (vmm resume VM)"
            }
            Self::End => "the VM is stopping, once its devices' I/O has ended",
        }
    }

    fn is_cancelled_by(self, request: &Request) -> bool {
        match self {
            Self::Migration => matches!(request, Request::CancelMigration),
            Self::Snapshot => matches!(request, Request::CancelSnapshot),
            Self::Pause => matches!(request, Request::Resume),
            Self::End => false,
        }
    }
}

/// Watches for the client, and the inbox for orders.
pub struct Watch<'a> {
    errand: Errand,
    inbox: &'a Receiver<Event>,
    deferred: &'a mut VecDeque<Event>,
    config: &'a Config,
    reply: Option<&'a Reply>,
    told: Option<(Instant, Stage)>,
    /// Somebody or something ends it: what, if it wasn't asked for.
    cancelled: Option<Option<&'static str>>,
}

impl<'a> Watch<'a> {
    /// Begins. `deferred` takes what has to wait for the end; `reply` is the client's, if it still waits.
    pub fn new(
        errand: Errand,
        inbox: &'a Receiver<Event>,
        deferred: &'a mut VecDeque<Event>,
        config: &'a Config,
        reply: Option<&'a Reply>,
    ) -> Self {
        Self { errand, inbox, deferred, config, reply, told: None, cancelled: None }
    }

    /// An error's line, with what cancelled this unless that was asked for.
    #[must_use]
    pub fn explain(&self, line: String) -> String {
        match self.cancelled.flatten() {
            Some(reason) => format!("{line}: {reason}"),
            None => line,
        }
    }

    fn tell(&mut self, progress: &Progress) {
        let now = Instant::now();
        let due = self
            .told
            .is_none_or(|(at, stage)| now - at >= PROGRESS_PERIOD || stage != progress.stage);
        if let Some(reply) = self.reply.filter(|_| due) {
            self.told = Some((now, progress.stage));
            // A client that has gone away changes nothing.
            let _ = reply.progress(value(progress));
        }
    }

    /// Whether the guest is no longer needed: a snapshot has all of it, or it ends.
    fn is_past(&self, stage: Stage) -> bool {
        match self.errand {
            Errand::Snapshot => stage == Stage::Commitment,
            Errand::End => true,
            Errand::Migration | Errand::Pause => false,
        }
    }

    fn look(&mut self, progress: &Progress) {
        while let Ok(event) = self.inbox.try_recv() {
            match event {
                Event::Request { request: Request::Info, reply } => {
                    let (state, field) = self.errand.names();
                    let mut info = Vm::describe(self.config, state);
                    if let Some(field) = field {
                        info[field] = value(progress);
                    }
                    reply.done(Ok(info));
                }
                Event::Request { request, reply } if self.errand.is_cancelled_by(&request) => {
                    self.cancelled = Some(None);
                    reply.done(Ok(match self.errand {
                        Errand::Pause => Vm::describe(self.config, "running"),
                        _ => json!({}),
                    }));
                }
                // Whatever becomes of the guest now, it changes nothing.
                Event::Guest(_) | Event::Vcpu { .. } if self.is_past(progress.stage) => {
                    self.deferred.push_back(event);
                }
                Event::Request { request: Request::Stop { force: false }, .. }
                    if self.errand == Errand::End =>
                {
                    self.deferred.push_back(event);
                }
                Event::Request { request: Request::Stop { force: true }, .. }
                | Event::Guest(_)
                | Event::Vcpu { .. }
                | Event::Signal(_)
                | Event::ConsoleQuit => {
                    self.cancelled = Some(Some(reason(&event)));
                    self.deferred.push_back(event);
                }
                Event::Request { reply, .. } => {
                    reply.done(Err(ApiError::conflict(self.errand.busy())));
                }
            }
        }
    }
}

fn reason(event: &Event) -> &'static str {
    match event {
        Event::Guest(_) => "the guest ended",
        Event::Vcpu { .. } => "a vCPU failed",
        Event::Signal(_) | Event::ConsoleQuit => "the VM's process was told to end",
        Event::Request { .. } => "the VM was stopped by force",
    }
}

fn value(progress: &Progress) -> Value {
    serde_json::to_value(progress).unwrap_or(Value::Null)
}

impl Observer for Watch<'_> {
    fn observe(&mut self, progress: &Progress) -> Flow {
        self.tell(progress);
        self.look(progress);
        if self.cancelled.is_some() { Flow::Cancel } else { Flow::Continue }
    }
}
