//! A VMM's process: started, its console read with the time of each piece, killed in the end.

use std::fs::OpenOptions;
use std::io::Read;
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use crate::Result;

/// A VMM that has not shown what it should by then is taken for stuck.
pub const WAIT_MAX: Duration = Duration::from_secs(180);
/// What all say on standard error while a figure is taken: shown if it fails.
pub const ERRORS: &str = "/tmp/bench.stderr";
/// A mapping of at least this size that is no file is the guest's RAM; VMMs' own are far smaller.
const GUEST_RAM_MIN_KIB: u64 = 48 * 1024;

/// A process whose standard output is watched. It is killed when this is dropped.
pub struct Watched {
    child: Child,
    /// Just before it was started.
    pub start: Instant,
    pieces: Receiver<(Instant, Vec<u8>)>,
    /// All that it printed.
    text: Vec<u8>,
    /// When the text had grown to which length.
    times: Vec<(usize, Instant)>,
}

impl Watched {
    /// Starts it.
    pub fn spawn(command: &mut Command) -> Result<Self> {
        let errors = OpenOptions::new().create(true).append(true).open(ERRORS)?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(errors);
        let start = Instant::now();
        let mut child = command.spawn().map_err(|e| format!("{:?}: {e}", command.get_program()))?;
        let mut output = child.stdout.take().expect("the output is piped");
        let (send, pieces) = mpsc::channel();
        // The thread ends with the pipe: it reads on, so that the guest never waits for us.
        std::thread::spawn(move || {
            let mut piece = [0; 4096];
            while let Ok(count @ 1..) = output.read(&mut piece) {
                let _ = send.send((Instant::now(), piece[..count].to_vec()));
            }
        });
        Ok(Self { child, start, pieces, text: Vec::new(), times: Vec::new() })
    }

    /// Takes in what it prints, up to a moment; false at its end.
    fn read_until(&mut self, deadline: Instant) -> bool {
        match self.pieces.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok((at, piece)) => {
                self.text.extend(piece);
                self.times.push((self.text.len(), at));
                true
            }
            Err(RecvTimeoutError::Timeout) => true,
            Err(RecvTimeoutError::Disconnected) => false,
        }
    }

    /// Lets it be for so long, or until it prints no more: whether it may still.
    pub fn watch_for(&mut self, time: Duration) -> bool {
        let deadline = Instant::now() + time;
        let mut prints = true;
        while prints && Instant::now() < deadline {
            prints = self.read_until(deadline);
        }
        prints
    }

    /// When a text was there ("": anything).
    pub fn wait_for(&mut self, wanted: &str) -> Result<Instant> {
        let deadline = Instant::now() + WAIT_MAX;
        let mut searched = 0;
        loop {
            let len = wanted.len().max(1);
            let found = match wanted {
                "" => (!self.text.is_empty()).then_some(0),
                _ => self.text[searched..].windows(len).position(|w| w == wanted.as_bytes()),
            };
            if let Some(at) = found {
                let end = searched + at + len;
                let (_, at) = self.times.iter().find(|(reached, _)| *reached >= end).expect("read");
                return Ok(*at);
            }
            searched = self.text.len().saturating_sub(len - 1);
            if !self.read_until(deadline) || Instant::now() >= deadline {
                let text = self.text();
                return Err(format!("{wanted:?} never came; it printed:\n{text}").into());
            }
        }
    }

    /// Waits for its end.
    pub fn wait_for_end(&mut self) -> Result<String> {
        let deadline = Instant::now() + WAIT_MAX;
        while self.read_until(deadline) {
            if Instant::now() >= deadline {
                return Err(format!("it doesn't end; it printed:\n{}", self.text()).into());
            }
        }
        let status = self.child.wait()?;
        if status.success() {
            Ok(self.text())
        } else {
            Err(format!("{status}: {}", self.text()).into())
        }
    }

    /// All that it printed.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.text).replace('\r', "")
    }

    /// What it printed from some moment on.
    pub fn text_since(&self, moment: Instant) -> String {
        let before = self.times.iter().take_while(|(_, at)| *at < moment).last();
        let from = before.map_or(0, |(length, _)| *length);
        String::from_utf8_lossy(&self.text[from..]).replace('\r', "")
    }

    /// When it printed the last that was taken in.
    pub fn last(&self) -> Option<Instant> {
        self.times.last().map(|(_, at)| *at)
    }

    /// KiB of anonymous memory: the guest's RAM, a file, is not among it. Quick, however large that is.
    pub fn own_anonymous_kib(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
        Ok(line.ok_or("no RssAnon")?.trim().trim_end_matches(" kB").parse()?)
    }

    /// KiB of its own that are resident: the guest's RAM is left out.
    pub fn own_memory_kib(&self) -> Result<u64> {
        let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", self.child.id()))?;
        Ok(own_memory_kib(&smaps))
    }
}

/// The longest time without output, of processes whose outputs follow each other, from some moment on.
pub fn longest_gap(ends: &[&Watched], since: Instant) -> Duration {
    let times = ends.iter().flat_map(|end| &end.times).map(|(_, at)| *at).filter(|at| *at >= since);
    let times: Vec<Instant> = times.collect();
    let gaps = times.windows(2).map(|pair| pair[1].saturating_duration_since(pair[0]));
    gaps.max().unwrap_or(WAIT_MAX)
}

impl Drop for Watched {
    fn drop(&mut self) {
        // It may be gone already; then there is nothing to end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sums what is resident in a process's smaps (proc(5)), the guest's RAM left out.
fn own_memory_kib(smaps: &str) -> u64 {
    let (mut sum, mut is_file, mut size_kib) = (0, false, 0);
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let key = words.next().unwrap_or_default();
        let number = || words.clone().next().and_then(|word| word.parse::<u64>().ok());
        match key {
            "Size:" => size_kib = number().unwrap_or(0),
            "Rss:" if is_file || size_kib < GUEST_RAM_MIN_KIB => sum += number().unwrap_or(0),
            // The head of a mapping: range, permissions, offset, device, inode, perhaps a path.
            _ if !key.ends_with(':') => {
                let path = words.nth(4).unwrap_or_default();
                let ram = ["/memfd:", "/dev/zero", "/dev/shm/", "/#"];
                is_file = path.starts_with('/') && !ram.iter().any(|p| path.starts_with(p));
            }
            _ => {}
        }
    }
    sum
}

/// A port of this host where nobody listens.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Waits until something is so.
pub fn until(what: &str, mut is_so: impl FnMut() -> bool) -> Result<()> {
    let start = Instant::now();
    while !is_so() {
        if start.elapsed() > WAIT_MAX {
            return Err(format!("it never {what}").into());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Waits until somebody listens at a port, without connecting.
pub fn until_listening(port: u16) -> Result<()> {
    // 0A is LISTEN; the address is in the kernel's byte order.
    let entry = format!("0100007F:{port:04X} 00000000:0000 0A");
    until("listens", || std::fs::read_to_string("/proc/net/tcp").is_ok_and(|t| t.contains(&entry)))
}
