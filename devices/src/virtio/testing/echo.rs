//! A device that does everything a transport has to cope with, and tells its test what was done to it.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use vmm_migration::state::{RestoreError, SaveError, Stateful};

use crate::virtio::queue::QueueIo;
use crate::virtio::{ConfigSpace, DriverFault, VirtioDevice};

/// What a test sees and sets from outside while the device is lent.
#[derive(Debug, Default)]
pub struct Probe {
    /// Keep the chains of queue 0 in flight.
    pub hold: AtomicBool,
    /// Change the configuration at the next call.
    pub change_config: AtomicBool,
    /// Calls of `activate`.
    pub activations: AtomicU64,
    /// The features of the last one.
    pub features: AtomicU64,
    /// Calls of `reset`.
    pub resets: AtomicU64,
    /// Calls of `drain`.
    pub drains: AtomicU64,
    /// Calls of `process`.
    pub calls: AtomicU64,
    /// Calls of `source_ready`.
    pub inputs: AtomicU64,
}

impl Probe {
    /// Reads a counter.
    pub fn get(counter: &AtomicU64) -> u64 {
        counter.load(Ordering::SeqCst)
    }
}

/// Queue 0 echoes, one chain a call; queue 1 gets a byte for each byte that comes in at `input`.
pub struct Echo {
    config: Arc<ConfigSpace>,
    input: OwnedFd,
    probe: Arc<Probe>,
    held: Vec<u16>,
}

impl Echo {
    /// The device's id, which is nobody's.
    pub const ID: u32 = 0x2a;
    /// A feature of its own.
    pub const FEATURE: u64 = 1 << 5;
    /// Its configuration at first.
    pub const CONFIG: [u8; 8] = [1, 2, 3, 4, 5, 6, 7, 8];

    /// An echo device, its probe, and the other end of its input.
    pub fn new() -> (Box<Self>, Arc<Probe>, OwnedFd) {
        let (input, feed) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK).unwrap();
        let probe = Arc::new(Probe::default());
        let config = ConfigSpace::new(&Self::CONFIG);
        let echo = Self { config, input, probe: Arc::clone(&probe), held: Vec::new() };
        (Box::new(echo), probe, feed)
    }

    fn echo(&mut self, io: &mut QueueIo<'_>) -> Result<(), DriverFault> {
        let hold = self.probe.hold.load(Ordering::SeqCst);
        if !hold {
            for head in self.held.drain(..) {
                io.push(0, head, 0)?;
            }
        }
        let Some(chain) = io.pop(0)? else { return Ok(()) };
        if hold {
            self.held.push(chain.head);
            return Ok(());
        }
        let mut data = vec![0; chain.readable_len().min(chain.writable_len())];
        chain.copy_from(io.ram(), 0, &mut data)?;
        chain.copy_to(io.ram(), 0, &data)?;
        io.push(0, chain.head, u32::try_from(data.len()).unwrap())
    }
}

impl VirtioDevice for Echo {
    fn id(&self) -> u32 {
        Self::ID
    }

    fn features(&self) -> u64 {
        Self::FEATURE
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16, 8]
    }

    fn config(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.config)
    }

    fn activate(&mut self, driver_features: u64) {
        self.probe.activations.fetch_add(1, Ordering::SeqCst);
        self.probe.features.store(driver_features, Ordering::SeqCst);
    }

    fn reset(&mut self) {
        self.held.clear();
        self.probe.resets.fetch_add(1, Ordering::SeqCst);
    }

    fn sources(&self) -> Vec<RawFd> {
        vec![self.input.as_raw_fd()]
    }

    fn process(&mut self, queue: usize, io: &mut QueueIo<'_>) -> Result<(), DriverFault> {
        self.probe.calls.fetch_add(1, Ordering::SeqCst);
        if self.probe.change_config.swap(false, Ordering::SeqCst) {
            self.config.update(2, &[0xaa, 0xbb]);
            io.config_changed();
        }
        if queue == 0 { self.echo(io) } else { Ok(()) }
    }

    fn source_ready(&mut self, _: usize, io: &mut QueueIo<'_>) -> Result<bool, DriverFault> {
        self.probe.inputs.fetch_add(1, Ordering::SeqCst);
        let Some(chain) = io.pop(1)? else { return io.enable_notification(1) };
        let mut byte = [0];
        rustix::io::read(&self.input, &mut byte).unwrap();
        chain.copy_to(io.ram(), 0, &byte)?;
        io.push(1, chain.head, 1)?;
        Ok(true)
    }

    fn drain(&mut self) {
        self.probe.drains.fetch_add(1, Ordering::SeqCst);
    }
}

/// The chains in flight.
#[derive(Serialize, Deserialize)]
pub struct EchoState {
    held: Vec<u16>,
}

impl Stateful for Echo {
    const KIND: &'static str = "virtio-echo";
    const VERSION: u16 = 1;
    type State = EchoState;

    fn save(&self) -> Result<EchoState, SaveError> {
        Ok(EchoState { held: self.held.clone() })
    }

    fn restore(&mut self, state: EchoState) -> Result<(), RestoreError> {
        self.held = state.held;
        Ok(())
    }
}

/// A device with queues of any sizes, valid or not, that does nothing.
pub struct Odd(Vec<u16>);

impl Odd {
    /// A device with queues of `sizes`.
    pub fn new(sizes: Vec<u16>) -> Self {
        Self(sizes)
    }
}

impl VirtioDevice for Odd {
    fn id(&self) -> u32 {
        Echo::ID
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.0
    }

    fn config(&self) -> Arc<ConfigSpace> {
        ConfigSpace::new(&[])
    }

    fn activate(&mut self, _: u64) {}

    fn reset(&mut self) {}

    fn process(&mut self, _: usize, _: &mut QueueIo<'_>) -> Result<(), DriverFault> {
        Ok(())
    }
}

impl Stateful for Odd {
    const KIND: &'static str = "virtio-odd";
    const VERSION: u16 = 1;
    type State = ();

    fn save(&self) -> Result<(), SaveError> {
        Ok(())
    }

    fn restore(&mut self, (): ()) -> Result<(), RestoreError> {
        Ok(())
    }
}
