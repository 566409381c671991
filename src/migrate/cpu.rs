//! What a guest's vCPUs need of a host, and what a host lacks of it.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use vmm_migration::plan::{CpuNeeds, CpuidLeaf};

use crate::arch::msr::MsrPlan;
use crate::arch::{clock, cpu_model};

/// Bytes of an XSAVE area that a section holds.
const XSAVE_BYTES: u32 = 4096;
/// The leaf that describes XSAVE.
const LEAF_XSAVE: u32 = 0xd;

/// What a host offers to guests.
pub struct HostCpu {
    /// CPUID, all that KVM supports.
    pub cpuid: CpuId,
    /// The MSRs that KVM saves and restores.
    pub msrs: std::sync::Arc<MsrPlan>,
}

/// What vCPUs with this CPUID need.
#[must_use]
pub fn needs(cpuid: &CpuId, host: &HostCpu, first: &VcpuFd, model: String, vcpus: u32) -> CpuNeeds {
    let leaf = |e: &kvm_cpuid_entry2| CpuidLeaf {
        function: e.function,
        index: e.index,
        registers: [e.eax, e.ebx, e.ecx, e.edx],
    };
    let xsave = |index, low: fn(&kvm_cpuid_entry2) -> u32, high: fn(&kvm_cpuid_entry2) -> u32| {
        cpuid
            .as_slice()
            .iter()
            .find(|e| e.function == LEAF_XSAVE && e.index == index)
            .map_or(0, |e| u64::from(low(e)) | u64::from(high(e)) << 32)
    };
    CpuNeeds {
        arch: std::env::consts::ARCH.to_owned(),
        model,
        vcpus,
        cpuid: cpuid.as_slice().iter().map(leaf).collect(),
        msrs: host.msrs.indices().to_vec(),
        xsave_bytes: XSAVE_BYTES,
        xcr0: xsave(0, |e| e.eax, |e| e.edx),
        xss: xsave(1, |e| e.ecx, |e| e.edx),
        tsc_khz: first.get_tsc_khz().unwrap_or(0),
    }
}

/// Everything that this host lacks of a guest's needs, one line each.
#[must_use]
pub fn lacking(needs: &CpuNeeds, host: &HostCpu, vm: &VmFd, first: &VcpuFd) -> Vec<String> {
    if needs.arch != std::env::consts::ARCH {
        return vec![format!(
            "the guest is for {}, this host is {}",
            needs.arch,
            std::env::consts::ARCH
        )];
    }
    let mut reasons = Vec::new();
    match CpuId::from_entries(&needs.cpuid.iter().map(entry).collect::<Vec<_>>()) {
        Ok(guest) => {
            let missing = cpu_model::missing(&guest, &host.cpuid);
            reasons.extend(missing.iter().map(|name| format!("this host's CPU lacks {name}")));
        }
        Err(_) => reasons.push(format!("CPUID has {} leaves", needs.cpuid.len())),
    }
    // MSRs are not held against a list: the trial restore sets each, and names what KVM refuses.
    if needs.xsave_bytes > XSAVE_BYTES {
        reasons.push(format!(
            "the guest's XSAVE area has {} bytes, this vmm restores {XSAVE_BYTES}",
            needs.xsave_bytes
        ));
    }
    let host_khz = first.get_tsc_khz().unwrap_or(0);
    let scaling = vm.check_extension(Cap::TscControl);
    if needs.tsc_khz != 0 && !clock::tsc_fits(needs.tsc_khz, host_khz, scaling) {
        reasons.push(format!(
            "the guest's TSC runs at {} kHz, this host's at {host_khz} kHz, and KVM can't scale it",
            needs.tsc_khz
        ));
    }
    reasons
}

fn entry(leaf: &CpuidLeaf) -> kvm_cpuid_entry2 {
    let [eax, ebx, ecx, edx] = leaf.registers;
    kvm_cpuid_entry2 {
        function: leaf.function,
        index: leaf.index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    }
}
