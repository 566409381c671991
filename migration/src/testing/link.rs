//! A link between two threads of which only one runs at a time, so that a run follows from its seed. A
//! side hands over when it has to wait; when both wait, time moves on.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use super::world::{Side, World};
use crate::channel::Clock;

/// What a blocked call waits for, at most, unless told: the slice of a real transport, stretched to save turns.
const SLICE: Duration = Duration::from_secs(2);
/// Calls that a [`Kind::Short`] lasts, each way: longer than any small message's head and body.
const SHORT_CALLS: u32 = 100;

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The connection ends; what was sent before still arrives.
    Cut,
    /// The connection ends; what wasn't read yet is lost, both ways.
    Reset,
    /// A bit is flipped.
    Corrupt,
    /// Nothing moves from here on, nor fails.
    Hang,
    /// Nothing moves for two seconds.
    Delay,
    /// From here on a hundred calls move one byte each.
    Short,
    /// From here on one byte moves in a second.
    Trickle,
}

impl Kind {
    /// All of them but the last, which takes its time.
    pub const ALL: [Kind; 6] =
        [Kind::Cut, Kind::Reset, Kind::Corrupt, Kind::Hang, Kind::Delay, Kind::Short];
}

/// A fault: at this byte of what one side sends.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// Whose bytes.
    pub sender: Side,
    /// Before which byte.
    pub at: u64,
    /// What happens there.
    pub kind: Kind,
}

#[derive(Debug, Default)]
struct Pipe {
    bytes: VecDeque<u8>,
    /// Everything ever sent, for a clean run's map of messages.
    all: Vec<u8>,
    sent: u64,
    writer_gone: bool,
}

#[derive(Debug)]
struct Shared {
    pipes: [Pipe; 2],
    turn: usize,
    ended: [bool; 2],
    now: Duration,
    cut: bool,
    held_until: [Duration; 2],
    short: [u32; 2],
    trickle: [bool; 2],
    slice: Duration,
    rate: Option<u64>,
    fault: Option<Fault>,
    capacity: usize,
    record: bool,
}

/// A link.
#[derive(Clone, Debug)]
pub struct Link {
    shared: Arc<(Mutex<Shared>, Condvar)>,
    world: World,
}

impl Link {
    /// A link with at most one fault, which holds `capacity` bytes each way.
    #[must_use]
    pub fn new(world: &World, fault: Option<Fault>, capacity: usize, record: bool) -> Self {
        let shared = Shared {
            pipes: Default::default(),
            turn: 0,
            ended: [false; 2],
            now: Duration::ZERO,
            cut: false,
            held_until: [Duration::ZERO; 2],
            short: [0; 2],
            trickle: [false; 2],
            slice: SLICE,
            rate: None,
            fault,
            capacity,
            record,
        };
        Self { shared: Arc::new((Mutex::new(shared), Condvar::new())), world: world.clone() }
    }

    /// Blocks for this long at most from here on.
    pub fn set_slice(&self, slice: Duration) {
        self.lock().slice = slice;
    }

    /// Carries so many bytes a second each way.
    pub fn set_rate(&self, rate: Option<u64>) {
        self.lock().rate = rate;
    }

    /// A side's end. Its thread calls [`End::begin`] first.
    #[must_use]
    pub fn end(&self, side: Side) -> End {
        End { link: self.clone(), side, guard: false }
    }

    /// Everything that a side sent, if recorded.
    #[must_use]
    pub fn sent(&self, side: Side) -> Vec<u8> {
        self.lock().pipes[side as usize].all.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.0.lock().expect("no holder panics")
    }

    fn wait_turn<'a>(
        &'a self,
        mut shared: MutexGuard<'a, Shared>,
        me: usize,
    ) -> MutexGuard<'a, Shared> {
        while shared.turn != me {
            shared = self.shared.1.wait(shared).expect("no holder panics");
        }
        shared
    }

    /// Lets the other side run until it waits.
    fn pass<'a>(&'a self, mut shared: MutexGuard<'a, Shared>, me: usize) -> MutexGuard<'a, Shared> {
        if !shared.ended[1 - me] {
            shared.turn = 1 - me;
            self.shared.1.notify_all();
            shared = self.wait_turn(shared, me);
        }
        shared
    }
}

/// One end of a link; also that side's clock. When it is dropped for good, the other side sees the end.
#[derive(Debug)]
pub struct End {
    link: Link,
    side: Side,
    guard: bool,
}

impl End {
    /// Waits for this side's first turn. Dropping what is returned ends the side.
    #[must_use]
    pub fn begin(&self) -> End {
        let shared = self.link.lock();
        drop(self.link.wait_turn(shared, self.side as usize));
        End { link: self.link.clone(), side: self.side, guard: true }
    }

