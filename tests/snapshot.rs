//! Snapshots of real machines with guests of a few instructions: what was written comes back and goes on,
//! however often, and what isn't a whole snapshot is refused in one line.

mod support;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::channel;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use support::guests::Guest;
use support::moves::{EASY, LIVE};
use support::vm::{LONG, Vm, binary, has_kvm};
use vmm::config::SerialTarget;
use vmm::downtime::Downtime;
use vmm::migrate::arriving::{LocalHost, Overrides};
use vmm::migrate::restoring::{self, Load};

/// How long a paused guest is watched for output.
const QUIET: Duration = Duration::from_millis(500);
/// Bytes that a counting guest is heard for.
const HEARD: usize = 2000;
/// Passes that a dirtying guest is watched for.
const PASSES: usize = 3;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Takes a snapshot of a VM into a new directory.
fn snapshot(vm: &Vm, options: &[&str]) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snap");
    let told = vm.tell(&[&["snapshot", text(&path)], options].concat());
    assert!(told.contains("snap"), "{told}");
    let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(names, std::slice::from_ref(&path), "nothing but the snapshot is left");
    (dir, path)
}

/// Each byte is one more than the one before. Gives the first and the last.
fn assert_counts(bytes: &[u8]) -> (u8, u8) {
    for (i, pair) in bytes.windows(2).enumerate() {
        assert_eq!(pair[1], pair[0].wrapping_add(1), "byte {} of {}", i + 1, bytes.len());
    }
    (*bytes.first().expect("output"), *bytes.last().expect("output"))
}

/// The guest goes over its memory some more times and finds nothing wrong.
fn assert_intact(vm: &mut Vm) {
    let dots = vm.read_some(PASSES);
    assert!(dots.iter().all(|b| *b == b'.'), "{}", String::from_utf8_lossy(&dots));
}

#[test]
fn a_paused_guest_comes_back_paused_and_goes_on_where_it_was() {
    if !has_kvm() {
        return;
    }
    let mut vm = Vm::start(Guest::counter(), &[]);
    let mut heard = vm.read_some(HEARD);
    vm.tell(&["pause"]);
    snapshot(&vm, &[]);
    vm.tell(&["resume"]);
    heard.extend(vm.read_some(HEARD));
    vm.tell(&["pause"]);
    let (_dir, path) = snapshot(&vm, &[]);
    // With the process's end all is heard that the guest printed: before and after the first one, too.
    vm.signal(Signal::TERM);
    heard.extend(vm.read_to_end());
    let (_, last) = assert_counts(&heard);
    for load in ["--lazy", "--eager"] {
        let mut again = Vm::restore(&path, &[load]);
        again.wait_until_up();
        assert!(again.tell(&["info"]).contains("paused"));
        assert_eq!(again.read(QUIET), b"", "{load}: it is paused");
        again.tell(&["resume"]);
        let (first, _) = assert_counts(&again.read_some(HEARD));
        assert_eq!(first, last.wrapping_add(1), "{load}");
    }
}

/// Whoever asks the process to end while it loads memory doesn't wait until all of it is there.
#[test]
fn loading_ends_when_it_is_cancelled() {
    if !has_kvm() {
        return;
    }
    let mut vm = Vm::start(Guest::dirtier(8, 0), &[]);
    vm.read_some(1);
    let (dir, path) = snapshot(&vm, &[]);
    let control = dir.path().join("vm.sock");
    let overrides = Overrides {
        control: Some(control.clone()),
        serial: Some(SerialTarget::Null),
        ..Overrides::default()
    };
    let here = LocalHost { overrides, events: channel().0 };
    let restored = restoring::restore(&path, Load::Eager, Downtime::Passes, &here, &|| true);
    let Err(fault) = restored else { panic!("all was loaded") };
    assert!(fault.to_string().contains("cancelled while memory was read"), "{fault}");
    assert!(!control.exists(), "the control socket is left");
}

#[test]
fn a_running_guest_runs_on_and_so_do_its_copies() {
    if !has_kvm() {
        return;
    }
    let mut vm = Vm::start(Guest::counter(), &[]);
    let mut heard = vm.read_some(HEARD);
    let (_dir, path) = snapshot(&vm, &LIVE);
    heard.extend(vm.read_some(HEARD));
    assert_counts(&heard);
    assert!(vm.tell(&["info"]).contains("running"));
    let first = ["--lazy", "--eager"].map(|load| {
        let mut again = Vm::restore(&path, &[load, "--name", "copy"]);
        let (first, _) = assert_counts(&again.read_some(HEARD));
        let info: Value = serde_json::from_str(&again.tell(&["info", "--json"])).unwrap();
        assert_eq!(info["config"]["name"], "copy");
        first
    });
    assert_eq!(first[0], first[1], "both go on at the same point");
}

