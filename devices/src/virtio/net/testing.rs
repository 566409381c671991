//! A network interface in memory, and a driver in front of the device, for tests.

use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, MutexGuard};

use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MRG_RXBUF};
use virtio_queue::Queue;
use vm_memory::{Bytes, GuestAddress};

use super::{CONTROL, Net, RX};
use crate::backend::{NetBackend, Offloads};
use crate::virtio::VirtioDevice;
use crate::virtio::queue::{QueueIo, Signals};
use crate::virtio::testing::{Buf, DriverRing, ram};
use crate::{GuestRam, GuestSlice};

/// All offloads.
pub(super) const ALL: Offloads =
    Offloads { csum: true, tso4: true, tso6: true, ecn: true, uso: true };

#[derive(Default)]
pub(super) struct Inner {
    /// What the guest is to receive, headers included.
    pub(super) incoming: VecDeque<Vec<u8>>,
    /// What it sent.
    pub(super) sent: Vec<Vec<u8>>,
    /// As last set.
    pub(super) offloads: Offloads,
    /// The error that all calls give.
    pub(super) fault: Option<io::ErrorKind>,
    /// The room that each call of `receive` offered in guest memory.
    pub(super) offered: Vec<usize>,
}

/// Clones share the interface.
#[derive(Clone)]
pub(super) struct MemoryNet {
    inner: Arc<Mutex<Inner>>,
    offloads: Offloads,
    fd: RawFd,
}

impl MemoryNet {
    pub(super) fn new(offloads: Offloads) -> Self {
        Self { inner: Arc::default(), offloads, fd: -1 }
    }

    /// The same, readable when `fd` is.
    pub(super) fn with_fd(self, fd: RawFd) -> Self {
        Self { fd, ..self }
    }

    pub(super) fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }

    fn call(&self) -> io::Result<MutexGuard<'_, Inner>> {
        let inner = self.inner();
        match inner.fault {
            Some(kind) => Err(kind.into()),
            None => Ok(inner),
        }
    }
}

impl NetBackend for MemoryNet {
    fn fd(&self) -> RawFd {
        self.fd
    }

