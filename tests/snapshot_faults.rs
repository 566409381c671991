//! Snapshots that can't be finished: the disk is full, the VM is killed, another writes the same one. The guest runs on,
//! one line says why, and nothing is left, or nothing that the next snapshot doesn't remove.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::Signal;
use serde_json::Value;
use support::guests::Guest;
use support::moves::{check_last_line, until};
use support::vm::{Place, Vm, binary, has_kvm};

/// Makes a small file system that is soon full, and runs what follows.
const SMALL: &str = "mount -t tmpfs -o size=8m small \"$0\" && exec \"$@\"";

/// A guest with more memory than that, which checks it over and over.
fn dirtier() -> Guest {
    Guest::dirtier(24, 0)
}

fn check_intact(vm: &mut Vm) {
    let dots = vm.read_some(3);
    assert!(dots.iter().all(|b| *b == b'.'), "{}", String::from_utf8_lossy(&dots));
}

fn check_restores(snapshot: &Path) {
    check_intact(&mut Vm::restore(snapshot, &["--eager"]));
}

fn names(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn a_disk_that_is_full() {
    if !has_kvm() {
        return;
    }
    let place = Place::new();
    let small = place.path("small");
    fs::create_dir(&small).unwrap();
    let inner = place.run(dirtier(), &[]);
    let mut command = Command::new("unshare");
    command.args(["-rm", "sh", "-c", SMALL]).arg(&small).env_remove("VMM_LOG");
    command.arg(inner.get_program()).args(inner.get_args());
    let mut vm = Vm::spawn(place, command);
    check_intact(&mut vm);
    let seen = PathBuf::from(format!("/proc/{}/root{}", vm.info()["pid"], small.display()));
    let dir = small.join("snap");
    for live in [&[][..], &["--live"]] {
        let failed = vm.place.tell(&[&["snapshot", dir.to_str().unwrap()], live].concat());
        assert_eq!(failed.status.code(), Some(1), "{failed:?}");
        let err = String::from_utf8(failed.stderr).unwrap();
        let why = ["can't write", dir.to_str().unwrap(), "No space left on device"];
        check_last_line(&err, &why);
        assert_eq!(names(&seen), Vec::<PathBuf>::new(), "nothing is left");
        assert_eq!(vm.info()["state"], "running");
        check_intact(&mut vm);
        let elsewhere = tempfile::tempdir().unwrap();
        let dir = elsewhere.path().join("snap");
        vm.tell(&[&["snapshot", dir.to_str().unwrap()], live].concat());
        check_restores(&dir);
    }
}

/// Whether there is a directory with memory in it, which is locked from before it has a length.
fn is_written_in(place: &Path) -> bool {
    let memory = names(place).pop().map(|partial| partial.join("memory"));
    memory.is_some_and(|file| fs::metadata(file).is_ok_and(|memory| memory.len() > 0))
}

/// A VM that was stopped while it writes this snapshot, and the command that waits for it.
fn caught_at(dir: &Path) -> (Vm, Child) {
    let mut vm = Vm::start(dirtier(), &[]);
    check_intact(&mut vm);
    let stat = PathBuf::from(format!("/proc/{}/stat", vm.info()["pid"]));
    let place = dir.parent().unwrap();
    loop {
        let mut command = Command::new(binary());
        command.arg("snapshot").arg(vm.place.path("vm.sock")).arg(dir).env_remove("VMM_LOG");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut client = command.spawn().unwrap();
        while !is_written_in(place) && client.try_wait().unwrap().is_none() {}
        vm.signal(Signal::STOP);
        until("stands", || fs::read_to_string(&stat).unwrap().contains(") T "));
        if !dir.exists() && is_written_in(place) {
            return (vm, client);
        }
        // It was quicker than we were.
        vm.signal(Signal::CONT);
        client.wait().unwrap();
        fs::remove_dir_all(dir).unwrap();
    }
}

/// The command fails, and these words stand in its last line.
fn check_failed(client: Child, words: &[&str]) {
    let output = client.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(1), &b""[..]));
    check_last_line(&String::from_utf8(output.stderr).unwrap(), words);
}

#[test]
fn a_vm_that_is_killed_leaves_what_the_next_snapshot_removes() {
    if !has_kvm() {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let dir = place.path().join("snap");
    let (mut vm, client) = caught_at(&dir);
    vm.signal(Signal::KILL);
    vm.wait();
    check_failed(client, &[]);
    assert!(!dir.exists(), "there is half a snapshot");
    let left = names(place.path());
    let [left] = left.as_slice() else { panic!("{left:?}") };
    let name = left.file_name().unwrap().to_str().unwrap();
    assert!(name.starts_with("snap.partial-"), "{name}");
    let mut other = Vm::start(dirtier(), &[]);
    check_intact(&mut other);
    other.tell(&["snapshot", place.path().join("another").to_str().unwrap()]);
    assert!(left.exists(), "that is no business of another name's");
    other.tell(&["snapshot", dir.to_str().unwrap()]);
    assert!(!left.exists());
    assert_eq!(names(place.path()).len(), 2);
    check_restores(&dir);
}

#[test]
fn two_at_once_are_not_in_each_other_s_way() {
    if !has_kvm() {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let dir = place.path().join("snap");
    let (mut slow, client) = caught_at(&dir);
    let mut quick = Vm::start(Guest::dirtier(8, 0), &[]);
    check_intact(&mut quick);
    quick.tell(&["snapshot", dir.to_str().unwrap(), "--live"]);
    assert_eq!(names(place.path()).len(), 2, "the other is still being written");
    let state = fs::read(dir.join("state")).unwrap();
    slow.signal(Signal::CONT);
    check_failed(client, &["snap exists already"]);
    check_intact(&mut slow);
    assert_eq!(names(place.path()), [dir.as_path()]);
    assert!(fs::read(dir.join("state")).unwrap() == state, "the first one stays");
    check_restores(&dir);
}

#[test]
fn how_long_the_guest_stood_is_told() {
    if !has_kvm() {
        return;
    }
    let mut vm = Vm::start(dirtier(), &[]);
    check_intact(&mut vm);
    let place = tempfile::tempdir().unwrap();
    let snapshot = |vm: &Vm, name: &str, option: &str| {
        let dir = place.path().join(name);
        vm.tell(&["snapshot", dir.to_str().unwrap(), option])
    };
    let told = snapshot(&vm, "live", "--live");
    assert!(told.contains("of memory; the guest stood for ") && told.ends_with(" ms\n"), "{told}");
    let told: Value = serde_json::from_str(&snapshot(&vm, "json", "--json")).unwrap();
    assert!(told["stood_us"].as_u64() > Some(0), "{told}");
    check_intact(&mut vm);
    vm.tell(&["pause"]);
    let told: Value = serde_json::from_str(&snapshot(&vm, "paused", "--json")).unwrap();
    assert!(told["paused"] == true && told["stood_us"].is_null(), "{told}");
}
