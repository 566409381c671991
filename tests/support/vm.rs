//! `vmm run` as a child process: started on a tiny guest, told things by `vmm`'s own commands, its console
//! on pipes. Dropping it kills it.

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};

use super::guests::Guest;

/// How long anything may take that happens at once. Long, for the machine may be busy.
pub const LONG: Duration = Duration::from_secs(60);

/// The binary under test.
pub fn binary() -> PathBuf {
    let binary = std::env::var_os("VMM_BIN");
    binary.unwrap_or_else(|| env!("CARGO_BIN_EXE_vmm").into()).into()
}

/// Whether this host has a KVM. It must, unless `NO_KVM=1` says aloud that it need not.
pub fn has_kvm() -> bool {
    if std::env::var_os("NO_KVM").is_some_and(|v| v == "1") {
        eprintln!("NO_KVM=1: not tested");
        return false;
    }
    assert!(
        std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok(),
        "/dev/kvm is needed; NO_KVM=1 leaves these tests out"
    );
    true
}

/// A directory with what one VM needs.
pub struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    /// A fresh one.
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    /// The path of a file in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `vmm run` of a guest, with more options.
    pub fn run(&self, guest: Guest, options: &[&str]) -> Command {
        let mut command = Command::new(binary());
        command.arg("run").arg("--kernel").arg(guest.write_to(self.dir.path()));
        command.arg("--control").arg(self.path("vm.sock")).args(options);
        if !options.contains(&"--mem") {
            command.args(["--mem", "64M"]);
        }
        command.env_remove("VMM_LOG");
        command
    }

    /// `vmm restore` of a snapshot, with more options.
    pub fn restore(&self, snapshot: &Path, options: &[&str]) -> Command {
        let mut command = Command::new(binary());
        command.arg("restore").arg(snapshot).arg("--control").arg(self.path("vm.sock"));
        command.args(options).env_remove("VMM_LOG");
        command
    }

    /// A command of `vmm`'s for the VM that runs here.
    pub fn tell(&self, command: &[&str]) -> Output {
        self.client(command).output().unwrap()
    }

    /// The same, to be started.
    pub fn client(&self, command: &[&str]) -> Command {
        let (first, rest) = command.split_first().unwrap();
        let mut client = Command::new(binary());
        client.arg(first).arg(self.path("vm.sock")).args(rest).stdin(Stdio::null());
        client.stdout(Stdio::piped()).stderr(Stdio::piped());
        client
    }
}

/// A VM that runs.
pub struct Vm {
    /// Its files.
    pub place: Place,
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Option<ChildStdout>,
}

impl Vm {
    /// Starts `vmm run` of a guest with its console on pipes.
    pub fn start(guest: Guest, options: &[&str]) -> Self {
        let place = Place::new();
        let command = place.run(guest, options);
        Self::spawn(place, command)
    }

    /// As [`Self::start`], where the pipe of the console's output holds no more than a page. (Once the guest prints, more may
    /// lie in it than it could still be made to hold.)
    pub fn start_narrow(guest: Guest, options: &[&str]) -> Self {
        let place = Place::new();
        let mut command = place.run(guest, options);
        let (stdout, theirs) = std::io::pipe().unwrap();
        rustix::pipe::fcntl_setpipe_size(&theirs, 4096).unwrap();
        command.stdin(Stdio::piped()).stdout(theirs).stderr(Stdio::piped());
        let mut vm = Self::become_vm(place, command);
        vm.stdout = Some(OwnedFd::from(stdout).into());
        vm
    }

    /// Starts `vmm restore` of a snapshot with its console on pipes.
    pub fn restore(snapshot: &Path, options: &[&str]) -> Self {
        let place = Place::new();
        let command = place.restore(snapshot, options);
        Self::spawn(place, command)
    }

    /// Starts a command of `vmm`'s that becomes a VM, with its console on pipes.
    pub fn spawn(place: Place, mut command: Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Self::become_vm(place, command)
    }

