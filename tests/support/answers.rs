//! A guest's clocks, seen from outside: it answers each line typed on its console with the time of its clocks. It read
//! them after the line was typed and before the answer was seen, however slow either was: so each answer says between
//! which bounds its clocks are ahead of this host's.

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How long to wait between two looks at the console.
const LOOK: Duration = Duration::from_millis(5);
/// A guest's clock may run slower or faster by one part in so many.
const DRIFT: i64 = 2000;

/// What both clocks show at a moment: nanoseconds since their own start.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    monotonic: i64,
    real: i64,
}

impl Moment {
    /// Now, on this host.
    pub fn now() -> Self {
        static START: OnceLock<Instant> = OnceLock::new();
        let start = *START.get_or_init(Instant::now);
        let real = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        Self { monotonic: nanos(start.elapsed()), real: nanos(real) }
    }
}

/// One of the two.
type Clock = fn(&Moment) -> i64;

fn nanos(time: Duration) -> i64 {
    i64::try_from(time.as_nanos()).unwrap()
}

/// An answer of the guest's: `heard NUMBER at MONOTONIC REAL`.
#[derive(Clone, Copy, Debug)]
pub struct Answer {
    number: usize,
    /// The guest's clocks.
    guest: Moment,
    /// When it was seen here.
    seen: Moment,
}

impl Answer {
    fn parse(line: &str, seen: Moment) -> Option<Self> {
        let (number, clocks) = line.trim_end().strip_prefix("heard ")?.split_once(" at ")?;
        let (monotonic, real) = clocks.split_once(' ')?;
        let guest = Moment { monotonic: monotonic.parse().ok()?, real: real.parse().ok()? };
        Some(Self { number: number.parse().ok()?, guest, seen })
    }
}

/// Watches a console for answers.
pub struct Observer {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<Answer>>,
}

impl Observer {
    /// Watches what is written to this file.
    pub fn start(console: PathBuf) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let watch = move || {
            let mut file = File::open(console).unwrap();
            let (mut unread, mut answers) = (Vec::new(), Vec::new());
            loop {
                let last = stopped.load(Ordering::SeqCst);
                file.read_to_end(&mut unread).unwrap();
                let seen = Moment::now();
                let whole = unread.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
                let lines: Vec<u8> = unread.drain(..whole).collect();
                let lines = String::from_utf8_lossy(&lines);
                answers.extend(lines.lines().filter_map(|line| Answer::parse(line, seen)));
                if last {
                    return answers;
                }
                sleep(LOOK);
            }
        };
        Self { stop, thread: spawn(watch) }
    }

    /// Those seen until now.
    pub fn answers(self) -> Vec<Answer> {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().unwrap()
    }
}

/// What the answers of a guest before its move, and after it, say of its clocks, where line `n` was typed at `typed[n]`.
///
/// # Errors
/// Its monotonic clock went back, or on by more than what passed outside from the last line that it answered at the source
/// to its first answer at the destination; or a clock is further ahead of this host's, or behind it, than it was.
pub fn check(typed: &[Moment], before: &[Answer], after: &[Answer]) -> Result<String, String> {
    let (Some(last), Some(first)) = (before.last(), after.first()) else {
        return Err(format!("{} answers before the move, {} after", before.len(), after.len()));
    };
    let span = after[after.len() - 1].seen.monotonic - typed[before[0].number].monotonic;
    let drift = span / DRIFT;
    let step = first.guest.monotonic - last.guest.monotonic;
    let outside = first.seen.monotonic - typed[last.number].monotonic;
    let mut told =
        format!("CLOCK_MONOTONIC went on by {step} ns where {outside} ns passed outside");
    if step <= 0 || step > outside + drift {
        return Err(told);
    }
    let clocks: [(_, Clock); 2] =
        [("CLOCK_MONOTONIC", |m| m.monotonic), ("CLOCK_REALTIME", |m| m.real)];
    for (name, clock) in clocks {
        // By how much it is ahead: at least, at most.
        let ahead = |answers: &[Answer]| {
            let least = answers.iter().map(|a| clock(&a.guest) - clock(&a.seen)).max().unwrap();
            let most = answers.iter().map(|a| clock(&a.guest) - clock(&typed[a.number])).min();
            (least, most.unwrap())
        };
        let ((least, most), (least_then, most_then)) = (ahead(before), ahead(after));
        let by = (least_then - most, most_then - least);
        told += &format!("; {name} is ahead by {} to {} ns more", by.0, by.1);
        let steady = least <= most + drift && least_then <= most_then + drift;
        if !steady || by.0 > drift || by.1 < -drift {
            return Err(format!("{told}, with a drift of {drift} ns at most, steady: {steady}"));
        }
    }
    Ok(told)
}

#[test]
fn a_clock_that_jumps_is_noticed() {
    // Typed each 100 ms, answered after 3 ms by a clock that is read after 1 ms; a move of 50 ms.
    let ms = 1_000_000;
    let at = |time: i64| Moment { monotonic: time * ms, real: (1 << 60) + time * ms };
    let typed: Vec<_> = (0..10).map(|n| at(n * 100)).collect();
    let answers = |numbers: std::ops::Range<usize>, late: i64, jump: i64, real_jump: i64| {
        let answer = |number| {
            let time = i64::try_from(number).unwrap() * 100 + late;
            let guest =
                Moment { monotonic: (time + 1 + jump) * ms, real: (time + 1 + real_jump) * ms };
            Answer { number, guest, seen: at(time + 3) }
        };
        numbers.map(answer).collect::<Vec<_>>()
    };
    let moved = |jump, real_jump| {
        check(&typed, &answers(0..5, 0, 0, 0), &answers(5..10, 0, jump, real_jump))
    };
    for fine in [(0, 0), (2, -2)] {
        moved(fine.0, fine.1).unwrap();
    }
    for wrong in [(5, 0), (-5, 0), (0, 5), (0, -5), (-200, 0)] {
        assert!(moved(wrong.0, wrong.1).is_err(), "{wrong:?}");
    }
    check(&typed, &answers(0..5, 0, 0, 0), &answers(5..10, 50, 0, 0)).unwrap();
    assert!(check(&typed, &answers(0..5, 0, 0, 0), &[]).is_err());
}
