//! A machine at rest: it owns everything, runs no vCPU and needs no lock.
//!
//! One construction path: [`Machine::new`], then [`Machine::load_kernel`] or [`Machine::restore`], then
//! [`Machine::start`], which lends the parts to threads and gives a [`Running`].

use std::collections::HashMap;
use std::convert::Infallible;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use kvm_bindings::CpuId;
use kvm_ioctls::{Kvm, VmFd};
use vm_memory::GuestMemoryBackend;
use vmm_devices::bus::BusDevice;
use vmm_migration::plan::{CpuNeeds, SectionId};
use vmm_migration::state::{RestoreError, SaveError, Saved, Section};

use crate::arch::clock::ClockPart;
use crate::arch::{self, boot, boot_regs, cpuid, layout, msr, tables, vmclock};
use crate::backend::disk::Locking;
use crate::config::Config;
use crate::console::Console;
use crate::downtime::Downtime;
use crate::event::Event;
use crate::io_thread::IoThread;
use crate::kvm::{create_vm, open_kvm};
use crate::memory::{Backing, Memory, MemoryError};
use crate::migrate::cpu::{self, HostCpu};
use crate::platform::{self, Platform, PlatformError};
use crate::running::Running;
use crate::vcpu::{Buses, Vcpu};
use crate::vcpu_thread::VcpuThread;
use crate::{dirty, kernel, kick};