#[test]
fn memory_is_what_it_was_live_or_not_lazy_or_eager() {
    if !has_kvm() {
        return;
    }
    for live in [&[][..], &LIVE] {
        let mut vm = Vm::start(Guest::dirtier(24, 20), &[]);
        assert_intact(&mut vm);
        let (_dir, path) = snapshot(&vm, live);
        assert_intact(&mut vm);
        drop(vm);
        for load in ["--lazy", "--eager"] {
            assert_intact(&mut Vm::restore(&path, &[load]));
        }
    }
}

#[test]
fn a_copy_can_be_written_and_restored_again() {
    if !has_kvm() {
        return;
    }
    let mut vm = Vm::start(Guest::dirtier(24, 20), &[]);
    assert_intact(&mut vm);
    let (first_dir, first) = snapshot(&vm, &LIVE);
    drop(vm);
    let before = fs::read(first.join("memory")).unwrap();
    let mut copy = Vm::restore(&first, &["--lazy"]);
    assert_intact(&mut copy);
    let (_second_dir, second) = snapshot(&copy, &LIVE);
    assert_intact(&mut copy);
    drop(copy);
    assert!(before == fs::read(first.join("memory")).unwrap(), "the first snapshot hasn't changed");
    drop(first_dir);
    for load in ["--lazy", "--eager"] {
        assert_intact(&mut Vm::restore(&second, &[load]));
    }
}

/// The VM generation id in a snapshot.
fn generation(snapshot: &Path) -> Vec<u8> {
    const ADDRESS: u64 = 0xf_f000;
    let mut id = vec![0; 16];
    let memory = File::open(snapshot.join("memory")).unwrap();
    memory.read_exact_at(&mut id, ADDRESS).unwrap();
    id
}

#[test]
fn every_copy_has_a_generation_of_its_own_and_a_moved_guest_its_old_one() {
    if !has_kvm() {
        return;
    }
    let mut vm = Vm::start(Guest::counter(), &[]);
    vm.read_some(HEARD);
    vm.tell(&["pause"]);
    let (_dir, path) = snapshot(&vm, &[]);
    let mut ids = vec![vec![0; 16], generation(&path)];
    for load in ["--lazy", "--eager", "--lazy"] {
        let copy = Vm::restore(&path, &[load]);
        copy.wait_until_up();
        let (_dir, again) = snapshot(&copy, &[]);
        ids.push(generation(&again));
    }
    for (i, id) in ids.iter().enumerate() {
        assert!(!ids[..i].contains(id), "{ids:x?}");
    }
    let (moved, uri) = Vm::listen(&[]);
    vm.tell(&["migrate", "--connect", &uri, EASY[0], EASY[1]]);
    let (_dir, there) = snapshot(&moved, &[]);
    assert_eq!(generation(&there), ids[1]);
}

#[test]
fn a_disk_is_locked_at_once() {
    if !has_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let mut vm = Vm::start(Guest::counter(), &["--disk", text(&disk)]);
    vm.read_some(HEARD);
    let (_snap, path) = snapshot(&vm, &[]);
    assert_refused(&path, &[], "locked");
    let other = dir.path().join("other");
    File::create(&other).unwrap().set_len(1 << 20).unwrap();
    let there = format!("id=disk0,path={}", text(&other));
    assert_counts(&Vm::restore(&path, &["--disk", &there]).read_some(HEARD));
    File::create(&other).unwrap().set_len(2 << 20).unwrap();
    assert_refused(&path, &["--disk", &there], "2097152 bytes");
    assert_refused(&path, &["--disk", "id=disk7,path=/dev/null"], "no such disk");
    assert_refused(&path, &["--net", "id=net7,tap=t"], "no such interface");
    drop(vm);
    assert_counts(&Vm::restore(&path, &[]).read_some(HEARD));
}

