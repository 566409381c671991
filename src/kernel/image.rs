//! Recognising a kernel file by its first bytes, and the bzImage's setup header.
//!
//! Fields and offsets: Documentation/arch/x86/boot.rst ("The Real-Mode Kernel Header"); the image's
//! CRC-32: the same, "The image checksum". Foreign kernels: the magic numbers of their own headers.

use super::KERNEL_START_MIN;
use super::SetupHeader;
use super::elf;
use super::error::Problem;

/// Where the setup header starts in the file.
const SETUP: usize = 0x1f1;
/// Bytes of setup header that we know (to protocol 2.15).
const SETUP_LEN: usize = size_of::<SetupHeader>();
/// In `xloadflags`: the image has a 64-bit entry at 0x200.
const XLF_KERNEL_64: u16 = 1;
/// Protocol that brought `payload_offset` and the CRC.
const VERSION_PAYLOAD: u16 = 0x208;
/// Protocol that brought `pref_address` and `init_size`.
const VERSION_INIT_SIZE: u16 = 0x20a;
/// Protocol that brought `xloadflags`.
const VERSION_XLOADFLAGS: u16 = 0x20c;
/// Linux 6.15 and later write no CRC-32 into the image.
const NO_CRC_SINCE: (u32, u32) = (6, 15);

/// A file that may be loaded.
pub(super) enum Image {
    /// An ELF64 file for x86-64.
    Elf,
    /// A bzImage.
    BzImage(BzImage),
}

/// The setup header of a bzImage, checked as far as it can be without the rest of the file.
pub(super) struct BzImage {
    /// The bytes from 0x1f1, zeros past the header's own end.
    header: [u8; SETUP_LEN],
}

/// Tells from the `head` of a file (4 KiB, or all of a shorter file) what it is.
pub(super) fn recognise(head: &[u8]) -> Result<Image, Problem> {
    if head.starts_with(elf::MAGIC) {
        return Ok(Image::Elf);
    }
    if head.get(0x202..0x206) == Some(b"HdrS") {
        return BzImage::parse(head).map(Image::BzImage);
    }
    Err(match foreign_arch(head) {
        Some(arch) => Problem::OtherArch(arch.into()),
        None => Problem::NotAKernel(looks_like(head)),
    })
}

/// Little-endian `N` bytes at `at`, zeros where `bytes` ends before.
fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    at.checked_add(N)
        .and_then(|end| bytes.get(at..end))
        .and_then(|field| field.try_into().ok())
        .unwrap_or([0; N])
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes_at(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes_at(bytes, at))
}

/// Kernels for other processors, by the header of the arm64, RISC-V and arm images, else the PE's.
fn foreign_arch(head: &[u8]) -> Option<&'static str> {
    match bytes_at::<4>(head, 56) {
        [b'A', b'R', b'M', 0x64] => return Some("arm64"),
        [b'R', b'S', b'C', 5] => return Some("RISC-V"),
        _ => {}
    }
    if u32_at(head, 0x24) == 0x016f_2818 {
        return Some("32-bit arm");
    }
    if !head.starts_with(b"MZ") {
        return None;
    }
    let pe = usize::try_from(u32_at(head, 0x3c)).ok()?;
    if &bytes_at::<4>(head, pe) != b"PE\0\0" {
        return None;
    }
    match u16_at(head, pe.checked_add(4)?) {
        0xaa64 => Some("arm64"),
        0x01c2 => Some("32-bit arm"),
        0x014c => Some("32-bit x86"),
        0x5064 => Some("RISC-V"),
        0x6264 => Some("LoongArch"),
        _ => None,
    }
}

