//! Kernels and RAM for the tests of this module.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use vm_memory::{Bytes, FileOffset, GuestAddress};
use vmm_devices::GuestRam;

use super::{KernelError, Loaded, Problem, load};

/// A kernel of two segments and a PVH note; made, like its packed forms, by testdata/regenerate.sh.
pub(super) const TINY: &[u8] = include_bytes!("testdata/tiny.elf");
pub(super) const TINY_ENTRY: u64 = 0x100_0020;
pub(super) const TINY_PVH_ENTRY: u64 = 0x100_0010;
/// Its segments: offset and length in the file, address, length in memory.
pub(super) const TINY_SEGMENTS: [(usize, usize, u64, usize); 2] =
    [(4096, 4800, 0x100_0000, 4800), (12288, 12688, 0x120_0800, 22688)];
pub(super) const TINY_END: u64 = 0x120_0800 + 22688;

pub(super) const PACKED: [(&str, &[u8]); 7] = [
    ("gzip", include_bytes!("testdata/tiny.gzip")),
    ("zstd", include_bytes!("testdata/tiny.zstd")),
    ("xz", include_bytes!("testdata/tiny.xz")),
    ("lzma", include_bytes!("testdata/tiny.lzma")),
    ("lz4", include_bytes!("testdata/tiny.lz4")),
    ("bzip2", include_bytes!("testdata/tiny.bzip2")),
    ("lzo", include_bytes!("testdata/tiny.lzo")),
];

pub(super) const SETUP_SECTS: usize = 2;
pub(super) const CODE_START: usize = (SETUP_SECTS + 1) * 512;
pub(super) const PAYLOAD_OFFSET: usize = 0x240;
pub(super) const PREFERRED: u64 = 0x100_0000;
pub(super) const INIT_SIZE: u32 = 0x40_0000;
const PE: usize = 0x40;

pub(super) fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

/// A bzImage as Linux `version` builds it: PE stub, setup header of protocol 2.15, payload, CRC-32.
pub(super) fn bzimage(version: &str, payload: &[u8]) -> Vec<u8> {
    let code_len = (PAYLOAD_OFFSET + payload.len() + 15 + 4) / 16 * 16;
    let mut image = vec![0; CODE_START + code_len];
    put(&mut image, 0, b"MZ");
    put(&mut image, 0x3c, &u32::try_from(PE).unwrap().to_le_bytes());
    put(&mut image, PE, b"PE\0\0\x64\x86");
    image[0x1f1] = u8::try_from(SETUP_SECTS).unwrap();
    put(&mut image, 0x1f4, &u32::try_from(code_len / 16).unwrap().to_le_bytes());
    put(&mut image, 0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(&mut image, 0x202, b"HdrS\x0f\x02");
    put(&mut image, 0x20e, &0x100u16.to_le_bytes());
    put(&mut image, 0x300, version.as_bytes());
    image[0x211] = 1;
    put(&mut image, 0x214, &0x10_0000u32.to_le_bytes());
    put(&mut image, 0x230, &0x20_0000u32.to_le_bytes());
    put(&mut image, 0x234, &[1, 21, 0x7f, 0]);
    put(&mut image, 0x238, &2047u32.to_le_bytes());
    put(&mut image, 0x248, &u32::try_from(PAYLOAD_OFFSET).unwrap().to_le_bytes());
    put(&mut image, 0x24c, &u32::try_from(payload.len()).unwrap().to_le_bytes());
    put(&mut image, 0x258, &PREFERRED.to_le_bytes());
    put(&mut image, 0x260, &INIT_SIZE.to_le_bytes());
    put(&mut image, CODE_START + 0x200, b"entry64");
    put(&mut image, CODE_START + PAYLOAD_OFFSET, payload);
    seal(&mut image);
    image
}

/// Writes the image's CRC-32, as Linux's build did until 6.14.
pub(super) fn seal(image: &mut [u8]) {
    let at = image.len() - 4;
    let crc = !crc32fast::hash(&image[..at]);
    put(image, at, &crc.to_le_bytes());
}

/// What signing for secure boot changes: the PE checksum, the signature's place, bytes at the end.
pub(super) fn sign(image: &mut Vec<u8>) {
    put(image, PE + 88, &[1, 2, 3, 4]);
    put(image, PE + 168, &[5, 6, 7, 8, 9, 10, 11, 12]);
    image.extend_from_slice(&[0xa5; 72]);
}

/// RAM without a file: 32 MiB, a hole, and 16 MiB more.
pub(super) fn ram() -> GuestRam {
    let regions = [(GuestAddress(0), 32 << 20), (GuestAddress(64 << 20), 16 << 20)];
    GuestRam::from_ranges(&regions).unwrap()
}

/// RAM of `len` bytes in a file, from `start` in it.
pub(super) fn ram_in_file(file: &File, start: u64, len: usize) -> GuestRam {
    let backing = FileOffset::new(file.try_clone().unwrap(), start);
    GuestRam::from_ranges_with_files([(GuestAddress(0), len, Some(backing))]).unwrap()
}

pub(super) fn read(ram: &GuestRam, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xff; len];
    ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

/// Writes `bytes` to a file and loads it.
pub(super) fn load_bytes(bytes: &[u8], ram: &GuestRam) -> Result<Loaded, KernelError> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    load(file.path(), ram)
}

/// The problem of a kernel that must not load.
pub(super) fn problem(bytes: &[u8]) -> Problem {
    let error = load_bytes(bytes, &ram()).expect_err("a kernel that must not load");
    error.problem
}

/// The line that `load` gives for `path`, without the path.
pub(super) fn line(path: &Path) -> String {
    load(path, &ram()).expect_err("a file that must not load").problem.to_string()
}

/// Whether the tiny kernel stands in `ram`, its bss zero.
pub(super) fn holds_tiny(ram: &GuestRam) -> bool {
    TINY_SEGMENTS.iter().all(|&(offset, len, at, mem_len)| {
        let bytes = read(ram, at, mem_len);
        bytes[..len] == TINY[offset..offset + len] && bytes[len..].iter().all(|byte| *byte == 0)
    })
}
