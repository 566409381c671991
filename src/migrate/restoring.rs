//! A guest out of a snapshot's directory: run at once over its memory file, or loaded first.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use vm_memory::{Bytes, GuestAddress};
use vmm_devices::power::Power;
use vmm_migration::pages::{self, is_zero};
use vmm_migration::snapshot::{BLOCK_LEN, MEMORY_FILE, Snapshot, SnapshotError};

use super::arriving::{self, Arrived, LocalHost};
use super::cpu::{self, Offer};
use super::fitting;
use crate::api::server::Server;
use crate::api::socket::SocketError;
use crate::arch::boot::{self, BootError};
use crate::arch::vmclock;
use crate::backend::disk::Locking;
use crate::console::{Console, ConsoleError};
use crate::downtime::Downtime;
use crate::machine::{Machine, MachineError, Origin, RestoreMachineError};
use crate::memory::{Backing, Memory, data_in};
use crate::vm::Vm;

/// Threads that load memory, at most: more than this many wait for the disk, not for CPUs.
const LOADERS_MAX: usize = 8;

/// When the guest's memory is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Load {
    /// Page by page, as the guest touches it: the memory file is mapped privately, and has to stay as
    /// it is while the VM lives.
    #[default]
    Lazy,
    /// All of it before the guest runs, its checksums compared.
    Eager,
}

