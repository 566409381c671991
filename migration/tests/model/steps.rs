//! What may happen next: the steps of both sides, of the operator, and everything that goes wrong; and the same
//! with one of the rules broken.

use crate::state::{Destination, Disks, Holder, MESSAGES, Memory, Message, Source, State};

/// A rule broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    SourceResumesAfterCommitWithoutAnAnswer,
    SourceTakesFailedForNeverActivated,
    SourceTakesUnknownIdForNeverActivated,
    SourceTakesUnknownIdForActivated,
    SourceIgnoresNeverActivated,
    SourceSaysDoneBeforeItKnows,
    SourceMayNotTryTheLocks,
    SourceKeepsAWordThatALockRefuted,
    SourceFollowsAWordAgainstALock,
    StuckSourceKeepsAWord,
    SourceDoesNotResumeOnAWord,
    SourceDoesNotDiscardOnAWord,
    RunsWithoutCommit,
    RunsBeforeItHasTheLocks,
    DoesNotMarkTheDisks,
    GivesBackAfterItMarkedTheDisks,
    AnswersNeverActivatedAndStaysReady,
    AnswersNeverActivatedWhenItHasForgotten,
    SaysFailedAfterReady,
    ForgetsWithoutDone,
    KeepsItsVerdictInItsProcessOnly,
}

/// By whose doing a state follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// The sides', the network's, a stranger's.
    Itself,
    /// The operator's word, on the migration or on a guest that is stuck.
    Operator,
    /// A crash, or a verdict that nobody asked for in time.
    Fault,
}

#[derive(Clone, Copy, Debug)]
pub struct Model {
    /// Both hosts see the same locks, and the destination said so.
    pub locks_seen: bool,
    pub mutation: Option<Mutation>,
}

/// The states that follow one.
pub struct Next(Vec<(State, By)>);

impl Next {
    fn step(&mut self, state: State) {
        self.0.push((state, By::Itself));
    }

    fn word(&mut self, state: State) {
        self.0.push((state, By::Operator));
    }

    fn fault(&mut self, state: State) {
        self.0.push((state, By::Fault));
    }
}

impl Model {
    fn is(self, mutation: Mutation) -> bool {
        self.mutation == Some(mutation)
    }

    pub fn next(self, state: State) -> Vec<(State, By)> {
        let mut next = Next(Vec::new());
        match state.source {
            Source::Stopped => Self::stopped(state, &mut next),
            Source::InDoubt => {
                self.in_doubt(state, &mut next);
                self.word_in_doubt(state, &mut next);
            }
            Source::Resuming => self.resuming(state, &mut next),
            Source::Running | Source::Moved | Source::Discarded | Source::Crashed => {}
        }
        self.destination(state, &mut next);
        self.remember(state, &mut next);
        self.answer(state, &mut next);
        if self.locks_seen {
            stranger(state, &mut next);
        }
        for message in MESSAGES.into_iter().filter(|message| state.has(*message)) {
            next.step(state.lose(message));
        }
        if state.source != Source::Crashed {
            next.fault(state.unlock(Holder::Source).source(Source::Crashed));
        }
        if state.destination != Destination::Crashed {
            let now = state.unlock(Holder::Destination).destination(Destination::Crashed);
            next.fault(if now.memory == Memory::Process {
                now.memory(Memory::Expired)
            } else {
                now
            });
        }
        next.0
    }

    /// What the source may do with the locks: nothing stands in its way where they aren't shared.
    fn source_locks(self, state: State) -> Option<State> {
        let changed = state.disks != Disks::Unchanged && !state.trusting;
        match (self.locks_seen, state.lock, changed) {
            (false, ..) => Some(state),
            (true, Holder::Nobody, false) => Some(State { lock: Holder::Source, ..state }),
            (true, ..) => None,
        }
    }

