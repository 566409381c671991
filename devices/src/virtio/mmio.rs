//! Virtio over MMIO, version 2 (virtio 1.3, 4.2): the register map as a thin layer over
//! [`TransportCore`], and where the device's [`Worker`] is.
//!
//! Invariant: the worker is lent exactly while the machine runs, the driver has set `DRIVER_OK` and the
//! device needn't be reset (a worker that breaks meanwhile stays lent, idle). Everything else — reset,
//! save, restore — happens with the worker at home.

use std::io;
use std::sync::Arc;

use event_manager::SubscriberId;
use virtio_queue::{Queue, QueueT};
use vmm_migration::state::Saved;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::core::{Area, Effect, F_EVENT_IDX, Refusal, TransportCore};
use super::interrupt::Interrupt;
use super::queue::QUEUES_MAX;
use super::worker::{Lender, Worker, kick};
use super::{ConfigSpace, VirtioDevice};
use crate::GuestRam;
use crate::bus::BusDevice;
use crate::irq::IrqLine;
use crate::limit::RateLimited;
use crate::sign::Signs;

/// Bytes of address space that one device answers.
pub const MMIO_LEN: u64 = 0x1000;

/// Log lines a second that a guest can cause through one device's registers.
const LOG_LINES_PER_SECOND: u32 = 5;

/// Offsets of the registers (virtio 1.3, 4.2.2).
pub mod register {
    #![allow(missing_docs, reason = "the names are the specification's")]
    pub const MAGIC_VALUE: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const VENDOR_ID: u64 = 0x00c;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_SIZE_MAX: u64 = 0x034;
    pub const QUEUE_SIZE: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    pub const QUEUE_DESC_HIGH: u64 = 0x084;
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub const SHM_LEN_LOW: u64 = 0x0b0;
    pub const SHM_LEN_HIGH: u64 = 0x0b4;
    pub const SHM_BASE_LOW: u64 = 0x0b8;
    pub const SHM_BASE_HIGH: u64 = 0x0bc;
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    pub const CONFIG: u64 = 0x100;
}
use register::{
    CONFIG, CONFIG_GENERATION, DEVICE_FEATURES, DEVICE_FEATURES_SEL, DEVICE_ID, DRIVER_FEATURES,
    DRIVER_FEATURES_SEL, INTERRUPT_ACK, INTERRUPT_STATUS, MAGIC_VALUE, QUEUE_DESC_HIGH,
    QUEUE_DESC_LOW, QUEUE_DEVICE_HIGH, QUEUE_DEVICE_LOW, QUEUE_DRIVER_HIGH, QUEUE_DRIVER_LOW,
    QUEUE_NOTIFY, QUEUE_READY, QUEUE_SEL, QUEUE_SIZE, QUEUE_SIZE_MAX, SHM_BASE_HIGH, SHM_BASE_LOW,
    SHM_LEN_HIGH, SHM_LEN_LOW, STATUS, VENDOR_ID, VERSION,
};

/// `MagicValue`: "virt".
const MAGIC: u32 = 0x7472_6976;
/// `VendorID`: "vmm".
const VENDOR: u32 = 0x006d_6d76;

/// Where the worker is.
pub(super) enum Place {
    Home(Box<Worker>),
    Lent(SubscriberId),
    /// On its way, inside [`VirtioMmio::home`] and [`VirtioMmio::lend`] only.
    Moving,
}

/// A virtio device on an MMIO bus.
pub struct VirtioMmio {
    pub(super) config: Arc<ConfigSpace>,

    pub(super) kicks: Arc<[EventFd]>,
    pub(super) lender: Box<dyn Lender>,
    pub(super) log: RateLimited,
    pub(super) name: &'static str,

    pub(super) core: TransportCore,
    pub(super) place: Place,
    /// The machine is in motion.
    pub(super) running: bool,
    /// The device knows the driver's features.
    pub(super) activated: bool,
}

