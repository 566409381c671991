//! A model check of the hand-over: every order of events after the last burst, with messages lost,
//! delayed and repeated, either side crashing, giving up or asking at any time, verdicts kept and
//! forgotten, another VM at the disks, and the operator's word.
//!
//! The names of messages and outcomes are those of the code. The network keeps every message until it
//! is lost, so that each may arrive late and many times. Each rule that the protocol rests on can be
//! broken on purpose ([`Mutation`]), and the check has to notice.

#[path = "model/rules.rs"]
mod rules;
#[path = "model/state.rs"]
mod state;
#[path = "model/steps.rs"]
mod steps;

use steps::{Model, Mutation};

#[test]
fn the_hand_over_keeps_its_rules() {
    for locks_seen in [false, true] {
        let states = Model { locks_seen, mutation: None }.check();
        let states = states.unwrap_or_else(|breach| panic!("locks seen: {locks_seen}: {breach}"));
        println!("locks seen: {locks_seen}: {states} states");
        assert!(states > 1000, "{states} states: the model is too small to mean anything");
    }
}

/// Breaks a rule and looks what comes of it: one of these.
#[track_caller]
fn noticed(mutation: Mutation, locks_seen: bool, breaches: &[&str]) {
    match (Model { locks_seen, mutation: Some(mutation) }).check() {
        Err(found) => {
            let known = breaches.iter().any(|breach| found.starts_with(&format!("{breach}: ")));
            assert!(known, "{mutation:?}: {found}");
        }
        Ok(states) => panic!("{mutation:?} went unnoticed in {states} states"),
    }
}

/// Two copies, at once or one after the other.
const TWO: [&str; 2] = ["two running", "the source runs though the destination ran"];
const NONE: [&str; 1] = ["nobody runs, nor ever will"];
const DOUBT: [&str; 1] = ["the source is in doubt for ever"];

#[test]
fn a_source_that_resumes_without_an_answer_is_noticed() {
    noticed(Mutation::SourceResumesAfterCommitWithoutAnAnswer, false, &TWO);
}

#[test]
fn a_source_that_takes_another_answer_for_a_verdict_is_noticed() {
    noticed(Mutation::SourceTakesFailedForNeverActivated, false, &TWO);
    noticed(Mutation::SourceTakesUnknownIdForNeverActivated, false, &TWO);
    let dropped = "dropped at the source before it ran at the destination";
    noticed(Mutation::SourceTakesUnknownIdForActivated, false, &[dropped]);
}

#[test]
fn a_destination_that_runs_without_commit_is_noticed() {
    noticed(Mutation::RunsWithoutCommit, false, &TWO);
}

#[test]
fn a_verdict_that_changes_is_noticed() {
    noticed(Mutation::AnswersNeverActivatedAndStaysReady, false, &TWO);
    noticed(Mutation::AnswersNeverActivatedWhenItHasForgotten, false, &TWO);
}

#[test]
fn a_verdict_that_is_not_given_or_not_kept_is_noticed() {
    noticed(Mutation::SaysFailedAfterReady, false, &NONE);
    noticed(Mutation::KeepsItsVerdictInItsProcessOnly, false, &NONE);
    noticed(Mutation::KeepsItsVerdictInItsProcessOnly, true, &DOUBT);
    noticed(Mutation::ForgetsWithoutDone, false, &DOUBT);
    noticed(Mutation::SourceSaysDoneBeforeItKnows, false, &DOUBT);
}

#[test]
fn a_lock_without_a_mark_is_noticed() {
    noticed(Mutation::DoesNotMarkTheDisks, true, &TWO[1..]);
}

#[test]
fn a_marked_disk_that_is_given_back_is_noticed() {
    noticed(Mutation::GivesBackAfterItMarkedTheDisks, true, &NONE);
}

#[test]
fn running_before_the_lock_is_noticed() {
    let without = ["runs without its disks' locks"];
    noticed(Mutation::RunsBeforeItHasTheLocks, true, &[&TWO[..], &without].concat());
}

#[test]
fn a_source_that_waits_for_ever_is_noticed() {
    noticed(Mutation::SourceIgnoresNeverActivated, false, &NONE);
}

#[test]
fn a_source_that_never_tries_the_locks_is_noticed() {
    noticed(Mutation::SourceMayNotTryTheLocks, true, &NONE);
}

#[test]
fn a_word_that_outlives_its_refutation_is_noticed() {
    let changed = "runs over disks that changed after the operator's word";
    noticed(Mutation::SourceKeepsAWordThatALockRefuted, true, &[TWO[1], changed]);
    noticed(Mutation::StuckSourceKeepsAWord, true, &[changed]);
}

#[test]
fn a_word_that_is_followed_against_a_lock_is_noticed() {
    noticed(Mutation::SourceFollowsAWordAgainstALock, true, &TWO);
}

#[test]
fn a_word_that_is_not_followed_is_noticed() {
    let (runs, doubts) = (
        "nobody runs, nor ever will, whatever the operator says",
        "the source is in doubt for ever, whatever the operator says",
    );
    for locks_seen in [false, true] {
        noticed(Mutation::SourceDoesNotResumeOnAWord, locks_seen, &[runs]);
        noticed(Mutation::SourceDoesNotDiscardOnAWord, locks_seen, &[doubts]);
    }
}