/// The snapshot isn't restored: status 1, and one line that has `what` in it.
fn assert_refused(path: &Path, options: &[&str], what: &str) {
    let mut vm = Vm::restore(path, options);
    let (status, stderr) = vm.wait_for(LONG);
    assert_eq!(status, Some(1), "{what}: {stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.contains(what), "{what:?}: {stderr}");
}

/// A copy of a snapshot, changed.
fn changed(from: &Path, to: &Path, file: &str, change: impl FnOnce(&File)) {
    fs::create_dir(to).unwrap();
    for name in ["state", "memory"] {
        fs::copy(from.join(name), to.join(name)).unwrap();
    }
    change(&File::options().read(true).write(true).open(to.join(file)).unwrap());
}

#[test]
fn what_is_no_whole_snapshot_is_refused_in_one_line() {
    if !has_kvm() {
        return;
    }
    let mut vm = Vm::start(Guest::counter(), &[]);
    vm.read_some(HEARD);
    let (dir, path) = snapshot(&vm, &[]);
    drop(vm);
    let base = dir.path();
    assert_refused(&base.join("none"), &[], "No such file or directory");
    let bad = |name: &str, file: &str, options: &[&str], what: &str, change: &dyn Fn(&File)| {
        let to = base.join(name);
        changed(&path, &to, file, change);
        assert_refused(&to, options, what);
    };
    let state_len = fs::metadata(path.join("state")).unwrap().len();
    bad("no-state", "state", &[], "cut short", &|f| f.set_len(0).unwrap());
    bad("short-head", "state", &[], "cut short", &|f| f.set_len(9).unwrap());
    bad("short", "state", &[], "cut short", &|f| f.set_len(state_len - 1).unwrap());
    bad("long", "state", &[], "after its end", &|f| f.write_all_at(b"x", state_len).unwrap());
    bad("magic", "state", &[], "magic", &|f| f.write_all_at(b"MAGIC", 0).unwrap());
    bad("middle", "state", &[], "checksum", &|f| f.write_all_at(b"?!?!", state_len / 2).unwrap());
    bad("newer", "state", &[], "this vmm reads format", &|f| {
        f.write_all_at(&2u16.to_le_bytes(), 8).unwrap();
    });
    bad("memory-short", "memory", &[], "its memory has", &|f| f.set_len(4096).unwrap());
    // Where the guest's code is: a lazy restore doesn't look, by its nature.
    bad("memory", "memory", &["--eager"], "checksum of block 1", &|f| {
        f.write_all_at(b"?", 0x10_0000).unwrap();
    });
    fs::create_dir(base.join("empty")).unwrap();
    assert_refused(&base.join("empty"), &[], "No such file or directory");
    let file = base.join("file");
    fs::write(&file, "x").unwrap();
    assert_refused(&file, &[], "Not a directory");
}

#[test]
fn a_directory_that_cannot_be_made_is_refused_in_one_line() {
    if !has_kvm() {
        return;
    }
    let mut vm = Vm::start(Guest::counter(), &[]);
    let mut heard = vm.read_some(HEARD);
    let (dir, path) = snapshot(&vm, &[]);
    let before = fs::read(path.join("state")).unwrap();
    for (to, what) in [
        (path.clone(), "exists already"),
        (dir.path().join("no/such/dir"), "No such file or directory"),
        (PathBuf::from("/proc/snap"), "can't create"),
    ] {
        let refused = vm.place.tell(&["snapshot", text(&to)]);
        let stderr = String::from_utf8(refused.stderr).unwrap();
        assert_eq!(refused.status.code(), Some(1), "{stderr}");
        let last = stderr.lines().last().unwrap_or_default();
        assert!(last.contains(what), "{what}: {stderr}");
    }
    assert!(before == fs::read(path.join("state")).unwrap(), "the other one is untouched");
    heard.extend(vm.read_some(HEARD));
    assert_counts(&heard);
}

/// Runs `vmm inspect`; gives its status, and what it says on standard output and error.
fn inspect(path: &Path, options: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(binary()).arg("inspect").arg(path).args(options).output().unwrap();
    let [out, err] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    (output.status.code(), out, err)
}

#[test]
fn inspect_shows_a_snapshot_and_what_is_wrong_with_it() {
    if !has_kvm() {
        return;
    }
    let mut vm = Vm::start(Guest::counter(), &["--name", "counting", "--cpus", "2"]);
    vm.read_some(HEARD);
    let (dir, path) = snapshot(&vm, &[]);
    drop(vm);
    let (status, out, err) = inspect(&path, &["--check"]);
    assert_eq!((status, err.as_str()), (Some(0), ""), "{out}");
    for line in ["name      counting\n", "state     running\n", "vCPUs     2 of x86_64\n"] {
        assert!(out.contains(line), "{line}: {out}");
    }
    let (_, out, _) = inspect(&path, &["--json"]);
    let value: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&value["config"]["name"], &value["vcpus"]), (&"counting".into(), &2.into()));
    assert_eq!(value["ram_pages"], 64 * 256);
    let kinds: Vec<_> = value["sections"].as_array().unwrap().iter().map(|s| &s["kind"]).collect();
    assert_eq!(kinds.iter().filter(|kind| **kind == "vcpu").count(), 2, "{kinds:?}");

    let (status, out, _) = inspect(&path.join("state"), &["--json"]);
    assert_eq!(status, Some(0));
    let records: Vec<Value> = out.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(records.first().unwrap()["name"], "Snapshot");
    let last = records.last().unwrap();
    assert_eq!(last["name"], "End");
    assert!(last["text"].as_str().unwrap().ends_with("which is right"), "{last}");

    let to = dir.path().join("short");
    changed(&path, &to, "state", |f| f.set_len(f.metadata().unwrap().len() - 1).unwrap());
    let (status, out, err) = inspect(&to.join("state"), &[]);
    assert!(out.contains("guest \"counting\""), "what is whole is shown: {out}");
    assert_eq!((status, err.lines().count()), (Some(1), 1), "{err}");
    assert!(err.contains("cut short"), "{err}");
    let to = dir.path().join("changed");
    changed(&path, &to, "memory", |f| f.write_all_at(b"?", 0x10_0000).unwrap());
    assert_eq!(inspect(&to, &[]).0, Some(0), "without --check memory isn't read");
    let (status, _, err) = inspect(&to, &["--check"]);
    assert!(status == Some(1) && err.contains("checksum of block 1"), "{err}");
}
