//! What a guest's vCPUs need of a host, and what a host lacks of it.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use vmm_migration::plan::{CpuNeeds, CpuidLeaf};

use crate::arch::msr::{self, MsrPlan};
use crate::arch::{clock, cpu_model, cpuid};
use crate::chain::chain;
use crate::kvm::{create_vm, open_kvm};
use crate::machine::{Machine, MachineError};
use crate::vcpu::Vcpu;

/// Bytes of the largest XSAVE area that a section holds.
const XSAVE_BYTES_MAX: u32 = 4096;
/// Bytes of an XSAVE area without components: the legacy region and the header.
const XSAVE_BYTES_MIN: u32 = 576;
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
    let seen = cpuid.as_slice();
    CpuNeeds {
        arch: std::env::consts::ARCH.to_owned(),
        model,
        vcpus,
        cpuid: seen.iter().map(leaf).collect(),
        msrs: host.msrs.indices().to_vec(),
        xsave_bytes: xsave_leaf(seen, 0).map_or(0, |e| e.ecx).max(XSAVE_BYTES_MIN),
        xcr0: xcr0(seen),
        xss: xss(seen),
        tsc_khz: first.get_tsc_khz().unwrap_or(0),
    }
}

fn xsave_leaf(cpuid: &[kvm_cpuid_entry2], index: u32) -> Option<&kvm_cpuid_entry2> {
    cpuid.iter().find(|e| e.function == LEAF_XSAVE && e.index == index)
}

fn xcr0(cpuid: &[kvm_cpuid_entry2]) -> u64 {
    xsave_leaf(cpuid, 0).map_or(0, |e| u64::from(e.eax) | u64::from(e.edx) << 32)
}

fn xss(cpuid: &[kvm_cpuid_entry2]) -> u64 {
    xsave_leaf(cpuid, 1).map_or(0, |e| u64::from(e.ecx) | u64::from(e.edx) << 32)
}

/// What this host offers to a guest that comes.
pub struct Offer {
    /// CPUID, all that KVM supports.
    pub cpuid: CpuId,
    /// The frequency of its TSC, in kHz.
    pub tsc_khz: u32,
    /// Whether KVM can let a guest's TSC run at another.
    pub tsc_scaling: bool,
}

impl Offer {
    /// What a machine here has, of which this is a vCPU.
    #[must_use]
    pub fn of(cpuid: CpuId, vm: &VmFd, vcpu: &VcpuFd) -> Self {
        let tsc_khz = vcpu.get_tsc_khz().unwrap_or(0);
        Self { cpuid, tsc_khz, tsc_scaling: vm.check_extension(Cap::TscControl) }
    }

    /// What any machine here has.
    fn of_this_host() -> Result<Self, MachineError> {
        let kvm = open_kvm()?;
        let vm = create_vm(&kvm)?;
        let cpuid = cpuid::host_cpuid(&kvm).map_err(MachineError::kvm("read its CPUID"))?;
        let vcpu = vm.create_vcpu(0).map_err(MachineError::kvm("create a vCPU"))?;
        Ok(Self::of(cpuid, &vm, &vcpu))
    }
}

/// Everything that this host lacks of a guest's needs, one line each, before a machine is built for it.
#[must_use]
pub fn lacking_here(needs: &CpuNeeds) -> Vec<String> {
    match Offer::of_this_host() {
        Ok(offer) => lacking(needs, &offer),
        Err(e) => vec![chain(&e)],
    }
}

/// Everything that a host with this offer lacks of a guest's needs, one line each.
#[must_use]
pub fn lacking(needs: &CpuNeeds, offer: &Offer) -> Vec<String> {
    if needs.arch != std::env::consts::ARCH {
        return vec![format!(
            "the guest is for {}, this host is {}",
            needs.arch,
            std::env::consts::ARCH
        )];
    }
    let mut reasons = Vec::new();
    let entries: Vec<_> = needs.cpuid.iter().map(entry).collect();
    match CpuId::from_entries(&entries) {
        Ok(guest) => {
            let missing = cpu_model::missing(&guest, &offer.cpuid);
            reasons.extend(missing.iter().map(|name| format!("this host's CPU lacks {name}")));
        }
        Err(_) => reasons.push(format!("CPUID has {} leaves", needs.cpuid.len())),
    }
    // Of these CPUID names most, each by its name.
    let named = xcr0(&entries) & 0xffff_ffff;
    for (what, needed, there) in [
        ("XCR0", needs.xcr0 & !named, xcr0(offer.cpuid.as_slice())),
        ("IA32_XSS", needs.xss, xss(offer.cpuid.as_slice())),
    ] {
        if needed & !there != 0 {
            reasons.push(format!("this host's CPU lacks bits {:#x} of {what}", needed & !there));
        }
    }
    // MSRs are not held against a list: the trial restore sets each, and names what KVM refuses.
    if needs.xsave_bytes > XSAVE_BYTES_MAX {
        reasons.push(format!(
            "the guest's XSAVE area has {} bytes, this vmm restores {XSAVE_BYTES_MAX}",
            needs.xsave_bytes
        ));
    }
    let Offer { tsc_khz, tsc_scaling, .. } = *offer;
    if needs.tsc_khz != 0 && !clock::tsc_fits(needs.tsc_khz, tsc_khz, tsc_scaling) {
        reasons.push(format!(
            "the guest's TSC runs at {} kHz, this host's at {tsc_khz} kHz, and KVM can't scale it",
            needs.tsc_khz
        ));
    }
    reasons
}

/// What a guest that was restored into this machine has to live without, one line for all its vCPUs.
#[must_use]
pub fn spared(machine: &Machine) -> Option<String> {
    let most = machine.vcpus.iter().map(Vcpu::spared).max_by_key(|spared| spared.len())?;
    let list = || msr::list(most);
    (!most.is_empty())
        .then(|| format!("KVM refused MSRs that the guest can live without: {}", list()))
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

#[cfg(test)]
#[path = "cpu_tests.rs"]
mod tests;
