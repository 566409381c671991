//! The program that migration tests run inside their guests: the test binary itself (it is static), started
//! once more as /load. Its threads watch one thing each and never stop looking: memory, the clocks of all
//! vCPUs, a file on the disk, a TCP connection, the console both ways. What is wrong becomes a line FAULT.

#![allow(dead_code, reason = "each test program uses a part")]

use std::fs::File;
use std::io::{BufRead, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{Scope, scope, sleep, spawn};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Tells the test binary that it is the program in the guest, and what to do there.
const LOAD: &str = "VMM_TEST_LOAD";
/// Bytes of a block on the disk, and of one on the network.
pub const BLOCK_LEN: usize = 4096;
pub const STREAM_LEN: usize = 32 << 10;
/// The word that numbers a block on the network, and in the answer the server's real time.
pub const WORD: usize = 8;
const TICK: Duration = Duration::from_millis(50);
const ALPHABET: &str = "abcdefghijklmnopqrstuvwxyz0123456789";

/// What the program does besides ticking, listening and looking at the clocks.
#[derive(Clone, Copy, Default)]
pub struct Load {
    /// Threads that rewrite and verify memory, how much each, and how long each rests after a pass.
    pub writers: u32,
    pub writer_mib: u32,
    pub rest_ms: u32,
    /// Whether it writes to the file system on /dev/vda.
    pub disk: bool,
    /// Where the server of a TCP stream is.
    pub server: Option<&'static str>,
}

impl Load {
    /// The script that runs it in the guest as the test `name`, and looks at the kernel's log afterwards.
    pub fn script(&self, name: &str) -> String {
        let Self { writers, writer_mib, rest_ms, disk, server } = *self;
        let words = format!("{writers} {writer_mib} {rest_ms} {disk} {}", server.unwrap_or("none"));
        let (mount, unmount) = if disk {
            ("mount /dev/vda /mnt || exit 10", "umount /mnt || exit 12")
        } else {
            ("", "")
        };
        format!(
            "stty -echo\n{mount}\n{LOAD}='{words}' /load --exact {name} --nocapture --test-threads=1 || exit 11\n{unmount}\n\
             dmesg | grep -iE '{BAD_LOG}' | sed 's/^/FAULT log: /'\n\
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
            disk: words[3] == "true",
            server: (words[4] != "none").then_some(words[4]),
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
pub fn real_ns() -> u64 {
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
    /// The longest time in which a thread that wants to run every millisecond didn't.
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
        for number in 0.. {
            println!("{}", tick(number));
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

fn start<'a>(threads: &'a Scope<'a, '_>, watch: &'a Watch, load: &'a Load, cpus: usize) {
    for cpu in 0..cpus {
        threads.spawn(move || clocks(watch, cpu));
    }
    for writer in 0..load.writers {
        let rest = Duration::from_millis(load.rest_ms.into());
        threads.spawn(move || memory(watch, writer, load.writer_mib, rest));
    }
    if load.disk {
        threads.spawn(|| disk(watch, Path::new("/mnt/blocks")));
    }
    if let Some(server) = load.server {
        threads.spawn(|| stream(watch, server));
    }
    threads.spawn(|| listen(watch));
}

/// No vCPU sees a monotonic clock behind what another has seen, nor a wall clock that goes back.
fn clocks(watch: &Watch, cpu: usize) {
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
        sleep(Duration::from_millis(1));
    }
}

/// Every word of a block of memory has what the pass before wrote there, and gets something new.
fn memory(watch: &Watch, writer: u32, mib: u32, rest: Duration) {
    let key = mix(u64::from(writer) << 32);
    let mut words = vec![0_u64; usize::try_from(mib).unwrap() << 17];
    let mut last = None;
    while watch.goes_on() {
        let pass = last.map_or(key, |last: u64| last.wrapping_add(key | 1));
        let mut wrong = None;
        for (at, word) in words.iter_mut().enumerate() {
            let place = (at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            if last.map_or(0, |last| last ^ place) != *word {
                wrong = Some((at, *word));
            }
            *word = pass ^ place;
        }
        if let Some((at, word)) = wrong {
            watch.fault(&format!("memory: word {at} of writer {writer} was {word:#x}"));
        }
        last = Some(pass);
        watch.passes.fetch_add(1, Ordering::Relaxed);
        words = std::hint::black_box(words);
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

/// Blocks go to the server, which answers with its time and a block of its own; both ends check all of it.
/// What the answers say of this clock is told now and then.
fn stream(watch: &Watch, server: &str) {
    if let Err(e) = try_stream(watch, server) {
        watch.fault(&format!("stream: {e}"));
    }
}

fn try_stream(watch: &Watch, server: &str) -> std::io::Result<()> {
    let mut stream = TcpStream::connect(server)?;
    let mut answer = vec![0; WORD + STREAM_LEN];
    let mut told = Instant::now();
    let mut best: Option<(u64, i64)> = None;
    let mut number = 0;
    while watch.goes_on() {
        let mut request = real_ns().to_le_bytes().to_vec();
        request.extend(block(number, STREAM_LEN));
        let before = real_ns();
        stream.write_all(&request)?;
        stream.read_exact(&mut answer)?;
        let after = real_ns();
        let there = u64::from_le_bytes(answer[..WORD].try_into().unwrap());
        if answer[WORD..] != block(!number, STREAM_LEN) {
            watch.fault(&format!("stream: answer {number} isn't what was sent"));
        }
        let ahead = (before.midpoint(after).cast_signed() - there.cast_signed()) / 1000;
        let error = (after - before) / 2000;
        if best.is_none_or(|(least, _)| error < least) {
            best = Some((error, ahead));
        }
        if let (Some((error, ahead)), true) = (best, told.elapsed() > Duration::from_millis(500)) {
            println!("clock {ahead} {error}");
            (told, best) = (Instant::now(), None);
        }
        number += 1;
        watch.stream_blocks.store(number, Ordering::Relaxed);
        sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Lines typed on the console are numbered, and none is lost, doubled or changed. "end" ends the program.
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
                println!("heard {next}");
                next += 1;
                continue;
            }
            Ok(_) => watch.fault(&format!("console: {line:?} isn't line {next}")),
        }
        watch.stop.store(true, Ordering::Relaxed);
    }
}

/// The other end of [`stream`]: serves one connection until its end; says how many blocks came, or what was
/// wrong.
pub fn serve(listener: std::net::TcpListener) -> std::thread::JoinHandle<Result<u64, String>> {
    spawn(move || {
        let (mut stream, _) = listener.accept().map_err(|e| e.to_string())?;
        let mut request = vec![0; WORD + STREAM_LEN];
        for number in 0.. {
            match stream.read(&mut request[..1]) {
                Ok(0) => return Ok(number),
                Ok(_) => {}
                Err(e) => return Err(format!("block {number}: {e}")),
            }
            stream.read_exact(&mut request[1..]).map_err(|e| format!("block {number}: {e}"))?;
            if request[WORD..] != block(number, STREAM_LEN) {
                return Err(format!("block {number} isn't what the guest sent"));
            }
            let mut answer = real_ns().to_le_bytes().to_vec();
            answer.extend(block(!number, STREAM_LEN));
            stream.write_all(&answer).map_err(|e| format!("answer {number}: {e}"))?;
        }
        unreachable!("numbers don't end")
    })
}
