//! The block device against a disk in memory: requests, errors, limits, and what a driver may get wrong.

use virtio_queue::Queue;
use vm_memory::{Bytes, GuestAddress};
use vmm_migration::state::{RestoreError, Saved};

use super::testing::MemoryDisk;
use super::*;
use crate::virtio::testing::{Buf, DriverRing, ram};

const SECTORS: u64 = 64;
const HEADER: u64 = 0x1000;
const STATUS: u64 = 0x1100;
const DATA: u64 = 0x2000;
const RING: u64 = 0x10_0000;
const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
/// What the status byte is before the device writes it.
const UNTOUCHED: u8 = 0xee;

/// A device with a driver in front of it.
struct Bench {
    ram: GuestRam,
    ring: DriverRing,
    queues: [Queue; 1],
    disk: MemoryDisk,
    device: Block,
}

impl Bench {
    fn new(disk: MemoryDisk) -> Self {
        let ram = ram(2 << 20);
        let ring = DriverRing::new(&ram, RING, 64);
        let queues = [ring.device_queue(false)];
        let mut device = Block::new("root", None, Box::new(disk.clone()));
        device.activate(FLUSH);
        Self { ram, ring, queues, disk, device }
    }

    fn process(&mut self) -> Result<(), DriverFault> {
        self.device.process(0, &mut QueueIo::new(&self.ram, &mut self.queues))
    }

    fn header(&self, kind: u32, sector: u64) {
        self.ram.write_obj(kind, GuestAddress(HEADER)).unwrap();
        self.ram.write_obj(sector, GuestAddress(HEADER + 8)).unwrap();
        self.ram.write_obj(UNTOUCHED, GuestAddress(STATUS)).unwrap();
    }

    /// One request with `data` between header and status. Returns the status and the used length.
    fn request(&mut self, kind: u32, sector: u64, data: &[Buf]) -> (u8, u32) {
        self.header(kind, sector);
        let mut bufs = vec![Buf::readable(HEADER, 16)];
        bufs.extend(data);
        bufs.push(Buf::writable(STATUS, 1));
        let head = self.ring.add(&bufs);
        self.process().unwrap();
        let (used, len) = self.ring.pop_used().expect("the request came back");
        assert_eq!(used, head);
        (self.status(), len)
    }

    fn status(&self) -> u8 {
        self.ram.read_obj(GuestAddress(STATUS)).unwrap()
    }

    /// A discard or write-zeroes of `(sector, sectors, flags)`.
    fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        for (i, (sector, sectors, flags)) in (0u64..).zip(ranges) {
            let to = DATA + 16 * i;
            self.ram.write_obj(*sector, GuestAddress(to)).unwrap();
            self.ram.write_obj(*sectors, GuestAddress(to + 8)).unwrap();
            self.ram.write_obj(*flags, GuestAddress(to + 12)).unwrap();
        }
        let len = u32::try_from(16 * ranges.len()).unwrap();
        self.request(kind, 0, &[Buf::readable(DATA, len)]).0
    }
}

const IN: u32 = 0;
const OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

#[test]
fn reads_and_writes_go_straight_to_their_sectors() {
    let mut b = Bench::new(MemoryDisk::new(SECTORS));
    let two = [Buf::writable(DATA, 512), Buf::writable(DATA + 4096, 1024)];
    assert_eq!(b.request(IN, 5, &two), (OK, 1537));
    let byte = |b: &Bench, a| b.ram.read_obj::<u8>(GuestAddress(a)).unwrap();
    assert_eq!([byte(&b, DATA), byte(&b, DATA + 4096), byte(&b, DATA + 4608)], [5, 6, 7]);

    b.ram.write_slice(&[0xaa; 512], GuestAddress(DATA)).unwrap();
    assert_eq!(b.request(OUT, 63, &[Buf::readable(DATA, 512)]), (OK, 1));
    assert!(b.disk.data()[63 * 512..].iter().all(|x| *x == 0xaa));
    assert_eq!(b.disk.calls(), ["read 2560", "write 32256"]);
}

