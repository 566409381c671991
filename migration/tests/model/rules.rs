//! The rules, held against every state that can be reached.

use std::collections::HashMap;

use crate::state::{Destination, Disks, Holder, Memory, Source, State};
use crate::steps::{By, Model};

/// Every state that can be reached, in the order in which they were found, and how.
struct Reached {
    states: Vec<State>,
    /// Of each state, by its number, those it follows.
    before: Vec<Vec<(usize, By)>>,
}

impl Model {
    /// A breach of safety in this state.
    fn breach(self, state: State) -> Option<&'static str> {
        let (here, there) =
            (state.source == Source::Running, state.destination == Destination::Running);
        if here && there {
            return Some("two running");
        }
        if here && state.ran {
            return Some("the source runs though the destination ran");
        }
        if state.source == Source::Moved && !state.ran {
            return Some("dropped at the source before it ran at the destination");
        }
        let without =
            here && state.lock != Holder::Source || there && state.lock != Holder::Destination;
        if self.locks_seen && without {
            return Some("runs without its disks' locks");
        }
        if here && state.betrayed {
            return Some("runs over disks that changed after the operator's word");
        }
        None
    }

    /// Walks every state; gives how many there are.
    pub fn check(self) -> Result<usize, String> {
        let mut numbers = HashMap::from([(State::START, 0)]);
        let mut reached = Reached { states: vec![State::START], before: vec![Vec::new()] };
        let mut at = 0;
        while let Some(&state) = reached.states.get(at) {
            if let Some(breach) = self.breach(state) {
                return Err(format!("{breach}: {state:?}"));
            }
            for (next, by) in self.next(state) {
                let number = *numbers.entry(next).or_insert(reached.states.len());
                if number == reached.states.len() {
                    reached.states.push(next);
                    reached.before.push(Vec::new());
                }
                reached.before[number].push((at, by));
            }
            at += 1;
        }
        self.nobody_stands_for_ever(&reached)?;
        Ok(reached.states.len())
    }

    /// From every state in which the guest's owner hasn't crashed, a running guest can be reached without a fault,
    /// and one where the source knows; without the operator's word wherever somebody else can tell.
    fn nobody_stands_for_ever(self, reached: &Reached) -> Result<(), String> {
        let by_itself = |wanted| reached.leading_to(wanted, |by| by == By::Itself);
        let with_a_word = |wanted| reached.leading_to(wanted, |by| by != By::Fault);
        let rule = |good: &[bool], breach, excused: &dyn Fn(State) -> bool| match (0..good.len())
            .find(|&i| !good[i] && !excused(reached.states[i]))
        {
            Some(stands) => Err(format!("{breach}: {:?}", reached.states[stands])),
            None => Ok(()),
        };
        rule(&by_itself(State::alive), "nobody runs, nor ever will", &|state| {
            guest_lost(state) || disks_spoilt(state) || self.nobody_tells(state)
        })?;
        rule(&by_itself(State::settled), "the source is in doubt for ever", &|state| {
            self.nobody_tells(state)
        })?;
        let breach = "nobody runs, nor ever will, whatever the operator says";
        rule(&with_a_word(State::alive), breach, &guest_lost)?;
        let breach = "the source is in doubt for ever, whatever the operator says";
        rule(&with_a_word(State::settled), breach, &|_| false)
    }

    /// Neither the destination's host nor the disks' locks can tell a source in doubt any more.
    fn nobody_tells(self, state: State) -> bool {
        let silent = match state.memory {
            Memory::None => state.destination == Destination::Crashed,
            Memory::Expired => true,
            Memory::Process | Memory::Kept | Memory::Forgotten => false,
        };
        let locks_tell = self.locks_seen && state.disks == Disks::Unchanged;
        state.source == Source::InDoubt && silent && !locks_tell
    }
}

/// A stranger wrote to the disks: on its own, a source that gets the guest back doesn't go on over them.
fn disks_spoilt(state: State) -> bool {
    state.disks == Disks::Written && state.source != Source::Moved
}

/// Its owner crashed, or the operator gave it up.
fn guest_lost(state: State) -> bool {
    match (state.source, state.destination) {
        // Where the destination has the guest by `Commit`, it runs, so that such a state isn't here.
        (Source::Crashed | Source::Discarded, _) => true,
        (_, Destination::Crashed) => state.ran,
        _ => false,
    }
}

impl Reached {
    /// Of each state, whether one that is wanted can be reached, by such doings alone.
    fn leading_to(&self, wanted: fn(State) -> bool, by: impl Fn(By) -> bool) -> Vec<bool> {
        let mut good: Vec<bool> = self.states.iter().map(|state| wanted(*state)).collect();
        let mut queue: Vec<usize> = (0..good.len()).filter(|&i| good[i]).collect();
        while let Some(state) = queue.pop() {
            for &(from, whose) in &self.before[state] {
                if by(whose) && !good[from] {
                    good[from] = true;
                    queue.push(from);
                }
            }
        }
        good
    }
}
