//! Tests of the filter and of the topology, on made-up hosts.

use super::*;

fn entry(function: u32, index: u32, regs: [u32; 4]) -> kvm_cpuid_entry2 {
    let [eax, ebx, ecx, edx] = regs;
    kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..kvm_cpuid_entry2::default() }
}

fn intel() -> Vec<kvm_cpuid_entry2> {
    vec![
        entry(0, 0, [0x1f, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
        entry(1, 0, [0x906ea, 0xff80_1234, u32::MAX, u32::MAX]),
        entry(4, 0, [0xfc1c_c121, 0, 0, 0]),
        entry(4, 1, [0xfc1c_c143, 0, 0, 0]),
        entry(4, 2, [0xfc1c_c163, 0, 0, 0]),
        entry(4, 3, [0, 0, 0, 0]),
        entry(6, 0, [0, 0, 9, 0]),
        entry(7, 0, [1, u32::MAX, u32::MAX, u32::MAX]),
        entry(0xa, 0, [0x0830_0805, 0, 0, 0x603]),
        entry(0xb, 0, [1, 2, 0x100, 77]),
        entry(0xd, 0, [0x6_00e7, 0x240, 11008, 0]),
        entry(0xd, 1, [0x1f, 0, 0x1900, 0]),
        entry(0xd, 2, [0x100, 0x240, 0, 0]),
        entry(0xd, 5, [0x40, 0x440, 0, 0]),
        entry(0xd, 6, [0x200, 0x480, 0, 0]),
        entry(0xd, 7, [0x400, 0x680, 0, 0]),
        entry(0xd, 11, [0x10, 0, 1, 0]),
        entry(0xd, 17, [0x40, 0xac0, 2, 0]),
        entry(0xd, 18, [0x2000, 0xb00, 6, 0]),
        entry(0x1d, 1, [1, 1, 1, 1]),
        entry(0x4000_0000, 0, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
        entry(0x4000_0001, 0, [u32::MAX, 0, 0, 1]),
        entry(0x8000_0001, 0, [0, 0, 0x121, 0x2c10_0800]),
        entry(0x8000_0008, 0, [0x3027, 0, 0, 0]),
    ]
}

fn amd() -> Vec<kvm_cpuid_entry2> {
    vec![
        entry(0, 0, [0x10, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
        entry(1, 0, [0xa2_0f10, 0, 0, 0x0780_fbff]),
        entry(0x8000_0001, 0, [0, 0, 0x1140_01ff, 0]),
        entry(0x8000_0008, 0, [0x3030, 0, 0x700f, 0]),
        entry(0x8000_000a, 0, [1, 2, 3, 4]),
        entry(0x8000_001d, 0, [0x4121, 0, 0, 0]),
        entry(0x8000_001d, 3, [0x3_c163, 0, 0, 0]),
        entry(0x8000_001e, 0, [9, 9, 9, 9]),
    ]
}

fn get(cpuid: &CpuId, leaf: u32, subleaf: u32) -> kvm_cpuid_entry2 {
    let mut found =
        cpuid.as_slice().iter().filter(|e| e.function == leaf && e.index == subleaf).copied();
    let entry = found.next().unwrap_or_else(|| panic!("no leaf {leaf:#x}.{subleaf}"));
    assert!(found.next().is_none(), "leaf {leaf:#x}.{subleaf} twice");
    entry
}

#[test]
fn what_cannot_move_or_wastes_time_is_hidden() {
    let cpuid = from_entries(&filter(&intel(), true));
    let leaf1 = get(&cpuid, 1, 0);
    assert_eq!(leaf1.ecx, !(1 << 5 | 1 << 15), "all but VMX and PDCM");
    assert_eq!(get(&cpuid, 7, 0).edx & (1 << 20 | 1 << 22 | 1 << 24 | 1 << 25), 0);
    assert_eq!(get(&cpuid, 6, 0).eax, 4, "ARAT");
    assert_eq!(get(&cpuid, 0x4000_0001, 0).eax, KVM_FEATURES_OFFERED);
    assert!(cpuid.as_slice().iter().all(|e| !matches!(e.function, 0xa | 0x1d)));
}

#[test]
fn without_the_capability_there_is_no_deadline_timer() {
    let cpuid = from_entries(&filter(&intel(), false));
    assert_eq!(get(&cpuid, 1, 0).ecx & TSC_DEADLINE, 0);
}

#[test]
fn xsave_is_as_big_as_what_is_left() {
    let cpuid = from_entries(&filter(&intel(), true));
    let leaf = get(&cpuid, 0xd, 0);
    assert_eq!((leaf.eax, leaf.ecx), (0xe7, 0xa80), "AVX-512 ends the area, no tiles");
    assert_eq!(get(&cpuid, 0xd, 1).eax, 0xf);
    assert_eq!(get(&cpuid, 0xd, 1).ecx, 0);
    let components: Vec<_> =
        cpuid.as_slice().iter().filter(|e| e.function == 0xd).map(|e| e.index).collect();
    assert_eq!(components, [0, 1, 2, 5, 6, 7]);
}

#[test]
fn intel_topology() {
    let base = from_entries(&filter(&intel(), true));
    for cpus in [1_u32, 2, 3, 4, 32, CPUS_MAX] {
        let ids = cpus.next_power_of_two();
        for index in [0, cpus / 2, cpus - 1] {
            let cpuid = for_vcpu(&base, index, cpus);
            let leaf1 = get(&cpuid, 1, 0);
            assert_eq!(leaf1.ebx >> 24, index);
            assert_eq!(leaf1.ebx >> 16 & 0xff, ids.min(255));
            assert_eq!(leaf1.ebx & 0xffff, 0x1234);
            assert_eq!(leaf1.edx >> 28 & 1 == 1, cpus > 1, "HTT");
            for leaf in [0xb, 0x1f] {
                let thread = get(&cpuid, leaf, 0);
                assert_eq!((thread.eax, thread.ebx, thread.ecx), (0, 1, 0x100));
                let core = get(&cpuid, leaf, 1);
                assert_eq!((1 << core.eax, core.ebx, core.ecx), (ids, cpus, 0x201));
                assert_eq!((thread.edx, core.edx, get(&cpuid, leaf, 2).edx), (index, index, index));
            }
            assert_eq!(get(&cpuid, 4, 0).eax, (ids - 1).min(63) << 26 | 0x121);
            assert_eq!(
                get(&cpuid, 4, 2).eax,
                (ids - 1).min(63) << 26 | (ids - 1) << 14 | 0x163,
                "the third level is shared"
            );
            assert_eq!(get(&cpuid, 4, 3).eax, 0);
            assert_eq!(get(&cpuid, 0x8000_0008, 0).ecx, 0, "reserved by Intel");
        }
    }
}

#[test]
fn amd_topology() {
    let base = from_entries(&filter(&amd(), true));
    for (index, cpus, bits) in [(0, 1_u32, 0), (1, 2, 1), (2, 3, 2), (31, 32, 5)] {
        let cpuid = for_vcpu(&base, index, cpus);
        assert_eq!(get(&cpuid, 0x8000_0008, 0).ecx, (cpus - 1) | bits << 12);
        let ids = get(&cpuid, 0x8000_001e, 0);
        assert_eq!((ids.eax, ids.ebx, ids.ecx, ids.edx), (index, index, 0, 0));
        assert_eq!(get(&cpuid, 0x8000_001d, 3).eax >> 14, cpus.next_power_of_two() - 1);
        assert_eq!(get(&cpuid, 0x8000_001d, 0).eax, 0x121);
        assert_eq!(get(&cpuid, 0x8000_0001, 0).ecx >> 1 & 1 == 1, cpus > 1, "CmpLegacy");
        assert_eq!(get(&cpuid, 0x8000_0001, 0).ecx & 4, 0, "SVM");
        assert_eq!(get(&cpuid, 0xb, 1).ebx, cpus);
        assert!(cpuid.as_slice().iter().all(|e| !matches!(e.function, 0x1f | 0x8000_000a)));
    }
}
