//! Saved state of the block device. The disk's content is not in it; what the guest knows of the disk
//! is, so that a move to another disk is found out.

use serde::{Deserialize, Serialize};
use vmm_migration::state::{RestoreError, SaveError, Stateful};

use super::{Block, SERIAL_LEN, config_bytes};

/// Version 1. Frozen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockStateV1 {
    /// Size of the disk in sectors of 512 bytes.
    pub capacity_sectors: u64,
    /// The guest may not write.
    pub read_only: bool,
    /// Logical block size that the guest was told, in bytes.
    pub logical_block_len: u32,
    /// Physical block size that the guest was told, in bytes.
    pub physical_block_len: u32,
    /// What `GET_ID` answers.
    pub serial: [u8; SERIAL_LEN],
}

impl Stateful for Block {
    const KIND: &'static str = "virtio-blk";
    const VERSION: u16 = 1;
    type State = BlockStateV1;

    fn save(&self) -> Result<BlockStateV1, SaveError> {
        // `writeback` follows from the features that the transport saves.
        let Self { id: _, backend, config: _, log: _, serial, block_sizes, writeback: _ } = self;
        Ok(BlockStateV1 {
            capacity_sectors: backend.capacity_sectors(),
            read_only: backend.read_only(),
            logical_block_len: block_sizes.0,
            physical_block_len: block_sizes.1,
            serial: *serial,
        })
    }

    fn restore(&mut self, state: BlockStateV1) -> Result<(), RestoreError> {
        let invalid = |why| Err(RestoreError::Invalid { kind: Self::KIND, why });
        let (id, here) = (&self.id, self.backend.capacity_sectors());
        if state.capacity_sectors != here {
            let saved = state.capacity_sectors;
            return invalid(format!(
                "disk '{id}' has {here} sectors, the guest knows it with {saved}: give it the same image"
            ));
        }
        if state.read_only != self.backend.read_only() {
            let access = |read_only| if read_only { "read-only" } else { "writable" };
            let (saved, here) = (access(state.read_only), access(!state.read_only));
            return invalid(format!("disk '{id}' is {here}, the guest knows it as {saved}"));
        }
        let sizes = (state.logical_block_len, state.physical_block_len);
        let valid = |len: u32| len.is_power_of_two() && (512..=1 << 16).contains(&len);
        if !valid(sizes.0) || !valid(sizes.1) || sizes.0 > sizes.1 {
            return invalid(format!(
                "disk '{id}' can't have blocks of {} in {} bytes",
                sizes.0, sizes.1
            ));
        }
        self.serial = state.serial;
        self.block_sizes = sizes;
        self.config.update(0, &config_bytes(here, sizes));
        Ok(())
    }
}
