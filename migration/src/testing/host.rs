//! The destination's end of a fake guest: the place for it, the guest before it runs, and running.

use std::cell::Cell;
use std::time::Duration;

use super::guest::{FakeLive, Habits, Ram};
use super::link::End;
use super::world::{Side, World};
use crate::channel::{Clock, Flow};
use crate::guest::{Active, GuestError, Host, Reserved, SignWatch, Since, Vacant};
use crate::pages::Run;
use crate::plan::{Plan, SectionId};
use crate::state::Section;

/// The destination's machine.
#[derive(Debug)]
pub struct FakeHost {
    /// The world.
    pub world: World,
    /// The guest's habits, where they show at the destination.
    pub habits: Habits,
    /// Tells what writing a page takes, and when the guest was saved.
    pub clock: Option<End>,
}

impl Host for FakeHost {
    type Vacant = FakeVacant;

    fn reserve(
        &mut self,
        plan: &Plan,
        lock_mark: Option<u64>,
        poll: &mut dyn FnMut() -> Flow,
    ) -> Result<Reserved<FakeVacant>, Vec<String>> {
        self.world.step(Side::Destination);
        if poll() == Flow::Cancel {
            return Err(Vec::new());
        }
        if plan.config != [1, 2, 3] {
            return Err(vec!["another configuration".to_owned()]);
        }
        let guest = FakeVacant {
            world: self.world.clone(),
            habits: self.habits,
            clock: self.clock.take(),
            ram: Ram::zero(),
            state: Vec::new(),
        };
        let locks_seen = !self.habits.blind && lock_mark == Some(1 << 62);
        Ok(Reserved { guest, locks_seen, warnings: Vec::new() })
    }
}

/// The destination's guest before it runs.
#[derive(Debug)]
pub struct FakeVacant {
    world: World,
    habits: Habits,
    clock: Option<End>,
    ram: Ram,
    state: Vec<u8>,
}

impl Vacant for FakeVacant {
    type Running = FakeRunning;

    fn parts(&self) -> Vec<SectionId> {
        FakeLive::section_ids(1)
    }

    fn try_restore(
        &mut self,
        example: &[Section],
        saved: Since,
    ) -> Result<Vec<String>, Vec<String>> {
        self.restore(example, saved).map(|()| vec!["an MSR is spared".to_owned()])
    }

    fn pages_mut(&mut self, run: Run) -> Result<&mut [u8], GuestError> {
        let time = Duration::from_micros(self.habits.page_us * run.count());
        self.clock.iter().filter(|_| !time.is_zero()).for_each(|clock| clock.sleep(time));
        Ok(self.ram.bytes(run))
    }

    fn zero(&mut self, run: Run) -> Result<(), GuestError> {
        self.ram.bytes(run).fill(0);
        Ok(())
    }

    fn restore(&mut self, sections: &[Section], saved: Since) -> Result<(), Vec<String>> {
        let (now, saved_at) = (self.clock.as_ref().map(Clock::now), self.world.state().saved_at);
        if let Some((now, saved_at)) = now.zip(saved_at) {
            let ago = now - saved_at;
            if !(saved.at_least..=saved.at_most).contains(&ago) {
                self.world.state().breaches.push(format!("saved {ago:?} ago, not {saved:?}"));
            }
        }
        self.world.step(Side::Destination);
        self.state = sections[0].body.iter().copied().take(8).collect();
        Ok(())
    }

    fn activate(self, paused: bool) -> Result<Active<FakeRunning>, GuestError> {
        self.world.state().hand(Side::Destination);
        self.world.step(Side::Destination);
        if self.habits.activation_fails || !self.world.lock(Side::Destination) {
            self.world.state().hand(Side::Source);
            return Err("the disk's lock is held".into());
        }
        self.world.step(Side::Destination);
        self.world.run(Side::Destination);
        {
            let mut state = self.world.state();
            state.disk += 1;
            state.activations += 1;
            if state.at_stop != Some((self.ram.0.clone(), self.state.clone())) {
                state.breaches.push("activated with other memory or state".to_owned());
            }
        }
        self.world.step(Side::Destination);
        let looks = Cell::new(0);
        let sign_after = self.habits.sign_after;
        let first_sign = (!paused).then(|| {
            SignWatch::new(move || {
                let before = looks.replace(looks.get() + 1);
                sign_after.is_some_and(|after| before >= after).then_some(Duration::ZERO)
            })
        });
        Ok(Active { running: FakeRunning(()), guest_stall_us: None, first_sign })
    }
}

/// The destination's guest, running.
#[derive(Debug)]
pub struct FakeRunning(());