    fn stopped(state: State, next: &mut Next) {
        if state.has(Message::Ready) {
            next.step(state.source(Source::InDoubt).send(Message::Commit));
            // Only part of it gets out.
            next.step(state.source(Source::InDoubt));
        }
        // `Failed`, cancelled, timed out, or not a byte of `Commit` got out.
        next.step(state.source(Source::Resuming));
    }

    fn in_doubt(self, state: State, next: &mut Next) {
        use Mutation as M;
        let resumes = |message, mutation| state.has(message) && self.is(mutation);
        if state.has(Message::Activated) {
            next.step(state.source(Source::Moved).send(Message::Done));
        }
        if state.has(Message::NeverActivated) && !self.is(M::SourceIgnoresNeverActivated)
            || resumes(Message::UnknownId, M::SourceTakesUnknownIdForNeverActivated)
            || resumes(Message::Failed, M::SourceTakesFailedForNeverActivated)
            || self.is(M::SourceResumesAfterCommitWithoutAnAnswer)
        {
            next.step(state.source(Source::Resuming));
        }
        if resumes(Message::UnknownId, M::SourceTakesUnknownIdForActivated) {
            next.step(state.source(Source::Moved));
        }
        next.step(state.send(Message::Resolve));
        if self.is(M::SourceSaysDoneBeforeItKnows) {
            next.step(state.send(Message::Resolve).send(Message::Done));
        }
        if self.locks_seen
            && !self.is(M::SourceMayNotTryTheLocks)
            && let Some(now) = self.source_locks(state)
        {
            next.step(now.source(Source::Running));
        }
    }

    /// `--resolve` in doubt. The operator says what is true, or where a lock is to refute it what isn't.
    fn word_in_doubt(self, state: State, next: &mut Next) {
        use Mutation as M;
        if state.ran && !self.is(M::SourceDoesNotDiscardOnAWord) {
            next.word(state.source(Source::Moved));
        }
        let refutable = self.locks_seen && (!state.ran || state.lock == Holder::Destination);
        if !(state.never_ran() || refutable) || self.is(M::SourceDoesNotResumeOnAWord) {
            return;
        }
        match self.source_locks(State { trusting: true, ..state }) {
            Some(now) => next.word(now.source(Source::Running)),
            None if self.is(M::SourceFollowsAWordAgainstALock) => {
                next.word(State { lock: Holder::Source, ..state }.source(Source::Running));
            }
            None if self.is(M::SourceKeepsAWordThatALockRefuted) => {
                next.word(State { trusting: true, ..state });
            }
            None => {}
        }
    }

    /// By itself, or by the operator's word, which is good for one try.
    fn resuming(self, state: State, next: &mut Next) {
        if let Some(now) = self.source_locks(state) {
            return next.step(now.source(Source::Running));
        }
        next.word(state.source(Source::Discarded));
        match self.source_locks(State { trusting: true, ..state }) {
            _ if self.is(Mutation::SourceDoesNotResumeOnAWord) => {}
            Some(now) => next.word(now.source(Source::Running)),
            None if self.is(Mutation::StuckSourceKeepsAWord) => {
                next.word(State { trusting: true, ..state });
            }
            None => {}
        }
    }

