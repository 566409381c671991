//! A virtio device with its queues: what the transport lends to the I/O thread while the device is live,
//! and takes back by value. While it is away nobody else touches device or queues, so no lock is needed.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber, SubscriberId};
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::interrupt::Interrupt;
use super::queue::{QUEUES_MAX, QueueIo};
use super::{DriverFault, VirtioDevice};
use crate::GuestRam;
use crate::limit::RateLimited;
use crate::sign::Signs;

/// How often one notification lets a device look at its queue before the other devices have their turn.
const ROUNDS_MAX: usize = 4;

/// Log lines a second that a guest can cause through one device's worker.
const LOG_LINES_PER_SECOND: u32 = 5;

/// Event data of the first input source; below are the queues.
const SOURCE_DATA: usize = QUEUES_MAX;

/// Who runs workers: the I/O thread, or a test.
pub trait Lender: Send {
    /// Hands a worker over; from the return on it is served.
    fn lend(&self, worker: Box<Worker>) -> SubscriberId;

    /// Takes it back; from the return on it is served no more.
    ///
    /// # Panics
    /// If `id` is not lent.
    fn take_back(&self, id: SubscriberId) -> Box<Worker>;
}

/// An input source of the device, and whether the event manager watches it now.
struct Source {
    fd: RawFd,
    watched: bool,
}

/// See the module.
pub struct Worker {
    pub(super) device: Box<dyn VirtioDevice>,
    ram: GuestRam,

    /// One for each queue: the guest's notifications (virtio 1.3, 4.2.3.3), by ioeventfd.
    kicks: Arc<[EventFd]>,
    interrupt: Interrupt,
    sign: Arc<Signs>,
    log: RateLimited,
    /// As of the last time the worker was lent.
    sources: Vec<Source>,
    /// While set, it begins no more of what the guest asks: see [`Worker::heed`].
    hold: Arc<AtomicBool>,
    /// Of each queue: how often the worker itself kicked it since it last looked.
    own_kicks: [u64; QUEUES_MAX],

    pub(super) queues: Vec<Queue>,
}

impl Worker {
    pub(super) fn new(
        device: Box<dyn VirtioDevice>,
        ram: GuestRam,
        kicks: Arc<[EventFd]>,
        interrupt: Interrupt,
        sign: Arc<Signs>,
        queues: Vec<Queue>,
    ) -> Self {
        let log = RateLimited::new(LOG_LINES_PER_SECOND);
        let (sources, own_kicks) = (Vec::new(), [0; QUEUES_MAX]);
        let hold = Arc::default();
        Self { device, ram, kicks, interrupt, sign, log, sources, hold, own_kicks, queues }
    }

    /// Has it end what it is at, whenever `hold` is set, before the queue is empty: it looks at the queue again later.
    pub fn heed(&mut self, hold: Arc<AtomicBool>) {
        self.hold = hold;
    }

    pub(super) fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Runs one call into the device and tells the driver what came of it, also if it failed. One that is held finds the
    /// queues empty while there is a hold.
    fn call<T>(
        &mut self,
        is_held: bool,
        f: impl FnOnce(&mut dyn VirtioDevice, &mut QueueIo<'_>) -> Result<T, DriverFault>,
    ) -> Result<T, DriverFault> {
        let io = QueueIo::new(&self.ram, &mut self.queues);
        let mut io = if is_held { io.held_by(&self.hold) } else { io };
        let result = f(self.device.as_mut(), &mut io);
        let signals = io.finish();
        self.interrupt.send(*signals.as_ref().unwrap_or(&Default::default()));
        signals.and(result)
    }

    /// Serves a queue until it is empty, the device takes no more, or others want their turn (`true`).
    fn serve(&mut self, queue: usize) -> Result<bool, DriverFault> {
        for _ in 0..ROUNDS_MAX {
            let before = self.queues[queue].next_avail();
            let left = self.call(true, |device, io| {
                io.disable_notification(queue)?;
                device.process(queue, io)?;
                if io.is_armed(queue) { Ok(false) } else { io.enable_notification(queue) }
            })?;
            if self.hold.load(Ordering::Acquire) {
                return Ok(true);
            }
            if !left || self.queues[queue].next_avail() == before {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn kicked(&mut self, queue: usize, ops: &mut EventOps<'_>) -> Result<(), DriverFault> {
        // Nothing to read: a notification that was already served.
        let count = self.kicks[queue].read().unwrap_or(0);
        if count > std::mem::take(&mut self.own_kicks[queue]) {
            self.sign.note();
        }
        if !self.queues[queue].ready() {
            return Ok(());
        }
        if self.serve(queue)? {
            self.kick_itself(queue);
        }
        for index in 0..self.sources.len() {
            self.watch(index, ops);
        }
        Ok(())
    }

    /// Has it look at a queue again.
    fn kick_itself(&mut self, queue: usize) {
        self.own_kicks[queue] += 1;
        kick(&self.kicks[queue]);
    }

    fn input(
        &mut self,
        index: usize,
        readable: bool,
        ops: &mut EventOps<'_>,
    ) -> Result<(), DriverFault> {
        // Level-triggered: a source that only hangs up would wake the thread for ever.
        if !readable || !self.call(false, |device, io| device.source_ready(index, io))? {
            let source = &mut self.sources[index];
            source.watched = false;
            let _ = ops.remove(Events::empty_raw(source.fd));
        }
        Ok(())
    }

    fn watch(&mut self, index: usize, ops: &mut EventOps<'_>) {
        let source = &mut self.sources[index];
        if !source.watched && !self.interrupt.needs_reset() {
            let data = event_data(SOURCE_DATA + index);
            source.watched = ops.add(Events::with_data_raw(source.fd, data, EventSet::IN)).is_ok();
            if !source.watched {
                self.fail(&"its input can't be watched", ops);
            }
        }
    }

    /// The device does nothing more until it is reset.
    fn fail(&mut self, why: &dyn std::fmt::Display, ops: &mut EventOps<'_>) {
        self.interrupt.fail();
        for kick in self.kicks.iter() {
            let _ = ops.remove(Events::empty(kick));
        }
        for source in &mut self.sources {
            source.watched = false;
            let _ = ops.remove(Events::empty_raw(source.fd));
        }
        if let Some(dropped) = self.log.admit() {
            let device = self.device.kind();
            tracing::warn!(device, dropped, "the device stops until its driver resets it: {why}");
        }
    }
}

impl MutEventSubscriber for Worker {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let source = |fd| Source { fd, watched: false };
        self.sources = self.device.sources().into_iter().map(source).collect();
        for queue in 0..self.kicks.len() {
            let events = Events::with_data(&self.kicks[queue], event_data(queue), EventSet::IN);
            if let Err(e) = ops.add(events) {
                return self.fail(&e, ops);
            }
            // What the driver made available before, and what a move interrupted, is found by looking.
            self.kick_itself(queue);
        }
        for index in 0..self.sources.len() {
            self.watch(index, ops);
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if self.interrupt.needs_reset() {
            return;
        }
        let index = events.data() as usize;
        let result = if index < self.queues.len() {
            self.kicked(index, ops)
        } else {
            let readable = events.event_set().contains(EventSet::IN);
            self.input(index - SOURCE_DATA, readable, ops)
        };
        if let Err(fault) = result {
            self.fail(&fault, ops);
        }
    }
}

fn event_data(index: usize) -> u32 {
    u32::try_from(index).expect("a device has few queues and sources")
}

/// Notifies a queue. A full counter has a notification pending anyway.
pub(super) fn kick(kick: &EventFd) {
    let _ = kick.write(1);
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