#[test]
fn header_and_status_may_lie_in_any_buffers() {
    let mut b = Bench::new(MemoryDisk::new(SECTORS));
    b.header(IN, 9);
    // Header in two pieces, status behind the data in one.
    b.ring.add(&[
        Buf::readable(HEADER, 7),
        Buf::readable(HEADER + 7, 9),
        Buf::writable(DATA, 100),
        Buf::writable(DATA + 100, 413),
    ]);
    b.process().unwrap();
    assert_eq!(b.ring.pop_used(), Some((0, 513)));
    let mut data = [0; 513];
    b.ram.read_slice(&mut data, GuestAddress(DATA)).unwrap();
    assert!(data[..512].iter().all(|x| *x == 9));
    assert_eq!(data[512], OK);
}

#[test]
fn what_lies_outside_or_between_sectors_is_an_error() {
    let mut b = Bench::new(MemoryDisk::new(SECTORS));
    let cases: &[(u32, u64, u32)] = &[
        (IN, SECTORS, 512),
        (IN, SECTORS - 1, 1024),
        (IN, u64::MAX, 512),
        (IN, u64::MAX / 512, 512),
        (IN, 0, 511),
        (OUT, SECTORS, 512),
        (OUT, 0, 513),
    ];
    for (kind, sector, len) in cases {
        let data = Buf { addr: DATA, len: *len, write: *kind == IN };
        assert_eq!(b.request(*kind, *sector, &[data]), (IOERR, 1), "{kind} {sector} {len}");
    }
    assert_eq!(b.disk.calls(), [""; 0]);
}

#[test]
fn a_request_is_bounded_also_on_a_large_disk() {
    let disk = Disk { capacity_sectors: u64::MAX / 512, read_only: false };
    assert_eq!(disk.transfer(2, 510 << 20).unwrap(), 1024);
    assert!(matches!(disk.transfer(2, (510 << 20) + 512), Err(Failure::Invalid)));
}

#[test]
fn unknown_requests_are_unsupported() {
    let mut b = Bench::new(MemoryDisk::new(SECTORS));
    for kind in [2, 3, 5, 10, 12, 14, 16, u32::MAX] {
        assert_eq!(b.request(kind, 0, &[Buf::writable(DATA, 512)]), (UNSUPP, 1));
    }
}

#[test]
fn a_failing_disk_fails_the_request_and_no_more() {
    let mut b = Bench::new(MemoryDisk::new(SECTORS));
    for kind in [io::ErrorKind::Other, io::ErrorKind::StorageFull, io::ErrorKind::UnexpectedEof] {
        b.disk.fail(Some(kind));
        assert_eq!(b.request(IN, 0, &[Buf::writable(DATA, 512)]), (IOERR, 1));
        assert_eq!(b.request(OUT, 0, &[Buf::readable(DATA, 512)]), (IOERR, 1));
        assert_eq!(b.request(T_FLUSH, 0, &[]), (IOERR, 1));
    }
    b.disk.fail(Some(io::ErrorKind::Unsupported));
    assert_eq!(b.ranges(DISCARD, &[(0, 8, 0)]), UNSUPP);
    b.disk.fail(None);
    assert_eq!(b.request(IN, 0, &[Buf::writable(DATA, 512)]), (OK, 513));
}

#[test]
fn without_flush_every_write_is_durable() {
    let mut b = Bench::new(MemoryDisk::new(SECTORS));
    let sector = [Buf::readable(DATA, 512)];
    assert_eq!(b.request(OUT, 0, &sector), (OK, 1));
    assert_eq!(b.request(T_FLUSH, 0, &[]), (OK, 1));
    assert_eq!(b.disk.calls(), ["write 0", "flush"]);
    b.device.reset();
    b.device.activate(0);
    assert_eq!(b.request(OUT, 0, &sector), (OK, 1));
    assert_eq!(b.ranges(WRITE_ZEROES, &[(0, 1, 0)]), OK);
    assert_eq!(b.disk.calls(), ["write 0", "flush", "zero 0+512 false", "flush"]);
}

