//! `vmm cpu` on this host's KVM: its model is one that guests of this host run with.

mod support;

use std::fs;
use std::process::{Command, Output};

use serde_json::Value;
use support::guests::Guest;
use support::vm::{Vm, binary, has_kvm};

fn cpu(args: &[&str]) -> Output {
    Command::new(binary()).arg("cpu").args(args).output().unwrap()
}

#[test]
fn this_hosts_model_is_common_with_itself_and_fits_its_guests() {
    if !has_kvm() {
        return;
    }
    let host = cpu(&[]);
    assert!(host.status.success(), "{}", String::from_utf8_lossy(&host.stderr));
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("host.json");
    fs::write(&file, &host.stdout).unwrap();
    let file = file.to_str().unwrap();

    let common = cpu(&["--common", file, file, file]);
    let [host, common] =
        [host, common].map(|o| serde_json::from_slice::<Value>(&o.stdout).unwrap());
    assert_eq!(host["leaves"], common["leaves"]);
    assert!(host["leaves"].as_array().is_some_and(|leaves| leaves.len() > 2), "{host}");

    // Every CPU with KVM has SSE2, so that to lack leaf 1 is to lack something.
    let mut less = host.clone();
    less["leaves"].as_array_mut().unwrap().retain(|leaf| leaf["leaf"] != "0x1");
    let other = dir.path().join("less.json");
    fs::write(&other, less.to_string()).unwrap();
    let common = cpu(&["--common", file, other.to_str().unwrap()]);
    let common: Value = serde_json::from_slice(&common.stdout).unwrap();
    assert_eq!(common["leaves"], less["leaves"]);

    let mut vm = Vm::start(Guest::hello(), &["--cpu-model", file]);
    assert_eq!(vm.read_to_end(), b"hello\n");
    assert_eq!(vm.wait().0, Some(0));
}

#[test]
fn what_is_no_model_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("bad.json");
    fs::write(&file, "{}").unwrap();
    let file = file.to_str().unwrap();
    for (args, status, what) in [
        (&["--common", file, file][..], 1, "is not a CPU model"),
        (&["--common", "/none.json", file], 1, "/none.json"),
        (&["--common", file], 2, "at least two"),
        (&[file], 2, "files go with --common"),
    ] {
        let refused = cpu(args);
        let stderr = String::from_utf8(refused.stderr).unwrap();
        assert_eq!(refused.status.code(), Some(status), "{stderr}");
        assert!(stderr.contains(what) && stderr.lines().count() == 1, "{what}: {stderr}");
    }
}
