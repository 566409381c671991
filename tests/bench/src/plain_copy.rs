//! What a migration's throughput is held against: the same memory, copied through the same kind of socket.

use std::io::{self, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Instant;

/// How much goes in one call, in bytes.
const PIECE_LEN: usize = 1 << 20;

/// MiB per second from a memory over TCP's loopback; `take` takes so many bytes to so far into another.
pub fn plain_copy(
    memory: &[u8],
    mut take: impl FnMut(&mut TcpStream, usize, usize) -> io::Result<()>,
) -> io::Result<f64> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut from = TcpStream::connect(listener.local_addr()?)?;
    let mut to = listener.accept()?.0;
    let start = Instant::now();
    std::thread::scope(|scope| {
        let sender = scope
            .spawn(move || memory.chunks(PIECE_LEN).try_for_each(|piece| from.write_all(piece)));
        let taken = (0..memory.len())
            .step_by(PIECE_LEN)
            .try_for_each(|at| take(&mut to, at, PIECE_LEN.min(memory.len() - at)));
        // Or else a sender whose bytes nobody takes would wait for ever.
        drop(to);
        taken.and(sender.join().map_err(|_| io::Error::other("the sender panicked"))?)
    })
    .map(|()| memory.len() as f64 / f64::from(1 << 20) / start.elapsed().as_secs_f64())
}
