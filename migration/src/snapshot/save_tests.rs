//! How a snapshot ends: its steps in their order; a kill, a failure or a cancel at each of them; limits that are met, and
//! that can't be.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::tests::header;
use super::*;
use crate::channel::Flow;
use crate::policy::{Limits, OnTimeout};
use crate::report::{Observer, Progress, Stage};
use crate::testing::guest::{FakeLive, Habits};
use crate::testing::world::World;

/// Limits that the fake guest meets after its first round.
pub(super) const EASY: Limits = Limits {
    downtime: Duration::from_secs(10),
    timeout: Duration::from_secs(3600),
    on_timeout: OnTimeout::Abort,
};

/// Takes each step at once.
pub(super) struct AtOnce;

impl Storage for AtOnce {
    fn take(&mut self, step: Step, _: &mut dyn FnMut() -> Flow) -> io::Result<Flow> {
        step.take().map(|()| Flow::Continue)
    }
}

/// By what it is called in the tests, and its path.
fn name(step: &Step) -> (String, PathBuf) {
    let last = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
    let (doing, path) = match step {
        Step::Write { path, .. } => ("write", path),
        Step::Sync { path, .. } => ("sync", path),
        Step::Rename { to, .. } => ("rename to", to),
    };
    (format!("{doing} {}", last(path)), path.clone())
}

/// The steps of a full snapshot to `s` in a directory called `place`.
const STEPS: [&str; 6] = [
    "sync memory",
    "write state",
    "sync state",
    "sync s.partial-09090909090909090909090909090909",
    "rename to s",
    "sync place",
];

/// A directory called `place`, and what is in it.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("place")).unwrap();
        Self(dir)
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("place")
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path()).unwrap();
        let mut names: Vec<_> =
            entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

fn guest(world: &World, dirties: u64) -> FakeLive {
    FakeLive::new(world, 7, Habits { dirties, ..Habits::default() })
}

/// Takes a snapshot; gives what came of it. The guest goes on in any case.
fn attempt(
    place: &Place,
    live: Option<Limits>,
    storage: &mut dyn Storage,
    observer: &mut dyn Observer,
) -> Result<(), SnapshotError> {
    let world = World::new(None);
    let saved = save(&place.path().join("s"), guest(&world, 3), header(), live, storage, observer);
    assert!(world.state().running().0 && world.state().breaches.is_empty());
    match saved {
        Ok(_) => {
            check_whole(&place.path().join("s"), &world);
            assert_eq!(place.names(), ["s"]);
            Ok(())
        }
        Err(not) => {
            assert!(not.guest.is_ok());
            assert!(place.names().is_empty(), "{}: {:?}", not.error, place.names());
            Err(not.error)
        }
    }
}

fn check_whole(dir: &Path, world: &World) {
    let snapshot = Snapshot::open(dir).unwrap();
    let (ram, _) = world.state().at_stop.clone().unwrap();
    let mut memory = vec![0; BLOCK_LEN];
    let len = snapshot.read_block(0, &mut memory).unwrap();
    assert!(memory[..len] == ram);
}

fn goes_on(_: &Progress) -> Flow {
    Flow::Continue
}

/// Remembers the steps, and what was there when it was made durable.
#[derive(Default)]
struct Recorder {
    steps: Vec<String>,
    durable: BTreeMap<PathBuf, Vec<u8>>,
}

/// A file's bytes, or a directory's names.
fn contents(path: &Path) -> Vec<u8> {
    if !path.is_dir() {
        return fs::read(path).unwrap();
    }
    let mut names: Vec<_> =
        fs::read_dir(path).unwrap().map(|e| e.unwrap().file_name().into_encoded_bytes()).collect();
    names.sort();
    names.join(&b'/')
}

impl Storage for Recorder {
    fn take(&mut self, step: Step, poll: &mut dyn FnMut() -> Flow) -> io::Result<Flow> {
        let (name, path) = name(&step);
        self.steps.push(name);
        if let Step::Rename { from, .. } = &step {
            for path in [from.join(MEMORY_FILE), from.join(STATE_FILE), from.clone()] {
                assert_eq!(self.durable[&path], contents(&path), "{path:?} may be lost");
            }
        }
        let is_sync = matches!(step, Step::Sync { .. });
        let taken = AtOnce.take(step, poll);
        if is_sync {
            self.durable.insert(path.clone(), contents(&path));
        }
        taken
    }
}

