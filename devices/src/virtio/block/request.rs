//! Requests to the block device (virtio 1.3, 5.2.6), read from a chain and checked whole: what comes out
//! can be executed without further questions.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::{
    DISCARD_SECTORS_MAX, DISCARD_SEGMENTS_MAX, Failure, SEGMENT_LEN_MAX, SEGMENTS_MAX,
    WRITE_ZEROES_SECTORS_MAX, WRITE_ZEROES_SEGMENTS_MAX,
};
use crate::GuestRam;
use crate::virtio::queue::Chain;

/// Length in bytes of `struct virtio_blk_req` before the data: type, a reserved word, sector.
pub(super) const HEADER_LEN: usize = 16;
/// Length in bytes of `struct virtio_blk_discard_write_zeroes`.
const RANGE_LEN: usize = 16;
/// A sector, in bytes: the unit of all requests, whatever the block size.
pub(super) const SECTOR_LEN_U32: u32 = 512;
const SECTOR_LEN: u64 = SECTOR_LEN_U32 as u64;
/// Most data of one request, in bytes: as many and as long segments as the device admits to.
const REQUEST_LEN_MAX: usize = SEGMENTS_MAX as usize * SEGMENT_LEN_MAX as usize;

/// What a request is checked against.
#[derive(Clone, Copy)]
pub(super) struct Disk {
    pub(super) capacity_sectors: u64,
    pub(super) read_only: bool,
}

/// A part of the disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) len: u64,
    /// Its storage may be given back (write-zeroes only).
    pub(super) unmap: bool,
}

/// A valid request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// Fill the writable data.
    Read { offset: u64 },
    /// Write `len` bytes that follow the header.
    Write { offset: u64, len: usize },
    /// Make writes durable.
    Flush,
    /// Tell the serial number.
    GetId,
    /// Give storage back.
    Discard(Vec<Range>),
    /// Zero.
    WriteZeroes(Vec<Range>),
}

impl Request {
    /// Reads the request of `chain`, whose status byte is the writable byte at `status_at`.
    pub(super) fn parse(
        disk: Disk,
        ram: &GuestRam,
        chain: &Chain,
        status_at: usize,
    ) -> Result<Self, Failure> {
        let mut header = [0; HEADER_LEN];
        chain.copy_from(ram, 0, &mut header)?;
        let kind = u32::from_le_bytes(header[..4].try_into().expect("4 bytes"));
        let sector = u64::from_le_bytes(header[8..].try_into().expect("8 bytes"));
        let data_len = chain.readable_len() - HEADER_LEN;
        match kind {
            VIRTIO_BLK_T_IN => Ok(Self::Read { offset: disk.transfer(sector, status_at)? }),
            VIRTIO_BLK_T_OUT => {
                disk.check_writable()?;
                Ok(Self::Write { offset: disk.transfer(sector, data_len)?, len: data_len })
            }
            VIRTIO_BLK_T_FLUSH => Ok(Self::Flush),
            VIRTIO_BLK_T_GET_ID => Ok(Self::GetId),
            VIRTIO_BLK_T_DISCARD => {
                let limits = Limits {
                    segments: DISCARD_SEGMENTS_MAX,
                    sectors: DISCARD_SECTORS_MAX,
                    flags: 0,
                };
                disk.ranges(ram, chain, data_len, &limits).map(Self::Discard)
            }
            VIRTIO_BLK_T_WRITE_ZEROES => {
                let limits = Limits {
                    segments: WRITE_ZEROES_SEGMENTS_MAX,
                    sectors: WRITE_ZEROES_SECTORS_MAX,
                    flags: VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
                };
                disk.ranges(ram, chain, data_len, &limits).map(Self::WriteZeroes)
            }
            _ => Err(Failure::Unsupported),
        }
    }
}

/// What a request of several ranges may ask for.
struct Limits {
    segments: u32,
    sectors: u32,
    flags: u32,
}

impl Disk {
    fn check_writable(self) -> Result<(), Failure> {
        if self.read_only { Err(Failure::Invalid) } else { Ok(()) }
    }

    /// The byte offset of `sectors` sectors from `sector`, if they lie on the disk.
    fn extent(self, sector: u64, sectors: u64) -> Result<u64, Failure> {
        match sector.checked_add(sectors) {
            Some(end) if end <= self.capacity_sectors => Ok(sector * SECTOR_LEN),
            _ => Err(Failure::Invalid),
        }
    }

    /// The byte offset of a transfer of `len` bytes.
    pub(super) fn transfer(self, sector: u64, len: usize) -> Result<u64, Failure> {
        if len > REQUEST_LEN_MAX || !(len as u64).is_multiple_of(SECTOR_LEN) {
            return Err(Failure::Invalid);
        }
        self.extent(sector, len as u64 / SECTOR_LEN)
    }

    /// The ranges of a discard or write-zeroes request, all of them checked.
    fn ranges(
        self,
        ram: &GuestRam,
        chain: &Chain,
        data_len: usize,
        limits: &Limits,
    ) -> Result<Vec<Range>, Failure> {
        self.check_writable()?;
        let count = data_len / RANGE_LEN;
        if !data_len.is_multiple_of(RANGE_LEN) || !(1..=limits.segments as usize).contains(&count) {
            return Err(Failure::Invalid);
        }
        let mut ranges = Vec::with_capacity(count);
        for i in 0..count {
            let mut bytes = [0; RANGE_LEN];
            chain.copy_from(ram, HEADER_LEN + i * RANGE_LEN, &mut bytes)?;
            let range = self.range(&bytes, limits)?;
            if range.len > 0 {
                ranges.push(range);
            }
        }
        Ok(ranges)
    }

    fn range(self, bytes: &[u8; RANGE_LEN], limits: &Limits) -> Result<Range, Failure> {
        let sector = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"));
        let sectors = u32::from_le_bytes(bytes[8..12].try_into().expect("4 bytes"));
        let flags = u32::from_le_bytes(bytes[12..].try_into().expect("4 bytes"));
        if flags & !limits.flags != 0 {
            return Err(Failure::Unsupported);
        }
        if sectors > limits.sectors {
            return Err(Failure::Invalid);
        }
        let offset = self.extent(sector, u64::from(sectors))?;
        Ok(Range { offset, len: u64::from(sectors) * SECTOR_LEN, unmap: flags != 0 })
    }
}
