//! A stock guest that goes from one VMM process to the next, and back, and what must be true of each move.
//! Its console is one text, in as many files as it had processes.

#![allow(dead_code, reason = "each test program uses a part")]

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{PipeReader, PipeWriter, Write, pipe};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::linux::{Guest, LONG, vmm};
use crate::load::{ClockWord, Told, pace, tick};

/// How long to wait between two looks at something.
const LOOK: Duration = Duration::from_millis(20);

/// What carries a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    Tcp,
    Unix,
}

/// A guest on its way. Dropping it kills its processes.
pub struct Trip {
    guest: Guest,
    stays: Vec<Stay>,
    /// The one that has the guest.
    here: usize,
    /// One keyboard for all: each process reads from this pipe what the guest takes, and no more.
    keys: PipeWriter,
    keyboard: PipeReader,
    /// Lines typed on the console, and what it showed before this trip began.
    typed: u64,
    before: String,
    /// What the destinations to come log (VMM_LOG), if not what users see.
    pub log: &'static str,
}

/// A process that has, had or awaits the guest.
struct Stay {
    child: Child,
}

impl Drop for Stay {
    fn drop(&mut self) {
        // Either fails only for one that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Trip {
    /// Boots the guest, and waits until its program is at work.
    pub fn start(guest: Guest) -> Self {
        let command = guest.command();
        let mut trip = Self::new(guest);
        trip.spawn(command);
        trip.until("the guest's program starts", |trip| trip.console().contains("\ntick 000010 "));
        trip
    }

    fn new(guest: Guest) -> Self {
        let (keyboard, keys) = pipe().unwrap();
        Self {
            guest,
            stays: Vec::new(),
            here: 0,
            keys,
            keyboard,
            typed: 0,
            before: String::new(),
            log: "",
        }
    }

    /// Awaits a guest from another host at that port of this one.
    #[track_caller]
    pub fn expect(port: u16, options: &[&str]) -> Self {
        let mut trip = Self::new(Guest::new("6.12-cloud"));
        trip.listen_at(&format!("tcp:0.0.0.0:{port}"), options);
        trip.until("it listens", |_| listens("00000000", port));
        trip
    }

    /// The guest has come: what its console showed on the other host, and how many lines were typed there.
    pub fn take_over(&mut self, before: String, typed: u64) {
        (self.before, self.typed) = (before, typed);
    }

    fn spawn(&mut self, mut command: Command) {
        let number = self.stays.len();
        let file = |name: &str| File::create(self.guest.path(&format!("{name}.{number}"))).unwrap();
        command.stdin(self.keyboard.try_clone().unwrap());
        let child = command.stdout(file("console")).stderr(file("stderr")).spawn().unwrap();
        self.stays.push(Stay { child });
    }

    /// A path in the guest's own directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.guest.path(name)
    }

    fn control(&self, stay: usize) -> PathBuf {
        self.path(&if stay == 0 { "vmm.sock".to_owned() } else { format!("vmm.{stay}.sock") })
    }

