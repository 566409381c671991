//! The thread of one vCPU: parked while the machine is at rest, it runs the vCPU that it is lent in motion.
//!
//! It is the same thread for as long as the machine lives. A KVM before Linux 6.13 waits for all of the host's
//! processors (`synchronize_rcu`) when another thread than the last one enters `KVM_RUN`: 10 ms and more, in
//! which the guest stands. And a machine that arrives finds its threads ready.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::event::{Event, GuestExit};
use crate::kick::ThreadId;
use crate::throttle::VcpuOrders;
use crate::vcpu::{Buses, Vcpu, VcpuEnd};

/// The thread. Dropping it ends and joins it.
pub struct VcpuThread {
    /// None only while it is dropped.
    lend: Option<SyncSender<(Vcpu, Arc<Buses>)>>,
    home: Receiver<Vcpu>,
    orders: Arc<VcpuOrders>,
    thread: Option<JoinHandle<()>>,
}

const HERE: &str = "vCPU threads don't panic, and end only when they are dropped";

impl VcpuThread {
    /// Starts the thread, with nothing to run yet. `events` hears when a vCPU ends by itself.
    pub fn start(index: u32, events: Sender<Event>) -> io::Result<Self> {
        let (lend, lent) = sync_channel(1);
        let (give, home) = sync_channel(1);
        let orders = Arc::new(VcpuOrders::default());
        let ordered = Arc::clone(&orders);
        let thread = std::thread::Builder::new()
            .name(format!("vcpu-{index}"))
            .spawn(move || serve(&lent, &give, &ordered, &events))?;
        Ok(Self { lend: Some(lend), home, orders, thread: Some(thread) })
    }

    /// Lends it the vCPU, which runs from now on.
    pub fn run(&self, vcpu: Vcpu, buses: Arc<Buses>) {
        self.orders.reset();
        self.lend(vcpu, buses);
    }

    /// Has it enter `KVM_RUN` and leave it before the guest's first instruction, so that what KVM does at a
    /// vCPU's first entry is done: among it, since Linux 6.12, the start of a kernel thread.
    #[must_use]
    pub fn warm_up(&self, vcpu: Vcpu) -> Vcpu {
        // A kick that comes before the vCPU isn't lost.
        self.stop();
        self.lend(vcpu, Arc::default());
        self.home()
    }

    fn lend(&self, vcpu: Vcpu, buses: Arc<Buses>) {
        self.lend.as_ref().expect(HERE).send((vcpu, buses)).expect(HERE);
    }

    /// Orders it to give the vCPU back, and waits for nothing.
    pub fn stop(&self) {
        self.orders.stop();
        self.id().kick();
        // It may sleep off a throttle.
        self.thread().thread().unpark();
    }

    /// The vCPU, as soon as it is back. It has let go of the buses.
    #[must_use]
    pub fn home(&self) -> Vcpu {
        self.home.recv().expect(HERE)
    }

    /// What to ask of it, and how to reach it. Not to be used after it was dropped.
    #[must_use]
    pub fn reach(&self) -> (ThreadId, Arc<VcpuOrders>) {
        (self.id(), Arc::clone(&self.orders))
    }

    /// Keeps the vCPU off for this share of its time, in percent.
    pub fn throttle(&self, percent: u8) {
        self.orders.throttle(percent);
    }

    /// The processor time that it has used, where it is known.
    #[must_use]
    pub fn cpu_time(&self) -> Option<Duration> {
        self.id().cpu_time()
    }

    fn id(&self) -> ThreadId {
        ThreadId::of(self.thread())
    }

    fn thread(&self) -> &JoinHandle<()> {
        self.thread.as_ref().expect(HERE)
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        self.stop();
        self.lend = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Runs what it is lent until nobody lends any more.
fn serve(
    lent: &Receiver<(Vcpu, Arc<Buses>)>,
    give: &SyncSender<Vcpu>,
    orders: &VcpuOrders,
    events: &Sender<Event>,
) {
    while let Ok((vcpu, buses)) = lent.recv() {
        let (vcpu, end) = vcpu.run(&buses, orders);
        drop(buses);
        let event = match end {
            VcpuEnd::Kicked => None,
            VcpuEnd::TripleFault => Some(Event::Guest(GuestExit::TripleFault)),
            VcpuEnd::Failed(e) => Some(Event::Vcpu { index: vcpu.index(), error: e.into() }),
        };
        // Nobody listens any more when the VMM is on its way out.
        let _ = event.map(|event| events.send(event));
        let _ = give.send(vcpu);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use kvm_ioctls::Kvm;

    use super::*;
    use crate::arch::msr::MsrPlan;
    use crate::kick;

    #[test]
    fn a_thread_runs_what_it_is_lent_time_and_again() {
        kick::install().unwrap();
        let kvm = Kvm::new().expect("/dev/kvm is needed");
        let vm = kvm.create_vm().unwrap();
        vm.create_irq_chip().unwrap();
        let msrs = Arc::new(MsrPlan::new(&kvm).unwrap());
        let mut vcpu = Vcpu::new(0, vm.create_vcpu(0).unwrap(), msrs);
        let (events, inbox) = channel();
        let thread = VcpuThread::start(0, events).unwrap();
        let before = vcpu.fd().get_regs().unwrap();
        for _ in 0..3 {
            vcpu = thread.warm_up(vcpu);
            assert_eq!(vcpu.fd().get_regs().unwrap(), before, "the guest's first instruction ran");
            assert!(inbox.try_recv().is_err(), "the guest came to an end");
        }
        // There is no memory: the first instruction is the end.
        thread.run(vcpu, Arc::default());
        let event = inbox.recv().unwrap();
        assert!(matches!(event, Event::Vcpu { index: 0, .. } | Event::Guest(_)));
        // As when a machine is stopped whose vCPU has come to an end.
        thread.stop();
        drop(thread.warm_up(thread.home()));
    }
}
