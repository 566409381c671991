//! The destination's guest: checked and built at reservation, filled, restored, and at last activated.

use std::path::PathBuf;
use std::slice;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_devices::virtio::announce::{Announcer, announce_frames};
use vmm_migration::channel::Flow;
use vmm_migration::guest::{Active, GuestError, Host, Reserved, SignWatch, Since, Vacant};
use vmm_migration::pages::Run;
use vmm_migration::plan::{Plan, SectionId};
use vmm_migration::state::Section;

use super::aside::aside;
use super::cpu;
use super::fitting::{self, Locks};
use super::mapping::Mapping;
use crate::api::server::Server;
use crate::api::socket::{self, ControlSocket, SocketError};
use crate::arch::clock;
use crate::backend::disk::{DiskError, DiskHandle, Locking};
use crate::backend::lock::LockError;
use crate::backend::tap::TapHandle;
use crate::chain::chain;
use crate::config::{Config, OnReboot, SerialTarget};
use crate::console::Console;
use crate::downtime::Downtime;
use crate::event::Event;
use crate::machine::{Machine, Origin};
use crate::memory::Backing;
use crate::vm::Vm;

/// Rounds of announcements after a move, and the time between two of them.
const ANNOUNCE_ROUNDS: u32 = 5;
const ANNOUNCE_PERIOD: Duration = Duration::from_millis(100);

/// What differs on this host, as the command line says.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// The VM's name here.
    pub name: Option<String>,
    /// Its control socket.
    pub control: Option<PathBuf>,
    /// Path of each disk that has another one here, by id.
    pub disks: Vec<(String, PathBuf)>,
    /// TAP of each network interface that has another one here, by id.
    pub nets: Vec<(String, String)>,
    /// The serial console here; standard input and output by default.
    pub serial: Option<SerialTarget>,
    /// Standard input and output carry the stream: by default the console is a socket beside the control socket.
    pub stdio_taken: bool,
    /// Only the disks and TAPs listed above may be opened: the source's word on paths and names is not taken.
    pub only_listed: bool,
}

/// This host, which takes one guest.
#[derive(Clone)]
pub struct LocalHost {
    /// What differs here.
    pub overrides: Overrides,
    /// Hears what the guest asks for.
    pub events: Sender<Event>,
}

/// A guest that has its place here and never ran.
pub struct VacantGuest {
    /// Since the first round's end, until its state is there.
    mapping: Option<Mapping>,
    machine: Machine,
    server: Server,
    console: Arc<Console>,
    /// kvmclock at the source when the guest was saved, in nanoseconds.
    saved_clock_ns: Option<u64>,
}

/// The guest, activated.
pub struct Arrived {
    /// Running, or paused as it was.
    pub vm: Vm,
    /// Its control socket, served.
    pub server: Server,
    /// Its console.
    pub console: Arc<Console>,
}

impl Host for LocalHost {
    type Vacant = VacantGuest;

    fn reserve(
        &mut self,
        plan: &Plan,
        lock_mark: Option<u64>,
        poll: &mut dyn FnMut() -> Flow,
    ) -> Result<Reserved<VacantGuest>, Vec<String>> {
        let (host, plan) = (self.clone(), plan.clone());
        let made = aside("reserve", move || host.make_place(&plan, lock_mark), poll);
        made.map_err(one_line)?.unwrap_or_else(|| Err(Vec::new()))
    }
}

impl LocalHost {
    fn make_place(
        &self,
        plan: &Plan,
        lock_mark: Option<u64>,
    ) -> Result<Reserved<VacantGuest>, Vec<String>> {
        let mut reasons = cpu::lacking_here(&plan.cpu);
        let config = self.configure(plan);
        let hugepages = config.as_ref().is_ok_and(|config| config.hugepages);
        reasons.extend(fitting::memory_reason(hugepages, plan));
        let config = config.map_err(|more| [reasons.clone(), more].concat())?;
        let (disks, more) = fitting::disks(&config, plan);
        let locks = fitting::locks(&disks, lock_mark);
        let Locks { seen: locks_seen, reasons: held, mut warnings } = locks;
        warnings.extend(fitting::reboot_warnings(&config));
        reasons.extend(more.into_iter().chain(held));
        reasons.extend(fitting::layout_reason(&config, plan));
        reasons.extend(fitting::tap_reasons(&config));
        let place = self.place(&config).map_err(|more| reasons.extend(more));
        let (Ok((server, console)), []) = (place, reasons.as_slice()) else { return Err(reasons) };
        let origin = Origin {
            backing: Backing::Fresh { hugepages: config.hugepages },
            locking: Locking::Later,
            needs: Some(plan.cpu.clone()),
        };
        let mut machine =
            Machine::new(config, origin, &console, self.events.clone()).map_err(one_line)?;
        machine.warm_up();
        // Most of it now: what is left to do in the downtime is what somebody reads here until then.
        machine.core.platform.disks.iter().for_each(DiskHandle::forget_cached);
        let guest = VacantGuest { mapping: None, machine, server, console, saved_clock_ns: None };
        Ok(Reserved { guest, locks_seen, warnings })
    }

