//! CPUID: what the host's KVM can give a guest, and what each vCPU sees of it.
//!
//! A guest is shown what KVM supports, less what can't be carried over in a move yet (nested
//! virtualisation, AMX, control-flow enforcement, SGX) and what only costs a microVM time (performance
//! counters, whose MSRs a kernel probes one by one on every CPU at boot, and a watchdog runs on). What
//! makes a stock kernel quick stays or is added: the invariant APIC timer and the TSC deadline
//! timer (no timer calibration), kvmclock (the TSC's frequency is told, not measured), no I/O delay.
//!
//! The topology is one socket of `cpus` cores of one thread each; APIC ids are vCPU indices.

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::{Cap, Kvm};

use crate::config::CPUS_MAX;

/// One of CPUID's four output registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reg {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

impl Reg {
    /// All four, in order.
    pub const ALL: [Self; 4] = [Self::Eax, Self::Ebx, Self::Ecx, Self::Edx];

    /// Reads this register of an entry.
    #[must_use]
    pub fn get(self, entry: &kvm_cpuid_entry2) -> u32 {
        match self {
            Self::Eax => entry.eax,
            Self::Ebx => entry.ebx,
            Self::Ecx => entry.ecx,
            Self::Edx => entry.edx,
        }
    }

    /// This register of an entry, to change it.
    pub fn of(self, entry: &mut kvm_cpuid_entry2) -> &mut u32 {
        match self {
            Self::Eax => &mut entry.eax,
            Self::Ebx => &mut entry.ebx,
            Self::Ecx => &mut entry.ecx,
            Self::Edx => &mut entry.edx,
        }
    }
}

/// Leaf 1 ECX: the local APIC's timer has a TSC deadline mode.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1 ECX: a hypervisor is present.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1 EDX: more than one logical processor in the package.
const HTT: u32 = 1 << 28;
/// Leaf 0x80000001 ECX (AMD): more than one core in the package.
const CMP_LEGACY: u32 = 1 << 1;
/// Leaf 6 EAX: the APIC timer runs in every sleep state, so that no other timer is looked for.
const ARAT: u32 = 1 << 2;

/// KVM's feature leaf (Documentation/virt/kvm/x86/cpuid.rst).
const KVM_FEATURES: u32 = 0x4000_0001;
/// The paravirtual features that a guest is offered: kvmclock (old and new MSRs, stable TSC), no I/O
/// delay, EOI in memory, unhalt, IPIs in one call, control over halt polling. Not: asynchronous page
/// faults and steal time (with the TLB flush and yield that lean on it), which keep state in KVM.
const KVM_FEATURES_OFFERED: u32 =
    1 << 0 | 1 << 1 | 1 << 3 | 1 << 6 | 1 << 7 | 1 << 11 | 1 << 12 | 1 << 24;

/// Feature bits that a guest doesn't see: leaf, subleaf, register, bits.
const HIDDEN: &[(u32, u32, Reg, u32)] = &[
    // VMX: a guest that runs guests has nested state, which isn't saved.
    (1, 0, Reg::Ecx, 1 << 5),
    // PDCM: the MSR of perf capabilities.
    (1, 0, Reg::Ecx, 1 << 15),
    // SGX and Intel PT.
    (7, 0, Reg::Ebx, 1 << 2 | 1 << 25),
    // Shadow stacks, SGX launch control.
    (7, 0, Reg::Ecx, 1 << 7 | 1 << 30),
    // Indirect branch tracking; AMX's bf16, tile, int8.
    (7, 0, Reg::Edx, 1 << 20 | 1 << 22 | 1 << 24 | 1 << 25),
    // The extended performance monitoring leaf; AMX's fp16.
    (7, 1, Reg::Eax, 1 << 8 | 1 << 21),
    // AMX's complex numbers.
    (7, 1, Reg::Edx, 1 << 8),
    // XCR0's tile configuration and data.
    (0xd, 0, Reg::Eax, 1 << 17 | 1 << 18),
    // XFD, which exists for AMX alone.
    (0xd, 1, Reg::Eax, 1 << 4),
    // Supervisor states of XSAVES: Intel PT, CET.
    (0xd, 1, Reg::Ecx, u32::MAX),
    (0xd, 1, Reg::Edx, u32::MAX),
    // SVM, and AMD's core, north bridge and last-level performance counters.
    (0x8000_0001, 0, Reg::Ecx, 1 << 2 | 1 << 23 | 1 << 24 | 1 << 28),
    // AMD's machine-check recovery.
    (0x8000_0007, 0, Reg::Ebx, u32::MAX),
];

