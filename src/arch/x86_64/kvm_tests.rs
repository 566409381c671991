//! Tests on /dev/kvm: a kernel is entered as its protocol says, and what is saved, restored into another
//! VM and saved again is the same.

use std::time::{Duration, Instant};

use kvm_bindings::{KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED};
use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::{Bytes, GuestAddress};
use vmm_migration::state::{RestoreError, Stateful};

use super::chip_state::ChipPart;
use super::clock::{ClockPart, ClockStateV1};
use super::msr::MsrPlan;
use super::*;
use crate::downtime::Downtime;
use crate::kernel::{Entry, Loaded};
use crate::memory::{Backing, Memory};
use crate::stats::FaultCount;
use vmm_devices::GuestRam;

/// A VM of `cpus` vCPUs as a machine configures them.
struct Vm {
    vm: VmFd,
    vcpus: Vec<VcpuFd>,
    plan: MsrPlan,
    ram: GuestRam,
}

/// `None`, said aloud, where `NO_KVM=1` allows it; a host without KVM fails otherwise.
fn kvm() -> Option<Kvm> {
    if std::env::var_os("NO_KVM").is_some_and(|v| v == "1") {
        eprintln!("NO_KVM=1: not tested");
        return None;
    }
    Some(Kvm::new().expect("/dev/kvm is needed; NO_KVM=1 leaves these tests out"))
}

impl Vm {
    fn new(kvm: &Kvm, cpus: u32) -> Self {
        let vm = kvm.create_vm().unwrap();
        configure_vm(&vm).unwrap();
        let host = cpuid::host_cpuid(kvm).unwrap();
        let vcpus = (0..cpus)
            .map(|index| {
                let vcpu = vm.create_vcpu(u64::from(index)).unwrap();
                vcpu.set_cpuid2(&cpuid::for_vcpu(&host, index, cpus)).unwrap();
                boot_regs::init_msrs(&vcpu).unwrap();
                vcpu
            })
            .collect();
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
        Self { vm, vcpus, plan: MsrPlan::new(kvm).unwrap(), ram }
    }

    fn save(&self, index: usize) -> vcpu_state::VcpuStateV1 {
        vcpu_state::save(&self.vcpus[index], &self.plan).unwrap()
    }
}

#[test]
fn this_kvm_counts_the_faults_of_each_vcpu() {
    let Some(kvm) = kvm() else { return };
    for vcpu in Vm::new(&kvm, 2).vcpus {
        assert_eq!(FaultCount::of(&vcpu).expect("Linux 5.14 has it").get(), Some(0));
    }
}

#[test]
fn this_kvm_has_what_is_required() {
    let Some(kvm) = kvm() else { return };
    for (cap, name) in REQUIRED_CAPS {
        assert!(kvm.check_extension(*cap), "{name}");
    }
}

