//! The program inside the guests: it reads and writes the disk, sends and receives over TCP, or beats.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use crate::Result;
use crate::process::until;

/// Bytes of a read or a write.
const PIECE: usize = 1 << 20;
/// A beat that comes later than this says so. Under emulation the timer alone is off by milliseconds.
const GAP_MIN: Duration = Duration::from_millis(12);
const PAGE: usize = 4096;

/// `bench guest ROLE ...`
pub fn run(words: &[&str]) -> Result<()> {
    match *words {
        ["disk", path] => disk(path),
        ["net", address, mib] => net(address, mib.parse()?),
        ["beat", period_ms, dirty_mib] => beat(period_ms.parse()?, dirty_mib.parse()?),
        _ => Err("bench guest: disk PATH | net ADDRESS MIB | beat PERIOD_MS DIRTY_MIB".into()),
    }
}

/// Tells how long so many bytes took.
fn tell(what: &str, bytes: usize, start: Instant) {
    println!("result {what} {bytes} {}", start.elapsed().as_micros());
}

/// Reads a disk from its start to its end, then writes it and has it written through; then once more past the
/// page cache, whose work on each page is most of what the first way takes.
fn disk(path: &str) -> Result<()> {
    // The driver may still be looking for it.
    until("appears", || std::fs::metadata(path).is_ok())?;
    let mut file = OpenOptions::new().read(true).write(true).open(path)?;
    let (mut piece, mut bytes) = (vec![0; PIECE], 0);
    let start = Instant::now();
    while let count @ 1.. = file.read(&mut piece)? {
        bytes += count;
    }
    tell("read", bytes, start);
    let mut file = OpenOptions::new().write(true).open(path)?;
    piece.fill(0x5a);
    let start = Instant::now();
    for _ in 0..bytes / PIECE {
        file.write_all(&piece)?;
    }
    file.sync_all()?;
    tell("write", bytes, start);
    let mut file = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(path)?;
    piece.resize(PIECE + PAGE, 0x5a);
    let aligned = piece.as_ptr().align_offset(PAGE);
    let start = Instant::now();
    for _ in 0..bytes / PIECE {
        file.write_all(&piece[aligned..aligned + PIECE])?;
    }
    file.sync_all()?;
    tell("direct", bytes, start);
    Ok(())
}

/// Sends to port 5001 until it has been read there, and receives from port 5002.
fn net(address: &str, mib: usize) -> Result<()> {
    let mut piece = vec![0x5a; PIECE];
    let mut stream = TcpStream::connect((address, 5001))?;
    let start = Instant::now();
    for _ in 0..mib {
        stream.write_all(&piece)?;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    // The other end closes when it has all.
    stream.read_to_end(&mut Vec::new())?;
    tell("send", mib * PIECE, start);
    let mut stream = TcpStream::connect((address, 5002))?;
    let (start, mut bytes) = (Instant::now(), 0);
    while let count @ 1.. = stream.read(&mut piece)? {
        bytes += count;
    }
    tell("receive", bytes, start);
    Ok(())
}

/// Prints a dot each period, or how late it is; meanwhile writes to so much memory without pause.
fn beat(period_ms: u64, dirty_mib: usize) -> Result<()> {
    let mut console = OpenOptions::new().write(true).open("/dev/console")?;
    if dirty_mib > 0 {
        let mut memory = vec![1_u8; dirty_mib << 20];
        std::thread::spawn(move || {
            loop {
                for page in memory.chunks_mut(PAGE) {
                    page[0] = std::hint::black_box(page[0]).wrapping_add(1);
                }
            }
        });
    }
    console.write_all(b"\nbeats\n")?;
    let mut last = Instant::now();
    loop {
        std::thread::sleep(Duration::from_millis(period_ms));
        let now = Instant::now();
        let gap = now - last;
        last = now;
        if gap >= GAP_MIN {
            console.write_all(format!("\ngap {}\n", gap.as_micros()).as_bytes())?;
        } else {
            console.write_all(b".")?;
        }
    }
}
