//! A host whose file system is full: a stock guest's disk, its console and a snapshot of it are there. The guest
//! learns of what is its own as an I/O error, the one who asked for the snapshot in a line, and all goes on.

#[path = "support/linux.rs"]
mod linux;

use std::path::PathBuf;

use linux::{Guest, Vm};

/// Gives `vmm` a file system of 24 MiB at `$0`, with an image of 64 MiB in it.
const SMALL: &str =
    "mount -t tmpfs -o size=24m small \"$0\" && truncate -s 64M \"$0/disk\" && exec \"$@\"";

/// The directory where that file system is, as seen from outside of the VMM's mount namespace.
fn inside(vm: &Vm, dir: &tempfile::TempDir) -> PathBuf {
    let path = dir.path().strip_prefix("/").unwrap();
    PathBuf::from(format!("/proc/{}/root", vm.pid())).join(path)
}

fn guest(dir: &tempfile::TempDir) -> Guest {
    let path = dir.path().to_str().unwrap();
    Guest::new("6.12-cloud").mem("128M").through(&["unshare", "-rm", "sh", "-c", SMALL, path])
}

#[test]
fn a_disk_and_a_snapshot_find_no_room() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    let script =
        "dd if=/dev/zero of=/dev/vda bs=1M count=40 oflag=direct 2>&1 | grep -o 'I/O error'
                  echo filled; read word; echo word=$word
                  dd if=/dev/vda of=/dev/null bs=1M count=8 iflag=direct && echo disk=readable";
    let mut vm = guest(&dir).option("--disk", disk.to_str().unwrap()).run(script).start();
    vm.wait_for("filled");
    let small = inside(&vm, &dir);
    let snapshot = dir.path().join("snapshot");
    for options in [&[][..], &["--live", "--downtime-limit", "10s"]] {
        let mut args = vec![snapshot.to_str().unwrap()];
        args.extend(options);
        let output = vm.tell("snapshot", &args);
        let err = String::from_utf8(output.stderr).unwrap();
        let lines: Vec<_> = err.lines().filter(|line| line.contains("No space left")).collect();
        if output.status.code() != Some(1) || lines.len() != 1 {
            vm.fail(&format!("{}: {err}", output.status));
        }
        let left: Vec<_> = std::fs::read_dir(&small).unwrap().flatten().collect();
        assert_eq!(left.len(), 1, "nothing but the disk is left: {left:?}");
    }
    vm.type_in("on\n");
    let ended = vm.wait();
    ended.check_success().check_value("word", "on").check_value("disk", "readable");
    ended.check(ended.console.contains("I/O error"), "the guest wrote what there is no room for");
}

#[test]
fn a_console_finds_no_room() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let target = format!("file:{}", log.display());
    // It fills the file system through its disk, then tells more than the console's buffers hold.
    let script = "dd if=/dev/zero of=/dev/vda bs=1M count=40 oflag=direct
                  yes 0123456789abcdef0123456789abcdef | head -n 8192";
    let disk = dir.path().join("disk");
    let guest = guest(&dir).option("--disk", disk.to_str().unwrap()).option("--serial", &target);
    let ended = guest.run(script).boot();
    ended.check_status(0);
    let err = ended.stderr();
    ended.check(err.contains("No space left"), "the loss is told");
    ended.check(
        err.lines().filter(|line| line.contains("No space")).count() <= 3,
        "not again and again",
    );
}
