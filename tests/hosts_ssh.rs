//! A stock guest moves to another host through OpenSSH, and outlives the connection that brought it. This file runs in
//! both of two emulated hosts at once: host 1 boots the guest, host 2 has the server.

#[path = "support/linux.rs"]
mod linux;
#[path = "support/load.rs"]
mod load;
#[path = "support/talk.rs"]
mod talk;
#[path = "support/travel.rs"]
mod travel;

use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use linux::{Guest, LONG, vmm};
use load::{Load, Told, tick};
use serde_json::{Value, json};
use talk::{Talk, until};
use travel::Trip;

const NAME: &str = "a_guest_outlives_the_ssh_that_brought_it";
/// The control socket there, and the console's.
const CONTROL: &str = "/run/wanderer.sock";
const CONSOLE: &str = "/run/wanderer.tty";

/// Makes a pair of keys; gives the public one.
fn make_key(path: &Path) -> String {
    let mut keygen = Command::new("ssh-keygen");
    keygen.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(path);
    let output = keygen.stdin(Stdio::null()).output().expect("ssh-keygen, of openssh-client");
    assert!(output.status.success(), "{output:?}");
    fs::read_to_string(path.with_extension("pub")).unwrap()
}

/// The id of the one process that runs a program of that name.
fn process(name: &str) -> i32 {
    let output = Command::new("pidof").arg(name).output().expect("pidof, of busybox");
    let ids = String::from_utf8(output.stdout).unwrap();
    ids.trim().parse().unwrap_or_else(|_| panic!("processes of {name}: {ids:?}"))
}

/// Host 1: the guest leaves, and then the ssh that it left through dies.
fn source() {
    let load = Load { writers: 1, writer_mib: 8, rest_ms: 50, ..Load::default() };
    let guest = Guest::new("6.12-cloud").cpus(2).mem("160M").file("load", load::program());
    let mut trip = Trip::start(guest.run(&load.script(NAME)));
    let mut talk = Talk::connect();
    let (key, said) = (trip.path("key"), trip.path("ssh"));
    talk.say(&json!(make_key(&key)));
    assert_eq!(talk.hear(), "listens");
    trip.type_line();
    trip.hears();
    // What is said there goes the way of ssh's standard error, as long as there is one.
    let uri = format!(
        "exec:ssh -i {} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null root@10.77.0.2 \
         VMM_LOG=debug {} migrate --listen stdio --control {CONTROL} 2>{}",
        key.display(),
        std::env::var("VMM_BIN").unwrap(),
        said.display()
    );
    let client = trip.start_move(&uri, &["--downtime-limit", "3s"]);
    trip.arrive(client, &uri);
    until("the destination's words come here", || {
        fs::read_to_string(&said).unwrap().contains(" is here").then_some(())
    });
    talk.say(&json!({ "console": trip.console() }));
    assert_eq!(talk.hear(), "lives");
    let ssh = rustix::process::Pid::from_raw(process("ssh")).unwrap();
    rustix::process::kill_process(ssh, rustix::process::Signal::KILL).unwrap();
    talk.say(&json!("killed"));
    assert_eq!(talk.hear(), "ended");
}

/// An sshd that lets root in with this key.
fn serve(dir: &Path, key: &str) -> Child {
    let path = |name: &str| dir.join(name);
    make_key(&path("host"));
    fs::write(path("keys"), key).unwrap();
    fs::write(path("config"), "UsePAM no\nStrictModes no\nPermitRootLogin prohibit-password\n")
        .unwrap();
    // Its user of no rights, and the directory where that one is shut in.
    let mut passwd = fs::File::options().append(true).open("/etc/passwd").unwrap();
    passwd.write_all(b"sshd:x:100:65534::/run/sshd:/bin/false\n").unwrap();
    fs::create_dir("/run/sshd").unwrap();
    fs::set_permissions("/run/sshd", Permissions::from_mode(0o755)).unwrap();
    let mut sshd = Command::new("/usr/bin/sshd");
    sshd.args(["-D", "-e", "-f"]).arg(path("config")).arg("-h").arg(path("host"));
    sshd.arg("-o").arg(format!("AuthorizedKeysFile={}", path("keys").display()));
    let sshd = sshd.spawn().expect("sshd, of openssh-server");
    until("sshd listens", || TcpStream::connect("127.0.0.1:22").ok());
    sshd
}

