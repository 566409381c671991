//! Tests of the entropy device behind its transport.

use super::*;
use crate::bus::BusDevice;
use crate::virtio::core::status;
use crate::virtio::testing::{Buf, Driver, moved, ram};
use vm_memory::{Bytes, GuestAddress};

const DATA: u64 = 0x8000;

#[test]
fn buffers_come_back_full_of_random_bytes() {
    let ram = ram(0x2_0000);
    let mut driver = Driver::new(Box::<Rng>::default(), &ram);
    let mut ring = driver.start(0x1000, &[8], 0).remove(0);
    let head = ring.add(&[Buf::writable(DATA, 300), Buf::writable(DATA + 0x1000, 40)]);
    driver.notify(0);
    assert_eq!(ring.pop_used(), Some((head, 340)));
    let mut data = [0; 300];
    ram.read_slice(&mut data, GuestAddress(DATA)).unwrap();
    // The chance of a piece of zeroes this long is nil: 2^-800.
    assert!(data.chunks(100).all(|c| c.iter().any(|b| *b != 0)));
    let after = ram.read_obj::<[u8; 4]>(GuestAddress(DATA + 300)).unwrap();
    assert_eq!(after, [0; 4], "nothing past the buffer");
}

#[test]
fn one_request_is_bounded() {
    let ram = ram(0x2_0000);
    let mut driver = Driver::new(Box::<Rng>::default(), &ram);
    let mut ring = driver.start(0x1000, &[8], 0).remove(0);
    ring.add(&[Buf::writable(DATA, 0x1_0000)]);
    driver.notify(0);
    assert_eq!(ring.pop_used().unwrap().1 as usize, REQUEST_LEN_MAX);
}

#[test]
fn buffers_that_cannot_be_filled_break_the_device() {
    let bad: [&[Buf]; 3] = [
        &[Buf::readable(DATA, 8)],
        &[Buf::readable(DATA, 8), Buf::writable(DATA, 8)],
        &[Buf::writable(DATA, 0)],
    ];
    for bufs in bad {
        let ram = ram(0x2_0000);
        let mut driver = Driver::new(Box::<Rng>::default(), &ram);
        let mut ring = driver.start(0x1000, &[8], 0).remove(0);
        ring.add(bufs);
        driver.notify(0);
        assert_eq!(ring.pop_used(), None);
        assert_ne!(driver.status() & status::NEEDS_RESET, 0);
    }
}

#[test]
fn it_works_on_after_a_move() {
    let ram = ram(0x2_0000);
    let mut source = Driver::new(Box::<Rng>::default(), &ram);
    let mut ring = source.start(0x1000, &[8], 0).remove(0);
    ring.add(&[Buf::writable(DATA, 8)]);
    source.notify(0);
    assert!(ring.pop_used().is_some());
    let head = ring.add(&[Buf::writable(DATA, 8)]);
    let mut destination = moved(&mut source, Box::<Rng>::default());
    destination.device.resume();
    destination.io.run();
    assert_eq!(ring.pop_used(), Some((head, 8)));
}
