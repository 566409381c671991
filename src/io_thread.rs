//! The I/O thread: event-manager's loop, which drives what devices lend it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use event_manager::{EventManager, RemoteEndpoint};
use vmm_devices::virtio::worker::IoTask;

/// The thread and the way to reach it. Dropping it ends and joins the thread.
pub struct IoThread {
    endpoint: RemoteEndpoint<IoTask>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl IoThread {
    /// Starts the thread, with nothing to drive yet.
    pub fn start() -> io::Result<Self> {
        let mut manager = EventManager::<IoTask>::new().map_err(other)?;
        let endpoint = manager.remote_endpoint();
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
    pub fn endpoint(&self) -> RemoteEndpoint<IoTask> {
        self.endpoint.clone()
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // A kick that can't be sent means that the thread has ended.
        let _ = self.endpoint.kick();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn other(e: event_manager::Error) -> io::Error {
    io::Error::other(format!("{e:?}"))
}
