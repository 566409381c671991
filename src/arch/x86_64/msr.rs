//! Model-specific registers: which belong to a vCPU's state, and how they are read and set.
//!
//! KVM names those it supports (`KVM_GET_MSR_INDEX_LIST`); left out are those of features that no guest
//! is offered (see [`super::cpuid`]), and the TSC, which [`super::clock`] carries once, as an offset:
//! written twice it would shift. The TSC deadline comes last, so that everything it leans on is set.

use std::fmt;

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

/// MSR numbers (Intel SDM 4, AMD APM 2 appendix A, KVM's msr.rst).
pub mod index {
    /// `IA32_TIME_STAMP_COUNTER`.
    pub const TSC: u32 = 0x10;
    /// `IA32_FEATURE_CONTROL`.
    pub const FEATURE_CONTROL: u32 = 0x3a;
    /// `IA32_BIOS_SIGN_ID`, the microcode's revision.
    pub const UCODE_REVISION: u32 = 0x8b;
    /// `MSR_PLATFORM_INFO`.
    pub const PLATFORM_INFO: u32 = 0xce;
    /// `IA32_MTRRCAP`, read-only.
    pub const MTRR_CAP: u32 = 0xfe;
    /// `IA32_ARCH_CAPABILITIES`: what the CPU says of its own bugs.
    pub const ARCH_CAPABILITIES: u32 = 0x10a;
    /// `IA32_MCG_CAP`: how many banks of machine-check registers there are. Set by an ioctl of its own.
    pub const MCG_CAP: u32 = 0x179;
    /// Control, status, address and miscellany of the first bank of machine-check registers.
    pub const MC0: [u32; 4] = [0x400, 0x401, 0x402, 0x403];
    /// `IA32_MISC_ENABLE`.
    pub const MISC_ENABLE: u32 = 0x1a0;
    /// First of eight pairs of variable MTRRs.
    pub const MTRR_VARIABLE: u32 = 0x200;
    /// The eleven fixed-range MTRRs.
    pub const MTRR_FIXED: [u32; 11] =
        [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];
    /// `IA32_MTRR_DEF_TYPE`.
    pub const MTRR_DEF_TYPE: u32 = 0x2ff;
    /// `IA32_TSC_DEADLINE`.
    pub const TSC_DEADLINE: u32 = 0x6e0;
    /// `MSR_KVM_SYSTEM_TIME_NEW`: where a vCPU's kvmclock is in guest RAM.
    pub const KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
    /// `MSR_KVM_WALL_CLOCK` and `MSR_KVM_SYSTEM_TIME` by their old numbers: the same state as the new.
    pub const KVM_CLOCK_OLD: [u32; 2] = [0x11, 0x12];
    /// AMD's `DE_CFG`.
    pub const DE_CFG: u32 = 0xc001_1029;
}

/// MSRs of features that no guest is offered, first and last.
const LEFT_OUT: &[(u32, u32)] = &[
    (index::TSC, index::TSC),
    (index::KVM_CLOCK_OLD[0], index::KVM_CLOCK_OLD[1]),
    // System management mode: SMI count, SMBASE.
    (0x34, 0x34),
    (0x9e, 0x9e),
    // Performance counters: Intel's general, event selectors, fixed, control, PEBS, debug store.
    (0xc1, 0xc8),
    (0x186, 0x193),
    (0x309, 0x30c),
    (0x345, 0x345),
    (0x38d, 0x390),
    (0x3f1, 0x3f2),
    (0x4c1, 0x4c8),
    (0x600, 0x600),
    // AMX's extended feature disable.
    (0x1c4, 0x1c5),
    // Machine check: control, corrected errors, all banks but the first, extended control.
    (0x17b, 0x17b),
    (0x280, 0x29f),
    (0x404, 0x47f),
    (0x4d0, 0x4d0),
    // Virtual machine extensions' capabilities.
    (0x480, 0x493),
    // Intel PT, control-flow enforcement.
    (0x560, 0x58f),
    (0x6a0, 0x6a8),
    // SGX launch control.
    (0x8c, 0x8f),
    // Hyper-V's.
    (0x4000_0000, 0x4000_0fff),
    // AMD: performance counters (three generations), SVM's host save area, machine check.
    (0xc000_0300, 0xc000_0303),
    (0xc001_0000, 0xc001_0007),
    (0xc001_0114, 0xc001_0117),
    (0xc001_0200, 0xc001_020f),
    (0xc000_2000, 0xc000_2fff),
];

/// A guest lives on where these can't be set: they tell of the machine under it, or tune it.
const DISPENSABLE: &[u32] = &[
    index::FEATURE_CONTROL,
    index::UCODE_REVISION,
    index::PLATFORM_INFO,
    index::ARCH_CAPABILITIES,
    index::MISC_ENABLE,
    index::DE_CFG,
];

/// Which MSRs are saved. One for all of a machine's vCPUs.
#[derive(Clone, Debug)]
pub struct MsrPlan {
    indices: Vec<u32>,
}

