//! What the choreography asks of the two ends: the traits that a machine implements.
//!
//! At the source a guest is [`Live`] and, once stopped, [`Halted`]; at the destination it is
//! [`Vacant`] until it is activated, and a [`Host`] makes it. Every page number is one of guest RAM as
//! the [`Plan`] lays it out; a run handed to an implementation lies in one region of the plan.

use std::time::Duration;

use crate::channel::Flow;
use crate::pages::{PageSet, Run};
use crate::plan::{Plan, SectionId};
use crate::state::Section;

/// What a machine says when it fails: one line, lower-case; its sources follow in the chain.
pub type GuestError = Box<dyn std::error::Error + Send + Sync>;

/// A transition that failed, with the guest as it was before.
#[derive(Debug)]
pub struct Failed<G> {
    /// The guest, in the state from which the transition was tried.
    pub guest: G,
    /// What failed.
    pub error: GuestError,
}

/// Saved state taken from a running guest before anything moves, and what it cost.
#[derive(Clone, Debug, Default)]
pub struct Example {
    /// The sections, as [`Halted::sections`] would give them. Empty: no trial restore.
    pub sections: Vec<Section>,
    /// What stopping and saving take, in microseconds: the source's part of the stop's fixed cost.
    pub stop_us: u64,
}

/// Guest RAM that can be read.
pub trait Memory {
    /// Adds every page written since the last call (since tracking began, at first), by vCPUs and by
    /// devices, to `into`.
    ///
    /// How to implement: KVM's dirty log (fetched, not cleared) united with the bitmap of pages that
    /// devices wrote (fetched and cleared). A page fetched and not re-armed may be given again; a page
    /// written may never be left out. Pages of a window that [`Live::first_pages`] has armed count
    /// from then on.
    ///
    /// # Errors
    /// Tracking failed; the migration is aborted.
    fn dirty_pages(&mut self, into: &mut PageSet) -> Result<(), GuestError>;

    /// Copies the run into `bytes`, which is as long as the run. vCPUs may write meanwhile: a torn page
    /// is sent again, because it is dirty.
    ///
    /// # Errors
    /// The memory can't be read; the migration is aborted.
    fn read(&mut self, run: Run, bytes: &mut [u8]) -> Result<(), GuestError>;
}

/// The source's guest while it runs, or while its user has it paused.
///
/// How to implement: a wrapper of `Running` (or, for a paused guest, of the `Machine`, with trivial
/// `stop` and `resume`). All methods are called from the thread that runs the migration. After any
/// error the choreography calls [`Live::stop_tracking`] and hands the guest back.
pub trait Live: Memory + Sized {
    /// The same guest, stopped.
    type Halted: Halted<Live = Self>;

    /// What the guest needs of its next host, which reads its configuration up to this version. That of the sections is
    /// seen to by the crate.
    ///
    /// # Errors
    /// Something of the guest can't move; say what.
    fn plan(&mut self, config_version: u16) -> Result<Plan, GuestError>;

    /// Where the locks end that it holds on its writable disks, all at the same byte, which tells them from
    /// anybody else's. `None`: nothing tells them.
    fn lock_mark(&self) -> Option<u64> {
        None
    }

    /// Lets the guest's devices finish the I/O that they are at, and begin no other, while its vCPUs run: what is called
    /// next, [`Live::example`] or [`Live::stop`], waits for none then, so that the guest doesn't stand meanwhile. `poll` is
    /// asked about every 100 ms, and cancels the wait: the devices go on.
    ///
    /// # Errors
    /// It can't be done; the migration is aborted.
    fn settle(&mut self, _poll: &mut dyn FnMut() -> Flow) -> Result<Flow, GuestError> {
        Ok(Flow::Continue)
    }

    /// Lets the devices go on, since nothing stops the guest now.
    fn unsettle(&mut self) {}

    /// Sections to try at the destination before a page moves, in the listed versions. The guest may stand
    /// for a moment.
    ///
    /// # Errors
    /// The state can't be saved; the guest runs on.
    fn example(&mut self, listed: &[SectionId]) -> Result<Example, GuestError>;

    /// Begins dirty tracking, without a stall: with KVM's `MANUAL_PROTECT2 | INITIALLY_SET`, setting
    /// the flag on each memory slot.
    ///
    /// # Errors
    /// Tracking isn't possible.
    fn start_tracking(&mut self) -> Result<(), GuestError>;

    /// Round 0, window by window: arms tracking for every page of `window` and *then* adds those of its
    /// pages that were ever touched to `into`. In this order: a page first touched in between would be
    /// lost the other way round. A page that is left out is zero at the destination.
    ///
    /// How to implement: `KVM_CLEAR_DIRTY_LOG` over the window, then `SEEK_DATA`/`mincore`/pagemap.
    /// Windows are at most [`crate::source::WINDOW_PAGES`] pages and begin at multiples of 64 pages
    /// from their region's start.
    ///
    /// # Errors
    /// Tracking failed.
    fn first_pages(&mut self, window: Run, into: &mut PageSet) -> Result<(), GuestError>;

