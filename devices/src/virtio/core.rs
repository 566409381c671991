//! The part of a virtio transport that is the same on every bus: the device status (virtio 1.3, 2.1),
//! feature negotiation (2.2) and the set-up of queues (3.1.1).
//!
//! It is a state machine over numbers: it neither owns the device nor touches guest RAM until the driver
//! starts, and returns what is to be done as an [`Effect`].

use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::interrupt::Interrupt;
use crate::GuestRam;

/// Device status bits (virtio 1.3, 2.1).
pub mod status {
    /// The guest found the device.
    pub const ACKNOWLEDGE: u32 = 1;
    /// The guest has a driver for it.
    pub const DRIVER: u32 = 2;
    /// The driver drives.
    pub const DRIVER_OK: u32 = 4;
    /// The features are negotiated.
    pub const FEATURES_OK: u32 = 8;
    /// The device is broken until reset. Set by the device only.
    pub const NEEDS_RESET: u32 = 64;
    /// The driver gave up.
    pub const FAILED: u32 = 128;
}
use status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, NEEDS_RESET};

/// `VIRTIO_F_INDIRECT_DESC` (virtio 1.3, 6).
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_F_EVENT_IDX`.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1`.
pub const F_VERSION_1: u64 = 1 << 32;

/// What the transport offers on behalf of every device.
const TRANSPORT_FEATURES: u64 = F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1;

/// What a new status demands of the owner of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing more.
    None,
    /// Reset the device, then [`TransportCore::reset`].
    Reset,
    /// `DRIVER_OK`: the device starts.
    Start,
}

/// A write that a driver mustn't make; it changed nothing. The text says why.
pub type Refusal = &'static str;

/// The three parts of a split virtqueue (virtio 1.3, 2.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Area {
    /// The descriptor table.
    Descriptor,
    /// The available ring.
    Driver,
    /// The used ring.
    Device,
}

/// One queue as the driver set it up; nothing of it is checked until it is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueSetup {
    /// The device's largest size.
    pub size_max: u16,
    /// The driver's size.
    pub size: u32,
    /// Guest physical address of the descriptor table.
    pub descriptor_area: u64,
    /// Guest physical address of the available ring.
    pub driver_area: u64,
    /// Guest physical address of the used ring.
    pub device_area: u64,
    /// The driver says that the device may use it.
    pub ready: bool,
}

impl QueueSetup {
    fn new(size_max: u16) -> Self {
        let size = u32::from(size_max);
        Self { size_max, size, descriptor_area: 0, driver_area: 0, device_area: 0, ready: false }
    }

    /// The queue that the device works on: what the driver set up, or an empty one that isn't ready.
    ///
    /// # Errors
    /// The size or an address can't be (virtio 1.3, 2.7: alignment; all of it in RAM).
    pub fn build(&self, ram: &GuestRam, event_idx: bool) -> Result<Queue, Refusal> {
        let mut queue = Queue::new(self.size_max).map_err(|_| "no device has such a queue")?;
        if !self.ready {
            return Ok(queue);
        }
        let size = u16::try_from(self.size).map_err(|_| "the size is too large")?;
        queue.try_set_size(size).map_err(|_| "the size is zero, too large or no power of two")?;
        let (table, avail, used) = (self.descriptor_area, self.driver_area, self.device_area);
        queue
            .try_set_desc_table_address(GuestAddress(table))
            .and_then(|()| queue.try_set_avail_ring_address(GuestAddress(avail)))
            .and_then(|()| queue.try_set_used_ring_address(GuestAddress(used)))
            .map_err(|_| "an area is misaligned")?;
        let size = usize::from(size);
        let in_ram = |base, len| ram.check_range(GuestAddress(base), len);
        // Each ring has flags and index in front, and an event index behind.
        if !(in_ram(table, 16 * size) && in_ram(avail, 6 + 2 * size) && in_ram(used, 6 + 8 * size))
        {
            return Err("an area lies outside of RAM");
        }
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        Ok(queue)
    }
}

/// See the module.
pub struct TransportCore {
    /// Device id (virtio 1.3, section 5).
    pub(super) device_id: u32,
    pub(super) device_features: u64,

    pub(super) interrupt: Interrupt,

    /// Without `NEEDS_RESET`, which the worker sets in `interrupt`.
    pub(super) status: u32,
    pub(super) device_features_sel: u32,
    pub(super) driver_features_sel: u32,
    pub(super) driver_features: u64,
    pub(super) queue_sel: u32,
    pub(super) queues: Vec<QueueSetup>,
}

impl TransportCore {
    /// A device that no driver has found yet.
    pub fn new(device_id: u32, features: u64, sizes: &[u16], interrupt: Interrupt) -> Self {
        Self {
            device_id,
            device_features: features | TRANSPORT_FEATURES,
            interrupt,
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            queues: sizes.iter().map(|s| QueueSetup::new(*s)).collect(),
        }
    }

    /// The status as the driver reads it.
    #[must_use]
    pub fn status(&self) -> u32 {
        self.status | if self.interrupt.needs_reset() { NEEDS_RESET } else { 0 }
    }

    /// Whether the device works: the driver started it and it isn't broken.
    #[must_use]
    pub fn live(&self) -> bool {
        self.status & DRIVER_OK != 0 && !self.interrupt.needs_reset()
    }

    /// What the driver accepted.
    #[must_use]
    pub fn driver_features(&self) -> u64 {
        self.driver_features
    }