/// A name for a file that is no kernel, for the one who gave it by mistake.
fn looks_like(head: &[u8]) -> &'static str {
    const MAGICS: &[(usize, &[u8], &str)] = &[
        (0, b"07070", "a cpio archive (an initramfs?)"),
        (0, &[0x1f, 0x8b], "a gzip file (an initramfs, or a packed vmlinux?)"),
        (0, &[0x28, 0xb5, 0x2f, 0xfd], "a zstd file (an initramfs, or a packed vmlinux?)"),
        (0, b"\xfd7zXZ\0", "an xz file (an initramfs, or a packed vmlinux?)"),
        (0, b"BZh", "a bzip2 file"),
        (0, &[0x02, 0x21, 0x4c, 0x18], "an lz4 file (an initramfs?)"),
        (0, b"MZ", "an EFI program"),
        (0, b"#!", "a script"),
        (0, b"!<arch>\n", "a package or a library"),
        (0, b"QFI\xfb", "a qcow2 disk"),
        (1080, &[0x53, 0xef], "an ext4 file system"),
        (510, &[0x55, 0xaa], "a disk with a boot sector"),
    ];
    let magic = |&&(at, magic, _): &&(usize, &[u8], &str)| {
        head.get(at..).is_some_and(|bytes| bytes.starts_with(magic))
    };
    MAGICS.iter().find(magic).map_or("something else", |&(_, _, name)| name)
}

impl BzImage {
    fn parse(head: &[u8]) -> Result<Self, Problem> {
        // The byte of the jump at 0x200 says where the header ends; what follows is code.
        let end = 0x202 + usize::from(bytes_at::<1>(head, 0x201)[0]);
        let known = head
            .get(SETUP..end.min(SETUP + SETUP_LEN))
            .ok_or(Problem::Truncated { have: head.len() as u64, need: end as u64 })?;
        let mut header = [0; SETUP_LEN];
        header[..known.len()].copy_from_slice(known);
        let image = Self { header };
        if image.version() < VERSION_PAYLOAD {
            return Err(Problem::TooOld(image.version()));
        }
        if image.version() >= VERSION_XLOADFLAGS && image.u16(0x236) & XLF_KERNEL_64 == 0 {
            return Err(Problem::OtherArch("32-bit x86".into()));
        }
        Ok(image)
    }

