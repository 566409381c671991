//! Boot without firmware: what a boot loader and a firmware would leave in RAM for a kernel.
//!
//! Two protocols: Linux's 64-bit entry (Documentation/arch/x86/boot.rst, "64-bit boot protocol") with
//! `boot_params`, and PVH's (Xen's `hvm/start_info.h`) with `hvm_start_info`. The registers that go
//! with them are in [`super::boot_regs`].

use std::fs::File;
use std::io;

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_devices::{GuestRam, power};

use super::boot_regs::{BootRegs, Mode, write_gdt, write_page_tables};
use super::{layout, vmclock};
use crate::kernel::{Entry, Loaded, SetupHeader};

/// `boot_flag` of a setup header.
const BOOT_FLAG: u16 = 0xaa55;
/// `header` of a setup header: "HdrS".
const HEADER_MAGIC: u32 = 0x5372_6448;
/// Version of the boot protocol that is claimed for a kernel that came without a header: 2.12.
const PROTOCOL_VERSION: u16 = 0x020c;
/// `type_of_loader`: no registered boot loader.
const LOADER_OTHER: u8 = 0xff;
/// `loadflags`: the kernel proper is loaded at 1 MiB or higher.
const LOADED_HIGH: u8 = 1 << 0;
/// `xloadflags`: kernel, initrd and command line may lie beyond 4 GiB, so also anywhere below.
const CAN_BE_LOADED_ABOVE_4G: u16 = 1 << 1;
/// Highest address of an initrd's last byte, where the kernel doesn't say.
const INITRD_ADDRESS_MAX: u64 = 0x7fff_ffff;
const PAGE: u64 = 4096;

/// e820 and PVH types of memory (the same numbers).
const MEMORY_RAM: u32 = 1;
const MEMORY_RESERVED: u32 = 2;

/// What a machine boots.
#[derive(Debug)]
pub struct BootInputs<'a> {
    /// Guest RAM, with the kernel in it.
    pub ram: &'a GuestRam,
    /// What the kernel's loader said.
    pub kernel: &'a Loaded,
    /// The kernel's command line.
    pub cmdline: &'a str,
    /// The initrd: a regular file, read from its start.
    pub initrd: Option<&'a mut File>,
    /// Address of the ACPI RSDP, from [`super::tables::build`].
    pub rsdp: u64,
}

