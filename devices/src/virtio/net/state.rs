//! Saved state of the network device.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};
use vmm_migration::state::{RestoreError, SaveError, Stateful, from_body, to_body};

use super::{MAC_LEN, MTU_MIN, Net, announce, guest_offload_mask, link_up};
use crate::backend::NET_FRAME_LEN_MAX;
use crate::virtio::addresses::{ADDRESSES_MAX, may_be_a_hosts};

/// Version 1. Frozen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetStateV1 {
    /// MAC address that the guest reads; it may have set another one than the configured.
    pub mac: [u8; MAC_LEN],
    /// MTU that the guest was told, in bytes.
    pub mtu: Option<u16>,
    /// The status field: link up, and whether an announcement is asked for and not acknowledged.
    pub status: u16,
    /// An announcement is wanted of which the guest was not told yet.
    pub announce_wanted: bool,
    /// The offloads chosen by the control queue, as feature bits.
    pub guest_offloads: Option<u64>,
    /// A frame, with its header, that waits for receive buffers. Empty if none does.
    pub held: Vec<u8>,
}

/// Version 2: with the guest's addresses, which who takes it in announces.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetStateV2 {
    /// As it was.
    pub v1: NetStateV1,
    /// IPv4 addresses known of the guest, the one heard of last first; at most [`ADDRESSES_MAX`].
    pub addresses: Vec<[u8; 4]>,
}

impl From<NetStateV1> for NetStateV2 {
    fn from(v1: NetStateV1) -> Self {
        Self { v1, addresses: Vec::new() }
    }
}

impl Stateful for Net {
    const KIND: &'static str = "virtio-net";
    const VERSION: u16 = 2;
    type State = NetStateV2;

    fn save(&self) -> Result<NetStateV2, SaveError> {
        let Self {
            id: _,
            factory_mac: _,
            backend: _,
            config: _,
            announcer,
            log: _,
            mac,
            mtu,
            status,
            // The transport saves them and activates the device with them.
            driver_features: _,
            guest_offloads,
            receiver,
        } = self;
        let v1 = NetStateV1 {
            mac: *mac,
            mtu: *mtu,
            status: *status,
            announce_wanted: announcer.is_wanted(),
            guest_offloads: *guest_offloads,
            held: receiver.held().to_vec(),
        };
        let addresses = announcer.addresses().iter().map(Ipv4Addr::octets).collect();
        Ok(NetStateV2 { v1, addresses })
    }

    fn restore(&mut self, state: NetStateV2) -> Result<(), RestoreError> {
        let invalid = |why| Err(RestoreError::Invalid { kind: Self::KIND, why });
        let NetStateV2 { v1, addresses } = state;
        let NetStateV1 { mac, mtu, status, announce_wanted, guest_offloads, held } = v1;
        let addresses: Vec<_> = addresses.into_iter().map(Ipv4Addr::from).collect();
        let id = &self.id;
        if mtu.is_some() != self.mtu.is_some() || mtu.is_some_and(|mtu| mtu < MTU_MIN) {
            let told = |mtu: Option<u16>| mtu.map_or("none".to_owned(), |mtu| mtu.to_string());
            let (saved, here) = (told(mtu), told(self.mtu));
            return invalid(format!(
                "interface '{id}' has mtu {here}, the guest knows it with {saved}"
            ));
        }
        if status & !(link_up() | announce()) != 0 {
            return invalid(format!("interface '{id}' has the unknown status {status:#x}"));
        }
        if guest_offloads.is_some_and(|bits| bits & !guest_offload_mask() != 0) {
            return invalid(format!("interface '{id}' has unknown offloads {guest_offloads:x?}"));
        }
        if held.len() > NET_FRAME_LEN_MAX {
            return invalid(format!("interface '{id}' holds a frame of {} bytes", held.len()));
        }
        if addresses.len() > ADDRESSES_MAX {
            return invalid(format!("interface '{id}' has {} addresses", addresses.len()));
        }
        if let Some(address) = addresses.iter().find(|address| !may_be_a_hosts(**address)) {
            return invalid(format!("interface '{id}' has the address {address}"));
        }
        (self.mac, self.mtu, self.status) = (mac, mtu, status);
        self.announcer.known.replace(&addresses);
        self.guest_offloads = guest_offloads;
        self.receiver.hold(held);
        if announce_wanted {
            self.announcer.request();
        }
        self.update_config();
        Ok(())
    }

    fn upgrade(version: u16, body: &[u8]) -> Option<Result<NetStateV2, RestoreError>> {
        let v1 = || from_body::<NetStateV1>(Self::KIND, version, body);
        (version == 1).then(|| v1().map(Into::into))
    }

    /// Without the addresses: the guest announces them itself.
    fn downgrade(state: &NetStateV2, version: u16) -> Option<Vec<u8>> {
        (version == 1).then(|| to_body(&state.v1))
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