/// The guest's console, which is a socket, and all that it showed.
struct Console {
    socket: UnixStream,
    shown: String,
}

impl Console {
    fn connect(before: &Value) -> Self {
        let socket = UnixStream::connect(CONSOLE).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        Self { socket, shown: before.as_str().unwrap().to_owned() }
    }

    /// Reads on until something is so.
    #[track_caller]
    fn until(&mut self, what: &str, is_so: impl Fn(&str) -> bool) {
        let start = Instant::now();
        while !is_so(&self.shown) {
            let mut bytes = [0; 4096];
            // Nothing, for now or for ever.
            let count = self.socket.read(&mut bytes).unwrap_or(0);
            self.shown.push_str(&String::from_utf8_lossy(&bytes[..count]));
            assert!(start.elapsed() < LONG, "not in {LONG:?}: {what}: {}", self.shown);
        }
    }

    /// Types, and waits for the answer and for more of the guest's work.
    #[track_caller]
    fn lives(&mut self, line: u64) {
        self.socket.write_all(format!("{}\n", tick(line)).as_bytes()).unwrap();
        let before = self.shown.matches("\ntick ").count();
        self.until("the guest runs on", |shown| {
            shown.contains(&format!("\nheard {line} at "))
                && shown.matches("\ntick ").count() > before + 5
        });
    }
}

/// Whether the process is a child of init's.
fn is_orphan(pid: &Value) -> bool {
    let status = fs::read_to_string(PathBuf::from(format!("/proc/{pid}/status"))).unwrap();
    status.lines().any(|line| line == "PPid:\t1")
}

fn tell(command: &str) -> Vec<u8> {
    let output = vmm(&[command, CONTROL]).output().unwrap();
    assert!(output.status.success(), "vmm {command}: {output:?}");
    output.stdout
}

/// Host 2: serves, and has the guest in the end.
fn destination() {
    let dir = tempfile::tempdir().unwrap();
    let listener = Talk::listen();
    let mut talk = Talk::accept(&listener);
    let mut sshd = serve(dir.path(), talk.hear().as_str().unwrap());
    talk.say(&json!("listens"));
    let mut console = Console::connect(&talk.hear()["console"]);
    console.lives(1);
    let info = vmm(&["info", "--json", CONTROL]).output().unwrap();
    let info: Value = serde_json::from_slice(&info.stdout).unwrap();
    assert!(!is_orphan(&info["pid"]));
    talk.say(&json!("lives"));
    assert_eq!(talk.hear(), "killed");
    until("its session ends", || is_orphan(&info["pid"]).then_some(()));
    // It has words for a standard error that is gone.
    for command in ["pause", "resume"] {
        tell(command);
    }
    console.lives(2);
    console.socket.write_all(b"end\n").unwrap();
    console.until("the guest ends", |shown| shown.contains("\ninit: exit 0"));
    until("vmm ends, as it should", || (!Path::new(CONTROL).exists()).then_some(()));
    let shown = console.shown;
    for (number, line) in (0..).zip(shown.lines().filter(|line| line.starts_with("tick "))) {
        assert_eq!(line, tick(number), "{shown}");
    }
    assert!(!shown.contains("FAULT") && Told(shown).number("faults") == 0);
    sshd.kill().unwrap();
    sshd.wait().unwrap();
    talk.say(&json!("ended"));
}

#[test]
fn a_guest_outlives_the_ssh_that_brought_it() {
    if let Some(load) = Load::told() {
        return load::run(&load);
    }
    match std::env::var("HOST").expect("HOST: see tests/run").as_str() {
        "1" => source(),
        _ => destination(),
    }
}