    fn become_vm(place: Place, mut command: Command) -> Self {
        let mut child = command.spawn().unwrap();
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        Self { place, child, stdin, stdout }
    }

    /// Types on the console.
    pub fn type_in(&mut self, text: &[u8]) {
        self.stdin.as_mut().expect("not closed").write_all(text).unwrap();
    }

    /// Ends the console's input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Closes the reading end of the console's output.
    pub fn close_stdout(&mut self) {
        self.stdout = None;
    }

    /// What the guest prints next: at least one byte; empty at the end, or if nothing comes in time.
    pub fn read(&mut self, timeout: Duration) -> Vec<u8> {
        let stdout = self.stdout.as_mut().expect("not closed");
        let timeout = Timespec::try_from(timeout).unwrap();
        let mut fds = [PollFd::from_borrowed_fd(stdout.as_fd(), PollFlags::IN)];
        if poll(&mut fds, Some(&timeout)).unwrap() == 0 {
            return Vec::new();
        }
        let mut buffer = vec![0; 64 << 10];
        let count = stdout.read(&mut buffer).unwrap();
        buffer.truncate(count);
        buffer
    }

    /// The next `count` bytes that the guest prints, or a few more.
    pub fn read_some(&mut self, count: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < count {
            let more = self.read(LONG);
            if more.is_empty() {
                panic!("after {} of {count} bytes nothing comes: {:?}", all.len(), self.wait());
            }
            all.extend(more);
        }
        all
    }

    /// All that the guest prints until the VM ends.
    pub fn read_to_end(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            match self.read(LONG) {
                more if more.is_empty() => return all,
                more => all.extend(more),
            }
        }
    }

    /// A command of `vmm`'s that succeeds; gives what it says.
    pub fn tell(&self, command: &[&str]) -> String {
        let output = self.place.tell(command);
        let (out, err) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{command:?}: {out}{err}");
        out.into_owned()
    }

    /// Waits until its control socket answers.
    pub fn wait_until_up(&self) {
        let start = Instant::now();
        while !self.place.tell(&["info"]).status.success() {
            assert!(start.elapsed() < LONG, "the VM doesn't come up");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Whether its process has a thread of this name.
    pub fn has_thread(&self, name: &str) -> bool {
        self.thread(name).is_some()
    }

    /// The number of its process's thread of this name.
    pub fn thread(&self, name: &str) -> Option<String> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap().flatten();
        let called = |task: &std::fs::DirEntry| {
            std::fs::read_to_string(task.path().join("comm"))
                .is_ok_and(|found| found.trim() == name)
        };
        tasks.into_iter().find(called).map(|task| task.file_name().into_string().unwrap())
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).unwrap();
        kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
    }

    /// What kills it, from another thread, while it isn't waited for. Nothing of it runs any more afterwards.
    pub fn killer(&self) -> impl FnOnce() + Send + 'static {
        let (kill, pid) = (self.signaller(Signal::KILL), self.pid());
        move || {
            kill();
            waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT).unwrap();
        }
    }

    /// As [`Self::killer`], with another signal.
    pub fn signaller(&self, signal: Signal) -> impl FnOnce() + Send + 'static {
        let pid = self.pid();
        move || kill_process(pid, signal).unwrap()
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap()
    }

    /// Waits for the end; gives the exit status and what was said on standard error.
    pub fn wait(&mut self) -> (Option<i32>, String) {
        self.wait_for(LONG)
    }

    /// As [`Self::wait`], within a time.
    pub fn wait_for(&mut self, timeout: Duration) -> (Option<i32>, String) {
        let start = Instant::now();
        let status = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break status,
                None if start.elapsed() > timeout => panic!("the VM doesn't end"),
                None => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        let mut stderr = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
        (status.code(), stderr)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // Either fails only for a VM that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
