//! How a virtio device tells its driver that something happened: the bits of `InterruptStatus` (virtio
//! 1.3, 4.2.2), the mark that the device needs a reset (2.1.2), and the line.
//!
//! This is all that a transport and its lent worker share besides the configuration space, hence the
//! atomics: a vCPU reads and acknowledges while the I/O thread sets.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::queue::Signals;
use crate::irq::IrqLine;

/// `InterruptStatus`: the device used a buffer.
pub const USED_BUFFER: u32 = 1;
/// `InterruptStatus`: the configuration or the status changed.
pub const CONFIG_CHANGE: u32 = 2;

#[derive(Debug, Default)]
struct Shared {
    status: AtomicU32,
    needs_reset: AtomicBool,
}

/// The interrupt of one device. Cloning gives another handle on the same.
#[derive(Clone)]
pub struct Interrupt {
    line: Arc<dyn IrqLine>,
    shared: Arc<Shared>,
}

impl Interrupt {
    /// An interrupt with nothing pending on `line`.
    pub fn new(line: Arc<dyn IrqLine>) -> Self {
        Self { line, shared: Arc::default() }
    }

    /// Sends what a call into the device left to be told.
    pub fn send(&self, signals: Signals) {
        let used = if signals.used { USED_BUFFER } else { 0 };
        let config = if signals.config { CONFIG_CHANGE } else { 0 };
        if used | config != 0 {
            self.shared.status.fetch_or(used | config, Ordering::SeqCst);
            self.line.trigger();
        }
    }

    /// Marks the device as in need of a reset and tells the driver by the configuration interrupt.
    pub fn fail(&self) {
        self.shared.needs_reset.store(true, Ordering::SeqCst);
        self.send(Signals { used: false, config: true });
    }

    /// Whether the device waits for a reset.
    #[must_use]
    pub fn needs_reset(&self) -> bool {
        self.shared.needs_reset.load(Ordering::SeqCst)
    }

    /// The bits not yet acknowledged.
    #[must_use]
    pub fn pending(&self) -> u32 {
        self.shared.status.load(Ordering::SeqCst)
    }

    /// The driver handled the events of `bits`.
    pub fn acknowledge(&self, bits: u32) {
        self.shared.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// Forgets everything: the driver reset the device.
    pub fn reset(&self) {
        self.restore(0, false);
    }

    /// Puts a saved state in. Bits that don't exist are left out.
    pub fn restore(&self, pending: u32, needs_reset: bool) {
        self.shared.status.store(pending & (USED_BUFFER | CONFIG_CHANGE), Ordering::SeqCst);
        self.shared.needs_reset.store(needs_reset, Ordering::SeqCst);
    }

    /// Sends the edge once more if something is pending: the one before a move may be lost.
    pub fn raise_again(&self) {
        if self.pending() != 0 {
            self.line.trigger();
        }
    }
}
