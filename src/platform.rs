//! The table of a machine's devices: which there are, at which address and interrupt line, over which
//! backend. Wires them to KVM and to the I/O thread.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use kvm_ioctls::{IoEventAddress, VmFd};
use vmm_devices::GuestRam;
use vmm_devices::bus::{Overlap, SlotId};
use vmm_devices::power::{self, Power, PowerRequest, PowerSink};
use vmm_devices::reset::{self, ResetLine};
use vmm_devices::serial::{self, Serial};
use vmm_devices::sign::Signs;
use vmm_devices::virtio::VirtioDevice;
use vmm_devices::virtio::announce::Announcer;
use vmm_devices::virtio::block::Block;
use vmm_devices::virtio::mmio::{MMIO_LEN, VirtioMmio, register};
use vmm_devices::virtio::net::Net;
use vmm_devices::virtio::rng::Rng;

use crate::arch::{layout, tables};
use crate::backend::disk::{Disk, DiskError, DiskHandle, Locking};
use crate::backend::tap::{Tap, TapError, TapHandle};
use crate::config::{Config, DEVICES_MAX, DiskConfig, NetConfig};
use crate::console::Console;
use crate::event::{Event, GuestExit};
use crate::io_thread::Endpoint;
use crate::irq::IrqPin;
use crate::vcpu::Buses;

// One slot is the entropy device's.
const _: () = assert!(DEVICES_MAX + 1 == layout::VIRTIO_SLOTS_MAX as usize);

/// Why a device could not be built.
#[derive(Debug, thiserror::Error)]
pub enum PlatformError {
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A TAP.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// More devices than there are interrupt lines.
    #[error("too many devices: a machine has at most {0} disks and network interfaces")]
    TooMany(u32),
    /// KVM or the kernel refused something that the device needs.
    #[error("device {device}: can't be wired to KVM")]
    Wire {
        /// Which one.
        device: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Two devices claim an address: the table is wrong.
    #[error(transparent)]
    Overlap(#[from] Overlap),
}

/// What the machine keeps of its devices besides the buses.
pub struct Platform {
    /// MMIO base and GSI of each virtio device.
    virtio: Vec<(u64, u32)>,
    /// Where the serial port stands on the port bus.
    pub(crate) serial: SlotId,
    /// Where the power device stands on the port bus.
    pub(crate) power: SlotId,
    /// The disks' locks.
    pub(crate) disks: Vec<DiskHandle>,
    /// The TAPs, each with the announcer of the device on it.
    pub(crate) taps: Vec<(TapHandle, Announcer)>,
    /// When the guest first put out anything.
    pub(crate) sign: Arc<Signs>,
}

impl Platform {
    /// What the ACPI tables tell the guest.
    pub(crate) fn description(&self, cpus: u32) -> tables::Description<'_> {
        let vmgenid_address = Some(layout::VMGENID_PAGE.0);
        let vmclock_address = Some(layout::VMCLOCK_PAGE.0);
        tables::Description { cpus, virtio: &self.virtio, vmgenid_address, vmclock_address }
    }
}

/// Builds the devices of `config`, each in its state after power-on.
pub(crate) fn build(
    config: &Config,
    vm: &Arc<VmFd>,
    ram: &GuestRam,
    io: &Endpoint,
    console: &Console,
    events: &Sender<Event>,
    locking: Locking,
) -> Result<(Buses, Platform), PlatformError> {
    let mut buses = Buses::default();
    let sign = Arc::default();
    let serial = add_serial(&mut buses, vm, console, &sign)?;
    let power = add_power(&mut buses, vm, events)?;
    let mut builder = Builder { vm, ram, io, locking, sign: &sign, buses, virtio: Vec::new() };
    builder.add("rng".to_owned(), Box::new(Rng::default()))?;
    let mut disks = Vec::new();
    for disk in &config.disks {
        disks.push(builder.add_disk(disk)?);
    }
    let mut taps = Vec::new();
    for net in &config.nets {
        taps.push(builder.add_net(net)?);
    }
    let Builder { buses, virtio, .. } = builder;
    Ok((buses, Platform { virtio, serial, power, disks, taps, sign }))
}

fn add_serial(
    buses: &mut Buses,
    vm: &Arc<VmFd>,
    console: &Console,
    sign: &Arc<Signs>,
) -> Result<SlotId, PlatformError> {
    let line = IrqPin::new(vm, layout::SERIAL_GSI);
    let start = u64::from(layout::SERIAL_PORT);
    let device = Serial::new(line, console.wire(), Arc::clone(sign));
    Ok(buses.pio.insert(start..start + serial::SIZE, Box::new(device))?)
}

fn add_power(
    buses: &mut Buses,
    vm: &Arc<VmFd>,
    events: &Sender<Event>,
) -> Result<SlotId, PlatformError> {
    let sink = || -> PowerSink {
        let events = events.clone();
        Box::new(move |request| {
            let exit = match request {
                PowerRequest::Off => GuestExit::PowerOff,
                PowerRequest::Reset => GuestExit::Reset,
            };
            // Nobody listens any more when the VMM is on its way out.
            let _ = events.send(Event::Guest(exit));
        })
    };
    let line = IrqPin::new(vm, layout::GED_GSI);
    let start = u64::from(layout::POWER_PORT);
    let slot = buses.pio.insert(start..start + power::SIZE, Box::new(Power::new(line, sink())))?;
    let start = u64::from(layout::RESET_PORT);
    buses.pio.insert(start..start + reset::SIZE, Box::new(ResetLine::new(sink())))?;
    Ok(slot)
}

struct Builder<'a> {
    vm: &'a Arc<VmFd>,
    ram: &'a GuestRam,
    io: &'a Endpoint,
    locking: Locking,
    sign: &'a Arc<Signs>,
    buses: Buses,
    virtio: Vec<(u64, u32)>,
}

