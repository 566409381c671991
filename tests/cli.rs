//! The real binary's command line, as far as it goes without KVM: wrong usage, files that aren't what
//! they should be, control sockets, and the commands that talk to a VM, against a VM of a few lines.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::{self, Sender};
use std::thread;

use serde_json::{Value, json};
use vmm::api::server::Server;
use vmm::api::socket::ControlSocket;
use vmm::event::{ApiError, Event, Reply, Request};

/// A directory of files and sockets, and the binary run with it as `XDG_RUNTIME_DIR`.
struct World {
    dir: tempfile::TempDir,
}

impl World {
    fn new() -> World {
        World { dir: tempfile::tempdir().expect("a directory") }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().expect("UTF-8").to_owned()
    }

    fn file(&self, name: &str, contents: &[u8]) -> String {
        fs::write(self.path(name), contents).expect("a file");
        self.text(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let binary = std::env::var_os("VMM_BIN");
        let binary = binary.unwrap_or_else(|| env!("CARGO_BIN_EXE_vmm").into());
        let mut command = Command::new(binary);
        command.args(args).env("XDG_RUNTIME_DIR", self.dir.path()).env_remove("VMM_LOG");
        command.current_dir(self.dir.path()).stdin(Stdio::null());
        command
    }

    fn vmm(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("the binary runs")
    }

    /// Standard output of a command that does its work and says nothing else.
    fn says(&self, args: &[&str]) -> String {
        let output = self.vmm(args);
        let stderr = text(&output.stderr);
        assert!(output.status.success() && stderr.is_empty(), "{args:?}: {stderr}");
        text(&output.stdout)
    }

    /// The one line on standard error of a command that fails with a status.
    fn fails(&self, status: i32, args: &[&str]) -> String {
        let output = self.vmm(args);
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{args:?}: {stderr}");
        assert!(output.stdout.is_empty(), "{args:?}");
        assert!(stderr.starts_with("vmm: ") && stderr.ends_with('\n'), "{args:?}: {stderr:?}");
        assert_eq!(stderr.lines().count(), 1, "{args:?}: {stderr}");
        stderr
    }

    /// `vmm run` of a kernel that is a file of some bytes, with more arguments.
    fn run_fails(&self, status: i32, more: &[&str]) -> String {
        let kernel = self.file("kernel", b"not a kernel");
        let args = [&["run", "--kernel", &kernel, "--mem", "64M", "--serial", "null"], more];
        self.fails(status, &args.concat())
    }

    /// Where the binary looks for a VM of a name.
    fn socket(&self, name: &str) -> PathBuf {
        let root = rustix::process::geteuid().is_root();
        let dir = if root { PathBuf::from("/run/vmm") } else { self.path("vmm") };
        dir.join(format!("{name}.sock"))
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

/// A name that no other test has.
fn name(what: &str) -> String {
    format!("test-{what}-{}", std::process::id())
}

/// A VM that isn't there: its control loop is a function that says whether it goes on.
struct FakeVm {
    events: Sender<Event>,
    control: Option<thread::JoinHandle<()>>,
}

impl FakeVm {
    fn start(
        path: &Path,
        name: &str,
        mut answer: impl FnMut(Request, Reply) -> bool + Send + 'static,
    ) -> FakeVm {
        let socket = ControlSocket::bind(path).expect("a free path");
        let (events, inbox) = mpsc::channel();
        let server = Server::start(socket, name, events.clone()).expect("a thread");
        let control = thread::spawn(move || {
            while let Ok(Event::Request { request, reply }) = inbox.recv() {
                if !answer(request, reply) {
                    break;
                }
            }
            drop(inbox);
            drop(server);
        });
        FakeVm { events, control: Some(control) }
    }

    /// One that tells about itself, pauses, resumes, and ends when it is asked to, or by force only.
    fn polite(path: &Path, name: &str, hears_the_button: bool) -> FakeVm {
        let mut state = "running";
        let config = json!({
            "name": name, "cpus": 2, "ram_bytes": 1 << 29,
            "boot": { "kernel": "/k", "initrd": null, "cmdline": "a=\"b c\" 'd'\u{1b}[2J" },
            "disks": [{ "id": "root", "path": "/r", "readonly": true }],
            "nets": [{ "id": "lan", "tap": "tap0", "mac": "52:54:00:00:00:01" }],
        });
        let mut waiting = Vec::new();
        FakeVm::start(path, name, move |request, reply| {
            match request {
                Request::Pause => state = "paused",
                Request::Resume => state = "running",
                Request::Stop { force: false } if state == "paused" => {
                    reply.done(Err(ApiError::conflict("it is paused")));
                    return true;
                }
                Request::Stop { force: false } if !hears_the_button => {
                    waiting.push(reply);
                    return true;
                }
                Request::Stop { force } => {
                    let ended = if force { "forced" } else { "power_off" };
                    reply.done(Ok(json!({ "ended": ended })));
                    return false;
                }
                _ => {}
            }
            reply.done(Ok(json!({ "state": state, "pid": 7, "config": config })));
            true
        })
    }
}

impl Drop for FakeVm {
    fn drop(&mut self) {
        // Ended already, if it was stopped.
        drop(self.events.send(Event::ConsoleQuit));
        if let Some(control) = self.control.take() {
            control.join().expect("the fake VM");
        }
    }
}

#[test]
fn help_is_complete() {
    let world = World::new();
    let top = world.says(&["--help"]);
    assert_eq!(top, world.says(&["help"]));
    let moves = "listen connect cancel resolve downtime-limit timeout on-timeout bandwidth dry-run json once keep name \
                 control serial disk net";
    let runs =
        "kernel mem cpus initrd cmdline disk net serial name control on-reboot hugepages cpu-model";
    let restores = "name control serial disk net lazy eager clock";
    let small = ["list", "info", "pause", "resume"].map(|command| (command, "json"));
    let own = [("stop", "force timeout json"), ("inspect", "json check"), ("cpu", "common")];
    let saves = "live json downtime-limit timeout on-timeout";
    let big = [("run", runs), ("migrate", moves), ("snapshot", saves), ("restore", restores)];
    for (command, options) in small.into_iter().chain(own).chain(big) {
        assert!(top.contains(&format!("  {command} ")), "{command} is missing");
        let help = world.says(&[command, "--help"]);
        for option in options.split_whitespace() {
            assert!(help.contains(&format!("--{option}")), "{command}: --{option} is missing");
        }
        assert!(help.starts_with(&format!("usage: vmm {command}")), "{help}");
        assert!(help.contains(&format!("\nexample: vmm {command}")), "{help}");
        assert_eq!(help, world.says(&["help", command]));
        assert_eq!(help, world.says(&[command, "-h"]));
    }
    assert_eq!(world.says(&["--version"]), format!("vmm {}\n", env!("CARGO_PKG_VERSION")));
}

const MOVE: &[&str] = &["migrate", "--connect", "tcp:there:4444", "a"];
const LISTEN: &[&str] = &["migrate", "--listen", "tcp:127.0.0.1:4444"];

#[test]
fn wrong_usage_is_status_2_and_one_line() {
    let world = World::new();
    for (args, words) in [
        (&[][..], "a command is needed: run, list, info, pause, resume, stop"),
        (&["rum"], "unknown command 'rum': do you mean run? (see 'vmm --help')"),
        (&["frobnicate"], "unknown command 'frobnicate': there are run, list"),
        (&["help", "rum"], "do you mean run?"),
        (&["--verbose"], "unknown option --verbose: a command comes first"),
        (&["-x"], "unknown option -x"),
        (&["run"], "--kernel PATH is needed (see 'vmm run --help')"),
        (&["run", "--kernel", "k"], "--mem SIZE is needed"),
        (&["run", "--kernel", "k", "--mem", "1M"], "--mem '1M': at least 32M is needed"),
        (&["run", "--memory=1G"], "unknown option --memory"),
        (&["run", "a\nb"], "unexpected 'a\\nb'"),
        (&["list", "web"], "list takes no VM"),
        (&["restore"], "a snapshot's directory is needed"),
        (&["restore", "d", "--lazy", "--eager"], "--lazy and --eager exclude each other"),
        (&["restore", "d", "--clock", "utc"], "--clock 'utc': real or saved"),
        (&["list", "--jsn"], "unknown option --jsn: do you mean --json?"),
        (&["info"], "a VM is needed"),
        (&["info", "a", "b"], "more than one VM: the first is 'a'"),
        (&["info", "a b"], "VM name 'a b'"),
        (&["info", "a", "--force"], "unknown option --force"),
        (&["pause", "--json=1", "a"], "--json takes no value"),
        (&["stop", "a", "--timeout", "5"], "--timeout '5': not a duration"),
        (&["stop", "a", "--timeout"], "--timeout needs a value"),
        (&["stop", "a", "--force", "--timeout", "5s"], "exclude each other"),
        (&["migrate", "a"], "exactly one of --listen, --connect, --cancel and --resolve is needed"),
        (&["migrate", "--connect", "stdio", "a"], "--connect: a VM has no standard output"),
        (&[MOVE, &["--downtime-limit", "0s"]].concat(), "--downtime-limit: it takes 1ms to 1h"),
        (&[MOVE, &["--timeout", "0s"]].concat(), "--timeout: it takes 1ms to 168h"),
        (&[MOVE, &["--bandwidth", "1K"]].concat(), "--bandwidth: it takes at least 1M"),
        (
            &[LISTEN, &["--disk", "id=d,path=/a", "--disk", "id=d,path=/b"]].concat(),
            "id=d is given twice",
        ),
        (
            &[LISTEN, &["--net", "id=n,tap=a", "--net", "id=n,tap=b"]].concat(),
            "id=n is given twice",
        ),
    ] {
        let line = world.fails(2, args);
        assert!(line.contains(words), "{args:?}: {line}");
    }
}

#[test]
fn an_argument_that_is_not_utf8_is_wrong_usage() {
    use std::os::unix::ffi::OsStrExt;
    let world = World::new();
    let odd = std::ffi::OsStr::from_bytes(b"/k\xff");
    let output = world.command(&["run", "--mem", "64M", "--kernel"]).arg(odd).output();
    let output = output.expect("the binary runs");
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("it must be UTF-8"), "{:?}", text(&output.stderr));
}

#[test]
fn files_are_looked_at_before_kvm() {
    let world = World::new();
    let run = |kernel: &str| world.fails(1, &["run", "--kernel", kernel, "--mem", "64M"]);
    assert!(run("/none").contains("kernel /none: No such file"));
    assert!(run("/").contains("kernel /: it is a directory"));
    assert!(run("/dev/null").contains("kernel /dev/null: it is not a regular file"));
    assert!(run(&world.file("empty", b"")).contains("empty: it is empty"));
    assert!(world.run_fails(1, &["--initrd", "/none"]).contains("initrd /none: No such file"));
    assert!(world.run_fails(1, &["--disk", "/none"]).contains("disk /none: No such file"));
    assert!(world.run_fails(1, &["--disk", "/"]).contains("disk /: it is a directory"));
    assert!(world.run_fails(1, &["--disk", "/dev/null"]).contains("neither a regular file nor"));
    let model = world.run_fails(1, &["--cpu-model", "x86-64-v4"]);
    assert!(model.contains("not host, x86-64-v2 or x86-64-v3"), "{model}");
}

#[test]
fn a_control_socket_that_cannot_be_is_named() {
    let world = World::new();
    let long = world.text(&"x".repeat(100));
    let line = world.run_fails(1, &["--control", &long]);
    assert!(line.contains("a UNIX socket's path has at most 107"), "{line}");
    let line = world.run_fails(1, &["--control", &world.text("none/c.sock")]);
    assert!(line.contains("can't lock the directory: No such file"), "{line}");
    let file = world.file("precious", b"x");
    let line = world.run_fails(1, &["--control", &file]);
    assert!(line.contains("exists and is not a socket"), "{line}");

    let path = world.text("live.sock");
    let vm = FakeVm::polite(Path::new(&path), "live", true);
    let line = world.run_fails(1, &["--control", &path]);
    let pid = format!("in use by a live VM (pid {})", std::process::id());
    assert!(line.contains(&pid), "{line}");
    drop(vm);
}

#[test]
fn a_vm_that_is_not_there_is_named() {
    let world = World::new();
    let missing = name("missing");
    for command in ["info", "pause", "resume", "stop"] {
        let line = world.fails(1, &[command, &missing]);
        assert!(line.starts_with(&format!("vmm: {missing}: ")), "{line}");
        assert!(line.contains("no such VM: `vmm list` shows those that run"), "{line}");
    }
    let dead = world.path("dead.sock");
    drop(UnixListener::bind(&dead).expect("a socket that dies"));
    let line = world.fails(1, &["info", &world.text("dead.sock")]);
    assert!(line.contains("the VM is dead, only its socket is left"), "{line}");
    let line = world.fails(1, &["info", &world.file("a-file", b"")]);
    assert!(line.contains("not a control socket"), "{line}");
}

#[test]
fn a_user_without_a_runtime_directory_is_told() {
    if rustix::process::geteuid().is_root() {
        // Root's directory is fixed: there is nothing to tell, and an unset variable changes nothing.
        let world = World::new();
        let output = world.command(&["list"]).env_remove("XDG_RUNTIME_DIR").output();
        assert!(output.expect("the binary runs").status.success());
        return;
    }
    let world = World::new();
    let output = world.command(&["list"]).env("XDG_RUNTIME_DIR", "relative").output();
    let output = output.expect("the binary runs");
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("XDG_RUNTIME_DIR is not set"));
}

#[test]
fn a_vm_is_listed_shown_paused_resumed_and_stopped() {
    let world = World::new();
    let name = name("whole");
    let path = world.socket(&name);
    let vm = FakeVm::polite(&path, &name, true);

    let list = world.says(&["list"]);
    let row = list.lines().find(|line| line.starts_with(&name)).expect("our row");
    assert_eq!(
        row.split_whitespace().skip(1).collect::<Vec<_>>(),
        ["running", "7", "2", "512", "MiB"]
    );
    let list: Value = serde_json::from_str(&world.says(&["list", "--json"])).expect("JSON");
    let entry = list.as_array().and_then(|all| all.iter().find(|vm| vm["name"] == name.as_str()));
    assert_eq!(entry.expect("our entry")["socket"], json!(path));

    let info = world.says(&["info", &name]);
    for line in [
        "state     running",
        "RAM       512 MiB",
        "kernel    /k",
        "disk      root: /r, read-only",
        "net       lan: tap0, 52:54:00:00:00:01",
        // Nothing that a VM tells can move the cursor.
        "cmdline   a=\"b c\" 'd'\\u{1b}[2J",
    ] {
        assert!(info.lines().any(|other| other == line), "{line} is missing: {info}");
    }
    assert_eq!(world.says(&["pause", &name]), "");
    assert!(world.fails(1, &["stop", &name]).contains("it is paused"));
    // By its socket's path too.
    let state = world.says(&["resume", "--json", path.to_str().expect("UTF-8")]);
    let state: Value = serde_json::from_str(&state).expect("JSON");
    assert_eq!(state["state"], "running");

    let ended: Value = serde_json::from_str(&world.says(&["stop", "--json", &name])).expect("JSON");
    assert_eq!(ended, json!({ "ended": "power_off", "forced": false }));
    assert!(!path.exists());
    drop(vm);
}

#[test]
fn a_guest_that_does_not_listen_is_ended_by_force() {
    let world = World::new();
    let path = world.text("deaf.sock");
    let vm = FakeVm::polite(Path::new(&path), "deaf", false);
    let output = world.vmm(&["stop", &path, "--timeout", "100ms", "--json"]);
    assert!(output.status.success());
    assert!(text(&output.stderr).contains("didn't power off in time: ending it by force"));
    let ended: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(ended, json!({ "ended": "forced", "forced": true }));
    drop(vm);

    let vm = FakeVm::polite(Path::new(&path), "deaf", false);
    assert_eq!(world.says(&["stop", "--force", &path]), "");
    drop(vm);
}

#[test]
fn dead_and_silent_vms_are_listed_as_such() {
    let world = World::new();
    let (dead, silent) = (name("dead"), name("silent"));
    // The directory is made by whoever comes first.
    drop(FakeVm::polite(&world.socket(&dead), &dead, true));
    drop(UnixListener::bind(world.socket(&dead)).expect("a socket that dies"));
    let listener = UnixListener::bind(world.socket(&silent)).expect("a socket that says nothing");
    let list = world.says(&["list"]);
    fs::remove_file(world.socket(&dead)).expect("ours");
    fs::remove_file(world.socket(&silent)).expect("ours");
    drop(listener);
    for (name, state) in [(&dead, "dead"), (&silent, "busy")] {
        let row = list.lines().find(|line| line.starts_with(name.as_str())).expect("our row");
        assert_eq!(row.split_whitespace().nth(1), Some(state), "{list}");
    }
}