/// Why a machine can't be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// More than the kernel takes.
    #[error("the kernel command line has {len} bytes, this kernel takes at most {max}")]
    CmdlineTooLong {
        /// Bytes given.
        len: usize,
        /// Bytes that fit.
        max: usize,
    },
    /// A zero byte would end the command line early.
    #[error("the kernel command line holds a zero byte")]
    CmdlineZero,
    /// Kernel and initrd together are too much for this RAM.
    #[error(
        "the initrd has {} MiB, and {} MiB of RAM are left for it beside the kernel: give the guest more \
         with --mem",
        initrd.div_ceil(1 << 20), room >> 20
    )]
    InitrdTooBig {
        /// Size of the initrd in bytes.
        initrd: u64,
        /// Room between the kernel and the highest address that an initrd may have, in bytes.
        room: u64,
    },
    /// Not a file of known size, or it can't be read.
    #[error("can't read the initrd")]
    Initrd(#[source] io::Error),
    /// The host gives no random numbers.
    #[error("can't draw the VM's generation id")]
    Random(#[source] io::Error),
    /// The RAM is too small for even the boot structures.
    #[error("the guest's RAM has no room for {0}: give the machine more memory")]
    Memory(&'static str),
}

/// An initrd in guest RAM.
#[derive(Clone, Copy)]
struct Initrd {
    address: u64,
    len: u64,
}

/// Writes all that the kernel's boot protocol asks for, and says which registers go with it.
///
/// # Errors
/// When something doesn't fit; see [`BootError`].
pub fn prepare(inputs: BootInputs<'_>) -> Result<BootRegs, BootError> {
    let BootInputs { ram, kernel, cmdline, initrd, rsdp } = inputs;
    let header = match &kernel.entry {
        Entry::Linux64 { setup_header, .. } => setup_header.as_deref(),
        Entry::Pvh { .. } => None,
    };
    write_cmdline(ram, cmdline, header)?;
    let initrd = initrd.map(|file| load_initrd(ram, kernel, header, file)).transpose()?;
    let reset = ram.write_slice(&reset_code(), layout::RESET_VECTOR);
    reset.map_err(|_| BootError::Memory("the reset vector"))?;
    renew_generation(ram)?;
    vmclock::write(ram).map_err(|_| BootError::Memory("the VMClock's page"))?;
    match kernel.entry {
        Entry::Linux64 { entry, .. } => {
            write_boot_params(ram, header, initrd, rsdp)?;
            write_page_tables(ram).map_err(|_| BootError::Memory("page tables"))?;
            write_gdt(ram, Mode::Long).map_err(|_| BootError::Memory("the GDT"))?;
            Ok(BootRegs::new(Mode::Long, entry, layout::ZERO_PAGE.0))
        }
        Entry::Pvh { entry } => {
            write_start_info(ram, initrd, rsdp)?;
            write_gdt(ram, Mode::Protected).map_err(|_| BootError::Memory("the GDT"))?;
            Ok(BootRegs::new(Mode::Protected, entry, layout::PVH_START_INFO.0))
        }
    }
}

/// Gives the guest a new generation id, which nobody had before (Microsoft's "Virtual Machine Generation
/// ID"). A guest that runs already has to be told: `Power::generation_changed`.
///
/// # Errors
/// The RAM ends below the id's page, or the host gives no random numbers.
pub fn renew_generation(ram: &GuestRam) -> Result<(), BootError> {
    let mut id = [0; layout::VMGENID_LEN];
    rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())
        .map_err(|e| BootError::Random(e.into()))?;
    let written = ram.write_slice(&id, layout::VMGENID_PAGE);
    written.map_err(|_| BootError::Memory("the generation id"))
}

/// What stands in for a firmware's reset vector, in real mode: the reset register is written.
///
/// Linux, on a hardware-reduced ACPI machine, takes EFI's reset for the one to use (`efi_reboot_required`)
/// and never writes the register itself; without EFI it goes back to real mode and jumps to the vector.
fn reset_code() -> [u8; 9] {
    let [port_low, port_high, ..] = (u64::from(layout::POWER_PORT) + power::RESET).to_le_bytes();
    let value = power::RESET_VALUE;
    // mov al, value; mov dx, port; out dx, al; 1: hlt; jmp 1b
    [0xb0, value, 0xba, port_low, port_high, 0xee, 0xf4, 0xeb, 0xfd]
}

/// Longest command line for a kernel with this header, in bytes, the final zero not counted.
#[must_use]
pub fn cmdline_max(header: Option<&SetupHeader>) -> usize {
    let said = header.map_or(0, |h| h.cmdline_size);
    match usize::try_from(said) {
        Ok(max) if max > 0 => max.min(layout::CMDLINE_ROOM - 1),
        _ => layout::CMDLINE_BYTES_MAX,
    }
}

fn write_cmdline(
    ram: &GuestRam,
    cmdline: &str,
    header: Option<&SetupHeader>,
) -> Result<(), BootError> {
    let (len, max) = (cmdline.len(), cmdline_max(header));
    if len > max {
        return Err(BootError::CmdlineTooLong { len, max });
    }
    if cmdline.contains('\0') {
        return Err(BootError::CmdlineZero);
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    ram.write_slice(&bytes, layout::CMDLINE).map_err(|_| BootError::Memory("the command line"))
}

/// End of the RAM below the MMIO hole.
fn low_ram_end(ram: &GuestRam) -> u64 {
    ram.find_region(GuestAddress(0)).map_or(0, |region| region.len())
}

/// Reads the initrd straight into guest RAM, as high as the kernel allows: farthest from the kernel,
/// which may unpack itself upwards.
fn load_initrd(
    ram: &GuestRam,
    kernel: &Loaded,
    header: Option<&SetupHeader>,
    file: &mut File,
) -> Result<Initrd, BootError> {
    let metadata = file.metadata().map_err(BootError::Initrd)?;
    if !metadata.is_file() {
        return Err(BootError::Initrd(io::Error::other("not a regular file")));
    }
    let len = metadata.len();
    let start = match kernel.entry {
        Entry::Linux64 { entry, .. } | Entry::Pvh { entry } => entry & !(PAGE - 1),
    };
    let kernel_end = kernel.end.max(start.saturating_add(kernel.init_size)).max(layout::HIMEM);
    let address_max = match header {
        Some(h) if h.xloadflags & CAN_BE_LOADED_ABOVE_4G != 0 => u64::from(u32::MAX),
        Some(h) if h.initrd_addr_max != 0 => u64::from(h.initrd_addr_max),
        _ => INITRD_ADDRESS_MAX,
    };
    let top = low_ram_end(ram).min(address_max + 1);
    let too_big = BootError::InitrdTooBig { initrd: len, room: top.saturating_sub(kernel_end) };
    let address = match top.checked_sub(len) {
        Some(a) if a & !(PAGE - 1) >= kernel_end => a & !(PAGE - 1),
        _ => return Err(too_big),
    };
    let Ok(count) = usize::try_from(len) else { return Err(too_big) };
    ram.read_exact_volatile_from(GuestAddress(address), file, count)
        .map_err(|e| BootError::Initrd(io::Error::other(e)))?;
    Ok(Initrd { address, len })
}

/// The guest-physical memory map: start, length, type.
fn memory_map(ram: &GuestRam) -> Vec<(u64, u64, u32)> {
    let low_end = low_ram_end(ram);
    let firmware = layout::HIMEM - layout::LOW_MEMORY_END;
    let mut map = vec![
        (0, layout::LOW_MEMORY_END, MEMORY_RAM),
        (layout::LOW_MEMORY_END, firmware, MEMORY_RESERVED),
        (layout::HIMEM, low_end.saturating_sub(layout::HIMEM), MEMORY_RAM),
    ];
    if let Some(high) = ram.find_region(GuestAddress(layout::HIGH_RAM)) {
        map.push((layout::HIGH_RAM, high.len(), MEMORY_RAM));
    }
    map
}

/// Below 4 GiB by construction: the addresses of [`layout`], and an initrd in low RAM.
fn low32(value: u64) -> u32 {
    u32::try_from(value).expect("boot structures and initrd lie below 4 GiB")
}

fn write_boot_params(
    ram: &GuestRam,
    header: Option<&SetupHeader>,
    initrd: Option<Initrd>,
    rsdp: u64,
) -> Result<(), BootError> {
    let mut hdr = match header {
        Some(h) => *h,
        None => SetupHeader {
            boot_flag: BOOT_FLAG,
            header: HEADER_MAGIC,
            version: PROTOCOL_VERSION,
            loadflags: LOADED_HIGH,
            initrd_addr_max: low32(INITRD_ADDRESS_MAX),
            cmdline_size: u32::try_from(layout::CMDLINE_BYTES_MAX).unwrap_or(u32::MAX),
            ..SetupHeader::default()
        },
    };
    hdr.type_of_loader = LOADER_OTHER;
    hdr.cmd_line_ptr = low32(layout::CMDLINE.0);
    if let Some(Initrd { address, len }) = initrd {
        hdr.ramdisk_image = low32(address);
        hdr.ramdisk_size = low32(len);
    }
    let mut params = boot_params { hdr, acpi_rsdp_addr: rsdp, ..boot_params::default() };
    let map = memory_map(ram);
    params.e820_entries = u8::try_from(map.len()).expect("at most four ranges");
    for (slot, (addr, size, type_)) in map.into_iter().enumerate() {
        params.e820_table[slot] = boot_e820_entry { addr, size, r#type: type_ };
    }
    ram.write_obj(params, layout::ZERO_PAGE).map_err(|_| BootError::Memory("the zero page"))
}

fn write_start_info(ram: &GuestRam, initrd: Option<Initrd>, rsdp: u64) -> Result<(), BootError> {
    let map = memory_map(ram);
    let modules = layout::PVH_START_INFO.0 + 0x100;
    let memory = layout::PVH_START_INFO.0 + 0x200;
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: u32::from(initrd.is_some()),
        modlist_paddr: if initrd.is_some() { modules } else { 0 },
        cmdline_paddr: layout::CMDLINE.0,
        rsdp_paddr: rsdp,
        memmap_paddr: memory,
        memmap_entries: u32::try_from(map.len()).expect("at most four ranges"),
        ..hvm_start_info::default()
    };
    let put = |r: Result<(), _>| {
        r.map_err(|_: vm_memory::GuestMemoryError| BootError::Memory("PVH's start info"))
    };
    put(ram.write_obj(info, layout::PVH_START_INFO))?;
    if let Some(Initrd { address, len }) = initrd {
        let module = hvm_modlist_entry { paddr: address, size: len, ..Default::default() };
        put(ram.write_obj(module, GuestAddress(modules)))?;
    }
    let mut at = memory;
    for (addr, size, type_) in map {
        put(ram.write_obj(
            hvm_memmap_table_entry { addr, size, type_, reserved: 0 },
            GuestAddress(at),
        ))?;
        at += 24;
    }
    Ok(())
}

#[cfg(test)]
#[path = "boot_tests.rs"]
mod tests;
