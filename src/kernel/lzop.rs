//! The container of the `lzop` tool, as kernels built with CONFIG_KERNEL_LZO carry it.
//!
//! Layout as lib/decompress_unlzo.c reads it: a header, then blocks of LZO1X, each with its lengths
//! and checksums; big-endian. The checksums of blocks are verified, where there are any.

/// First bytes of an lzop file.
pub(super) const MAGIC: &[u8] = b"\x89LZO\0\r\n\x1a\n";

/// Unpacked bytes of a block: lzop's default, and the most that Linux's own decompressor takes.
const BLOCK_LEN_MAX: usize = 256 << 10;

const VERSION_LEVEL: u16 = 0x0940;
const F_ADLER32_UNPACKED: u32 = 1;
const F_ADLER32_PACKED: u32 = 2;
const F_EXTRA_FIELD: u32 = 0x40;
const F_CRC32_UNPACKED: u32 = 0x100;
const F_CRC32_PACKED: u32 = 0x200;
const F_FILTER: u32 = 0x800;

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], &'static str> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or("it ends in the middle")?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], &'static str> {
        let (taken, rest) = self.0.split_first_chunk().ok_or("it ends in the middle")?;
        self.0 = rest;
        Ok(*taken)
    }

    fn u16(&mut self) -> Result<u16, &'static str> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, &'static str> {
        self.array().map(u32::from_be_bytes)
    }

    /// A checksum that is there if `flags` has `flag`.
    fn sum(&mut self, flags: u32, flag: u32) -> Result<Option<u32>, &'static str> {
        if flags & flag == 0 { Ok(None) } else { self.u32().map(Some) }
    }
}

/// Reads the header and returns the flags.
fn header(reader: &mut Reader) -> Result<u32, &'static str> {
    reader.take(MAGIC.len())?;
    let version = reader.u16()?;
    // The library's version, and from 0x940 the version that is needed to unpack.
    reader.take(if version >= VERSION_LEVEL { 4 } else { 2 })?;
    // The method, and from 0x940 the level.
    reader.take(if version >= VERSION_LEVEL { 2 } else { 1 })?;
    let flags = reader.u32()?;
    if flags & (F_FILTER | F_EXTRA_FIELD) != 0 {
        return Err("it uses a filter or an extra field");
    }
    // Mode and time of the file.
    reader.take(if version >= VERSION_LEVEL { 12 } else { 8 })?;
    let [name_len] = reader.array()?;
    // The name, and the header's checksum.
    reader.take(usize::from(name_len) + 4)?;
    Ok(flags)
}

/// Unpacks `stream` and gives each block to `feed`.
///
/// # Errors
/// `Err(what)` for a damaged stream, `Ok(error)` for an error of `feed`.
pub(super) fn unpack<E>(
    stream: &[u8],
    mut feed: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), Result<E, &'static str>> {
    let mut reader = Reader(stream);
    let flags = header(&mut reader).map_err(Err)?;
    let mut buffer = vec![0; BLOCK_LEN_MAX];
    while let Some(block) = block(&mut reader, flags, &mut buffer).map_err(Err)? {
        feed(block).map_err(Ok)?;
    }
    if reader.0.is_empty() { Ok(()) } else { Err(Err("bytes follow the last block")) }
}

/// The next block, unpacked into `buffer` or as it stands; None at the end.
fn block<'a, 'stream: 'a>(
    reader: &mut Reader<'stream>,
    flags: u32,
    buffer: &'a mut [u8],
) -> Result<Option<&'a [u8]>, &'static str> {
    let len = usize::try_from(reader.u32()?).map_err(|_| TOO_BIG)?;
    if len == 0 {
        return Ok(None);
    }
    let packed_len = usize::try_from(reader.u32()?).map_err(|_| TOO_BIG)?;
    if len > BLOCK_LEN_MAX || packed_len > len {
        return Err(TOO_BIG);
    }
    let adler = reader.sum(flags, F_ADLER32_UNPACKED)?;
    let crc = reader.sum(flags, F_CRC32_UNPACKED)?;
    // A stored block has no second pair.
    let packed_flags = if packed_len < len { flags } else { 0 };
    let packed_adler = reader.sum(packed_flags, F_ADLER32_PACKED)?;
    let packed_crc = reader.sum(packed_flags, F_CRC32_PACKED)?;
    let packed = reader.take(packed_len)?;
    verify(packed, packed_adler, packed_crc)?;
    let block = if packed_len == len {
        packed
    } else {
        let buffer = &mut buffer[..len];
        let got =
            lzokay::decompress::decompress(packed, buffer).map_err(|_| "a block is invalid")?;
        if got != len {
            return Err("a block is shorter than it claims");
        }
        buffer
    };
    verify(block, adler, crc)?;
    Ok(Some(block))
}

const TOO_BIG: &str = "a block's length is wrong";

fn verify(bytes: &[u8], adler: Option<u32>, crc: Option<u32>) -> Result<(), &'static str> {
    if adler.is_some_and(|sum| zlib_rs::adler32::adler32(1, bytes) != sum) {
        return Err("a block's Adler-32 doesn't match");
    }
    if crc.is_some_and(|sum| crc32fast::hash(bytes) != sum) {
        return Err("a block's CRC-32 doesn't match");
    }
    Ok(())
}
