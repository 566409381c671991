//! Snapshots that can't be finished: the disk is full, the VM is killed, another writes the same one. The guest runs on,
//! one line says why, and nothing is left, or nothing that the next snapshot doesn't remove.

mod support;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use support::guests::Guest;
use support::moves::{LIVE, check_last_line, until};
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
    for live in [&[][..], &LIVE] {
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

/// Starts to take a snapshot.
fn start_snapshot(vm: &Vm, dir: &Path, options: &[&str]) -> Child {
    let mut command = Command::new(binary());
    command.arg("snapshot").arg(vm.place.path("vm.sock")).arg(dir).args(options);
    command.env_remove("VMM_LOG");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

/// Stops a VM while it writes this snapshot, and gives the command that waits for it.
fn catch_at(vm: &Vm, dir: &Path, options: &[&str]) -> Child {
    let stat = PathBuf::from(format!("/proc/{}/stat", vm.info()["pid"]));
    let place = dir.parent().unwrap();
    loop {
        let mut client = start_snapshot(vm, dir, options);
        while !is_written_in(place) && client.try_wait().unwrap().is_none() {}
        vm.signal(Signal::STOP);
        until("stands", || fs::read_to_string(&stat).unwrap().contains(") T "));
        if !dir.exists() && is_written_in(place) {
            return client;
        }
        // It was quicker than we were.
        vm.signal(Signal::CONT);
        client.wait().unwrap();
        fs::remove_dir_all(dir).unwrap();
    }
}

/// A VM that was stopped while it writes this snapshot, and the command that waits for it.
fn caught_at(dir: &Path) -> (Vm, Child) {
    let mut vm = Vm::start(dirtier(), &[]);
    check_intact(&mut vm);
    let client = catch_at(&vm, dir, &[]);
    (vm, client)
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
    quick.tell(&[&["snapshot", dir.to_str().unwrap()], &LIVE[..]].concat());
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
    let snapshot = |vm: &Vm, name: &str, options: &[&str]| {
        let dir = place.path().join(name);
        vm.tell(&[&["snapshot", dir.to_str().unwrap()], options].concat())
    };
    let told = snapshot(&vm, "live", &LIVE);
    assert!(told.contains("of memory; the guest stood for ") && told.ends_with(" ms\n"), "{told}");
    let told: Value = serde_json::from_str(&snapshot(&vm, "json", &["--json"])).unwrap();
    assert!(told["stood_us"].as_u64() > Some(0), "{told}");
    check_intact(&mut vm);
    vm.tell(&["pause"]);
    for (name, options) in [("paused", &["--json"][..]), ("paused-live", &["--json", "--live"])] {
        let told: Value = serde_json::from_str(&snapshot(&vm, name, options)).unwrap();
        assert!(told["paused"] == true && told["stood_us"].is_null(), "{told}");
    }
    vm.tell(&["resume"]);
    check_intact(&mut vm);
}

/// Whatever is there of this name is whole.
fn check_whole(dir: &Path) {
    let mut inspect = Command::new(binary());
    let output = inspect.arg("inspect").arg(dir).arg("--check").output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn a_cancelled_snapshot_leaves_nothing() {
    if !has_kvm() {
        return;
    }
    let mut vm = Vm::start(Guest::dirtier(48, 20), &["--mem", "128M"]);
    check_intact(&mut vm);
    let place = tempfile::tempdir().unwrap();
    let dir = place.path().join("snap");
    for options in [&[][..], &LIVE] {
        loop {
            let client = catch_at(&vm, &dir, options);
            let pid = Pid::from_child(&client);
            kill_process(pid, Signal::INT).unwrap();
            vm.signal(Signal::CONT);
            let output = client.wait_with_output().unwrap();
            assert!(vm.tell(&["info"]).contains("running"));
            check_intact(&mut vm);
            if !output.status.success() {
                assert_eq!(output.status.code(), Some(1));
                let err = String::from_utf8(output.stderr).unwrap();
                check_last_line(&err, &["the snapshot was cancelled"]);
                assert_eq!(names(place.path()), Vec::<PathBuf>::new(), "nothing is left");
                break;
            }
            // The word came too late.
            assert_eq!(names(place.path()), std::slice::from_ref(&dir));
            check_whole(&dir);
            fs::remove_dir_all(&dir).unwrap();
        }
    }
}

/// What is there in the directory that a snapshot is written in, or of the snapshot's name.
type Sign = fn(&Path) -> bool;

fn has_bytes(file: &Path) -> bool {
    fs::metadata(file).is_ok_and(|file| file.len() > 0)
}

const SIGNS: [Sign; 6] = [
    |partial| partial.join("memory").exists(),
    |partial| fs::metadata(partial.join("memory")).is_ok_and(|memory| memory.blocks() > 0),
    |partial| fs::metadata(partial.join("memory")).is_ok_and(|memory| memory.blocks() > 40_000),
    |partial| partial.join("state").exists(),
    |partial| has_bytes(&partial.join("state")),
    |partial| partial.ends_with("snap"),
];

#[test]
fn a_vm_that_is_killed_at_any_moment_leaves_all_or_nothing() {
    if !has_kvm() {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let dir = place.path().join("snap");
    for (at, is_sign) in SIGNS.iter().enumerate() {
        let mut vm = Vm::start(dirtier(), &[]);
        check_intact(&mut vm);
        let mut client = start_snapshot(&vm, &dir, &[]);
        while !names(place.path()).iter().any(|path| is_sign(path))
            && client.try_wait().unwrap().is_none()
        {}
        vm.signal(Signal::KILL);
        vm.wait();
        client.wait().unwrap();
        let left = names(place.path());
        let [left] = left.as_slice() else { panic!("sign {at}: {left:?}") };
        if *left == dir {
            check_whole(&dir);
            check_restores(&dir);
        } else {
            let name = left.file_name().unwrap().to_str().unwrap();
            assert!(name.starts_with("snap.partial-"), "sign {at}: {name}");
        }
        // It would be the next turn's sign, before that one has written anything.
        fs::remove_dir_all(left).unwrap();
    }
}

#[test]
fn a_live_one_keeps_its_limits_or_says_that_it_cannot() {
    if !has_kvm() {
        return;
    }
    let mut vm = Vm::start(dirtier(), &[]);
    check_intact(&mut vm);
    let place = tempfile::tempdir().unwrap();
    let dir = place.path().join("snap");
    for (then, timeout, is_sure) in [
        ("abort", "1h", true),
        ("stop-and-copy", "1ms", true),
        ("abort", "300ms", false),
        ("throttle", "300ms", false),
    ] {
        let limit = if timeout == "1h" { "1h" } else { "1ms" };
        let options = ["--downtime-limit", limit, "--timeout", timeout, "--on-timeout", then];
        let output = start_snapshot(&vm, &dir, &[&["--live"], &options[..]].concat());
        let output = output.wait_with_output().unwrap();
        let err = String::from_utf8(output.stderr).unwrap();
        check_intact(&mut vm);
        if output.status.success() {
            assert_eq!(names(place.path()), std::slice::from_ref(&dir));
            check_restores(&dir);
            fs::remove_dir_all(&dir).unwrap();
            continue;
        }
        // How fast this machine is decides.
        assert!(!is_sure, "{options:?}: {err}");
        check_last_line(&err, &["no snapshot was written: ", "--downtime-limit"]);
        assert_eq!(names(place.path()), Vec::<PathBuf>::new(), "nothing is left");
    }
    let refused = vm.place.tell(&["snapshot", dir.to_str().unwrap(), "--timeout", "1s"]);
    assert_eq!(refused.status.code(), Some(2));
}
