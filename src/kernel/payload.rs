//! The packed vmlinux in a bzImage: its compression, its length, and unpacking it.
//!
//! Formats are those of scripts/Makefile.lib and arch/x86/boot/compressed in Linux. Each payload ends
//! with its unpacked length (4 bytes, little-endian): gzip's own trailer, or appended by the build.
//!
//! The whole payload is unpacked, also past the last byte that is loaded (2 % of a stock kernel), so
//! that every checksum and length is verified. A payload in a known format that doesn't unpack is an
//! error: the guest's own decompressor would fail as well, without a word.

use std::io::{self, Read};

use super::elf::Loader;
use super::error::Problem;
use super::lzop;
use super::ram::Ram;
use super::scratch::Scratch;

/// Bytes per read from a decoder that keeps its own history.
const PIECE_LEN: usize = 256 << 10;
/// An lz4 block of the legacy frame unpacks to at most this.
const LZ4_BLOCK_LEN: usize = 8 << 20;
const LZ4_LEGACY_MAGIC: u32 = 0x184c_2102;
/// Memory for a dictionary: Linux's build uses 128 MiB at most.
const LZMA_MEMORY_MAX_KIB: u32 = 160 << 10;

/// A compression that kernels are built with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Gzip,
    Zstd,
    Xz,
    Lzma,
    Lz4,
    Bzip2,
    Lzo,
}

impl Format {
    fn of(payload: &[u8]) -> Option<Self> {
        const MAGICS: &[(&[u8], Format)] = &[
            (&[0x1f, 0x8b], Format::Gzip),
            (&[0x28, 0xb5, 0x2f, 0xfd], Format::Zstd),
            (b"\xfd7zXZ\0", Format::Xz),
            (&[0x5d, 0, 0], Format::Lzma),
            (&[0x02, 0x21, 0x4c, 0x18], Format::Lz4),
            (b"BZh", Format::Bzip2),
            (lzop::MAGIC, Format::Lzo),
        ];
        MAGICS.iter().find(|(magic, _)| payload.starts_with(magic)).map(|&(_, format)| format)
    }

    /// The format's name in messages.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
            Self::Xz => "xz",
            Self::Lzma => "lzma",
            Self::Lz4 => "lz4",
            Self::Bzip2 => "bzip2",
            Self::Lzo => "lzo",
        }
    }

    /// Whether the format carries a checksum of the content.
    pub(super) fn has_checksum(self) -> bool {
        !matches!(self, Self::Lz4 | Self::Lzma)
    }
}

/// A payload in a format that we know.
pub(super) struct Packed<'a> {
    pub(super) format: Format,
    /// The compressed stream.
    stream: &'a [u8],
    /// Bytes of the vmlinux inside, as the image claims.
    unpacked_len: u32,
}

impl<'a> Packed<'a> {
    /// Recognises the payload's format; None if it is unknown.
    pub(super) fn recognise(payload: &'a [u8]) -> Option<Self> {
        let format = Format::of(payload)?;
        let (body, trailer) = payload.split_last_chunk()?;
        let stream = if format == Format::Gzip { payload } else { body };
        Some(Self { format, stream, unpacked_len: u32::from_le_bytes(*trailer) })
    }

    /// Bytes of the vmlinux inside.
    pub(super) fn unpacked_len(&self) -> u64 {
        self.unpacked_len.into()
    }

    /// Unpacks into `loader`, which expects [`Packed::unpacked_len`] bytes.
    pub(super) fn unpack(&self, ram: &Ram, loader: &mut Loader) -> Result<(), Problem> {
        // Bounds every decoder: a stream that yields more than this is refused.
        if self.unpacked_len() > ram.size() {
            return Err(Problem::DoesNotFit { need: self.unpacked_len(), ram: ram.size() });
        }
        self.decode(loader)?;
        match loader.remaining() {
            0 => Ok(()),
            missing => Err(self.damaged(format!(
                "it unpacks to {} bytes and not to {}",
                self.unpacked_len() - missing,
                self.unpacked_len
            ))),
        }
    }

