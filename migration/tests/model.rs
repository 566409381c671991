//! A model check of the hand-over: every order of events after the last burst, with messages lost,
//! delayed and repeated, either side crashing, giving up or asking at any time.
//!
//! The names of messages and outcomes are those of the code. The network keeps every message until it
//! is lost, so that each may arrive late and many times. Each rule that the protocol rests on can be
//! broken on purpose ([`Mutation`]), and the check has to notice.

use std::collections::{HashMap, HashSet, VecDeque};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Source {
    /// Stop-and-copy is sent, the disks' locks are released; waits for `Ready`.
    Stopped,
    /// A byte of `Commit` was written, no answer read.
    InDoubt,
    /// The guest is the source's: it takes the locks back and resumes.
    Resuming,
    Running,
    /// `Activated` was read: dropped.
    Moved,
    Crashed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Destination {
    Receiving,
    /// `Ready` was sent.
    Restored,
    /// The whole of `Commit` was read.
    Committed,
    Running,
    /// The guest ran and came to its own end.
    Ended,
    /// Never activated, and never will be.
    Discarded,
    Crashed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
enum Message {
    End,
    Ready,
    Commit,
    Activated,
    NeverActivated,
    Cancel,
    Resolve,
}

const MESSAGES: [Message; 7] = [
    Message::End,
    Message::Ready,
    Message::Commit,
    Message::Activated,
    Message::NeverActivated,
    Message::Cancel,
    Message::Resolve,
];

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Holder {
    Nobody,
    Source,
    Destination,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct State {
    source: Source,
    destination: Destination,
    net: u8,
    lock: Holder,
    /// The destination has marked the disks.
    changed: bool,
    /// The guest has run at the destination.
    ran: bool,
    /// The source goes by the operator's word that no other copy runs, whatever the disks look like.
    trusting: bool,
}

/// A rule broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mutation {
    SourceResumesAfterCommitWithoutAnAnswer,
    RunsWithoutCommit,
    AnswersNeverActivatedAndStaysReady,
    DoesNotMarkTheDisks,
    RunsBeforeItHasTheLocks,
    SourceIgnoresNeverActivated,
    SourceMayNotTryTheLocks,
    SourceKeepsAWordThatALockRefuted,
}

#[derive(Clone, Copy, Debug)]
struct Model {
    /// Both hosts see the same locks, and the destination said so.
    locks_seen: bool,
    mutation: Option<Mutation>,
}

impl State {
    const START: State = State {
        source: Source::Stopped,
        destination: Destination::Receiving,
        net: 1 << Message::End as u8,
        lock: Holder::Nobody,
        changed: false,
        ran: false,
        trusting: false,
    };

    fn has(self, message: Message) -> bool {
        self.net & (1 << message as u8) != 0
    }

    fn send(mut self, message: Message) -> State {
        self.net |= 1 << message as u8;
        self
    }

    fn source(self, source: Source) -> State {
        State { source, ..self }
    }

    fn destination(self, destination: Destination) -> State {
        State { destination, ..self }
    }

    fn alive(self) -> bool {
        self.source == Source::Running
            || matches!(self.destination, Destination::Running | Destination::Ended)
    }

    /// Releases what a side holds.
    fn unlock(self, side: Holder) -> State {
        State { lock: if self.lock == side { Holder::Nobody } else { self.lock }, ..self }
    }
}

impl Model {
    fn is(self, mutation: Mutation) -> bool {
        self.mutation == Some(mutation)
    }

    fn next(self, state: State) -> Vec<State> {
        let mut next = Vec::new();
        self.source_steps(state, &mut next);
        self.destination_steps(state, &mut next);
        let lose = MESSAGES.iter().filter(|message| state.has(**message));
        next.extend(lose.map(|message| State { net: state.net & !(1 << *message as u8), ..state }));
        if state.source != Source::Crashed {
            next.push(state.unlock(Holder::Source).source(Source::Crashed));
        }
        if state.destination != Destination::Crashed {
            next.push(state.unlock(Holder::Destination).destination(Destination::Crashed));
        }
        next
    }

    /// What the source may do with the locks: nothing stands in its way where they aren't shared.
    fn source_locks(self, state: State) -> Option<State> {
        match (self.locks_seen, state.lock, state.changed && !state.trusting) {
            (false, ..) => Some(state),
            (true, Holder::Nobody, false) => Some(State { lock: Holder::Source, ..state }),
            (true, ..) => None,
        }
    }

    fn source_steps(self, state: State, next: &mut Vec<State>) {
        match state.source {
            Source::Stopped => {
                if state.has(Message::Ready) {
                    next.push(state.source(Source::InDoubt).send(Message::Commit));
                    // Only part of it gets out.
                    next.push(state.source(Source::InDoubt));
                }
                // Cancelled, timed out, failed, or not a byte of `Commit` got out.
                next.push(state.source(Source::Resuming).send(Message::Cancel));
            }
            Source::InDoubt => {
                if state.has(Message::Activated) {
                    next.push(state.source(Source::Moved));
                }
                if state.has(Message::NeverActivated)
                    && !self.is(Mutation::SourceIgnoresNeverActivated)
                {
                    next.push(state.source(Source::Resuming));
                }
                next.push(state.send(Message::Resolve));
                if self.locks_seen && !self.is(Mutation::SourceMayNotTryTheLocks) {
                    next.extend(self.source_locks(state).map(|s| s.source(Source::Running)));
                }
                // The operator errs: the guest runs at the destination, whose lock refutes that.
                if self.locks_seen && state.destination == Destination::Running {
                    let trusting = self.is(Mutation::SourceKeepsAWordThatALockRefuted);
                    let now = self.source_locks(State { trusting: true, ..state });
                    next.extend(now.map(|s| s.source(Source::Running)));
                    next.push(State { trusting, ..state });
                }
                if self.is(Mutation::SourceResumesAfterCommitWithoutAnAnswer) {
                    next.push(state.source(Source::Resuming));
                }
            }
            Source::Resuming => {
                next.extend(self.source_locks(state).map(|s| s.source(Source::Running)));
            }
            Source::Running | Source::Moved | Source::Crashed => {}
        }
    }

    fn destination_steps(self, state: State, next: &mut Vec<State>) {
        let run = |state: State| {
            let changed = !self.is(Mutation::DoesNotMarkTheDisks);
            State { changed, ran: true, ..state }
                .destination(Destination::Running)
                .send(Message::Activated)
        };
        let discard =
            |state: State| state.destination(Destination::Discarded).send(Message::NeverActivated);
        match state.destination {
            Destination::Receiving => {
                if state.has(Message::End) {
                    next.push(state.destination(Destination::Restored).send(Message::Ready));
                }
                // `Cancel`, a lost connection, a deadline, a failed restore: no verdict is needed.
                next.push(state.destination(Destination::Discarded));
            }
            Destination::Restored => {
                if state.has(Message::Commit) || self.is(Mutation::RunsWithoutCommit) {
                    next.push(state.destination(Destination::Committed));
                }
                next.push(discard(state));
                if self.is(Mutation::AnswersNeverActivatedAndStaysReady) {
                    next.push(state.send(Message::NeverActivated));
                }
            }
            Destination::Committed => {
                match (self.locks_seen, state.lock) {
                    (false, _) => next.push(run(state)),
                    (true, Holder::Nobody) => {
                        next.push(run(State { lock: Holder::Destination, ..state }));
                    }
                    (true, _) if self.is(Mutation::RunsBeforeItHasTheLocks) => {
                        next.push(run(state));
                    }
                    (true, _) => {}
                }
                // The lock is held, or the machine fails.
                next.push(discard(state));
            }
            Destination::Running => {
                next.push(state.unlock(Holder::Destination).destination(Destination::Ended))
            }
            Destination::Ended | Destination::Discarded | Destination::Crashed => {}
        }
        if state.has(Message::Resolve) {
            match state.destination {
                Destination::Running | Destination::Ended => {
                    next.push(state.send(Message::Activated))
                }
                Destination::Discarded => next.push(state.send(Message::NeverActivated)),
                _ => {}
            }
        }
    }

    /// A breach of safety in this state.
    fn breach(state: State) -> Option<&'static str> {
        if state.source == Source::Running && state.destination == Destination::Running {
            return Some("two running");
        }
        if state.source == Source::Running && state.ran {
            return Some("the source runs though the destination ran");
        }
        if state.source == Source::Moved && !state.ran {
            return Some("dropped at the source before it ran at the destination");
        }
        None
    }

    /// Walks every state; gives how many there are.
    fn check(self) -> Result<usize, String> {
        let mut seen = HashSet::from([State::START]);
        let mut queue = VecDeque::from([State::START]);
        let mut before: HashMap<State, Vec<State>> = HashMap::new();
        while let Some(state) = queue.pop_front() {
            if let Some(breach) = Self::breach(state) {
                return Err(format!("{breach}: {state:?}"));
            }
            for next in self.next(state) {
                before.entry(next).or_default().push(state);
                if seen.insert(next) {
                    queue.push_back(next);
                }
            }
        }
        self.never_none(&seen, &before)?;
        Ok(seen.len())
    }

    /// From every state in which the guest's owner hasn't crashed, a running guest can be reached by
    /// steps other than a crash: nobody is left standing for ever.
    fn never_none(
        self,
        seen: &HashSet<State>,
        before: &HashMap<State, Vec<State>>,
    ) -> Result<(), String> {
        let crashes = |from: State, to: State| {
            (from.source != to.source && to.source == Source::Crashed)
                || (from.destination != to.destination && to.destination == Destination::Crashed)
        };
        let mut good: HashSet<State> = seen.iter().copied().filter(|s| s.alive()).collect();
        let mut queue: VecDeque<State> = good.iter().copied().collect();
        while let Some(state) = queue.pop_front() {
            for &from in before.get(&state).into_iter().flatten() {
                if !crashes(from, state) && good.insert(from) {
                    queue.push_back(from);
                }
            }
        }
        for state in seen.difference(&good) {
            let excused = match (state.source, state.destination) {
                // The owner crashed before it handed over. (Where the destination has the guest by `Commit`,
                // it runs, so that such a state isn't here.)
                (Source::Crashed, _) => true,
                // The owner crashed: the guest had run at the destination.
                (_, Destination::Crashed) if state.ran => true,
                // The destination crashed in the window in doubt, and no lock can tell: the operator's word.
                (Source::InDoubt, Destination::Crashed) => !self.locks_seen,
                _ => false,
            };
            if !excused {
                return Err(format!("nobody runs, nor ever will: {state:?}"));
            }
        }
        Ok(())
    }
}

#[test]
fn the_hand_over_keeps_its_rules() {
    for locks_seen in [false, true] {
        let states = Model { locks_seen, mutation: None }.check();
        let states = states.unwrap_or_else(|breach| panic!("locks seen: {locks_seen}: {breach}"));
        println!("locks seen: {locks_seen}: {states} states");
        assert!(states > 500, "{states} states: the model is too small to mean anything");
    }
}

/// The breach that a mutation leads to.
fn breach(mutation: Mutation, locks_seen: bool) -> String {
    match (Model { locks_seen, mutation: Some(mutation) }).check() {
        Err(breach) => breach,
        Ok(states) => panic!("{mutation:?} went unnoticed in {states} states"),
    }
}

#[test]
fn a_source_that_resumes_without_an_answer_is_noticed() {
    let found = breach(Mutation::SourceResumesAfterCommitWithoutAnAnswer, false);
    assert!(found.starts_with("two running") || found.starts_with("the source runs"), "{found}");
}

#[test]
fn a_destination_that_runs_without_commit_is_noticed() {
    let found = breach(Mutation::RunsWithoutCommit, false);
    assert!(found.starts_with("two running") || found.starts_with("the source runs"), "{found}");
}

#[test]
fn a_verdict_that_changes_is_noticed() {
    let found = breach(Mutation::AnswersNeverActivatedAndStaysReady, false);
    assert!(found.starts_with("two running") || found.starts_with("the source runs"), "{found}");
}

#[test]
fn a_lock_without_a_mark_is_noticed() {
    let found = breach(Mutation::DoesNotMarkTheDisks, true);
    assert!(found.starts_with("the source runs though the destination ran"), "{found}");
}

#[test]
fn running_before_the_lock_is_noticed() {
    let found = breach(Mutation::RunsBeforeItHasTheLocks, true);
    assert!(found.starts_with("two running") || found.starts_with("the source runs"), "{found}");
}

#[test]
fn a_source_that_waits_for_ever_is_noticed() {
    let found = breach(Mutation::SourceIgnoresNeverActivated, false);
    assert!(found.starts_with("nobody runs"), "{found}");
}

#[test]
fn a_source_that_never_tries_the_locks_is_noticed() {
    let found = breach(Mutation::SourceMayNotTryTheLocks, true);
    assert!(found.starts_with("nobody runs"), "{found}");
}

#[test]
fn a_word_that_outlives_its_refutation_is_noticed() {
    let found = breach(Mutation::SourceKeepsAWordThatALockRefuted, true);
    assert!(found.starts_with("the source runs though the destination ran"), "{found}");
}
