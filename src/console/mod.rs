//! The console: what the serial port is joined to on the host.
//!
//! Two threads stand between: `console-out` writes what the guest sends ([`output`] says how a slow
//! reader is met), `console-in` reads what the user types and looks after the terminal ([`input`],
//! [`terminal`]). A [`Console`] outlives the machines that use it, of which one at a time is in motion.
//!
//! - *stdio*: on a terminal, raw, with the escapes of [`escape`]; otherwise bytes pass as they are. The
//!   end of standard input ends the input, not the VM. Neither is ever made non-blocking: other
//!   processes share them.
//! - *file*: output is appended; there is no input.
//! - *unix*: a socket with one client at a time, who may come and go. While there is none the newest
//!   [`output::KEPT_LEN_MAX`] bytes are kept for the next one, so that nobody misses the boot.
//! - *null*: nothing.

use std::fs::File;
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel, sync_channel};
use std::time::Duration;

use vmm_devices::serial::Wire;

use crate::api::socket::{ControlSocket, SocketError};
use crate::config::SerialTarget;
use crate::event::Event;

mod escape;
mod input;
mod notice;
mod output;
mod ring;
mod terminal;

pub use input::Uart;
pub use terminal::restore as restore_terminal;

use input::{Input, Message, Source};
use notice::Notice;
use output::{Clients, NullWire, Output, Sink};

