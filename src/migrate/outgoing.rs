//! The source: drives a VM's move to another host, and finds out who has it where that is in doubt.

use std::time::Duration;

use serde_json::{Value, json};
use vmm_migration::channel::{Channel, Clock, Flow, SystemClock};
use vmm_migration::plan::MigrationId;
use vmm_migration::policy::{self, Limits};
use vmm_migration::report::{Forecast, Observer, Progress, Report, Stage};
use vmm_migration::source::{
    self, Aborted, Commitment, Deadlines, Decision, InDoubt, Options, Place, Source,
};
use vmm_migration::wire::Algorithm;

use super::aside::aside;
use super::carrier::Carrier;
use super::leaving::{HaltedGuest, LiveGuest};
use super::link;
use super::uri::Uri;
use crate::chain::chain;
use crate::config::Config;
use crate::event::{MigrateRequest, OnTimeout};
use crate::vm::Vm;

/// This program, as the other end reads it.
#[must_use]
pub fn software() -> String {
    format!("vmm {}", env!("CARGO_PKG_VERSION"))
}

/// What came of an attempt to move a VM, as far as is known.
pub enum Departure {
    /// The guest runs at the destination. What is left here is to be dropped.
    Moved {
        /// The machine that it left.
        left: Box<HaltedGuest>,
        /// How it went.
        report: Report,
    },
    /// The guest goes on here.
    Stayed {
        /// The VM.
        vm: Vm,
        /// Why; what was forecast for a dry run.
        outcome: Result<(Forecast, Report), (String, Option<Report>)>,
    },
    /// Nobody knows yet who has the guest, or it can't go on here yet. It stands, whole.
    Pending(Pending),
}

/// A guest that stands until somebody knows more.
pub enum Pending {
    /// `Commit` was written, and no answer read.
    InDoubt(Box<InDoubt<LiveGuest>>),
    /// It is this side's, but can't go on: its disks are in other hands, say.
    Stuck(Box<Aborted<LiveGuest>>, String),
}

/// Moves a VM, or only forecasts its move. Gives the command that carries the stream too, if one does: it is to be left to
/// itself unless the guest stays, for what it runs there may be the guest.
pub fn migrate(
    vm: Vm,
    request: &MigrateRequest,
    observer: &mut dyn Observer,
) -> (Departure, Option<Carrier>) {
    match connect(&request.uri, observer) {
        Ok((channel, carrier)) => (migrate_through(channel, vm, request, observer), carrier),
        Err(why) => (Departure::Stayed { vm, outcome: Err((why, None)) }, None),
    }
}

fn migrate_through(
    channel: Channel,
    vm: Vm,
    request: &MigrateRequest,
    observer: &mut dyn Observer,
) -> Departure {
    let stayed = |vm, why| Departure::Stayed { vm, outcome: Err((why, None)) };
    let options = match options(request) {
        Ok(options) => options,
        Err(e) => return stayed(vm, chain(&e)),
    };
    let guest = LiveGuest::new(vm);
    if !request.dry_run {
        return match source::migrate(channel, options, guest, observer) {
            Ok(commitment) => settle(commitment),
            Err(failed) => stayed(failed.0.into_vm(), failed.1.line()),
        };
    }
    let source = match Source::connect(channel, options, observer) {
        Ok(source) => source,
        Err(e) => return stayed(guest.into_vm(), e.line()),
    };
    match source.reserve(guest, observer).and_then(|source| source.forecast(observer)) {
        Ok((guest, forecast, report)) => {
            Departure::Stayed { vm: guest.into_vm(), outcome: Ok((forecast, report)) }
        }
        Err(aborted) => resume(*aborted),
    }
}

/// Connects, and looks meanwhile who wants to know or to cancel: a name can take long to be found, and a host to
/// answer.
fn connect(uri: &Uri, observer: &mut dyn Observer) -> Result<(Channel, Option<Carrier>), String> {
    let there = uri.clone();
    let mut poll = || observer.observe(&Progress::default());
    match aside("connect", move || link::connect(&there), &mut poll) {
        Ok(Some(linked)) => linked.map_err(|e| chain(&e)),
        Ok(None) => Err(format!("cancelled while connecting to {uri}")),
        Err(e) => Err(format!("can't start to connect: {e}")),
    }
}

fn options(request: &MigrateRequest) -> Result<Options, rustix::io::Errno> {
    let mut id = [0; 16];
    rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())?;
    let clock = SystemClock::default();
    Ok(Options {
        id: MigrationId(id),
        software: software(),
        limits: limits(request.downtime_limit_ms, request.timeout_ms, request.on_timeout),
        bandwidth: request.bandwidth_bits_per_s.map(|bits| bits / 8),
        pages_checksum: Algorithm::fastest(|| clock.now()),
        deadlines: Deadlines::default(),
        dry_run: request.dry_run,
    })
}