    // Offsets below are those of the file, as the boot protocol gives them.
    fn u8(&self, at: usize) -> u8 {
        self.header[at - SETUP]
    }
    fn u16(&self, at: usize) -> u16 {
        u16_at(&self.header, at - SETUP)
    }
    fn u32(&self, at: usize) -> u32 {
        u32_at(&self.header, at - SETUP)
    }
    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(bytes_at(&self.header, at - SETUP))
    }

    fn version(&self) -> u16 {
        self.u16(0x206)
    }

    /// Offset of the protected-mode code in the file: a boot sector and `setup_sects` (0 means 4).
    fn code_start(&self) -> usize {
        let sects = usize::from(self.u8(SETUP));
        (if sects == 0 { 5 } else { sects + 1 }) * 512
    }

    /// Bytes of the image: to the end of the protected-mode code, signatures excluded.
    pub(super) fn len(&self) -> u64 {
        self.code_start() as u64 + u64::from(self.u32(0x1f4)) * 16
    }

    /// The protected-mode code in `bytes`, the image's [`BzImage::len`] bytes.
    pub(super) fn code<'a>(&self, bytes: &'a [u8]) -> &'a [u8] {
        bytes.get(self.code_start()..).unwrap_or(&[])
    }

    /// `init_size`: bytes that the kernel wants contiguous from its start; None before 2.10.
    pub(super) fn init_size(&self) -> Option<u64> {
        (self.version() >= VERSION_INIT_SIZE).then(|| self.u32(0x260).into())
    }

    /// The packed payload with its length field; None if the image names none.
    pub(super) fn payload<'a>(&self, bytes: &'a [u8]) -> Result<Option<&'a [u8]>, Problem> {
        let (offset, len) = (self.u32(0x248), self.u32(0x24c));
        if len == 0 {
            return Ok(None);
        }
        let range = usize::try_from(offset).ok().zip(usize::try_from(len).ok());
        let range = range.and_then(|(offset, len)| Some(offset..offset.checked_add(len)?));
        range.and_then(|range| self.code(bytes).get(range)).map(Some).ok_or(Problem::Malformed(
            "its header places the payload outside of the image: copy it again",
        ))
    }

    /// Where the protected-mode code goes when it is entered at its own 64-bit entry.
    pub(super) fn place_64(&self) -> Result<u64, Problem> {
        if self.version() < VERSION_XLOADFLAGS {
            return Err(Problem::TooOld(self.version()));
        }
        // The preferred address serves kernels that are relocatable and those that are not.
        let preferred = self.u64(0x258).max(KERNEL_START_MIN);
        let align = u64::from(self.u32(0x230)).max(1);
        preferred
            .checked_next_multiple_of(align)
            .ok_or(Problem::Malformed("its preferred address overflows: copy it again"))
    }

    /// The "major.minor" of the version string at `kernel_version` + 0x200.
    fn linux_version(&self, bytes: &[u8]) -> Option<(u32, u32)> {
        let text = bytes.get(usize::from(self.u16(0x20e)) + 0x200..)?;
        let text = std::str::from_utf8(text.get(..16)?).ok()?;
        let mut numbers = text.split(|c: char| !c.is_ascii_digit());
        Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
    }

    /// False if the image's own CRC-32 is there and wrong.
    ///
    /// Signing for secure boot changes two fields of the PE header after the CRC was taken: the
    /// checksum and the place of the signature. They count as the zeros that they were.
    pub(super) fn crc_holds(&self, bytes: &[u8]) -> bool {
        if self.linux_version(bytes).is_none_or(|version| version >= NO_CRC_SINCE) {
            return true;
        }
        let mut crc = crc32fast::Hasher::new();
        let mut done = 0;
        if bytes.starts_with(b"MZ") {
            let pe = usize::try_from(u32_at(bytes, 0x3c)).unwrap_or(usize::MAX);
            for (offset, len) in [(24 + 64, 4), (24 + 144, 8)] {
                let Some(at) = pe.checked_add(offset).filter(|at| *at < self.code_start()) else {
                    break;
                };
                crc.update(&bytes[done..at]);
                crc.update(&[0; 8][..len]);
                done = at + len;
            }
        }
        crc.update(bytes.get(done..).unwrap_or(&[]));
        // The appended CRC makes the remainder of the whole zero, before the final inversion.
        crc.finalize() == !0
    }

    /// The setup header in the form that goes into the zero page.
    pub(super) fn setup_header(&self) -> SetupHeader {
        SetupHeader {
            setup_sects: self.u8(0x1f1),
            root_flags: self.u16(0x1f2),
            syssize: self.u32(0x1f4),
            ram_size: self.u16(0x1f8),
            vid_mode: self.u16(0x1fa),
            root_dev: self.u16(0x1fc),
            boot_flag: self.u16(0x1fe),
            jump: self.u16(0x200),
            header: self.u32(0x202),
            version: self.u16(0x206),
            realmode_swtch: self.u32(0x208),
            start_sys_seg: self.u16(0x20c),
            kernel_version: self.u16(0x20e),
            type_of_loader: self.u8(0x210),
            loadflags: self.u8(0x211),
            setup_move_size: self.u16(0x212),
            code32_start: self.u32(0x214),
            ramdisk_image: self.u32(0x218),
            ramdisk_size: self.u32(0x21c),
            bootsect_kludge: self.u32(0x220),
            heap_end_ptr: self.u16(0x224),
            ext_loader_ver: self.u8(0x226),
            ext_loader_type: self.u8(0x227),
            cmd_line_ptr: self.u32(0x228),
            initrd_addr_max: self.u32(0x22c),
            kernel_alignment: self.u32(0x230),
            relocatable_kernel: self.u8(0x234),
            min_alignment: self.u8(0x235),
            xloadflags: self.u16(0x236),
            cmdline_size: self.u32(0x238),
            hardware_subarch: self.u32(0x23c),
            hardware_subarch_data: self.u64(0x240),
            payload_offset: self.u32(0x248),
            payload_length: self.u32(0x24c),
            setup_data: self.u64(0x250),
            pref_address: self.u64(0x258),
            init_size: self.u32(0x260),
            handover_offset: self.u32(0x264),
            kernel_info_offset: self.u32(0x268),
        }
    }
}
