//! Moves between real processes: `vmm migrate --listen` as a child, and `--connect` as the VM's client.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::fd::OwnedFd;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::vm::{LONG, Place, Vm, binary};

impl Vm {
    /// Starts a destination at a UNIX socket, and gives its address when it listens there.
    pub fn listen(options: &[&str]) -> (Self, String) {
        let place = Place::new();
        let socket = place.path("move.sock");
        let uri = format!("unix:{}", socket.display());
        let vm = Self::listen_at(place, &uri, options);
        until("listens", || listens(&socket));
        (vm, uri)
    }

    /// As [`Self::listen`], at a free port of this host.
    pub fn listen_tcp(options: &[&str]) -> (Self, String) {
        Self::listen_tcp_at("127.0.0.1", options)
    }

    /// As [`Self::listen_tcp`], at an address.
    pub fn listen_tcp_at(host: &str, options: &[&str]) -> (Self, String) {
        let free = TcpListener::bind(format!("{host}:0")).unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let uri = format!("tcp:{host}:{port}");
        let vm = Self::listen_at(Place::new(), &uri, options);
        until("listens", || listens_tcp(port));
        (vm, uri)
    }

    /// Starts a listener that takes guest after guest, with this place as the directory of their sockets,
    /// unless that is root's.
    pub fn keep(options: &[&str]) -> (Self, String) {
        let place = Place::new();
        let socket = place.path("move.sock");
        let uri = format!("unix:{}", socket.display());
        let mut command = Command::new(binary());
        command.args(["migrate", "--listen", &uri, "--keep"]).args(options).env_remove("VMM_LOG");
        command.env("XDG_RUNTIME_DIR", place.path(""));
        let vm = Self::spawn(place, command);
        until("listens", || listens(&socket));
        (vm, uri)
    }

    fn listen_at(place: Place, uri: &str, options: &[&str]) -> Self {
        let mut command = Command::new(binary());
        command.args(["migrate", "--listen", uri]).args(options).env_remove("VMM_LOG");
        command.arg("--control").arg(place.path("vm.sock"));
        Self::spawn(place, command)
    }

    /// The command that moves this VM.
    pub fn move_command(&self, uri: &str, options: &[&str]) -> Command {
        let mut command = Command::new(binary());
        command.args(["migrate", "--connect", uri]).arg(self.place.path("vm.sock"));
        command.args(options).env_remove("VMM_LOG");
        command
    }

    /// Starts to move this VM.
    pub fn start_move(&self, uri: &str, options: &[&str]) -> Client {
        let mut command = self.move_command(uri, options);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Client { child: command.spawn().unwrap() }
    }

    /// Moves this VM, or not: says how the client ended.
    pub fn try_move(&self, uri: &str, options: &[&str]) -> Answer {
        self.start_move(uri, options).wait()
    }

    /// Moves this VM, and gives what it printed until it had gone.
    #[track_caller]
    pub fn move_to(&mut self, uri: &str, options: &[&str]) -> Vec<u8> {
        let mut client = self.start_move(uri, options);
        let mut printed = Vec::new();
        loop {
            let ended = client.child.try_wait().unwrap();
            let more = self.read(Duration::from_millis(50));
            printed.extend(&more);
            match ended {
                Some(status) if !status.success() => break,
                Some(_) => {
                    printed.extend(self.read_to_end());
                    break;
                }
                // The end of the output comes before the client's.
                None if more.is_empty() => std::thread::sleep(Duration::from_millis(1)),
                None => {}
            }
        }
        client.wait().check_moved();
        printed
    }

    /// What `vmm info` tells.
    pub fn info(&self) -> Value {
        serde_json::from_str(&self.tell(&["info", "--json"])).unwrap()
    }

    /// Waits until pre-copy has sent something, and some is left.
    pub fn until_pre_copy(&self) {
        until("is in pre-copy", || {
            let info = self.info();
            info["migration"]["stage"] == "pre-copy"
                && info["migration"]["bytes"].as_u64() > Some(0)
        });
    }
}

/// A limit that a busy machine meets too.
pub const EASY: [&str; 2] = ["--downtime-limit", "10s"];

/// A live snapshot with that limit.
pub const LIVE: [&str; 3] = ["--live", "--downtime-limit", "10s"];

/// What `vmm migrate --listen` says that can't listen there.
pub fn listen_output(uri: &str) -> Output {
    let mut command = Command::new(binary());
    command.args(["migrate", "--listen", uri]).stdin(Stdio::null()).output().unwrap()
}

