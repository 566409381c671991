//! Stock kernels from their start to each of their ends: the power button, force, pauses, reboots, panics;
//! typing on their consoles; two at once. Both of Debian's cloud kernels do each, side by side.

#[path = "support/linux.rs"]
mod linux;
#[path = "support/pty.rs"]
mod pty;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread::sleep;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use linux::{BAD_LOG, Guest, LONG, Vm, vmm};
use pty::{COOKED, Pty};
use serde_json::{Value, json};

const KERNELS: [&str; 2] = ["6.1-cloud", "6.12-cloud"];

/// A guest of each kernel that runs a script.
fn both(script: &str, shape: impl Fn(Guest) -> Guest) -> [Vm; 2] {
    KERNELS.map(|kernel| {
        let script = format!("#!/bin/sh\n{script}").into_bytes();
        shape(Guest::new(kernel).mem("128M").file("vmm.run", script)).start()
    })
}

fn parse(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

/// Something went on for ever, were it not for what the test does to it.
const STAY: &str = "echo staying; while :; do sleep 1; done";

#[test]
fn the_power_button_powers_off() {
    for mut vm in both(STAY, |guest| guest) {
        vm.wait_for("staying");
        let told = parse(&vm.ask("stop", &["--json", "--timeout", "200s"]));
        if told != json!({ "ended": "power_off", "forced": false }) {
            vm.fail(&format!("vmm stop: {told}"));
        }
        let ended = vm.wait();
        ended.check_status(0).check(ended.stderr().is_empty(), "it said something on stderr");
        let (heard, down) = ("init: power button", "reboot: Power down");
        ended.check(ended.console.contains(heard), "init didn't hear the button");
        ended.check(ended.console.contains(down), "the kernel didn't power off");
    }
}

/// Seconds that it stood, at least, and far more than the watchdog allows.
const PAUSE: Duration = Duration::from_secs(8);

fn real_seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64()
}

/// The watchdog calls a vCPU locked up that ran nothing else for 2 seconds.
#[test]
fn pauses_do_not_look_like_lockups() {
    let script = "dmesg -c > /boot.log\n\
                  echo 1 > /proc/sys/kernel/watchdog_thresh || exit 1\n\
                  echo \"watched=$(cat /proc/sys/kernel/soft_watchdog)\"; i=0\n\
                  while [ $i -lt 60 ]; do\n\
                  echo \"at $i $(cut -d' ' -f1 /proc/uptime) $(date +%s)\"; usleep 100000; i=$((i+1))\n\
                  done\n\
                  dmesg | grep -iE '";
    let script = format!("{script}{BAD_LOG}' | sed 's/^/FAULT log: /'");
    let mut vms = both(&script, |guest| guest.cpus(2));
    for vm in &mut vms {
        vm.wait_for("at 10 ");
        vm.ask("pause", &[]);
    }
    // Time for what is on its way to the file.
    sleep(Duration::from_secs(1));
    let before = vms.each_ref().map(Vm::console);
    sleep(PAUSE);
    for (vm, before) in vms.iter().zip(before) {
        if vm.console() != before {
            vm.fail("a paused guest printed something");
        }
        vm.ask("resume", &[]);
    }
    for vm in vms {
        let ended = vm.wait();
        ended.check_success().check_value("watched", "1");
        let times: Vec<Vec<f64>> = ended
            .console
            .lines()
            .filter_map(|line| line.trim_end().strip_prefix("at "))
            .map(|line| line.split(' ').map(|word| word.parse().unwrap()).collect())
            .collect();
        ended.check(times.len() == 60, "lines are missing");
        for clock in [1, 2] {
            let steps = times.windows(2).map(|pair| pair[1][clock] - pair[0][clock]);
            ended.check(steps.clone().all(|step| step >= 0.0), "a clock went back");
            let longest = steps.fold(0.0, f64::max);
            ended.check(longest >= PAUSE.as_secs_f64(), "the pause didn't pass for the guest");
        }
        ended.check(times[59][2] <= real_seconds(), "the guest's clock is ahead");
        ended.check(!ended.console.contains("FAULT"), "the kernel's log isn't clean");
    }
}

/// What a guest does when it is told to by a line on its console.
const OBEY: &str = "echo staying; read what; echo \"doing $what\"\n\
                    case $what in\n\
                    reboot) sync; reboot -f ;;\n\
                    panic) echo c > /proc/sysrq-trigger ;;\n\
                    sysrq) echo b > /proc/sysrq-trigger ;;\n\
                    esac\n\
                    sleep 1000";

/// The guest has come up for the `time`th time.
fn wait_for_boot(vm: &mut Vm, time: usize) {
    vm.wait_until("the guest comes up", |vm| vm.console().matches("staying").count() == time);
}

#[test]
fn a_reboot_is_status_0() {
    for mut vm in both(OBEY, |guest| guest) {
        wait_for_boot(&mut vm, 1);
        vm.type_in("reboot\n");
        let ended = vm.wait();
        ended.check_status(0).check(ended.stderr().is_empty(), "it said something on stderr");
    }
}

