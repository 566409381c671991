//! A fake guest: some pages, a random dirtier that runs between any two steps, a dirty log that
//! behaves like KVM's, one disk.

use std::time::Duration;

use super::Random;
use super::link::End;
use super::world::{Side, World};
use crate::channel::{Clock, Flow};
use crate::guest::{Changes, Example, Failed, GuestError, Halted, Live, Locks, Memory};
use crate::pages::{PAGE_SIZE, PageSet, Run};
use crate::plan::{CpuNeeds, DiskNeed, NetNeed, Plan, Region, SPACE_RAM, SectionId, Space};
use crate::state::Section;

/// Regions next to each other, and one behind a hole.
pub const REGIONS: [Region; 3] = [
    Region { first_page: 0, pages: 13 },
    Region { first_page: 13, pages: 8 },
    Region { first_page: 1 << 20, pages: 11 },
];
const PAGES: usize = 32;
const CELLS: usize = 16;

/// How a guest behaves.
#[derive(Clone, Copy, Debug, Default)]
pub struct Habits {
    /// Pages dirtied between two steps, at most.
    pub dirties: u64,
    /// Paused by its user.
    pub paused: bool,
    /// `activate` fails at the destination.
    pub activation_fails: bool,
    /// The destination doesn't see the source's locks.
    pub blind: bool,
    /// At the destination it gives its first sign when it was looked for so often before. `None`: never.
    pub sign_after: Option<u64>,
    /// Bytes of its state, beside a few.
    pub state_bytes: usize,
    /// What a flush of its disk takes while it runs, and when it stands, in milliseconds.
    pub flush_ms: [u64; 2],
    /// What the destination takes to write a page, in microseconds.
    pub page_us: u64,
    /// What its devices' I/O under way takes, whenever it is looked at, in milliseconds.
    pub io_ms: u64,
    /// What the first stop takes beyond the others, in milliseconds.
    pub first_stop_ms: u64,
}

/// RAM. Of each page only [`CELLS`] bytes are ever written, to keep comparing cheap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ram(pub(super) Vec<u8>);

impl Ram {
    pub(super) fn zero() -> Self {
        Self(vec![0; PAGES * PAGE_SIZE])
    }

    fn at(page: u64) -> usize {
        let mut before = 0;
        for region in REGIONS {
            if (region.first_page..region.first_page + region.pages).contains(&page) {
                return usize::try_from(before + page - region.first_page).expect("small")
                    * PAGE_SIZE;
            }
            before += region.pages;
        }
        panic!("page {page} is outside");
    }

    pub(super) fn bytes(&mut self, run: Run) -> &mut [u8] {
        let start = Self::at(run.first());
        let mut regions = REGIONS.iter().filter_map(|region| region.run());
        assert!(regions.any(|region| region.contains(run)), "{run:?} is not in one region");
        &mut self.0[start..start + run_len(run)]
    }
}

fn run_len(run: Run) -> usize {
    usize::try_from(run.bytes()).expect("small")
}

fn page_number(index: u64) -> u64 {
    let low = REGIONS[0].pages + REGIONS[1].pages;
    if index < low { index } else { REGIONS[2].first_page + index - low }
}

/// The source's guest, running.
#[derive(Debug)]
pub struct FakeLive {
    world: World,
    random: Random,
    habits: Habits,
    ram: Ram,
    touched: PageSet,
    tracking: bool,
    log: PageSet,
    devices: PageSet,
    disk_at_release: Option<u64>,
    counter: u64,
    /// Its devices wait for its stop.
    settled: bool,
    /// Tells what flushes and I/O take.
    clock: Option<End>,
}

impl FakeLive {
    /// A guest that runs at the source and has used some of its memory.
    #[must_use]
    pub fn new(world: &World, seed: u64, habits: Habits) -> Self {
        assert!(world.lock(Side::Source), "a fresh world");
        world.run(Side::Source);
        let mut guest = Self {
            world: world.clone(),
            random: Random::new(seed),
            habits,
            ram: Ram::zero(),
            touched: PageSet::new(),
            tracking: false,
            log: PageSet::new(),
            devices: PageSet::new(),
            disk_at_release: None,
            counter: 0,
            settled: false,
            clock: None,
        };
        (0..12).for_each(|_| guest.write());
        guest
    }

    /// With the time that its flushes take.
    #[must_use]
    pub fn with_clock(self, clock: End) -> Self {
        Self { clock: Some(clock), ..self }
    }