impl Builder<'_> {
    fn add_disk(&mut self, disk: &DiskConfig) -> Result<DiskHandle, PlatformError> {
        let (backend, handle) = Disk::open(&disk.options(), self.locking)?;
        let device = Block::new(&disk.id, disk.serial.as_deref(), Box::new(backend));
        self.add(disk.id.clone(), Box::new(device))?;
        Ok(handle)
    }

    fn add_net(&mut self, net: &NetConfig) -> Result<(TapHandle, Announcer), PlatformError> {
        let (backend, handle) = Tap::open(&net.tap)?;
        let device = Net::new(&net.id, net.mac.0, net.mtu, Box::new(backend));
        let announcer = device.announcer();
        self.add(net.id.clone(), Box::new(device))?;
        Ok((handle, announcer))
    }

    /// Puts a virtio device into the next slot: its interrupt is a pin of the I/O APIC, each queue's
    /// notification an ioeventfd.
    fn add(&mut self, id: String, device: Box<dyn VirtioDevice>) -> Result<(), PlatformError> {
        let too_many = || PlatformError::TooMany(layout::VIRTIO_SLOTS_MAX - 1);
        let index = u32::try_from(self.virtio.len()).map_err(|_| too_many())?;
        let base = layout::virtio_base(index).ok_or_else(too_many)?;
        let gsi = layout::virtio_gsi(index).ok_or_else(too_many)?;
        let line = IrqPin::new(self.vm, gsi);
        let (lender, sign) = (Box::new(self.io.clone()), Arc::clone(self.sign));
        let transport =
            VirtioMmio::new(device, self.ram.clone(), line, lender, sign).map_err(wire(&id))?;
        let notify = IoEventAddress::Mmio(base + register::QUEUE_NOTIFY);
        for (queue, kick) in (0u32..).zip(transport.kicks()) {
            self.vm
                .register_ioevent(kick, &notify, queue)
                .map_err(|e| wire(&id)(io::Error::from_raw_os_error(e.errno())))?;
        }
        self.buses.mmio.insert(base..base + MMIO_LEN, Box::new(transport))?;
        self.virtio.push((base, gsi));
        Ok(())
    }
}

fn wire(device: &str) -> impl Fn(io::Error) -> PlatformError + '_ {
    |source| PlatformError::Wire { device: device.to_owned(), source }
}