/// The limits of a migration or a live snapshot, as the policy has them.
pub(super) fn limits(downtime_limit_ms: u64, timeout_ms: u64, on_timeout: OnTimeout) -> Limits {
    let on_timeout = match on_timeout {
        OnTimeout::Abort => policy::OnTimeout::Abort,
        OnTimeout::StopAndCopy => policy::OnTimeout::StopAndCopy,
        OnTimeout::Throttle => policy::OnTimeout::Throttle,
    };
    let (downtime, timeout) =
        (Duration::from_millis(downtime_limit_ms), Duration::from_millis(timeout_ms));
    Limits { downtime, timeout, on_timeout }
}

fn settle(commitment: Commitment<LiveGuest>) -> Departure {
    match commitment {
        Commitment::Moved(moved) => {
            Departure::Moved { left: Box::new(moved.guest), report: moved.report }
        }
        Commitment::Refused(aborted) => resume(*aborted),
        Commitment::InDoubt(doubt) => Departure::Pending(Pending::InDoubt(doubt)),
    }
}

fn resume(aborted: Aborted<LiveGuest>) -> Departure {
    match aborted.resume() {
        Ok(stayed) => Departure::Stayed {
            vm: stayed.guest.into_vm(),
            outcome: Err((stayed.error.line(), Some(stayed.report))),
        },
        Err(stuck) => {
            let (aborted, why) = *stuck;
            let why = format!("{}; and {}", aborted.error.line(), chain(&why));
            Departure::Pending(Pending::Stuck(Box::new(aborted), why))
        }
    }
}

impl Pending {
    /// Tries to find out: asks the destination, then the disks' locks; or tries to go on. An observer that cancels has
    /// better to do.
    #[must_use]
    pub fn retry(self, uri: &Uri, observer: &mut dyn Observer) -> Departure {
        match self {
            Self::Stuck(aborted, _) => resume(*aborted),
            Self::InDoubt(mut doubt) => {
                if let Ok((channel, _carrier)) = connect(uri, observer) {
                    match doubt.ask(channel, observer) {
                        Commitment::InDoubt(still) => doubt = still,
                        known => return settle(known),
                    }
                }
                let progress = Progress { stage: Stage::Commitment, ..Progress::default() };
                match observer.observe(&progress) {
                    Flow::Continue => settle(doubt.try_locks()),
                    Flow::Cancel => Departure::Pending(Self::InDoubt(doubt)),
                }
            }
        }
    }

    /// Does as the operator says.
    #[must_use]
    pub fn decide(self, decision: Decision) -> Departure {
        match (self, decision) {
            (Self::InDoubt(doubt), decision) => settle(doubt.decide(decision)),
            (Self::Stuck(mut aborted, _), Decision::Resume) => {
                aborted.trust_disks();
                resume(*aborted)
            }
            (Self::Stuck(aborted, why), Decision::Discard) => match aborted.discard() {
                Ok(moved) => Departure::Moved { left: Box::new(moved.guest), report: moved.report },
                Err(aborted) => Departure::Pending(Self::Stuck(aborted, why)),
            },
        }
    }

    /// What is known, on one line.
    #[must_use]
    pub fn explain(&self) -> String {
        match self {
            Self::InDoubt(doubt) => format!(
                "in doubt: the destination was told to run the guest (migration {}) and has not \
                 answered ({}); the guest stands here until it does{}. If you know better: vmm migrate \
                 --resolve resume|discard VM{}",
                doubt.id(),
                doubt.error.line(),
                if doubt.locks_can_tell() { " or its disks' locks are free" } else { "" },
                match &doubt.refused {
                    Some(why) => format!(". Told to resume it, it could not: {}", chain(why)),
                    None => String::new(),
                }
            ),
            Self::Stuck(_, why) => format!(
                "the guest is here and can't go on yet: {why}. vmm migrate --resolve resume|discard VM"
            ),
        }
    }

    /// What the VM was built from.
    #[must_use]
    pub fn config(&self) -> &Config {
        let core = match self {
            Self::InDoubt(doubt) => doubt.guest().core(),
            Self::Stuck(aborted, _) => match &aborted.guest {
                Place::Halted { guest, .. } => guest.core(),
                Place::Live(guest) => guest.core(),
            },
        };
        &core.config
    }
}

/// A report as JSON: `docs` are those of [`Report`]'s fields.
#[must_use]
pub fn report_json(report: &Report) -> Value {
    serde_json::to_value(report).unwrap_or_else(|e| json!({ "error": e.to_string() }))
}