    /// The guest's configuration, with what differs here.
    pub(super) fn configure(&self, plan: &Plan) -> Result<Config, Vec<String>> {
        let mut config = Config::restore(&plan.config).map_err(one_line)?;
        let Overrides { name, control: _, disks, nets, serial, stdio_taken, only_listed } =
            &self.overrides;
        if let Some(name) = name {
            config.name.clone_from(name);
        }
        let mut reasons = Vec::new();
        config.serial = match serial {
            Some(serial) => serial.clone().of_vm(&config.name),
            None if *stdio_taken => {
                let beside = self.socket_path(&config).map(|path| socket::console_beside(&path));
                beside.map(SerialTarget::Unix).unwrap_or_else(|e| {
                    reasons.push(chain(&e));
                    SerialTarget::Null
                })
            }
            None => SerialTarget::Stdio,
        };
        for (id, path) in disks {
            match config.disks.iter_mut().find(|disk| disk.id == *id) {
                Some(disk) => disk.path.clone_from(path),
                None => reasons.push(format!("--disk id={id}: the guest has no such disk")),
            }
        }
        for (id, tap) in nets {
            match config.nets.iter_mut().find(|net| net.id == *id) {
                Some(net) => net.tap.clone_from(tap),
                None => reasons.push(format!("--net id={id}: the guest has no such interface")),
            }
        }
        if *only_listed {
            reasons.extend(self.unlisted(&config));
        }
        reasons.extend(config.validate().err().map(|e| e.to_string()));
        if reasons.is_empty() { Ok(config) } else { Err(reasons) }
    }

    /// What of a guest's files and TAPs isn't listed here. Its kernel's files never are: it can't boot again.
    fn unlisted(&self, config: &Config) -> Vec<String> {
        let Overrides { disks, nets, .. } = &self.overrides;
        let listed_disk = |id: &String| disks.iter().any(|(listed, _)| listed == id);
        let listed_net = |id: &String| nets.iter().any(|(listed, _)| listed == id);
        let unlisted = |option: &str, id: &str, value: &str| {
            format!(
                "{option} {id} is not listed here (--only-listed): list it with --{option} id={id},{value}"
            )
        };
        let disks = config.disks.iter().filter(|disk| !listed_disk(&disk.id));
        let nets = config.nets.iter().filter(|net| !listed_net(&net.id));
        let mut reasons: Vec<_> =
            disks.map(|disk| unlisted("disk", &disk.id, "path=PATH")).collect();
        reasons.extend(nets.map(|net| unlisted("net", &net.id, "tap=NAME")));
        if config.on_reboot == OnReboot::Reset {
            reasons.push(
                "the guest's reboot would read its kernel's files here (--on-reboot reset), which no \
                 option lists (--only-listed)"
                    .to_owned(),
            );
        }
        reasons
    }

    fn socket_path(&self, config: &Config) -> Result<PathBuf, SocketError> {
        match &self.overrides.control {
            Some(path) => Ok(path.clone()),
            None => socket::path_of(&config.name),
        }
    }

    /// The guest's control socket and console, or what is in the way of either.
    fn place(&self, config: &Config) -> Result<(Server, Arc<Console>), Vec<String>> {
        let serve = |socket| Server::start(socket, &config.name, self.events.clone());
        let server = self.socket(config).map_err(one_line).and_then(|s| serve(s).map_err(one_line));
        let console = Console::await_guest(&config.serial, self.events.clone()).map_err(one_line);
        match (server, console) {
            (Ok(server), Ok(console)) => Ok((server, Arc::new(console))),
            (server, console) => {
                Err([server.err(), console.err()].into_iter().flatten().flatten().collect())
            }
        }
    }

    pub(super) fn socket(&self, config: &Config) -> Result<ControlSocket, SocketError> {
        ControlSocket::bind(&self.socket_path(config)?)
    }
}

impl Vacant for VacantGuest {
    type Running = Arrived;

    fn parts(&self) -> Vec<SectionId> {
        self.machine.core.parts.clone()
    }

    fn try_restore(
        &mut self,
        example: &[Section],
        saved: Since,
    ) -> Result<Vec<String>, Vec<String>> {
        let warning = clock::saved_among(example).and_then(|state| {
            let (realtime_ns, now) = (clock::realtime_now(), Instant::now());
            Downtime::since(saved).warning(state.realtime_ns, realtime_ns, now)
        });
        self.restore(example, saved)?;
        Ok(cpu::spared(&self.machine).into_iter().chain(warning).collect())
    }

