//! The control thread during a migration or a snapshot: it runs the choreography itself and still answers
//! its clients.

use std::collections::VecDeque;
use std::sync::mpsc::Receiver;

use serde_json::json;
use vmm_migration::report::{Outcome, Report};

use crate::background;
use crate::doubt::{Doubt, Ended};
use crate::event::{ApiError, Event, MigrateRequest, Reply, SnapshotRequest};
use crate::migrate::outgoing::{self, Departure};
use crate::migrate::snapshotting;
use crate::migrate::uri::Uri;
use crate::vm::Vm;
use crate::watch::{Errand, Watch};

/// What became of a guest that could go on nowhere.
const DISCARDED: &str = "the guest was discarded here, as the operator said";

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
    /// Migrates, and answers `reply` at the end. `vacate` gives the VM's sockets back once the guest has gone.
    pub fn migrate(
        self,
        vm: Vm,
        request: &MigrateRequest,
        reply: Reply,
        vacate: &dyn Fn(),
    ) -> Moved {
        let config = vm.config().clone();
        let mut watch =
            Watch::new(Errand::Migration, self.inbox, self.deferred, &config, Some(&reply));
        let (mut departure, carrier) = outgoing::migrate(vm, request, &mut watch);
        if let Departure::Stayed { outcome: Err((why, _)), .. } = &mut departure {
            *why = watch.explain(std::mem::take(why));
        }
        let settled = match departure {
            Departure::Pending(pending) => {
                tracing::error!("{}", pending.explain());
                reply.progress(json!({ "stage": "in-doubt", "message": pending.explain() }));
                Doubt::new(self.inbox, self.deferred, &config).settle(pending, &request.uri)
            }
            settled => Ok(settled),
        };
        if let (Some(carrier), Ok(Departure::Moved { .. }) | Err(_)) = (carrier, &settled) {
            carrier.leave();
        }
        match settled {
            Ok(departure) => finish(departure, &request.uri, reply, vacate),
            Err(Ended { why, known }) => {
                reply.done(Err(ApiError::internal(known)));
                Moved::Ended(why)
            }
        }
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
}

/// Who hears that the guest has gone may bring it back at once: its disks, TAPs and sockets are free by then. Its memory comes
/// back to the host a moment later.
fn finish(departure: Departure, uri: &Uri, reply: Reply, vacate: &dyn Fn()) -> Moved {
    match departure {
        Departure::Moved { left, report } => {
            // A guest that couldn't go on here, and that the operator gave up, has moved nowhere.
            let (answer, told) = match report.outcome {
                Outcome::NotMoved => (Err(ApiError::conflict(DISCARDED)), DISCARDED.to_owned()),
                Outcome::Moved | Outcome::InDoubt => {
                    let told = format!("the guest moved to {uri}{}", told(&report));
                    (Ok(outgoing::report_json(&report)), told)
                }
            };
            let memory = left.let_go();
            vacate();
            reply.done(answer);
            background::give_back(memory);
            Moved::Away(told)
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
        None => "; how long it stood isn't known".to_owned(),
    }
}
