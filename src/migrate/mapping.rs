//! Maps a guest's RAM into KVM's page tables before it runs, while its pages still come in.
//!
//! A guest that was just activated finds none of its pages there, and each first access is a fault in KVM:
//! that lengthens the stall which it sees. `KVM_PRE_FAULT_MEMORY` (KVM API 4.143; Linux 6.11, two-dimensional
//! paging only) takes these faults ahead. It is a help, not a need: where it isn't, nothing is done.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::arch::vcpu_ioctl;
use crate::machine::Machine;
use crate::memory::Memory;

/// Bytes asked for at a time: what the guest's last state may have to wait for.
const PIECE: u64 = 2 << 20;

/// How long at most what was touched is looked for, and in how much memory at a time: where it lies scattered over pages of
/// 4 KiB, some 10 ms.
const LOOK_TIME: Duration = Duration::from_millis(50);
const WINDOW: u64 = 64 << 20;

/// The thread that maps. Dropping it ends and joins the thread.
#[derive(Debug)]
pub struct Mapping {
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Mapping {
    /// Starts to map what was touched of the machine's RAM, all but what would take long to find. `None`: it can't be, for a reason that is logged.
    #[must_use]
    pub fn start(machine: &Machine) -> Option<Self> {
        let start = || {
            let pieces = touched(&machine.core.memory)?;
            let vcpu = machine.vcpus.first().expect("a machine has a vCPU");
            let vcpu = vcpu_ioctl::duplicate(vcpu.fd())?;
            let end = Arc::new(AtomicBool::new(false));
            let ended = Arc::clone(&end);
            let thread = std::thread::Builder::new().name("mapping".to_owned());
            let thread = thread.spawn(move || map(&vcpu, &pieces, &ended))?;
            Ok(Self { end, thread: Some(thread) })
        };
        start().inspect_err(|e: &io::Error| tracing::debug!("RAM isn't mapped ahead: {e}")).ok()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Addresses and lengths of what was touched, as far as they are found in [`LOOK_TIME`]: the source waits.
fn touched(memory: &Memory) -> io::Result<Vec<(u64, u64)>> {
    let (until, mut pieces) = (Instant::now() + LOOK_TIME, Vec::new());
    for slot in memory.slots() {
        let mut at = 0;
        while at < slot.len && Instant::now() < until {
            let len = WINDOW.min(slot.len - at);
            memory.touched(slot, at, len, |at, len| pieces.push((slot.start + at, len)))?;
            at += len;
        }
    }
    Ok(pieces)
}

fn map(vcpu: &OwnedFd, pieces: &[(u64, u64)], ended: &AtomicBool) {
    let mut mapped = 0;
    for &(start, len) in pieces {
        let mut at = start;
        while at < start + len && !ended.load(Ordering::Acquire) {
            // Up to the next boundary of a piece, so that a huge page is asked for once.
            let size = (at / PIECE * PIECE + PIECE).min(start + len) - at;
            if let Err(e) = vcpu_ioctl::pre_fault(vcpu, at, size) {
                tracing::debug!("RAM isn't mapped ahead from {at:#x}: {e}");
                return;
            }
            (at, mapped) = (at + size, mapped + size);
        }
    }
    tracing::debug!("{} MiB of RAM mapped ahead", mapped >> 20);
}