    /// What a stop takes beyond 100 us: all I/O under way, unless it was waited for before.
    fn stop_ms(&mut self) -> u64 {
        let io_ms = if std::mem::take(&mut self.settled) { 0 } else { self.habits.io_ms };
        let ms = io_ms + std::mem::take(&mut self.habits.first_stop_ms);
        self.storage(ms, &mut || Flow::Continue);
        ms
    }

    /// Looks up each 10 ms.
    fn storage(&self, ms: u64, poll: &mut dyn FnMut() -> Flow) -> Flow {
        for _ in 0..ms / 10 {
            self.clock.iter().for_each(|clock| clock.sleep(Duration::from_millis(10)));
            if poll() == Flow::Cancel {
                return Flow::Cancel;
            }
        }
        Flow::Continue
    }

    /// One step of the world; the guest runs meanwhile.
    fn step(&mut self) {
        self.world.step(Side::Source);
        if self.habits.dirties > 0 && !self.habits.paused {
            (0..self.random.below(self.habits.dirties + 1)).for_each(|_| self.write());
        }
    }

    fn write(&mut self) {
        let run = Run::new(page_number(self.random.below(PAGES as u64)), 1).expect("a page");
        // Some pages are touched and zero, some become zero again.
        let value = if self.random.below(5) == 0 { 0 } else { self.random.next().to_le_bytes()[0] };
        let cell = usize::try_from(self.random.below(CELLS as u64)).expect("small");
        let bytes = self.ram.bytes(run);
        if self.random.below(4) == 0 {
            bytes.fill(0);
        }
        bytes[cell * (PAGE_SIZE / CELLS)] = value;
        self.touched.insert(run);
        self.counter += 1;
        if self.tracking && self.random.below(3) == 0 {
            self.devices.insert(run);
        } else if self.tracking {
            self.log.insert(run);
        }
        self.world.state().disk += 1;
    }

    pub(super) fn section_ids(version: u16) -> Vec<SectionId> {
        let id = |kind: &str, instance| SectionId { kind: kind.to_owned(), instance, version };
        vec![id("vcpu", 0), id("vcpu", 1), id("disk", 0)]
    }

    fn save(&self) -> Vec<Section> {
        self.world.state().saved_at = self.clock.as_ref().map(Clock::now);
        let mut counter = self.counter.to_le_bytes().to_vec();
        counter.resize(counter.len() + self.habits.state_bytes / 3, 0);
        let section = |id: SectionId| Section {
            kind: id.kind,
            instance: id.instance,
            version: id.version,
            body: counter.clone(),
        };
        Self::section_ids(1).into_iter().map(section).collect()
    }
}

impl Memory for FakeLive {
    fn dirty_pages(&mut self, into: &mut PageSet) -> Result<(), GuestError> {
        self.step();
        into.union(&self.log);
        into.union(&self.devices);
        self.devices.clear();
        Ok(())
    }

    fn read(&mut self, run: Run, bytes: &mut [u8]) -> Result<(), GuestError> {
        // Torn in the middle, as a page is that a vCPU writes meanwhile.
        let half = bytes.len() / 2;
        bytes[..half].copy_from_slice(&self.ram.bytes(run)[..half]);
        self.step();
        bytes[half..].copy_from_slice(&self.ram.bytes(run)[half..]);
        Ok(())
    }
}

impl Live for FakeLive {
    type Halted = FakeHalted;

    fn lock_mark(&self) -> Option<u64> {
        Some(1 << 62)
    }

    fn plan(&mut self, _: u16) -> Result<Plan, GuestError> {
        self.step();
        Ok(Plan {
            name: "fake".to_owned(),
            paused: self.habits.paused,
            config: vec![1, 2, 3],
            spaces: vec![Space { id: SPACE_RAM, regions: REGIONS.to_vec() }],
            touched_pages: self.touched.len(),
            sections: Self::section_ids(1),
            cpu: CpuNeeds { arch: "fake".to_owned(), vcpus: 2, ..CpuNeeds::default() },
            disks: vec![DiskNeed {
                id: "root".to_owned(),
                path: "/disk".to_owned(),
                bytes: 1 << 20,
                read_only: false,
            }],
            nets: vec![NetNeed { id: "net0".to_owned(), tap: "tap0".to_owned(), mac: [2; 6] }],
        })
    }

    fn settle(&mut self, poll: &mut dyn FnMut() -> Flow) -> Result<Flow, GuestError> {
        self.step();
        let flow = self.storage(self.habits.io_ms, poll);
        self.settled = flow == Flow::Continue;
        Ok(flow)
    }