/// Why a snapshot isn't restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreFault {
    /// The snapshot.
    #[error("snapshot {}", dir.display())]
    Snapshot {
        /// Its directory.
        dir: PathBuf,
        /// What is wrong with it.
        #[source]
        source: SnapshotError,
    },
    /// What the guest needs isn't here.
    #[error("the guest can't run here: {}", .0.join("; "))]
    Unfit(Vec<String>),
    /// The control socket.
    #[error("control socket")]
    Socket(#[from] SocketError),
    /// It can't be served.
    #[error("can't serve the control socket")]
    Serve(#[source] std::io::Error),
    /// The console.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The saved state.
    #[error("snapshot {}", dir.display())]
    State {
        /// Its directory.
        dir: PathBuf,
        /// What the machine says.
        #[source]
        source: RestoreMachineError,
    },
    /// The guest's memory could not be filled.
    #[error("guest memory")]
    Fill(#[source] vm_memory::GuestMemoryError),
    /// The user's wish.
    #[error("cancelled while memory was read: the guest has not run")]
    Cancelled,
}

/// Restores the snapshot in `dir`: with its disks locked and, unless it was paused when it was saved, its
/// vCPUs running. `downtime` says whether the time since the snapshot passes for it. While memory is read,
/// `cancelled` is asked again and again.
///
/// # Errors
/// The first thing that stands in the way, or everything that this host lacks. Nothing has run, no disk
/// was changed, and nothing is left.
pub fn restore(
    dir: &Path,
    load: Load,
    downtime: Downtime,
    here: &LocalHost,
    cancelled: &dyn Fn() -> bool,
) -> Result<Arrived, RestoreFault> {
    let damaged = |source| RestoreFault::Snapshot { dir: dir.to_owned(), source };
    let snapshot = Snapshot::open(dir).map_err(damaged)?;
    let plan = &snapshot.header.plan;
    let config = here.configure(plan).map_err(RestoreFault::Unfit)?;
    let (_, mut reasons) = fitting::disks(&config, plan);
    reasons.extend(fitting::layout_reason(&config, plan));
    if load == Load::Eager {
        reasons.extend(fitting::memory_reason(config.hugepages, plan));
    }
    if !reasons.is_empty() {
        return Err(RestoreFault::Unfit(reasons));
    }
    for warning in fitting::reboot_warnings(&config) {
        tracing::warn!("{warning}");
    }
    let socket = here.socket(&config)?;
    let console = Arc::new(Console::open(&config.serial, here.events.clone())?);
    let backing = match load {
        Load::Eager => Backing::Fresh { hugepages: config.hugepages },
        Load::Lazy => {
            if config.hugepages {
                tracing::warn!("a lazy restore has no huge pages: --eager has");
            }
            let memory = snapshot.memory.try_clone();
            Backing::Private(memory.map_err(|source| {
                damaged(SnapshotError::File { doing: "map", path: "memory".to_owned(), source })
            })?)
        }
    };
    let origin = Origin { backing, locking: Locking::Now, needs: Some(plan.cpu.clone()) };
    let mut machine = Machine::new(config, origin, &console, here.events.clone())?;
    let first = machine.vcpus.first().map(|v| v.fd()).expect("a machine has a vCPU");
    let offer = Offer::of(machine.core.host.cpuid.clone(), &machine.core.vm, first);
    let reasons = cpu::lacking(&plan.cpu, &offer);
    if !reasons.is_empty() {
        return Err(RestoreFault::Unfit(reasons));
    }
    if load == Load::Eager {
        fill(&snapshot, &machine.core.memory, cancelled).map_err(|e| match e {
            FillError::Cancelled => RestoreFault::Cancelled,
            FillError::Snapshot(source) => damaged(source),
            FillError::Memory(source) => RestoreFault::Fill(source),
        })?;
    }
    let Snapshot { sections, paused, .. } = snapshot;
    machine
        .restore(sections, downtime)
        .map_err(|source| RestoreFault::State { dir: dir.to_owned(), source })?;
    if let Some(spared) = cpu::spared(&machine) {
        tracing::warn!("{spared}");
    }
    tell_of_copy(&mut machine).map_err(MachineError::from)?;
    for (_, announcer) in &machine.core.platform.taps {
        announcer.request();
    }
    let name = &machine.config().name;
    let server = Server::start(socket, name, here.events.clone()).map_err(RestoreFault::Serve)?;
    let vm = Vm::go_on(machine, paused);
    arriving::announce(&vm.core().platform.taps);
    Ok(Arrived { vm, server, console })
}

/// The guest may have been restored before, or run on after its snapshot: it gets a generation id of its
/// own, and hears of it as soon as it runs.
fn tell_of_copy(machine: &mut Machine) -> Result<(), BootError> {
    boot::renew_generation(machine.core.memory.ram())?;
    vmclock::copied(machine.core.memory.ram());
    let told = machine.buses.pio.with_as(machine.core.platform.power, Power::generation_changed);
    told.expect("the slot is the power device's");
    Ok(())
}

enum FillError {
    Cancelled,
    Snapshot(SnapshotError),
    Memory(vm_memory::GuestMemoryError),
}

/// The blocks that hold anything: those whose checksums are listed, and any other that isn't a hole, which is checked too.
fn blocks(snapshot: &Snapshot) -> Result<Vec<u32>, SnapshotError> {
    let mut blocks: BTreeSet<u32> = snapshot.used_blocks().collect();
    let failed = |source| SnapshotError::File { doing: "read", path: MEMORY_FILE.into(), source };
    let found = data_in(&snapshot.memory, 0, snapshot.memory_len(), |at, len| {
        let (first, last) = (at / BLOCK_LEN as u64, (at + len - 1) / BLOCK_LEN as u64);
        // More blocks than these can't be named.
        blocks.extend((first..=last).filter_map(|block| u32::try_from(block).ok()));
    });
    found.map_err(failed)?;
    Ok(blocks.into_iter().collect())
}

/// Loads every block that holds anything, on as many threads as there are CPUs.
fn fill(
    snapshot: &Snapshot,
    memory: &Memory,
    cancelled: &dyn Fn() -> bool,
) -> Result<(), FillError> {
    let blocks = blocks(snapshot).map_err(FillError::Snapshot)?;
    let next = AtomicUsize::new(0);
    let load_one = |buffer: &mut [u8]| -> Result<bool, FillError> {
        let Some(&block) = blocks.get(next.fetch_add(1, Ordering::Relaxed)) else {
            return Ok(false);
        };
        let len = snapshot.read_block(block, buffer).map_err(FillError::Snapshot)?;
        let offset = u64::from(block) * BLOCK_LEN as u64;
        write(memory, offset, &buffer[..len]).map_err(FillError::Memory)?;
        Ok(true)
    };
    let load = |cancelled: &dyn Fn() -> bool| {
        let mut buffer = vec![0; BLOCK_LEN];
        while !cancelled() {
            if !load_one(&mut buffer)? {
                return Ok(());
            }
        }
        // There is no more for the others.
        next.store(blocks.len(), Ordering::Relaxed);
        Err(FillError::Cancelled)
    };
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let helpers = cpus.min(LOADERS_MAX).min(blocks.len()).saturating_sub(1);
    std::thread::scope(|scope| {
        let helpers: Vec<_> = (0..helpers).map(|_| scope.spawn(|| load(&|| false))).collect();
        // This thread alone can ask.
        let own = load(cancelled);
        helpers.into_iter().map(|h| h.join().expect("loaders don't panic")).fold(own, Result::and)
    })
}

/// Writes what isn't zero, page by page, at an offset of the memory file.
fn write(memory: &Memory, offset: u64, bytes: &[u8]) -> Result<(), vm_memory::GuestMemoryError> {
    let mut at = offset;
    for page in bytes.chunks(pages::PAGE_SIZE) {
        let slot = memory
            .slots()
            .iter()
            .find(|s| s.file_offset <= at && at < s.file_offset + s.len && !is_zero(page));
        if let Some(slot) = slot {
            memory.ram().write_slice(page, GuestAddress(slot.start + at - slot.file_offset))?;
        }
        at += page.len() as u64;
    }
    Ok(())
}
