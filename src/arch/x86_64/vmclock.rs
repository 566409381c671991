//! `VMClock`: a page that tells the guest that its clock was disrupted, and that it is a copy (the UAPI group's
//! specification of that name; Linux's `uapi/linux/vmclock-abi.h`, with a driver since 6.13).
//!
//! Of its two modes this is the basic one: it says that something happened, not what time it is. All of its state is in
//! the page, which is guest RAM and moves with it; so a guest that booted without it goes on without. What the guest writes
//! there itself is its own affair.

use std::sync::atomic::{Ordering, fence};

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use vmm_devices::GuestRam;

use super::layout::{VMCLOCK_PAGE, VMCLOCK_PAGE_LEN};

const MAGIC: u32 = u32::from_le_bytes(*b"VCLK");
const VERSION: u16 = 1;
/// No counter is put in relation to time.
const COUNTER_INVALID: u8 = 0xff;
/// The generation counter is there.
const FLAG_GENERATION: u64 = 1 << 8;

/// Offsets of `struct vmclock_abi`'s fields, in bytes.
mod field {
    pub const MAGIC: u64 = 0;
    pub const SIZE: u64 = 4;
    pub const VERSION: u64 = 8;
    pub const COUNTER_ID: u64 = 10;
    pub const SEQ_COUNT: u64 = 12;
    pub const DISRUPTION_MARKER: u64 = 16;
    pub const FLAGS: u64 = 24;
    pub const VM_GENERATION_COUNTER: u64 = 104;
}

fn at(field: u64) -> GuestAddress {
    GuestAddress(VMCLOCK_PAGE.0 + field)
}

/// Writes the page for a guest that is about to boot.
///
/// # Errors
/// The RAM ends below it.
pub fn write(ram: &GuestRam) -> Result<(), GuestMemoryError> {
    ram.write_slice(&[0; VMCLOCK_PAGE_LEN as usize], VMCLOCK_PAGE)?;
    ram.write_obj(VMCLOCK_PAGE_LEN.to_le(), at(field::SIZE))?;
    ram.write_obj(VERSION.to_le(), at(field::VERSION))?;
    ram.write_obj(COUNTER_INVALID, at(field::COUNTER_ID))?;
    ram.write_obj(FLAG_GENERATION.to_le(), at(field::FLAGS))?;
    ram.write_obj(MAGIC.to_le(), at(field::MAGIC))
}

/// The guest, which doesn't run, was moved or restored: its clock was disrupted.
pub fn disrupted(ram: &GuestRam) {
    advance(ram, field::DISRUPTION_MARKER);
}

/// The guest, which doesn't run, was restored from a snapshot: there may be others like it.
pub fn copied(ram: &GuestRam) {
    advance(ram, field::VM_GENERATION_COUNTER);
}

/// Gives a field its next value, if the page is there.
fn advance(ram: &GuestRam, field: u64) {
    let read = |field| ram.read_obj::<u32>(at(field)).map(u32::from_le).ok();
    let seq = read(field::SEQ_COUNT);
    let (Some(MAGIC), Some(seq)) = (read(field::MAGIC), seq) else { return };
    let Ok(value) = ram.read_obj::<u64>(at(field)).map(u64::from_le) else { return };
    // Odd while the value changes: who reads across the change, begun before the guest stood, reads again. The page was
    // read just now, so it can be written.
    let updating = seq | 1;
    let _ = ram.write_obj(updating.to_le(), at(field::SEQ_COUNT));
    fence(Ordering::SeqCst);
    let _ = ram.write_obj(value.wrapping_add(1).to_le(), at(field));
    fence(Ordering::SeqCst);
    let _ = ram.write_obj(updating.wrapping_add(1).to_le(), at(field::SEQ_COUNT));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ram(bytes: usize) -> GuestRam {
        GuestRam::from_ranges(&[(GuestAddress(0), bytes)]).unwrap()
    }

    /// `seq_count`, `disruption_marker`, `vm_generation_counter`.
    fn state(ram: &GuestRam) -> (u32, u64, u64) {
        let long = |field| ram.read_obj(at(field)).unwrap();
        let seq = ram.read_obj(at(field::SEQ_COUNT)).unwrap();
        (seq, long(field::DISRUPTION_MARKER), long(field::VM_GENERATION_COUNTER))
    }

    #[test]
    fn a_fresh_page_is_what_the_driver_wants() {
        let ram = ram(2 << 20);
        write(&ram).unwrap();
        let mut head = [0; 32];
        ram.read_slice(&mut head, VMCLOCK_PAGE).unwrap();
        let expected = [&b"VCLK"[..], &[0, 0x10, 0, 0, 1, 0, 0xff, 0], &[0; 12], &[0, 1], &[0; 6]];
        assert_eq!(head[..], expected.concat());
        assert!(write(&super::tests::ram(0x1000)).is_err());
    }

    #[test]
    fn each_event_has_a_counter_and_both_make_readers_read_again() {
        let ram = ram(2 << 20);
        write(&ram).unwrap();
        disrupted(&ram);
        assert_eq!(state(&ram), (2, 1, 0));
        disrupted(&ram);
        copied(&ram);
        assert_eq!(state(&ram), (6, 2, 1));
    }

    #[test]
    fn whatever_the_guest_wrote_there_the_next_value_is_another_and_the_count_even() {
        let ram = ram(2 << 20);
        write(&ram).unwrap();
        for (seq, value) in [(u32::MAX, u64::MAX), (7, 1), (u32::MAX - 1, 0)] {
            ram.write_obj(seq, at(field::SEQ_COUNT)).unwrap();
            ram.write_obj(value, at(field::DISRUPTION_MARKER)).unwrap();
            disrupted(&ram);
            let (now, marker, _) = state(&ram);
            assert!(now % 2 == 0 && now != seq && marker == value.wrapping_add(1), "{seq} {now}");
        }
    }

    #[test]
    fn a_guest_without_the_page_is_left_alone() {
        let ram = ram(2 << 20);
        disrupted(&ram);
        copied(&ram);
        assert_eq!(state(&ram), (0, 0, 0));
        disrupted(&super::tests::ram(0x1000));
    }
}
