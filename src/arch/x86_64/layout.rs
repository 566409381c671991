//! Where things stand in guest-physical address space, port space and among the interrupt lines.
//!
//! These numbers are a part of a saved machine: a guest that moves finds its devices where they were.
//! They never change between releases.

use vm_memory::GuestAddress;

/// Start of the MMIO hole: RAM below it is low RAM, RAM beyond it continues at [`HIGH_RAM`].
pub const MMIO_HOLE: u64 = 0xc000_0000;
/// Start of high RAM: 4 GiB, the end of the MMIO hole.
pub const HIGH_RAM: u64 = 1 << 32;

/// First virtio-mmio device's registers.
pub const VIRTIO_MMIO_BASE: u64 = 0xd000_0000;
/// Distance from one virtio-mmio device to the next: each has a page of its own.
pub const VIRTIO_MMIO_STRIDE: u64 = 0x1000;
/// Length of a device's registers, its configuration space (from 0x100) included, as ACPI tells it.
pub const VIRTIO_MMIO_WINDOW: u32 = 0x200;
/// Most virtio devices of one machine: one interrupt line each.
pub const VIRTIO_SLOTS_MAX: u32 = 18;

/// Registers of the I/O APIC (82093AA), as KVM hardwires them.
pub const IOAPIC_BASE: u32 = 0xfec0_0000;
/// Input pins of the I/O APIC: GSIs 0 to 23.
pub const IOAPIC_PINS: u32 = 24;
/// Registers of each CPU's local APIC.
pub const LAPIC_BASE: u32 = 0xfee0_0000;

/// Page of the identity map that Intel's virtualisation needs for real mode (KVM API,
/// `KVM_SET_IDENTITY_MAP_ADDR`). In the hole, where no device stands.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages of the task state segment for the same (KVM API, `KVM_SET_TSS_ADDR`).
pub const KVM_TSS: u64 = 0xfffb_d000;

/// COM1's eight ports.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Number of COM1's ports.
pub const SERIAL_PORTS: u16 = 8;
/// COM1's interrupt line.
pub const SERIAL_GSI: u32 = 4;

/// Interrupt line of the generic event device (ACPI 6.5, 5.6.9): power button and `VMGenID`.
pub const GED_GSI: u32 = 5;
/// Interrupt line of the first virtio device.
pub const VIRTIO_GSI_FIRST: u32 = 6;

/// First of the ports through which a guest sleeps, resets and asks what the event device wants
/// ([`vmm_devices::power`]).
pub const POWER_PORT: u16 = 0x600;
/// First of the keyboard controller's ports, of which only its reset line exists.
pub const RESET_PORT: u16 = 0x60;

/// Global descriptor table of the boot CPU.
pub const GDT: GuestAddress = GuestAddress(0x500);
/// PVH's start-of-day structure, its module list and its memory map.
pub const PVH_START_INFO: GuestAddress = GuestAddress(0x6000);
/// Linux's `boot_params`, the "zero page".
pub const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// Identity page tables of the boot CPU: one PML4, one page of pointers, four page directories.
pub const PAGE_TABLES: GuestAddress = GuestAddress(0x9000);
/// The kernel's command line, zero-terminated.
pub const CMDLINE: GuestAddress = GuestAddress(0x2_0000);
/// Room at [`CMDLINE`] in bytes, the final zero included.
pub const CMDLINE_ROOM: usize = 0x1_0000;
/// Longest command line, the final zero not counted, of a kernel that doesn't say (Linux's
/// `COMMAND_LINE_SIZE` of x86, less one).
pub const CMDLINE_BYTES_MAX: usize = 2047;
/// End of conventional memory; from here to [`HIMEM`] a PC keeps its firmware and video memory.
pub const LOW_MEMORY_END: u64 = 0x9_fc00;
/// The page of the `VMClock`, in memory that the guest's kernel leaves alone.
pub const VMCLOCK_PAGE: GuestAddress = GuestAddress(0xd_f000);
/// Length of that page, in bytes.
pub const VMCLOCK_PAGE_LEN: u32 = 0x1000;
/// The ACPI tables: the RSDP first, where a scan for it looks too.
pub const ACPI: GuestAddress = GuestAddress(0xe_0000);
/// End of the room for the ACPI tables.
pub const ACPI_END: u64 = 0xf_f000;
/// The page that holds the VM generation id at offset 0, in memory that the guest's kernel leaves alone.
pub const VMGENID_PAGE: GuestAddress = GuestAddress(0xf_f000);
/// Length of the VM generation id, in bytes.
pub const VMGENID_LEN: usize = 16;
/// Where a guest that reboots through the firmware jumps to in real mode: F000:FFF0.
pub const RESET_VECTOR: GuestAddress = GuestAddress(0xf_fff0);
/// Start of memory that kernels are loaded to.
pub const HIMEM: u64 = 0x10_0000;

