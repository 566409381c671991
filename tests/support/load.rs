//! The program that migration tests run inside their guests: the test binary itself (it is static), started
//! once more as /load. Its threads watch one thing each and never stop looking: memory, the clocks of all
//! vCPUs, a file on the disk, a TCP connection, the console both ways. What is wrong becomes a line FAULT.

#![allow(dead_code, reason = "each test program uses a part")]

use std::fs::File;
use std::io::BufRead;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{Scope, scope, sleep};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

mod stream;
mod writer;

#[allow(unused_imports, reason = "each test program uses a part")]
pub use stream::{ClockWord, serve};

/// Tells the test binary that it is the program in the guest, and what to do there.
const LOAD: &str = "VMM_TEST_LOAD";
/// Bytes of a block on the disk.
pub const BLOCK_LEN: usize = 4096;
/// The word that numbers a block on the network, and in the answer the server's real time.
const WORD: usize = 8;
const TICK: Duration = Duration::from_millis(50);
/// Ticks between two words on the writers' pace.
const PACE_TICKS: u64 = 20;
const ALPHABET: &str = "abcdefghijklmnopqrstuvwxyz0123456789";

/// What the program does besides ticking, listening and looking at the clocks.
#[derive(Clone, Copy, Default)]
pub struct Load {
    /// Threads that rewrite and verify memory, how much each, and how long each rests after a pass.
    pub writers: u32,
    pub writer_mib: u32,
    pub rest_ms: u32,
    /// How fast each may be at most; 0: as fast as it can.
    pub mib_per_s: u32,
    /// Whether it tells now and then how fast they are.
    pub pace: bool,
    /// Whether it writes to the file system on /dev/vda.
    pub disk: bool,
    /// Where the server of a TCP stream is.
    pub server: Option<&'static str>,
    /// Whether all that wakes often rests longer, and leaves the vCPUs to the writers.
    pub gentle: bool,
}

impl Load {
    /// The script that runs it in the guest as the test `name`, and looks at what the kernel's log says since: while
    /// it boots, 6.1 calls the TSCs of several vCPUs unsynchronized where the CPU doesn't promise that they aren't.
    pub fn script(&self, name: &str) -> String {
        let Self { writers, writer_mib, rest_ms, mib_per_s, pace, disk, server, gentle } = *self;
        let server = server.unwrap_or("none");
        let words =
            format!("{writers} {writer_mib} {rest_ms} {mib_per_s} {pace} {disk} {server} {gentle}");
        let (mount, unmount) = if disk {
            ("mount /dev/vda /mnt || exit 10", "umount /mnt || exit 12")
        } else {
            ("", "")
        };
        format!(
            "stty -echo\n{mount}\nbooted=$(dmesg | wc -l)\n{LOAD}='{words}' /load --exact {name} --nocapture --test-threads=1 || exit 11\n{unmount}\n\
             dmesg | tail -n +$((booted + 1)) | grep -iE '{BAD_LOG}' | sed 's/^/FAULT log: /'\n\
             echo \"clocksource_after=$(cat {CLOCKSOURCE})\"\n"
        )
    }

    /// What this process is told to do, if it is the one in the guest.
    pub fn told() -> Option<Self> {
        let words = std::env::var(LOAD).ok()?;
        let words: Vec<&'static str> = words.leak().split(' ').collect();
        let number = |at: usize| words[at].parse().unwrap();
        Some(Self {
            writers: number(0),
            writer_mib: number(1),
            rest_ms: number(2),
            mib_per_s: number(3),
            pace: words[4] == "true",
            disk: words[5] == "true",
            server: (words[6] != "none").then_some(words[6]),
            gentle: words[7] == "true",
        })
    }
}

const CLOCKSOURCE: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
/// Lines that have no place in a guest's kernel log.
const BAD_LOG: &str = "soft lockup|hard lockup|unstable|hung task|blocked for more than|call trace|rcu.*stall|\
                       BUG:|WARNING: CPU|I/O error|EXT4-fs error|time jump|skew";

/// This binary without what it doesn't need to run, for the guest's initramfs.
pub fn program() -> Vec<u8> {
    let mut file = std::fs::read(std::env::current_exe().unwrap()).unwrap();
    let word = |file: &[u8], at: usize| u64::from_le_bytes(file[at..at + 8].try_into().unwrap());
    let half = |file: &[u8], at: usize| usize::from(u16::from_le_bytes([file[at], file[at + 1]]));
    let at = |number: u64| usize::try_from(number).unwrap();
    // ELF64: program headers from e_phoff, e_phnum of them, e_phentsize long; p_offset at 8, p_filesz at 32.
    let (first, size, count) = (at(word(&file, 32)), half(&file, 54), half(&file, 56));
    let ends =
        (0..count).map(|i| first + i * size).map(|h| word(&file, h + 8) + word(&file, h + 32));
    let end = ends.max().unwrap();
    file.truncate(at(end));
    // No section headers: e_shoff, e_shnum, e_shstrndx.
    file[40..48].fill(0);
    file[60..64].fill(0);
    file
}

