//! Unlike hosts: this file runs in both of two emulated hosts at once, of which the second's CPU lacks AVX2 and
//! BMI2 (tests/run). A guest that was shown the first host's whole CPU can't move there, and is told why before
//! a page moves; one that was shown what both have in common moves.

#[path = "support/hosts.rs"]
mod hosts;

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Output};

use hosts::{MIGRATION_PORT, TEST_PORT, console, env, finished, guest_file, until, vmm, wait_for};

/// What the second host's CPU lacks.
const LACKING: [&str; 2] = ["avx2", "bmi2"];

/// Boots a guest that counts, and says what it is shown of [`LACKING`].
fn boot(dir: &Path, name: &str, cpu_model: &str) -> Child {
    let count = "grep -ow avx2 /proc/cpuinfo; grep -ow bmi2 /proc/cpuinfo; i=0; \
                 while :; do echo tick $i; i=$((i+1)); usleep 100000; done";
    let mut guest = vmm(&["run", "--mem", "128M", "--name", name, "--cpu-model", cpu_model])
        .arg("--kernel")
        .arg(guest_file("vmlinux-6.12-cloud"))
        .arg("--initrd")
        .arg(guest_file("initramfs-6.12-cloud.cpio"))
        .arg("--serial")
        .arg(format!("file:{}", dir.join(name).display()))
        .args(["--cmdline", &format!("console=ttyS0 quiet panic=-1 vmm.run=\"{count}\"")])
        .spawn()
        .unwrap();
    wait_for(&dir.join(name), "tick 3", &mut guest);
    guest
}

fn migrate(name: &str, options: &[&str]) -> Output {
    let uri = format!("tcp:{}:{MIGRATION_PORT}", env("PEER"));
    let limit = ["migrate", "--connect", &uri, "--downtime-limit", "2s", "--json", name];
    vmm(&limit).args(options).output().unwrap()
}

/// Host 1: has a guest refused, and moves another.
fn source() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let mut theirs = until("the other host's test", || {
        TcpStream::connect((env("PEER"), TEST_PORT)).map_err(|e| e.to_string())
    });
    let mut model = String::new();
    theirs.read_to_string(&mut model).unwrap();
    fs::write(path("theirs.json"), model).unwrap();
    fs::write(path("ours.json"), vmm(&["cpu"]).output().unwrap().stdout).unwrap();
    let files = ["ours.json", "theirs.json"].map(|name| path(name).display().to_string());
    let common = vmm(&["cpu", "--common", &files[0], &files[1]]).output().unwrap();
    assert!(common.status.success(), "{}", finished(&common));
    fs::write(path("common.json"), common.stdout).unwrap();

    let mut whole = boot(dir.path(), "whole", "host");
    assert!(LACKING.iter().all(|word| console(&path("whole")).contains(word)));
    for options in [&["--dry-run"][..], &[]] {
        let refused = migrate("whole", options);
        let said = finished(&refused);
        assert_eq!(refused.status.code(), Some(1), "{said}");
        assert!(LACKING.iter().all(|word| said.contains(word)), "each is named: {said}");
        assert!(!said.contains("pre-copy"), "before a page moves: {said}");
    }
    let ticks = console(&path("whole")).matches("tick").count();
    until("it counts on", || match console(&path("whole")).matches("tick").count() {
        now if now > ticks + 3 => Ok(()),
        now => Err(format!("{now} ticks")),
    });
    let stopped = vmm(&["stop", "--force", "whole"]).output().unwrap();
    assert!(stopped.status.success() && whole.wait().unwrap().success(), "{}", finished(&stopped));

    let mut part = boot(dir.path(), "part", path("common.json").to_str().unwrap());
    assert!(LACKING.iter().all(|word| !console(&path("part")).contains(word)));
    let moved = migrate("part", &[]);
    assert!(moved.status.success(), "{}", finished(&moved));
    assert!(part.wait().unwrap().success());
    theirs.write_all(b"moved").unwrap();
}

/// Host 2: says what its CPU is, and takes what can come.
fn destination() {
    let dir = tempfile::tempdir().unwrap();
    let consoles = format!("file:{}", dir.path().join("{name}").display());
    let listener = TcpListener::bind(("0.0.0.0", TEST_PORT)).unwrap();
    let uri = format!("tcp:0.0.0.0:{MIGRATION_PORT}");
    let mut taking =
        vmm(&["migrate", "--listen", &uri, "--keep", "--serial", &consoles]).spawn().unwrap();
    let model = vmm(&["cpu"]).output().unwrap();
    assert!(model.status.success(), "{}", finished(&model));
    let (mut source, _) = listener.accept().unwrap();
    source.write_all(&model.stdout).unwrap();
    source.shutdown(Shutdown::Write).unwrap();
    let mut word = String::new();
    source.read_to_string(&mut word).unwrap();
    assert_eq!(word, "moved", "the source's half of the test");
    until("ten ticks", || match console(&dir.path().join("part")).matches("tick").count() {
        0..10 => Err(console(&dir.path().join("part"))),
        _ => Ok(()),
    });
    let stopped = vmm(&["stop", "--force", "part"]).output().unwrap();
    assert!(stopped.status.success(), "{}", finished(&stopped));
    taking.kill().unwrap();
    taking.wait().unwrap();
}

#[test]
fn a_guest_moves_between_unlike_cpus_if_it_was_shown_what_both_have() {
    match env("HOST").as_str() {
        "1" => source(),
        _ => destination(),
    }
}
