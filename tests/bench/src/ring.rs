//! The dirty log beside the dirty ring: what harvesting costs, and how fast the guest writes meanwhile.
//!
//! The guest is a loop at privilege level 3 that writes to so many pages, evenly spread, over and over. Ten times a
//! second all that it dirtied is collected and re-armed: by the log as a migration does it (`migrate::tracking`:
//! the log is read whole, pages are cleared 256 at a time), or by the ring (its entries are read, and one call
//! re-arms them all); a full ring stops the guest, and is harvested at once.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_DIRTY_LOG_PAGE_OFFSET, KVMIO, kvm_enable_cap, kvm_segment,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress};
use vmm::arch::layout::{HIGH_RAM, MMIO_HOLE};
use vmm::arch::{configure_vm, cpuid};
use vmm::memory::{Backing, Memory};
use vmm::migrate::tracking;
use vmm::{dirty, kick};
use vmm_migration::pages::{PageSet, Run};
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;

use crate::{Result, Settings};

ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);

/// `KVM_EXIT_DIRTY_RING_FULL`.
const EXIT_RING_FULL: u32 = 31;
const SPAN: Duration = Duration::from_secs(2);
const PERIOD: Duration = Duration::from_millis(100);
/// KVM's most.
const RING_ENTRIES: usize = 1 << 16;
const REARM_PAGES: usize = 256;
/// Where the guest's tables and code stand, where it counts, and where the pages begin that it writes to.
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x10_0000;
const CODE: u64 = 0x8000;
const COUNT: u64 = 0x9000;
const BASE: u64 = 0x100_0000;
/// Present, writable, user, accessed, dirty.
const ENTRY: u64 = 0x67;
const HUGE: u64 = 0x80;

/// The loop. RBX: first page, RSI: how many, RDX: distance, R8: where it counts its writes.
const LOOP: &[u8] = &[
    0x48, 0x89, 0xdf, // 1: mov %rbx, %rdi
    0x48, 0x89, 0xf1, // mov %rsi, %rcx
    0x48, 0xff, 0xc0, // 2: inc %rax
    0x48, 0x89, 0x07, // mov %rax, (%rdi)
    0x49, 0x89, 0x00, // mov %rax, (%r8)
    0x48, 0x01, 0xd7, // add %rdx, %rdi
    0x48, 0xff, 0xc9, // dec %rcx
    0x75, 0xef, // jnz 2b
    0xeb, 0xe7, // jmp 1b
];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Untracked,
    Log,
    Ring,
}

/// `struct kvm_dirty_gfn`.
#[repr(C)]
struct Entry {
    /// 1: dirty, for us; 2: harvested, for KVM.
    flags: AtomicU32,
    _slot: AtomicU32,
    page: AtomicU64,
}

/// A vCPU's ring, mapped for as long as this process lives.
struct Ring {
    entries: &'static [Entry],
    next: usize,
}

impl Ring {
    fn map(vcpu: &VcpuFd) -> Result<Self> {
        let offset = libc::off_t::from(KVM_DIRTY_LOG_PAGE_OFFSET) * 4096;
        let (len, protection) =
            (RING_ENTRIES * size_of::<Entry>(), libc::PROT_READ | libc::PROT_WRITE);
        // SAFETY: a fresh mapping, which takes no address that is in use and is never unmapped. KVM writes to it
        // meanwhile; an entry is atomics, and any bytes are valid ones.
        let entries = unsafe {
            let fd = vcpu.as_raw_fd();
            let at =
                libc::mmap(std::ptr::null_mut(), len, protection, libc::MAP_SHARED, fd, offset);
            if at == libc::MAP_FAILED {
                return Err(std::io::Error::last_os_error().into());
            }
            std::slice::from_raw_parts(at.cast::<Entry>(), RING_ENTRIES)
        };
        Ok(Self { entries, next: 0 })
    }

