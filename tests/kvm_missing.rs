//! Hosts without a KVM that we may use: one line says what is wrong and how to get it. Each is a mount namespace
//! with a `/dev` of its own, so that this works on hosts with KVM and without.

use std::process::Command;

/// The end of `vmm run` where `/dev` was made by a line of shell.
#[track_caller]
fn fails(make_dev: &str, expected: &str) {
    let vmm = std::env::var("VMM_BIN").unwrap_or_else(|_| env!("CARGO_BIN_EXE_vmm").to_owned());
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("kernel");
    // As far as this goes, nobody reads more of a kernel.
    std::fs::write(&kernel, [0; 4096]).unwrap();
    let new = dir.path().join("dev");
    std::fs::create_dir(&new).unwrap();
    let script = format!(
        "cd {} && mount -t tmpfs dev . && cd \"$PWD\" && {make_dev} mount -o rbind . /dev && exec \"$@\"",
        new.display()
    );
    let output = Command::new("unshare")
        .args(["-rm", "sh", "-c", &script, "sh", &vmm, "run", "--mem", "64M", "--serial", "null"])
        .arg("--control")
        .arg(dir.path().join("sock"))
        .arg("--kernel")
        .arg(&kernel)
        .output()
        .expect("unshare, of util-linux");
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{err}");
    assert!(err.starts_with(expected) && err.lines().count() == 1, "{err}");
}

#[test]
fn no_device() {
    fails("", "vmm: /dev/kvm is missing: load kvm-intel or kvm-amd");
}

#[test]
fn no_permission() {
    // On a mount without devices none can be opened, by root neither.
    let make = ": >kvm && mount -o bind /dev/null kvm && mount -o remount,bind,nodev kvm &&";
    fails(make, "vmm: /dev/kvm: permission denied: join the group that owns it");
}

#[test]
fn a_device_that_can_t_what_is_needed() {
    fails(": >kvm &&", "vmm: this host's KVM lacks KVM_CAP_");
}
