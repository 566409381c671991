//! A virtio device behind its MMIO transport, driven as Linux does (drivers/virtio), with the I/O thread
//! played by an event manager in the same thread.

use std::sync::{Arc, Mutex};

use event_manager::{EventManager, SubscriberId, SubscriberOps};
use virtio_queue::QueueT;
use vmm_migration::state::Section;

use super::{CountingLine, DriverRing};
use crate::GuestRam;
use crate::bus::BusDevice;
use crate::irq::IrqLine;
use crate::sign::Signs;
use crate::virtio::VirtioDevice;
use crate::virtio::core::status;
use crate::virtio::mmio::{VirtioMmio, register};
use crate::virtio::worker::{Lender, Worker};

/// An I/O thread without a thread: [`Self::run`] does what has come up.
pub struct IoLoop {
    manager: Mutex<EventManager<Box<Worker>>>,
}

/// Wakes after which a loop counts as endless.
const WAKES_MAX: usize = 1000;

impl IoLoop {
    /// A loop with nothing in it.
    pub fn new() -> Arc<Self> {
        Arc::new(Self { manager: Mutex::new(EventManager::new().expect("an epoll instance")) })
    }

    /// Serves events until none is left; returns how many there were.
    pub fn run(&self) -> usize {
        let mut manager = self.manager.lock().expect("no panic before");
        let mut events = 0;
        for _ in 0..WAKES_MAX {
            match manager.run_with_timeout(0).expect("epoll works") {
                0 => return events,
                n => events += n,
            }
        }
        panic!("the device keeps the I/O thread busy for ever");
    }

    /// Serves what is ready now, once.
    pub fn turn(&self) -> usize {
        self.manager.lock().expect("no panic before").run_with_timeout(0).expect("epoll works")
    }
}

impl Lender for Arc<IoLoop> {
    fn lend(&self, worker: Box<Worker>) -> SubscriberId {
        self.manager.lock().expect("no panic before").add_subscriber(worker)
    }

    fn take_back(&self, id: SubscriberId) -> Box<Worker> {
        let worker = self.manager.lock().expect("no panic before").remove_subscriber(id);
        worker.expect("it was lent")
    }
}

/// The driver of one device, and the machine around it.
pub struct Driver {
    /// The device under test.
    pub device: VirtioMmio,
    /// Its interrupt.
    pub line: Arc<CountingLine>,
    /// Whether it was notified.
    pub sign: Arc<Signs>,
    /// Its I/O thread.
    pub io: Arc<IoLoop>,
    /// The guest's memory.
    pub ram: GuestRam,
}

impl Driver {
    /// A device in a machine at rest: [`BusDevice::resume`] starts it.
    pub fn at_rest(device: Box<dyn VirtioDevice>, ram: &GuestRam) -> Self {
        let (line, io) = (Arc::new(CountingLine::default()), IoLoop::new());
        let irq: Arc<dyn IrqLine> = line.clone();
        let (sign, lender) = (Arc::new(Signs::default()), Box::new(Arc::clone(&io)));
        let device = VirtioMmio::new(device, ram.clone(), irq, lender, Arc::clone(&sign))
            .expect("a device that can be");
        Self { device, line, sign, io, ram: ram.clone() }
    }

    /// A device in a running machine.
    pub fn new(device: Box<dyn VirtioDevice>, ram: &GuestRam) -> Self {
        let mut driver = Self::at_rest(device, ram);
        driver.device.resume();
        driver
    }

    /// Reads a register.
    pub fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.device.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Writes a register.
    pub fn write(&mut self, offset: u64, value: u32) {
        self.device.write(offset, &value.to_le_bytes());
    }

    /// The device status.
    pub fn status(&mut self) -> u32 {
        self.read(register::STATUS)
    }

    /// Adds bits to the device status.
    pub fn add_status(&mut self, bits: u32) {
        let status = self.status();
        self.write(register::STATUS, status | bits);
    }

