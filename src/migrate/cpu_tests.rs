//! Tests of what a host lacks of a guest's needs, with hosts that aren't.

use super::*;

fn leaf(function: u32, index: u32, registers: [u32; 4]) -> CpuidLeaf {
    CpuidLeaf { function, index, registers }
}

/// A guest with AVX and PKRU, whose TSC runs at 2 GHz.
fn needs() -> CpuNeeds {
    CpuNeeds {
        arch: std::env::consts::ARCH.to_owned(),
        model: "host".to_owned(),
        vcpus: 1,
        cpuid: vec![
            leaf(0, 0, [0xd, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
            leaf(0xd, 0, [0x207, 0x340, 0xa88, 0]),
            leaf(0xd, 2, [0x100, 0x240, 0, 0]),
            leaf(0xd, 9, [8, 0xa80, 0, 0]),
        ],
        msrs: vec![0x10],
        xsave_bytes: 0xa88,
        xcr0: 0x207,
        xss: 0,
        tsc_khz: 2_000_000,
    }
}

/// The host that it comes from.
fn offer() -> Offer {
    let entries: Vec<_> = needs().cpuid.iter().map(entry).collect();
    Offer { cpuid: CpuId::from_entries(&entries).unwrap(), tsc_khz: 2_000_000, tsc_scaling: false }
}

/// What that host lacks of other needs.
fn reasons(change: impl FnOnce(&mut CpuNeeds)) -> Vec<String> {
    let mut needs = needs();
    change(&mut needs);
    lacking(&needs, &offer())
}

#[test]
fn where_it_comes_from_a_guest_fits() {
    assert_eq!(reasons(|_| ()), [""; 0]);
    // As older sources told it.
    assert_eq!(reasons(|needs| needs.xsave_bytes = 4096), [""; 0]);
}

#[test]
fn xsave_is_compared() {
    assert_eq!(
        reasons(|needs| needs.xsave_bytes = 4097),
        ["the guest's XSAVE area has 4097 bytes, this vmm restores 4096"]
    );
    assert_eq!(
        reasons(|needs| needs.xcr0 |= 1 << 5 | 1 << 62),
        ["this host's CPU lacks bits 0x4000000000000020 of XCR0"]
    );
    assert_eq!(
        reasons(|needs| needs.xss = 1 << 11),
        ["this host's CPU lacks bits 0x800 of IA32_XSS"]
    );
    // What CPUID shows as well is told once, by its name.
    let avx512 = |needs: &mut CpuNeeds| {
        needs.xcr0 |= 0xe0;
        needs.cpuid[1].registers[0] |= 0xe0;
    };
    let told = reasons(avx512);
    assert!(
        told.len() == 3 && told.iter().all(|reason| reason.contains("lacks xcr0_")),
        "{told:?}"
    );
    assert_eq!(
        reasons(|needs| needs.cpuid[3].registers[1] = 0x980),
        ["this host's CPU lacks XSAVE component 9 of 8 bytes at 2432 (here 8 at 2688)"]
    );
}

#[test]
fn the_tsc_is_compared() {
    let slower = |needs: &mut CpuNeeds| needs.tsc_khz = 1_900_000;
    assert_eq!(
        reasons(slower),
        ["the guest's TSC runs at 1900000 kHz, this host's at 2000000 kHz, and KVM can't scale it"]
    );
    let mut needs = needs();
    slower(&mut needs);
    assert_eq!(lacking(&needs, &Offer { tsc_scaling: true, ..offer() }), [""; 0]);
}

#[test]
fn another_architecture_is_reason_enough() {
    let other = reasons(|needs| needs.arch = "s390x".to_owned());
    assert_eq!(other, [format!("the guest is for s390x, this host is {}", std::env::consts::ARCH)]);
}
