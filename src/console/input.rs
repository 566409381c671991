//! Input: a thread that waits for keys, clients and the UART's notices.
//!
//! It is no part of the I/O thread, because it must answer Ctrl-a x while that one is busy or the
//! machine at rest, and because standard input, which is shared with other processes, may block in
//! spite of `poll`. While the machine is in motion it reaches the UART through its bus slot.

use std::collections::VecDeque;
use std::io::{self, IoSliceMut, IsTerminal, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, fstat};
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use vmm_devices::serial::Serial;

use super::escape::{self, Escape, Typed};
use super::notice::Notice;
use super::output::Output;
use super::terminal;
use crate::api::socket::ControlSocket;
use crate::event::Event;

/// How a console reaches the UART of a machine in motion: runs a function on it.
pub type Uart = Box<dyn Fn(&mut dyn FnMut(&mut Serial)) + Send>;

/// Typed bytes that wait for the guest at most; further typing is dropped, as by a terminal's own
/// buffer. Escapes are seen all the same.
const TYPED_LEN_MAX: usize = 4096;
/// How often a VM in the background looks whether it is in the foreground again: a shell doesn't tell.
const BACKGROUND_LOOK: Duration = Duration::from_millis(500);
/// What a second client of a socket reads.
const BUSY: &[u8] = b"vmm: another client has this console\r\n";

/// What the control thread tells the input thread.
pub enum Message {
    /// The guest has come for which the terminal was left alone; to be answered, when the terminal is the guest's, with
    /// whether there is one.
    Begin(SyncSender<bool>),
    /// The machine is in motion.
    Attach(Uart),
    /// The machine comes to rest, or is at rest and about to leave; to be answered, when the UART has been let
    /// go of, with what was read for the guest and not taken.
    Detach(SyncSender<Vec<u8>>),
    /// The console ends.
    Stop,
}

/// Where input comes from.
pub enum Source {
    /// Nowhere, or no more.
    None,
    /// The terminal on standard input.
    Terminal {
        /// Where in an escape the typing stands.
        escape: Escape,
        /// It is raw and ours to read.
        ours: bool,
    },
    /// A pipe, file or socket on standard input.
    Stream,
    /// A socket that listens.
    Socket {
        /// The socket.
        socket: Arc<ControlSocket>,
        /// Who is served.
        client: Option<Client>,
        /// Tells the writing thread of a client.
        arrivals: Sender<UnixStream>,
    },
}

/// A client of the console's socket.
pub struct Client {
    stream: UnixStream,
    /// It will send no more, but may read on.
    sent_all: bool,
}

/// The thread's own.
pub struct Input {
    notice: Arc<Notice>,
    messages: Receiver<Message>,
    events: Sender<Event>,
    output: Arc<Output>,
    source: Source,
    uart: Option<Uart>,
    /// The guest isn't here yet: a terminal is left as it is, and what is typed isn't the guest's.
    awaits: bool,
    /// Read, but not yet taken by the UART.
    typed: VecDeque<u8>,
    /// What the UART takes, as far as is known.
    room: usize,
}

/// What `poll` found.
struct Ready {
    notice: bool,
    input: bool,
    hung_up: bool,
    listener: bool,
}

impl Input {
    /// What the thread needs. `notice` wakes it; `messages` are looked at then.
    pub fn new(
        source: Source,
        notice: Arc<Notice>,
        messages: Receiver<Message>,
        events: Sender<Event>,
        output: Arc<Output>,
    ) -> Self {
        let typed = VecDeque::new();
        let (uart, awaits, room) = (None, false, 0);
        Self { notice, messages, events, output, source, uart, awaits, typed, room }
    }

    /// The thread: runs until [`Message::Stop`], or until the console is gone.
    pub fn run(mut self) {
        while self.turn() {}
    }

    /// Waits once, and does what there is to do. False if the thread is to end.
    fn turn(&mut self) -> bool {
        self.watch_foreground();
        let ready = match self.wait() {
            Ok(ready) => ready,
            Err(Errno::INTR) => return true,
            Err(e) => {
                tracing::error!("console: can't wait for input: {e}");
                return false;
            }
        };
        if ready.notice {
            self.notice.take();
            if !self.obey() {
                return false;
            }
        }
        if ready.listener {
            self.accept();
        }
        if ready.input || ready.hung_up {
            self.read(ready.hung_up);
        }
        self.pump();
        true
    }

    /// Leaves a terminal alone until [`Message::Begin`].
    pub fn await_guest(&mut self) {
        self.awaits = true;
    }

    /// Takes the terminal, if there is one, and says so there.
    pub fn take_terminal(&mut self) {
        self.watch_foreground();
        if matches!(self.source, Source::Terminal { .. }) && io::stderr().is_terminal() {
            eprintln!("{}", escape::NOTE);
        }
    }

