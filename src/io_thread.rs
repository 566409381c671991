//! The I/O thread: event-manager's loop, which drives what devices lend it, and can be brought to rest.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use event_manager::{
    EventManager, EventOps, Events, MutEventSubscriber, RemoteEndpoint, SubscriberId,
};
use vmm_devices::virtio::worker::{Lender, Worker};
use vmm_migration::channel::Flow;

use crate::migrate::aside::aside;

/// How long the thread sleeps when it passes over an event: a rest lasts until the vCPUs are home.
const REST_NAP: Duration = Duration::from_micros(50);

/// The thread and the way to reach it. Dropping it ends and joins the thread.
pub struct IoThread {
    endpoint: Endpoint,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// A handle through which a device lends its worker. Never used from the thread itself.
#[derive(Clone)]
pub struct Endpoint {
    remote: RemoteEndpoint<Task>,
    flags: Flags,
}

/// How the thread is told.
#[derive(Clone, Default)]
struct Flags {
    /// It serves no device.
    rests: Arc<AtomicBool>,
    /// It doesn't nap meanwhile: somebody waits.
    hurries: Arc<AtomicBool>,
}

/// While it lasts, the thread serves no device: no I/O begins.
pub struct Rest(Flags);

impl Rest {
    /// The thread passes over events without a nap from here on: its end is near.
    pub fn hurry(&self) {
        self.0.hurries.store(true, Ordering::Release);
    }
}

impl Drop for Rest {
    fn drop(&mut self) {
        self.0.rests.store(false, Ordering::Release);
        self.0.hurries.store(false, Ordering::Release);
    }
}

/// A worker that is passed over while the thread rests. Events are level-triggered: none is lost.
struct Task {
    worker: Box<Worker>,
    flags: Flags,
}

impl MutEventSubscriber for Task {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if !self.flags.rests.load(Ordering::Acquire) {
            self.worker.process(events, ops);
        } else if !self.flags.hurries.load(Ordering::Acquire) {
            std::thread::sleep(REST_NAP);
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        self.worker.init(ops);
    }
}

const HERE: &str = "the I/O thread outlives the devices and holds what it was lent";

impl Lender for Endpoint {
    fn lend(&self, mut worker: Box<Worker>) -> SubscriberId {
        worker.heed(Arc::clone(&self.flags.rests));
        let task = Task { worker, flags: self.flags.clone() };
        let lent = self
            .remote
            .call_blocking(move |ops| Ok::<_, event_manager::Error>(ops.add_subscriber(task)));
        lent.expect(HERE)
    }

    fn take_back(&self, id: SubscriberId) -> Box<Worker> {
        self.remote.call_blocking(move |ops| ops.remove_subscriber(id)).expect(HERE).worker
    }
}

impl IoThread {
    /// Starts the thread, with nothing to drive yet.
    pub fn start() -> io::Result<Self> {
        let mut manager = EventManager::<Task>::new().map_err(other)?;
        let endpoint = Endpoint { remote: manager.remote_endpoint(), flags: Flags::default() };
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("io".to_owned()).spawn(move || {
            while !stopped.load(Ordering::Acquire) {
                if let Err(e) = manager.run() {
                    tracing::error!("the I/O thread can't wait for events: {e:?}");
                    break;
                }
            }
        })?;
        Ok(Self { endpoint, stop, thread: Some(thread) })
    }

    /// A handle through which a device lends its worker.
    #[must_use]
    pub fn endpoint(&self) -> Endpoint {
        self.endpoint.clone()
    }

    /// Brings the thread to rest once it has done what it is at: nobody can tell how long storage takes, so that `poll` can
    /// cancel the wait. From the return on, who takes a worker back waits for no I/O.
    ///
    /// # Errors
    /// There can be no further thread.
    pub fn rest(&self, poll: &mut dyn FnMut() -> Flow) -> io::Result<Option<Rest>> {
        let rest = Rest(self.endpoint.flags.clone());
        rest.0.rests.store(true, Ordering::Release);
        let remote = self.endpoint.remote.clone();
        // The request that it is at ends before it answers, and what it sees then is passed over.
        let wait = move || drop(remote.call_blocking(|_| Ok::<_, event_manager::Error>(())));
        Ok(aside("io-rest", wait, poll)?.map(|()| rest))
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // A kick that can't be sent means that the thread has ended.
        let _ = self.endpoint.remote.kick();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn other(e: event_manager::Error) -> io::Error {
    io::Error::other(format!("{e:?}"))
}

#[cfg(test)]
#[path = "io_thread_tests.rs"]
mod tests;
