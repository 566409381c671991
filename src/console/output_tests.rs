//! Tests of the output side: order, flow, loss that is told, clients that come and go.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::sync::mpsc::channel;

use super::*;

const LONG: Duration = Duration::from_secs(20);

fn notice() -> Arc<Notice> {
    Arc::new(Notice::new().unwrap())
}

fn pipe() -> (File, Sink) {
    let (read, write) = rustix::pipe::pipe().unwrap();
    (File::from(read), Sink::File(File::from(write)))
}

fn eventually(mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < LONG, "it never came");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn every_byte_arrives_in_order_and_close_ends_the_thread() {
    let (mut reader, sink) = pipe();
    let output = Output::start(sink, notice()).unwrap();
    let mut wire = output.wire();
    let text: Vec<u8> = (0..10_000u32).flat_map(|i| format!("{i}\n").into_bytes()).collect();
    let copy = text.clone();
    let pusher = std::thread::spawn(move || {
        for byte in &copy {
            while !wire.room() {
                std::thread::yield_now();
            }
            wire.push(&[*byte]);
        }
    });
    let mut read = vec![0; text.len()];
    reader.read_exact(&mut read).unwrap();
    assert!(read == text);
    pusher.join().unwrap();
    assert!(output.flush(LONG));
    output.close();
    // The thread drops its end of the pipe.
    assert_eq!(reader.read_to_end(&mut Vec::new()).unwrap(), 0);
}

#[test]
fn a_slow_reader_makes_the_guest_wait_and_notice_tells_when_to_go_on() {
    let (mut reader, sink) = pipe();
    let notice = notice();
    let output = Output::start(sink, Arc::clone(&notice)).unwrap();
    let mut wire = output.wire();
    let mut sent = 0usize;
    // The pipe holds 64 KiB; then the ring fills.
    eventually(|| {
        while wire.room() && sent < 1 << 20 {
            wire.push(&[7]);
            sent += 1;
        }
        std::thread::sleep(Duration::from_millis(5));
        !wire.room()
    });
    assert!(sent >= BUSY_FROM, "busy after {sent}");
    assert!(!output.flush(Duration::from_millis(20)));
    notice.take();
    let mut taken = vec![0; sent];
    reader.read_exact(&mut taken).unwrap();
    eventually(|| notice.take());
    assert!(wire.room() && output.flush(LONG));
}

#[test]
fn a_guest_that_never_waits_is_held_up_and_its_loss_is_told() {
    let (mut reader, sink) = pipe();
    let output = Output::start(sink, notice()).unwrap();
    let mut wire = output.wire();
    // Fill the pipe and what is taken without delay.
    eventually(|| {
        wire.push(&[b'a'; 1000]);
        output.ring.pending() >= HELD_FROM
    });
    let start = Instant::now();
    wire.push(b"b");
    assert!(start.elapsed() >= HOLD, "held up");
    assert!(start.elapsed() < LONG, "but not for long");
    let before = output.ring.pending();
    wire.push(&vec![b'c'; ring::CAPACITY]);
    assert_eq!(output.ring.pending(), ring::CAPACITY);
    let expected = format!("[vmm: {before} bytes of output lost: nobody read them]\r\n");
    let mut read = Vec::new();
    let mut chunk = [0; 4096];
    while !read.ends_with(expected.as_bytes()) {
        let count = reader.read(&mut chunk).unwrap();
        read.extend_from_slice(&chunk[..count]);
        assert!(read.len() < 2 << 20);
    }
    assert_eq!(read.iter().filter(|b| **b == b'c').count(), ring::CAPACITY - before);
}

#[test]
fn a_reader_that_is_gone_does_not_stop_the_guest() {
    let (reader, sink) = pipe();
    drop(reader);
    let output = Output::start(sink, notice()).unwrap();
    let mut wire = output.wire();
    for _ in 0..100 {
        wire.push(&[0; 1000]);
        assert!(output.flush(LONG));
        assert!(wire.room());
    }
}

#[test]
fn a_pipe_that_does_not_block_is_waited_for() {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK).unwrap();
    let write: OwnedFd = write;
    let reader = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        rustix::io::ioctl_fionbio(&read, false).unwrap();
        let mut all = Vec::new();
        File::from(read).read_to_end(&mut all).unwrap();
        all.len()
    });
    write_all(&write, &vec![1; 300_000]).unwrap();
    drop(write);
    assert_eq!(reader.join().unwrap(), 300_000);
}

#[test]
fn a_client_gets_what_was_kept_and_the_next_one_what_came_since() {
    let (arrive, arrivals) = channel();
    let output = Output::start(Sink::Clients(Clients::new(arrivals)), notice()).unwrap();
    let mut wire = output.wire();
    wire.push(b"dropped");
    wire.push(&vec![b'.'; KEPT_LEN_MAX - 5]);
    wire.push(b"login");
    assert!(output.flush(LONG), "nobody need read it");

    let (mut first, ours) = UnixStream::pair().unwrap();
    arrive.send(ours).unwrap();
    output.wake();
    let mut kept = vec![0; KEPT_LEN_MAX];
    first.read_exact(&mut kept).unwrap();
    assert!(kept.starts_with(b"....") && kept.ends_with(b".login"));
    wire.push(b": ");
    let mut live = [0; 2];
    first.read_exact(&mut live).unwrap();
    assert_eq!(&live, b": ");

    drop(first);
    wire.push(b"unseen");
    assert!(output.flush(LONG));
    let (mut second, ours) = UnixStream::pair().unwrap();
    arrive.send(ours).unwrap();
    output.wake();
    let mut kept = [0; 6];
    second.read_exact(&mut kept).unwrap();
    assert_eq!(&kept, b"unseen");
}
