//! Loading a Linux kernel into guest RAM: recognise the file, unpack it, place it, name its entry.
//!
//! A bzImage's payload is unpacked here and the ELF inside it is entered directly, so that the guest
//! never runs its own decompressor; an ELF vmlinux is read segment by segment. Formats: the x86 boot
//! protocol (Documentation/arch/x86/boot.rst), ELF64 (System V gABI), PVH (xen/include/public).
//!
//! Invariant: the RAM that a kernel is loaded into reads as zeros. Pages that are all zero in the
//! kernel, and its bss, are not written: a quarter of a stock kernel, and half of the time.

mod elf;
mod error;
mod image;
mod lzop;
mod payload;
mod ram;
mod scratch;
#[cfg(test)]
mod testing;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

pub use error::{KernelError, Problem};
use image::{BzImage, Image};
use ram::Ram;
use scratch::Scratch;
use vmm_devices::GuestRam;

/// The setup header of a bzImage, as it stands at 0x1f1 of the file and of the zero page.
pub type SetupHeader = linux_loader::loader::bootparam::setup_header;

/// First guest-physical address a kernel may occupy: below lie boot data and the legacy holes.
pub const KERNEL_START_MIN: u64 = 0x10_0000;

/// Bytes at the start of a file that suffice to recognise it: setup header, ELF header, PE header.
const HEAD_LEN: usize = 4096;

/// Offset of the 64-bit entry in a bzImage's protected-mode code (boot protocol 2.12).
const ENTRY_64_OFFSET: u64 = 0x200;

/// Where, and in which state, the first vCPU enters the kernel.
#[derive(Debug, Clone, PartialEq)]
pub enum Entry {
    /// The 64-bit Linux boot protocol: long mode, identity-mapped, the zero page in RSI.
    Linux64 {
        /// Guest-physical address of `startup_64`.
        entry: u64,
        /// The image's setup header, if the kernel came from a bzImage.
        setup_header: Option<Box<SetupHeader>>,
    },
    /// PVH: 32-bit protected mode without paging, `hvm_start_info` in EBX.
    Pvh {
        /// Guest-physical address from the note XEN_ELFNOTE_PHYS32_ENTRY, below 4 GiB.
        entry: u64,
    },
}

/// A kernel that stands in guest RAM.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded {
    /// How to enter it.
    pub entry: Entry,
    /// First guest-physical address past the kernel and its bss.
    pub end: u64,
    /// Bytes that the kernel wants contiguous from its start before it reads the memory map: the
    /// setup header's `init_size` (as it claims, so maybe more than the RAM), or a plain ELF's extent.
    pub init_size: u64,
}

/// Loads the kernel at `path` into `ram`, which reads as zeros (see the module's invariant).
///
/// Everything in the file is checked before it is used; nothing is written outside `ram`. After an
/// error `ram` may hold a part of the kernel.
///
/// # Errors
/// One line that names the file, what is wrong with it, and what to do.
pub fn load(path: &Path, ram: &GuestRam) -> Result<Loaded, KernelError> {
    load_file(path, &Ram::new(ram)).map_err(|problem| KernelError::new(path, problem))
}

fn load_file(path: &Path, ram: &Ram) -> Result<Loaded, Problem> {
    // Metadata first: opening a FIFO would wait for its writer.
    let meta = std::fs::metadata(path).map_err(Problem::Open)?;
    if !meta.is_file() {
        return Err(Problem::NotAKernel(if meta.is_dir() {
            "a directory"
        } else {
            "a device or a pipe"
        }));
    }
    let file = File::open(path).map_err(Problem::Open)?;
    let len = meta.len();
    if len == 0 {
        return Err(Problem::NotAKernel("an empty file"));
    }
    let mut head = vec![0; usize::try_from(len).map_or(HEAD_LEN, |len| len.min(HEAD_LEN))];
    file.read_exact_at(&mut head, 0).map_err(Problem::Read)?;
    match image::recognise(&head)? {
        Image::Elf => elf::load_file(&file, len, ram),
        Image::BzImage(image) => load_bzimage(&file, len, &image, ram),
    }
}

fn load_bzimage(file: &File, len: u64, image: &BzImage, ram: &Ram) -> Result<Loaded, Problem> {
    if len < image.len() {
        return Err(Problem::Truncated { have: len, need: image.len() });
    }
    let mut bytes = Scratch::new(image.len())?;
    file.read_exact_at(&mut bytes, 0).map_err(Problem::Read)?;
    let Some(packed) = image.payload(&bytes)?.and_then(payload::Packed::recognise) else {
        return load_packed(image, &bytes, ram);
    };
    if !packed.format.has_checksum() && !image.crc_holds(&bytes) {
        return Err(Problem::Damaged {
            format: packed.format.name(),
            what: "the image's CRC-32 doesn't match".into(),
        });
    }
    let mut loader = elf::Loader::new(ram, packed.unpacked_len());
    packed.unpack(ram, &mut loader)?;
    let program = loader.finish()?;
    Ok(Loaded {
        entry: Entry::Linux64 {
            entry: program.entry()?,
            setup_header: Some(Box::new(image.setup_header())),
        },
        end: program.end(),
        init_size: image.init_size().unwrap_or(program.end() - program.start()),
    })
}

/// Loads a bzImage as it is, for a payload in a format that we don't know: the guest unpacks it.
fn load_packed(image: &BzImage, bytes: &[u8], ram: &Ram) -> Result<Loaded, Problem> {
    let place = image.place_64()?;
    let init_size = image.init_size().unwrap_or(0).max(image.code(bytes).len() as u64);
    ram.check(place, init_size)?;
    ram.write(place, image.code(bytes))?;
    let mut setup_header = image.setup_header();
    setup_header.code32_start = u32::try_from(place).map_err(|_| {
        Problem::Malformed("its preferred address is above 4 GiB: give a standard kernel")
    })?;
    Ok(Loaded {
        entry: Entry::Linux64 {
            entry: place + ENTRY_64_OFFSET,
            setup_header: Some(Box::new(setup_header)),
        },
        end: place + init_size,
        init_size,
    })
}

#[cfg(test)]
#[path = "kernel_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "hostile_tests.rs"]
mod hostile_tests;