/// Leaves that go with hidden features, or that KVM passes on from the host and that only a topology
/// of its own makes true: performance counters, SGX, Intel PT, AMX, SVM, memory encryption, AMD's extended
/// topology and performance counters.
const DROPPED: &[u32] = &[
    0xa,
    0x12,
    0x14,
    0x1d,
    0x1e,
    0x23,
    0x8000_000a,
    0x8000_001f,
    0x8000_0022,
    0x8000_0023,
    0x8000_0026,
];

/// What this host can offer a guest: KVM's supported CPUID, filtered as the module says.
///
/// # Errors
/// KVM's.
pub fn host_cpuid(kvm: &Kvm) -> Result<CpuId, kvm_ioctls::Error> {
    let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    Ok(from_entries(&filter(supported.as_slice(), deadline)))
}

/// Wraps entries whose number never grew beyond what KVM takes.
pub(super) fn from_entries(entries: &[kvm_cpuid_entry2]) -> CpuId {
    CpuId::from_entries(entries).expect("KVM's own entries and at most five more")
}

fn filter(supported: &[kvm_cpuid_entry2], deadline: bool) -> Vec<kvm_cpuid_entry2> {
    let mut entries: Vec<_> = supported
        .iter()
        .filter(|e| !DROPPED.contains(&e.function))
        // Tile states, and every supervisor state: subleaves of 0xD whose bit is hidden.
        .filter(|e| e.function != 0xd || e.index < 2 || is_user_state(supported, e.index))
        .copied()
        .collect();
    for &(leaf, subleaf, reg, bits) in HIDDEN {
        if let Some(e) = find(&mut entries, leaf, subleaf) {
            *reg.of(e) &= !bits;
        }
    }
    if let Some(e) = find(&mut entries, 1, 0) {
        e.ecx |= HYPERVISOR;
        e.ecx = if deadline { e.ecx | TSC_DEADLINE } else { e.ecx & !TSC_DEADLINE };
    }
    if let Some(e) = find(&mut entries, 6, 0) {
        (e.eax, e.ebx, e.ecx, e.edx) = (ARAT, 0, 0, 0);
    }
    if let Some(e) = find(&mut entries, KVM_FEATURES, 0) {
        e.eax &= KVM_FEATURES_OFFERED;
        e.edx = 0;
    }
    set_xsave_size(&mut entries);
    entries
}

/// Whether state component `i` is one that XCR0 enables and a guest is shown.
fn is_user_state(entries: &[kvm_cpuid_entry2], i: u32) -> bool {
    let hidden = 1 << 17 | 1 << 18;
    entries
        .iter()
        .find(|e| e.function == 0xd && e.index == 0)
        .is_some_and(|e| i < 32 && (e.eax & !hidden) >> i & 1 == 1)
}

/// Leaf 0xD.0 ECX: the size of an XSAVE area with all the components that are offered, in bytes
/// (Intel SDM 1, 13.2). EBX, the size for XCR0 as it stands, is KVM's to keep.
pub(super) fn set_xsave_size(entries: &mut [kvm_cpuid_entry2]) {
    /// The legacy region and the header.
    const BASE: u32 = 576;
    let end = |e: &kvm_cpuid_entry2| e.eax.saturating_add(e.ebx);
    let components = entries.iter().filter(|e| e.function == 0xd && e.index >= 2);
    let size = components.map(end).max().unwrap_or(BASE).max(BASE);
    if let Some(e) = find(entries, 0xd, 0)
        && e.eax != 0
    {
        e.ecx = size;
    }
}

