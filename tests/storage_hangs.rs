//! Storage that hangs under a VM which is to be paused or to end. It is the `io` thread that doesn't answer then: here because
//! a debugger holds it, which looks the same from the others.

mod support;

use std::io::Read;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use support::guests::Guest;
use support::moves::until;
use support::vm::{Place, Vm, has_kvm};

const LEFT: &str = "it is left to this host";

/// A VM whose guest prints what is typed, and whose `io` thread hangs until the debugger is killed.
struct Hung {
    vm: Vm,
    debugger: Child,
}

impl Hung {
    fn new() -> Self {
        Self::hold(Vm::start(Guest::echo(), &[]))
    }

    fn hold(vm: Vm) -> Self {
        vm.wait_until_up();
        // A thread names itself.
        until("has an I/O thread", || vm.has_thread("io"));
        // PTRACE_SEIZE, PTRACE_INTERRUPT, and wait4 with __WALL until it stands; then until it has ended.
        const PROGRAM: &str = "my $t = int $ARGV[0]; syscall(101, 0x4206, $t, 0, 0) == 0 or die $!; \
                               syscall(101, 0x4207, $t, 0, 0) == 0 or die $!; \
                               syscall(61, $t, 0, 0x40000000, 0) == $t or die $!; \
                               $| = 1; print 'held'; syscall(61, $t, 0, 0x40000000, 0);";
        let mut command = Command::new("perl");
        command.args(["-e", PROGRAM, &vm.thread("io").expect("it has one")]);
        let mut debugger = command.stdout(Stdio::piped()).spawn().expect("perl is there");
        debugger.stdout.as_mut().unwrap().read_exact(&mut [0; 4]).expect("it is held");
        Self { vm, debugger }
    }

    fn go_on(&mut self) {
        self.debugger.kill().unwrap();
        self.debugger.wait().unwrap();
    }

    /// A client that tells it this, when the VM is at that.
    fn told(&self, command: &[&str], state: &str) -> Child {
        let client = self.vm.place.client(command).spawn().unwrap();
        self.until_state(state);
        client
    }

    fn until_state(&self, state: &str) {
        until(state, || self.vm.info()["state"] == state);
    }

    fn check_runs(&mut self) {
        self.until_state("running");
        self.vm.type_in(b"x");
        assert_eq!(self.vm.read_some(1), b"x");
    }

    /// It ends well and soon, and says what it left.
    fn check_leaves(&mut self) {
        let (status, err) = self.vm.wait_for(Duration::from_secs(5));
        assert!(status == Some(0) && err.contains(LEFT) && err.lines().count() == 1, "{err}");
    }
}

impl Drop for Hung {
    fn drop(&mut self) {
        // It may have been killed before.
        let _ = self.debugger.kill();
        let _ = self.debugger.wait();
    }
}

fn check_succeeded(client: Child) {
    let output = client.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

fn check_failed(output: &Output, words: &str) {
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && err.lines().count() == 1 && err.contains(words), "{err}");
}

#[test]
fn a_pause_waits_for_storage_and_can_be_taken_back() {
    if !has_kvm() {
        return;
    }
    let mut hung = Hung::new();
    let client = hung.told(&["pause"], "pausing");
    let other = hung.vm.place.tell(&["pause"]);
    check_failed(&other, "is being paused, once its devices' I/O has ended");
    hung.until_state("pausing");
    hung.vm.tell(&["resume"]);
    let why = "the VM was not paused: the I/O of its devices had not ended";
    check_failed(&client.wait_with_output().unwrap(), why);
    hung.check_runs();

    // Its client goes away.
    let mut client = hung.told(&["pause"], "pausing");
    client.kill().unwrap();
    client.wait().unwrap();
    hung.check_runs();

    let client = hung.told(&["pause"], "pausing");
    hung.go_on();
    check_succeeded(client);
    assert_eq!(hung.vm.info()["state"], "paused");
    hung.vm.tell(&["resume"]);
    hung.check_runs();
}

#[test]
fn an_order_to_end_ends_a_pause_and_a_second_one_the_wait() {
    if !has_kvm() {
        return;
    }
    let mut hung = Hung::new();
    let client = hung.told(&["pause"], "pausing");
    hung.vm.signal(Signal::TERM);
    check_failed(&client.wait_with_output().unwrap(), "the VM's process was told to end");
    hung.until_state("stopping");
    hung.vm.signal(Signal::TERM);
    hung.check_leaves();
}

#[test]
fn a_forced_stop_waits_for_storage_for_a_while() {
    if !has_kvm() {
        return;
    }
    let place = Place::new();
    let console = place.path("console");
    let command = place.run(Guest::echo(), &["--serial", &format!("unix:{}", console.display())]);
    let mut hung = Hung::hold(Vm::spawn(place, command));
    assert!(console.exists());
    let client = hung.told(&["stop", "--force"], "stopping");
    // Nobody has to say it twice.
    check_succeeded(client);
    hung.check_leaves();
    // As it gives back a terminal.
    assert!(!console.exists(), "its console is left");

    // Where the I/O comes to its end, so does the VM, and nothing is said of it.
    let mut hung = Hung::new();
    let client = hung.told(&["stop", "--force"], "stopping");
    hung.go_on();
    check_succeeded(client);
    assert_eq!(hung.vm.wait(), (Some(0), String::new()));
}

/// It is waited for as long as storage takes, unless somebody ends the VM.
#[test]
fn a_guest_that_has_ended_waits_for_storage_until_an_order_to_end() {
    if !has_kvm() {
        return;
    }
    let mut hung = Hung::new();
    hung.vm.type_in(&[4]);
    hung.until_state("stopping");
    until("has answered all others", || !hung.vm.has_thread("api-client"));
    let client = hung.vm.place.client(&["stop"]).spawn().unwrap();
    until("asks", || hung.vm.has_thread("api-client"));
    hung.vm.signal(Signal::INT);
    hung.check_leaves();
    check_succeeded(client);
}