    /// Arms tracking for exactly these pages, which are read right after: a write from here on is seen
    /// by the next [`Memory::dirty_pages`]. At most 256 pages, ascending.
    ///
    /// How to implement: one `KVM_CLEAR_DIRTY_LOG` over the span of the runs, with their bits.
    ///
    /// # Errors
    /// Tracking failed.
    fn rearm(&mut self, runs: &[Run]) -> Result<(), GuestError>;

    /// Pages that each vCPU dirtied since the last call (since tracking began, at first), by vCPU index, as
    /// far as it can be told; `dirty_pages` were found dirty since. Empty: not known, and a throttle
    /// then falls on all alike.
    fn dirty_by_vcpu(&mut self, _dirty_pages: u64) -> Vec<u64> {
        Vec::new()
    }

    /// Keeps each vCPU off for this share of its time, in percent from 0 to 99, until the next call;
    /// vCPUs behind the slice's end take its last value.
    ///
    /// # Errors
    /// It can't be done; the migration goes on without.
    fn throttle(&mut self, percent: &[u8]) -> Result<(), GuestError>;

    /// The longest time for which the migration kept a vCPU from running since the last call, throttle
    /// excepted, in microseconds. `None`: not measured.
    fn stall_us(&mut self) -> Option<u64> {
        None
    }

    /// Makes durable what the guest wrote to its disks, while it runs on, so that little is left for
    /// [`Halted::release_disks`]. `poll` is asked about every 100 ms, and cancels the wait: the flush is left to itself.
    ///
    /// # Errors
    /// A flush failed; the migration is aborted.
    fn flush_disks(&mut self, _poll: &mut dyn FnMut() -> Flow) -> Result<Flow, GuestError> {
        Ok(Flow::Continue)
    }

    /// Ends tracking, lifts any throttle and lets the devices go on: the guest is as if nothing had been.
    fn stop_tracking(&mut self);

    /// Stops the guest: vCPUs joined, devices quiesced and drained. The next [`Memory::dirty_pages`] of
    /// what is returned is the last.
    ///
    /// # Errors
    /// It didn't stop, and runs on.
    fn stop(self) -> Result<Self::Halted, Failed<Self>>;
}

/// What came of an attempt to take back the disk locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Locks {
    /// All taken back, and every disk is as it was when its lock was released: no other copy of the
    /// guest runs, ran, or will.
    Taken,
    /// Somebody holds one. None is held here.
    Held,
    /// All could be taken, but a disk has changed since: another copy ran. None is held here.
    Changed,
}

/// What it means, when disk locks are taken back, that a disk has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Changes {
    /// Another copy ran.
    Matter,
    /// Nothing: the operator says that whatever changed it runs no more. Locks that somebody holds are respected all the
    /// same.
    Trusted,
}

/// The source's guest, stopped and whole. Dropping it ends it.
pub trait Halted: Memory + Sized {
    /// The same guest, running.
    type Live;

    /// Saves every part that the plan listed, in that order and in the listed versions.
    ///
    /// # Errors
    /// A part can't be saved; the migration is aborted and the guest resumed.
    fn sections(&mut self, listed: &[SectionId]) -> Result<Vec<Section>, GuestError>;

    /// Whether the guest was paused by its user, and has to arrive so.
    fn paused(&self) -> bool;

    /// How long ago the guest gave its last sign: an output that an observer beyond it may see. `None`: none since tracking
    /// began, or nobody looks.
    fn last_sign_ago(&self) -> Option<Duration> {
        None
    }

    /// Flushes the writable disks, remembers what tells whether they change (size, mtime) and releases
    /// their locks. Called while the destination restores, so that its time doesn't add to the downtime. `poll` is asked
    /// about every 100 ms while the flush goes on, and cancels the wait: then no lock was released.
    ///
    /// # Errors
    /// A flush failed; the migration is aborted and the guest resumed.
    fn release_disks(&mut self, poll: &mut dyn FnMut() -> Flow) -> Result<Flow, GuestError>;

    /// Tries to take the disk locks back and looks whether the disks have changed since
    /// [`Halted::release_disks`], unless changes are [`Changes::Trusted`]: then too it remembers for the next try what they
    /// looked like. Without a writable disk: [`Locks::Taken`].
    ///
    /// # Errors
    /// It can't be told.
    fn retake_disks(&mut self, changes: Changes) -> Result<Locks, GuestError>;

    /// Lets the guest go on as if nothing had been: paused if its user had paused it, without
    /// tracking, without throttle. Its locks are held ([`Halted::retake_disks`] came before, unless
    /// they were never released).
    ///
    /// # Errors
    /// It can't go on; it is handed back, still whole.
    fn resume(self) -> Result<Self::Live, Failed<Self>>;
}

/// Makes the place for a guest at the destination.
pub trait Host {
    /// A guest that has its memory and its parts, and has never run.
    type Vacant: Vacant;