    /// Collects what is dirty and re-arms it.
    fn harvest(&mut self, vm: &VmFd, into: &mut PageSet) -> Result<()> {
        loop {
            let entry = &self.entries[self.next % RING_ENTRIES];
            if entry.flags.load(Ordering::Acquire) & 1 == 0 {
                break;
            }
            into.insert(
                Run::new(entry.page.load(Ordering::Relaxed), 1)
                    .ok_or("a page number out of range")?,
            );
            entry.flags.store(2, Ordering::Release);
            self.next += 1;
        }
        // SAFETY: a VM's file; the call takes no argument.
        match unsafe { ioctl(vm, KVM_RESET_DIRTY_RINGS()) } {
            0.. => Ok(()),
            _ => Err(std::io::Error::last_os_error().into()),
        }
    }
}

/// A VM with one vCPU in the loop, not yet run. Where it stands in a machine doesn't matter, but that it has as
/// much RAM.
struct Bench {
    vm: VmFd,
    memory: Memory,
    ring: Option<Ring>,
}

impl Bench {
    fn new(way: Way, mib: u64, pages: u64) -> Result<(Self, VcpuFd)> {
        let kvm = Kvm::new()?;
        let vm = kvm.create_vm()?;
        configure_vm(&vm)?;
        match way {
            Way::Untracked => {}
            Way::Log => drop(dirty::enable_manual_protect(&vm)?),
            Way::Ring => {
                let mut cap =
                    kvm_enable_cap { cap: KVM_CAP_DIRTY_LOG_RING_ACQ_REL, ..Default::default() };
                cap.args[0] = (RING_ENTRIES * size_of::<Entry>()) as u64;
                vm.enable_cap(&cap)?;
            }
        }
        let low = (mib << 20).min(MMIO_HOLE);
        let high = (mib << 20) - low;
        let ranges = [(GuestAddress(0), low), (GuestAddress(HIGH_RAM), high)];
        let ranges = if high > 0 { &ranges[..] } else { &ranges[..1] };
        let memory = Memory::new(ranges, Backing::Fresh { hugepages: false })?;
        memory.register(&vm, false)?;
        let vcpu = vm.create_vcpu(0)?;
        vcpu.set_cpuid2(&cpuid::for_vcpu(&cpuid::host_cpuid(&kvm)?, 0, 1))?;
        place_loop(&memory)?;
        enter_loop(&vcpu, pages, (low - BASE) / 4096 / pages * 4096)?;
        let ring = if way == Way::Ring { Some(Ring::map(&vcpu)?) } else { None };
        Ok((Self { vm, memory, ring }, vcpu))
    }

    fn start(&self) -> Result<()> {
        self.memory.register(&self.vm, true)?;
        if self.ring.is_none() {
            for slot in self.memory.slots() {
                let pages = u32::try_from(slot.len / 4096)?;
                let bits = vec![u64::MAX; usize::try_from(slot.len / 4096 / 64)?];
                dirty::clear(&self.vm, slot, 0, pages, &bits)?;
            }
        }
        Ok(())
    }

    /// Collects all that is dirty, and re-arms it: how many pages they were.
    fn harvest(&mut self) -> Result<u64> {
        let mut set = PageSet::new();
        if let Some(ring) = &mut self.ring {
            ring.harvest(&self.vm, &mut set)?;
        } else {
            tracking::written(&self.vm, &self.memory, &mut set).map_err(|e| e.to_string())?;
            let runs: Vec<Run> =
                set.runs().flat_map(|run| run.pieces(REARM_PAGES as u64)).collect();
            for runs in runs.chunks(REARM_PAGES) {
                tracking::rearm(&self.vm, &self.memory, runs).map_err(|e| e.to_string())?;
            }
        }
        Ok(set.len())
    }

    fn writes(&self) -> Result<u64> {
        Ok(self.memory.ram().read_obj(GuestAddress(COUNT))?)
    }
}