/// The content of block `number`: no two blocks have 8 bytes in common at the same place.
pub fn block(number: u64, len: usize) -> Vec<u8> {
    let words = (0..(len / WORD) as u64).map(|i| mix(number << 20 | i).to_le_bytes());
    words.flatten().collect()
}

/// `SplitMix64`'s: a bijection, so unlike numbers stay unlike.
fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Real time in nanoseconds.
fn real_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    u64::try_from(now.as_nanos()).unwrap()
}

/// What tick `number` looks like.
pub fn tick(number: u64) -> String {
    let turn = usize::try_from(number % 36).unwrap();
    format!("tick {number:06} {}{}", &ALPHABET[turn..], &ALPHABET[..turn])
}

/// What the threads share.
struct Watch {
    start: Instant,
    stop: AtomicBool,
    faults: AtomicU64,
    /// The latest time that any vCPU has seen, since `start`.
    latest_ns: AtomicU64,
    /// The longest time in which a thread that wants to run every few milliseconds didn't.
    gap_us: AtomicU64,
    passes: AtomicU64,
    disk_blocks: AtomicU64,
    stream_blocks: AtomicU64,
}

impl Watch {
    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    fn fault(&self, what: &str) {
        // The first few tell enough.
        if self.faults.fetch_add(1, Ordering::Relaxed) < 20 {
            println!("FAULT {what}");
        }
    }
}

/// The program: runs until it reads "end" from its console.
pub fn run(load: &Load) {
    let watch = Watch {
        start: Instant::now(),
        stop: AtomicBool::new(false),
        faults: AtomicU64::new(0),
        latest_ns: AtomicU64::new(0),
        gap_us: AtomicU64::new(0),
        passes: AtomicU64::new(0),
        disk_blocks: AtomicU64::new(0),
        stream_blocks: AtomicU64::new(0),
    };
    let cpus = std::thread::available_parallelism().unwrap().get();
    // The test harness has begun a line. (With one thread it says nothing of tests that take long.)
    println!("\nload: starts on {cpus} vCPUs");
    scope(|threads| {
        start(threads, &watch, load, cpus);
        let mut paced = (Instant::now(), 0);
        for number in 0.. {
            println!("{}", tick(number));
            if load.pace && number % PACE_TICKS == PACE_TICKS - 1 {
                tell_pace(&watch, &mut paced);
            }
            if !watch.goes_on() {
                break;
            }
            sleep(TICK);
        }
    });
    println!("load: ends");
    let told = [
        ("faults", &watch.faults),
        ("gap_us", &watch.gap_us),
        ("passes", &watch.passes),
        ("disk_blocks", &watch.disk_blocks),
        ("stream_blocks", &watch.stream_blocks),
    ];
    for (name, value) in told {
        println!("{name}={}", value.load(Ordering::Relaxed));
    }
}

/// Passes in a thousand seconds, by those since the word before.
fn tell_pace(watch: &Watch, last: &mut (Instant, u64)) {
    let (now, passes) = (Instant::now(), watch.passes.load(Ordering::Relaxed));
    let ms = u64::try_from((now - last.0).as_millis()).unwrap();
    println!("pace {}", (passes - last.1) * 1_000_000 / ms);
    *last = (now, passes);
}

/// What such a line says.
pub fn pace(line: &str) -> Option<u64> {
    line.trim_end().strip_prefix("pace ")?.parse().ok()
}

fn start<'a>(threads: &'a Scope<'a, '_>, watch: &'a Watch, load: &'a Load, cpus: usize) {
    for cpu in 0..cpus {
        let rest = Duration::from_millis(if load.gentle { 10 } else { 1 });
        threads.spawn(move || clocks(watch, cpu, rest));
    }
    for writer in 0..load.writers {
        threads.spawn(move || writer::memory(watch, writer, load));
    }
    if load.disk {
        threads.spawn(|| disk(watch, Path::new("/mnt/blocks")));
    }
    if let Some(server) = load.server {
        let rest = Duration::from_millis(if load.gentle { 100 } else { 5 });
        threads.spawn(move || stream::stream(watch, server, rest));
    }
    threads.spawn(|| listen(watch));
}

