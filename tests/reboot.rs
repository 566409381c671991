//! The real binary with guests of a few instructions that reset themselves: which reset ends the VM, which boots it
//! again, and whose reset it was.

#[path = "support/flat.rs"]
mod flat;

use std::fs;
use std::time::{Duration, Instant};

use flat::{LONG, World, guest};
use rustix::process::Signal;

#[test]
fn a_reboot_ends_or_begins_anew() {
    let world = World::new(&guest().print("boot ").reset());
    let (status, output, errors) = world.run(&["--on-reboot", "exit"]).ends();
    assert_eq!((status, output.as_str(), errors.as_str()), (Some(0), "boot ", ""));
    let mut vm = world.run(&["--on-reboot", "reset"]);
    vm.reads("boot boot boot ");
    vm.signal(Signal::TERM);
    assert_eq!(vm.ends().0, Some(0));
}

/// What the old machine's guest did after its reset, before its vCPU stood, is not the new one's doing.
#[test]
fn a_machine_that_was_reset_has_no_say_in_the_next() {
    for more in [guest().reset(), guest().triple_fault()] {
        // The reset register of ACPI, and at once another end.
        let resets = guest().print("boot ").await_bit(0x3fd, 1).out(0x602, 1).bytes(&more.0);
        let world = World::new(&resets);
        let mut vm = world.run_logging(&["--on-reboot", "reset"]);
        vm.reads("boot ");
        vm.types("x");
        vm.reads("boot ");
        // Answered after whatever was told before.
        assert_eq!(world.json(&["info", "--json"])["state"], "running");
        vm.signal(Signal::TERM);
        let (status, output, errors) = vm.ends();
        assert_eq!((status, output.as_str()), (Some(0), ""), "{errors}");
        assert_eq!(errors.matches("the guest resets").count(), 1, "{errors}");
    }
}

#[test]
fn a_stop_that_nobody_waits_for_leaves_reboots_as_they_are() {
    let hears = guest().print("up").await_bit(0x603, 1).print("no");
    let world = World::new(&hears.await_bit(0x3fd, 1).reset());
    let mut vm = world.run(&["--on-reboot", "reset"]);
    vm.reads("up");
    let mut stop = world.command().args(["stop", "./vm.sock"]).spawn().expect("the binary runs");
    vm.reads("no");
    stop.kill().and_then(|()| stop.wait()).expect("our child");
    // It is gone for the VM when the thread that served it is.
    let tasks = format!("/proc/{}/task", vm.child().id());
    let serves = |task: fs::DirEntry| {
        fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name == "api-client\n")
    };
    let start = Instant::now();
    while fs::read_dir(&tasks).expect("it runs").flatten().any(serves) {
        assert!(start.elapsed() < LONG, "the client is still served");
        std::thread::sleep(Duration::from_millis(5));
    }
    vm.types("x");
    vm.reads("up");
    vm.signal(Signal::TERM);
    assert_eq!(vm.ends().0, Some(0));
}
