//! Tests of chains as devices use them.

use super::*;
use crate::virtio::queue::QueueIo;
use crate::virtio::testing::{Buf, DriverRing, ram};
use proptest::prelude::*;

fn popped(ram: &GuestRam, ring: &DriverRing) -> Chain {
    let mut queues = [ring.device_queue(false)];
    QueueIo::new(ram, &mut queues).pop(0).unwrap().expect("a chain is available")
}

#[test]
fn data_is_copied_across_buffers() {
    let ram = ram(0x1_0000);
    let mut ring = DriverRing::new(&ram, 0x1000, 8);
    ram.write_slice(b"hello, ", GuestAddress(0x8000)).unwrap();
    ram.write_slice(b"world", GuestAddress(0x9000)).unwrap();
    ring.add(&[
        Buf::readable(0x8000, 7),
        Buf::readable(0x9000, 5),
        Buf::writable(0xa000, 3),
        Buf::writable(0xb000, 0),
        Buf::writable(0xc000, 2),
    ]);
    let chain = popped(&ram, &ring);
    assert_eq!(chain.writable.len(), 2, "empty buffers vanish");
    let mut data = [0; 8];
    chain.copy_from(&ram, 4, &mut data).unwrap();
    assert_eq!(&data, b"o, world");
    assert!(chain.copy_from(&ram, 5, &mut data).is_err());
    assert!(chain.copy_from(&ram, usize::MAX, &mut data).is_err());
    chain.copy_from(&ram, 12, &mut []).unwrap();
    chain.copy_to(&ram, 2, b"xyz").unwrap();
    assert_eq!(ram.read_obj::<u8>(GuestAddress(0xa002)).unwrap(), b'x');
    assert_eq!(ram.read_obj::<[u8; 2]>(GuestAddress(0xc000)).unwrap(), *b"yz");
    assert!(chain.copy_to(&ram, 3, b"xyz").is_err());
}

#[test]
fn slices_cut_at_both_ends_and_at_regions() {
    let regions = [(GuestAddress(0), 0x8000), (GuestAddress(0x8000), 0x8000)];
    let ram = GuestRam::from_ranges(&regions).unwrap();
    let mut ring = DriverRing::new(&ram, 0x1000, 8);
    ring.add(&[Buf::readable(0x7ff0, 0x20), Buf::readable(0x9000, 0x10)]);
    let chain = popped(&ram, &ring);
    let mut out = Vec::new();
    chain.readable.slices(&ram, 0x8, 0x20, &mut out).unwrap();
    assert_eq!(out.iter().map(|s| s.len()).collect::<Vec<_>>(), [0x8, 0x10, 0x8]);
    out.clear();
    assert!(chain.readable.slices(&ram, 0x8, 0x29, &mut out).is_err());
}

#[test]
fn indirect_chains_may_outgrow_a_ring_that_the_driver_made_smaller() {
    let ram = ram(0x1_0000);
    let mut ring = DriverRing::new(&ram, 0x1000, 16);
    let head = ring.add_indirect(0x4000, &[Buf::readable(0x8000, 4); 12]);
    let mut queue = ring.device_queue(false);
    queue.set_size(8);
    let chain = Chain::walk(&ram, &queue, head).unwrap();
    assert_eq!((chain.readable.len(), chain.readable_len()), (12, 48));
    let head = ring.add_indirect(0x4000, &[Buf::readable(0x8000, 4); 17]);
    assert!(Chain::walk(&ram, &queue, head).is_err());
}

#[test]
fn a_chain_of_more_than_4_gib_is_refused() {
    let ram = ram(0x1_0000);
    let mut ring = DriverRing::new(&ram, 0x1000, 4);
    let head = ring.add(&[Buf::readable(0, 0x1_0000), Buf::readable(0, 0xffff_0000)]);
    let why = Chain::walk(&ram, &ring.device_queue(false), head).unwrap_err();
    assert_eq!(why, "a chain of more than 4 GiB");
}

proptest! {
    #[test]
    fn spans_of_any_number_read_back_as_written(
        lens in prop::collection::vec(1..40u32, 1..30),
        offset in 0..400usize,
        len in 0..400usize,
    ) {
        let ram = ram(0x1_0000);
        let mut spans = Spans::default();
        for (i, len) in (0u64..).zip(&lens) {
            spans.push(Span { addr: GuestAddress(0x1000 + 0x100 * i), len: *len });
        }
        let total: u32 = lens.iter().sum();
        prop_assert_eq!(spans.len(), lens.len());
        prop_assert_eq!(spans.total_len(), total as usize);
        let data: Vec<u8> = (0..len).map(|i| u8::try_from(i % 251).unwrap()).collect();
        let fits = len == 0 || offset + len <= total as usize;
        prop_assert_eq!(spans.copy_to(&ram, offset, &data).is_ok(), fits);
        let mut back = vec![0; len];
        prop_assert_eq!(spans.copy_from(&ram, offset, &mut back).is_ok(), fits);
        if fits {
            prop_assert_eq!(back, data);
        }
    }
}
