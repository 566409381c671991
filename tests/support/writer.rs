//! The writers of memory in a guest: each rewrites a block of its own, pass after pass, and looks at every word
//! that it overwrites.

use std::sync::atomic::Ordering;
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::{Load, Watch, mix};

/// Words of a page.
const PAGE_WORDS: usize = 512;
/// What a writer's speed is measured with: pages, turns of its loop, and how often. Long enough that a guest's
/// clock, which may stand for a moment in an emulated host, tells the difference.
const TRIAL_PAGES: usize = 1024;
const TRIAL_TURNS: u32 = 1_000_000;
const TRIALS: usize = 7;

/// Every word of a block of memory has what the pass before wrote there, and gets something new.
pub(super) fn memory(watch: &Watch, writer: u32, load: &Load) {
    let key = mix(u64::from(writer) << 32);
    let turns = if load.mib_per_s == 0 { 0 } else { turns_for(load.mib_per_s) };
    let mut words = vec![0_u64; usize::try_from(load.writer_mib).unwrap() << 17];
    let mut last = None;
    while watch.goes_on() {
        let pass = last.map_or(key, |last: u64| last.wrapping_add(key | 1));
        if let Some((at, word)) = rewrite(&mut words, last, pass, turns) {
            watch.fault(&format!("memory: word {at} of writer {writer} was {word:#x}"));
        }
        last = Some(pass);
        watch.passes.fetch_add(1, Ordering::Relaxed);
        sleep(Duration::from_millis(load.rest_ms.into()));
    }
}

/// One pass. Gives the last word that was wrong.
fn rewrite(words: &mut [u64], last: Option<u64>, pass: u64, turns: u32) -> Option<(usize, u64)> {
    let mut wrong = None;
    for (page, words) in words.chunks_mut(PAGE_WORDS).enumerate() {
        for (at, word) in (page * PAGE_WORDS..).zip(words.iter_mut()) {
            let place = (at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            if last.map_or(0, |last| last ^ place) != *word {
                wrong = Some((at, *word));
            }
            *word = pass ^ place;
        }
        std::hint::black_box(words);
        turn(turns);
    }
    wrong
}

/// Work that touches no memory.
fn turn(turns: u32) {
    for number in 0..turns {
        std::hint::black_box(number);
    }
}

/// How many turns after each page make a writer as fast as that. (Rather than rest: what slows its vCPU down
/// slows it down too.)
fn turns_for(mib_per_s: u32) -> u32 {
    let mut words = vec![0; TRIAL_PAGES * PAGE_WORDS];
    let page = usual_ns(|| {
        words.fill(0);
        assert_eq!(rewrite(&mut words, None, 1, 0), None);
    }) / TRIAL_PAGES as u128;
    let turns = usual_ns(|| turn(TRIAL_TURNS)).max(1);
    // 256 pages are 1 MiB.
    let left = (1_000_000_000 / 256 / u128::from(mib_per_s)).saturating_sub(page);
    u32::try_from(left * u128::from(TRIAL_TURNS) / turns).unwrap_or(u32::MAX)
}

/// The time that something takes in most cases.
fn usual_ns(mut run: impl FnMut()) -> u128 {
    let mut times = [0; TRIALS];
    for time in &mut times {
        let start = Instant::now();
        run();
        *time = start.elapsed().as_nanos();
    }
    times.sort_unstable();
    times[TRIALS / 2]
}
