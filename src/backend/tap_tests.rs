//! What needs no TAP; the rest is tests/linux_tap.rs.

use super::*;

fn wrong(name: &str) -> String {
    Tap::open(name).map(drop).unwrap_err().to_string()
}

#[test]
fn names_that_can_be_no_interface_are_refused() {
    for name in ["", "sixteen-letters-", "a/b", "a b", "a:b", ".", "..", "tap%d"] {
        assert!(wrong(name).contains("no interface can have this name"), "{name}");
    }
}

#[test]
fn a_missing_tap_tells_how_to_create_it() {
    assert_eq!(
        wrong("vmm-none"),
        "tap 'vmm-none': no such interface; create it with 'ip tuntap add vmm-none mode tap' and \
         'ip link set vmm-none up'"
    );
}