    fn unsettle(&mut self) {
        self.settled = false;
    }

    fn example(&mut self, _listed: &[SectionId]) -> Result<Example, GuestError> {
        self.step();
        let stop_us = 100 + self.stop_ms() * 1000;
        Ok(Example { sections: self.save(), stop_us })
    }

    fn start_tracking(&mut self) -> Result<(), GuestError> {
        self.tracking = true;
        // KVM's INITIALLY_SET.
        self.log = REGIONS.iter().filter_map(|region| region.run()).collect();
        self.step();
        Ok(())
    }

    fn first_pages(&mut self, window: Run, into: &mut PageSet) -> Result<(), GuestError> {
        self.step();
        self.log.remove(window);
        self.step();
        self.touched.runs_in(window).for_each(|run| into.insert(run));
        Ok(())
    }

    fn rearm(&mut self, runs: &[Run]) -> Result<(), GuestError> {
        self.step();
        runs.iter().for_each(|run| self.log.remove(*run));
        self.step();
        Ok(())
    }

    fn throttle(&mut self, percent: &[u8]) -> Result<(), GuestError> {
        if percent.iter().any(|p| *p > 0) {
            self.habits.dirties = self.habits.dirties.saturating_sub(1);
        }
        Ok(())
    }

    fn flush_disks(&mut self, poll: &mut dyn FnMut() -> Flow) -> Result<Flow, GuestError> {
        Ok(self.storage(self.habits.flush_ms[0], poll))
    }

    fn stop_tracking(&mut self) {
        self.unsettle();
        self.tracking = false;
        self.log.clear();
        self.devices.clear();
    }

    fn stop(mut self) -> Result<FakeHalted, Failed<Self>> {
        self.step();
        self.stop_ms();
        self.world.stop(Side::Source);
        self.world.state().at_stop =
            Some((self.ram.0.clone(), self.counter.to_le_bytes().to_vec()));
        Ok(FakeHalted(self))
    }
}

/// The source's guest, stopped.
#[derive(Debug)]
pub struct FakeHalted(FakeLive);

impl Memory for FakeHalted {
    fn dirty_pages(&mut self, into: &mut PageSet) -> Result<(), GuestError> {
        self.0.world.step(Side::Source);
        into.union(&self.0.log);
        into.union(&self.0.devices);
        Ok(())
    }

    fn read(&mut self, run: Run, bytes: &mut [u8]) -> Result<(), GuestError> {
        self.0.world.step(Side::Source);
        bytes.copy_from_slice(self.0.ram.bytes(run));
        Ok(())
    }
}

impl Halted for FakeHalted {
    type Live = FakeLive;

    fn sections(&mut self, _listed: &[SectionId]) -> Result<Vec<Section>, GuestError> {
        self.0.world.step(Side::Source);
        Ok(self.0.save())
    }

    fn paused(&self) -> bool {
        self.0.habits.paused
    }

    fn release_disks(&mut self, poll: &mut dyn FnMut() -> Flow) -> Result<Flow, GuestError> {
        if self.0.storage(self.0.habits.flush_ms[1], poll) == Flow::Cancel {
            return Ok(Flow::Cancel);
        }
        self.0.world.step(Side::Source);
        self.0.disk_at_release = Some(self.0.world.state().disk);
        self.0.world.unlock(Side::Source);
        self.0.world.step(Side::Source);
        Ok(Flow::Continue)
    }

    fn retake_disks(&mut self, changes: Changes) -> Result<Locks, GuestError> {
        self.0.world.step(Side::Source);
        if !self.0.world.lock(Side::Source) {
            return Ok(Locks::Held);
        }
        let changed = self.0.disk_at_release.is_some_and(|disk| disk != self.0.world.state().disk);
        if changed && changes == Changes::Matter {
            self.0.world.unlock(Side::Source);
            return Ok(Locks::Changed);
        }
        Ok(Locks::Taken)
    }

    fn resume(mut self) -> Result<FakeLive, Failed<Self>> {
        self.0.world.step(Side::Source);
        self.0.stop_tracking();
        let same =
            self.0.world.state().at_stop.as_ref().is_some_and(|(ram, _)| *ram == self.0.ram.0);
        if !same {
            self.0.world.state().breaches.push("resumed with other memory".to_owned());
        }
        self.0.world.run(Side::Source);
        Ok(self.0)
    }
}