    /// All features offered.
    pub fn offered(&mut self) -> u64 {
        let mut word = |sel| {
            self.write(register::DEVICE_FEATURES_SEL, sel);
            u64::from(self.read(register::DEVICE_FEATURES))
        };
        word(0) | word(1) << 32
    }

    /// Resets, finds the device and negotiates `features`; returns whether it took them.
    pub fn negotiate(&mut self, features: u64) -> bool {
        self.write(register::STATUS, 0);
        self.add_status(status::ACKNOWLEDGE);
        self.add_status(status::DRIVER);
        for (sel, shift) in [(0, 0), (1, 32)] {
            let word = u32::try_from(features >> shift & 0xffff_ffff).expect("masked");
            self.write(register::DRIVER_FEATURES_SEL, sel);
            self.write(register::DRIVER_FEATURES, word);
        }
        self.add_status(status::FEATURES_OK);
        self.status() & status::FEATURES_OK != 0
    }

    /// Writes a queue's addresses and size, and makes it ready.
    pub fn set_up(&mut self, queue: u32, ring: &DriverRing) {
        self.write(register::QUEUE_SEL, queue);
        self.write(register::QUEUE_SIZE, u32::from(ring.size));
        let areas = [
            (register::QUEUE_DESC_LOW, ring.desc),
            (register::QUEUE_DRIVER_LOW, ring.avail),
            (register::QUEUE_DEVICE_LOW, ring.used),
        ];
        for (low, address) in areas {
            self.write(low, u32::try_from(address & 0xffff_ffff).expect("masked"));
            self.write(low + 4, u32::try_from(address >> 32).expect("shifted"));
        }
        self.write(register::QUEUE_READY, 1);
    }

    /// The whole initialization (virtio 1.3, 3.1.1) with everything offered less `refused`, and rings of
    /// `sizes` laid out one after another from `base`.
    pub fn start(&mut self, base: u64, sizes: &[u16], refused: u64) -> Vec<DriverRing> {
        let features = self.offered() & !refused;
        assert!(self.negotiate(features), "the device refuses what it offers");
        let mut at = base;
        let mut rings = Vec::new();
        for (index, size) in (0..).zip(sizes) {
            rings.push(DriverRing::new(&self.ram, at, *size));
            self.set_up(index, &rings[rings.len() - 1]);
            at = (at + DriverRing::len(*size)).next_multiple_of(0x1000);
        }
        self.add_status(status::DRIVER_OK);
        rings
    }

    /// Notifies a queue by register and lets the I/O thread work until it is idle.
    pub fn notify(&mut self, queue: u32) {
        self.write(register::QUEUE_NOTIFY, queue);
        self.io.run();
    }

    /// Reads and acknowledges the pending interrupt bits.
    pub fn acknowledge(&mut self) -> u32 {
        let pending = self.read(register::INTERRUPT_STATUS);
        self.write(register::INTERRUPT_ACK, pending);
        pending
    }

    /// Stops the machine and saves transport and device.
    pub fn save(&mut self) -> [Section; 2] {
        use vmm_migration::state::Saved;
        self.device.quiesce();
        let transport = self.device.save_section(0).expect("saved");
        let inner = self.device.inner_part().expect("a device behind the transport");
        [transport, inner.save_section(0).expect("saved")]
    }

    /// Whether the device has its queue, ready, as its own view says; the machine must be at rest.
    pub fn device_ready(&self, queue: usize) -> bool {
        self.device.at_rest().queues[queue].ready()
    }
}

/// Moves a device: saves it from `source` and restores it into a fresh one behind a new transport over
/// the same RAM; the result is at rest.
pub fn moved(source: &mut Driver, fresh: Box<dyn VirtioDevice>) -> Driver {
    use vmm_migration::state::Saved;
    let [transport, inner] = source.save();
    let mut destination = Driver::at_rest(fresh, &source.ram);
    destination.device.restore_section(&transport).expect("the transport's state is valid");
    let device = destination.device.inner_part().expect("a device behind the transport");
    device.restore_section(&inner).expect("the device's state is valid");
    destination
}
