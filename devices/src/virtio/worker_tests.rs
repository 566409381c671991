//! Tests of lending across threads, with a real event loop on a thread of its own.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use event_manager::{EventManager, RemoteEndpoint};
use vmm_migration::state::Saved;

use super::*;
use crate::bus::BusDevice;
use crate::virtio::core::status;
use crate::virtio::mmio::{VirtioMmio, register};
use crate::virtio::testing::{Buf, CountingLine, Driver, DriverRing, Echo, IoLoop, ram};

/// How long another thread may take for what takes it microseconds.
const PATIENCE: Duration = Duration::from_secs(20);

struct Loop {
    endpoint: RemoteEndpoint<Box<Worker>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Loop {
    fn start() -> Self {
        let mut manager = EventManager::<Box<Worker>>::new().unwrap();
        let endpoint = manager.remote_endpoint();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::SeqCst) {
                manager.run().unwrap();
            }
        });
        Self { endpoint, stop, thread: Some(thread) }
    }
}

struct Remote(RemoteEndpoint<Box<Worker>>);

impl Lender for Remote {
    fn lend(&self, worker: Box<Worker>) -> SubscriberId {
        let lend = self
            .0
            .call_blocking(move |ops| Ok::<_, event_manager::Error>(ops.add_subscriber(worker)));
        lend.unwrap()
    }

    fn take_back(&self, id: SubscriberId) -> Box<Worker> {
        self.0.call_blocking(move |ops| ops.remove_subscriber(id)).unwrap()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.endpoint.kick().unwrap();
        self.thread.take().unwrap().join().unwrap();
    }
}

/// The driver of a device whose I/O thread is a real one.
fn threaded(io: &Loop) -> Driver {
    let (ram, line) = (ram(0x2_0000), Arc::new(CountingLine::default()));
    let lender = Box::new(Remote(io.endpoint.clone()));
    let irq: Arc<dyn crate::irq::IrqLine> = line.clone();
    let sign = Arc::new(Signs::default());
    let echo = Echo::new().0;
    let device = VirtioMmio::new(echo, ram.clone(), irq, lender, Arc::clone(&sign)).unwrap();
    let mut driver = Driver { device, line, sign, io: IoLoop::new(), ram };
    driver.device.resume();
    driver
}

fn wait_used(ring: &mut DriverRing) -> (u16, u32) {
    let start = Instant::now();
    loop {
        if let Some(used) = ring.pop_used() {
            return used;
        }
        assert!(start.elapsed() < PATIENCE, "the worker doesn't answer");
        std::thread::sleep(Duration::from_micros(50));
    }
}

#[test]
fn a_device_works_on_another_thread_and_comes_home_whenever_asked() {
    let io = Loop::start();
    let mut driver = threaded(&io);
    let mut rings = driver.start(0x1000, &[16, 8], 0);
    for round in 0..50 {
        let head = rings[0].add(&[Buf::readable(0x8000, 4), Buf::writable(0x8100, 4)]);
        driver.write(register::QUEUE_NOTIFY, 0);
        if round % 2 == 0 {
            driver.device.quiesce();
            driver.device.save_section(0).unwrap();
            driver.device.resume();
        }
        assert_eq!(wait_used(&mut rings[0]), (head, 4));
    }
    driver.write(register::STATUS, 0);
    assert_eq!(driver.status(), 0);
}

/// At every start a worker looks at its queues, and then again at one that stays full: none of that is the guest's doing.
#[test]
fn a_notification_is_the_guests_sign_and_a_look_of_the_workers_own_is_none() {
    let mut driver = Driver::new(Echo::new().0, &ram(0x2_0000));
    let mut rings = driver.start(0x1000, &[16, 8], 0);
    for _ in 0..3 {
        rings[0].add(&[Buf::readable(0x8000, 4), Buf::writable(0x8100, 4)]);
        driver.device.quiesce();
        driver.device.resume();
        driver.io.run();
        assert!(rings[0].pop_used().is_some());
        // Its look is still to come when it goes home.
        driver.device.quiesce();
        driver.device.resume();
    }
    driver.io.run();
    assert_eq!(driver.sign.first_ago(), None);
    // By an ioeventfd, that is, without an exit.
    kick(&driver.device.kicks()[1]);
    driver.io.run();
    assert!(driver.sign.first_ago().is_some());
}

#[test]
fn resets_race_with_requests_and_faults_without_harm() {
    let io = Loop::start();
    let mut driver = threaded(&io);
    for round in 0..100u16 {
        let mut rings = driver.start(0x1000, &[16, 8], 0);
        rings[0].add(&[Buf::readable(0x8000, 4), Buf::writable(0x8100, 4)]);
        if round % 3 == 0 {
            rings[0].set_avail_idx(0x4000);
        }
        driver.write(register::QUEUE_NOTIFY, 0);
        // The next start resets the device at any point of its work.
    }
    let mut rings = driver.start(0x1000, &[16, 8], 0);
    let head = rings[0].add(&[Buf::readable(0x8000, 4), Buf::writable(0x8100, 4)]);
    driver.write(register::QUEUE_NOTIFY, 0);
    assert_eq!(wait_used(&mut rings[0]), (head, 4));
    assert_eq!(driver.status() & status::NEEDS_RESET, 0);
    driver.device.quiesce();
}
