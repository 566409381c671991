//! A machine in motion: its parts are lent to threads, and [`Running::stop`] brings them home.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use vmm_devices::power::Power;
use vmm_devices::serial::Serial;
use vmm_migration::channel::Flow;

use crate::arch::clock;
use crate::console::Console;
use crate::io_thread::Rest;
use crate::machine::{Core, Machine};
use crate::throttle::Ticker;
use crate::vcpu::Buses;
use crate::vcpu_thread::VcpuThread;

/// A machine whose vCPUs run.
pub struct Running {
    /// While a vCPU is throttled. It kicks the core's threads, and is dropped before them.
    ticker: Option<Ticker>,
    /// While the devices wait for the stop, their I/O done.
    rest: Option<Rest>,
    buses: Arc<Buses>,
    core: Box<Core>,
}

impl Running {
    /// Devices resume first, then the vCPUs run: the mirror of [`Self::stop`].
    #[must_use]
    pub(crate) fn start(machine: Machine) -> Self {
        let Machine { vcpus, mut buses, core } = machine;
        for device in buses.all_mut() {
            device.resume();
        }
        for vcpu in &vcpus {
            // Tells the guest's watchdogs that it was stopped. Refused where the guest has no kvmclock.
            let _ = clock::pause_notify(vcpu.fd());
        }
        let buses = Arc::new(buses);
        for (thread, vcpu) in core.threads.iter().zip(vcpus) {
            thread.run(vcpu, Arc::clone(&buses));
        }
        let (uart, serial) = (Arc::clone(&buses), core.platform.serial);
        core.console.attach(Box::new(move |visit| {
            uart.pio.with_as::<Serial, _>(serial, |s| visit(s));
        }));
        Self { ticker: None, rest: None, buses, core }
    }

    /// Lets the devices finish the I/O that they are at, and begin no other, while the vCPUs run: a stop right after waits
    /// for none, however slow the storage. `poll` can cancel the wait; what the guest asked of its devices is done then.
    ///
    /// # Errors
    /// There can be no further thread.
    pub fn settle(&mut self, poll: &mut dyn FnMut() -> Flow) -> io::Result<Flow> {
        self.rest = None;
        self.rest = self.core.io.rest(poll)?;
        Ok(if self.rest.is_some() { Flow::Continue } else { Flow::Cancel })
    }

    /// The devices go on: there is no stop.
    pub fn unsettle(&mut self) {
        self.rest = None;
    }

    /// Brings everything home: all vCPUs are kicked and awaited, then the devices finish their I/O.
    /// Nothing writes guest RAM after this returns.
    #[must_use]
    pub fn stop(self) -> Machine {
        let Self { ticker, rest, buses, core } = self;
        drop(ticker);
        core.threads.iter().for_each(VcpuThread::stop);
        rest.iter().for_each(Rest::hurry);
        let typed = core.console.detach();
        let vcpus = core.threads.iter().map(VcpuThread::home).collect();
        let mut buses =
            Arc::into_inner(buses).expect("vCPU threads and the console gave their buses back");
        for device in buses.all_mut() {
            device.quiesce();
        }
        drop(rest);
        let machine = Machine { vcpus, buses, core };
        machine.keep(&typed);
        machine
    }

    /// Leaves it to the end of this process, since its devices' I/O can't be waited for: the vCPUs are told to stop, and the
    /// console, a terminal perhaps, isn't the machine's any more.
    pub fn abandon(self) {
        let Self { ticker, rest, buses, mut core } = self;
        drop(ticker);
        core.threads.iter().for_each(VcpuThread::stop);
        core.console = Arc::new(Console::none());
        // To drop them is to wait for the I/O thread.
        std::mem::forget((rest, buses, core));
    }

    pub(crate) fn core(&self) -> &Core {
        &self.core
    }

    /// Keeps each vCPU off for this share of its time, in percent; vCPUs behind the slice's end take
    /// its last value, and an empty slice lifts the throttle.
    pub fn throttle(&mut self, percent: &[u8]) -> io::Result<()> {
        let last = percent.last().copied().unwrap_or(0);
        let shares = percent.iter().copied().chain(std::iter::repeat(last));
        for (thread, share) in self.core.threads.iter().zip(shares) {
            thread.throttle(share);
        }
        if percent.iter().all(|share| *share == 0) {
            self.ticker = None;
        } else if self.ticker.is_none() {
            let threads = self.core.threads.iter().map(VcpuThread::reach).collect();
            self.ticker = Some(Ticker::start(threads)?);
        }
        Ok(())
    }

    /// The processor time that each vCPU's thread has used, where it is known.
    pub fn vcpu_times(&self) -> impl Iterator<Item = Option<Duration>> {
        self.core.threads.iter().map(VcpuThread::cpu_time)
    }

    /// Presses the guest's power button.
    pub fn press_power_button(&self) {
        self.buses.pio.with_as(self.core.platform.power, Power::press_button);
    }
}

impl Machine {
    /// What was typed since it stands goes with it.
    pub(crate) fn keep_typed(&self) {
        self.keep(&self.core.console.detach());
    }

    /// What the console has read for the guest, and the guest hasn't taken, becomes part of its state.
    fn keep(&self, typed: &[u8]) {
        let serial = self.core.platform.serial;
        let kept = self.buses.pio.with_as::<Serial, _>(serial, |s| s.keep(typed)).unwrap_or(0);
        if kept < typed.len() {
            let lost = typed.len() - kept;
            tracing::warn!("console: {lost} typed bytes are lost: the guest takes none");
        }
    }
}
