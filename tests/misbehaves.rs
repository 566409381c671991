//! Guests that misbehave, under the real binary: a driver that breaks its ring stops that device and nothing else, and a
//! guest that this KVM can't run ends with a line that says so.

#[path = "support/flat.rs"]
mod flat;

use std::path::Path;

use flat::{Guest, World, guest};

/// Registers of the first virtio device, by its number the source of entropy.
const DEVICE: u32 = 0xd000_0000;
const DRIVER_FEATURES: u32 = DEVICE + 0x20;
const DRIVER_FEATURES_SEL: u32 = DEVICE + 0x24;
const QUEUE_SIZE: u32 = DEVICE + 0x38;
const QUEUE_READY: u32 = DEVICE + 0x44;
const QUEUE_NOTIFY: u32 = DEVICE + 0x50;
const STATUS: u32 = DEVICE + 0x70;
/// Low halves of the addresses of descriptors, available and used ring.
const QUEUE_AREAS: [(u32, u32); 3] =
    [(DEVICE + 0x80, 0x20_0000), (DEVICE + 0x90, 0x20_1000), (DEVICE + 0xa0, 0x20_2000)];
const NEEDS_RESET: u8 = 64;

/// A driver that takes the device up to the last step, and makes more available than its ring holds.
fn with_a_broken_ring() -> Guest {
    let mut driver = guest();
    for status in [0, 1, 3] {
        driver = driver.store(STATUS, status);
    }
    // VIRTIO_F_VERSION_1, and nothing else.
    for (register, value) in [(DRIVER_FEATURES_SEL, 1), (DRIVER_FEATURES, 1), (STATUS, 11)] {
        driver = driver.store(register, value);
    }
    driver = driver.store(QUEUE_SIZE, 8);
    for (register, address) in QUEUE_AREAS {
        driver = driver.store(register, address).store(register + 4, 0);
    }
    // The available ring's flags and index.
    driver.store(QUEUE_AREAS[1].1, 1000 << 16).store(QUEUE_READY, 1).store(STATUS, 15)
}

#[test]
fn a_broken_ring_stops_its_device_with_one_line_and_nothing_else() {
    let mut driver = with_a_broken_ring().store(QUEUE_NOTIFY, 0);
    driver = driver.await_bit_at(STATUS, NEEDS_RESET).print("broken ");
    // What it goes on asking for is neither done nor told.
    for _ in 0..50 {
        driver = driver.store(QUEUE_NOTIFY, 0);
    }
    // After a reset it is as new, its status 0: bit 6 isn't there; and the rest went on all the time.
    driver = driver.store(STATUS, 0).store(STATUS, 1).await_bit_at(STATUS, 1).print("anew ");
    let world = World::new(&driver.echo().power_off().spin());
    let mut vm = world.run(&[]);
    vm.reads("broken anew ");
    assert_eq!(world.json(&["info", "--json"])["state"], "running");
    vm.types("e");
    let (status, output, errors) = vm.ends();
    assert_eq!((status, output.as_str()), (Some(0), "e"), "{errors}");
    let lines: Vec<_> = errors.lines().collect();
    let [line] = lines[..] else { panic!("{errors}") };
    assert!(line.contains("the device stops until its driver resets it: virtqueue 0: "), "{line}");
    assert!(line.contains("rng"), "{line}");
}

#[test]
fn a_guest_that_breaks_it_again_and_again_is_told_a_few_times() {
    let mut driver = guest();
    for _ in 0..40 {
        let broken = with_a_broken_ring().store(QUEUE_NOTIFY, 0);
        driver = driver.bytes(&broken.await_bit_at(STATUS, NEEDS_RESET).0);
    }
    let (status, output, errors) =
        World::new(&driver.print("done").power_off().spin()).run(&[]).ends();
    assert_eq!((status, output.as_str()), (Some(0), "done"), "{errors}");
    // Five a second, and the later ones say how many there were between; a slow host sees more of them.
    let told = errors.matches("the device stops until its driver resets it").count();
    assert!((1..=40).contains(&told) && told == errors.lines().count(), "{errors}");
}

/// KVM's emulator, which is all that a software-only KVM has for a guest's kernel, lacks `cmpxchg16b`.
#[test]
fn a_guest_that_this_kvm_cannot_run_is_told_apart() {
    // mov eax, 0x200000; cmpxchg16b [rax]
    let instruction = [0xb8, 0, 0, 0x20, 0, 0x48, 0x0f, 0xc7, 0x08];
    let world = World::new(&guest().bytes(&instruction).print("ran").power_off().spin());
    let (status, output, errors) = world.run(&[]).ends();
    if Path::new("/sys/module/kvm_pvm").exists() {
        assert_eq!((status, output.as_str()), (Some(1), ""), "{errors}");
        let words = "vmm: vCPU 0: KVM could not emulate a guest instruction at 0x100005 (suberror 1): \
                     this host's KVM can't run this guest\n";
        assert_eq!(errors, words);
    } else {
        assert_eq!((status, output.as_str(), errors.as_str()), (Some(0), "ran", ""));
    }
}
