//! The source's guest: live, and halted.

use std::time::{Duration, Instant};

use vmm_migration::channel::Flow;
use vmm_migration::guest::{Changes, Example, Failed, GuestError, Halted, Live, Locks, Memory};
use vmm_migration::pages::{PageSet, Run};
use vmm_migration::plan::{DiskNeed, NetNeed, Plan, Region, SPACE_RAM, SectionId, Space};
use vmm_migration::report::micros;
use vmm_migration::state::Section;

use super::aside::aside;
use super::dirtiers::Dirtiers;
use super::tracking;
use crate::backend::disk::DiskHandle;
use crate::backend::fingerprint::Fingerprint;
use crate::backend::lock;
use crate::machine::{Core, Machine};
use crate::memory::PAGE_SIZE;
use crate::vcpu::Vcpu;
use crate::vm::Vm;

/// A guest that may leave: running, or paused by its user.
pub struct LiveGuest {
    /// Known once the guest has been at rest for its example.
    dirtiers: Dirtiers,
    /// None only while a method has it at rest.
    vm: Option<Vm>,
    /// The longest stop since somebody asked, in microseconds.
    stall_us: u64,
}

const HERE: &str = "the guest is back before the method returns";

impl LiveGuest {
    /// The VM as a guest that may leave.
    #[must_use]
    pub fn new(vm: Vm) -> Self {
        Self { dirtiers: Dirtiers::default(), vm: Some(vm), stall_us: 0 }
    }

    /// The VM again.
    #[must_use]
    pub fn into_vm(self) -> Vm {
        self.vm.expect(HERE)
    }

    pub(crate) fn core(&self) -> &Core {
        self.vm.as_ref().expect(HERE).core()
    }
}

impl Memory for LiveGuest {
    fn dirty_pages(&mut self, into: &mut PageSet) -> Result<(), GuestError> {
        let core = self.core();
        tracking::written(&core.vm, &core.memory, into)
    }

    fn read(&mut self, run: Run, bytes: &mut [u8]) -> Result<(), GuestError> {
        tracking::read(&self.core().memory, run, bytes)
    }
}

impl Live for LiveGuest {
    type Halted = HaltedGuest;

    fn plan(&mut self, config_version: u16) -> Result<Plan, GuestError> {
        plan(self.core(), matches!(self.vm, Some(Vm::Paused(_))), config_version)
    }

    fn lock_mark(&self) -> Option<u64> {
        Some(lock::mark())
    }

    fn example(&mut self, listed: &[SectionId]) -> Result<Example, GuestError> {
        let start = Instant::now();
        let (mut machine, paused) = match self.vm.take().expect(HERE) {
            Vm::Paused(machine) => (machine, true),
            Vm::Running(running) => (running.stop(), false),
        };
        let stopped = start.elapsed();
        // Saved twice: the save that counts will not be the first either, so the second is timed.
        let saved = machine.save(listed).and_then(|_| {
            let start = Instant::now();
            machine.save(listed).map(|sections| (sections, start.elapsed()))
        });
        self.dirtiers = Dirtiers::of(&machine);
        let vm = Vm::go_on(machine, paused);
        if let Vm::Running(running) = &vm {
            self.dirtiers.start(running);
        }
        self.vm = Some(vm);
        self.stall_us = self.stall_us.max(micros(start.elapsed()));
        let (sections, save) = saved?;
        Ok(Example { sections, stop_us: micros(stopped + save) })
    }

    fn start_tracking(&mut self) -> Result<(), GuestError> {
        if let Some(Vm::Running(running)) = &self.vm {
            self.dirtiers.start(running);
        }
        let core = self.core();
        core.platform.sign.watch(true);
        tracking::start(&core.vm, &core.memory)
    }

    fn first_pages(&mut self, window: Run, into: &mut PageSet) -> Result<(), GuestError> {
        let core = self.core();
        tracking::first_pages(&core.vm, &core.memory, window, into)
    }

