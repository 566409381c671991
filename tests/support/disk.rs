//! A guest's disk that tells whether anybody touched it.

use std::fs::File;
use std::time::{Duration, SystemTime};

use super::guests::Guest;
use super::vm::{Place, Vm};

/// What it holds.
fn content() -> Vec<u8> {
    (0..=255).cycle().take(1 << 16).collect()
}

/// When it was last written to: long ago, so that who writes to it later, or marks it, can't hit the same moment.
fn written() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000)
}

/// Starts a guest with such a disk, in the VM's place.
pub fn start(guest: Guest, options: &[&str]) -> Vm {
    let place = Place::new();
    let path = place.path("disk");
    std::fs::write(&path, content()).unwrap();
    File::options().write(true).open(&path).unwrap().set_modified(written()).unwrap();
    let mut command = place.run(guest, options);
    command.arg("--disk").arg(path);
    Vm::spawn(place, command)
}

/// It holds what it did. (No guest here writes to it.)
#[track_caller]
pub fn check_content(vm: &Vm) {
    assert!(std::fs::read(vm.place.path("disk")).unwrap() == content(), "the disk changed");
}

/// Not even marked, as it is for a guest that is about to run at its destination.
#[track_caller]
pub fn check_untouched(vm: &Vm) {
    check_content(vm);
    let modified = std::fs::metadata(vm.place.path("disk")).unwrap().modified().unwrap();
    assert_eq!(modified, written(), "the disk was written to, or marked");
}
