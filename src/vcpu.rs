//! One vCPU: the loop around `KVM_RUN`, and its state as a part of the machine.

use std::sync::Arc;

use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_devices::bus::{Bus, BusDevice};
use vmm_migration::state::{RestoreError, SaveError, Stateful};

use crate::arch::msr::{MsrPlan, Refused};
use crate::arch::vcpu_state::{self, VcpuStateV1};
use crate::kick;
use crate::throttle::VcpuOrders;

/// The machine's buses: port I/O and memory-mapped I/O.
#[derive(Default)]
pub struct Buses {
    /// Port I/O.
    pub pio: Bus,
    /// Memory-mapped I/O.
    pub mmio: Bus,
}

impl Buses {
    /// All devices, at rest: the order is the platform's and gives each its instance number.
    pub fn all_mut(&mut self) -> impl Iterator<Item = &mut Box<dyn BusDevice>> {
        self.pio.devices_mut().chain(self.mmio.devices_mut())
    }
}

/// Why a vCPU's loop ended.
#[derive(Debug)]
pub enum VcpuEnd {
    /// A kick, with the order to stop.
    Kicked,
    /// The guest shut the CPU down (triple fault).
    TripleFault,
    /// KVM can't go on. The vCPU's state is not to be trusted.
    Failed(VcpuFault),
}

/// What KVM said when it could not go on.
#[derive(Debug, thiserror::Error)]
pub enum VcpuFault {
    /// KVM's instruction emulator met an instruction that it lacks (suberror 1).
    #[error(
        "KVM could not emulate a guest instruction at {rip:#x} (suberror {suberror}): this host's KVM \
         can't run this guest"
    )]
    Emulation {
        /// KVM's suberror.
        suberror: u32,
        /// Guest instruction pointer.
        rip: u64,
    },
    /// The hardware refused to enter the guest.
    #[error("the CPU refused to enter the guest: hardware reason {0:#x}")]
    Entry(u64),
    /// An exit that this machine never asks for.
    #[error("unexpected exit from KVM: {0}")]
    Unexpected(String),
    /// The ioctl itself failed.
    #[error("KVM_RUN failed")]
    Run(#[source] kvm_ioctls::Error),
}

/// One vCPU at rest, or inside its own thread.
pub struct Vcpu {
    index: u32,
    fd: VcpuFd,
    msrs: Arc<MsrPlan>,
    /// MSRs that were refused when it was last restored, and that its guest can live without.
    spared: Vec<Refused>,
}

impl Vcpu {
    /// Wraps a vCPU that KVM created and whose CPUID is set.
    #[must_use]
    pub fn new(index: u32, fd: VcpuFd, msrs: Arc<MsrPlan>) -> Self {
        Self { index, fd, msrs, spared: Vec::new() }
    }

    /// Its number, from 0.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.index
    }

    /// The MSRs that couldn't be restored, and that the guest can live without.
    #[must_use]
    pub fn spared(&self) -> &[Refused] {
        &self.spared
    }

    /// KVM's handle.
    #[must_use]
    pub fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// Runs the guest on the calling thread until it is told to stop or ends. See [`crate::kick`] for the rule
    /// under which it is left.
    pub fn run(mut self, buses: &Buses, orders: &VcpuOrders) -> (Self, VcpuEnd) {
        let target = kick::Target::enter(self.fd.get_kvm_run());
        let end = loop {
            match self.fd.run() {
                Ok(VcpuExit::IoOut(port, data)) => {
                    for element in data.chunks(target.io_size()) {
                        buses.pio.write(u64::from(port), element);
                    }
                }
                Ok(VcpuExit::IoIn(port, data)) => {
                    for element in data.chunks_mut(target.io_size()) {
                        buses.pio.read(u64::from(port), element);
                    }
                }
                Ok(VcpuExit::MmioRead(address, data)) => buses.mmio.read(address, data),
                Ok(VcpuExit::MmioWrite(address, data)) => buses.mmio.write(address, data),
                Ok(VcpuExit::Shutdown) => break VcpuEnd::TripleFault,
                Ok(VcpuExit::Hlt | VcpuExit::IrqWindowOpen | VcpuExit::Intr) => {}
                Ok(VcpuExit::FailEntry(reason, _)) => {
                    break VcpuEnd::Failed(VcpuFault::Entry(reason));
                }
                Ok(VcpuExit::InternalError) => {
                    let suberror = target.suberror();
                    let rip = self.fd.get_regs().map_or(0, |r| r.rip);
                    break VcpuEnd::Failed(VcpuFault::Emulation { suberror, rip });
                }
                Ok(other) => break VcpuEnd::Failed(VcpuFault::Unexpected(format!("{other:?}"))),
                Err(e) if e.errno() == libc::EINTR && target.kicked() => {
                    // In this order: a stop that is ordered after the look comes with its own kick.
                    target.rearm();
                    if orders.is_stopping() {
                        break VcpuEnd::Kicked;
                    }
                    orders.sleep_share();
                }
                Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => {}
                Err(e) => break VcpuEnd::Failed(VcpuFault::Run(e)),
            }
        };
        drop(target);
        (self, end)
    }
}

impl Stateful for Vcpu {
    const KIND: &'static str = "vcpu";
    const VERSION: u16 = 1;
    type State = VcpuStateV1;

    fn save(&self) -> Result<VcpuStateV1, SaveError> {
        vcpu_state::save(&self.fd, &self.msrs)
    }

    fn restore(&mut self, state: VcpuStateV1) -> Result<(), RestoreError> {
        self.spared = vcpu_state::restore(&self.fd, &state)?;
        Ok(())
    }
}