    fn offloads(&self) -> Offloads {
        self.offloads
    }

    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        self.call()?.offloads = offloads;
        Ok(())
    }

    fn receive(&mut self, to: &[GuestSlice<'_>], overflow: &mut [u8]) -> io::Result<usize> {
        let mut inner = self.call()?;
        let frame = inner.incoming.pop_front().ok_or(io::ErrorKind::WouldBlock)?;
        inner.offered.push(to.iter().map(GuestSlice::len).sum());
        let mut rest = frame.as_slice();
        for slice in to {
            let (now, later) = rest.split_at(rest.len().min(slice.len()));
            slice.copy_from(now);
            rest = later;
        }
        overflow[..rest.len()].copy_from_slice(rest);
        Ok(frame.len())
    }

    fn send(&mut self, frame: &[GuestSlice<'_>]) -> io::Result<()> {
        let mut inner = self.call()?;
        let mut bytes = Vec::new();
        for slice in frame {
            let start = bytes.len();
            bytes.resize(start + slice.len(), 0);
            slice.copy_to(&mut bytes[start..]);
        }
        inner.sent.push(bytes);
        Ok(())
    }
}

pub(super) const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
pub(super) const MERGE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
pub(super) const ANNOUNCE: u64 = 1 << VIRTIO_NET_F_GUEST_ANNOUNCE;
pub(super) const BUFFERS: u64 = 0x10_0000;

/// A device with a driver in front of it, which has negotiated `features`.
pub(super) struct Bench {
    pub(super) ram: GuestRam,
    pub(super) rings: [DriverRing; 3],
    pub(super) queues: [Queue; 3],
    pub(super) net: MemoryNet,
    pub(super) device: Net,
    /// Receive buffers made available so far, each a chain of one descriptor.
    posted: u64,
}

impl Bench {
    pub(super) fn new(features: u64) -> Self {
        let ram = ram(8 << 20);
        let rings = [0x1_0000, 0x2_0000, 0x3_0000].map(|at| DriverRing::new(&ram, at, 256));
        let queues = std::array::from_fn(|i| rings[i].device_queue(true));
        let net = MemoryNet::new(ALL);
        let mut device = Net::new("eth", MAC, Some(1400), Box::new(net.clone()));
        device.activate(features);
        Self { ram, rings, queues, net, device, posted: 0 }
    }

    pub(super) fn call<T>(
        &mut self,
        f: impl FnOnce(&mut Net, &mut QueueIo<'_>) -> T,
    ) -> (T, Signals) {
        let mut io = QueueIo::new(&self.ram, &mut self.queues);
        let result = f(&mut self.device, &mut io);
        (result, io.finish().unwrap())
    }

    pub(super) fn process(&mut self, queue: usize) -> Signals {
        let (result, signals) = self.call(|device, io| device.process(queue, io));
        result.unwrap();
        signals
    }

    /// The interface is readable: whether the device goes on watching it.
    pub(super) fn ready(&mut self) -> bool {
        self.call(|device, io| device.source_ready(0, io)).0.unwrap()
    }

    /// Makes `count` receive buffers of `len` bytes available.
    pub(super) fn post(&mut self, count: usize, len: u32) {
        for _ in 0..count {
            let at = BUFFERS + 0x1000 * (self.posted % 256);
            self.posted += 1;
            self.rings[RX].add(&[Buf::writable(at, len)]);
        }
    }

    /// The next frame that the driver finds, put together from its buffers, and their number.
    pub(super) fn received(&mut self) -> Option<(Vec<u8>, u16)> {
        let mut frame = Vec::new();
        let mut count = 1;
        let mut found = 0;
        while found < count {
            let Some((head, len)) = self.rings[RX].pop_used() else {
                assert_eq!(found, 0, "a frame came in parts");
                return None;
            };
            let start = frame.len();
            frame.resize(start + len as usize, 0);
            let at = GuestAddress(BUFFERS + 0x1000 * u64::from(head));
            self.ram.read_slice(&mut frame[start..], at).unwrap();
            if found == 0 {
                count = u16::from_le_bytes([frame[10], frame[11]]);
            }
            found += 1;
        }
        Some((frame, count))
    }

    pub(super) fn expect(&mut self, sent: &[u8], buffers: u16) {
        let (frame, count) = self.received().expect("a frame");
        assert_eq!((frame.len(), count), (sent.len(), buffers));
        assert!(frame[..10] == sent[..10] && frame[12..] == sent[12..]);
    }

    /// One command; the answer.
    pub(super) fn control(&mut self, bytes: &[u8]) -> u8 {
        self.ram.write_slice(bytes, GuestAddress(0x100)).unwrap();
        self.ram.write_obj(0xee_u8, GuestAddress(0x200)).unwrap();
        let len = u32::try_from(bytes.len()).unwrap();
        self.rings[CONTROL].add(&[Buf::readable(0x100, len), Buf::writable(0x200, 1)]);
        self.process(CONTROL);
        assert_eq!(self.rings[CONTROL].pop_used().expect("an answer").1, 1);
        self.ram.read_obj(GuestAddress(0x200)).unwrap()
    }

    pub(super) fn config(&self) -> [u8; 12] {
        let mut bytes = [0; 12];
        self.device.config().read(0, &mut bytes);
        bytes
    }
}

/// A frame with its header, `len` bytes, telling apart by `seed`.
pub(super) fn frame(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| u8::try_from(i % 241).unwrap() ^ seed).collect()
}

pub(super) fn incoming(b: &Bench, frames: &[Vec<u8>]) {
    b.net.inner().incoming.extend(frames.iter().cloned());
}
