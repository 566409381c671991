//! The control queue (virtio 1.3, 5.1.6.5): the driver's commands, one a chain.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET,
    VIRTIO_NET_ERR, VIRTIO_NET_OK,
};

use super::{CONTROL, MAC_LEN, Net, QUEUE_SIZES, announce, guest_offload_mask};
use crate::GuestRam;
use crate::virtio::DriverFault;
use crate::virtio::queue::{Chain, QueueIo};

/// Length of class and command, in bytes.
const HEADER_LEN: usize = 2;

/// A command that the device doesn't know or can't follow.
struct Refused;

impl From<DriverFault> for Refused {
    /// The command's data is shorter than it must be.
    fn from(_: DriverFault) -> Self {
        Self
    }
}

impl Net {
    /// Follows the commands that the driver made available.
    pub(super) fn control(&mut self, io: &mut QueueIo<'_>) -> Result<(), DriverFault> {
        let ram = io.ram();
        for _ in 0..QUEUE_SIZES[CONTROL] {
            let Some(chain) = io.pop(CONTROL)? else { break };
            let ack_at = chain
                .writable_len()
                .checked_sub(1)
                .ok_or(DriverFault::Request("a control command without room for its answer"))?;
            let answer = match self.command(ram, &chain) {
                Ok(()) => VIRTIO_NET_OK,
                Err(Refused) => VIRTIO_NET_ERR,
            };
            chain.copy_to(ram, ack_at, &[u8::try_from(answer).expect("an answer is 0 or 1")])?;
            io.push(CONTROL, chain.head, 1)?;
        }
        Ok(())
    }

    fn command(&mut self, ram: &GuestRam, chain: &Chain) -> Result<(), Refused> {
        let mut header = [0; HEADER_LEN];
        chain.copy_from(ram, 0, &mut header)?;
        match header.map(u32::from) {
            [VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK] => {
                self.status &= !announce();
                self.update_config();
                Ok(())
            }
            [VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET] => {
                let mut mac = [0; MAC_LEN];
                chain.copy_from(ram, HEADER_LEN, &mut mac)?;
                self.mac = mac;
                self.update_config();
                Ok(())
            }
            [VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET] => {
                let mut bits = [0; 8];
                chain.copy_from(ram, HEADER_LEN, &mut bits)?;
                self.choose_offloads(u64::from_le_bytes(bits))
            }
            _ => Err(Refused),
        }
    }

    /// Turns on those offloads of what the driver negotiated that it now names (5.1.6.5.6).
    fn choose_offloads(&mut self, bits: u64) -> Result<(), Refused> {
        if bits & !(guest_offload_mask() & self.driver_features) != 0 {
            return Err(Refused);
        }
        let before = self.guest_offloads.replace(bits);
        self.apply_offloads().map_err(|_| {
            self.guest_offloads = before;
            Refused
        })
    }
}