/// The code, and an identity map of 4 GiB open to level 3.
fn place_loop(memory: &Memory) -> Result<()> {
    let ram = memory.ram();
    ram.write_slice(LOOP, GuestAddress(CODE))?;
    ram.write_obj(PDPT | ENTRY, GuestAddress(PML4))?;
    for gib in 0..4 {
        ram.write_obj((PD + gib * 4096) | ENTRY, GuestAddress(PDPT + gib * 8))?;
    }
    for huge in 0..4 * 512 {
        ram.write_obj((huge << 21) | ENTRY | HUGE, GuestAddress(PD + huge * 8))?;
    }
    Ok(())
}

fn enter_loop(vcpu: &VcpuFd, pages: u64, distance: u64) -> Result<()> {
    let data = kvm_segment {
        limit: u32::MAX,
        selector: 0x33,
        type_: 3,
        present: 1,
        dpl: 3,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let mut sregs = vcpu.get_sregs()?;
    sregs.cs = kvm_segment { selector: 0x2b, type_: 11, db: 0, l: 1, ..data };
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    // Long mode: PG, ET, PE; PAE; LMA, LME.
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8000_0011, PML4, 0x20, 0x500);
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    (regs.rip, regs.rflags, regs.rax) = (CODE, 2, 0);
    (regs.rbx, regs.rsi, regs.rdx, regs.r8) = (BASE, pages, distance, COUNT);
    Ok(vcpu.set_regs(&regs)?)
}

/// Runs the vCPU until it is kicked with the order to stop. Where the ring is full, it says so and waits.
fn run_loop(mut vcpu: VcpuFd, stop: &AtomicBool, full: &Sender<()>, go_on: &Receiver<()>) {
    let target = kick::Target::enter(vcpu.get_kvm_run());
    while !stop.load(Ordering::SeqCst) {
        match vcpu.run() {
            Ok(VcpuExit::Unsupported(EXIT_RING_FULL)) => {
                if full
                    .send(())
                    .and(go_on.recv().map_err(|_| std::sync::mpsc::SendError(())))
                    .is_err()
                {
                    return;
                }
            }
            Ok(other) => panic!("the guest ended: {other:?}"),
            Err(_) if target.kicked() => target.rearm(),
            Err(e) => assert!(matches!(e.errno(), libc::EINTR | libc::EAGAIN), "KVM_RUN: {e}"),
        }
    }
}

/// The thread that runs the vCPU.
struct Looping {
    thread: JoinHandle<()>,
    stop: Arc<AtomicBool>,
    is_full: Receiver<()>,
    go_on: Sender<()>,
}

impl Looping {
    fn start(vcpu: VcpuFd) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let ((full, is_full), (go_on, wait)) = (channel(), channel());
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || run_loop(vcpu, &stopped, &full, &wait));
        Self { thread, stop, is_full, go_on }
    }

    fn end(self) -> Result<()> {
        self.stop.store(true, Ordering::SeqCst);
        while !self.thread.is_finished() {
            kick::ThreadId::of(&self.thread).kick();
            let _ = self.go_on.send(());
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(self.thread.join().map_err(|_| "the vCPU's thread panicked")?)
    }
}