#[test]
fn the_serial_is_the_id_unless_given() {
    let mut b = Bench::new(MemoryDisk::new(SECTORS));
    let answer = |b: &mut Bench, len| {
        b.ram.write_slice(&[7; 24], GuestAddress(DATA)).unwrap();
        assert_eq!(b.request(GET_ID, 0, &[Buf::writable(DATA, len)]), (OK, len.min(20) + 1));
        let mut found = [0; 21];
        b.ram.read_slice(&mut found, GuestAddress(DATA)).unwrap();
        found
    };
    assert_eq!(answer(&mut b, 20), *b"root\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x07");
    assert_eq!(answer(&mut b, 2)[..3], *b"ro\x07");
    let long = "0123456789abcdefghijKLM";
    b.device = Block::new("root", Some(long), Box::new(b.disk.clone()));
    assert_eq!(answer(&mut b, 24)[..20], long.as_bytes()[..20]);
}

#[test]
fn ranges_are_checked_before_any_is_touched() {
    let mut b = Bench::new(MemoryDisk::new(SECTORS));
    assert_eq!(b.ranges(DISCARD, &[(0, 8, 0), (32, 0, 0), (56, 8, 0)]), OK);
    assert_eq!(b.disk.calls(), ["discard 0+4096", "discard 28672+4096"]);
    assert_eq!(b.ranges(WRITE_ZEROES, &[(8, 8, 1)]), OK);
    assert_eq!(b.disk.calls(), ["zero 4096+4096 true"]);

    type Case<'a> = (u32, &'a [(u64, u32, u32)], u8);
    let cases: &[Case<'_>] = &[
        (DISCARD, &[(0, 8, 0), (57, 8, 0)], IOERR),
        (DISCARD, &[(0, 8, 1)], UNSUPP),
        (DISCARD, &[(0, DISCARD_SECTORS_MAX + 1, 0)], IOERR),
        (DISCARD, &[(u64::MAX, 2, 0)], IOERR),
        (DISCARD, &[(0, 1, 0); 33], IOERR),
        (DISCARD, &[], IOERR),
        (WRITE_ZEROES, &[(0, 8, 2)], UNSUPP),
        (WRITE_ZEROES, &[(0, 1, 0), (2, 1, 0)], IOERR),
    ];
    for (kind, ranges, status) in cases {
        assert_eq!(b.ranges(*kind, ranges), *status, "{kind} {ranges:?}");
    }
    assert_eq!(b.request(DISCARD, 0, &[Buf::readable(DATA, 15)]).0, IOERR);
    assert_eq!(b.disk.calls(), [""; 0]);
}

#[test]
fn a_read_only_disk_refuses_all_that_changes_it() {
    let mut b = Bench::new(MemoryDisk::read_only(SECTORS));
    let (ro, discard) = (1 << VIRTIO_BLK_F_RO, 1 << VIRTIO_BLK_F_DISCARD);
    assert_eq!(b.device.features() & (ro | discard), ro);
    assert_eq!(b.request(OUT, 0, &[Buf::readable(DATA, 512)]), (IOERR, 1));
    assert_eq!(b.ranges(DISCARD, &[(0, 8, 0)]), IOERR);
    assert_eq!(b.ranges(WRITE_ZEROES, &[(0, 8, 0)]), IOERR);
    assert_eq!(b.request(IN, 0, &[Buf::writable(DATA, 512)]), (OK, 513));
    assert_eq!(b.disk.calls(), ["read 0"]);
}

#[test]
fn what_is_no_request_is_the_drivers_fault() {
    let cases: &[&[Buf]] = &[
        &[Buf::readable(HEADER, 16)],
        &[Buf::readable(HEADER, 15), Buf::writable(STATUS, 1)],
        &[Buf::writable(STATUS, 1)],
    ];
    for bufs in cases {
        let mut b = Bench::new(MemoryDisk::new(SECTORS));
        b.header(IN, 0);
        b.ring.add(bufs);
        assert!(matches!(b.process(), Err(DriverFault::Request(_))), "{bufs:?}");
        assert_eq!((b.ring.pop_used(), b.status()), (None, UNTOUCHED));
    }
}