    /// Whether a set of features may be accepted: offered ones only, and `VERSION_1` among them, since
    /// this is no legacy device (virtio 1.3, 6.2).
    pub(super) fn acceptable(&self, features: u64) -> bool {
        features & !self.device_features == 0 && features & F_VERSION_1 != 0
    }

    /// Whether a status can come about: each step needs those before it (virtio 1.3, 3.1.1).
    pub(super) fn possible(status: u32) -> bool {
        let steps = [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK];
        let done = steps.iter().take_while(|s| status & **s != 0).fold(0, |all, s| all | s);
        status & !FAILED == done
    }

    /// The driver writes the status.
    ///
    /// # Errors
    /// It clears a bit, leaves out a step, or accepts features that it mustn't: then `FEATURES_OK` stays
    /// off, by which the driver knows.
    pub fn set_status(&mut self, value: u32) -> Result<Effect, Refusal> {
        if value == 0 {
            return Ok(Effect::Reset);
        }
        let wanted = value & (ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED);
        if self.status & !wanted != 0 {
            return Err("a status bit was cleared without a reset");
        }
        if !Self::possible(wanted) {
            return Err("a step of the initialization was left out");
        }
        let new = wanted & !self.status;
        if new & FEATURES_OK != 0 && !self.acceptable(self.driver_features) {
            self.status = wanted & !(FEATURES_OK | DRIVER_OK);
            return Err("features were accepted that weren't offered, or not VERSION_1");
        }
        self.status = wanted;
        Ok(if new & DRIVER_OK != 0 { Effect::Start } else { Effect::None })
    }

    /// Back to the beginning: nothing of the driver's is left.
    pub fn reset(&mut self) {
        let Self {
            device_id: _,
            device_features: _,
            interrupt,
            status,
            device_features_sel,
            driver_features_sel,
            driver_features,
            queue_sel,
            queues,
        } = self;
        interrupt.reset();
        (*status, *device_features_sel, *driver_features_sel) = (0, 0, 0);
        (*driver_features, *queue_sel) = (0, 0);
        for queue in queues {
            *queue = QueueSetup::new(queue.size_max);
        }
    }

    /// The selected 32 bits of the offered features; there are 64.
    #[must_use]
    pub fn device_features_word(&self) -> u32 {
        word(self.device_features, self.device_features_sel)
    }

    /// The driver accepts features, 32 at a time.
    ///
    /// # Errors
    /// The negotiation is over, or hasn't begun.
    pub fn set_driver_features_word(&mut self, value: u32) -> Result<(), Refusal> {
        if self.status & DRIVER == 0 || self.status & FEATURES_OK != 0 {
            return Err("features were written outside of the negotiation");
        }
        set_word(&mut self.driver_features, self.driver_features_sel, value);
        Ok(())
    }

    /// The queue that `QueueSel` names, if there is one.
    #[must_use]
    pub fn queue(&self) -> Option<&QueueSetup> {
        self.queues.get(usize::try_from(self.queue_sel).ok()?)
    }

    /// The selected queue, if the driver may set it up now.
    fn queue_setup(&mut self) -> Result<&mut QueueSetup, Refusal> {
        if self.status & FEATURES_OK == 0 || self.status & FAILED != 0 {
            return Err("a queue was set up outside of the initialization");
        }
        let queue = usize::try_from(self.queue_sel).ok().and_then(|q| self.queues.get_mut(q));
        queue.ok_or("a queue was set up that the device doesn't have")
    }

    /// The driver chooses the selected queue's size.
    ///
    /// # Errors
    /// It is not the time, or the queue is ready.
    pub fn set_queue_size(&mut self, size: u32) -> Result<(), Refusal> {
        let queue = self.queue_setup()?;
        if queue.ready {
            return Err("the size of a ready queue was written");
        }
        queue.size = size;
        Ok(())
    }

    /// The driver places an area of the selected queue: its low (`half` 0) or high (1) 32 bits.
    ///
    /// # Errors
    /// It is not the time, or the queue is ready.
    pub fn set_queue_area(&mut self, area: Area, half: u32, value: u32) -> Result<(), Refusal> {
        let queue = self.queue_setup()?;
        if queue.ready {
            return Err("the address of a ready queue was written");
        }
        let address = match area {
            Area::Descriptor => &mut queue.descriptor_area,
            Area::Driver => &mut queue.driver_area,
            Area::Device => &mut queue.device_area,
        };
        set_word(address, half, value);
        Ok(())
    }

    /// The driver gives the selected queue to the device, or takes it back. `Some(index)`: the device
    /// is live, and must hear of it at once.
    ///
    /// # Errors
    /// It is not the time.
    pub fn set_queue_ready(&mut self, ready: bool) -> Result<Option<usize>, Refusal> {
        if self.queue().is_none_or(|q| q.ready == ready) {
            // Linux clears it when it tears down the queues of a device that it has already reset.
            return Ok(None);
        }
        let live = self.live();
        self.queue_setup()?.ready = ready;
        Ok(usize::try_from(self.queue_sel).ok().filter(|_| live))
    }
}

/// The low (0) or high (1) half of 64 bits; other halves are zero.
fn word(value: u64, half: u32) -> u32 {
    let bytes = value.to_le_bytes();
    let at = |i: usize| u32::from_le_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
    match half {
        0 => at(0),
        1 => at(4),
        _ => 0,
    }
}

fn set_word(value: &mut u64, half: u32, new: u32) {
    match half {
        0 => *value = *value & !0xffff_ffff | u64::from(new),
        1 => *value = *value & 0xffff_ffff | u64::from(new) << 32,
        _ => {}
    }
}

#[cfg(test)]
#[path = "core_tests.rs"]
mod tests;
