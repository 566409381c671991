//! Unlike hosts: this file runs in both of two emulated hosts at once, of which the second's CPU lacks AVX2 and
//! BMI2 (tests/run). A guest that was shown the first host's whole CPU can't move there, and is told why before
//! a page moves; one that was shown what both have in common moves. So it is with the built-in CPU models, whose guests
//! find their features in /proc/cpuinfo and no others.

#[path = "support/hosts.rs"]
mod hosts;

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Output};

use hosts::{MIGRATION_PORT, TEST_PORT, console, env, finished, guest_file, until, vmm, wait_for};
use tempfile::TempDir;

/// What the second host's CPU lacks.
const LACKING: [&str; 2] = ["avx2", "bmi2"];

/// The features of x86-64-v2 by the names that Linux gives them: what README says, and paging's and the system's.
const V2: &str = "pni ssse3 cx16 sse4_1 sse4_2 popcnt lahf_lm fpu de pse tsc msr pae mce cx8 sep mtrr pge mca cmov pat \
                  pse36 clflush mmx fxsr sse sse2 syscall nx rdtscp lm";
/// What x86-64-v3 has beside them.
const V3: &str = "pclmulqdq fma movbe aes xsave avx f16c rdrand fsgsbase bmi1 avx2 smep bmi2 xsaveopt abm pdpe1gb";
/// What KVM provides on any CPU.
const OF_KVM: &str = "apic x2apic tsc_deadline_timer hypervisor arat";
/// What Linux concludes by itself, from the maker, from leaf 0xB, from long mode (3dnowprefetch) or from its own ways.
const OF_LINUX: &str =
    "rep_good nopl cpuid extd_apicid tsc_known_freq vmmcall xtopology 3dnowprefetch";

/// Boots a guest that counts, and says what it is shown.
fn boot(dir: &Path, name: &str, cpu_model: &str) -> Child {
    let count = "grep -m1 ^flags /proc/cpuinfo; i=0; \
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

/// The features that a guest found.
fn flags(console_path: &Path) -> BTreeSet<String> {
    let text = console(console_path);
    let line =
        text.lines().find_map(|line| line.strip_prefix("flags")).expect("a line of features");
    line.split_whitespace().skip(1).map(str::to_owned).collect()
}

/// Exactly a model's features, but for those that aren't a model's to give.
fn check_flags(console_path: &Path, model: &[&str]) {
    let found = flags(console_path);
    let of = |lists: &[&str]| -> BTreeSet<String> {
        lists.iter().flat_map(|list| list.split_whitespace()).map(str::to_owned).collect()
    };
    let missing: Vec<_> = of(model).difference(&found).cloned().collect();
    let beyond: Vec<_> =
        found.difference(&of(&[model, &[OF_KVM, OF_LINUX]].concat())).cloned().collect();
    assert!(missing.is_empty() && beyond.is_empty(), "missing {missing:?}, beyond {beyond:?}");
}

fn path_of(dir: &TempDir, name: &str) -> PathBuf {
    dir.path().join(name)
}

/// A move of a guest of [`boot`]'s is refused for what the CPU there lacks, all of it and nothing else, and the guest counts on.
fn refused(dir: &TempDir, name: &str) {
    for options in [&["--dry-run"][..], &[]] {
        let refused = migrate(name, options);
        let said = finished(&refused);
        assert_eq!(refused.status.code(), Some(1), "{said}");
        assert!(LACKING.iter().all(|word| said.contains(&format!("lacks {word}"))), "{said}");
        assert_eq!(said.matches("CPU lacks").count(), LACKING.len(), "{said}");
        assert!(!said.contains("pre-copy"), "before a page moves: {said}");
    }
    counts_on(&path_of(dir, name), 3);
}

/// That many more ticks come.
fn counts_on(console_path: &Path, more: usize) {
    let ticks = || console(console_path).matches("tick").count();
    let before = ticks();
    until("it counts on", || match ticks() {
        now if now > before + more => Ok(()),
        _ => Err(console(console_path)),
    });
}

fn stop(name: &str) {
    let stopped = vmm(&["stop", "--force", name]).output().unwrap();
    assert!(stopped.status.success(), "{}", finished(&stopped));
}

/// Moves a guest of [`boot`]'s to host 2.
fn moved(name: &str, mut guest: Child) {
    let moved = migrate(name, &[]);
    assert!(moved.status.success(), "{}", finished(&moved));
    assert!(guest.wait().unwrap().success());
}

/// A guest moves on this host.
fn moved_here(dir: &TempDir, name: &str, mut guest: Child) {
    let uri = format!("unix:{}", path_of(dir, "here.sock").display());
    let serial = format!("file:{}", path_of(dir, "here").display());
    let listen = ["migrate", "--listen", &uri, "--name", "here", "--serial", &serial];
    let mut here = vmm(&listen).spawn().unwrap();
    until("it listens", || path_of(dir, "here.sock").exists().then_some(()).ok_or(String::new()));
    let moved =
        vmm(&["migrate", "--connect", &uri, "--downtime-limit", "2s", name]).output().unwrap();
    assert!(moved.status.success(), "{}", finished(&moved));
    assert!(guest.wait().unwrap().success());
    counts_on(&path_of(dir, "here"), 3);
    stop("here");
    assert!(here.wait().unwrap().success());
}

/// Host 1: has guests refused, and moves others.
fn source() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| path_of(&dir, name);
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
    assert!(LACKING.iter().all(|word| flags(&path("whole")).contains(*word)));
    refused(&dir, "whole");
    stop("whole");
    assert!(whole.wait().unwrap().success());

    let part = boot(dir.path(), "part", path("common.json").to_str().unwrap());
    assert!(LACKING.iter().all(|word| !flags(&path("part")).contains(*word)));
    moved("part", part);

    let v3 = boot(dir.path(), "v3", "x86-64-v3");
    check_flags(&path("v3"), &[V2, V3]);
    refused(&dir, "v3");
    moved_here(&dir, "v3", v3);

    let v2 = boot(dir.path(), "v2", "x86-64-v2");
    check_flags(&path("v2"), &[V2]);
    moved("v2", v2);
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
    for name in ["part", "v2"] {
        counts_on(&path_of(&dir, name), 10);
        stop(name);
    }
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
