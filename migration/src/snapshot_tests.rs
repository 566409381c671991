//! Snapshots of the fake guest: written, read back, damaged.

use std::fs;

use super::save_tests::{AtOnce, EASY};
use super::*;
use crate::channel::Flow;
use crate::report::Progress;
use crate::testing::guest::{FakeLive, Habits};
use crate::testing::world::World;

pub(super) fn header() -> Header {
    let plan = Plan {
        name: String::new(),
        paused: false,
        config: Vec::new(),
        spaces: Vec::new(),
        touched_pages: 0,
        sections: Vec::new(),
        cpu: crate::plan::CpuNeeds::default(),
        disks: Vec::new(),
        nets: Vec::new(),
    };
    Header { id: MigrationId([9; 16]), software: "test".into(), created_unix_ms: 1, plan }
}

/// A snapshot in a fresh directory, and the memory and state of the guest at its stop.
fn made(live: bool, seed: u64) -> (tempfile::TempDir, World) {
    let dir = tempfile::tempdir().unwrap();
    let world = World::new(None);
    let guest = FakeLive::new(&world, seed, Habits { dirties: 2, ..Habits::default() });
    let mut observer = |_: &Progress| Flow::Continue;
    let live = live.then_some(EASY);
    let saved = save(&dir.path().join("s"), guest, header(), live, &mut AtOnce, &mut observer);
    let saved = saved.map_err(|not| not.error).unwrap();
    assert!(saved.pages > 0 && world.state().running().0, "the guest goes on");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else is left");
    (dir, world)
}

#[test]
fn a_snapshot_holds_the_guest_as_it_stood() {
    for seed in 0..20 {
        let (dir, world) = made(seed % 2 == 0, seed);
        let snapshot = Snapshot::open(&dir.path().join("s")).unwrap();
        let (ram, state) = world.state().at_stop.clone().unwrap();
        let mut memory = vec![0; BLOCK_LEN];
        let len = snapshot.read_block(0, &mut memory).unwrap();
        assert!(memory[..len] == ram, "seed {seed}");
        assert!(snapshot.sections.iter().all(|section| section.body == state));
        assert_eq!((snapshot.blocks(), snapshot.used_blocks().count()), (1, 1));
        assert_eq!(snapshot.header.plan.name, "fake");
    }
}

#[test]
fn regions_follow_each_other_in_the_file() {
    let ram = Space { id: 0, regions: crate::testing::guest::REGIONS.to_vec() };
    let offset = |first, count| memory_offset(&ram, Run::new(first, count).unwrap());
    assert_eq!(offset(0, 13), Some(0));
    assert_eq!(offset(0, 14), None);
    assert_eq!(offset(13, 8), Some(13 * 4096));
    assert_eq!(offset(20, 1), Some(20 * 4096));
    assert_eq!(offset(1 << 20, 11), Some(21 * 4096));
    assert_eq!(offset(20, 2), None);
    assert_eq!(offset(21, 1), None);
}

#[test]
fn every_damage_to_the_state_is_found() {
    let (dir, _world) = made(false, 1);
    let path = dir.path().join("s").join(STATE_FILE);
    let good = fs::read(&path).unwrap();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        fs::write(&path, &bad).unwrap();
        assert!(Snapshot::open(&dir.path().join("s")).is_err(), "byte {at}");
        fs::write(&path, &good[..at]).unwrap();
        assert!(Snapshot::open(&dir.path().join("s")).is_err(), "cut to {at} bytes");
    }
    fs::write(&path, [&good[..], &[0]].concat()).unwrap();
    assert!(Snapshot::open(&dir.path().join("s")).is_err(), "a byte more");
    fs::write(&path, good).unwrap();
    assert!(Snapshot::open(&dir.path().join("s")).is_ok());
}

#[test]
fn damage_to_the_memory_is_found() {
    let (dir, _world) = made(false, 1);
    let path = dir.path().join("s").join(MEMORY_FILE);
    let mut bytes = fs::read(&path).unwrap();
    bytes[777] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let snapshot = Snapshot::open(&dir.path().join("s")).unwrap();
    let error = snapshot.read_block(0, &mut vec![0; BLOCK_LEN]).unwrap_err();
    assert_eq!(error.to_string(), "the snapshot is damaged: the checksum of block 0 is wrong");
    bytes.truncate(4096);
    fs::write(&path, &bytes).unwrap();
    let error = Snapshot::open(&dir.path().join("s")).unwrap_err().to_string();
    assert_eq!(error, "the snapshot is damaged: its memory has 4096 bytes, its state says 131072");
}

#[test]
fn a_failed_snapshot_leaves_nothing_and_the_guest_running() {
    let dir = tempfile::tempdir().unwrap();
    let attempt = |path: &Path, flow| {
        let world = World::new(None);
        let guest = FakeLive::new(&world, 3, Habits::default());
        let mut observer = |_: &Progress| flow;
        let not = save(path, guest, header(), None, &mut AtOnce, &mut observer).err().unwrap();
        assert!(not.guest.is_ok() && world.state().running().0);
        not.error.to_string()
    };
    assert_eq!(attempt(&dir.path().join("s"), Flow::Cancel), "cancelled");
    assert!(
        attempt(dir.path(), Flow::Continue).ends_with("exists already: choose another directory")
    );
    assert!(attempt(&dir.path().join("no/s"), Flow::Continue).starts_with("can't create"));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn inspect_names_every_record() {
    let (dir, _world) = made(false, 1);
    let state = fs::read(dir.path().join("s").join(STATE_FILE)).unwrap();
    let mut names = Vec::new();
    let mut last = String::new();
    let kind = crate::inspect::inspect(&mut state.as_slice(), |item| {
        names.push(item.name);
        last = item.text;
    });
    assert_eq!(kind.unwrap(), StreamKind::Snapshot);
    assert_eq!(names, ["Snapshot", "Section", "Section", "Section", "MemorySums", "End"]);
    assert!(last.ends_with("which is right"), "{last}");
}
