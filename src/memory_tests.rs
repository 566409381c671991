//! Guest RAM by itself: what is touched, what is discarded, and how it lies.

use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{Backing, HUGE_PAGE_SIZE, Memory, MemoryError, PAGE_SIZE};

const MIB: u64 = 1 << 20;

/// 8 MiB below, 4 MiB above a hole.
const RANGES: [(GuestAddress, u64); 2] =
    [(GuestAddress(0), 8 * MIB), (GuestAddress(64 * MIB), 4 * MIB)];

fn memory() -> Memory {
    Memory::new(&RANGES, Backing::Fresh { hugepages: false }).unwrap()
}

/// As a snapshot's memory file is mapped: it has data in pages 3, 4 and 7 of the first slot and in the last
/// of the second.
fn private() -> (Memory, File) {
    let file = File::from(memfd_create("snapshot", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(12 * MIB).unwrap();
    for page in [3, 4, 7, 12 * MIB / PAGE_SIZE - 1] {
        file.write_all_at(&[7; 4096], page * PAGE_SIZE).unwrap();
    }
    (Memory::new(&RANGES, Backing::Private(file.try_clone().unwrap())).unwrap(), file)
}

/// The runs of touched pages of a slot, as first page and count.
fn touched_runs(memory: &Memory, slot: usize) -> Vec<(u64, u64)> {
    let (mut runs, slot) = (Vec::new(), memory.slots()[slot]);
    let note = |at: u64, len: u64| runs.push((at / PAGE_SIZE, len / PAGE_SIZE));
    memory.touched(&slot, 0, slot.len, note).unwrap();
    runs
}

fn touched(memory: &Memory, slot: usize) -> u64 {
    let (mut sum, slot) = (0, memory.slots()[slot]);
    memory.touched(&slot, 0, slot.len, |_, len| sum += len).unwrap();
    sum
}

fn read(memory: &Memory, address: u64) -> u8 {
    memory.ram().read_obj(GuestAddress(address)).unwrap()
}

#[test]
fn what_was_written_counts_as_touched_and_no_other_slot() {
    let memory = memory();
    assert_eq!((touched(&memory, 0), touched(&memory, 1)), (0, 0));
    memory.ram().write_obj(1_u8, GuestAddress(65 * MIB)).unwrap();
    assert_eq!(touched(&memory, 0), 0);
    let one = touched(&memory, 1);
    assert!((PAGE_SIZE..=HUGE_PAGE_SIZE).contains(&one), "{one} bytes of one that was written");
}

#[test]
fn of_a_private_file_what_has_data_or_was_written_counts_once() {
    let (mut memory, file) = private();
    assert_eq!(touched_runs(&memory, 0), [(3, 2), (7, 1)]);
    assert_eq!(touched_runs(&memory, 1), [(1023, 1)]);
    // Read; written over what has data; written beside it, and where nothing was.
    assert_eq!(read(&memory, 7 * PAGE_SIZE), 7);
    for page in [4, 5, 1000, 16384] {
        memory.ram().write_obj(9_u8, GuestAddress(page * PAGE_SIZE)).unwrap();
    }
    assert_eq!(touched_runs(&memory, 0), [(3, 3), (7, 1), (1000, 1)]);
    assert_eq!(touched_runs(&memory, 1), [(0, 1), (1023, 1)]);
    let mut part = Vec::new();
    let slot = memory.slots()[0];
    memory.touched(&slot, 4 * PAGE_SIZE, 4 * PAGE_SIZE, |at, len| part.push((at, len))).unwrap();
    assert_eq!(part, [(4 * PAGE_SIZE, 2 * PAGE_SIZE), (7 * PAGE_SIZE, PAGE_SIZE)]);
    assert_eq!(file.metadata().unwrap().len(), 12 * MIB);
    // Where nobody tells, everything counts.
    memory.pagemap = None;
    assert_eq!(touched_runs(&memory, 0), [(0, 2048)]);
}

#[test]
fn a_private_file_that_was_cut_short_is_found_out() {
    let (memory, file) = private();
    file.set_len(11 * MIB).unwrap();
    let slot = memory.slots()[0];
    let error = memory.touched(&slot, 0, slot.len, |_, _| {}).unwrap_err();
    assert!(error.to_string().contains("cut short"), "{error}");
}

#[test]
fn a_page_discarded_is_zero_and_its_neighbours_stay() {
    let memory = memory();
    let slot = memory.slots()[1];
    for page in 0..1024 {
        let address = GuestAddress(slot.start + page * PAGE_SIZE);
        memory.ram().write_slice(&[7; 4096], address).unwrap();
    }
    // One page; several over the edge between huge pages; none.
    for (first, count) in [(3, 1), (510, 4), (9, 0)] {
        memory.discard(&slot, first * PAGE_SIZE, count * PAGE_SIZE).unwrap();
    }
    for page in 0..1024 {
        let expected = if page == 3 || (510..514).contains(&page) { 0 } else { 7 };
        for at in [0, PAGE_SIZE - 1] {
            assert_eq!(read(&memory, slot.start + page * PAGE_SIZE + at), expected, "page {page}");
        }
    }
}

#[test]
fn huge_pages_discarded_go_back_to_the_host() {
    let memory = memory();
    let slot = memory.slots()[0];
    for page in 0..slot.len / PAGE_SIZE {
        memory.ram().write_obj(7_u8, GuestAddress(page * PAGE_SIZE)).unwrap();
    }
    assert_eq!(touched(&memory, 0), slot.len);
    memory.discard(&slot, 3 * PAGE_SIZE, slot.len - 3 * PAGE_SIZE).unwrap();
    assert_eq!(touched(&memory, 0), HUGE_PAGE_SIZE, "all but the first is given back");
    assert_eq!((read(&memory, 0), read(&memory, 3 * PAGE_SIZE)), (7, 0));
    assert_eq!(read(&memory, 5 * MIB), 0);
}

#[test]
fn discarding_untouched_memory_touches_none() {
    let memory = memory();
    let slot = memory.slots()[1];
    memory.discard(&slot, PAGE_SIZE, slot.len - 2 * PAGE_SIZE).unwrap();
    assert_eq!(touched(&memory, 1), 0);
}

#[test]
fn ranges_lie_so_that_huge_pages_can_be_mapped() {
    // KVM maps a huge page only where the guest's address and ours agree below it.
    let memory = memory();
    for region in memory.ram().iter() {
        let ours = region.as_ptr() as u64;
        let file = memory.file.metadata().unwrap();
        if std::os::unix::fs::MetadataExt::blksize(&file) == HUGE_PAGE_SIZE {
            assert_eq!(ours % HUGE_PAGE_SIZE, region.start_addr().0 % HUGE_PAGE_SIZE);
        }
    }
}

#[test]
fn what_cannot_be_mapped_is_told_with_what_to_do() {
    // More 2 MiB pages than any host has set aside.
    let ranges = [(GuestAddress(0), 1 << 42)];
    let error = Memory::new(&ranges, Backing::Fresh { hugepages: true }).unwrap_err();
    assert!(matches!(error, MemoryError::Map { mib: 4_194_304, .. }), "{error:?}");
    let text = error.to_string();
    assert!(
        text.starts_with("can't map 4194304 MiB of guest memory: reserve 2 MiB pages"),
        "{text}"
    );
}

#[test]
fn a_slot_that_kvm_refuses_is_told() {
    if std::env::var_os("NO_KVM").is_some_and(|v| v == "1") {
        return;
    }
    let vm = kvm_ioctls::Kvm::new().expect("/dev/kvm").create_vm().unwrap();
    let memory = memory();
    memory.register(&vm, false).unwrap();
    memory.register(&vm, true).unwrap();
    // A slot can't become shorter.
    let shorter = Memory::new(&RANGES[1..], Backing::Fresh { hugepages: false }).unwrap();
    let error = shorter.register(&vm, false).unwrap_err();
    assert!(matches!(error, MemoryError::Slot { mib: 4, .. }), "{error:?}");
    assert_eq!(error.to_string(), "KVM refused the memory slot at 0x4000000 of 4 MiB");
}
