//! The entropy device (virtio 1.3, 5.4): fills buffers with the host's random bytes.

use std::sync::Arc;

use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};
use vmm_migration::state::{RestoreError, SaveError, Stateful};

use super::queue::{Chain, QueueIo};
use super::{ConfigSpace, DriverFault, VirtioDevice};

/// Device id of an entropy source (virtio 1.3, 5).
const ID: u32 = 4;
const QUEUE_SIZES: &[u16] = &[64];

/// Most random bytes for one request; a driver may get fewer than it asked for (5.4.6.2).
const REQUEST_LEN_MAX: usize = 4096;
/// Most requests in one call.
const BURST_MAX: usize = 16;
/// Bytes fetched at once: up to 256 the kernel gives all of them or none.
const PIECE_LEN: usize = 256;

/// An entropy device.
pub struct Rng {
    config: Arc<ConfigSpace>,
}

impl Default for Rng {
    fn default() -> Self {
        Self { config: ConfigSpace::new(&[]) }
    }
}

impl Rng {
    fn answer(chain: &Chain, io: &QueueIo<'_>) -> Result<usize, DriverFault> {
        let len = chain.writable_len().min(REQUEST_LEN_MAX);
        if len == 0 || !chain.readable.is_empty() {
            return Err(DriverFault::Request("an entropy buffer that can't be written"));
        }
        let mut piece = [0; PIECE_LEN];
        for done in (0..len).step_by(PIECE_LEN) {
            let piece = &mut piece[..PIECE_LEN.min(len - done)];
            fill(piece);
            chain.copy_to(io.ram(), done, piece)?;
        }
        Ok(len)
    }
}

/// Fills at most [`PIECE_LEN`] bytes.
fn fill(piece: &mut [u8]) {
    loop {
        match getrandom(&mut *piece, GetRandomFlags::empty()) {
            Ok(n) if n == piece.len() => return,
            // A signal, while the host's pool was still being seeded.
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => panic!("the kernel has no getrandom(2): {e}"),
        }
    }
}

impl VirtioDevice for Rng {
    fn id(&self) -> u32 {
        ID
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn config(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.config)
    }

    fn activate(&mut self, _driver_features: u64) {}

    fn reset(&mut self) {}

    fn process(&mut self, queue: usize, io: &mut QueueIo<'_>) -> Result<(), DriverFault> {
        for _ in 0..BURST_MAX {
            let Some(chain) = io.pop(queue)? else { break };
            let len = Self::answer(&chain, io)?;
            io.push(queue, chain.head, u32::try_from(len).expect("bounded"))?;
        }
        Ok(())
    }
}

/// Nothing: requests are answered at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngStateV1 {}

impl Stateful for Rng {
    const KIND: &'static str = "virtio-rng";
    const VERSION: u16 = 1;
    type State = RngStateV1;

    fn save(&self) -> Result<RngStateV1, SaveError> {
        let Self { config: _ } = self;
        Ok(RngStateV1 {})
    }

    fn restore(&mut self, RngStateV1 {}: RngStateV1) -> Result<(), RestoreError> {
        Ok(())
    }
}

#[cfg(test)]
#[path = "rng_tests.rs"]
mod tests;