    /// Decodes the stream to its end; it may yet be too short.
    fn decode(&self, loader: &mut Loader) -> Result<(), Problem> {
        match self.format {
            Format::Gzip => self.at_once(loader, gunzip),
            Format::Zstd => self.at_once(loader, unzstd),
            Format::Xz => {
                let xz =
                    lzma_rust2::XzReader::new_mem_limit(self.stream, false, LZMA_MEMORY_MAX_KIB);
                self.pump(xz, loader)
            }
            Format::Lzma => {
                let lzma =
                    lzma_rust2::LzmaReader::new_mem_limit(self.stream, LZMA_MEMORY_MAX_KIB, None);
                self.pump(lzma.map_err(|error| self.damaged(error))?, loader)
            }
            Format::Bzip2 => self.pump(bzip2::read::BzDecoder::new(self.stream), loader),
            Format::Lz4 => self.unlz4(loader),
            Format::Lzo => lzop::unpack(self.stream, |block| self.feed(loader, block))
                .map_err(|error| error.unwrap_or_else(|what| self.damaged(what))),
        }
    }

    fn damaged(&self, what: impl std::fmt::Display) -> Problem {
        Problem::Damaged { format: self.format.name(), what: what.to_string() }
    }

    /// Gives the loader a piece that the stream yielded, unless the stream yields too much.
    fn feed(&self, loader: &mut Loader, piece: &[u8]) -> Result<(), Problem> {
        if piece.len() as u64 > loader.remaining() {
            let what = format!("it unpacks to more than {} bytes", self.unpacked_len);
            return Err(self.damaged(what));
        }
        loader.feed(piece).map_err(|problem| match problem {
            Problem::Truncated { have, need } => {
                self.damaged(format!("{have} bytes in it, and the ELF there calls for {need}"))
            }
            other => other,
        })
    }

    /// Unpacks into one buffer, which is the decoder's history as well: no window, no second copy.
    fn at_once(
        &self,
        loader: &mut Loader,
        decode: fn(&[u8], &mut [u8]) -> Result<usize, String>,
    ) -> Result<(), Problem> {
        let mut buffer = Scratch::new(self.unpacked_len())?;
        let len = decode(self.stream, &mut buffer).map_err(|what| self.damaged(what))?;
        self.feed(loader, &buffer[..len])
    }

    /// Unpacks piece by piece, to the end of the stream, where the decoder verifies its checksum.
    fn pump(&self, mut decoder: impl Read, loader: &mut Loader) -> Result<(), Problem> {
        let mut piece = vec![0; PIECE_LEN];
        loop {
            let len = match decoder.read(&mut piece) {
                Ok(0) => return Ok(()),
                Ok(len) => len,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.damaged(error)),
            };
            self.feed(loader, &piece[..len])?;
        }
    }

    /// The legacy frame: independent blocks, each behind its packed length.
    fn unlz4(&self, loader: &mut Loader) -> Result<(), Problem> {
        let mut block = Scratch::new(LZ4_BLOCK_LEN as u64)?;
        let mut rest = self.stream;
        while let Some((len, after)) = rest.split_first_chunk() {
            let len = u32::from_le_bytes(*len);
            rest = after;
            // Frames may follow one another.
            if len == LZ4_LEGACY_MAGIC {
                continue;
            }
            let (packed, after) = usize::try_from(len)
                .ok()
                .and_then(|len| rest.split_at_checked(len))
                .ok_or_else(|| self.damaged("a block runs past the end"))?;
            let len = lz4_flex::block::decompress_into(packed, &mut block)
                .map_err(|error| self.damaged(error))?;
            self.feed(loader, &block[..len])?;
            rest = after;
        }
        if rest.is_empty() { Ok(()) } else { Err(self.damaged("bytes follow the last block")) }
    }
}

fn gunzip(packed: &[u8], unpacked: &mut [u8]) -> Result<usize, String> {
    // 15 bits of window, and 16 for the gzip header and trailer.
    let config = zlib_rs::InflateConfig { window_bits: 15 + 16 };
    match zlib_rs::decompress_slice(unpacked, packed, config) {
        (unpacked, zlib_rs::ReturnCode::Ok) => Ok(unpacked.len()),
        (_, code) => Err(format!("{code:?}")),
    }
}

fn unzstd(packed: &[u8], unpacked: &mut [u8]) -> Result<usize, String> {
    zstd_safe::decompress(unpacked, packed)
        .map_err(|code| zstd_safe::get_error_name(code).to_lowercase())
}