/// The guest-physical ranges of a RAM of `bytes` bytes: one below the MMIO hole and, where that isn't
/// enough, one from 4 GiB on. Empty for 0 bytes.
#[must_use]
pub fn ram_ranges(bytes: u64) -> Vec<(GuestAddress, u64)> {
    let low = bytes.min(MMIO_HOLE);
    [(GuestAddress(0), low), (GuestAddress(HIGH_RAM), bytes - low)]
        .into_iter()
        .filter(|(_, len)| *len > 0)
        .collect()
}

/// The address of the registers of virtio device `index`; `None` beyond the last slot.
#[must_use]
pub fn virtio_base(index: u32) -> Option<u64> {
    (index < VIRTIO_SLOTS_MAX).then(|| VIRTIO_MMIO_BASE + u64::from(index) * VIRTIO_MMIO_STRIDE)
}

/// The interrupt line of virtio device `index`; `None` beyond the last slot.
#[must_use]
pub fn virtio_gsi(index: u32) -> Option<u32> {
    (index < VIRTIO_SLOTS_MAX).then(|| VIRTIO_GSI_FIRST + index)
}

const _: () = assert!(VIRTIO_GSI_FIRST + VIRTIO_SLOTS_MAX == IOAPIC_PINS);
const _: () = assert!(CMDLINE.0 + (CMDLINE_ROOM as u64) <= LOW_MEMORY_END);
const _: () = assert!(VMCLOCK_PAGE.0 >= LOW_MEMORY_END);
const _: () = assert!(VMCLOCK_PAGE.0 + (VMCLOCK_PAGE_LEN as u64) <= ACPI.0);
const _: () = assert!(VMGENID_PAGE.0 + (VMGENID_LEN as u64) <= RESET_VECTOR.0);
const _: () = assert!(PAGE_TABLES.0 + 6 * 0x1000 <= CMDLINE.0);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_goes_around_the_hole() {
        assert_eq!(ram_ranges(0), []);
        assert_eq!(ram_ranges(32 << 20), [(GuestAddress(0), 32 << 20)]);
        assert_eq!(ram_ranges(3 << 30), [(GuestAddress(0), 3 << 30)]);
        assert_eq!(
            ram_ranges((3 << 30) + 4096),
            [(GuestAddress(0), 3 << 30), (GuestAddress(1 << 32), 4096)]
        );
        assert_eq!(
            ram_ranges(8 << 30),
            [(GuestAddress(0), 3 << 30), (GuestAddress(1 << 32), 5 << 30)]
        );
    }

    #[test]
    fn every_slot_has_a_line_and_a_page_and_no_more() {
        assert_eq!(virtio_gsi(0), Some(6));
        assert_eq!(virtio_gsi(17), Some(23));
        assert_eq!(virtio_gsi(18), None);
        assert_eq!(virtio_base(17), Some(0xd001_1000));
        assert_eq!(virtio_base(18), None);
    }
}
