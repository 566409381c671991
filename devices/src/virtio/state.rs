//! The transport's saved state. The device behind it is a section of its own
//! ([`crate::bus::BusDevice::inner_part`]).

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueT};
use vmm_migration::state::{RestoreError, SaveError, Stateful};

use super::core::{QueueSetup, Refusal, TransportCore, status};
use super::interrupt::{CONFIG_CHANGE, USED_BUFFER};
use super::mmio::VirtioMmio;

/// State of the MMIO transport, version 1. Frozen once released.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportStateV1 {
    /// What kind of device stands behind it.
    pub device_id: u32,
    /// As the driver reads it, `NEEDS_RESET` included.
    pub status: u32,
    /// `DeviceFeaturesSel`.
    pub device_features_sel: u32,
    /// `DriverFeaturesSel`.
    pub driver_features_sel: u32,
    /// What the driver accepted; checked by the device only from `FEATURES_OK` on.
    pub driver_features: u64,
    /// `QueueSel`.
    pub queue_sel: u32,
    /// `InterruptStatus`.
    pub interrupt_status: u32,
    /// The last `ConfigGeneration` that a driver may have seen.
    pub config_generation: u32,
    /// Every queue that the device has.
    pub queues: Vec<QueueStateV1>,
}

/// One queue's state, version 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueStateV1 {
    /// `QueueSize`.
    pub size: u32,
    /// `QueueReady`.
    pub ready: bool,
    /// Address of the descriptor table.
    pub descriptor_area: u64,
    /// Address of the available ring.
    pub driver_area: u64,
    /// Address of the used ring.
    pub device_area: u64,
    /// Chains popped so far, modulo 2^16.
    pub next_avail: u16,
    /// Chains given back so far, modulo 2^16.
    pub next_used: u16,
}

impl QueueStateV1 {
    fn save(setup: &QueueSetup, queue: &Queue) -> Self {
        let QueueSetup { size_max: _, size, descriptor_area, driver_area, device_area, ready } =
            *setup;
        let (next_avail, next_used) = (queue.next_avail(), queue.next_used());
        Self { size, ready, descriptor_area, driver_area, device_area, next_avail, next_used }
    }
}

impl Stateful for VirtioMmio {
    const KIND: &'static str = "virtio-mmio";
    const VERSION: u16 = 1;
    type State = TransportStateV1;

    fn save(&self) -> Result<TransportStateV1, SaveError> {
        let worker = self.at_rest();
        let Self {
            config,
            kicks: _,
            lender: _,
            log: _,
            name: _,
            core,
            place: _,
            running: _,
            activated: _,
        } = self;
        let TransportCore {
            device_id,
            device_features: _,
            interrupt,
            // With the mark of the interrupt's, below.
            status: _,
            device_features_sel,
            driver_features_sel,
            driver_features,
            queue_sel,
            queues,
        } = core;
        let queues = queues.iter().zip(&worker.queues).map(|(s, q)| QueueStateV1::save(s, q));
        Ok(TransportStateV1 {
            device_id: *device_id,
            status: core.status(),
            device_features_sel: *device_features_sel,
            driver_features_sel: *driver_features_sel,
            driver_features: *driver_features,
            queue_sel: *queue_sel,
            interrupt_status: interrupt.pending(),
            config_generation: config.generation(),
            queues: queues.collect(),
        })
    }

    fn restore(&mut self, state: TransportStateV1) -> Result<(), RestoreError> {
        self.put(state).map_err(|why| RestoreError::Invalid { kind: Self::KIND, why })
    }
}

impl VirtioMmio {
    /// Puts a saved state in; the device starts with [`crate::bus::BusDevice::resume`].
    fn put(&mut self, state: TransportStateV1) -> Result<(), String> {
        let driver_status = state.status & !status::NEEDS_RESET;
        if state.device_id != self.core.device_id {
            return Err(format!("device {} instead of {}", state.device_id, self.core.device_id));
        }
        if state.queues.len() != self.core.queues.len() {
            return Err(format!("{} queues of {}", state.queues.len(), self.core.queues.len()));
        }
        if !TransportCore::possible(driver_status) {
            return Err(format!("status {:#x}", state.status));
        }
        let negotiated = driver_status & status::FEATURES_OK != 0;
        if negotiated && !self.core.acceptable(state.driver_features) {
            let features = state.driver_features;
            return Err(format!("the driver uses features that aren't offered: {features:#x}"));
        }
        if state.interrupt_status & !(USED_BUFFER | CONFIG_CHANGE) != 0 {
            return Err(format!("interrupt status {:#x}", state.interrupt_status));
        }
        self.config.follow_generation(state.config_generation);
        let core = &mut self.core;
        core.interrupt.restore(state.interrupt_status, state.status & status::NEEDS_RESET != 0);
        core.status = driver_status;
        core.device_features_sel = state.device_features_sel;
        core.driver_features_sel = state.driver_features_sel;
        core.driver_features = state.driver_features;
        core.queue_sel = state.queue_sel;
        for (index, queue) in state.queues.iter().enumerate() {
            self.put_queue(index, queue).map_err(|why| format!("virtqueue {index}: {why}"))?;
        }
        Ok(())
    }

    fn put_queue(&mut self, index: usize, saved: &QueueStateV1) -> Result<(), Refusal> {
        let QueueStateV1 {
            size,
            ready,
            descriptor_area,
            driver_area,
            device_area,
            next_avail,
            next_used,
        } = *saved;
        let setup = &mut self.core.queues[index];
        let size_max = setup.size_max;
        *setup = QueueSetup { size_max, size, descriptor_area, driver_area, device_area, ready };
        // Nothing stays of an example that was restored before.
        self.home().queues[index].reset();
        if !self.core.live() || !ready {
            // Whatever a driver wrote that hasn't started: it is checked when it does.
            return Ok(());
        }
        self.build_queue(index)?;
        let queue = &mut self.home().queues[index];
        if next_avail.wrapping_sub(next_used) > queue.size() {
            return Err("more chains in flight than the queue holds");
        }
        queue.set_next_avail(next_avail);
        queue.set_next_used(next_used);
        Ok(())
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