/// Told to boot again after a reboot, it does, with all its vCPUs; a failure ends it all the same.
#[test]
fn a_reboot_boots_again_and_a_panic_or_a_forced_reset_is_status_3() {
    let [mut old, mut new] =
        both(OBEY, |guest| guest.cpus(2).option("--on-reboot", "reset").cmdline("loglevel=4"));
    for vm in [&mut old, &mut new] {
        wait_for_boot(vm, 1);
        vm.type_in("reboot\n");
    }
    for vm in [&mut old, &mut new] {
        wait_for_boot(vm, 2);
    }
    old.type_in("sysrq\n");
    new.type_in("panic\n");
    for (vm, why) in [(old, "sysrq: Resetting"), (new, "Kernel panic - not syncing")] {
        let ended = vm.wait();
        ended.check_status(3).check(ended.console.contains(why), why);
        let stderr = ended.stderr();
        let told = stderr.starts_with("vmm: the guest failed: it reset itself");
        ended.check(told && stderr.lines().count() == 1, "it didn't say so in one line");
    }
}

#[test]
fn a_panic_is_status_3_and_so_is_a_forced_reset_elsewhere() {
    let [mut old, mut new] = both(OBEY, |guest| guest);
    for (vm, what) in [(&mut old, "panic\n"), (&mut new, "sysrq\n")] {
        wait_for_boot(vm, 1);
        vm.type_in(what);
    }
    for vm in [old, new] {
        vm.wait().check_status(3);
    }
}

/// A shell on a terminal: keys are echoed once, Ctrl-C is the guest's, and the terminal is as it was.
#[test]
fn a_shell_on_a_terminal() {
    let guest = Guest::new("6.12-cloud").mem("128M");
    let mut pty = Pty::spawn(&guest.command());
    pty.patience = LONG;
    let before = pty.modes();
    pty.read_until("microvm:/root# ");
    assert!(!pty.modes().intersects(COOKED), "the terminal isn't raw");
    pty.type_in(b"echo $((6*7))$(uname -r)\r");
    let shown = pty.read_until("microvm:/root# ");
    let echoes = shown.matches("echo $((6*7))$(uname -r)").count();
    assert!(echoes == 1 && shown.contains("\n426.12."), "{shown}");
    pty.type_in(b"sleep 1000\r");
    pty.read_until("sleep 1000");
    pty.read_until("\n");
    // The shell has to have let go of the terminal first.
    sleep(Duration::from_millis(500));
    pty.type_in(b"\x03");
    pty.read_until("microvm:/root# ");
    pty.type_in(b"exit\r");
    pty.read_until("Power down");
    assert_eq!(pty.child.wait().unwrap().code(), Some(0));
    assert_eq!(pty.modes(), before, "the terminal isn't as it was");
}

#[test]
fn two_at_once_are_listed_and_told_apart() {
    let [first, mut second] = KERNELS.map(|kernel| {
        let guest = Guest::new(kernel).mem("128M").option("--name", &format!("stock-{kernel}"));
        let serial = format!("unix:{}", guest.path("console.sock").display());
        let guest = if kernel == KERNELS[0] { guest.option("--serial", &serial) } else { guest };
        guest.file("vmm.run", format!("#!/bin/sh\n{OBEY}").into_bytes()).start()
    });
    second.wait_for("staying");
    let mut console = UnixStream::connect(first.path("console.sock")).unwrap();
    console.set_read_timeout(Some(LONG)).unwrap();
    let list = parse(&output(&["list", "--json"]));
    let vms: Vec<_> = list.as_array().unwrap().iter().collect();
    for (vm, kernel) in [(&first, KERNELS[0]), (&second, KERNELS[1])] {
        let name = format!("stock-{kernel}");
        let listed = vms.iter().find(|v| v["name"] == name.as_str());
        let listed = listed.unwrap_or_else(|| panic!("{name} is not in {list}"));
        assert_eq!((&listed["state"], &listed["pid"]), (&json!("running"), &json!(vm.pid())));
        let info = parse(&output(&["info", &name, "--json"]));
        assert_eq!(info["pid"], vm.pid());
        assert_eq!(info["config"]["ram_bytes"], 128 << 20);
    }
    let table = output(&["list"]);
    assert!(
        table.lines().any(|l| l.starts_with("stock-6.1-cloud  ") && l.contains("128 MiB")),
        "{table}"
    );
    // By force, and the other one doesn't mind.
    assert_eq!(output(&["stop", "stock-6.12-cloud", "--force"]), "");
    second.wait().check_status(0);
    // Its console is a socket: what is typed there is echoed, and read by the script.
    let mut shown = Vec::new();
    read_until(&mut console, &mut shown, "staying");
    console.write_all(b"something\n").unwrap();
    read_until(&mut console, &mut shown, "doing something");
    assert_eq!(String::from_utf8_lossy(&shown).matches("something").count(), 2, "no echo");
    assert_eq!(output(&["stop", "stock-6.1-cloud", "--force"]), "");
    first.wait().check_status(0);
}

fn output(args: &[&str]) -> String {
    let output = vmm(args).output().unwrap();
    assert!(output.status.success(), "{args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn read_until(from: &mut UnixStream, shown: &mut Vec<u8>, text: &str) {
    let mut byte = [0];
    while !String::from_utf8_lossy(shown).contains(text) {
        let read = from.read(&mut byte);
        let so_far = String::from_utf8_lossy(shown);
        assert!(matches!(read, Ok(1)), "{text:?} doesn't come: {read:?} after {so_far:?}");
        shown.push(byte[0]);
    }
}
