//! Guests restored lazily, over the memory file of their snapshot: what they have touched, and that they can be
//! saved and moved like others.

mod support;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use support::guests::Guest;
use support::vm::{Vm, binary, has_kvm};

/// Passes that a dirtying guest is watched for.
const PASSES: usize = 3;

/// Takes a snapshot of a VM into a new directory, beside the test binary: on a real file system, whose files have holes.
fn snapshot(vm: &Vm) -> (tempfile::TempDir, PathBuf) {
    let exe = std::env::current_exe().unwrap();
    let dir = tempfile::tempdir_in(exe.parent().unwrap()).unwrap();
    let path = dir.path().join("snap");
    vm.tell(&["snapshot", path.to_str().unwrap()]);
    (dir, path)
}

/// The guest goes over its memory some more times and finds nothing wrong.
fn assert_intact(vm: &mut Vm) {
    let dots = vm.read_some(PASSES);
    assert!(dots.iter().all(|b| *b == b'.'), "{}", String::from_utf8_lossy(&dots));
}

/// How many pages a snapshot's guest had touched.
fn touched(snapshot: &Path) -> u64 {
    let output =
        Command::new(binary()).arg("inspect").arg(snapshot.join("state")).output().unwrap();
    let out = String::from_utf8(output.stdout).unwrap();
    let line = out.lines().find(|line| line.ends_with("pages touched")).expect("a plan");
    line.rsplit(' ').nth(2).unwrap().parse().unwrap()
}

/// A guest of 256 MiB that uses 24 of them: what a copy never touched stays so.
#[test]
fn a_lazily_restored_guest_has_touched_what_it_had_and_what_it_writes() {
    if !has_kvm() {
        return;
    }
    let mut vm = Vm::start(Guest::dirtier(8, 20), &["--mem", "256M"]);
    assert_intact(&mut vm);
    let (_dir, first) = snapshot(&vm);
    drop(vm);
    let mut copy = Vm::restore(&first, &["--lazy"]);
    assert_intact(&mut copy);
    copy.tell(&["pause"]);
    let (_dir, second) = snapshot(&copy);
    let (before, after) = (touched(&first), touched(&second));
    assert!(after < 64 * 256, "{after} pages are touched, {before} before");
    let blocks = first.join("memory").metadata().unwrap().blocks();
    assert!(blocks < 64 * 2048, "{blocks} blocks: where nothing was touched, it has no holes");
    let more = second.join("memory").metadata().unwrap().blocks().saturating_sub(blocks);
    assert!(more < 2048, "{more} blocks more than the first");
    let [before, after] = [&first, &second].map(|path| fs::read(path.join("memory")).unwrap());
    assert_eq!(before.len(), after.len());
    // What it doesn't write: all but its low memory, with its generation id, code, and 8 MiB from 16 on.
    assert!(before[24 << 20..] == after[24 << 20..], "memory that it doesn't write has changed");
    copy.tell(&["resume"]);
    assert_intact(&mut copy);
    let (mut moved, uri) = Vm::listen(&[]);
    let report = copy.tell(&["migrate", "--json", "--connect", &uri, "--downtime-limit", "5s"]);
    let report: Value = serde_json::from_str(report.lines().last().unwrap()).unwrap();
    let pages = report["rounds"][0]["pages"].as_u64().unwrap();
    assert!(pages < 64 * 256, "the first round has {pages} pages");
    assert_intact(&mut moved);
}

#[test]
fn a_lazily_restored_guest_migrates() {
    if !has_kvm() {
        return;
    }
    let mut vm = Vm::start(Guest::dirtier(16, 200), &[]);
    assert_intact(&mut vm);
    let (_dir, path) = snapshot(&vm);
    drop(vm);
    let mut copy = Vm::restore(&path, &[]);
    assert_intact(&mut copy);
    let (mut moved, uri) = Vm::listen(&[]);
    copy.tell(&["migrate", "--connect", &uri, "--downtime-limit", "5s"]);
    assert_eq!(copy.wait().0, Some(0));
    assert_intact(&mut moved);
}