    fn pages_mut(&mut self, run: Run) -> Result<&mut [u8], GuestError> {
        let len = usize::try_from(run.bytes())?;
        let slice = self.machine.core.memory.ram().get_slice(GuestAddress(run.address()), len)?;
        let start = slice.ptr_guard_mut().as_ptr();
        // SAFETY: `get_slice` checked that the range is mapped and in one region, and the mapping lives
        // as long as `self`. No vCPU ever ran and no device has a worker, so nothing else reads or
        // writes it while `self` is borrowed mutably.
        Ok(unsafe { slice::from_raw_parts_mut(start, len) })
    }

    fn zero(&mut self, run: Run) -> Result<(), GuestError> {
        let memory = &self.machine.core.memory;
        let (address, end) = (run.address(), run.address() + run.bytes());
        let slot = memory.slots().iter().find(|s| s.start <= address && end <= s.start + s.len);
        let slot = slot.ok_or_else(|| format!("no RAM at {address:#x}"))?;
        Ok(memory.discard(slot, address - slot.start, run.bytes())?)
    }

    fn round_ended(&mut self) {
        if self.mapping.is_none() {
            self.mapping = Mapping::start(&self.machine);
        }
    }

    fn restore(&mut self, sections: &[Section], saved: Since) -> Result<(), Vec<String>> {
        let downtime = Downtime::since(saved);
        self.mapping = None;
        self.machine.restore(sections.to_vec(), downtime).map_err(one_line)?;
        self.saved_clock_ns = clock::saved_among(sections).map(|state| state.kvmclock_ns);
        Ok(())
    }

    fn activate(self, paused: bool) -> Result<Active<Arrived>, GuestError> {
        let Self { mapping: _, machine, server, console, saved_clock_ns } = self;
        take_disks(&machine)?;
        for (_, announcer) in &machine.core.platform.taps {
            announcer.request();
        }
        let sign = Arc::clone(&machine.core.platform.sign);
        let vm = Vm::go_on(machine, paused);
        let now_ns = vm.core().vm.get_clock().map(|clock| clock.clock).ok();
        let gap = saved_clock_ns.zip(now_ns).map(|(saved, now)| now.saturating_sub(saved) / 1000);
        announce(&vm.core().platform.taps);
        let first_sign = (!paused).then(|| SignWatch::new(move || sign.first_ago()));
        let running = Arrived { vm, server, console };
        Ok(Active { running, guest_stall_us: gap, first_sign })
    }
}

/// Takes every disk's lock and marks the writable ones as having another owner.
fn take_disks(machine: &Machine) -> Result<(), GuestError> {
    let disks = &machine.core.platform.disks;
    for disk in disks {
        disk.take_lock().map_err(|e| match e {
            // It isn't to be stopped, as the lock's own words would have it.
            LockError::Held { path, holder } => GuestError::from(format!(
                "disk {}: locked by {holder}: its source has taken the guest back, or somebody else the disk",
                path.display()
            )),
            e => e.into(),
        })?;
        disk.forget_cached();
    }
    let writable = disks.iter().filter(|disk| disk.is_writable());
    Ok(mark_any(writable.map(DiskHandle::mark_changed))?)
}

/// A source in doubt looks at all of its disks, so that one mark tells it. Where none can be made, none was, and the guest
/// may be given back; where one was made, it may not.
fn mark_any(marks: impl Iterator<Item = Result<(), DiskError>>) -> Result<(), DiskError> {
    let (mut marked, mut failed) = (false, None);
    for mark in marks {
        match mark {
            Ok(()) => marked = true,
            Err(e) => failed = failed.or(Some(e)),
        }
    }
    match failed {
        Some(e) if !marked => Err(e),
        Some(e) => {
            tracing::warn!("the guest's other disks tell that it was here: {}", chain(&e));
            Ok(())
        }
        None => Ok(()),
    }
}

/// Tells the network where the guest is now, a few rounds over half a second, as long as it is here. What can't be sent
/// is left: the guest announces itself too.
pub(super) fn announce(taps: &[(TapHandle, Announcer)]) {
    if taps.is_empty() {
        return;
    }
    let taps: Vec<_> = taps.iter().map(|(tap, by)| (tap.weak(), by.clone())).collect();
    let rounds = move || {
        for _ in 0..ANNOUNCE_ROUNDS {
            for (tap, announcer) in &taps {
                let Some(tap) = tap.upgrade() else { return };
                for frame in announce_frames(announcer.mac(), &announcer.addresses()) {
                    let _ = tap.send(&frame);
                }
            }
            std::thread::sleep(ANNOUNCE_PERIOD);
        }
    };
    let spawned = std::thread::Builder::new().name("announce".to_owned()).spawn(rounds);
    if let Err(e) = spawned {
        tracing::warn!("the guest's move can't be announced on its networks: {e}");
    }
}

fn one_line<E: std::error::Error>(error: E) -> Vec<String> {
    vec![chain(&error)]
}

#[cfg(test)]
#[path = "arriving_tests.rs"]
mod tests;
