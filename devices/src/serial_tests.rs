//! Tests of the serial port, seen from the driver's side and from the console's; those of its saved state are in
//! `serial/state_tests.rs`.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use super::*;

#[derive(Default)]
struct Counters {
    edges: AtomicU32,
    full: AtomicBool,
    wanted: AtomicU32,
}

impl IrqLine for Counters {
    fn trigger(&self) {
        self.edges.fetch_add(1, Ordering::SeqCst);
    }
}

struct TestWire(Arc<Counters>, Sender<u8>);

impl Wire for TestWire {
    fn push(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|b| self.1.send(*b).unwrap());
    }

    fn room(&self) -> bool {
        !self.0.full.load(Ordering::SeqCst)
    }

    fn input_wanted(&self) {
        self.0.wanted.fetch_add(1, Ordering::SeqCst);
    }
}

struct Bench {
    serial: Serial,
    counters: Arc<Counters>,
    out: Receiver<u8>,
}

impl Bench {
    fn new() -> Self {
        let counters = Arc::new(Counters::default());
        let (sent, out) = channel();
        let wire = Box::new(TestWire(Arc::clone(&counters), sent));
        Self { serial: Serial::new(counters.clone(), wire, Arc::default()), counters, out }
    }

    fn read(&mut self, register: u8) -> u8 {
        let mut byte = [0];
        self.serial.read(register.into(), &mut byte);
        byte[0]
    }

    fn write(&mut self, register: u8, value: u8) {
        self.serial.write(register.into(), &[value]);
    }

    /// Edges since the last call.
    fn edges(&self) -> u32 {
        self.counters.edges.swap(0, Ordering::SeqCst)
    }

    fn wanted(&self) -> u32 {
        self.counters.wanted.swap(0, Ordering::SeqCst)
    }

    fn set_full(&self, full: bool) {
        self.counters.full.store(full, Ordering::SeqCst);
    }

    fn output(&self) -> Vec<u8> {
        self.out.try_iter().collect()
    }
}

#[test]
fn output_reaches_the_wire_with_one_edge_until_it_is_seen() {
    let mut b = Bench::new();
    b.write(IER, IER_TRANSMIT);
    assert_eq!(b.edges(), 1, "an empty transmitter interrupts as soon as it may");
    assert_eq!(b.read(IIR) & 0xf, IIR_TRANSMIT);
    assert_eq!(b.read(IIR) & 0xf, IIR_NONE, "the read has cleared it");
    for byte in b"burst" {
        b.write(DATA, *byte);
    }
    assert_eq!(b.edges(), 1);
    assert_eq!(b.read(IIR) & 0xf, IIR_TRANSMIT);
    assert_eq!(b.output(), b"burst");
    assert_eq!(b.read(IER), IER_TRANSMIT);
}

#[test]
fn enabling_the_transmit_interrupt_again_interrupts_again() {
    let mut b = Bench::new();
    b.write(IER, IER_TRANSMIT);
    b.write(IER, 0);
    assert_eq!(b.read(IIR) & 0xf, IIR_NONE);
    b.write(IER, IER_TRANSMIT);
    assert_eq!(b.edges(), 2);
    b.write(IER, IER_TRANSMIT);
    assert_eq!(b.edges(), 0, "nothing changed");
}

#[test]
fn a_full_wire_reads_as_busy_and_withholds_the_interrupt() {
    let mut b = Bench::new();
    b.write(IER, IER_TRANSMIT);
    b.read(IIR);
    b.edges();
    b.set_full(true);
    assert_eq!(b.read(LSR) & LSR_EMPTY, 0);
    b.write(DATA, b'x');
    assert_eq!(b.output(), b"x", "what is written all the same is taken");
    assert_eq!((b.edges(), b.read(IIR) & 0xf), (0, IIR_NONE));
    b.serial.output_drained();
    assert_eq!(b.edges(), 0, "still full");
    b.set_full(false);
    b.serial.output_drained();
    assert_eq!(b.edges(), 1);
    assert_eq!(b.read(IIR) & 0xf, IIR_TRANSMIT);
    assert_eq!(b.read(LSR) & LSR_EMPTY, LSR_EMPTY);
    b.serial.output_drained();
    assert_eq!(b.edges(), 0, "nothing was withheld");
}

#[test]
fn a_withheld_interrupt_is_dropped_when_it_is_disabled() {
    let mut b = Bench::new();
    b.set_full(true);
    b.write(IER, IER_TRANSMIT);
    b.write(IER, 0);
    b.set_full(false);
    b.serial.output_drained();
    assert_eq!(b.edges(), 0);
}

#[test]
fn input_waits_until_the_guest_listens() {
    let mut b = Bench::new();
    assert_eq!(b.serial.input(b"early"), 0);
    // What Linux does when it opens the port: clear the FIFO, read registers, enable the interrupt.
    b.write(FCR, FCR_ENABLE | FCR_CLEAR_RECEIVE);
    for register in [LSR, DATA, IIR, 6] {
        b.read(register);
    }
    assert_eq!(b.wanted(), 0);
    b.write(IER, IER_RECEIVE);
    assert_eq!(b.wanted(), 1);
    assert_eq!(b.serial.input(b"early"), 5);
    assert_eq!(b.edges(), 1);
    assert_eq!(b.read(IIR), IIR_FIFO | IIR_RECEIVE);
    let read: Vec<u8> = (0..5).map(|_| b.read(DATA)).collect();
    assert_eq!(read, b"early");
    assert_eq!(b.read(LSR) & LSR_DATA, 0);
}

