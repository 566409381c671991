//! Brings a VM to rest, for good or for a while. Its storage may hang: clients and orders are heard meanwhile, and who ends a VM
//! doesn't wait for ever.

use std::collections::VecDeque;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use vmm_migration::channel::Flow;
use vmm_migration::report::{Observer, Progress};

use crate::event::{ApiError, Event, Reply};
use crate::machine::Machine;
use crate::running::Running;
use crate::vm::Vm;
use crate::watch::{Errand, Watch};

/// How long who ends a VM waits for the I/O that its devices are at.
pub const END_PATIENCE: Duration = Duration::from_secs(10);

/// Pauses a VM, unless it is told otherwise before its devices' I/O has ended: then it goes on, and why.
pub fn pause(
    mut running: Running,
    inbox: &Receiver<Event>,
    deferred: &mut VecDeque<Event>,
    reply: &Reply,
) -> (Vm, Result<(), ApiError>) {
    let config = running.core().config.clone();
    let mut watch = Watch::new(Errand::Pause, inbox, deferred, &config, None);
    let progress = Progress::default();
    let settled = running.settle(&mut || {
        // Who has gone away wants nothing any more.
        if reply.is_awaited() { watch.observe(&progress) } else { Flow::Cancel }
    });
    if let Ok(Flow::Cancel) = settled {
        let why = "the VM was not paused: the I/O of its devices had not ended".to_owned();
        return (Vm::Running(running), Err(ApiError::conflict(watch.explain(why))));
    }
    // Where there is no thread to wait on, it takes as long as it takes.
    (Vm::Paused(running.stop()), Ok(()))
}

/// Brings a VM home that ends. `None`: its devices' I/O took longer than `patience`, or than the next order to end. What is left
/// of the VM ends with this process then.
pub fn bring_home(
    vm: Vm,
    inbox: &Receiver<Event>,
    deferred: &mut VecDeque<Event>,
    patience: Option<Duration>,
) -> Option<Machine> {
    let mut running = match vm {
        Vm::Running(running) => running,
        Vm::Paused(machine) => return Some(machine),
    };
    let config = running.core().config.clone();
    let mut watch = Watch::new(Errand::End, inbox, deferred, &config, None);
    let (progress, start) = (Progress::default(), Instant::now());
    let settled = running.settle(&mut || {
        let is_late = patience.is_some_and(|patience| start.elapsed() >= patience);
        if is_late { Flow::Cancel } else { watch.observe(&progress) }
    });
    if let Ok(Flow::Cancel) = settled {
        let ms = start.elapsed().as_millis();
        tracing::warn!(
            "the I/O of a device has not ended in {ms} ms: it is left to this host, and what it was to write may be missing"
        );
        running.abandon();
        return None;
    }
    Some(running.stop())
}
