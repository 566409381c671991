//! The control thread during a migration or a snapshot: it runs the choreography itself and still answers
//! its clients.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use serde_json::json;
use vmm_migration::report::Report;
use vmm_migration::source::Decision;

use crate::background;
use crate::config::Config;
use crate::event::{ApiError, Event, MigrateRequest, Reply, Request, Resolution, SnapshotRequest};
use crate::migrate::outgoing::{self, Departure, Pending};
use crate::migrate::snapshotting;
use crate::migrate::uri::Uri;
use crate::vm::Vm;
use crate::watch::{Errand, Watch};

/// How often a source in doubt tries to find out.
const RETRY_PERIOD: Duration = Duration::from_secs(2);

/// How the VM's migration ended for this process.
pub enum Moved {
    /// The guest runs elsewhere: where.
    Away(String),
    /// The guest goes on here.
    Here(Vm),
    /// An order to end came while nobody knew who has the guest.
    Ended(String),
}

/// What the control thread lends to a migration or a snapshot.
pub struct Mover<'a> {
    /// Where events come from.
    pub inbox: &'a Receiver<Event>,
    /// Events that wait for the migration's end.
    pub deferred: &'a mut VecDeque<Event>,
}

impl Mover<'_> {
    /// Migrates, and answers `reply` at the end.
    pub fn migrate(mut self, vm: Vm, request: &MigrateRequest, reply: Reply) -> Moved {
        let config = vm.config().clone();
        let mut watch =
            Watch::new(Errand::Migration, self.inbox, self.deferred, &config, Some(&reply));
        let mut departure = outgoing::migrate(vm, request, &mut watch);
        if let Departure::Stayed { outcome: Err((why, _)), .. } = &mut departure {
            *why = watch.explain(std::mem::take(why));
        }
        if let Departure::Pending(pending) = &departure {
            tracing::error!("{}", pending.explain());
            reply.progress(json!({ "stage": "in-doubt", "message": pending.explain() }));
        }
        while let Departure::Pending(pending) = departure {
            departure = match self.wait(&config, &pending) {
                Word::Retry => {
                    let (inbox, deferred) = (self.inbox, &mut *self.deferred);
                    let mut watch = Watch::new(Errand::Migration, inbox, deferred, &config, None);
                    pending.retry(&request.uri, &mut watch)
                }
                Word::Decided(decision, operator) => {
                    operator.done(Ok(json!({})));
                    pending.decide(decision)
                }
                Word::End(why) => {
                    reply.done(Err(ApiError::internal(pending.explain())));
                    return Moved::Ended(why);
                }
            };
        }
        finish(departure, &request.uri, reply)
    }

    /// Writes a snapshot, and answers `reply` at the end. The VM goes on as it was.
    pub fn snapshot(self, vm: Vm, request: &SnapshotRequest, reply: Reply) -> Vm {
        let config = vm.config().clone();
        let (inbox, deferred) = (self.inbox, self.deferred);
        let mut watch = Watch::new(Errand::Snapshot, inbox, deferred, &config, Some(&reply));
        let (vm, result) = snapshotting::write(vm, request, &mut watch);
        let result = result.map_err(|e| ApiError { message: watch.explain(e.message), ..e });
        reply.done(result);
        vm
    }

    /// Waits a while, or until the operator decides.
    fn wait(&mut self, config: &Config, pending: &Pending) -> Word {
        let until = Instant::now() + RETRY_PERIOD;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.inbox.recv_timeout(left) {
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    return Word::Retry;
                }
                Ok(Event::Signal(signal)) => return Word::End(format!("ended by signal {signal}")),
                Ok(Event::ConsoleQuit) => return Word::End("ended from the console".to_owned()),
                Ok(Event::Request { request, reply }) => match request {
                    Request::Info => {
                        let mut info = Vm::describe(config, "in-doubt");
                        info["message"] = json!(pending.explain());
                        reply.done(Ok(info));
                    }
                    Request::Resolve(Resolution::Resume) => {
                        return Word::Decided(Decision::Resume, reply);
                    }
                    Request::Resolve(Resolution::Discard) => {
                        return Word::Decided(Decision::Discard, reply);
                    }
                    Request::Stop { force: true } => {
                        reply.done(Ok(json!({ "ended": "forced" })));
                        return Word::End("stopped by force".to_owned());
                    }
                    _ => reply.done(Err(ApiError::conflict(pending.explain()))),
                },
                // The guest stands: these are of its last moments, and matter if it goes on.
                Ok(other) => self.deferred.push_back(other),
            }
        }
    }
}

enum Word {
    Retry,
    Decided(Decision, Reply),
    End(String),
}

fn finish(departure: Departure, uri: &Uri, reply: Reply) -> Moved {
    match departure {
        Departure::Moved { left, report } => {
            reply.done(Ok(outgoing::report_json(&report)));
            background::enter();
            drop(left);
            Moved::Away(format!("the guest moved to {uri}{}", told(&report)))
        }
        Departure::Stayed { vm, outcome: Ok((_, report)) } => {
            reply.done(Ok(outgoing::report_json(&report)));
            Moved::Here(vm)
        }
        Departure::Stayed { vm, outcome: Err((why, _)) } => {
            reply.done(Err(ApiError::conflict(why)));
            Moved::Here(vm)
        }
        Departure::Pending(pending) => unreachable!("waited for above: {}", pending.explain()),
    }
}

fn told(report: &Report) -> String {
    match &report.downtime {
        Some(downtime) => {
            format!(
                " with a downtime of {}.{:03} ms",
                downtime.total_us / 1000,
                downtime.total_us % 1000
            )
        }
        None => String::new(),
    }
}