#[test]
fn all_is_durable_before_it_has_its_name() {
    for live in [None, Some(EASY)] {
        let (place, mut recorder) = (Place::new(), Recorder::default());
        attempt(&place, live, &mut recorder, &mut goes_on).unwrap();
        // A live one's first round is on the disk before the last may have to wait for it.
        let more: &[&str] = if live.is_some() { &["sync memory"] } else { &[] };
        assert_eq!(recorder.steps, [more, &STEPS].concat());
        assert_eq!(recorder.durable[&place.path()], b"s", "the name itself");
    }
}

/// What a kill leaves before, in the middle of and after each step.
struct Killed<'a> {
    place: &'a Path,
    left: Vec<(String, Place)>,
}

impl Killed<'_> {
    fn note(&mut self, when: &str) {
        let copy = Place::new();
        for entry in fs::read_dir(self.place).unwrap() {
            let from = entry.unwrap().path();
            let to = copy.path().join(from.file_name().unwrap());
            fs::create_dir(&to).unwrap();
            for file in [MEMORY_FILE, STATE_FILE] {
                if from.join(file).exists() {
                    fs::copy(from.join(file), to.join(file)).unwrap();
                }
            }
        }
        self.left.push((when.to_owned(), copy));
    }
}

impl Storage for Killed<'_> {
    fn take(&mut self, step: Step, poll: &mut dyn FnMut() -> Flow) -> io::Result<Flow> {
        let (name, path) = name(&step);
        self.note(&format!("before: {name}"));
        if let Step::Write { bytes, .. } = &step {
            for len in [1, bytes.len() / 2, bytes.len() - 1] {
                fs::write(&path, &bytes[..len]).unwrap();
                self.note(&format!("{len} bytes into: {name}"));
            }
            fs::write(&path, "").unwrap();
        }
        let taken = AtOnce.take(step, poll);
        self.note(&format!("after: {name}"));
        taken
    }
}

#[test]
fn a_kill_at_any_step_leaves_all_or_nothing() {
    let (place, world) = (Place::new(), World::new(None));
    let at = place.path();
    let mut killed = Killed { place: &at, left: Vec::new() };
    save(&at.join("s"), guest(&world, 3), header(), None, &mut killed, &mut goes_on).unwrap();
    assert_eq!(killed.left.len(), 2 * STEPS.len() + 3);
    for (when, left) in killed.left {
        let named = when.starts_with("after: rename") || when.ends_with(" sync place");
        assert_eq!(left.path().join("s").exists(), named, "{when}");
        if named {
            check_whole(&left.path().join("s"), &world);
            assert_eq!(left.names(), ["s"], "{when}");
            continue;
        }
        assert_eq!(left.names().len(), 1, "{when}");
        // The next one removes it.
        attempt(&left, None, &mut AtOnce, &mut goes_on).unwrap();
    }
}

/// One step fails.
struct Broken(usize);

impl Storage for Broken {
    fn take(&mut self, step: Step, poll: &mut dyn FnMut() -> Flow) -> io::Result<Flow> {
        match self.0.checked_sub(1) {
            None => Err(io::ErrorKind::StorageFull.into()),
            Some(more) => {
                self.0 = more;
                AtOnce.take(step, poll)
            }
        }
    }
}

#[test]
fn a_step_that_fails_leaves_nothing() {
    for (at, doing) in STEPS.iter().enumerate() {
        let error = attempt(&Place::new(), None, &mut Broken(at), &mut goes_on).unwrap_err();
        assert!(matches!(error, SnapshotError::File { .. }), "{doing}: {error}");
    }
    attempt(&Place::new(), None, &mut Broken(STEPS.len()), &mut goes_on).unwrap();
}

/// One step is slow: it goes on until the wait is cancelled, and after that for nobody; or for some time, if it can't be.
struct Slow<'a> {
    slow: &'a str,
    /// It is under way.
    waits: &'a Cell<bool>,
    left: Vec<Step>,
}

impl Storage for Slow<'_> {
    fn take(&mut self, step: Step, poll: &mut dyn FnMut() -> Flow) -> io::Result<Flow> {
        if name(&step).0 == self.slow {
            self.waits.set(true);
            let is_cancelled = (0..5).any(|_| poll() == Flow::Cancel);
            self.waits.set(false);
            if is_cancelled {
                self.left.push(step);
                return Ok(Flow::Cancel);
            }
        }
        AtOnce.take(step, poll)
    }
}

