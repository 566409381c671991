//! Tests of the serial port, seen from the driver's side and from the console's.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use proptest::prelude::*;
use vmm_migration::state::{Saved, Section, Stateful};

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

/// A port with something in every field but what waits, and the golden bytes of version 1 of its state.
fn configured() -> (Bench, &'static [u8]) {
    let mut b = Bench::new();
    b.write(LCR, LCR_DLAB);
    b.write(DATA, 1);
    b.write(IER, 0);
    b.write(LCR, 3);
    b.write(FCR, FCR_ENABLE);
    b.write(MCR, 0xb);
    b.write(7, 0x42);
    b.write(IER, 5);
    b.serial.input(b"ls\n");
    (b, &[1, 0, 5, 3, 0xb, 0x42, 1, 0, 3, b'l', b's', b'\n'])
}

#[test]
fn version_1_is_frozen_read_and_written() {
    let (mut b, golden) = configured();
    let section = b.serial.save_as(0, 1).unwrap();
    assert_eq!((section.kind.as_str(), section.version), ("serial", 1));
    assert_eq!(section.body, golden);
    // An old source's, and back to an old destination.
    let mut target = Bench::new();
    target.serial.restore_section(&section).unwrap();
    assert_eq!(target.serial.save().unwrap(), b.serial.save().unwrap());
    assert_eq!(target.serial.save_as(0, 1).unwrap(), section);
    // What has no place in it is left out.
    assert_eq!(b.serial.keep(b"typed"), 5);
    assert_eq!(b.serial.save_as(0, 1).unwrap(), section);
    assert!(b.serial.save_as(0, 3).is_err() && b.serial.save_as(0, 0).is_err());
    let cut = Section { body: golden[..11].to_vec(), ..section };
    assert!(target.serial.restore_section(&cut).is_err());
}

#[test]
fn version_2_is_frozen() {
    let (mut b, golden) = configured();
    b.serial.keep(b"more");
    let section = b.serial.save_section(0).unwrap();
    assert_eq!((section.kind.as_str(), section.version), ("serial", 2));
    assert_eq!(section.body, [golden, &[4, b'm', b'o', b'r', b'e']].concat());
}

/// Typed to a guest that doesn't look, which then moves: not a byte is lost, doubled, or out of order.
#[test]
fn what_waits_moves_and_comes_before_what_is_typed_there() {
    let typed: Vec<u8> = (0..200).collect();
    let mut source = Bench::new();
    source.write(FCR, FCR_ENABLE);
    source.write(IER, IER_RECEIVE);
    let taken = source.serial.input(&typed[..150]);
    source.serial.keep(&typed[taken..150]);
    let mut target = Bench::new();
    target.serial.restore_section(&source.serial.save_section(0).unwrap()).unwrap();
    target.serial.resume();
    assert_eq!(target.serial.input(&typed[150..]), 0, "what waits comes first");
    let (mut read, mut rest) = (Vec::new(), &typed[150..]);
    while target.read(LSR) & LSR_DATA != 0 {
        read.push(target.read(DATA));
        if target.counters.wanted.swap(0, Ordering::SeqCst) > 0 {
            rest = &rest[target.serial.input(rest)..];
        }
    }
    assert_eq!(read, typed);
}

#[test]
fn no_more_waits_than_may() {
    let mut b = Bench::new();
    assert_eq!(b.serial.keep(&[b'x'; WAITING_LEN_MAX]), WAITING_LEN_MAX);
    assert_eq!(b.serial.keep(b"y"), 0);
    let state = b.serial.save().unwrap();
    b.serial.restore(SerialStateV2 { waiting: vec![0; WAITING_LEN_MAX + 1], ..state }).unwrap_err();
}

#[test]
fn registers_input_and_interrupts_move() {
    let mut source = Bench::new();
    source.write(FCR, FCR_ENABLE);
    source.write(IER, IER_RECEIVE | IER_TRANSMIT);
    source.serial.input(b"typed ahead");
    source.set_full(true);
    source.read(DATA);
    source.write(DATA, b'x');
    assert_eq!(source.serial.transmit, Transmit::Withheld);
    let section = source.serial.save_section(0).unwrap();

    let mut target = Bench::new();
    target.serial.restore_section(&section).unwrap();
    assert_eq!(target.serial.save_section(0).unwrap(), section);
    target.serial.resume();
    assert!(target.edges() >= 1);
    assert_eq!(target.read(IIR), IIR_FIFO | IIR_RECEIVE);
    let read: Vec<u8> = (0..10).map(|_| target.read(DATA)).collect();
    assert_eq!(read, b"yped ahead");
    assert_eq!(target.read(IIR), IIR_FIFO | IIR_TRANSMIT, "this side's wire has room");
    assert!(target.output().is_empty(), "what was sent stays with the source");
}

#[test]
fn impossible_states_are_refused() {
    let good = Bench::new().serial.save().unwrap();
    let mut b = Bench::new();
    let long = SerialStateV1 { input: vec![0; FIFO_LEN + 1], ..good.v1.clone() };
    let odd = SerialStateV1 { interrupt_enable: 0x10, ..good.v1.clone() };
    assert!([long, odd].into_iter().all(|state| b.serial.restore(state.into()).is_err()));
    b.serial.restore(good).unwrap();
}

proptest! {
    /// Whatever a driver does, the device neither panics nor loses a byte that was sent, and its
    /// state survives a move.
    #[test]
    fn any_driver_is_survived(
        accesses in prop::collection::vec((any::<bool>(), 0u64..8, any::<u8>(), 0u8..8), 0..200)
    ) {
        let mut b = Bench::new();
        let mut sent = 0;
        for (write, register, value, other) in accesses {
            let (latched, looped) = (b.serial.divisor_latched(), b.serial.looped());
            if write {
                b.serial.write(register, &[value]);
                sent += usize::from(register == 0 && !latched && !looped);
            } else {
                b.serial.read(register, &mut [0]);
            }
            match other {
                0 => b.set_full(true),
                1 => { b.set_full(false); b.serial.output_drained(); }
                2 => { b.serial.input(&[value; 7]); }
                3 => { b.serial.keep(&[value; 100]); }
                _ => {}
            }
        }
        prop_assert_eq!(b.output().len(), sent);
        let state = b.serial.save().unwrap();
        let mut target = Bench::new();
        target.serial.restore(state.clone()).unwrap();
        prop_assert_eq!(target.serial.save().unwrap(), state);
    }
}