#[test]
fn a_burst_is_bounded_in_requests_and_in_bytes() {
    let mut b = Bench::new(MemoryDisk::new(255));
    b.header(T_FLUSH, 0);
    b.ring.descriptor(b.ring.desc, 0, HEADER, 16, 1, 1);
    b.ring.descriptor(b.ring.desc, 1, STATUS, 1, 2, 0);
    (0..40).for_each(|_| b.ring.publish(0));
    b.process().unwrap();
    assert_eq!(usize::from(b.ring.used_idx()), BURST_REQUESTS_MAX);
    b.process().unwrap();
    assert_eq!(b.ring.used_idx(), 40);

    b.header(IN, 0);
    b.ring.descriptor(b.ring.desc, 0, HEADER, 16, 1, 1);
    b.ring.descriptor(b.ring.desc, 1, 0x8_0000, 255 * 512, 3, 2);
    b.ring.descriptor(b.ring.desc, 2, STATUS, 1, 2, 0);
    (0..16).for_each(|_| b.ring.publish(0));
    b.process().unwrap();
    assert_eq!(b.ring.used_idx(), 40 + 9, "9 of 127.5 KiB are the first to pass 1 MiB");
}

#[test]
fn the_configuration_space_is_laid_out_as_specified() {
    let b = Bench::new(MemoryDisk::new(SECTORS));
    let mut bytes = [0xff; 64];
    b.device.config().read(0, &mut bytes);
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    assert_eq!(bytes[..8], SECTORS.to_le_bytes());
    assert_eq!((word(8), word(12)), (1 << 20, 510));
    assert_eq!(word(20), 512);
    assert_eq!((bytes[24], bytes[25], bytes[26]), (3, 0, 8));
    assert_eq!(word(28), 512, "256 KiB in blocks");
    assert_eq!((word(36), word(40), word(44)), (8 << 20, 32, 8));
    assert_eq!((word(48), word(52), bytes[56]), (128 << 10, 1, 1));
    assert_eq!(bytes[57..], [0; 7]);
}

#[test]
fn the_guest_finds_the_disk_it_knew_after_a_move() {
    let source = Block::new("root", Some("S1"), Box::new(MemoryDisk::new(SECTORS)));
    let section = source.save_section(3).unwrap();
    let golden = [
        &[64, 0, 0x80, 4, 0x80, 0x20][..], // capacity, writable, 512, 4096
        b"S1\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
    ]
    .concat();
    assert_eq!((section.kind.as_str(), section.version), ("virtio-blk", 1));
    assert_eq!(section.body, golden);

    let mut destination = Block::new("disk", None, Box::new(MemoryDisk::new(SECTORS)));
    destination.restore_section(&section).unwrap();
    assert_eq!(destination.save_section(3).unwrap(), section);
}

#[test]
fn another_disk_is_refused_by_name() {
    let state =
        Block::new("root", None, Box::new(MemoryDisk::new(SECTORS))).save_section(0).unwrap();
    let why = |disk| match Block::new("root", None, Box::new(disk)).restore_section(&state) {
        Err(RestoreError::Invalid { why, .. }) => why,
        other => panic!("{other:?}"),
    };
    assert_eq!(
        why(MemoryDisk::new(32)),
        "disk 'root' has 32 sectors, the guest knows it with 64: give it the same image"
    );
    assert_eq!(
        why(MemoryDisk::read_only(SECTORS)),
        "disk 'root' is read-only, the guest knows it as writable"
    );
    // And blocks that can't be.
    let mut section = state.clone();
    section.body[2] = 0x81;
    let mut device = Block::new("root", None, Box::new(MemoryDisk::new(SECTORS)));
    assert!(matches!(device.restore_section(&section), Err(RestoreError::Invalid { .. })));
}
