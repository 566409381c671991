//! A bus: address ranges, and the device behind each. One for port I/O, one for MMIO.
//!
//! Invariant: a bus never changes after the machine is built, and its slots' mutexes are the only
//! ones of the VMM. vCPU threads lock one slot for one access; the console's thread locks the serial's
//! slot only; the control thread locks the power device's only, to press the button. Nobody holds two,
//! and what a device waits for with its slot locked takes no lock. At rest [`Bus::get_mut`] needs no lock.

use std::any::Any;
use std::ops::Range;
use std::sync::Mutex;

use vmm_migration::state::Saved;

/// A device on a bus. Offsets are relative to the start of the device's range.
///
/// An access that the device doesn't know (odd width, odd offset, read of a write-only register) is
/// the guest's mistake: reads give all ones or zeroes as the device's specification says, writes are
/// ignored. Neither panics.
pub trait BusDevice: Saved + Send + Any {
    /// A guest's read of `data.len()` bytes (1, 2, 4 or 8).
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// A guest's write of `data.len()` bytes (1, 2, 4 or 8).
    fn write(&mut self, offset: u64, data: &[u8]);

    /// A second stateful part behind this one, at rest: the device behind a virtio transport. It stands
    /// right after this part in the machine's list of parts, with the same instance.
    fn inner_part(&mut self) -> Option<&mut dyn Saved> {
        None
    }

    /// The machine starts: lend what runs elsewhere (a virtio worker to the I/O thread).
    fn resume(&mut self) {}

    /// The machine stops, all vCPUs have left KVM: bring home what was lent and finish I/O in flight,
    /// so that [`Saved::save_section`] sees everything and guest RAM changes no more.
    fn quiesce(&mut self) {}
}

struct Slot {
    range: Range<u64>,
    device: Mutex<Box<dyn BusDevice>>,
}

/// Which slot of a [`Bus`] a device stands in: its index in address order of insertion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotId(usize);

/// Two devices claim one address.
#[derive(Debug, thiserror::Error)]
#[error("bus ranges {0:#x?} and {1:#x?} overlap")]
pub struct Overlap(Range<u64>, Range<u64>);

/// Devices by address. See the module's invariant.
#[derive(Default)]
pub struct Bus {
    slots: Vec<Slot>,
}

impl Bus {
    /// Adds a device that answers `range`.
    pub fn insert(
        &mut self,
        range: Range<u64>,
        device: Box<dyn BusDevice>,
    ) -> Result<SlotId, Overlap> {
        if let Some(s) =
            self.slots.iter().find(|s| s.range.start < range.end && range.start < s.range.end)
        {
            return Err(Overlap(s.range.clone(), range));
        }
        self.slots.push(Slot { range, device: Mutex::new(device) });
        Ok(SlotId(self.slots.len() - 1))
    }

    /// A guest's read. An address that nobody answers reads as all ones.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some(slot) => {
                slot.device.lock().expect(LOCK).read(address - slot.range.start, data);
            }
            None => data.fill(0xff),
        }
    }

    /// A guest's write. An address that nobody answers ignores it.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some(slot) = self.find(address, data.len()) {
            slot.device.lock().expect(LOCK).write(address - slot.range.start, data);
        }
    }

    /// Runs `f` on the device of a slot while the machine is in motion: how a thread other than a
    /// vCPU's reaches what the device offers beside its registers (the serial's input, the power
    /// button). `None` if the device is not a `T`.
    pub fn with_as<T: BusDevice, R>(&self, id: SlotId, f: impl FnOnce(&mut T) -> R) -> Option<R> {
        let mut device = self.slots[id.0].device.lock().expect(LOCK);
        let device: &mut dyn Any = device.as_mut();
        device.downcast_mut().map(f)
    }

    /// The device of a slot, at rest.
    pub fn get_mut(&mut self, id: SlotId) -> &mut dyn BusDevice {
        self.slots[id.0].device.get_mut().expect(LOCK).as_mut()
    }

    /// All devices in order of insertion, at rest.
    pub fn devices_mut(&mut self) -> impl Iterator<Item = &mut Box<dyn BusDevice>> {
        self.slots.iter_mut().map(|s| s.device.get_mut().expect(LOCK))
    }

    fn find(&self, address: u64, len: usize) -> Option<&Slot> {
        // A machine has about twenty slots: a scan is faster than a tree.
        let end = address.checked_add(u64::try_from(len).ok()?)?;
        self.slots.iter().find(|s| s.range.start <= address && end <= s.range.end)
    }
}

/// Why a lock can't be poisoned: release builds abort on panic, and devices don't panic.
const LOCK: &str = "a device panicked while its slot was locked";