/// Why there is no console.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The file can't be opened for appending.
    #[error("--serial file:{}", .path.display())]
    File {
        /// As given.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The socket can't be made.
    #[error("--serial unix:{}: can't {what}", .path.display())]
    Socket {
        /// As given.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The socket's path is of no use.
    #[error("--serial unix:{}: {why}", .path.display())]
    Path {
        /// As given.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Threads or file descriptors are exhausted.
    #[error("can't start the console's threads")]
    Start(#[source] io::Error),
}

/// The console. Dropping it restores the terminal; what is not yet written may be lost without
/// [`Self::flush`].
pub struct Console {
    /// None: the console is null.
    live: Option<Live>,
}

struct Live {
    output: Arc<Output>,
    notice: Arc<Notice>,
    messages: Sender<Message>,
    socket: Option<Arc<ControlSocket>>,
}

impl Console {
    /// Opens what `--serial` names and starts the threads. `events` hears of Ctrl-a x.
    ///
    /// # Errors
    /// As [`ConsoleError`] says.
    pub fn open(target: &SerialTarget, events: Sender<Event>) -> Result<Self, ConsoleError> {
        Self::start(target, events, Input::take_terminal)
    }

    /// One that takes nothing and gives nothing.
    #[must_use]
    pub fn none() -> Self {
        Self { live: None }
    }

    /// As [`Self::open`], for a guest that is yet to come: until [`Self::begin`] a terminal stays as it is, with Ctrl-C a
    /// signal to this process.
    ///
    /// # Errors
    /// As [`ConsoleError`] says.
    pub fn await_guest(target: &SerialTarget, events: Sender<Event>) -> Result<Self, ConsoleError> {
        Self::start(target, events, Input::await_guest)
    }

    fn start(
        target: &SerialTarget,
        events: Sender<Event>,
        prepare: fn(&mut Input),
    ) -> Result<Self, ConsoleError> {
        let mut socket = None;
        let (sink, source) = match target {
            SerialTarget::Null => return Ok(Self::none()),
            SerialTarget::Stdio => (Sink::Stdout(io::stdout()), stdin()),
            SerialTarget::File(path) => {
                let opened = File::options().append(true).create(true).open(path);
                let fail = |source| ConsoleError::File { path: path.clone(), source };
                (Sink::File(opened.map_err(fail)?), Source::None)
            }
            SerialTarget::Unix(path) => {
                let listening = Arc::new(listen(path)?);
                socket = Some(Arc::clone(&listening));
                let (arrivals, clients) = channel();
                let sink = Sink::Clients(Clients::new(clients));
                (sink, Source::Socket { socket: listening, client: None, arrivals })
            }
        };
        let notice = Notice::new().map(Arc::new).map_err(ConsoleError::Start)?;
        let output = Output::start(sink, Arc::clone(&notice)).map_err(ConsoleError::Start)?;
        let (messages, inbox) = channel();
        let mut input = Input::new(source, Arc::clone(&notice), inbox, events, Arc::clone(&output));
        // Made first, so that an error below closes what was opened.
        let live = Live { output, notice, messages, socket };
        // Before the guest's first byte and before the note, so that keys typed at either aren't
        // the host's.
        prepare(&mut input);
        std::thread::Builder::new()
            .name("console-in".to_owned())
            .spawn(move || input.run())
            .map_err(ConsoleError::Start)?;
        Ok(Self { live: Some(live) })
    }

    /// What a new machine's serial port is joined to.
    #[must_use]
    pub fn wire(&self) -> Box<dyn Wire> {
        match &self.live {
            Some(live) => live.output.wire(),
            None => Box::new(NullWire),
        }
    }

    /// The guest of [`Self::await_guest`] is here: from the return on a terminal is the guest's; what was typed before is
    /// nobody's. Gives whether there is one.
    #[must_use]
    pub fn begin(&self) -> bool {
        let Some(live) = &self.live else { return false };
        let (done, wait) = sync_channel(1);
        live.tell(Message::Begin(done));
        // An error means that the thread has ended, and with it all input.
        wait.recv().unwrap_or(false)
    }

    /// The machine is in motion, and `uart` is how to reach its serial port.
    pub fn attach(&self, uart: Uart) {
        if let Some(live) = &self.live {
            live.tell(Message::Attach(uart));
        }
    }

    /// The machine comes to rest, or is at rest and about to leave: returns when `uart` has been dropped. Gives
    /// what was read for the guest, and not taken by it.
    #[must_use]
    pub fn detach(&self) -> Vec<u8> {
        let Some(live) = &self.live else { return Vec::new() };
        let (done, wait) = sync_channel(1);
        live.tell(Message::Detach(done));
        // An error means that the thread has ended, and dropped all that it had.
        wait.recv().unwrap_or_default()
    }

    /// Removes its socket's file, if it has one: another VM may take its place. Who is connected still reads the output.
    pub fn vacate(&self) {
        if let Some(socket) = self.live.as_ref().and_then(|live| live.socket.as_ref()) {
            socket.remove();
        }
    }

    /// Waits until all output is written, at most for `timeout`. False if something is left. To be
    /// called before this process ends, and after a migration took the guest away.
    #[must_use]
    pub fn flush(&self, timeout: Duration) -> bool {
        self.live.as_ref().is_none_or(|live| live.output.flush(timeout))
    }
}

impl Live {
    fn tell(&self, message: Message) {
        // A thread that has ended needs to be told nothing.
        let _ = self.messages.send(message);
        self.notice.give();
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.tell(Message::Stop);
        self.output.close();
        terminal::restore();
        if let Some(socket) = &self.socket {
            socket.remove();
        }
    }
}

fn stdin() -> Source {
    match io::stdin().is_terminal() {
        true => Source::Terminal { escape: escape::Escape::default(), ours: false },
        false => Source::Stream,
    }
}

/// Listens at `path`, as the control socket does at its own; a dead VM's socket is replaced.
fn listen(path: &Path) -> Result<ControlSocket, ConsoleError> {
    ControlSocket::bind(path).map_err(|e| {
        let path = path.to_owned();
        let why = match e {
            SocketError::Io { what, source, .. } => {
                return ConsoleError::Socket { path, what, source };
            }
            SocketError::Live { .. } => "in use by a live VM: give another path",
            SocketError::TooLong { .. } => "too long for a UNIX socket: give a shorter path",
            SocketError::Occupied { .. } => "exists and is not a socket: give another path",
            SocketError::Foreign { .. } | SocketError::NoRuntimeDir => {
                "its directory is not this user's: give another path"
            }
        };
        ConsoleError::Path { path, why }
    })
}

#[cfg(test)]
#[path = "console_tests.rs"]
mod tests;