    fn rearm(&mut self, runs: &[Run]) -> Result<(), GuestError> {
        let core = self.core();
        tracking::rearm(&core.vm, &core.memory, runs)
    }

    fn dirty_by_vcpu(&mut self, dirty_pages: u64) -> Vec<u64> {
        match &self.vm {
            Some(Vm::Running(running)) => self.dirtiers.attribute(running, dirty_pages),
            _ => Vec::new(),
        }
    }

    fn throttle(&mut self, percent: &[u8]) -> Result<(), GuestError> {
        match self.vm.as_mut().expect(HERE) {
            Vm::Running(running) => Ok(running.throttle(percent)?),
            Vm::Paused(_) => Ok(()),
        }
    }

    fn stall_us(&mut self) -> Option<u64> {
        Some(std::mem::take(&mut self.stall_us))
    }

    fn flush_disks(&mut self, poll: &mut dyn FnMut() -> Flow) -> Result<Flow, GuestError> {
        flush(&self.core().platform.disks, poll)
    }

    fn settle(&mut self, poll: &mut dyn FnMut() -> Flow) -> Result<Flow, GuestError> {
        match self.vm.as_mut().expect(HERE) {
            Vm::Running(running) => Ok(running.settle(poll)?),
            Vm::Paused(_) => Ok(Flow::Continue),
        }
    }

    fn unsettle(&mut self) {
        if let Some(Vm::Running(running)) = &mut self.vm {
            running.unsettle();
        }
    }

    fn stop_tracking(&mut self) {
        self.unsettle();
        if let Err(e) = self.throttle(&[]) {
            tracing::warn!("the throttle can't be lifted: {e}");
        }
        let core = self.core();
        core.platform.sign.watch(false);
        tracking::stop(&core.vm, &core.memory);
    }

    fn stop(self) -> Result<HaltedGuest, Failed<Self>> {
        let (machine, paused) = match self.into_vm() {
            Vm::Paused(machine) => {
                machine.keep_typed();
                (machine, true)
            }
            Vm::Running(running) => (running.stop(), false),
        };
        Ok(HaltedGuest { machine, paused, released: Vec::new() })
    }
}

/// A guest that stands, whole, with its disks' locks or without.
pub struct HaltedGuest {
    machine: Machine,
    paused: bool,
    /// Of each writable disk whose lock was released: what it looked like then.
    released: Vec<Option<Fingerprint>>,
}

/// What is left of a guest that has gone: its memory above all, which takes its time to give back.
pub struct Remains {
    _vcpus: Vec<Vcpu>,
    _core: Box<Core>,
}

impl HaltedGuest {
    /// The machine, at rest.
    pub(crate) fn core(&self) -> &Core {
        &self.machine.core
    }

    /// Ends it: its disks and TAPs are free from the return on.
    #[must_use]
    pub fn let_go(self) -> Remains {
        let Machine { vcpus, buses, mut core } = self.machine;
        drop(buses);
        core.platform.disks.clear();
        core.platform.taps.clear();
        Remains { _vcpus: vcpus, _core: core }
    }

    /// The VM at rest, for its user to resume.
    #[must_use]
    pub fn into_vm(self) -> Vm {
        Vm::Paused(self.machine)
    }
}

impl Memory for HaltedGuest {
    fn dirty_pages(&mut self, into: &mut PageSet) -> Result<(), GuestError> {
        tracking::written(&self.machine.core.vm, &self.machine.core.memory, into)
    }

    fn read(&mut self, run: Run, bytes: &mut [u8]) -> Result<(), GuestError> {
        tracking::read(&self.machine.core.memory, run, bytes)
    }
}

impl Halted for HaltedGuest {
    type Live = LiveGuest;

    fn sections(&mut self, listed: &[SectionId]) -> Result<Vec<Section>, GuestError> {
        Ok(self.machine.save(listed)?)
    }

