//! The bytes of version 1 of the sections of vCPUs, clock and interrupt controllers, frozen.

use kvm_bindings::{
    kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
    kvm_xsave,
};
use vmm_migration::state::{from_body, to_body};

use super::chip_state::ChipStateV1;
use super::clock::ClockStateV1;
use super::vcpu_state::{CpuidEntryV1, VcpuStateV1};

#[test]
fn vcpu() {
    let state = VcpuStateV1 {
        cpuid: vec![CpuidEntryV1 { function: 7, index: 300, flags: 1, regs: [2, 3, 4, 5] }],
        mp_state: 3,
        regs: vec![10],
        sregs: vec![11, 11],
        xsave: vec![12],
        xcrs: vec![13],
        debug_regs: vec![14],
        lapic: vec![15],
        msrs: vec![(0x174, 128), (0x6e0, 1)],
        events: vec![16],
    };
    let golden = [
        1, 7, 0xac, 2, 1, 2, 3, 4, 5, 3, 1, 10, 2, 11, 11, 1, 12, 1, 13, 1, 14, 1, 15, 2, 0xf4, 2,
        0x80, 1, 0xe0, 0xd, 1, 1, 16,
    ];
    assert_eq!(to_body(&state), golden);
    assert_eq!(from_body::<VcpuStateV1>("vcpu", 1, &golden).unwrap(), state);
}

#[test]
fn clock() {
    let state = ClockStateV1 { kvmclock_ns: 1, realtime_ns: 300, tsc_khz: 2, tsc: vec![5, 6] };
    let golden = [1, 0xac, 2, 2, 2, 5, 6];
    assert_eq!(to_body(&state), golden);
    assert_eq!(from_body::<ClockStateV1>("clock", 1, &golden).unwrap(), state);
}

#[test]
fn interrupt_controllers() {
    let state = ChipStateV1 { pic_master: vec![1], pic_slave: vec![2], ioapic: vec![3, 4] };
    let golden = [1, 1, 1, 2, 2, 3, 4];
    assert_eq!(to_body(&state), golden);
    assert_eq!(from_body::<ChipStateV1>("irqchip", 1, &golden).unwrap(), state);
}

/// As long as the specification says.
#[test]
fn kernel_structs() {
    let protocol = include_str!("../../../migration/PROTOCOL.md");
    let words: Vec<_> = protocol.split_whitespace().collect();
    let sizes = [
        ("`kvm_irqchip`", size_of::<kvm_irqchip>()),
        ("`kvm_regs`", size_of::<kvm_regs>()),
        ("`kvm_sregs`", size_of::<kvm_sregs>()),
        ("`kvm_xsave`", size_of::<kvm_xsave>()),
        ("`kvm_xcrs`", size_of::<kvm_xcrs>()),
        ("`kvm_debugregs`", size_of::<kvm_debugregs>()),
        ("`kvm_lapic_state`", size_of::<kvm_lapic_state>()),
        ("`kvm_vcpu_events`", size_of::<kvm_vcpu_events>()),
    ];
    for (name, size) in sizes {
        let told = words.windows(2).any(|pair| {
            pair[0] == name && pair[1].trim_matches(['(', ')', ',', '.', ';']) == size.to_string()
        });
        assert!(told, "PROTOCOL.md doesn't say that {name} has {size} bytes");
    }
}
