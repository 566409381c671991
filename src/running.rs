//! A machine in motion: its parts are lent to threads, and [`Running::stop`] brings them home.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use vmm_devices::power::Power;
use vmm_devices::serial::Serial;

use crate::arch::clock;
use crate::event::{Event, GuestExit};
use crate::kick;
use crate::machine::{Core, Machine, MachineError};
use crate::throttle::{Ticker, VcpuOrders};
use crate::vcpu::{Buses, Vcpu, VcpuEnd};

struct VcpuThread {
    thread: JoinHandle<Vcpu>,
    orders: Arc<VcpuOrders>,
}

/// A machine whose vCPUs run.
pub struct Running {
    threads: Vec<VcpuThread>,
    /// While a vCPU is throttled. Before the threads that it kicks are joined, it is dropped.
    ticker: Option<Ticker>,
    buses: Arc<Buses>,
    core: Box<Core>,
}

impl Running {
    /// Devices resume first, then the vCPUs run: the mirror of [`Self::stop`].
    pub(crate) fn start(machine: Machine) -> Result<Self, Box<(Machine, MachineError)>> {
        let Machine { vcpus, mut buses, core } = machine;
        for device in buses.all_mut() {
            device.resume();
        }
        for vcpu in &vcpus {
            // Tells the guest's watchdogs that it was stopped. Refused where the guest has no kvmclock.
            let _ = clock::pause_notify(vcpu.fd());
        }
        let buses = Arc::new(buses);
        let (uart, serial) = (Arc::clone(&buses), core.platform.serial);
        core.console.attach(Box::new(move |visit| {
            uart.pio.with_as::<Serial, _>(serial, |s| visit(s));
        }));
        let mut running =
            Self { threads: Vec::with_capacity(vcpus.len()), ticker: None, buses, core };
        let mut waiting = vcpus.into_iter();
        while let Some(vcpu) = waiting.next() {
            if let Err((vcpu, e)) = running.spawn(vcpu) {
                let mut machine = running.stop();
                machine.vcpus.push(vcpu);
                machine.vcpus.extend(waiting);
                return Err(Box::new((machine, MachineError::Thread(e))));
            }
        }
        Ok(running)
    }

    fn spawn(&mut self, vcpu: Vcpu) -> Result<(), (Vcpu, io::Error)> {
        let (give, take) = std::sync::mpsc::sync_channel::<Vcpu>(1);
        let buses = Arc::clone(&self.buses);
        let events = self.core.events.clone();
        let name = format!("vcpu-{}", vcpu.index());
        let orders = Arc::new(VcpuOrders::default());
        let ordered = Arc::clone(&orders);
        let spawned = std::thread::Builder::new().name(name).spawn(move || {
            let vcpu = take.recv().expect("the spawner sends the vCPU before anything else");
            let (vcpu, end) = vcpu.run(&buses, &ordered);
            let event = match end {
                VcpuEnd::Kicked => return vcpu,
                VcpuEnd::TripleFault => Event::Guest(GuestExit::TripleFault),
                VcpuEnd::Failed(e) => Event::Vcpu { index: vcpu.index(), error: e.into() },
            };
            // Nobody listens any more when the VMM is on its way out.
            let _ = events.send(event);
            vcpu
        });
        match spawned {
            Ok(thread) => {
                give.send(vcpu).expect("the thread waits for its vCPU");
                self.threads.push(VcpuThread { thread, orders });
                Ok(())
            }
            Err(e) => Err((vcpu, e)),
        }
    }

    /// Brings everything home: all vCPUs are kicked, then joined; then the devices finish their I/O.
    /// Nothing writes guest RAM after this returns.
    #[must_use]
    pub fn stop(self) -> Machine {
        let Self { threads, ticker, buses, core } = self;
        drop(ticker);
        for VcpuThread { thread, orders } in &threads {
            orders.stop();
            kick::ThreadId::of(thread).kick();
            // It may sleep off a throttle.
            thread.thread().unpark();
        }
        let vcpus = threads.into_iter().map(|t| t.thread.join().expect("vCPU threads don't panic"));
        let vcpus = vcpus.collect();
        core.console.detach();
        let mut buses =
            Arc::into_inner(buses).expect("vCPU threads and the console gave their buses back");
        for device in buses.all_mut() {
            device.quiesce();
        }
        Machine { vcpus, buses, core }
    }

    pub(crate) fn core(&self) -> &Core {
        &self.core
    }

    /// Keeps each vCPU off for this share of its time, in percent; vCPUs behind the slice's end take
    /// its last value, and an empty slice lifts the throttle.
    pub fn throttle(&mut self, percent: &[u8]) -> io::Result<()> {
        let last = percent.last().copied().unwrap_or(0);
        let shares = percent.iter().copied().chain(std::iter::repeat(last));
        for (vcpu, share) in self.threads.iter().zip(shares) {
            vcpu.orders.throttle(share);
        }
        if percent.iter().all(|share| *share == 0) {
            self.ticker = None;
        } else if self.ticker.is_none() {
            let name = |v: &VcpuThread| (kick::ThreadId::of(&v.thread), Arc::clone(&v.orders));
            self.ticker = Some(Ticker::start(self.threads.iter().map(name).collect())?);
        }
        Ok(())
    }

    /// The processor time that each vCPU's thread has used, where it is known.
    pub fn vcpu_times(&self) -> impl Iterator<Item = Option<Duration>> {
        self.threads.iter().map(|vcpu| kick::ThreadId::of(&vcpu.thread).cpu_time())
    }

    /// Presses the guest's power button.
    pub fn press_power_button(&self) {
        self.buses.pio.with_as(self.core.platform.power, Power::press_button);
    }
}
