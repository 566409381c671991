//! x86_64: a machine without firmware, PCI, BIOS or PIT.
//!
//! The order of a machine's life, as far as it matters here:
//! - new: [`REQUIRED_CAPS`], [`configure_vm`], then for each vCPU `set_cpuid2` of
//!   [`cpuid::for_vcpu`] and [`boot_regs::init_msrs`];
//! - boot: [`tables::build`], [`boot::prepare`], [`boot_regs::BootRegs::apply`] on vCPU 0;
//! - save and restore: RAM, [`chip_state::ChipPart`], [`clock::ClockPart`], then the vCPUs with
//!   [`vcpu_state`], which arms timers by the TSC that the clock set;
//! - start after any pause: [`clock::pause_notify`] on every vCPU.

pub mod boot;
pub mod boot_regs;
pub mod chip_state;
pub mod clock;
pub mod cpu_features;
mod cpu_levels;
pub mod cpu_model;
pub mod cpuid;
mod kvm_bytes;
pub mod layout;
pub mod msr;
mod pvclock;
pub mod tables;
pub(crate) mod vcpu_ioctl;
pub mod vcpu_state;
pub mod vmclock;

use kvm_bindings::{
    KVM_CAP_PMU_CAPABILITY, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC, KVM_PMU_CAP_DISABLE,
    KvmIrqRouting, kvm_enable_cap, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_irqchip, kvm_xsave,
};
use kvm_ioctls::{Cap, VcpuFd, VmFd};

/// KVM's name for the page faults of a vCPU that it resolved by making a page accessible: with write protection,
/// each first write to a page whose writes are logged is one (Linux 5.19; before, fewer are counted).
pub const FAULTS_RESOLVED: &str = "pf_fixed";

/// What KVM must be able to do, with the name that its documentation uses.
pub const REQUIRED_CAPS: &[(Cap, &str)] = &[
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::GetTscKhz, "KVM_CAP_GET_TSC_KHZ"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// Why a VM can't be set up.
#[derive(Debug, thiserror::Error)]
pub enum VmSetupError {
    /// KVM refused a step.
    #[error("KVM refused to {what}")]
    Kvm {
        /// The step.
        what: &'static str,
        /// Its answer.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// This process asked for AMX for its guests, which nothing here does.
    #[error(
        "the XSAVE area of this host's guests has {0} bytes, more than the 4096 that are saved"
    )]
    Xsave(i32),
}

/// Sets up a VM before its first vCPU: real-mode helper pages, in-kernel interrupt controllers, every
/// GSI routed to the I/O APIC alone (the guest has no PIC: its kernel is told so and leaves the lines
/// of KVM's unmasked), no performance counters. No PIT.
///
/// # Errors
/// KVM's; a KVM that can't turn off the performance counters is fine, since CPUID doesn't show them.
pub fn configure_vm(vm: &VmFd) -> Result<(), VmSetupError> {
    let step = |what| move |source| VmSetupError::Kvm { what, source };
    let xsave_bytes = vm.check_extension_int(Cap::Xsave2);
    if usize::try_from(xsave_bytes).is_ok_and(|bytes| bytes > size_of::<kvm_xsave>()) {
        return Err(VmSetupError::Xsave(xsave_bytes));
    }
    let tss = usize::try_from(layout::KVM_TSS).expect("64-bit host");
    vm.set_tss_address(tss).map_err(step("place its task state segment"))?;
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
        .map_err(step("place its identity map"))?;
    vm.create_irq_chip().map_err(step("create the interrupt controllers"))?;
    vm.set_gsi_routing(&ioapic_routes()).map_err(step("route interrupts to the I/O APIC"))?;
    let mut no_pmu = kvm_enable_cap { cap: KVM_CAP_PMU_CAPABILITY, ..kvm_enable_cap::default() };
    no_pmu.args[0] = u64::from(KVM_PMU_CAP_DISABLE);
    if let Err(e) = vm.enable_cap(&no_pmu) {
        tracing::debug!("KVM keeps its performance counters for this guest: {e}");
    }
    Ok(())
}

fn ioapic_routes() -> KvmIrqRouting {
    let route = |pin: u32| kvm_irq_routing_entry {
        gsi: pin,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            irqchip: kvm_irq_routing_irqchip { irqchip: KVM_IRQCHIP_IOAPIC, pin },
        },
        ..kvm_irq_routing_entry::default()
    };
    let routes: Vec<_> = (0..layout::IOAPIC_PINS).map(route).collect();
    KvmIrqRouting::from_entries(&routes).expect("24 routes of 4096")
}

/// Whether a guest that just reset itself had not taken its interrupt hardware out of use.
///
/// Linux's orderly reboot masks every pin of the I/O APIC and then turns every local APIC off. A panic's
/// reboot (`panic=`) turns the local APICs off too, to stop the other CPUs, and leaves the pins as they
/// are, of which the event device's is in use from early on; SysRq's reboot leaves all as it is. A panic
/// before the first pin is unmasked can't be told.
#[must_use]
pub fn interrupts_in_use<'a>(vm: &VmFd, vcpus: impl IntoIterator<Item = &'a VcpuFd>) -> bool {
    chip_state::ioapic_pins_unmasked(vm) || vcpus.into_iter().any(lapic_in_use)
}

/// Whether a vCPU's local APIC is enabled by software (spurious vector register, bit 8).
fn lapic_in_use(vcpu: &VcpuFd) -> bool {
    /// Second byte of the spurious interrupt vector register.
    const SPIV_HIGH: usize = 0xf1;
    vcpu.get_lapic().is_ok_and(|lapic| lapic.regs[SPIV_HIGH] & 1 == 1)
}

#[cfg(test)]
mod golden_tests;
#[cfg(test)]
mod kvm_tests;