impl VirtioMmio {
    /// Puts `device` behind an MMIO register map, at rest. `line` is its interrupt, `lender` whoever
    /// drives it in motion; `sign` is noted when the guest notifies a queue.
    ///
    /// # Errors
    /// The kernel gives no eventfd, or the device has a queue that can't be (`InvalidInput`).
    pub fn new(
        device: Box<dyn VirtioDevice>,
        ram: GuestRam,
        line: Arc<dyn IrqLine>,
        lender: Box<dyn Lender>,
        sign: Arc<Signs>,
    ) -> io::Result<Self> {
        let sizes = device.queue_sizes().to_vec();
        if sizes.len() > QUEUES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many virtqueues"));
        }
        let queues: Result<Vec<Queue>, _> = sizes.iter().map(|s| Queue::new(*s)).collect();
        let queues = queues.map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
        let kicks: io::Result<Arc<[EventFd]>> =
            sizes.iter().map(|_| EventFd::new(EFD_NONBLOCK)).collect();
        let (kicks, interrupt) = (kicks?, Interrupt::new(line));
        let (config, name) = (device.config(), device.kind());
        let core = TransportCore::new(device.id(), device.features(), &sizes, interrupt.clone());
        let worker = Worker::new(device, ram, Arc::clone(&kicks), interrupt, sign, queues);
        Ok(Self {
            config,
            kicks,
            lender,
            log: RateLimited::new(LOG_LINES_PER_SECOND),
            name,
            core,
            place: Place::Home(Box::new(worker)),
            running: false,
            activated: false,
        })
    }

    /// The notification of each queue, for an ioeventfd at [`QUEUE_NOTIFY`] with the queue's index as
    /// data match.
    #[must_use]
    pub fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// The worker, after it has been taken back if need be.
    pub(super) fn home(&mut self) -> &mut Worker {
        self.place = match std::mem::replace(&mut self.place, Place::Moving) {
            Place::Lent(id) => Place::Home(self.lender.take_back(id)),
            place => place,
        };
        match &mut self.place {
            Place::Home(worker) => worker,
            Place::Lent(_) | Place::Moving => unreachable!("it was just put here"),
        }
    }

    /// The worker at rest.
    pub(super) fn at_rest(&self) -> &Worker {
        match &self.place {
            Place::Home(worker) => worker,
            Place::Lent(_) | Place::Moving => panic!("state is read at rest only"),
        }
    }

    /// Lends the worker if the device is live and the machine runs.
    fn lend(&mut self) {
        if !(self.running && self.core.live()) {
            return;
        }
        if !self.activated {
            let features = self.core.driver_features();
            self.home().device.activate(features);
            self.activated = true;
        }
        self.place = match std::mem::replace(&mut self.place, Place::Moving) {
            Place::Home(worker) => Place::Lent(self.lender.lend(worker)),
            place => place,
        };
    }

    /// Gives the worker at home the queue that the driver set up, fresh.
    pub(super) fn build_queue(&mut self, index: usize) -> Result<(), Refusal> {
        let event_idx = self.core.driver_features() & F_EVENT_IDX != 0;
        let setup = self.core.queues[index].clone();
        let worker = self.home();
        worker.queues[index] = setup.build(worker.ram(), event_idx)?;
        Ok(())
    }

    fn start_queues(&mut self, queues: std::ops::Range<usize>) {
        for index in queues {
            if let Err(why) = self.build_queue(index) {
                self.core.interrupt.fail();
                return self.complain(&format!("virtqueue {index}: {why}"));
            }
        }
    }

    fn reset(&mut self) {
        let worker = self.home();
        worker.device.reset();
        for queue in &mut worker.queues {
            queue.reset();
        }
        self.core.reset();
        self.activated = false;
    }

    fn write_status(&mut self, value: u32) {
        match self.core.set_status(value) {
            Ok(Effect::None) => {}
            Ok(Effect::Reset) => self.reset(),
            Ok(Effect::Start) => {
                self.start_queues(0..self.kicks.len());
                self.lend();
            }
            Err(why) => self.complain(why),
        }
    }

    fn write_queue_ready(&mut self, ready: bool) {
        match self.core.set_queue_ready(ready) {
            Ok(Some(queue)) => {
                self.start_queues(queue..queue + 1);
                self.lend();
            }
            Ok(None) => {}
            Err(why) => self.complain(why),
        }
    }

    fn complain(&mut self, why: &str) {
        if let Some(dropped) = self.log.admit() {
            tracing::warn!(device = self.name, dropped, "the driver breaks the protocol: {why}");
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        let core = &self.core;
        match offset {
            MAGIC_VALUE => MAGIC,
            VERSION => 2,
            DEVICE_ID => core.device_id,
            VENDOR_ID => VENDOR,
            DEVICE_FEATURES => core.device_features_word(),
            QUEUE_SIZE_MAX => core.queue().map_or(0, |q| u32::from(q.size_max)),
            QUEUE_READY => u32::from(core.queue().is_some_and(|q| q.ready)),
            INTERRUPT_STATUS => core.interrupt.pending(),
            STATUS => core.status(),
            // No device has shared memory: each region's length and base read as all ones.
            SHM_LEN_LOW | SHM_LEN_HIGH | SHM_BASE_LOW | SHM_BASE_HIGH => u32::MAX,
            CONFIG_GENERATION => self.config.generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        let core = &mut self.core;
        let result = match offset {
            STATUS => return self.write_status(value),
            QUEUE_READY => return self.write_queue_ready(value != 0),
            QUEUE_NOTIFY => return self.notify(value),
            INTERRUPT_ACK => return core.interrupt.acknowledge(value),
            DEVICE_FEATURES_SEL => return core.device_features_sel = value,
            DRIVER_FEATURES_SEL => return core.driver_features_sel = value,
            QUEUE_SEL => return core.queue_sel = value,
            DRIVER_FEATURES => core.set_driver_features_word(value),
            QUEUE_SIZE => core.set_queue_size(value),
            QUEUE_DESC_LOW => core.set_queue_area(Area::Descriptor, 0, value),
            QUEUE_DESC_HIGH => core.set_queue_area(Area::Descriptor, 1, value),
            QUEUE_DRIVER_LOW => core.set_queue_area(Area::Driver, 0, value),
            QUEUE_DRIVER_HIGH => core.set_queue_area(Area::Driver, 1, value),
            QUEUE_DEVICE_LOW => core.set_queue_area(Area::Device, 0, value),
            QUEUE_DEVICE_HIGH => core.set_queue_area(Area::Device, 1, value),
            // Read-only, unknown, or of no consequence (`SHMSel`).
            _ => return,
        };
        if let Err(why) = result {
            self.complain(why);
        }
    }

    /// A notification that came by register: no ioeventfd caught it.
    fn notify(&self, queue: u32) {
        if let Some(fd) = self.kicks.get(queue as usize) {
            kick(fd);
        }
    }
}

impl BusDevice for VirtioMmio {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= CONFIG && matches!(data.len(), 1 | 2 | 4 | 8) {
            self.config.read(offset - CONFIG, data);
        } else if offset.is_multiple_of(4)
            && let Ok(word) = <&mut [u8; 4]>::try_from(data)
        {
            *word = self.read_register(offset).to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        // Registers are words; no device has configuration that a driver writes.
        if offset.is_multiple_of(4)
            && let Ok(word) = <[u8; 4]>::try_from(data)
        {
            self.write_register(offset, u32::from_le_bytes(word));
        }
    }

    fn inner_part(&mut self) -> Option<&mut dyn Saved> {
        Some(self.home().device.as_mut())
    }

    fn resume(&mut self) {
        self.running = true;
        self.lend();
        self.core.interrupt.raise_again();
    }

    fn quiesce(&mut self) {
        self.running = false;
        self.home().device.drain();
    }
}

#[cfg(test)]
#[path = "mmio_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "mmio_fuzz.rs"]
mod fuzz;
