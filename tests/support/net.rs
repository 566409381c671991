//! A network namespace of its own for a test, and what `ip` builds in it. Needs root or user namespaces; the
//! emulated host has them.

#![allow(dead_code, reason = "each test program uses a part")]

use std::process::Command;

/// Tells a run of the test binary that it is the one inside the namespace.
const INSIDE: &str = "VMM_TEST_INSIDE";

/// Runs `test`, which is the body of the test `name`, in a fresh network namespace: this binary again,
/// under `unshare`. What it says on standard error is passed on.
pub fn in_namespace(name: &str, test: impl FnOnce()) {
    if std::env::var_os(INSIDE).is_some() {
        return test();
    }
    let output = Command::new("unshare")
        .arg("-rn")
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .expect("unshare, of util-linux or busybox");
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && out.contains(" 1 passed"), "in the namespace: {out}{err}");
    eprint!("{err}");
}

/// `ip` with these words.
pub fn ip(args: &str) {
    let output =
        Command::new("ip").args(args.split_whitespace()).output().expect("ip, of iproute2");
    assert!(output.status.success(), "ip {args}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A bridge with that address, and TAPs on it.
pub fn bridge(address: &str, taps: &[&str]) {
    ip("link set lo up");
    ip("link add br0 type bridge");
    ip(&format!("address add {address} dev br0"));
    ip("link set br0 up");
    for tap in taps {
        ip(&format!("tuntap add {tap} mode tap"));
        ip(&format!("link set {tap} master br0 up"));
    }
}
