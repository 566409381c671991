//! A vCPU's state: registers, FPU, local APIC, MSRs, pending events.
//!
//! The order matters. On save the MP state comes first, since asking for it makes KVM settle INIT and
//! SIPI, and the pending events last, since everything before may change them. On restore CPUID comes
//! first, since it decides what the rest may hold, and the local APIC between the special registers
//! (which hold its mode) and the MSRs (whose TSC deadline arms its timer).
//!
//! What isn't here: the TSC ([`super::clock`]), nested virtualisation and AMX (not offered, see
//! [`super::cpuid`]; so 4096 bytes of `KVM_GET_XSAVE` hold all).

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2, kvm_mp_state};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use vmm_migration::state::{RestoreError, SaveError};

use super::kvm_bytes::{decode, encode};
use super::msr::{self, MsrPlan};

const KIND: &str = "vcpu";

/// One CPUID leaf or subleaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidEntryV1 {
    /// Leaf.
    pub function: u32,
    /// Subleaf.
    pub index: u32,
    /// `KVM_CPUID_FLAG_*`.
    pub flags: u32,
    /// EAX, EBX, ECX, EDX.
    pub regs: [u32; 4],
}

/// The state of one vCPU, version 1. Fields of bytes are KVM's structs of that name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuStateV1 {
    /// `kvm_cpuid_entry2`s.
    pub cpuid: Vec<CpuidEntryV1>,
    /// `KVM_MP_STATE_*`.
    pub mp_state: u32,
    /// `kvm_regs`.
    pub regs: Vec<u8>,
    /// `kvm_sregs`.
    pub sregs: Vec<u8>,
    /// `kvm_xsave`.
    pub xsave: Vec<u8>,
    /// `kvm_xcrs`.
    pub xcrs: Vec<u8>,
    /// `kvm_debugregs`.
    pub debug_regs: Vec<u8>,
    /// `kvm_lapic_state`.
    pub lapic: Vec<u8>,
    /// Number and value, in the order in which they are set.
    pub msrs: Vec<(u32, u64)>,
    /// `kvm_vcpu_events`.
    pub events: Vec<u8>,
}

impl VcpuStateV1 {
    /// The CPUID that the guest sees on this vCPU.
    ///
    /// # Errors
    /// More entries than any KVM takes.
    pub fn cpuid(&self) -> Result<CpuId, RestoreError> {
        let entries: Vec<_> = self.cpuid.iter().map(|e| e.to_kvm()).collect();
        CpuId::from_entries(&entries).map_err(|_| RestoreError::Invalid {
            kind: KIND,
            why: format!("CPUID has {} entries", entries.len()),
        })
    }
}

impl CpuidEntryV1 {
    fn of(e: &kvm_cpuid_entry2) -> Self {
        let regs = [e.eax, e.ebx, e.ecx, e.edx];
        Self { function: e.function, index: e.index, flags: e.flags, regs }
    }

    fn to_kvm(self) -> kvm_cpuid_entry2 {
        let Self { function, index, flags, regs: [eax, ebx, ecx, edx] } = self;
        kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, ..Default::default() }
    }
}

/// Reads a vCPU's state. It doesn't run, and no port or memory access of it is half done.
///
/// # Errors
/// KVM's, with the call that failed.
pub fn save(vcpu: &VcpuFd, plan: &MsrPlan) -> Result<VcpuStateV1, SaveError> {
    let fail = |what| move |e: kvm_ioctls::Error| SaveError { kind: KIND, what, source: e.into() };
    let mp_state = vcpu.get_mp_state().map_err(fail("KVM_GET_MP_STATE"))?.mp_state;
    let regs = vcpu.get_regs().map_err(fail("KVM_GET_REGS"))?;
    let sregs = vcpu.get_sregs().map_err(fail("KVM_GET_SREGS"))?;
    let xsave = vcpu.get_xsave().map_err(fail("KVM_GET_XSAVE"))?;
    let xcrs = vcpu.get_xcrs().map_err(fail("KVM_GET_XCRS"))?;
    let debug_regs = vcpu.get_debug_regs().map_err(fail("KVM_GET_DEBUGREGS"))?;
    let lapic = vcpu.get_lapic().map_err(fail("KVM_GET_LAPIC"))?;
    let cpuid = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(fail("KVM_GET_CPUID2"))?;
    let msrs = msr::save(vcpu, plan).map_err(fail("KVM_GET_MSRS"))?;
    let events = vcpu.get_vcpu_events().map_err(fail("KVM_GET_VCPU_EVENTS"))?;
    Ok(VcpuStateV1 {
        cpuid: cpuid.as_slice().iter().map(CpuidEntryV1::of).collect(),
        mp_state,
        regs: encode(&regs),
        sregs: encode(&sregs),
        xsave: encode(&xsave),
        xcrs: encode(&xcrs),
        debug_regs: encode(&debug_regs),
        lapic: encode(&lapic),
        msrs,
        events: encode(&events),
    })
}

