//! A guest whose RAM is of the host's pool of huge pages: only those that it touched go over, and what the host has left
//! beside its pool doesn't matter. Only root may fill the pool: elsewhere this fails.

mod support;

use std::path::Path;
use std::{fs, thread, time};

use support::guests::Guest;
use support::moves::{Count, EASY};
use support::vm::{LONG, Place, Vm, has_kvm};
use vm_memory::{Bytes, GuestAddress};
use vmm::memory::{Backing, Memory};

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
const MIB: u64 = 1 << 20;
/// For a source, a destination, an eager restore, and the memory of this process.
const NEEDED: u64 = 4 * 32;

/// Huge pages added to the pool, and taken out again.
struct Pool(u64);

impl Pool {
    fn fill() -> Self {
        let pages = Path::new(POOL);
        let number = |file| fs::read_to_string(pages.join(file)).unwrap().trim().parse().unwrap();
        let before: u64 = number("nr_hugepages");
        let wanted = before + NEEDED;
        let pool = Self(before);
        let deadline = time::Instant::now() + LONG;
        loop {
            // The kernel takes what it finds, and looks no further: where memory is in pieces, that is less than was asked for.
            let compacted = fs::write("/proc/sys/vm/compact_memory", "1");
            let set = fs::write(pages.join("nr_hugepages"), wanted.to_string());
            if number("free_hugepages") >= NEEDED {
                return pool;
            }
            let late = time::Instant::now() >= deadline;
            assert!(!late, "no pool of huge pages: {set:?}; compacted: {compacted:?}");
            thread::sleep(time::Duration::from_millis(100));
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let _ = fs::write(Path::new(POOL).join("nr_hugepages"), self.0.to_string());
    }
}

fn touched(memory: &Memory) -> Vec<(u64, u64)> {
    let (mut found, slot) = (Vec::new(), memory.slots()[0]);
    let (offset, len) = (MIB, slot.len - MIB);
    memory.touched(&slot, offset, len, |at, len| found.push((at / MIB, len / MIB))).unwrap();
    found
}

#[test]
fn only_what_was_touched_goes_over() {
    let _pool = Pool::fill();
    let memory =
        Memory::new(&[(GuestAddress(0), 64 * MIB)], Backing::Fresh { hugepages: true }).unwrap();
    assert_eq!(touched(&memory), []);
    for mib in [0, 7, 62] {
        memory.ram().write_obj(1_u8, GuestAddress(mib * MIB)).unwrap();
    }
    // Asked from the first MiB on: in the middle of a page.
    assert_eq!(touched(&memory), [(1, 1), (6, 2), (62, 2)]);
    memory.discard(&memory.slots()[0], 6 * MIB, 2 * MIB).unwrap();
    assert_eq!(touched(&memory), [(1, 1), (62, 2)]);
    assert_eq!(memory.ram().read_obj::<u8>(GuestAddress(62 * MIB)).unwrap(), 1);
    drop(memory);
    if !has_kvm() {
        return;
    }

    let mut source = Vm::start(Guest::counter(), &["--mem", "64M", "--hugepages"]);
    let mut count = Count::default();
    count.check(&source.read_some(1000));
    let snapshots = Place::new();
    let snapshot = snapshots.path("snapshot");
    source.tell(&["snapshot", snapshot.to_str().unwrap()]);
    let (mut destination, uri) = Vm::listen(&[]);
    let answer = source.try_move(&uri, &["--json", EASY[0], EASY[1]]);
    assert_eq!(answer.status, Some(0), "{answer:?}");
    let report: serde_json::Value = serde_json::from_str(&answer.out).unwrap();
    let first_round = report["rounds"][0]["pages"].as_u64().unwrap();
    assert!((512..16384 / 4).contains(&first_round), "{report}");
    count.check(&source.read_to_end());
    count.check(&destination.read_some(20_000));

    let mut copy = Vm::restore(&snapshot, &["--eager"]);
    assert!(!copy.read_some(1000).is_empty());
}
