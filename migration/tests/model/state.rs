//! What the model's world consists of: both sides, what is under way between them, the disks, and what the
//! destination's host remembers.

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// Stop-and-copy is sent, the disks' locks are released; waits for `Ready`.
    Stopped,
    /// A byte of `Commit` was written, no answer read.
    InDoubt,
    /// The guest is the source's: it takes the locks back and resumes, and is stuck while it can't.
    Resuming,
    Running,
    /// `Activated` was read, or the operator said so: dropped.
    Moved,
    /// Stuck, and given up by the operator.
    Discarded,
    Crashed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Destination {
    Receiving,
    /// `Ready` was sent.
    Restored,
    /// The whole of `Commit` was read.
    Committed,
    /// It has the disks' locks; it marks the disks.
    Activating,
    Running,
    /// The guest ran and came to its own end.
    Ended,
    /// Never activated, and never will be.
    Discarded,
    Crashed,
}

/// `Cancel` is not among them: it only tells early what the connection's end tells. `Refused` to one that asks is
/// `Failed` here: neither says anything of the migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Message {
    End,
    Ready,
    Commit,
    Activated,
    NeverActivated,
    Done,
    Failed,
    Resolve,
    UnknownId,
}

pub const MESSAGES: [Message; 9] = [
    Message::End,
    Message::Ready,
    Message::Commit,
    Message::Activated,
    Message::NeverActivated,
    Message::Done,
    Message::Failed,
    Message::Resolve,
    Message::UnknownId,
];

/// Who holds the disks' locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Holder {
    Nobody,
    Source,
    Destination,
    /// Another VM, given the same disk while nobody had it locked.
    Stranger,
}

/// What the disks look like, beside how the source left them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Disks {
    Unchanged,
    /// By the destination.
    Marked,
    /// By a stranger.
    Written,
}

/// The destination's verdict, as far as its host remembers it. What it is, is given by what happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Memory {
    /// There is none.
    None,
    /// Its process has it.
    Process,
    /// It is in a file, for any process of the host.
    Kept,
    /// Kept for its time, and forgotten; or its process, which alone had it, crashed.
    Expired,
    /// Forgotten in the course of things.
    Forgotten,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct State {
    pub source: Source,
    pub destination: Destination,
    /// Messages that may arrive, one bit each.
    pub net: u16,
    pub lock: Holder,
    pub disks: Disks,
    /// The guest has run at the destination.
    pub ran: bool,
    pub memory: Memory,
    /// The source goes by the operator's word that no other copy runs, whatever the disks look like.
    pub trusting: bool,
    /// A stranger wrote to the disks while it did so.
    pub betrayed: bool,
}

impl State {
    pub const START: State = State {
        source: Source::Stopped,
        destination: Destination::Receiving,
        net: 1 << Message::End as u16,
        lock: Holder::Nobody,
        disks: Disks::Unchanged,
        ran: false,
        memory: Memory::None,
        trusting: false,
        betrayed: false,
    };

    pub fn has(self, message: Message) -> bool {
        self.net & (1 << message as u16) != 0
    }

    pub fn send(mut self, message: Message) -> State {
        self.net |= 1 << message as u16;
        self
    }

    pub fn lose(mut self, message: Message) -> State {
        self.net &= !(1 << message as u16);
        self
    }

    pub fn source(self, source: Source) -> State {
        State { source, ..self }
    }

    pub fn destination(self, destination: Destination) -> State {
        State { destination, ..self }
    }

    pub fn memory(self, memory: Memory) -> State {
        State { memory, ..self }
    }

    /// Releases what a side holds.
    pub fn unlock(self, side: Holder) -> State {
        State { lock: if self.lock == side { Holder::Nobody } else { self.lock }, ..self }
    }

    /// The guest runs, or came to its own end.
    pub fn alive(self) -> bool {
        self.source == Source::Running
            || matches!(self.destination, Destination::Running | Destination::Ended)
    }

    /// The source knows who has the guest.
    pub fn settled(self) -> bool {
        !matches!(self.source, Source::Stopped | Source::InDoubt)
    }

    /// No copy runs at the destination, ran or will run, as an operator could find out.
    pub fn never_ran(self) -> bool {
        !self.ran && matches!(self.destination, Destination::Discarded | Destination::Crashed)
    }
}
