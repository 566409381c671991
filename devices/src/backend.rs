//! What stands behind a device: a disk, a network interface. The root package implements these traits
//! with system calls on guest memory, tests with vectors.
//!
//! Invariant: a backend that writes to guest memory marks what it wrote in the slice's bitmap, after
//! the write and also when the call failed half-way, so that a migration sends those pages again.

use std::io;
use std::os::fd::RawFd;

use crate::GuestSlice;

/// A disk. All offsets and lengths are in bytes; the device has checked that they are multiples of 512
/// and lie within the capacity. Calls block until they are done.
pub trait BlockBackend: Send {
    /// Size of the disk in sectors of 512 bytes. Constant.
    fn capacity_sectors(&self) -> u64;

    /// Size of a logical and of a physical block in bytes: powers of two, 512 or more, constant. The
    /// guest should, and need not, keep its requests aligned to them.
    fn block_sizes(&self) -> (u32, u32);

    /// Whether the disk refuses writes. Constant.
    fn read_only(&self) -> bool;

    /// Fills all of `to` from `offset`, or fails.
    fn read_at(&mut self, to: &[GuestSlice<'_>], offset: u64) -> io::Result<()>;

    /// Writes all of `from` at `offset`, or fails. Durable after the next [`Self::flush`].
    fn write_at(&mut self, from: &[GuestSlice<'_>], offset: u64) -> io::Result<()>;

    /// Makes all completed writes durable.
    fn flush(&mut self) -> io::Result<()>;

    /// Gives the range's storage back: what it reads as afterwards is open.
    /// [`io::ErrorKind::Unsupported`] where the disk can't.
    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes the range read as zeroes; `may_unmap` allows to give its storage back.
    fn write_zeroes(&mut self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()>;
}

/// What a network interface may leave undone in the packets that it hands to the guest, and the
/// guest finishes: partial checksums and segmentation (virtio 1.3, 5.1.6.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Packets may have partial checksums.
    pub csum: bool,
    /// Packets may be unsegmented TCP over IPv4. Needs `csum`.
    pub tso4: bool,
    /// Packets may be unsegmented TCP over IPv6. Needs `csum`.
    pub tso6: bool,
    /// Unsegmented TCP may carry explicit congestion notification. Needs `tso4` or `tso6`.
    pub ecn: bool,
    /// Packets may be unsegmented UDP over IPv4 and IPv6. Needs `csum`.
    pub uso: bool,
}

/// A network interface that carries Ethernet frames, each with a `virtio_net_hdr` of
/// [`NET_HEADER_LEN`] bytes in front (virtio 1.3, 5.1.6).
pub trait NetBackend: Send {
    /// Readable when a frame waits.
    fn fd(&self) -> RawFd;

    /// The offloads that [`Self::set_offloads`] can turn on. Constant.
    fn offloads(&self) -> Offloads;

    /// Turns on exactly these offloads for the frames received from now on.
    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()>;

    /// Takes the next frame: into `to` and, where that is too short, `overflow`. Returns its length,
    /// header included; what fits in neither is lost. Leaves the header's `num_buffers` undefined.
    /// [`io::ErrorKind::WouldBlock`] if none waits.
    fn receive(&mut self, to: &[GuestSlice<'_>], overflow: &mut [u8]) -> io::Result<usize>;

    /// Sends one frame with its header. Never blocks.
    fn send(&mut self, frame: &[GuestSlice<'_>]) -> io::Result<()>;
}

/// Length in bytes of the `virtio_net_hdr` with `num_buffers`, as every virtio 1 device has it.
pub const NET_HEADER_LEN: usize = 12;

/// The longest frame with its header, in bytes: 64 KiB of unsegmented packet, an Ethernet header and a
/// VLAN tag.
pub const NET_FRAME_LEN_MAX: usize = NET_HEADER_LEN + 65535 + 18;