/// No vCPU sees a monotonic clock behind what another has seen, nor a wall clock that goes back.
fn clocks(watch: &Watch, cpu: usize, rest: Duration) {
    let set = {
        let mut set = rustix::thread::CpuSet::new();
        set.set(cpu);
        set
    };
    rustix::thread::sched_setaffinity(None, &set).unwrap();
    let (mut real, mut before) = (SystemTime::now(), Instant::now());
    while watch.goes_on() {
        for _ in 0..20 {
            let latest = watch.latest_ns.load(Ordering::SeqCst);
            let now = Instant::now();
            let Some(since) = now.checked_duration_since(watch.start) else {
                watch.fault(&format!("vCPU {cpu}: CLOCK_MONOTONIC went back to before the start"));
                continue;
            };
            let since_ns = u64::try_from(since.as_nanos()).unwrap();
            if since_ns < latest {
                watch.fault(&format!(
                    "vCPU {cpu}: CLOCK_MONOTONIC went back by {} ns",
                    latest - since_ns
                ));
            }
            watch.latest_ns.fetch_max(since_ns, Ordering::SeqCst);
        }
        let real_now = SystemTime::now();
        if real_now < real {
            watch.fault(&format!(
                "vCPU {cpu}: CLOCK_REALTIME went back from {real:?} to {real_now:?}"
            ));
        }
        let gap = before.elapsed();
        watch.gap_us.fetch_max(u64::try_from(gap.as_micros()).unwrap(), Ordering::Relaxed);
        (real, before) = (real_now, Instant::now());
        sleep(rest);
    }
}

/// Each block is on the disk when the next one is written; what was written long ago is still there.
fn disk(watch: &Watch, path: &Path) {
    const O_DIRECT: i32 = 0x4000;
    let mut options = File::options();
    options.read(true).write(true).create(true);
    let file = options.open(path).unwrap();
    let direct = options.custom_flags(O_DIRECT).open(path).unwrap();
    let mut buffer = vec![0; 2 * BLOCK_LEN];
    let aligned = buffer.as_ptr().align_offset(BLOCK_LEN);
    let buffer = &mut buffer[aligned..][..BLOCK_LEN];
    let mut check = |number: u64| {
        buffer.fill(0);
        match direct.read_exact_at(buffer, number * BLOCK_LEN as u64) {
            Ok(()) if *buffer == block(number, BLOCK_LEN) => {}
            Ok(()) => watch.fault(&format!("disk: block {number} isn't what was written")),
            Err(e) => watch.fault(&format!("disk: block {number} can't be read: {e}")),
        }
    };
    let mut number = 0;
    while watch.goes_on() {
        let written = file
            .write_all_at(&block(number, BLOCK_LEN), number * BLOCK_LEN as u64)
            .and_then(|()| file.sync_all());
        if let Err(e) = written {
            watch.fault(&format!("disk: block {number} can't be written: {e}"));
            return;
        }
        check(mix(number) % (number + 1));
        number += 1;
        watch.disk_blocks.store(number, Ordering::Relaxed);
        sleep(Duration::from_millis(10));
    }
    (0..number).for_each(check);
}

/// Lines typed on the console are numbered, and none is lost, doubled or changed: each is answered with the time. "end"
/// ends the program.
fn listen(watch: &Watch) {
    let (mut next, mut line) = (0, String::new());
    let stdin = std::io::stdin();
    while watch.goes_on() {
        line.clear();
        match stdin.lock().read_line(&mut line) {
            Ok(0) => watch.fault("the console's input ends"),
            Err(e) => watch.fault(&format!("console: {e}")),
            Ok(_) if line == "end\n" => {}
            Ok(_) if line.strip_suffix('\n') == Some(&tick(next)) => {
                let now = watch.start.elapsed().as_nanos();
                println!("heard {next} at {now} {}", real_ns());
                next += 1;
                continue;
            }
            Ok(_) => watch.fault(&format!("console: {line:?} isn't line {next}")),
        }
        watch.stop.store(true, Ordering::Relaxed);
    }
}

/// All that a guest said that has come to its end.
pub struct Told(pub String);

impl Told {
    /// What it said that `name` is.
    #[track_caller]
    pub fn text(&self, name: &str) -> &str {
        let found = self.0.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        found.unwrap_or_else(|| panic!("no {name}= in {}", self.0)).trim_end()
    }

    /// The number that it called `name`.
    #[track_caller]
    pub fn number(&self, name: &str) -> u64 {
        self.text(name).parse().unwrap_or_else(|e| panic!("{name}: {e} in {}", self.0))
    }
}