/// Boots `code` at 16 MiB by either protocol, and returns what it writes to the serial port.
fn boot(kvm: &Kvm, entry: Entry, code: &[u8]) -> Vec<u8> {
    const AT: u64 = 16 << 20;
    let mut vm = Vm::new(kvm, 1);
    let ranges = layout::ram_ranges(64 << 20);
    let memory = Memory::new(&ranges, Backing::Fresh { hugepages: false }).unwrap();
    memory.register(&vm.vm, false).unwrap();
    memory.ram().write_slice(code, GuestAddress(AT)).unwrap();
    let description =
        tables::Description { cpus: 1, virtio: &[], vmgenid_address: None, vmclock_address: None };
    let rsdp = tables::build(memory.ram(), &description).unwrap();
    let kernel = Loaded { entry, end: AT + 4096, init_size: 4096 };
    let inputs =
        boot::BootInputs { ram: memory.ram(), kernel: &kernel, cmdline: "", initrd: None, rsdp };
    boot::prepare(inputs).unwrap().apply(&vm.vcpus[0]).unwrap();
    match vm.vcpus[0].run().unwrap() {
        VcpuExit::IoOut(layout::SERIAL_PORT, data) => data.to_vec(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_kernel_is_entered_as_linux_wants_it() {
    let Some(kvm) = kvm() else { return };
    #[rustfmt::skip]
    let code = [
        0x8b, 0x86, 0x02, 0x02, 0x00, 0x00, // mov eax, [rsi + 0x202]
        0x48, 0x8c, 0xd9,                   // mov rcx, ds: a REX prefix is an instruction in 32-bit mode
        0x66, 0xba, 0xf8, 0x03,             // mov dx, 0x3f8
        0xef,                               // out dx, eax
    ];
    let entry = Entry::Linux64 { entry: 16 << 20, setup_header: None };
    assert_eq!(boot(&kvm, entry, &code), b"HdrS");
}

#[test]
fn a_kernel_is_entered_as_pvh_wants_it() {
    let Some(kvm) = kvm() else { return };
    #[rustfmt::skip]
    let code = [
        0x8b, 0x03,             // mov eax, [ebx]
        0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xef,                   // out dx, eax
    ];
    let entry = Entry::Pvh { entry: 16 << 20 };
    assert_eq!(boot(&kvm, entry, &code), 0x336e_c578_u32.to_le_bytes());
}

#[test]
fn vcpu_state_survives_a_move() {
    let Some(kvm) = kvm() else { return };
    let source = Vm::new(&kvm, 2);
    boot_regs::BootRegs::new(boot_regs::Mode::Long, 0x100_0000, 0x7000)
        .apply(&source.vcpus[0])
        .unwrap();
    // Values that a fresh vCPU doesn't have, one of each kind.
    let mut regs = source.vcpus[0].get_regs().unwrap();
    (regs.r15, regs.rax) = (0x1234_5678_9abc_def0, 42);
    source.vcpus[0].set_regs(&regs).unwrap();
    let mut fpu = source.vcpus[0].get_fpu().unwrap();
    fpu.xmm[7] = [0x5a; 16];
    source.vcpus[0].set_fpu(&fpu).unwrap();
    let mut debug_regs = source.vcpus[0].get_debug_regs().unwrap();
    debug_regs.db[1] = 0xdead_b000;
    source.vcpus[0].set_debug_regs(&debug_regs).unwrap();
    let mut lapic = source.vcpus[0].get_lapic().unwrap();
    (lapic.regs[0xf1], lapic.regs[0x80]) = (1, 0x20);
    source.vcpus[0].set_lapic(&lapic).unwrap();
    let star = [(0xc000_0082, 0xffff_ffff_8123_4567), (0x277, 0x0007_0406_0007_0406)];
    for vcpu in &source.vcpus {
        assert_eq!(msr::restore(vcpu, &star).unwrap(), []);
    }

    let destination = Vm::new(&kvm, 2);
    for (index, mp_state) in [KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED].iter().enumerate()
    {
        let saved = source.save(index);
        assert_eq!(saved.mp_state, *mp_state);
        assert!(saved != destination.save(index), "the test would prove nothing");
        vcpu_state::restore(&destination.vcpus[index], &saved).unwrap();
        let again = destination.save(index);
        assert_eq!(again.msrs, saved.msrs);
        assert_eq!(again.cpuid, saved.cpuid);
        assert!(again == saved, "something that is bytes was lost");
    }
    let moved = source.save(0);
    assert!(moved.msrs.contains(&star[0]) && moved.msrs.contains(&star[1]), "{:x?}", moved.msrs);
    assert!(lapic_in_use(&destination.vcpus[0]));
    assert!(!lapic_in_use(&destination.vcpus[1]));
}

#[test]
fn malformed_vcpu_state_is_refused_before_anything_is_set() {
    let Some(kvm) = kvm() else { return };
    let vm = Vm::new(&kvm, 1);
    let good = vm.save(0);
    let mut bad: Vec<_> = vec![good.clone(); 8];
    bad[0].regs.pop();
    bad[1].sregs.push(0);
    bad[2].xsave.truncate(512);
    bad[3].xcrs.clear();
    bad[4].debug_regs.push(1);
    bad[5].lapic.pop();
    bad[6].events.clear();
    bad[7].cpuid = vec![good.cpuid[0]; 1000];
    for (i, state) in bad.iter().enumerate() {
        let refused = vcpu_state::restore(&vm.vcpus[0], state);
        assert!(matches!(refused, Err(RestoreError::Invalid { .. })), "{i}: {refused:?}");
    }
    assert!(vm.save(0) == good, "something was set");
}

#[test]
fn a_refused_msr_that_the_guest_needs_is_an_error() {
    let Some(kvm) = kvm() else { return };
    let vm = Vm::new(&kvm, 1);
    let mut state = vm.save(0);
    // LSTAR must be canonical.
    state.msrs.push((0xc000_0082, 0x8000_0000_0000_0000));
    let refused = vcpu_state::restore(&vm.vcpus[0], &state).unwrap_err();
    assert!(refused.to_string().contains("0xc0000082 = 0x8000000000000000"), "{refused}");
}

#[test]
fn an_msr_that_is_not_here_is_no_need_if_it_is_zero() {
    let Some(kvm) = kvm() else { return };
    let vm = Vm::new(&kvm, 1);
    let mut state = vm.save(0);
    // KVM knows none of this number.
    state.msrs.push((0x1234_5678, 0));
    assert_eq!(vcpu_state::restore(&vm.vcpus[0], &state).unwrap(), []);
    state.msrs.push((0x1234_5678, 1));
    let refused = vcpu_state::restore(&vm.vcpus[0], &state).unwrap_err();
    assert!(refused.to_string().contains("0x12345678 = 0x1"), "{refused}");
}

#[test]
fn a_refused_msr_that_the_guest_can_spare_is_told() {
    let Some(kvm) = kvm() else { return };
    let vm = Vm::new(&kvm, 1);
    let mut state = vm.save(0);
    // IA32_FEATURE_CONTROL has reserved bits.
    state.msrs.push((0x3a, u64::MAX));
    let spared = vcpu_state::restore(&vm.vcpus[0], &state).unwrap();
    assert_eq!(msr::list(&spared), "0x3a = 0xffffffffffffffff");
}

#[test]
fn chip_state_survives_a_move() {
    let Some(kvm) = kvm() else { return };
    let (source, destination) = (Vm::new(&kvm, 1).vm, Vm::new(&kvm, 1).vm);
    let mut configured = ChipPart { vm: &source }.save().unwrap();
    // Redirection entry 6 of the I/O APIC: unmasked, vector 0x31, edge.
    const ENTRY_6: usize = 8 + 24 + 6 * 8;
    configured.ioapic[ENTRY_6..ENTRY_6 + 8].copy_from_slice(&0x31_u64.to_le_bytes());
    ChipPart { vm: &source }.restore(configured.clone()).unwrap();
    let saved = ChipPart { vm: &source }.save().unwrap();
    assert_eq!(saved, configured);
    assert_ne!(
        saved,
        ChipPart { vm: &destination }.save().unwrap(),
        "the test would prove nothing"
    );
    ChipPart { vm: &destination }.restore(saved.clone()).unwrap();
    assert_eq!(ChipPart { vm: &destination }.save().unwrap(), saved);

    let mut swapped = saved.clone();
    swapped.pic_master = saved.ioapic.clone();
    let refused = ChipPart { vm: &destination }.restore(swapped);
    assert!(matches!(refused, Err(RestoreError::Invalid { .. })), "{refused:?}");
    let mut short = saved;
    short.ioapic.pop();
    let refused = ChipPart { vm: &destination }.restore(short);
    assert!(matches!(refused, Err(RestoreError::Invalid { .. })), "{refused:?}");
}

/// Saves the clock of `source`, whose host's real time is so far ahead, waits, restores it into `destination` and saves
/// it there. `downtime` hears from when to when that went. Returns both, and the least and the most time that can have passed between them and since the restore.
fn move_clock(
    source: &Vm,
    destination: &Vm,
    host_apart_ns: i64,
    downtime: impl Fn(Instant, Instant) -> Downtime,
) -> (ClockStateV1, ClockStateV1, Duration, Duration) {
    let from: Vec<_> = source.vcpus.iter().collect();
    let to: Vec<_> = destination.vcpus.iter().collect();
    let start = Instant::now();
    let (ram, passes) = (&source.ram, Downtime::Passes);
    let part = ClockPart { vm: &source.vm, vcpus: &from, ram, downtime: passes };
    let mut saved = part.save().unwrap();
    std::thread::sleep(PAUSE);
    saved.realtime_ns = saved.realtime_ns.wrapping_add_signed(host_apart_ns);
    let restored = Instant::now();
    let downtime = downtime(start, restored);
    let mut part = ClockPart { vm: &destination.vm, vcpus: &to, ram: &destination.ram, downtime };
    part.restore(saved.clone()).unwrap();
    let again = part.save().unwrap();
    (saved, again, start.elapsed(), restored.elapsed())
}

const PAUSE: Duration = Duration::from_millis(50);

#[test]
fn the_clock_goes_on_as_if_it_had_never_stopped() {
    let Some(kvm) = kvm() else { return };
    let (source, destination) = (Vm::new(&kvm, 2), Vm::new(&kvm, 2));
    std::thread::sleep(PAUSE);
    let (saved, again, most, _) = move_clock(&source, &destination, 0, |_, _| Downtime::Passes);
    let ahead = Duration::from_nanos(again.kvmclock_ns - saved.kvmclock_ns);
    assert!(PAUSE <= ahead && ahead <= most + CLOCK_SLACK, "{ahead:?} of at most {most:?}");
    assert_eq!(again.tsc_khz, saved.tsc_khz);
    for (new, old) in again.tsc.iter().zip(&saved.tsc) {
        let ns = (new - old) * 1_000_000 / u64::from(saved.tsc_khz);
        let apart = Duration::from_nanos(ns).abs_diff(ahead);
        assert!(apart < CLOCK_SLACK, "TSC and kvmclock went apart by {apart:?}");
    }
    assert_eq!(again.tsc[1] - again.tsc[0], saved.tsc[1] - saved.tsc[0]);
}

/// The host's clocks are slewed apart a little; a test host may preempt us between two of them.
const CLOCK_SLACK: Duration = Duration::from_millis(20);

/// Two hosts whose real times differ by five seconds: the guest's clock goes on by what passed.
#[test]
fn the_clock_does_not_jump_where_hosts_differ() {
    let Some(kvm) = kvm() else { return };
    for apart_ns in [5_000_000_000, -5_000_000_000, 0] {
        let (source, destination) = (Vm::new(&kvm, 2), Vm::new(&kvm, 2));
        let (saved, again, most, _) =
            move_clock(&source, &destination, apart_ns, |saved, arrived| Downtime::PassesSince {
                earliest: saved,
                latest: arrived - PAUSE,
            });
        let ahead = Duration::from_nanos(again.kvmclock_ns - saved.kvmclock_ns);
        let ticks = again.tsc[0] - saved.tsc[0];
        let by_tsc = Duration::from_nanos(ticks * 1_000_000 / u64::from(saved.tsc_khz));
        for ahead in [ahead, by_tsc] {
            let least = PAUSE.saturating_sub(CLOCK_SLACK);
            assert!(least <= ahead && ahead <= most + CLOCK_SLACK, "{apart_ns}: {ahead:?}");
        }
    }
}

#[test]
fn the_clock_stands_still_for_a_snapshot() {
    let Some(kvm) = kvm() else { return };
    let (source, destination) = (Vm::new(&kvm, 1), Vm::new(&kvm, 1));
    let (saved, again, _, since) =
        move_clock(&source, &destination, 0, |_, _| Downtime::StandsStill);
    let ahead = Duration::from_nanos(again.kvmclock_ns - saved.kvmclock_ns);
    assert!(ahead <= since + Duration::from_millis(1), "{ahead:?} in {since:?}");
}

#[test]
fn a_clock_that_cannot_be_is_refused() {
    let Some(kvm) = kvm() else { return };
    let vm = Vm::new(&kvm, 1);
    let vcpus: Vec<_> = vm.vcpus.iter().collect();
    let mut part =
        ClockPart { vm: &vm.vm, vcpus: &vcpus, ram: &vm.ram, downtime: Downtime::Passes };
    let mut two = part.save().unwrap();
    two.tsc.push(0);
    assert!(matches!(part.restore(two), Err(RestoreError::Invalid { .. })));
    let mut stopped = part.save().unwrap();
    stopped.tsc_khz = 0;
    assert!(matches!(part.restore(stopped), Err(RestoreError::Invalid { .. })));
    clock::pause_notify(&vm.vcpus[0]).unwrap();
}

#[test]
fn a_new_vcpu_is_as_firmware_leaves_it() {
    let Some(kvm) = kvm() else { return };
    let vm = Vm::new(&kvm, 1);
    assert_eq!(boot_regs::init_msrs(&vm.vcpus[0]).unwrap(), [0; 0]);
    let get = |index| msr::get(&vm.vcpus[0], index).unwrap();
    assert_eq!(get(msr::index::MCG_CAP), Some(1), "banks of machine-check registers");
    assert_eq!(get(msr::index::MTRR_DEF_TYPE), Some(1 << 11 | 6));
    assert_eq!(get(msr::index::MISC_ENABLE).map(|v| v & 1), Some(1));
}
