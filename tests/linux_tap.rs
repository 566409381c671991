//! TAPs, for real: what the kernel and `ip` make of them, each test in a network namespace of its own.
//! Needs /dev/net/tun, and root or user namespaces; the emulated host has them.

#[path = "support/net.rs"]
mod net;

use std::io;
use std::time::{Duration, Instant};

use net::{in_namespace, ip};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm::backend::tap::Tap;
use vmm_devices::backend::{NET_HEADER_LEN, NetBackend};
use vmm_devices::{GuestRam, GuestSlice};

fn ram() -> GuestRam {
    GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
}

fn slice(ram: &GuestRam, at: u64, len: usize) -> GuestSlice<'_> {
    ram.get_slice(GuestAddress(at), len).unwrap()
}

fn wrong(name: &str) -> String {
    Tap::open(name).map(drop).unwrap_err().to_string()
}

/// The next frame of EtherType `kind`, as it lies in guest memory from 100 on and in `overflow`.
fn wait_for(tap: &mut Tap, ram: &GuestRam, guest_len: usize, kind: [u8; 2]) -> Vec<u8> {
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut overflow = vec![0; 2000];
    loop {
        assert!(Instant::now() < deadline, "no such frame came");
        match tap.receive(&[slice(ram, 100, guest_len)], &mut overflow) {
            Ok(len) => {
                let mut frame = vec![0; len.min(guest_len)];
                ram.read_slice(&mut frame, GuestAddress(100)).unwrap();
                frame.extend(&overflow[..len - frame.len()]);
                if frame[NET_HEADER_LEN + 12..][..2] == kind {
                    return frame;
                }
            }
            Err(e) => {
                assert_eq!(e.kind(), io::ErrorKind::WouldBlock);
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

#[test]
fn a_tap_is_never_created() {
    in_namespace("a_tap_is_never_created", || {
        assert!(wrong("tap7").contains("no such interface"));
        assert!(wrong("tap7").contains("no such interface"), "the first attempt left it behind");
        assert!(wrong("lo").contains("is not a TAP"));
        ip("tuntap add t1 mode tun");
        assert!(wrong("t1").contains("is not a TAP"));
        ip("tuntap add t2 mode tap multi_queue");
        assert!(wrong("t2").contains("several queues"));
    });
}

#[test]
fn a_busy_tap_names_its_holder() {
    in_namespace("a_busy_tap_names_its_holder", || {
        ip("tuntap add tapbusy0 mode tap");
        let first = Tap::open("tapbusy0").unwrap();
        assert_eq!(
            wrong("tapbusy0"),
            "tap 'tapbusy0': in use by another interface of this VM; give every VM a TAP of its own"
        );
        drop(first);
        Tap::open("tapbusy0").unwrap();
    });
}

#[test]
fn frames_pass_both_ways_with_their_header() {
    in_namespace("frames_pass_both_ways_with_their_header", || {
        ip("tuntap add tap0 mode tap");
        ip("addr add 10.9.8.1/24 dev tap0");
        ip("link set tap0 up");
        let (mut tap, _) = Tap::open("tap0").unwrap();
        let offloads = tap.offloads();
        assert!(offloads.csum && offloads.tso4 && offloads.tso6 && offloads.ecn);
        tap.set_offloads(offloads).unwrap();

        // The host asks for an address: an ARP request, in 20 bytes of guest memory and the rest.
        let socket = std::net::UdpSocket::bind("10.9.8.1:0").unwrap();
        socket.send_to(b"x", "10.9.8.2:9").unwrap();
        let ram = ram();
        let request = wait_for(&mut tap, &ram, 20, [8, 6]);
        assert!(request.len() >= NET_HEADER_LEN + 42);
        assert_eq!(request[NET_HEADER_LEN + 38..][..4], [10, 9, 8, 2]);
        assert!(slice(&ram, 100, 1).bitmap().dirty_at(0));
        assert!(!slice(&ram, 8192, 1).bitmap().dirty_at(0));

        // The guest answers; the host then sends the datagram, its checksum left to the guest.
        let guest = [2, 0, 0, 0, 0, 9];
        let mut reply = vec![0; NET_HEADER_LEN];
        reply.extend(&request[NET_HEADER_LEN + 6..][..6]);
        reply.extend(guest);
        reply.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
        reply.extend(guest);
        reply.extend([10, 9, 8, 2]);
        reply.extend(&request[NET_HEADER_LEN + 22..][..10]);
        ram.write_slice(&reply, GuestAddress(50_000)).unwrap();
        tap.send(&[slice(&ram, 50_000, 12), slice(&ram, 50_012, reply.len() - 12)]).unwrap();
        let datagram = wait_for(&mut tap, &ram, 3000, [8, 0]);
        assert_eq!(datagram[NET_HEADER_LEN..][..6], guest);
        assert_eq!(datagram[0], 1, "VIRTIO_NET_HDR_F_NEEDS_CSUM");
        assert_eq!(datagram[NET_HEADER_LEN + 42..], *b"x");
    });
}

#[test]
fn a_header_that_lies_is_refused_by_the_kernel() {
    in_namespace("a_header_that_lies_is_refused_by_the_kernel", || {
        ip("tuntap add tap0 mode tap");
        ip("link set tap0 up");
        let (mut tap, handle) = Tap::open("tap0").unwrap();
        let ram = ram();
        // A checksum to be put far behind the frame's end.
        ram.write_slice(&[1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff], GuestAddress(0)).unwrap();
        let error = tap.send(&[slice(&ram, 0, NET_HEADER_LEN + 60)]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
        assert_eq!(tap.send(&[slice(&ram, 0, 5)]).unwrap_err().raw_os_error(), Some(libc::EINVAL));
        // And frames of ours pass, but for a TAP that is down.
        handle.send(&[0xff; 60]).unwrap();
        ip("link set tap0 down");
        assert_eq!(handle.send(&[0xff; 60]).unwrap_err().raw_os_error(), Some(libc::EIO));
        assert_eq!(
            tap.send(&[slice(&ram, 4096, NET_HEADER_LEN + 60)]).unwrap_err().raw_os_error(),
            Some(libc::EIO)
        );
    });
}