/// The entry of a leaf. A leaf without subleaves answers to subleaf 0.
pub(super) fn find(
    entries: &mut [kvm_cpuid_entry2],
    leaf: u32,
    subleaf: u32,
) -> Option<&mut kvm_cpuid_entry2> {
    entries.iter_mut().find(|e| e.function == leaf && e.index == subleaf)
}

/// The CPUID of vCPU `index` (from 0) of `cpus` (1 to [`CPUS_MAX`]), from a machine's common one.
#[must_use]
pub fn for_vcpu(base: &CpuId, index: u32, cpus: u32) -> CpuId {
    debug_assert!(index < cpus && cpus <= CPUS_MAX);
    let mut entries = base.as_slice().to_vec();
    let leaf0 = find(&mut entries, 0, 0).copied().unwrap_or_default();
    // "Auth(enticAMD)" and "Hygo(nGenuine)".
    let amd = matches!(leaf0.ebx, 0x6874_7541 | 0x6f67_7948);
    let id_bits = cpus.next_power_of_two().trailing_zeros();
    let ids = 1_u32 << id_bits;

    if let Some(e) = find(&mut entries, 1, 0) {
        e.ebx = e.ebx & 0xffff | ids.min(255) << 16 | index << 24;
        e.edx = if cpus > 1 { e.edx | HTT } else { e.edx & !HTT };
    }
    for e in entries.iter_mut().filter(|e| matches!(e.function, 4 | 0x8000_001d)) {
        set_cache_sharing(e, ids);
    }
    set_extended_topology(&mut entries, leaf0.eax, index, cpus, id_bits);
    if amd {
        set_amd_topology(&mut entries, index, cpus, id_bits);
    }
    from_entries(&entries)
}

/// Leaves 4 (Intel) and 0x8000001D (AMD): the third level of cache is shared by all CPUs, others by
/// none. Leaf 4 also says how many core ids the package has; AMD reserves those bits.
fn set_cache_sharing(e: &mut kvm_cpuid_entry2, ids: u32) {
    let (kind, level) = (e.eax & 0x1f, e.eax >> 5 & 7);
    if kind == 0 {
        return;
    }
    let sharing = if level >= 3 { ids - 1 } else { 0 };
    e.eax = e.eax & 0x3fff | sharing << 14;
    if e.function == 4 {
        e.eax |= (ids - 1).min(63) << 26;
    }
}

/// Leaves 0xB and 0x1F: a level of one thread (0 bits of the APIC id), a level of all cores.
fn set_extended_topology(
    entries: &mut Vec<kvm_cpuid_entry2>,
    leaf_max: u32,
    index: u32,
    cpus: u32,
    id_bits: u32,
) {
    entries.retain(|e| !matches!(e.function, 0xb | 0x1f));
    for function in [0xb, 0x1f].into_iter().filter(|leaf| *leaf <= leaf_max) {
        let level = |subleaf: u32, kind: u32, shift: u32, processors: u32| kvm_cpuid_entry2 {
            function,
            index: subleaf,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: processors,
            ecx: subleaf | kind << 8,
            edx: index,
            ..kvm_cpuid_entry2::default()
        };
        entries.extend([level(0, 1, 0, 1), level(1, 2, id_bits, cpus), level(2, 0, 0, 0)]);
    }
}

/// AMD's own: core count and id width (0x80000008), APIC and core id (0x8000001E), one node.
fn set_amd_topology(entries: &mut [kvm_cpuid_entry2], index: u32, cpus: u32, id_bits: u32) {
    if let Some(e) = find(entries, 0x8000_0001, 0) {
        e.ecx = if cpus > 1 { e.ecx | CMP_LEGACY } else { e.ecx & !CMP_LEGACY };
    }
    if let Some(e) = find(entries, 0x8000_0008, 0) {
        e.ecx = (cpus - 1) | id_bits << 12;
    }
    if let Some(e) = find(entries, 0x8000_001e, 0) {
        (e.eax, e.ebx, e.ecx, e.edx) = (index, index & 0xff, 0, 0);
    }
}

#[cfg(test)]
#[path = "cpuid_tests.rs"]
mod tests;