    /// The transport and the clock of a channel.
    #[must_use]
    pub fn parts(&self) -> (End, End) {
        let end = || End { link: self.link.clone(), side: self.side, guard: false };
        (end(), end())
    }

    fn me(&self) -> usize {
        self.side as usize
    }
}

impl Drop for End {
    fn drop(&mut self) {
        if self.guard {
            let mut shared = self.link.lock();
            let me = self.me();
            shared.ended[me] = true;
            shared.pipes[me].writer_gone = true;
            shared.turn = 1 - me;
            self.link.shared.1.notify_all();
        }
    }
}

impl Read for End {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.link.world.step(self.side);
        let (me, peer) = (self.me(), 1 - self.me());
        let mut shared = self.link.lock();
        for passed in [false, true] {
            let held = shared.now < shared.held_until[peer];
            if !held && !shared.pipes[peer].bytes.is_empty() {
                let limit = if shared.short[peer] > 0 { 1 } else { into.len() };
                let count = limit.min(shared.pipes[peer].bytes.len());
                for (byte, from) in into.iter_mut().zip(shared.pipes[peer].bytes.drain(..count)) {
                    *byte = from;
                }
                return Ok(count);
            }
            if !held && (shared.cut || shared.pipes[peer].writer_gone) {
                return Ok(0);
            }
            if !passed {
                shared = self.link.pass(shared, me);
            }
        }
        let slice = shared.slice;
        shared.now += slice;
        Err(io::ErrorKind::WouldBlock.into())
    }
}

impl Write for End {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.link.world.step(self.side);
        let (me, peer) = (self.me(), 1 - self.me());
        let mut shared = self.link.lock();
        for passed in [false, true] {
            if shared.cut || shared.ended[peer] {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            let room = shared.capacity.saturating_sub(shared.pipes[me].bytes.len());
            let held = shared.now < shared.held_until[me];
            if room > 0 && !held && !bytes.is_empty() {
                return shared.take(me, &bytes[..bytes.len().min(room)]);
            }
            if !passed {
                shared = self.link.pass(shared, me);
            }
        }
        let slice = shared.slice;
        shared.now += slice;
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Shared {
    /// Takes bytes into a pipe, and brings the fault about where it is due.
    fn take(&mut self, me: usize, bytes: &[u8]) -> io::Result<usize> {
        let sent = self.pipes[me].sent;
        let limit = if self.short[me] > 0 || self.trickle[me] { 1 } else { bytes.len() };
        if self.trickle[me] {
            self.now += Duration::from_secs(1);
        }
        self.short[me] = self.short[me].saturating_sub(1);
        let mut bytes = bytes[..limit].to_vec();
        let due = |f: &Fault| f.sender as usize == me && f.at < sent + bytes.len() as u64;
        if let Some(fault) = self.fault.filter(due) {
            let before = usize::try_from(fault.at - sent).expect("within this call");
            if before > 0 && fault.kind != Kind::Corrupt {
                bytes.truncate(before);
            } else {
                self.fault = None;
                match fault.kind {
                    Kind::Cut => self.cut = true,
                    Kind::Reset => {
                        self.cut = true;
                        self.pipes.iter_mut().for_each(|pipe| pipe.bytes.clear());
                    }
                    Kind::Corrupt => bytes[before] ^= 1 << (fault.at % 8),
                    Kind::Hang => self.held_until = [Duration::MAX; 2],
                    Kind::Delay => self.held_until[me] = self.now + Duration::from_secs(2),
                    Kind::Short => self.short[me] = SHORT_CALLS,
                    Kind::Trickle => self.trickle[me] = true,
                }
                match fault.kind {
                    Kind::Cut | Kind::Reset => return Err(io::ErrorKind::BrokenPipe.into()),
                    Kind::Short | Kind::Trickle => bytes.truncate(1),
                    Kind::Hang => return Err(io::ErrorKind::WouldBlock.into()),
                    Kind::Corrupt | Kind::Delay => {}
                }
            }
        }
        if let Some(rate) = self.rate {
            self.now += Duration::from_nanos(bytes.len() as u64 * 1_000_000_000 / rate);
        }
        let pipe = &mut self.pipes[me];
        pipe.sent += bytes.len() as u64;
        pipe.bytes.extend(&bytes);
        if self.record {
            pipe.all.extend(&bytes);
        }
        Ok(bytes.len())
    }
}

impl Clock for End {
    fn now(&self) -> Duration {
        self.link.lock().now
    }

    fn sleep(&self, time: Duration) {
        let shared = self.link.lock();
        let mut shared = self.link.pass(shared, self.me());
        shared.now += time;
    }
}