#[test]
fn each_slow_step_is_watched_and_can_be_cancelled() {
    for slow in STEPS {
        let (place, waits) = (Place::new(), Cell::new(false));
        let mut seen = 0;
        let mut watch = |progress: &Progress| {
            if waits.get() {
                assert_eq!(progress.stage, Stage::Commitment);
                seen += 1;
            }
            Flow::Continue
        };
        let mut storage = Slow { slow, waits: &waits, left: Vec::new() };
        attempt(&place, None, &mut storage, &mut watch).unwrap();
        assert_eq!(seen, 5, "{slow}");

        let place = Place::new();
        let mut is_cancelled = false;
        let mut cancel = |_: &Progress| {
            is_cancelled |= waits.get();
            if is_cancelled { Flow::Cancel } else { Flow::Continue }
        };
        let error = attempt(&place, None, &mut storage, &mut cancel).unwrap_err();
        assert!(matches!(error, SnapshotError::Cancelled), "{slow}: {error}");
        // A name can't be left to be given later.
        assert_eq!(storage.left.is_empty(), slow.starts_with("rename"));
        storage.left.into_iter().for_each(|step| drop(step.take()));
        assert!(place.names().is_empty(), "{slow}: {:?}", place.names());
    }
}

/// What stopping the fake guest takes, by its example.
const STOP: Duration = Duration::from_micros(100);

/// Leaves syncs out: what a disk takes for them is nobody's to say.
struct Unsynced;

impl Storage for Unsynced {
    fn take(&mut self, step: Step, poll: &mut dyn FnMut() -> Flow) -> io::Result<Flow> {
        if matches!(step, Step::Sync { .. }) { Ok(Flow::Continue) } else { AtOnce.take(step, poll) }
    }
}

/// Takes a live snapshot of a guest that dirties a lot, cancelled in round 3 unless it may be throttled; gives what came of
/// it, the last round and the throttle.
fn within(downtime: Duration, timeout: Duration, on_timeout: OnTimeout) -> (String, u32, u8) {
    let (place, world) = (Place::new(), World::new(None));
    let (mut rounds, mut throttle) = (0, 0);
    let mut watch = |progress: &Progress| {
        (rounds, throttle) = (rounds.max(progress.round), throttle.max(progress.throttle_percent));
        if rounds == 3 && on_timeout != OnTimeout::Throttle { Flow::Cancel } else { Flow::Continue }
    };
    let limits = Limits { downtime, timeout, on_timeout };
    let dir = place.path().join("s");
    let saved = save(&dir, guest(&world, 8), header(), Some(limits), &mut Unsynced, &mut watch);
    assert!(world.state().running().0 && world.state().breaches.is_empty());
    let told = match saved {
        Ok(_) => {
            check_whole(&dir, &world);
            String::new()
        }
        Err(not) => {
            assert!(not.guest.is_ok() && place.names().is_empty());
            not.error.to_string()
        }
    };
    (told, rounds, throttle)
}

#[test]
fn a_limit_that_cannot_be_met_ends_it_or_not_as_is_asked() {
    let (no_time, long) = (Duration::ZERO, Duration::from_secs(3600));
    let (told, ..) = within(Duration::ZERO, no_time, OnTimeout::Abort);
    assert!(told.ends_with("over the limit of 0 ms: raise --downtime-limit"), "{told}");
    let (told, ..) = within(STOP, no_time, OnTimeout::Abort);
    assert!(
        told.starts_with("no convergence: a stop would take 0 ms; the guest dirties "),
        "{told}"
    );
    assert_eq!(within(STOP, no_time, OnTimeout::StopAndCopy), (String::new(), 0, 0));
    // Rounds go on as long as they may.
    assert_eq!(within(STOP, long, OnTimeout::Abort), ("cancelled".to_owned(), 3, 0));
}

#[test]
fn a_guest_that_dirties_too_fast_is_slowed_down_until_it_does_not() {
    let (told, rounds, throttle) = within(STOP, Duration::from_secs(2), OnTimeout::Throttle);
    assert!(told.is_empty() && rounds > 0 && throttle > 0, "{rounds}, {throttle} %: {told}");
}