    fn paused(&self) -> bool {
        self.paused
    }

    fn last_sign_ago(&self) -> Option<Duration> {
        self.machine.core.platform.sign.last_ago()
    }

    fn release_disks(&mut self, poll: &mut dyn FnMut() -> Flow) -> Result<Flow, GuestError> {
        self.released.clear();
        let disks = &self.machine.core.platform.disks;
        if flush(disks, poll)? == Flow::Cancel {
            return Ok(Flow::Cancel);
        }
        for disk in disks {
            let fingerprint = if disk.is_writable() { Some(disk.fingerprint()?) } else { None };
            self.released.push(fingerprint);
            disk.release_lock()?;
        }
        Ok(Flow::Continue)
    }

    fn retake_disks(&mut self, changes: Changes) -> Result<Locks, GuestError> {
        let disks = &self.machine.core.platform.disks;
        let release = || {
            for disk in disks {
                // Not having the lock is no error; the worst is a lock that this process keeps.
                let _ = disk.release_lock();
            }
        };
        for (i, disk) in disks.iter().enumerate() {
            if disk.take_lock().is_err() {
                release();
                return Ok(Locks::Held);
            }
            if changes == Changes::Matter
                && let Some(Some(before)) = self.released.get(i)
            {
                // A lock that is kept while it isn't known who has the guest would keep it from whoever has.
                let now = disk.fingerprint().inspect_err(|_| release())?;
                if now != *before {
                    release();
                    return Ok(Locks::Changed);
                }
            }
        }
        Ok(Locks::Taken)
    }

    fn resume(self) -> Result<LiveGuest, Failed<Self>> {
        let Self { machine, paused, .. } = self;
        machine.core.platform.sign.watch(false);
        tracking::stop(&machine.core.vm, &machine.core.memory);
        Ok(LiveGuest::new(Vm::go_on(machine, paused)))
    }
}

/// Flushes the writable disks, on a thread of its own: nobody can tell how long storage takes, nor stop it.
fn flush(disks: &[DiskHandle], poll: &mut dyn FnMut() -> Flow) -> Result<Flow, GuestError> {
    let disks: Vec<_> = disks.iter().filter(|disk| disk.is_writable()).cloned().collect();
    if disks.is_empty() {
        return Ok(Flow::Continue);
    }
    // The handles go before anybody hears of it and counts on it that only the machine has them.
    let flushing = move || disks.into_iter().try_for_each(|disk| disk.flush());
    match aside("flush", flushing, poll)? {
        Some(flushed) => Ok(flushed.map(|()| Flow::Continue)?),
        None => Ok(Flow::Cancel),
    }
}

/// What the guest needs of its next host.
fn plan(core: &Core, paused: bool, config_version: u16) -> Result<Plan, GuestError> {
    let config = &core.config;
    let regions = core.memory.slots().iter();
    let regions = regions
        .map(|s| Region { first_page: s.start / PAGE_SIZE, pages: s.len / PAGE_SIZE })
        .collect();
    let disks = config.disks.iter().zip(&core.platform.disks).map(|(disk, handle)| {
        Ok(DiskNeed {
            id: disk.id.clone(),
            path: handle.path().display().to_string(),
            bytes: handle.len()?,
            read_only: disk.readonly,
        })
    });
    let nets = config.nets.iter().zip(&core.platform.taps).map(|(net, (_, announcer))| NetNeed {
        id: net.id.clone(),
        tap: net.tap.clone(),
        mac: announcer.mac(),
    });
    Ok(Plan {
        name: config.name.clone(),
        paused,
        config: config.save(config_version)?,
        spaces: vec![Space { id: SPACE_RAM, regions }],
        touched_pages: tracking::touched_pages(&core.memory)?,
        sections: core.parts.clone(),
        cpu: core.needs.clone(),
        disks: disks.collect::<Result<_, GuestError>>()?,
        nets: nets.collect(),
    })
}
