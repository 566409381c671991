//! Output: from the vCPUs, through a ring, by a thread of its own to wherever the console goes.
//!
//! A reader that is slow meets the guest in three steps, by the bytes that are pending:
//! from [`BUSY_FROM`] the UART reads as busy, and drivers wait; from [`HELD_FROM`] each write of a guest
//! that doesn't wait is held up for at most [`HOLD`], and taken; where [`ring::CAPACITY`] is reached the
//! bytes are lost, and the console says how many once it moves again. So nothing is lost to a reader that
//! takes 100 bytes a second, and no vCPU stands still for longer than [`HOLD`].

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::sync::{Arc, OnceLock};
use std::thread::Thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use vmm_devices::serial::Wire;

use super::notice::Notice;
use super::ring::{self, Ring};

/// Bytes pending from which the UART's transmitter is busy.
pub const BUSY_FROM: usize = 16 << 10;
/// Bytes pending at which a guest that waits for the transmitter is told that it is empty.
pub const DRAINED_AT: usize = 4 << 10;
/// Bytes pending from which a guest that doesn't wait is held up.
pub const HELD_FROM: usize = ring::CAPACITY / 2;
/// How long one write of such a guest is held up at most.
pub const HOLD: Duration = Duration::from_millis(10);
/// Output that is kept, newest last, for the next client of a socket that has none, in bytes.
pub const KEPT_LEN_MAX: usize = 64 << 10;

/// The most bytes of one `write`: what a pipe takes whole.
const CHUNK_LEN: usize = 4096;
/// How long the thread gathers bytes after a write, before it waits to be woken: the difference
/// between one system call for each line and one, on the vCPU too, for each byte.
const GATHER: Duration = Duration::from_millis(1);

/// What the vCPUs, the writing thread and the control thread share.
pub struct Output {
    ring: Ring,
    /// A guest was told to wait; to be told when it may go on.
    starved: AtomicBool,
    /// The writing thread waits to be woken.
    idle: AtomicBool,
    closed: AtomicBool,
    /// Bytes lost since the console last said so.
    lost: AtomicU64,
    writer: OnceLock<Thread>,
    /// Wakes the input thread, which speaks to the UART.
    notice: Arc<Notice>,
}

impl Output {
    /// Starts the writing thread.
    pub fn start(sink: Sink, notice: Arc<Notice>) -> io::Result<Arc<Self>> {
        let output = Arc::new(Self {
            ring: Ring::default(),
            starved: AtomicBool::new(false),
            idle: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            lost: AtomicU64::new(0),
            writer: OnceLock::new(),
            notice,
        });
        let shared = Arc::clone(&output);
        let thread = std::thread::Builder::new()
            .name("console-out".to_owned())
            .spawn(move || shared.write_on(sink))?;
        // The handle is let go: a write to a reader that sleeps can't be ended, only left behind.
        output.writer.get_or_init(|| thread.thread().clone());
        Ok(output)
    }

    /// The UART's end.
    pub fn wire(self: &Arc<Self>) -> Box<dyn Wire> {
        Box::new(OutputWire(Arc::clone(self)))
    }

    /// Waits until all is written, at most for `timeout`. False if something is left.
    pub fn flush(&self, timeout: Duration) -> bool {
        let start = Instant::now();
        loop {
            if self.ring.pending() == 0 && self.lost.load(Ordering::SeqCst) == 0 {
                return true;
            }
            if start.elapsed() >= timeout {
                return false;
            }
            self.wake();
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Ends the thread once all is written.
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.wake();
    }

    /// Wakes the writing thread, whatever it waits for but a write.
    pub fn wake(&self) {
        if let Some(writer) = self.writer.get() {
            writer.unpark();
        }
    }

    fn write_on(&self, mut sink: Sink) {
        let mut chunk = [0; CHUNK_LEN];
        loop {
            sink.meet_client();
            let count = self.ring.peek(&mut chunk);
            if count > 0 {
                sink.write(&chunk[..count]);
                self.ring.consume(count);
                self.tell_drained();
                continue;
            }
            let lost = self.lost.load(Ordering::SeqCst);
            if lost > 0 {
                let text = format!("\r\n[vmm: {lost} bytes of output lost: nobody read them]\r\n");
                sink.write(text.as_bytes());
                self.lost.fetch_sub(lost, Ordering::SeqCst);
            } else if self.closed.load(Ordering::SeqCst) {
                return;
            } else {
                self.rest();
            }
        }
    }

    /// Gathers for a moment, then waits for somebody to wake this thread.
    fn rest(&self) {
        // Not parked: that would take a wake from the wait below.
        std::thread::sleep(GATHER);
        if self.ring.pending() > 0 {
            return;
        }
        self.idle.store(true, Ordering::SeqCst);
        // A push that came before the line above is seen here; one that comes after it wakes.
        if self.ring.pending() == 0 && !self.closed.load(Ordering::SeqCst) {
            std::thread::park();
        }
        self.idle.store(false, Ordering::SeqCst);
    }

    fn tell_drained(&self) {
        if self.ring.pending() <= DRAINED_AT && self.starved.swap(false, Ordering::SeqCst) {
            self.notice.give();
        }
    }
}

struct OutputWire(Arc<Output>);

impl Wire for OutputWire {
    fn push(&mut self, bytes: &[u8]) {
        let output = &*self.0;
        let start = Instant::now();
        while output.ring.pending() >= HELD_FROM && start.elapsed() < HOLD {
            std::thread::sleep(Duration::from_millis(1));
        }
        let lost = bytes.len() - output.ring.push(bytes);
        if lost > 0 {
            output.lost.fetch_add(u64::try_from(lost).unwrap_or(u64::MAX), Ordering::SeqCst);
        }
        if output.idle.load(Ordering::SeqCst) {
            output.wake();
        }
    }

