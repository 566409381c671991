//! The block device (virtio 1.3, 5.2), on a [`BlockBackend`].
//!
//! One queue; a request is served when it is seen, straight between the disk and guest RAM. Neighbouring
//! requests are not merged: the guest's block layer has done that.
//!
//! Durability: a driver that knows `FLUSH` gets a writeback cache (the host's) and flushes it. For one
//! that doesn't, every write is made durable before it completes (5.2.6.2).

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use self::request::{Disk, Request};
use super::queue::{Chain, QueueIo};
use super::{ConfigSpace, DriverFault, VirtioDevice};
use crate::backend::BlockBackend;
use crate::limit::RateLimited;
use crate::{GuestRam, GuestSlice};

mod request;
mod state;
#[cfg(test)]
mod testing;

/// Entries of the queue: room for a request of 1 MiB in single pages, which 256 would cut in two.
const QUEUE_SIZE: u16 = 512;
/// Most data segments of a request: what the queue holds besides header and status.
const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Longest data segment, in bytes. With [`SEGMENTS_MAX`] it bounds a request.
const SEGMENT_LEN_MAX: u32 = 1 << 20;
/// What the guest is told is a good size of a request, in bytes. Linux reads ahead twice as much.
const OPTIMAL_LEN: u32 = 256 << 10;
/// Longest discard of one segment, in sectors: 4 GiB.
const DISCARD_SECTORS_MAX: u32 = 8 << 20;
/// Most segments of a discard.
const DISCARD_SEGMENTS_MAX: u32 = 32;
/// Longest write-zeroes, in sectors: 64 MiB. Short, since it may really be written.
const WRITE_ZEROES_SECTORS_MAX: u32 = 128 << 10;
/// Most segments of a write-zeroes.
const WRITE_ZEROES_SEGMENTS_MAX: u32 = 1;
/// How many requests are served before the driver is told of them.
const BURST_REQUESTS_MAX: usize = 32;
/// How many bytes are transferred before the driver is told of them: it refills its queue meanwhile.
const BURST_LEN_MAX: usize = 1 << 20;
/// Lines that the errors of one disk may log, a second.
const LOG_LINES_PER_SECOND: u32 = 5;

/// Length in bytes of the serial number that `GET_ID` answers.
pub const SERIAL_LEN: usize = VIRTIO_BLK_ID_BYTES as usize;

/// A virtio block device.
pub struct Block {
    // Configuration.
    id: String,
    // Glue.
    backend: Box<dyn BlockBackend>,
    config: Arc<ConfigSpace>,
    log: RateLimited,
    // State.
    serial: [u8; SERIAL_LEN],
    block_sizes: (u32, u32),
    writeback: bool,
}

/// Why a request failed. The first two are the guest's doing, and nothing to log.
#[derive(Debug)]
enum Failure {
    /// The device doesn't know such requests.
    Unsupported,
    /// It is out of bounds.
    Invalid,
    /// The disk failed.
    Backend(io::Error),
    /// It is none.
    Fault(DriverFault),
}

impl From<DriverFault> for Failure {
    fn from(fault: DriverFault) -> Self {
        Self::Fault(fault)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::Unsupported => Self::Unsupported,
            _ => Self::Backend(error),
        }
    }
}

impl Block {
    /// A disk called `id` in messages. The guest finds `serial` (cut to [`SERIAL_LEN`] bytes) under
    /// `/dev/disk/by-id`, `id` if there is none.
    #[must_use]
    pub fn new(id: &str, serial: Option<&str>, backend: Box<dyn BlockBackend>) -> Self {
        let mut bytes = [0; SERIAL_LEN];
        for (to, from) in bytes.iter_mut().zip(serial.unwrap_or(id).bytes()) {
            *to = from;
        }
        let block_sizes = backend.block_sizes();
        let config = config_bytes(backend.capacity_sectors(), block_sizes);
        Self {
            id: id.to_owned(),
            backend,
            config: ConfigSpace::new(&config),
            log: RateLimited::new(LOG_LINES_PER_SECOND),
            serial: bytes,
            block_sizes,
            writeback: false,
        }
    }