/// Whether somebody listens there: the socket is there a moment before.
pub fn listens(socket: &Path) -> bool {
    // Columns: number, references, protocol, flags (0x10000: it listens), type, state, inode, path.
    std::fs::read_to_string("/proc/net/unix").unwrap().lines().any(|line| {
        let columns: Vec<_> = line.split_whitespace().collect();
        columns.get(3) == Some(&"00010000") && columns.get(7).map(Path::new) == Some(socket)
    })
}

/// Whether somebody listens at this port, at whatever address.
fn listens_tcp(port: u16) -> bool {
    let read = |table| std::fs::read_to_string(table).unwrap_or_default();
    let tables = read("/proc/net/tcp") + &read("/proc/net/tcp6");
    let end = format!(":{port:04X}");
    // Columns: number, local address, remote address, state (0A: it listens).
    tables.lines().any(|line| {
        let columns: Vec<_> = line.split_whitespace().collect();
        columns.get(3) == Some(&"0A") && columns.get(1).is_some_and(|local| local.ends_with(&end))
    })
}

/// Waits until something is so.
pub fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < LONG, "it never {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// `vmm migrate --connect` that runs.
pub struct Client {
    child: Child,
}

impl Client {
    /// Interrupts it, as Ctrl-C does.
    pub fn interrupt(&self) {
        let pid = i32::try_from(self.child.id()).unwrap();
        kill_process(Pid::from_raw(pid).unwrap(), Signal::INT).unwrap();
    }

    /// Kills it.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Reads the progress that it tells as JSON until that is so, or it tells no more. [`Self::wait`] gives the rest.
    pub fn until_told(&mut self, mut is_so: impl FnMut(&Value) -> bool) {
        let err = self.child.stderr.as_mut().unwrap();
        // Byte by byte: what comes after the line is left there.
        let mut lines = BufReader::with_capacity(1, err).lines();
        lines.any(|line| is_so(&serde_json::from_str(&line.unwrap()).unwrap_or_default()));
    }

    /// Waits for its end.
    pub fn wait(self) -> Answer {
        let Output { status, stdout, stderr } = self.child.wait_with_output().unwrap();
        Answer {
            status: status.code(),
            out: String::from_utf8(stdout).unwrap(),
            err: String::from_utf8(stderr).unwrap(),
        }
    }
}

/// How a client ended.
#[derive(Debug)]
pub struct Answer {
    /// Its exit status.
    pub status: Option<i32>,
    /// What it said.
    pub out: String,
    /// What it told on standard error.
    pub err: String,
}

impl Answer {
    /// The VM moved.
    #[track_caller]
    pub fn check_moved(&self) -> &Self {
        assert_eq!(self.status, Some(0), "{self:?}");
        assert!(self.out.starts_with("moved "), "{self:?}");
        self
    }

    /// The VM stayed, and one line says why, with these words in it.
    #[track_caller]
    pub fn check_failed(&self, words: &[&str]) {
        assert_eq!((self.status, self.out.as_str()), (Some(1), ""), "{self:?}");
        check_last_line(&self.err, words);
    }
}

/// What a destination says where a second source comes.
const ANOTHER: &str = "another source is refused: a migration is under way here";

/// The last line is about what went wrong and holds these words; those before tell of stages, or of another source, only.
#[track_caller]
pub fn check_last_line(err: &str, words: &[&str]) {
    let last = err.lines().last().unwrap_or_default();
    for word in words {
        assert!(last.contains(word), "no {word:?} in {err}");
    }
    let known =
        ["pre-migration", "reservation", "pre-copy", "stop-and-copy", "commitment", ANOTHER];
    for line in err.lines().rev().skip(1) {
        let said = line.strip_prefix("vmm: ");
        assert!(said.is_some_and(|said| known.contains(&said)), "{line:?} in {err}");
    }
}

/// Checks that each byte of the counter's output is one more than the one before, over many outputs.
#[derive(Default)]
pub struct Count(u8);

impl Count {
    /// Takes what was printed next.
    #[track_caller]
    pub fn check(&mut self, bytes: &[u8]) {
        for (at, byte) in bytes.iter().enumerate() {
            assert_eq!(*byte, self.0, "byte {at} of {}: lost or doubled", bytes.len());
            self.0 = self.0.wrapping_add(1);
        }
    }
}

/// Connections that fill a listener's queue, as long as they last.
pub fn fill(listener: &Path) -> Vec<OwnedFd> {
    let address = SocketAddrUnix::new(listener).unwrap();
    let flags = SocketFlags::NONBLOCK;
    let socket = || socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
    let knock = || Some(socket()).filter(|socket| connect(socket, &address).is_ok());
    std::iter::from_fn(knock).collect()
}
