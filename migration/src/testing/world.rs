//! What both sides share and what the rules are about: who runs, who holds the disk, who crashed.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

/// A side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Where the guest is at first.
    Source = 0,
    /// Where it goes.
    Destination = 1,
}

/// What a crashing side unwinds with.
#[derive(Clone, Copy, Debug)]
pub struct Crash;

/// The state of the world.
#[derive(Debug, Default)]
pub struct State {
    running: [bool; 2],
    crashed: [bool; 2],
    /// The destination has read `Commit` and not given the guest back.
    destination_owns: bool,
    /// The destination knows that the source keeps the guest, and will not ask.
    pub source_keeps: bool,
    /// The guest's owner crashed.
    pub owner_crashed: bool,
    lock: Option<usize>,
    /// Counts the disk's changes.
    pub disk: u64,
    steps: [u64; 2],
    crash_at: Option<(usize, u64)>,
    /// RAM and sections of the guest at its stop.
    pub at_stop: Option<(Vec<u8>, Vec<u8>)>,
    /// When it was saved last, by the link's clock.
    pub saved_at: Option<Duration>,
    /// Times the guest was activated at the destination.
    pub activations: u32,
    /// Breaches of a rule.
    pub breaches: Vec<String>,
}

/// The world, shared.
#[derive(Clone, Debug, Default)]
pub struct World(Arc<Mutex<State>>);

impl World {
    /// A world in which a side may crash at one of its steps.
    #[must_use]
    pub fn new(crash_at: Option<(Side, u64)>) -> Self {
        let crash_at = crash_at.map(|(side, step)| (side as usize, step));
        Self(Arc::new(Mutex::new(State { crash_at, ..State::default() })))
    }

    /// Its state.
    ///
    /// # Panics
    /// Never: no holder panics.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no holder panics")
    }

    /// One step of a side: anything that another process could see or that could fail.
    pub fn step(&self, side: Side) {
        let mut state = self.state();
        let me = side as usize;
        state.steps[me] += 1;
        if state.crash_at == Some((me, state.steps[me])) {
            state.crashed[me] = true;
            state.running[me] = false;
            state.owner_crashed |= state.destination_owns == (side == Side::Destination);
            if state.lock == Some(me) {
                state.lock = None;
            }
            drop(state);
            std::panic::resume_unwind(Box::new(Crash));
        }
    }

    /// The guest begins to run on a side, which has to hold the lock, alone.
    pub fn run(&self, side: Side) {
        let mut state = self.state();
        if state.running[1 - side as usize] {
            state.breaches.push(format!("two running: {side:?} began while the other ran"));
        }
        if state.lock != Some(side as usize) {
            state.breaches.push(format!("{side:?} runs without the disk's lock"));
        }
        state.running[side as usize] = true;
    }

    /// The guest stops running on a side.
    pub fn stop(&self, side: Side) {
        self.state().running[side as usize] = false;
    }

    /// Tries to take the lock.
    #[must_use]
    pub fn lock(&self, side: Side) -> bool {
        let mut state = self.state();
        let free = state.lock.is_none_or(|holder| holder == side as usize);
        if free {
            state.lock = Some(side as usize);
        }
        free
    }

    /// Releases the lock, if held.
    pub fn unlock(&self, side: Side) {
        let mut state = self.state();
        if state.lock == Some(side as usize) {
            state.lock = None;
        }
    }
}

impl State {
    /// The guest changes hands.
    pub fn hand(&mut self, to: Side) {
        self.destination_owns = to == Side::Destination;
    }

    /// On which sides the guest runs.
    #[must_use]
    pub fn running(&self) -> (bool, bool) {
        (self.running[0], self.running[1])
    }

    /// Whether a side crashed.
    #[must_use]
    pub fn crashed(&self, side: Side) -> bool {
        self.crashed[side as usize]
    }

    /// How many steps a side took.
    #[must_use]
    pub fn steps(&self, side: Side) -> u64 {
        self.steps[side as usize]
    }
}