    /// Serves one request. Returns how many bytes were written to the chain.
    fn serve<'m>(
        &mut self,
        ram: &'m GuestRam,
        chain: &Chain,
        slices: &mut Vec<GuestSlice<'m>>,
    ) -> Result<u32, DriverFault> {
        let status_at = chain
            .writable_len()
            .checked_sub(1)
            .ok_or(DriverFault::Request("a block request without room for its status"))?;
        let done = self.execute(ram, chain, status_at, slices);
        let (status, len) = match done {
            Ok(len) => (VIRTIO_BLK_S_OK, len),
            Err(Failure::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
            Err(Failure::Invalid) => (VIRTIO_BLK_S_IOERR, 0),
            Err(Failure::Backend(error)) => {
                self.report(&error);
                (VIRTIO_BLK_S_IOERR, 0)
            }
            Err(Failure::Fault(fault)) => return Err(fault),
        };
        chain.copy_to(ram, status_at, &[u8::try_from(status).expect("a status is 0 to 2")])?;
        // A chain is at most 4 GiB long.
        Ok(u32::try_from(len).unwrap_or(u32::MAX).saturating_add(1))
    }

    /// Does what the request says. Returns how many bytes of data were written to the chain.
    fn execute<'m>(
        &mut self,
        ram: &'m GuestRam,
        chain: &Chain,
        status_at: usize,
        slices: &mut Vec<GuestSlice<'m>>,
    ) -> Result<usize, Failure> {
        let disk = Disk {
            capacity_sectors: self.backend.capacity_sectors(),
            read_only: self.backend.read_only(),
        };
        slices.clear();
        match Request::parse(disk, ram, chain, status_at)? {
            Request::Read { offset } => {
                chain.writable.slices(ram, 0, status_at, slices)?;
                self.backend.read_at(slices, offset)?;
                Ok(status_at)
            }
            Request::Write { offset, len } => {
                chain.readable.slices(ram, request::HEADER_LEN, len, slices)?;
                self.backend.write_at(slices, offset)?;
                self.complete_write()
            }
            Request::Flush => {
                self.backend.flush()?;
                Ok(0)
            }
            Request::GetId => {
                let len = SERIAL_LEN.min(status_at);
                chain.copy_to(ram, 0, &self.serial[..len])?;
                Ok(len)
            }
            Request::Discard(ranges) => {
                for range in ranges {
                    self.backend.discard(range.offset, range.len)?;
                }
                self.complete_write()
            }
            Request::WriteZeroes(ranges) => {
                for range in ranges {
                    self.backend.write_zeroes(range.offset, range.len, range.unmap)?;
                }
                self.complete_write()
            }
        }
    }

    fn complete_write(&mut self) -> Result<usize, Failure> {
        if !self.writeback {
            self.backend.flush()?;
        }
        Ok(0)
    }

    fn report(&mut self, error: &io::Error) {
        if let Some(dropped) = self.log.admit() {
            tracing::warn!(disk = %self.id, %error, dropped, "disk I/O failed; the guest was told");
        }
    }
}

impl VirtioDevice for Block {
    fn id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let common = [
            VIRTIO_BLK_F_SIZE_MAX,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_FLUSH,
        ];
        let access: &[u32] = if self.backend.read_only() {
            &[VIRTIO_BLK_F_RO]
        } else {
            &[VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]
        };
        common.iter().chain(access).fold(0, |all, bit| all | 1 << bit)
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn config(&self) -> Arc<ConfigSpace> {
        self.config.clone()
    }

    fn activate(&mut self, driver_features: u64) {
        self.writeback = driver_features & 1 << VIRTIO_BLK_F_FLUSH != 0;
    }

    fn reset(&mut self) {
        self.writeback = false;
    }

    fn process(&mut self, queue: usize, io: &mut QueueIo<'_>) -> Result<(), DriverFault> {
        let ram = io.ram();
        let mut slices = Vec::new();
        let mut transferred = 0;
        for _ in 0..BURST_REQUESTS_MAX {
            let Some(chain) = io.pop(queue)? else { break };
            let written = self.serve(ram, &chain, &mut slices)?;
            io.push(queue, chain.head, written)?;
            transferred += slices.iter().map(GuestSlice::len).sum::<usize>();
            if transferred >= BURST_LEN_MAX {
                break;
            }
        }
        Ok(())
    }
}

/// `struct virtio_blk_config` (virtio 1.3, 5.2.4), up to the write-zeroes fields.
fn config_bytes(capacity_sectors: u64, (logical, physical): (u32, u32)) -> Vec<u8> {
    let ratio = (physical / logical).max(1);
    let mut bytes = Vec::with_capacity(60);
    bytes.extend(capacity_sectors.to_le_bytes());
    bytes.extend(SEGMENT_LEN_MAX.to_le_bytes());
    bytes.extend(SEGMENTS_MAX.to_le_bytes());
    bytes.extend([0; 4]); // geometry: not offered
    bytes.extend(logical.to_le_bytes());
    // Topology: log2 of logical blocks per physical one, where the first one starts, the smallest and
    // the best request in logical blocks.
    bytes.push(u8::try_from(ratio.ilog2()).expect("below 32"));
    bytes.push(0);
    bytes.extend(u16::try_from(ratio).unwrap_or(u16::MAX).to_le_bytes());
    bytes.extend((OPTIMAL_LEN.max(physical) / logical).to_le_bytes());
    bytes.extend([0; 4]); // writeback, num_queues: not offered
    bytes.extend(DISCARD_SECTORS_MAX.to_le_bytes());
    bytes.extend(DISCARD_SEGMENTS_MAX.to_le_bytes());
    bytes.extend((physical / request::SECTOR_LEN_U32).to_le_bytes());
    bytes.extend(WRITE_ZEROES_SECTORS_MAX.to_le_bytes());
    bytes.extend(WRITE_ZEROES_SEGMENTS_MAX.to_le_bytes());
    bytes.extend([1, 0, 0, 0]); // write_zeroes_may_unmap
    bytes
}

#[cfg(test)]
#[path = "block_tests.rs"]
mod tests;