    fn begin(&mut self) -> bool {
        self.awaits = false;
        self.watch_foreground();
        if matches!(self.source, Source::Terminal { ours: true, .. }) {
            terminal::forget_typed();
        }
        self.take_terminal();
        matches!(self.source, Source::Terminal { .. })
    }

    /// Takes the terminal when this process is in the foreground, and after it was stopped.
    fn watch_foreground(&mut self) {
        let Source::Terminal { ours, .. } = &mut self.source else { return };
        if self.awaits {
            return;
        }
        if !terminal::is_ours() {
            *ours = false;
        } else if terminal::was_continued() || !*ours {
            match terminal::enter(&self.notice) {
                Ok(()) => *ours = true,
                Err(e) => {
                    tracing::warn!("console: can't use the terminal: {e}");
                    self.source = Source::None;
                }
            }
        }
    }

    fn wait(&self) -> Result<Ready, Errno> {
        let stdin = io::stdin();
        let hungry = self.room > 0 && self.typed.is_empty();
        let (mut input, mut listening, mut timeout) = (None, None, None);
        match &self.source {
            Source::Terminal { .. } if self.awaits => {}
            Source::Terminal { ours: true, .. } => input = Some((stdin.as_fd(), PollFlags::IN)),
            Source::Terminal { ours: false, .. } => timeout = Some(BACKGROUND_LOOK),
            Source::Stream if hungry => input = Some((stdin.as_fd(), PollFlags::IN)),
            Source::Socket { socket, client, .. } => {
                listening = Some(socket.listener().as_fd());
                input = client.as_ref().map(|c| {
                    let wants = hungry && !c.sent_all;
                    let flags = if wants { PollFlags::IN } else { PollFlags::empty() };
                    (c.stream.as_fd(), flags)
                });
            }
            Source::Stream | Source::None => {}
        }
        let mut fds = vec![PollFd::new(&self.notice, PollFlags::IN)];
        fds.extend(input.map(|(fd, flags)| PollFd::from_borrowed_fd(fd, flags)));
        fds.extend(listening.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        let timeout = timeout.and_then(|t| Timespec::try_from(t).ok());
        poll(&mut fds, timeout.as_ref())?;
        let found = |at: usize| fds.get(at).map_or(PollFlags::empty(), PollFd::revents);
        let gone = PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL;
        let at_input = if input.is_some() { found(1) } else { PollFlags::empty() };
        let at_listener = found(1 + usize::from(input.is_some()));
        Ok(Ready {
            notice: !found(0).is_empty(),
            input: at_input.contains(PollFlags::IN),
            hung_up: at_input.intersects(gone),
            listener: listening.is_some() && !at_listener.is_empty(),
        })
    }

    /// Does what the control thread asks. False if the thread is to end.
    fn obey(&mut self) -> bool {
        loop {
            match self.messages.try_recv() {
                Ok(Message::Begin(done)) => drop(done.send(self.begin())),
                Ok(Message::Attach(uart)) => self.uart = Some(uart),
                Ok(Message::Detach(done)) => {
                    // What was read for the guest goes with it; what wasn't is left to whoever reads next.
                    (self.uart, self.room) = (None, 0);
                    // Somebody who asked and went away isn't waiting.
                    let _ = done.send(std::mem::take(&mut self.typed).into());
                }
                Ok(Message::Stop) | Err(std::sync::mpsc::TryRecvError::Disconnected) => {
                    return false;
                }
                Err(std::sync::mpsc::TryRecvError::Empty) => return true,
            }
        }
    }

    /// Hands the UART what it takes, and learns what more it would take.
    fn pump(&mut self) {
        let Self { uart, typed, room, .. } = self;
        *room = 0;
        let Some(uart) = uart else { return };
        uart(&mut |serial| {
            serial.output_drained();
            let taken = serial.input(typed.make_contiguous());
            typed.drain(..taken);
            *room = serial.input_room();
        });
    }

    fn read(&mut self, hung_up: bool) {
        match &mut self.source {
            Source::Terminal { escape, .. } => {
                let mut buffer = [0; 256];
                // Not before: in the background a read would stop this process.
                if !terminal::is_ours() {
                    return;
                }
                match rustix::io::read(io::stdin(), &mut buffer) {
                    Ok(0) if !hung_up => {}
                    Ok(0) | Err(Errno::IO) => self.source = Source::None,
                    Ok(count) => {
                        let typed = buffer[..count].iter().map(|b| escape.feed(*b)).collect();
                        self.type_in(typed);
                    }
                    Err(_) => {}
                }
            }
            Source::Stream if self.room == 0 => {}
            Source::Stream => match read_stream(io::stdin().as_fd(), self.room) {
                Ok(bytes) if bytes.is_empty() => self.source = Source::None,
                Ok(bytes) => self.typed.extend(bytes),
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(e) => {
                    tracing::warn!("console: can't read: {e}: no further input");
                    self.source = Source::None;
                }
            },
            Source::Socket { client, .. } => {
                let Some(served) = client else { return };
                if self.room == 0 && !hung_up {
                    return;
                }
                // A client that left doesn't hold the place until the guest has read all it sent.
                let most = if hung_up { TYPED_LEN_MAX } else { self.room };
                let bytes = read_stream(served.stream.as_fd(), most).unwrap_or_default();
                served.sent_all |= bytes.is_empty();
                self.typed.extend(bytes);
                if hung_up {
                    // The writing thread, which has a copy, learns it from its next write.
                    let _ = served.stream.shutdown(Shutdown::Both);
                    *client = None;
                }
            }
            Source::None => {}
        }
    }

    fn type_in(&mut self, typed: Vec<Typed>) {
        for key in typed {
            match key {
                Typed::Byte(byte) if self.typed.len() < TYPED_LEN_MAX => self.typed.push_back(byte),
                Typed::Byte(_) | Typed::Nothing => {}
                Typed::Help => {
                    let _ = io::stderr().write_all(escape::HELP.as_bytes());
                }
                // Nobody listens any more when the VMM is on its way out.
                Typed::Quit => drop(self.events.send(Event::ConsoleQuit)),
            }
        }
    }

    fn accept(&mut self) {
        let Source::Socket { socket, client, arrivals } = &mut self.source else { return };
        // A client that went away before it was accepted is none.
        let Ok((mut stream, _)) = socket.listener().accept() else { return };
        if client.is_some() {
            // It fits an empty socket's buffer, so this doesn't block.
            let _ = stream.write_all(BUSY);
            return;
        }
        match stream.try_clone() {
            Ok(copy) => {
                // The writing thread lives as long as this one.
                let _ = arrivals.send(copy);
                self.output.wake();
                *client = Some(Client { stream, sent_all: false });
            }
            Err(e) => tracing::warn!("console: can't serve a client: {e}"),
        }
    }
}

/// Reads at most `most` bytes (and no more than a page). None: the end.
fn read_stream(fd: BorrowedFd<'_>, most: usize) -> Result<Vec<u8>, Errno> {
    let mut buffer = vec![0; most.clamp(1, TYPED_LEN_MAX)];
    let kind = FileType::from_raw_mode(fstat(fd)?.st_mode);
    let mut read = Err(Errno::OPNOTSUPP);
    if matches!(kind, FileType::Fifo | FileType::Socket) {
        // Another process may have read from a shared pipe what `poll` saw.
        let parts = &mut [IoSliceMut::new(&mut buffer)];
        read = preadv2(fd, parts, u64::MAX, ReadWriteFlags::NOWAIT);
    }
    // Not every file, and not every kernel's pipe, can be read so.
    let count = match read {
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::SPIPE) => {
            rustix::io::read(fd, &mut buffer)?
        }
        other => other?,
    };
    buffer.truncate(count);
    Ok(buffer)
}

