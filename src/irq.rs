//! Interrupt lines of KVM's I/O APIC.
//!
//! By `KVM_IRQ_LINE`, not by an irqfd: for pins of an I/O APIC the kernel can't serve an irqfd where it is
//! written, and has a worker thread of its own do it (`irqfd_wakeup` in the kernel's `virt/kvm/eventfd.c`).
//! That wakeup, on the very CPU that the `io` thread is busy on, is what made the guest wait.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_ioctls::VmFd;
use vmm_devices::irq::IrqLine;

/// One edge-triggered line.
pub struct IrqPin {
    vm: Arc<VmFd>,
    gsi: u32,
    /// Edges that were asked for and are not known to be sent.
    wanted: AtomicU32,
}

impl IrqPin {
    /// The line `gsi`, low.
    pub fn new(vm: &Arc<VmFd>, gsi: u32) -> Arc<Self> {
        Arc::new(Self { vm: Arc::clone(vm), gsi, wanted: AtomicU32::new(0) })
    }

    /// Up and down again (KVM API 4.25).
    fn pulse(&self) {
        for active in [true, false] {
            // It fails for a machine without interrupt controllers only, and every one of ours has them.
            let _ = self.vm.set_irq_line(self.gsi, active);
        }
    }
}

impl IrqLine for IrqPin {
    fn trigger(&self) {
        coalesce(&self.wanted, || self.pulse());
    }
}

/// Calls `pulse` at least once from its start on, here or in a thread that is at it, and never in two
/// threads at once: a rise in the middle of another's pulse would be none.
fn coalesce(wanted: &AtomicU32, pulse: impl Fn()) {
    if wanted.fetch_add(1, Ordering::SeqCst) > 0 {
        return;
    }
    let mut seen = 1;
    loop {
        pulse();
        // Whoever came during the pulse may have come after its rise.
        match wanted.compare_exchange(seen, 0, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => return,
            Err(more) => seen = more,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    #[test]
    fn an_edge_asked_for_during_a_pulse_is_sent_after_it() {
        let (wanted, pulses) = (AtomicU32::new(0), AtomicU32::new(0));
        coalesce(&wanted, || {
            if pulses.fetch_add(1, Ordering::SeqCst) == 0 {
                coalesce(&wanted, || panic!("two pulses at once"));
                coalesce(&wanted, || panic!("two pulses at once"));
            }
        });
        assert_eq!((pulses.into_inner(), wanted.into_inner()), (2, 0));
    }

    #[test]
    fn every_thread_gets_a_pulse_that_starts_after_its_call() {
        let (wanted, busy) = (AtomicU32::new(0), AtomicBool::new(false));
        let (asked, answered) = (AtomicU32::new(0), AtomicU32::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..10_000 {
                        asked.fetch_add(1, Ordering::SeqCst);
                        coalesce(&wanted, || {
                            assert!(!busy.swap(true, Ordering::SeqCst), "two pulses at once");
                            answered.store(asked.load(Ordering::SeqCst), Ordering::SeqCst);
                            busy.store(false, Ordering::SeqCst);
                        });
                    }
                });
            }
        });
        assert_eq!(answered.into_inner(), 40_000);
    }
}