#[test]
fn polling_the_line_status_is_listening_and_sending_is_not() {
    let mut b = Bench::new();
    assert_eq!(b.serial.input_room(), 0);
    for byte in b"a kernel's console polls before each byte" {
        assert_ne!(b.read(LSR) & LSR_EMPTY, 0);
        b.write(DATA, *byte);
    }
    assert_eq!(b.serial.input_room(), 0);
    b.set_full(true);
    b.read(LSR);
    b.read(LSR);
    b.set_full(false);
    assert_eq!((b.read(LSR) & LSR_EMPTY, b.wanted()), (LSR_EMPTY, 0), "waited for room");
    b.read(LSR);
    assert_eq!(b.wanted(), 1);
    assert_eq!(b.serial.input(b"k"), 1);
    assert_eq!((b.read(LSR) & LSR_DATA, b.read(DATA)), (LSR_DATA, b'k'));
}

#[test]
fn a_full_fifo_refuses_and_asks_again_when_it_is_empty() {
    let mut b = Bench::new();
    b.write(IER, IER_RECEIVE);
    let typed: Vec<u8> = (0..100).collect();
    assert_eq!(b.serial.input(&typed), FIFO_LEN);
    assert_eq!(b.serial.input(&typed[FIFO_LEN..]), 0);
    for byte in &typed[..FIFO_LEN - 1] {
        assert_eq!(b.read(DATA), *byte);
    }
    assert_eq!(b.wanted(), 0);
    assert_eq!(b.read(DATA), 63);
    assert_eq!(b.wanted(), 1);
    assert_eq!(b.serial.input(&typed[FIFO_LEN..]), 36);
    assert_eq!(b.read(DATA), 64);
}

#[test]
fn received_data_goes_before_an_empty_transmitter_and_stays_until_read() {
    let mut b = Bench::new();
    b.write(IER, IER_RECEIVE | IER_TRANSMIT);
    assert_eq!(b.serial.input(b"in"), 2);
    assert_eq!(b.edges(), 2);
    assert_eq!(b.read(IIR) & 0xf, IIR_RECEIVE);
    assert_eq!(b.read(DATA), b'i');
    assert_eq!(b.read(IIR) & 0xf, IIR_RECEIVE, "the level is still up");
    assert_eq!(b.read(DATA), b'n');
    assert_eq!(b.read(IIR) & 0xf, IIR_TRANSMIT);
    assert_eq!(b.read(IIR) & 0xf, IIR_NONE);
}

#[test]
fn a_new_byte_gives_a_new_edge_after_the_last_one_was_seen() {
    let mut b = Bench::new();
    b.write(IER, IER_RECEIVE);
    b.serial.input(b"1");
    b.serial.input(b"2");
    assert_eq!(b.edges(), 1);
    b.read(IIR);
    b.serial.input(b"3");
    assert_eq!(b.edges(), 1);
}

#[test]
fn loopback_returns_bytes_and_sends_none() {
    let mut b = Bench::new();
    b.write(IER, IER_RECEIVE);
    b.write(MCR, MCR_LOOP | 0xb);
    assert_eq!(b.serial.input(b"typed"), 0, "the line is cut");
    b.write(DATA, 0x5a);
    assert_eq!((b.read(LSR) & LSR_DATA, b.read(DATA)), (LSR_DATA, 0x5a));
    assert!(b.output().is_empty());
    b.write(MCR, 0xb);
    assert_eq!(b.wanted(), 1);
}

#[test]
fn the_divisor_latch_hides_data_and_interrupt_enable() {
    let mut b = Bench::new();
    b.write(IER, IER_RECEIVE);
    b.serial.input(b"k");
    b.write(LCR, LCR_DLAB | 3);
    b.write(DATA, 0x01);
    b.write(IER, 0x02);
    assert_eq!((b.read(DATA), b.read(IER)), (1, 2));
    b.write(FCR, FCR_ENABLE);
    b.write(FCR, 0);
    assert_eq!(b.read(LCR), LCR_DLAB | 3);
    b.write(LCR, 3);
    assert!(b.output().is_empty());
    assert_eq!(b.read(IER), IER_RECEIVE);
    assert_eq!(b.read(LSR) & LSR_DATA, 0, "the FIFO was cleared");
}

#[test]
fn linux_finds_a_16550a() {
    let mut b = Bench::new();
    assert_eq!(b.read(IIR) >> 6, 0, "a 16450 before the FIFOs are on");
    b.write(FCR, FCR_ENABLE);
    assert_eq!(b.read(IIR) >> 6, 3);
    b.write(7, 0xa5);
    assert_eq!(b.read(7), 0xa5);
}

#[test]
fn wide_accesses_are_split_over_the_ports() {
    let mut b = Bench::new();
    b.serial.write(6, &[0xff, 0x77]);
    let mut word = [0; 2];
    b.serial.read(6, &mut word);
    assert_eq!(word[1], 0x77);
    b.serial.write(7, &[0x66, 1, 2, 3]);
    let mut long = [0; 8];
    b.serial.read(7, &mut long);
    assert_eq!(long[0], 0x66);
}

#[path = "serial/state_tests.rs"]
mod state_tests;