#[cfg(test)]
mod tests {
    use super::super::output::Sink;
    use super::*;

    /// A guest that stops to move, just when somebody has typed: the bytes are not this process's any more.
    #[test]
    fn nothing_is_read_for_a_guest_that_was_let_go() {
        let dir = tempfile::tempdir().unwrap();
        let socket = Arc::new(ControlSocket::bind(&dir.path().join("console")).unwrap());
        let (mut typist, stream) = UnixStream::pair().unwrap();
        let left = stream.try_clone().unwrap();
        let client = Some(Client { stream, sent_all: false });
        let source = Source::Socket { socket, client, arrivals: std::sync::mpsc::channel().0 };
        let notice = Arc::new(Notice::new().unwrap());
        let (messages, inbox) = std::sync::mpsc::channel();
        let output = Output::start(Sink::Closed, Arc::clone(&notice)).unwrap();
        let events = std::sync::mpsc::channel().0;
        let mut input = Input::new(source, Arc::clone(&notice), inbox, events, output);
        input.room = 16;

        typist.write_all(b"typed").unwrap();
        let (done, is_done) = std::sync::mpsc::sync_channel(1);
        messages.send(Message::Detach(done)).unwrap();
        notice.give();
        assert!(input.turn());
        is_done.try_recv().unwrap();
        assert!(input.typed.is_empty(), "{:?}", input.typed);
        assert_eq!(read_stream(left.as_fd(), 16).unwrap(), b"typed");
    }
}