    /// Checks everything that the plan needs and builds the guest: configuration, memory, vCPUs' features
    /// (a subset of this host's: name each missing one), MSRs, XSAVE, TSC, disks (reachable, of the
    /// right size, not locked by anybody but the source, whose locks `lock_mark` tells: see
    /// [`Live::lock_mark`]), TAPs, name. The crate has checked the layout and checks the sections itself. `poll` is asked
    /// about every 100 ms, and cancels the wait: a disk's storage may hang.
    ///
    /// # Errors
    /// Every reason found, not only the first; one line each. Whatever they are where `poll` cancelled.
    fn reserve(
        &mut self,
        plan: &Plan,
        lock_mark: Option<u64>,
        poll: &mut dyn FnMut() -> Flow,
    ) -> Result<Reserved<Self::Vacant>, Vec<String>>;
}

/// What [`Host::reserve`] made.
#[derive(Debug)]
pub struct Reserved<V> {
    /// The guest.
    pub guest: V,
    /// The locks that the source holds on its writable disks are seen here, on every one of them, and
    /// there is at least one: `F_OFD_GETLK` shows a conflict.
    pub locks_seen: bool,
    /// What doesn't stand in the way but should be known.
    pub warnings: Vec<String>,
}

/// The destination's guest before it ever ran. All its memory is zero at first. Dropping it ends it and
/// leaves its disks untouched.
pub trait Vacant: Sized {
    /// The guest, running.
    type Running;

    /// The parts that take sections, each with the newest version it reads.
    fn parts(&self) -> Vec<SectionId>;

    /// Restores the example into the guest to find out whether it can be; [`Vacant::restore`] follows
    /// later on the same guest, over it. Gives what doesn't stand in the way but should be known. `saved`: the
    /// example, at the source.
    ///
    /// # Errors
    /// Why it can't be, one line for each part.
    fn try_restore(
        &mut self,
        example: &[Section],
        saved: Since,
    ) -> Result<Vec<String>, Vec<String>>;

    /// The memory of the run, to be written. Nothing else touches the guest's memory meanwhile.
    ///
    /// # Errors
    /// It isn't there; the migration is aborted.
    fn pages_mut(&mut self, run: Run) -> Result<&mut [u8], GuestError>;

    /// Makes pages zero that were written before; best by giving the memory back.
    ///
    /// # Errors
    /// It isn't there; the migration is aborted.
    fn zero(&mut self, run: Run) -> Result<(), GuestError>;

    /// A round of pages is whole, and the guest still runs at the source: time to make ready what can be,
    /// such as mappings of the pages. It doesn't keep the source waiting.
    fn round_ended(&mut self) {}

    /// Restores every section. The list is exactly the plan's: none missing, doubled or unknown. `saved`: they, at
    /// the source; by it the guest's time goes on where the two hosts' real times differ.
    ///
    /// # Errors
    /// Why it can't be, one line for each part; the migration is aborted.
    fn restore(&mut self, sections: &[Section], saved: Since) -> Result<(), Vec<String>>;

    /// Takes the disk locks, *then* marks the writable disks as changed (`futimens`), and only then
    /// lets the vCPUs run (or leaves them, if `paused`). The lock makes sure that no other copy
    /// runs; the mark tells a source in doubt that this one did: one disk's is enough, and from the first on
    /// there is no way back.
    ///
    /// # Errors
    /// The guest never ran: no vCPU entered it, no disk was marked or written, no lock is held. It is
    /// gone; the source resumes its own.
    fn activate(self, paused: bool) -> Result<Active<Self::Running>, GuestError>;
}

/// How long ago something was done at the other end, as this end's own clock bounds it: after a message of this end that the
/// other had to read first, and before the message that told of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Since {
    /// The time since what told of it was here.
    pub at_least: Duration,
    /// The time since the last message that the other end awaited was sent.
    pub at_most: Duration,
}

/// Tells of an activated guest's first sign: its first output, which an observer beyond it may see.
pub struct SignWatch(Box<dyn Fn() -> Option<Duration> + Send>);

impl SignWatch {
    /// By a function that tells how long ago the sign was given, once it was.
    #[must_use]
    pub fn new(ago: impl Fn() -> Option<Duration> + Send + 'static) -> Self {
        Self(Box::new(ago))
    }

    /// How long ago it was given. `None`: not yet.
    #[must_use]
    pub fn ago(&self) -> Option<Duration> {
        (self.0)()
    }
}

impl std::fmt::Debug for SignWatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SignWatch").finish_non_exhaustive()
    }
}

/// What [`Vacant::activate`] made.
#[derive(Debug)]
pub struct Active<R> {
    /// The guest.
    pub running: R,
    /// How far the guest's own clock went on between the save of its state and its first run here, in
    /// microseconds, where it can be told.
    pub guest_stall_us: Option<u64>,
    /// Tells of its first sign. `None`: it is paused, or nobody looks.
    pub first_sign: Option<SignWatch>,
}
