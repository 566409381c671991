//! The TCP stream between the program in a guest and a server outside: numbered blocks both ways, checked at
//! both ends, and what the server's answers say of the guest's clock.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::Ordering;
use std::thread::{sleep, spawn};
use std::time::{Duration, Instant};

use super::{WORD, Watch, block, real_ns};

/// Bytes of a block on the network.
const STREAM_LEN: usize = 32 << 10;

/// What the guest's program said of its clock: how far it is ahead of the server's, and by how much that
/// may be wrong, in microseconds.
#[derive(Clone, Copy, Debug)]
pub struct ClockWord {
    pub ahead_us: i64,
    pub error_us: i64,
}

impl ClockWord {
    /// What such a line says.
    pub fn parse(line: &str) -> Option<Self> {
        let (ahead, error) = line.trim_end().strip_prefix("clock ")?.split_once(' ')?;
        Some(Self { ahead_us: ahead.parse().ok()?, error_us: error.parse().ok()? })
    }
}

/// Blocks go to the server, which answers with its time and a block of its own; both ends check all of it.
/// What the answers say of this clock is told now and then.
pub(super) fn stream(watch: &Watch, server: &str, rest: Duration) {
    if let Err(e) = try_stream(watch, server, rest) {
        watch.fault(&format!("stream: {e}"));
    }
}

fn try_stream(watch: &Watch, server: &str, rest: Duration) -> std::io::Result<()> {
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
        sleep(rest);
    }
    Ok(())
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