/// Why a machine could not be built, loaded or started.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// `/dev/kvm` is missing or closed to us.
    #[error("{0}")]
    NoKvm(String),
    /// KVM lacks something that every machine needs.
    #[error("this host's KVM lacks {0}: a newer kernel is needed")]
    Capability(&'static str),
    /// More vCPUs than KVM allows.
    #[error("--cpus {asked}: this host's KVM allows at most {most}")]
    TooManyCpus {
        /// Asked for.
        asked: u32,
        /// KVM's limit.
        most: usize,
    },
    /// A call to KVM failed while the machine was built.
    #[error("KVM: can't {what}")]
    Kvm {
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The VM's interrupt controllers and helper pages.
    #[error(transparent)]
    Setup(#[from] arch::VmSetupError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A device.
    #[error(transparent)]
    Platform(#[from] PlatformError),
    /// The CPU model doesn't fit this host.
    #[error(transparent)]
    CpuModel(#[from] arch::cpu_model::ModelError),
    /// The kernel image.
    #[error(transparent)]
    Kernel(#[from] kernel::KernelError),
    /// The ACPI tables.
    #[error(transparent)]
    Tables(#[from] tables::TablesError),
    /// What stands beside the kernel in RAM: command line, initrd.
    #[error(transparent)]
    Boot(#[from] boot::BootError),
    /// The initrd can't be read.
    #[error("initrd {path}")]
    Initrd {
        /// As given.
        path: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A thread could not be started.
    #[error("can't start a thread")]
    Thread(#[source] io::Error),
}

impl MachineError {
    pub(crate) fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |e| Self::Kvm { what, source: io::Error::from_raw_os_error(e.errno()) }
    }
}

/// Why saved state does not make a machine.
#[derive(Debug, thiserror::Error)]
pub enum RestoreMachineError {
    /// A part refused its section.
    #[error("state {kind}/{instance} can't be restored")]
    Part {
        /// What kind of part.
        kind: &'static str,
        /// Which one of its kind.
        instance: u32,
        /// Why.
        source: RestoreError,
    },
    /// A part has no section.
    #[error("saved state lacks the section {kind} {instance}")]
    Missing {
        /// The part's kind.
        kind: &'static str,
        /// Which one.
        instance: u32,
    },
    /// Two sections for one part.
    #[error("saved state has the section {kind} {instance} twice")]
    Twice {
        /// The section's kind.
        kind: String,
        /// Which one.
        instance: u32,
    },
    /// A section for no part of this machine.
    #[error("saved state has the section {kind} {instance}, which this machine has no part for")]
    Unknown {
        /// The section's kind.
        kind: String,
        /// Which one.
        instance: u32,
    },
}

/// What a new machine is to become.
pub struct Origin {
    /// Where its RAM comes from.
    pub backing: Backing,
    /// Whether its disks are locked at once, or later by whoever hands it over.
    pub locking: Locking,
    /// Of a machine that is restored: what its vCPUs need. Its CPU model was chosen where it booted.
    pub needs: Option<CpuNeeds>,
}

impl Origin {
    /// A machine that boots.
    #[must_use]
    pub fn boot(config: &Config) -> Self {
        let backing = Backing::Fresh { hugepages: config.hugepages };
        Self { backing, locking: Locking::Now, needs: None }
    }
}

/// What a machine keeps whether at rest or in motion. Fields drop in order: the VM before its memory.
pub(crate) struct Core {
    pub(crate) console: Arc<Console>,
    pub(crate) config: Config,
    pub(crate) platform: Platform,
    pub(crate) host: HostCpu,
    /// Every stateful part by name.
    pub(crate) parts: Vec<SectionId>,
    /// What the vCPUs need of a host that the machine moves to.
    pub(crate) needs: CpuNeeds,
    pub(crate) vm: Arc<VmFd>,
    /// One for each vCPU.
    pub(crate) threads: Vec<VcpuThread>,
    /// Outlives the devices that lend to it.
    pub(crate) io: IoThread,
    pub(crate) memory: Memory,
}

/// A machine at rest.
pub struct Machine {
    pub(crate) vcpus: Vec<Vcpu>,
    pub(crate) buses: Buses,
    pub(crate) core: Box<Core>,
}

impl Machine {
    /// Builds the machine that `config` describes: RAM, vCPUs, irqchip and devices, all in their state
    /// after power-on. `events` hears of what the guest asks for.
    pub fn new(
        config: Config,
        origin: Origin,
        console: &Arc<Console>,
        events: Sender<Event>,
    ) -> Result<Self, MachineError> {
        kick::install().map_err(MachineError::Thread)?;
        let kvm = open_kvm()?;
        let vm = Arc::new(create_vm(&kvm)?);
        dirty::enable_manual_protect(&vm)
            .map_err(|source| MachineError::Kvm { what: "track dirty pages", source })?;
        let Origin { backing, locking, needs } = origin;
        let memory = Memory::new(&layout::ram_ranges(config.ram_bytes), backing)?;
        memory.register(&vm, false)?;
        arch::configure_vm(&vm)?;
        let host = cpuid::host_cpuid(&kvm).map_err(MachineError::kvm("read its CPUID"))?;
        let cpuid = match &needs {
            // The saved vCPUs bring their own; until then any will do.
            Some(_) => host.clone(),
            None => {
                let ram_last = memory.ram().last_addr().0;
                arch::cpu_model::apply(&config.cpu_model, &host, ram_last)?
            }
        };
        let msrs = Arc::new(msr::MsrPlan::new(&kvm).map_err(MachineError::kvm("list its MSRs"))?);
        let vcpus = create_vcpus(&kvm, &vm, &cpuid, &msrs, config.cpus)?;
        let threads = (0..config.cpus).map(|index| VcpuThread::start(index, events.clone()));
        let threads = threads.collect::<io::Result<_>>().map_err(MachineError::Thread)?;
        let io = IoThread::start().map_err(MachineError::Thread)?;
        let (buses, platform) =
            platform::build(&config, &vm, memory.ram(), &io.endpoint(), console, &events, locking)?;
        let console = Arc::clone(console);
        let host = HostCpu { cpuid: host, msrs };
        let first = vcpus.first().expect("a machine has at least one vCPU");
        let needs = needs.unwrap_or_else(|| {
            let seen = cpuid::for_vcpu(&cpuid, 0, config.cpus);
            cpu::needs(&seen, &host, first.fd(), config.cpu_model.to_string(), config.cpus)
        });
        let parts = Vec::new();
        let core = Core { console, config, platform, host, parts, needs, vm, threads, io, memory };
        let mut machine = Self { vcpus, buses, core: Box::new(core) };
        machine.core.parts = machine.list_parts();
        Ok(machine)
    }

    /// Puts the configured kernel, command line, initrd and ACPI tables into RAM and vCPU 0 at its entry.
    pub fn load_kernel(&mut self) -> Result<(), MachineError> {
        let boot = &self.core.config.boot;
        let ram = self.core.memory.ram();
        let kernel = kernel::load(&boot.kernel, ram)?;
        let rsdp = tables::build(ram, &self.core.platform.description(self.core.config.cpus))?;
        let mut initrd = match &boot.initrd {
            None => None,
            Some(path) => Some(File::open(path).map_err(|source| MachineError::Initrd {
                path: path.display().to_string(),
                source,
            })?),
        };
        let inputs = boot::BootInputs {
            ram,
            kernel: &kernel,
            cmdline: &boot.cmdline,
            initrd: initrd.as_mut(),
            rsdp,
        };
        let registers = boot::prepare(inputs)?;
        let first = self.vcpus.first().expect("a machine has at least one vCPU");
        registers.apply(first.fd()).map_err(MachineError::kvm("set the first vCPU's registers"))
    }

    /// What the machine was built from.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.core.config
    }

    /// Saves every stateful part, in the versions of a list made by the same walk. RAM is not among them.
    pub fn save(&mut self, listed: &[SectionId]) -> Result<Vec<Section>, SaveError> {
        let (mut sections, mut listed) = (Vec::new(), listed.iter());
        self.for_each_part(Downtime::Passes, &mut |instance, part| {
            let version = listed.next().map_or(part.version(), |id| id.version);
            part.save_as(instance, version).map(|section| sections.push(section))
        })?;
        Ok(sections)
    }

    /// Puts saved state into a machine fresh from [`Self::new`]. After an error the machine is of no
    /// use and is dropped.
    pub fn restore(
        &mut self,
        sections: Vec<Section>,
        downtime: Downtime,
    ) -> Result<(), RestoreMachineError> {
        let mut by_part = HashMap::new();
        for section in sections {
            let key = (section.kind.clone(), section.instance);
            if let Some(twice) = by_part.insert(key, section) {
                let (kind, instance) = (twice.kind, twice.instance);
                return Err(RestoreMachineError::Twice { kind, instance });
            }
        }
        self.for_each_part(downtime, &mut |instance, part| {
            let kind = part.kind();
            match by_part.remove(&(kind.to_owned(), instance)) {
                Some(section) => part
                    .restore_section(&section)
                    .map_err(|source| RestoreMachineError::Part { kind, instance, source }),
                None => Err(RestoreMachineError::Missing { kind, instance }),
            }
        })?;
        if let Some((kind, instance)) = by_part.into_keys().next() {
            return Err(RestoreMachineError::Unknown { kind, instance });
        }
        vmclock::disrupted(self.core.memory.ram());
        Ok(())
    }

    /// Every stateful part by name, with the newest version that it reads and writes.
    fn list_parts(&mut self) -> Vec<SectionId> {
        let mut parts = Vec::new();
        let listed: Result<(), Infallible> =
            self.for_each_part(Downtime::Passes, &mut |instance, part| {
                let (kind, version) = (part.kind().to_owned(), part.version());
                parts.push(SectionId { kind, instance, version });
                Ok(())
            });
        let Ok(()) = listed;
        parts
    }

    /// The one list of stateful parts, in the order in which they are restored: interrupt controllers,
    /// clock, vCPUs (which arm their timers by it), devices.
    fn for_each_part<E>(
        &mut self,
        downtime: Downtime,
        visit: &mut dyn FnMut(u32, &mut dyn Saved) -> Result<(), E>,
    ) -> Result<(), E> {
        visit(0, &mut arch::chip_state::ChipPart { vm: &self.core.vm })?;
        let vcpus: Vec<_> = self.vcpus.iter().map(Vcpu::fd).collect();
        let ram = self.core.memory.ram();
        visit(0, &mut ClockPart { vm: &self.core.vm, vcpus: &vcpus, ram, downtime })?;
        for vcpu in &mut self.vcpus {
            visit(vcpu.index(), vcpu)?;
        }
        for (instance, device) in (0u32..).zip(self.buses.all_mut()) {
            visit(instance, device_part(device))?;
            if let Some(inner) = device.inner_part() {
                visit(instance, inner)?;
            }
        }
        Ok(())
    }

    /// Does ahead what KVM does when a vCPU is first run, for a guest whose first steps are awaited.
    pub fn warm_up(&mut self) {
        let cold = std::mem::take(&mut self.vcpus).into_iter().zip(&self.core.threads);
        self.vcpus = cold.map(|(vcpu, thread)| thread.warm_up(vcpu)).collect();
    }

    /// Lends the parts to their threads.
    #[must_use]
    pub fn start(self) -> Running {
        Running::start(self)
    }

    /// Whether the guest's last reset came without the orderly shutdown that Linux does first: see
    /// [`arch::interrupts_in_use`].
    #[must_use]
    pub fn reset_by_panic(&self) -> bool {
        arch::interrupts_in_use(&self.core.vm, self.vcpus.iter().map(Vcpu::fd))
    }
}

fn device_part(device: &mut Box<dyn BusDevice>) -> &mut dyn Saved {
    device.as_mut()
}

fn create_vcpus(
    kvm: &Kvm,
    vm: &VmFd,
    cpuid: &CpuId,
    msrs: &Arc<msr::MsrPlan>,
    count: u32,
) -> Result<Vec<Vcpu>, MachineError> {
    let most = kvm.get_max_vcpus();
    if usize::try_from(count).is_ok_and(|c| c > most) {
        return Err(MachineError::TooManyCpus { asked: count, most });
    }
    let (mut vcpus, mut refused) = (Vec::new(), Vec::new());
    for index in 0..count {
        let fd = vm.create_vcpu(u64::from(index)).map_err(MachineError::kvm("create a vCPU"))?;
        fd.set_cpuid2(&cpuid::for_vcpu(cpuid, index, count))
            .map_err(MachineError::kvm("set a vCPU's CPUID"))?;
        refused.extend(boot_regs::init_msrs(&fd).map_err(MachineError::kvm("set a vCPU's MSRs"))?);
        vcpus.push(Vcpu::new(index, fd, Arc::clone(msrs)));
    }
    if let Some(text) = boot_regs::refused_text(refused) {
        tracing::warn!("{text}");
    }
    Ok(vcpus)
}