    fn destination(self, state: State, next: &mut Next) {
        use Mutation as M;
        match state.destination {
            Destination::Receiving => {
                if state.has(Message::End) {
                    next.step(state.destination(Destination::Restored).send(Message::Ready));
                }
                // `Cancel`, a lost connection, a deadline, a failed restore: no verdict is needed.
                next.step(state.destination(Destination::Discarded).send(Message::Failed));
            }
            Destination::Restored => {
                if state.has(Message::Commit) || self.is(M::RunsWithoutCommit) {
                    next.step(state.destination(Destination::Committed));
                }
                next.step(self.discard(state));
                if self.is(M::AnswersNeverActivatedAndStaysReady) {
                    next.step(state.send(Message::NeverActivated));
                }
            }
            Destination::Committed => {
                let now = state.destination(Destination::Activating);
                match state.lock {
                    _ if !self.locks_seen => next.step(now),
                    Holder::Nobody => next.step(State { lock: Holder::Destination, ..now }),
                    _ if self.is(M::RunsBeforeItHasTheLocks) => next.step(now),
                    _ => {}
                }
                // The lock is held, or the machine fails.
                next.step(self.discard(state));
            }
            Destination::Activating => {
                if state.disks == Disks::Marked || self.is(M::DoesNotMarkTheDisks) {
                    let now = state.destination(Destination::Running).memory(Memory::Process);
                    next.step(State { ran: true, ..now }.send(Message::Activated));
                } else {
                    next.step(State { disks: Disks::Marked, ..state });
                }
                // None of them can be marked.
                if state.disks != Disks::Marked || self.is(M::GivesBackAfterItMarkedTheDisks) {
                    next.step(self.discard(state));
                }
            }
            // The verdict is kept before anything else.
            Destination::Running if state.memory == Memory::Process && !self.in_process() => {}
            Destination::Running => {
                let now = state.unlock(Holder::Destination).destination(Destination::Ended);
                next.step(now);
            }
            Destination::Ended | Destination::Discarded | Destination::Crashed => {}
        }
    }

    /// Gives the guest up after `Ready`, for whatever reason.
    fn discard(self, state: State) -> State {
        let now = state.unlock(Holder::Destination).destination(Destination::Discarded);
        if self.is(Mutation::SaysFailedAfterReady) {
            return now.send(Message::Failed);
        }
        now.memory(Memory::Process).send(Message::NeverActivated)
    }

    fn in_process(self) -> bool {
        self.is(Mutation::KeepsItsVerdictInItsProcessOnly)
    }

    /// What becomes of the verdict.
    fn remember(self, state: State, next: &mut Next) {
        let known = matches!(state.memory, Memory::Process | Memory::Kept);
        let ends = matches!(state.destination, Destination::Ended | Destination::Discarded);
        let lives = state.destination != Destination::Crashed;
        if state.memory == Memory::Process && lives && !self.in_process() {
            next.step(state.memory(Memory::Kept));
        }
        // The process ends, and what it alone knew is gone.
        if state.memory == Memory::Process && ends && self.in_process() {
            next.step(state.memory(Memory::Forgotten));
        }
        let heard = state.has(Message::Done) || self.is(Mutation::ForgetsWithoutDone);
        if known && state.ran && heard {
            next.step(state.memory(Memory::Forgotten));
        }
        if state.memory == Memory::Kept {
            next.fault(state.memory(Memory::Expired));
        }
    }

    /// The answer to `Resolve`, of the destination's process or another of its host.
    fn answer(self, state: State, next: &mut Next) {
        if !state.has(Message::Resolve) {
            return;
        }
        // It can't read the question in time, say, or hears too many at once.
        next.step(state.send(Message::Failed));
        let verdict = if state.ran { Message::Activated } else { Message::NeverActivated };
        match state.memory {
            Memory::Process | Memory::Kept => next.step(state.send(verdict)),
            Memory::Expired if self.is(Mutation::AnswersNeverActivatedWhenItHasForgotten) => {
                next.step(state.send(Message::NeverActivated));
            }
            Memory::None | Memory::Expired | Memory::Forgotten => {
                next.step(state.send(Message::UnknownId));
            }
        }
    }
}

/// Somebody gives the disk to another VM.
fn stranger(state: State, next: &mut Next) {
    match state.lock {
        Holder::Nobody => next.step(State { lock: Holder::Stranger, ..state }),
        Holder::Stranger => {
            next.step(state.unlock(Holder::Stranger));
            let betrayed = state.betrayed || state.trusting;
            next.step(State { disks: Disks::Written, betrayed, ..state });
        }
        Holder::Source | Holder::Destination => {}
    }
}