impl MsrPlan {
    /// Asks KVM what it has.
    ///
    /// # Errors
    /// KVM's.
    pub fn new(kvm: &Kvm) -> Result<Self, kvm_ioctls::Error> {
        Ok(Self::of(kvm.get_msr_index_list()?.as_slice()))
    }

    /// The MSRs, in the order in which they are set.
    #[must_use]
    pub fn indices(&self) -> &[u32] {
        &self.indices
    }

    fn of(supported: &[u32]) -> Self {
        // KVM has these on every host, but names them in no list.
        let unnamed = (index::MTRR_VARIABLE..index::MTRR_VARIABLE + 16)
            .chain(index::MTRR_FIXED)
            .chain([index::MTRR_DEF_TYPE])
            .chain(index::MC0);
        let kept = |i: &u32| !LEFT_OUT.iter().any(|(first, last)| (first..=last).contains(&i));
        let mut indices: Vec<u32> = supported.iter().copied().filter(kept).chain(unnamed).collect();
        indices.retain(|i| ![index::MTRR_CAP, index::MCG_CAP].contains(i));
        indices.sort_unstable_by_key(|i| (*i == index::TSC_DEADLINE, *i));
        indices.dedup();
        Self { indices }
    }
}

/// An MSR that KVM would not set, though it holds another value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Its number.
    pub index: u32,
    /// The value that it should have had.
    pub value: u64,
}

impl Refused {
    /// Whether the guest can live without.
    #[must_use]
    pub fn is_dispensable(&self) -> bool {
        DISPENSABLE.contains(&self.index)
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x} = {:#x}", self.index, self.value)
    }
}

/// All of them on one line.
#[must_use]
pub fn list(refused: &[Refused]) -> String {
    refused.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Reads the MSRs of a vCPU: number and value. Those that KVM can't read for this vCPU (its CPUID
/// doesn't have them) are left out. The vCPU's CPUID must be set.
///
/// # Errors
/// KVM's.
pub fn save(vcpu: &VcpuFd, plan: &MsrPlan) -> Result<Vec<(u32, u64)>, kvm_ioctls::Error> {
    let mut saved = Vec::with_capacity(plan.indices.len());
    let mut rest = plan.indices.as_slice();
    while !rest.is_empty() {
        let chunk: Vec<_> = rest.iter().take(KVM_MAX_MSR_ENTRIES).map(|i| entry(*i, 0)).collect();
        let mut msrs = Msrs::from_entries(&chunk).expect("at most KVM_MAX_MSR_ENTRIES");
        // KVM stops at the first that it can't read.
        let read = vcpu.get_msrs(&mut msrs)?;
        saved.extend(msrs.as_slice()[..read].iter().map(|e| (e.index, e.data)));
        let skip = usize::from(read < chunk.len());
        rest = &rest[read + skip..];
    }
    Ok(saved)
}

/// Sets MSRs in the given order. Returns those that KVM refused; one that already has its value counts
/// as set, and so does one of zero that isn't there at all: a KVM reads as zero what its CPU has and the guest's doesn't,
/// and another host's CPU need not have it.
///
/// # Errors
/// KVM's.
pub fn restore(vcpu: &VcpuFd, msrs: &[(u32, u64)]) -> Result<Vec<Refused>, kvm_ioctls::Error> {
    let mut refused = Vec::new();
    let mut rest = msrs;
    while !rest.is_empty() {
        let chunk: Vec<_> =
            rest.iter().take(KVM_MAX_MSR_ENTRIES).map(|(i, value)| entry(*i, *value)).collect();
        let set =
            vcpu.set_msrs(&Msrs::from_entries(&chunk).expect("at most KVM_MAX_MSR_ENTRIES"))?;
        rest = &rest[set..];
        if set < chunk.len() {
            let (index, value) = rest[0];
            if get(vcpu, index)?.unwrap_or(0) != value {
                refused.push(Refused { index, value });
            }
            rest = &rest[1..];
        }
    }
    Ok(refused)
}

/// Reads one MSR; `None` if KVM can't.
///
/// # Errors
/// KVM's.
pub fn get(vcpu: &VcpuFd, index: u32) -> Result<Option<u64>, kvm_ioctls::Error> {
    let mut msr = Msrs::from_entries(&[entry(index, 0)]).expect("one entry fits");
    let read = vcpu.get_msrs(&mut msr)?;
    Ok((read == 1).then(|| msr.as_slice()[0].data))
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry { index, data, ..kvm_msr_entry::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deadline_is_last_and_the_tsc_is_left_to_the_clock() {
        let plan = MsrPlan::of(&[0x6e0, 0x10, 0x11, 0x4b56_4d00, 0x174, 0x277, 0x277, 0x10a]);
        assert_eq!(plan.indices().last(), Some(&0x6e0));
        for kept in [0x4b56_4d00, 0x174, 0x277, 0x10a, 0x2ff, 0x20f, 0x26f] {
            assert_eq!(plan.indices().iter().filter(|i| **i == kept).count(), 1, "{kept:#x}");
        }
        for left_out in [0x10, 0x11] {
            assert!(!plan.indices().contains(&left_out), "{left_out:#x}");
        }
    }
}
