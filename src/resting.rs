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
    // Who has gone away wants nothing any more.
    let is_over = || !reply.is_awaited();
    match settle(&mut running, Errand::Pause, inbox, deferred, &is_over) {
        Ok(()) => (Vm::Paused(running.stop()), Ok(())),
        Err(why) => {
            let why = format!("the VM was not paused: {why}");
            (Vm::Running(running), Err(ApiError::conflict(why)))
        }
    }
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
    let start = Instant::now();
    let is_over = || patience.is_some_and(|patience| start.elapsed() >= patience);
    if settle(&mut running, Errand::End, inbox, deferred, &is_over).is_ok() {
        return Some(running.stop());
    }
    let ms = start.elapsed().as_millis();
    tracing::warn!(
        "the I/O of a device has not ended in {ms} ms: it is left to this host, and what it was to write may be missing"
    );
    running.abandon();
    None
}

/// Lets the devices' I/O come to its end, and hears clients and orders meanwhile. One of these, or `is_over`, ends the wait: why.
fn settle(
    running: &mut Running,
    errand: Errand,
    inbox: &Receiver<Event>,
    deferred: &mut VecDeque<Event>,
    is_over: &dyn Fn() -> bool,
) -> Result<(), String> {
    let config = running.core().config.clone();
    let mut watch = Watch::new(errand, inbox, deferred, &config, None);
    let progress = Progress::default();
    let settled =
        running.settle(&mut || if is_over() { Flow::Cancel } else { watch.observe(&progress) });
    match settled {
        Ok(Flow::Cancel) => Err(watch.explain("the I/O of its devices had not ended".to_owned())),
        // Where there is no thread to wait on, it takes as long as it takes.
        Ok(Flow::Continue) | Err(_) => Ok(()),
    }
}