/// Sets a vCPU that never ran to a saved state. The guest's RAM and clock are restored already.
///
/// Gives the MSRs that KVM refuses if the guest can live without them.
///
/// # Errors
/// A field of the wrong length, a refused MSR that the guest needs, or KVM's own.
pub fn restore(vcpu: &VcpuFd, state: &VcpuStateV1) -> Result<Vec<msr::Refused>, RestoreError> {
    let fail = |what| {
        move |e: kvm_ioctls::Error| RestoreError::Kernel { kind: KIND, what, source: e.into() }
    };
    // Every length first: nothing is set from a state that is malformed.
    let cpuid = state.cpuid()?;
    let regs = decode(KIND, "kvm_regs", &state.regs)?;
    let sregs = decode(KIND, "kvm_sregs", &state.sregs)?;
    let xsave = decode(KIND, "kvm_xsave", &state.xsave)?;
    let xcrs = decode(KIND, "kvm_xcrs", &state.xcrs)?;
    let debug_regs = decode(KIND, "kvm_debugregs", &state.debug_regs)?;
    let lapic = decode(KIND, "kvm_lapic_state", &state.lapic)?;
    let events = decode(KIND, "kvm_vcpu_events", &state.events)?;
    let mp_state = kvm_mp_state { mp_state: state.mp_state };

    vcpu.set_cpuid2(&cpuid).map_err(fail("KVM_SET_CPUID2"))?;
    vcpu.set_mp_state(mp_state).map_err(fail("KVM_SET_MP_STATE"))?;
    vcpu.set_regs(&regs).map_err(fail("KVM_SET_REGS"))?;
    vcpu.set_sregs(&sregs).map_err(fail("KVM_SET_SREGS"))?;
    // SAFETY: KVM reads as many bytes as KVM_CAP_XSAVE2 says. `configure_vm` refuses a VM for which that
    // is more than the 4096 of `kvm_xsave`, and it grows only by arch_prctl, which is never called.
    unsafe { vcpu.set_xsave(&xsave) }.map_err(fail("KVM_SET_XSAVE"))?;
    vcpu.set_xcrs(&xcrs).map_err(fail("KVM_SET_XCRS"))?;
    vcpu.set_debug_regs(&debug_regs).map_err(fail("KVM_SET_DEBUGREGS"))?;
    vcpu.set_lapic(&lapic).map_err(fail("KVM_SET_LAPIC"))?;
    let spared = restore_msrs(vcpu, &state.msrs)?;
    vcpu.set_vcpu_events(&events).map_err(fail("KVM_SET_VCPU_EVENTS"))?;
    Ok(spared)
}

fn restore_msrs(vcpu: &VcpuFd, msrs: &[(u32, u64)]) -> Result<Vec<msr::Refused>, RestoreError> {
    let refused = msr::restore(vcpu, msrs).map_err(|e| RestoreError::Kernel {
        kind: KIND,
        what: "KVM_SET_MSRS",
        source: e.into(),
    })?;
    let (spared, needed): (Vec<_>, Vec<_>) = refused.into_iter().partition(|r| r.is_dispensable());
    if needed.is_empty() {
        return Ok(spared);
    }
    let why = format!("KVM refused MSRs that the guest needs: {}", msr::list(&needed));
    Err(RestoreError::Invalid { kind: KIND, why })
}