/// Measures one way: pages a harvest, microseconds a harvest, and the guest's writes a microsecond.
fn measure(way: Way, mib: u64, pages: u64) -> Result<[f64; 3]> {
    let (mut bench, vcpu) = Bench::new(way, mib, pages)?;
    let looping = Looping::start(vcpu);
    // All pages are there before anything is measured.
    while bench.writes()? < 3 * pages {
        if looping.thread.is_finished() {
            return Err("the guest ended".into());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    if way != Way::Untracked {
        bench.start()?;
    }
    let (mut taken, mut found) = (Vec::new(), 0);
    let (start, before) = (Instant::now(), bench.writes()?);
    for period in 1.. {
        let end = start + PERIOD * period;
        let mut busy = Duration::ZERO;
        loop {
            let told = looping.is_full.recv_timeout(end.saturating_duration_since(Instant::now()));
            if told == Err(RecvTimeoutError::Disconnected) {
                return Err("the guest ended".into());
            }
            if way != Way::Untracked {
                let begun = Instant::now();
                found += bench.harvest()?;
                busy += begun.elapsed();
            }
            if told.is_err() {
                break;
            }
            looping.go_on.send(())?;
        }
        taken.push(busy);
        if start.elapsed() >= SPAN {
            break;
        }
    }
    let (seconds, writes) = (start.elapsed().as_secs_f64(), bench.writes()? - before);
    looping.end()?;
    let periods = taken.len() as f64;
    let total_us = taken.iter().sum::<Duration>().as_secs_f64() * 1e6;
    Ok([found as f64 / periods, total_us / periods, writes as f64 / seconds / 1e6])
}

/// The longest time in which a vCPU that writes all the while wrote nothing, from just before the dirty log of so
/// much RAM is turned on until just after, in microseconds.
pub fn stall_of_start_us(mib: u64) -> Result<f64> {
    kick::install()?;
    let (bench, vcpu) = Bench::new(Way::Log, mib, 1024)?;
    let looping = Looping::start(vcpu);
    while bench.writes()? < 1 << 20 {
        std::thread::sleep(Duration::from_millis(1));
    }
    let ended = AtomicBool::new(false);
    let longest = std::thread::scope(|scope| -> Result<Duration> {
        let watch = scope.spawn(|| -> std::result::Result<_, vm_memory::GuestMemoryError> {
            let read = || bench.memory.ram().read_obj::<u64>(GuestAddress(COUNT));
            let (mut longest, mut since, mut count) = (Duration::ZERO, Instant::now(), read()?);
            while !ended.load(Ordering::Relaxed) {
                let (now, at) = (read()?, Instant::now());
                longest = longest.max(at - since);
                if now != count {
                    (since, count) = (at, now);
                }
            }
            Ok(longest)
        });
        std::thread::sleep(Duration::from_millis(1));
        let started = bench.memory.register(&bench.vm, true);
        std::thread::sleep(Duration::from_millis(1));
        ended.store(true, Ordering::Relaxed);
        started?;
        Ok(watch.join().map_err(|_| "the watching thread panicked")??)
    });
    looping.end()?;
    Ok(longest?.as_secs_f64() * 1e6)
}

/// `bench ring`
pub fn run(settings: &Settings) -> Result<()> {
    kick::install()?;
    let mut rows = Vec::new();
    for run in 1..=settings.runs {
        for (mib, pages) in [(512, 1024), (512, 32 << 10), (4096, 1024), (4096, 256 << 10)] {
            for way in [Way::Untracked, Way::Log, Way::Ring] {
                rows.push(((mib, pages, way), measure(way, mib, pages)?));
            }
        }
        eprintln!("bench: run {run} of {}: ring", settings.runs);
    }
    println!(
        "\nThe dirty log and the dirty ring, harvested each {} ms: medians\n",
        PERIOD.as_millis()
    );
    println!("| MiB of RAM | pages written to | | pages a harvest | µs a harvest | writes a µs |");
    println!("|---|---|---|---|---|---|");
    let first = rows.iter().take(rows.len() / settings.runs.max(1)).map(|(row, _)| *row);
    for row in first {
        let of = |figure: usize| {
            let mut of: Vec<f64> =
                rows.iter().filter(|(key, _)| *key == row).map(|(_, told)| told[figure]).collect();
            of.sort_by(f64::total_cmp);
            of[of.len() / 2]
        };
        let (mib, pages, way) = row;
        println!("| {mib} | {pages} | {way:?} | {:.0} | {:.0} | {:.2} |", of(0), of(1), of(2));
    }
    Ok(())
}
