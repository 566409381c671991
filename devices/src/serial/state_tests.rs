//! Tests of the serial port's saved state: frozen bytes, what moves, and what no driver and no state can do.

use proptest::prelude::*;
use vmm_migration::state::{Saved, Section, Stateful};

use super::*;

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
    let mut destination = Bench::new();
    destination.serial.restore_section(&section).unwrap();
    assert_eq!(destination.serial.save().unwrap(), b.serial.save().unwrap());
    assert_eq!(destination.serial.save_as(0, 1).unwrap(), section);
    // What has no place in it is left out.
    assert_eq!(b.serial.keep(b"typed"), 5);
    assert_eq!(b.serial.save_as(0, 1).unwrap(), section);
    assert!(b.serial.save_as(0, 3).is_err() && b.serial.save_as(0, 0).is_err());
    let cut = Section { body: golden[..11].to_vec(), ..section };
    assert!(destination.serial.restore_section(&cut).is_err());
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
    let mut destination = Bench::new();
    destination.serial.restore_section(&source.serial.save_section(0).unwrap()).unwrap();
    destination.serial.resume();
    assert_eq!(destination.serial.input(&typed[150..]), 0, "what waits comes first");
    let (mut read, mut rest) = (Vec::new(), &typed[150..]);
    while destination.read(LSR) & LSR_DATA != 0 {
        read.push(destination.read(DATA));
        if destination.counters.wanted.swap(0, Ordering::SeqCst) > 0 {
            rest = &rest[destination.serial.input(rest)..];
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

    let mut destination = Bench::new();
    destination.serial.restore_section(&section).unwrap();
    assert_eq!(destination.serial.save_section(0).unwrap(), section);
    destination.serial.resume();
    assert!(destination.edges() >= 1);
    assert_eq!(destination.read(IIR), IIR_FIFO | IIR_RECEIVE);
    let read: Vec<u8> = (0..10).map(|_| destination.read(DATA)).collect();
    assert_eq!(read, b"yped ahead");
    assert_eq!(destination.read(IIR), IIR_FIFO | IIR_TRANSMIT, "this side's wire has room");
    assert!(destination.output().is_empty(), "what was sent stays with the source");
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
        let mut destination = Bench::new();
        destination.serial.restore(state.clone()).unwrap();
        prop_assert_eq!(destination.serial.save().unwrap(), state);
    }
}