    fn room(&self) -> bool {
        if self.0.ring.pending() < BUSY_FROM {
            return true;
        }
        self.0.starved.store(true, Ordering::SeqCst);
        // What was written before the line above is seen here; what is written after it gives notice.
        self.0.ring.pending() < BUSY_FROM
    }

    fn input_wanted(&self) {
        self.0.notice.give();
    }
}

/// The wire to nowhere.
pub struct NullWire;

impl Wire for NullWire {
    fn push(&mut self, _: &[u8]) {}

    fn room(&self) -> bool {
        true
    }

    fn input_wanted(&self) {}
}

/// Where the bytes go.
pub enum Sink {
    /// This process's standard output, unbuffered.
    Stdout(io::Stdout),
    /// A file.
    File(File),
    /// The clients of a socket.
    Clients(Clients),
    /// Nowhere any more: writing failed.
    Closed,
}

impl Sink {
    fn write(&mut self, bytes: &[u8]) {
        let result = match self {
            Self::Stdout(stdout) => write_all(&*stdout, bytes),
            Self::File(file) => write_all(&*file, bytes),
            Self::Clients(clients) => return clients.write(bytes),
            Self::Closed => return,
        };
        if let Err((_, e)) = result {
            tracing::warn!("console: can't write: {e}: the guest's further output is dropped");
            *self = Self::Closed;
        }
    }

    fn meet_client(&mut self) {
        if let Self::Clients(clients) = self {
            clients.meet();
        }
    }
}

/// At most one client of a socket, and what is kept for the next one.
pub struct Clients {
    arrivals: Receiver<UnixStream>,
    client: Option<UnixStream>,
    kept: VecDeque<u8>,
}

impl Clients {
    /// No client yet; they come by `arrivals`.
    pub fn new(arrivals: Receiver<UnixStream>) -> Self {
        Self { arrivals, client: None, kept: VecDeque::new() }
    }

    fn meet(&mut self) {
        match self.arrivals.try_recv() {
            Ok(client) => {
                self.client = Some(client);
                let kept: Vec<u8> = std::mem::take(&mut self.kept).into();
                self.write(&kept);
            }
            Err(TryRecvError::Empty | TryRecvError::Disconnected) => {}
        }
    }

    fn write(&mut self, bytes: &[u8]) {
        let mut rest = bytes;
        if let Some(client) = &self.client {
            match write_all(client, bytes) {
                Ok(()) => return,
                // The client went away.
                Err((written, _)) => {
                    self.client = None;
                    rest = &bytes[written..];
                }
            }
        }
        let excess = (self.kept.len() + rest.len()).saturating_sub(KEPT_LEN_MAX);
        self.kept.drain(..excess.min(self.kept.len()));
        self.kept.extend(&rest[rest.len().saturating_sub(KEPT_LEN_MAX)..]);
    }
}

/// Writes all, whether `fd` blocks or (because another process that shares it wants it so) doesn't.
/// An error says how much was written before it.
fn write_all(fd: impl AsFd, bytes: &[u8]) -> Result<(), (usize, Errno)> {
    let mut written = 0;
    while written < bytes.len() {
        match rustix::io::write(&fd, &bytes[written..]) {
            Ok(0) => return Err((written, Errno::IO)),
            Ok(count) => written += count,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                // An error here shows up again in the write.
                let _ = poll(&mut [PollFd::new(&fd, PollFlags::OUT)], None);
            }
            Err(e) => return Err((written, e)),
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "output_tests.rs"]
mod tests;
