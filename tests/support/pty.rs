//! A pseudo-terminal, with a program on it whose controlling terminal it is.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

/// The modes that a shell leaves behind and a raw terminal lacks.
pub const COOKED: LocalModes = LocalModes::ECHO.union(LocalModes::ICANON).union(LocalModes::ISIG);

/// A terminal and the program on it.
pub struct Pty {
    user: File,
    /// Held open, so that its modes can be read after the program is gone.
    terminal: OwnedFd,
    /// How long to wait for the next byte.
    pub patience: Duration,
    /// The program.
    pub child: Child,
}

impl Pty {
    /// Starts a program with its three standard streams on a new terminal.
    pub fn spawn(program: &Command) -> Self {
        Self::sized(program, 0)
    }

    /// As [`Self::spawn`]; the terminal says that it has so many columns.
    pub fn sized(program: &Command, columns: u16) -> Self {
        let user = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&user).unwrap();
        unlockpt(&user).unwrap();
        let name = ptsname(&user, Vec::new()).unwrap().into_string().unwrap();
        let open = OpenOptions::new().read(true).write(true).open(&name).unwrap();
        let terminal: OwnedFd = open.into();
        let size = Winsize { ws_row: 24, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&terminal, size).unwrap();
        let stdio = || terminal.try_clone().unwrap();
        // Not the leader of a process group, setsid becomes the program without a fork.
        let mut command = Command::new("setsid");
        command.arg("-c").arg(program.get_program()).args(program.get_args());
        for (name, value) in program.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command.stdin(stdio()).stdout(stdio()).stderr(stdio());
        let child = command.spawn().expect("setsid is there");
        Self { user: File::from(user), terminal, patience: Duration::from_secs(60), child }
    }

    /// The terminal's modes.
    pub fn modes(&self) -> LocalModes {
        tcgetattr(&self.terminal).unwrap().local_modes
    }

    /// Types.
    pub fn type_in(&mut self, keys: &[u8]) {
        self.user.write_all(keys).unwrap();
    }

    /// Waits until the program has read all that was typed.
    #[allow(dead_code, reason = "each test program uses a part")]
    pub fn until_read(&self) {
        let start = Instant::now();
        while rustix::io::ioctl_fionread(&self.terminal).unwrap() > 0 {
            assert!(start.elapsed() < self.patience, "the program doesn't read");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Reads what the program shows, until `text` is among it.
    pub fn read_until(&mut self, text: &str) -> String {
        let mut seen = Vec::new();
        let patience = Timespec::try_from(self.patience).unwrap();
        while !String::from_utf8_lossy(&seen).contains(text) {
            let mut fds = [PollFd::new(&self.user, PollFlags::IN)];
            let ready = poll(&mut fds, Some(&patience)).unwrap();
            assert_eq!(
                ready,
                1,
                "{text:?} doesn't come after {:?}",
                String::from_utf8_lossy(&seen)
            );
            let mut byte = [0];
            assert_eq!(self.user.read(&mut byte).unwrap(), 1);
            seen.push(byte[0]);
        }
        String::from_utf8_lossy(&seen).into_owned()
    }

    /// Reads what else the program shows until it ends; gives its exit status too.
    #[allow(dead_code, reason = "each test program uses a part")]
    pub fn read_to_end(&mut self) -> (Option<i32>, String) {
        let (start, mut seen) = (Instant::now(), Vec::new());
        loop {
            let ended = self.child.try_wait().unwrap();
            let mut fds = [PollFd::new(&self.user, PollFlags::IN)];
            let soon = Timespec::try_from(Duration::from_millis(20)).unwrap();
            if poll(&mut fds, Some(&soon)).unwrap() > 0 {
                let mut bytes = [0; 4096];
                let count = self.user.read(&mut bytes).unwrap();
                seen.extend(&bytes[..count]);
            } else if let Some(status) = ended {
                return (status.code(), String::from_utf8_lossy(&seen).into_owned());
            }
            let shown = String::from_utf8_lossy(&seen);
            assert!(start.elapsed() < self.patience, "it doesn't end after {shown:?}");
        }
    }
}
