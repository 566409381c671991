//! Interrupt lines over KVM's irqfd: an eventfd bound to a GSI of the in-kernel irqchip.

use std::io;
use std::sync::Arc;

use kvm_ioctls::VmFd;
use vmm_devices::irq::IrqLine;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// One edge-triggered line.
#[derive(Debug)]
pub struct IrqFd {
    event: EventFd,
}

impl IrqFd {
    /// Binds a new line to `gsi` (KVM API 4.75).
    pub fn new(vm: &VmFd, gsi: u32) -> io::Result<Arc<Self>> {
        let event = EventFd::new(EFD_NONBLOCK)?;
        vm.register_irqfd(&event, gsi)?;
        Ok(Arc::new(Self { event }))
    }
}

impl IrqLine for IrqFd {
    fn trigger(&self) {
        // The only failure is a full counter, and then an edge is pending anyway.
        let _ = self.event.write(1);
    }
}
