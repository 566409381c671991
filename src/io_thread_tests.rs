//! Tests of the thread's rest, with a device that it serves.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

use vm_memory::{Bytes, GuestAddress};
use vmm_devices::GuestRam;
use vmm_devices::bus::BusDevice;
use vmm_devices::irq::IrqLine;
use vmm_devices::sign::Signs;
use vmm_devices::virtio::mmio::{VirtioMmio, register};
use vmm_devices::virtio::queue::QueueIo;
use vmm_devices::virtio::rng::Rng;
use vmm_devices::virtio::{ConfigSpace, DriverFault, VirtioDevice};
use vmm_migration::state::{RestoreError, SaveError, Stateful};

use super::*;

/// How long another thread may take for what takes it microseconds.
const PATIENCE: Duration = Duration::from_secs(20);
/// Where the queue's parts are, and a buffer.
const DESCRIPTORS: u32 = 0x1000;
const AVAILABLE: u32 = 0x2000;
const USED: u32 = 0x3000;
const BUFFER: u32 = 0x4000;

struct NoLine;

impl IrqLine for NoLine {
    fn trigger(&self) {}
}

/// A source of entropy, live, and one buffer in its queue.
struct Device {
    mmio: VirtioMmio,
    ram: GuestRam,
}

impl Device {
    fn start(io: &IoThread) -> Self {
        Self::start_with(io, Box::new(Rng::default()))
    }

    fn start_with(io: &IoThread, device: Box<dyn VirtioDevice>) -> Self {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 0x8000)]).unwrap();
        let lender = Box::new(io.endpoint());
        let (line, sign) = (Arc::new(NoLine), Arc::new(Signs::default()));
        let mmio = VirtioMmio::new(device, ram.clone(), line, lender, sign);
        let mut device = Self { mmio: mmio.unwrap(), ram };
        device.mmio.resume();
        let steps = [
            (register::STATUS, 1),
            (register::STATUS, 3),
            (register::DRIVER_FEATURES_SEL, 1),
            (register::DRIVER_FEATURES, 1),
            (register::STATUS, 11),
            (register::QUEUE_SIZE, 8),
            (register::QUEUE_DESC_LOW, DESCRIPTORS),
            (register::QUEUE_DRIVER_LOW, AVAILABLE),
            (register::QUEUE_DEVICE_LOW, USED),
            (register::QUEUE_READY, 1),
            (register::STATUS, 15),
        ];
        steps.into_iter().for_each(|(register, value)| device.write(register, value));
        // Writable, 16 bytes.
        let descriptor = u128::from(BUFFER) | 16 << 64 | 2 << 96;
        device.ram.write_obj(descriptor.to_le(), at(DESCRIPTORS)).unwrap();
        device
    }

    fn write(&mut self, register: u64, value: u32) {
        self.mmio.write(register, &value.to_le_bytes());
    }

    /// Asks for the buffer to be filled, once more.
    fn ask(&mut self) {
        let asked: u16 = self.ram.read_obj(at(AVAILABLE + 2)).unwrap();
        self.ram.write_obj(asked + 1, at(AVAILABLE + 2)).unwrap();
        self.write(register::QUEUE_NOTIFY, 0);
    }

    /// How often it was.
    fn served(&self) -> u16 {
        self.ram.read_obj(at(USED + 2)).unwrap()
    }

    fn until_served(&self, count: u16) {
        let start = Instant::now();
        while self.served() != count {
            assert!(start.elapsed() < PATIENCE, "{} of {count}", self.served());
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}

fn at(address: u32) -> GuestAddress {
    GuestAddress(address.into())
}

/// The thread at an I/O that lasts until something is sent.
fn busy(io: &IoThread) -> Sender<()> {
    let (end, ended) = channel();
    let (begin, began) = channel();
    let lasting = move |_: &mut dyn event_manager::SubscriberOps<Subscriber = Task>| {
        begin.send(()).unwrap();
        ended.recv().unwrap();
    };
    io.endpoint().remote.fire(lasting).unwrap();
    began.recv_timeout(PATIENCE).unwrap();
    end
}

/// Who waits for an I/O, and ends it at the second look.
fn ending(end: &Sender<()>) -> impl FnMut() -> Flow + '_ {
    let mut looks = 0;
    move || {
        looks += 1;
        if looks == 2 {
            end.send(()).unwrap();
        }
        Flow::Continue
    }
}

#[test]
fn a_rest_waits_for_what_is_under_way_and_begins_nothing() {
    let io = IoThread::start().unwrap();
    let mut device = Device::start(&io);
    device.ask();
    device.until_served(1);
    let end = busy(&io);
    device.ask();
    let rest = io.rest(&mut ending(&end)).unwrap().expect("a rest");
    assert_eq!(device.served(), 1, "what was asked for meanwhile began");
    device.ask();
    device.mmio.quiesce();
    assert_eq!(device.served(), 1);
    // The machine doesn't stop after all, or goes on elsewhere.
    device.mmio.resume();
    drop(rest);
    device.until_served(3);
    device.mmio.quiesce();
}

/// A device each of whose requests lasts until it is told to end, and says when it begins.
struct Slow {
    rng: Rng,
    began: Sender<()>,
    end: Receiver<()>,
}

impl VirtioDevice for Slow {
    fn id(&self) -> u32 {
        self.rng.id()
    }

    fn features(&self) -> u64 {
        self.rng.features()
    }

    fn queue_sizes(&self) -> &[u16] {
        self.rng.queue_sizes()
    }

    fn config(&self) -> Arc<ConfigSpace> {
        self.rng.config()
    }

    fn activate(&mut self, _driver_features: u64) {}

    fn reset(&mut self) {}

    fn process(&mut self, queue: usize, io: &mut QueueIo<'_>) -> Result<(), DriverFault> {
        while let Some(chain) = io.pop(queue)? {
            self.began.send(()).unwrap();
            self.end.recv().unwrap();
            io.push(queue, chain.head, 16)?;
        }
        Ok(())
    }
}

impl Stateful for Slow {
    const KIND: &'static str = "slow";
    const VERSION: u16 = 1;
    type State = ();

    fn save(&self) -> Result<(), SaveError> {
        Ok(())
    }

    fn restore(&mut self, (): ()) -> Result<(), RestoreError> {
        Ok(())
    }
}

/// A queue may hold many, and each may take long.
#[test]
fn a_rest_waits_for_one_request_of_many() {
    let io = IoThread::start().unwrap();
    let ((begin, began), (end, ends)) = (channel(), channel());
    let slow = Slow { rng: Rng::default(), began: begin, end: ends };
    let mut device = Device::start_with(&io, Box::new(slow));
    (0..5).for_each(|_| device.ask());
    began.recv_timeout(PATIENCE).unwrap();
    let rest = io.rest(&mut ending(&end)).unwrap().expect("a rest");
    rest.hurry();
    device.mmio.quiesce();
    assert_eq!(device.served(), 1);
    assert!(began.try_recv().is_err(), "another began");
    // The others are done without another word of the driver's.
    device.mmio.resume();
    drop(rest);
    (0..4).for_each(|_| end.send(()).unwrap());
    device.until_served(5);
    device.mmio.quiesce();
}

#[test]
fn a_rest_that_is_cancelled_leaves_the_devices_as_they_are() {
    let io = IoThread::start().unwrap();
    let mut device = Device::start(&io);
    let end = busy(&io);
    device.ask();
    assert!(io.rest(&mut || Flow::Cancel).unwrap().is_none());
    assert_eq!(device.served(), 0);
    end.send(()).unwrap();
    device.until_served(1);
    device.mmio.quiesce();
}