    fn read(&self, name: &str, stay: usize) -> String {
        let bytes = fs::read(self.path(&format!("{name}.{stay}"))).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// All that the console showed, wherever the guest was.
    pub fn console(&self) -> String {
        let here = (0..self.stays.len()).map(|stay| self.read("console", stay));
        std::iter::once(self.before.clone()).chain(here).collect()
    }

    /// What it showed where it is now.
    pub fn console_here(&self) -> String {
        self.read("console", self.here)
    }

    /// What the process that has the guest said and logged.
    pub fn said_here(&self) -> String {
        self.read("stderr", self.here)
    }

    /// Fails with everything that was said.
    #[track_caller]
    pub fn fail(&self, what: &str) -> ! {
        let mut all = format!("{what} (the guest is in process {})\n", self.here);
        for stay in 0..self.stays.len() {
            let (stderr, console) = (self.read("stderr", stay), self.read("console", stay));
            writeln!(all, "--- stderr {stay}\n{stderr}--- console {stay}\n{console}---").unwrap();
        }
        panic!("{all}")
    }

    /// Fails so unless `condition`.
    #[track_caller]
    pub fn check(&self, condition: bool, what: &str) {
        if !condition {
            self.fail(what);
        }
    }

    /// Waits until something is so, while the process that has the guest lives.
    #[track_caller]
    pub fn until(&mut self, what: &str, mut is_so: impl FnMut(&Self) -> bool) {
        let start = Instant::now();
        loop {
            let ended = self.stays[self.here].child.try_wait().unwrap();
            if is_so(self) {
                return;
            }
            if let Some(status) = ended {
                self.fail(&format!("ended with {status} before this: {what}"));
            }
            self.check(start.elapsed() < LONG, &format!("not in {LONG:?}: {what}"));
            sleep(LOOK);
        }
    }

    /// Waits for some ticks more, and that none comes from elsewhere.
    #[track_caller]
    pub fn goes_on(&mut self) {
        let before = self.console_here().matches("\ntick ").count();
        self.until("the guest runs on", |trip| {
            trip.console_here().matches("\ntick ").count() > before + 5
        });
    }

    /// Types the next line on the console.
    pub fn type_line(&mut self) {
        let line = format!("{}\n", tick(self.typed));
        self.keys.write_all(line.as_bytes()).unwrap();
        self.typed += 1;
    }

    /// Whether the guest has heard all that was typed.
    pub fn has_heard(&self) -> bool {
        self.console().contains(&format!("\nheard {} at ", self.typed - 1))
    }

    /// Waits for that.
    #[track_caller]
    pub fn hears(&mut self) {
        self.until("the guest hears what was typed", Self::has_heard);
    }

    /// Runs `vmm COMMAND` for the process that has the guest.
    pub fn tell(&self, command: &[&str]) -> Output {
        vmm(command).arg(self.control(self.here)).output().unwrap()
    }

    /// As [`Self::tell`], which must succeed; gives what it said.
    #[track_caller]
    pub fn ask(&self, command: &[&str]) -> String {
        let output = self.tell(command);
        self.check(output.status.success(), &format!("vmm {command:?}: {output:?}"));
        String::from_utf8(output.stdout).unwrap()
    }

    /// What `vmm info` tells.
    #[track_caller]
    pub fn info(&self) -> Value {
        serde_json::from_str(&self.ask(&["info", "--json"])).unwrap()
    }

    /// Starts a destination, and gives its address when it listens there.
    #[track_caller]
    pub fn listen(&mut self, link: Link, options: &[&str]) -> String {
        let number = self.stays.len();
        let socket = self.path(&format!("move.{number}.sock"));
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let uri = match link {
            Link::Tcp => format!("tcp:127.0.0.1:{port}"),
            Link::Unix => format!("unix:{}", socket.display()),
        };
        self.listen_at(&uri, options);
        self.until("the destination listens", |_| match link {
            Link::Tcp => listens("0100007F", port),
            Link::Unix => socket.exists(),
        });
        uri
    }

    fn listen_at(&mut self, uri: &str, options: &[&str]) {
        let mut command = vmm(&["migrate", "--listen", uri]);
        command.args(options).arg("--control").arg(self.control(self.stays.len()));
        command.env("VMM_LOG", self.log);
        self.spawn(command);
    }

    /// Starts to move the guest.
    pub fn start_move(&self, uri: &str, options: &[&str]) -> Child {
        let mut command = vmm(&["migrate", "--json", "--connect", uri]);
        command.arg(self.control(self.here)).args(options);
        let progress = File::create(self.path("progress")).unwrap();
        command.stdout(Stdio::piped()).stderr(progress).spawn().unwrap()
    }

    /// What the client of a move has told on its way.
    pub fn progress(&self) -> String {
        fs::read_to_string(self.path("progress")).unwrap()
    }

    /// Waits for the end of a move to the newest destination, which must succeed, and gives its report. The
    /// source has ended as it should.
    #[track_caller]
    pub fn arrive(&mut self, client: Child, uri: &str) -> Value {
        let output = client.wait_with_output().unwrap();
        self.check(
            output.status.success(),
            &format!("vmm migrate: {output:?}, {}", self.progress()),
        );
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        self.check(report["outcome"] == "moved", &format!("it says {report}"));
        self.wait_for_end(0);
        let word = format!("vmm: the guest moved to {uri} with a downtime of ");
        let stderr = self.read("stderr", self.here);
        // One that took the guest in told of the stages first.
        let mut said = stderr.lines().filter(|line| !line.starts_with("vmm: debug: "));
        let last = said.next_back().unwrap_or_default();
        self.check(last.starts_with(&word), "the source's last word");
        self.check(!self.control(self.here).exists(), "the source's control socket is removed");
        let rounds = report["rounds"].as_array().unwrap();
        let throttles = rounds.iter().filter_map(|round| round["throttle_percent"].as_array());
        eprintln!(
            "from process {}: {} ms, {} KiB, {} rounds, downtime {} us, the guest saw {} us, throttle at most {:?} %",
            self.here,
            report["total_us"].as_u64().unwrap() / 1000,
            report["sent_bytes"].as_u64().unwrap() >> 10,
            rounds.len(),
            report["downtime"]["total_us"],
            report["guest_stall_us"],
            throttles.flatten().filter_map(Value::as_u64).max(),
        );
        self.here = self.stays.len() - 1;
        report
    }

    /// Moves the guest on. Somebody types all the while.
    #[track_caller]
    pub fn move_on(&mut self, link: Link, there: &[&str], options: &[&str]) -> Value {
        let uri = self.listen(link, there);
        let mut client = self.start_move(&uri, options);
        while client.try_wait().unwrap().is_none() {
            self.type_line();
            sleep(Duration::from_millis(100));
        }
        let report = self.arrive(client, &uri);
        self.type_line();
        self.goes_on();
        self.hears();
        report
    }

    /// The last that the guest told of its clock; after a move of one that was measured there alone.
    #[track_caller]
    pub fn clock(&mut self) -> ClockWord {
        let words = |trip: &Self| {
            let console = trip.console_here();
            let lines = console.split_inclusive('\n').filter(|line| line.ends_with('\n'));
            lines.filter_map(ClockWord::parse).collect::<Vec<_>>()
        };
        // The first may have been measured before a move.
        self.until("the guest tells of its clock", |trip| words(trip).len() >= 2);
        *words(self).last().unwrap()
    }

    /// Waits for the end of the process that has the guest, with that status.
    #[track_caller]
    pub fn wait_for_end(&mut self, status: i32) {
        let start = Instant::now();
        let ended = loop {
            match self.stays[self.here].child.try_wait().unwrap() {
                Some(ended) => break ended,
                None if start.elapsed() > LONG => self.fail(&format!("it runs on after {LONG:?}")),
                None => sleep(LOOK),
            }
        };
        self.check(ended.code() == Some(status), &format!("it ended with {ended}, not {status}"));
    }

    /// Waits for the end of a destination that came to nothing, and forgets it; gives what it said.
    #[track_caller]
    pub fn forget_destination(&mut self) -> String {
        let here = self.here;
        self.here = self.stays.len() - 1;
        self.wait_for_end(1);
        let (said, shown) = (self.read("stderr", self.here), self.read("console", self.here));
        self.check(shown.is_empty(), "a destination without a guest has a console");
        self.stays.pop();
        self.here = here;
        said
    }

    /// Ends the guest's program; the guest powers off. Its console must be whole, and nobody have a fault to
    /// tell.
    #[track_caller]
    pub fn finish(&mut self) -> Told {
        self.keys.write_all(b"end\n").unwrap();
        self.wait_for_end(0);
        let console = self.console();
        self.check(console.contains("\ninit: exit 0"), "the script failed");
        self.check(!console.contains("FAULT"), "the guest has found something wrong");
        self.check_lines(&console);
        let told = Told(console);
        self.check(told.number("faults") == 0, "faults");
        let (before, after) = (told.text("clocksource"), told.text("clocksource_after"));
        self.check(before == after, "the guest gave up its clocksource");
        told
    }

    /// Each line that the program printed is one it prints, and the numbered ones are all there in order.
    fn check_lines(&self, console: &str) {
        let (_, rest) = console.split_once("\nload: starts on ").unwrap();
        let (lines, _) = rest.split_once("\r\nload: ends\r\n").unwrap();
        let (mut ticks, mut heard) = (0, 0);
        for line in lines.split("\r\n").skip(1) {
            if line == tick(ticks) {
                ticks += 1;
            } else if line.starts_with(&format!("heard {heard} at ")) {
                heard += 1;
            } else if ClockWord::parse(line).is_none() && pace(line).is_none() {
                self.fail(&format!(
                    "{line:?} on the console, before tick {ticks}, after {heard} heard"
                ));
            }
        }
        self.check(heard == self.typed, &format!("{heard} lines heard of {}", self.typed));
    }
}

/// Whether somebody listens there. The address is as the kernel shows it: in hexadecimal, as it lies in
/// memory.
fn listens(address: &str, port: u16) -> bool {
    // 0A is LISTEN.
    let entry = format!("{address}:{port:04X} 00000000:0000 0A");
    fs::read_to_string("/proc/net/tcp").unwrap().contains(&entry)
}
