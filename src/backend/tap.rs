//! TAP interfaces: the host's end of the guest's network.
//!
//! A TAP is made by whoever runs the host's network (`ip tuntap add`); this file only takes hold of one.
//! Frames pass with their `virtio_net_hdr`, so checksums and segmentation are left to whoever receives
//! them last, and the kernel checks every header that the guest wrote.
//!
//! A TAP has no calls for several frames at once. What saves system calls is segmentation offload: a
//! frame carries up to 64 KiB.

use std::ffi::c_ulong;
use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSlice, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Arc, Weak};

use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice};
use vmm_devices::GuestSlice;
use vmm_devices::backend::{NET_HEADER_LEN, NetBackend, Offloads};

use super::iovec::{IoVecs, mark_dirty};

/// The clone device that every TAP is reached through.
const CLONE_DEVICE: &str = "/dev/net/tun";

/// Why a TAP can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// No interface has such a name.
    #[error("tap '{name}': no interface can have this name; 1 to 15 bytes, no '/' and no space")]
    Name {
        /// The TAP.
        name: String,
    },
    /// There is none of this name.
    #[error(
        "tap '{name}': no such interface; create it with 'ip tuntap add {name} mode tap' and 'ip link set {name} up'"
    )]
    Missing {
        /// The TAP.
        name: String,
    },
    /// The interface is something else.
    #[error(
        "tap '{name}': is not a TAP, or one with several queues; create one with 'ip tuntap add {name} mode tap'"
    )]
    Kind {
        /// The TAP.
        name: String,
    },
    /// Somebody else has it.
    #[error("tap '{name}': in use by {holder}; give every VM a TAP of its own")]
    Busy {
        /// The TAP.
        name: String,
        /// Who has it.
        holder: String,
    },
    /// The user may not.
    #[error(
        "tap '{name}': no permission for {what}; run as its owner ('ip tuntap add ... user NAME'), or with CAP_NET_ADMIN"
    )]
    Permission {
        /// The TAP.
        name: String,
        /// For what.
        what: &'static str,
    },
    /// The kernel lacks TAPs altogether.
    #[error("tap '{name}': this host has no {CLONE_DEVICE}; load the kernel module 'tun'")]
    NoTun {
        /// The TAP.
        name: String,
    },
    /// The kernel refused otherwise.
    #[error("tap '{name}': can't {what}")]
    Kernel {
        /// The TAP.
        name: String,
        /// What it was asked for.
        what: &'static str,
        /// Its answer.
        #[source]
        source: io::Error,
    },
}

/// A TAP that is ours until it and its handle are dropped.
pub struct Tap {
    file: Arc<File>,
    offloads: Offloads,
}

/// What the machine does with a TAP besides its device: announcing where the guest is after a move.
/// Usable from any thread, also while the device works.
#[derive(Clone, Debug)]
pub struct TapHandle {
    file: Arc<File>,
}

impl TapHandle {
    /// Sends an Ethernet frame as if it came from the guest. Never blocks.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        let header = [0; NET_HEADER_LEN];
        (&*self.file).write_vectored(&[IoSlice::new(&header), IoSlice::new(frame)]).map(drop)
    }

    /// A handle that keeps the TAP from nobody.
    #[must_use]
    pub fn weak(&self) -> WeakTap {
        WeakTap(Arc::downgrade(&self.file))
    }
}

/// A TAP for as long as its guest has it.
pub struct WeakTap(Weak<File>);

impl WeakTap {
    /// The TAP, unless its guest has gone.
    #[must_use]
    pub fn upgrade(&self) -> Option<TapHandle> {
        self.0.upgrade().map(|file| TapHandle { file })
    }
}

impl Tap {
    /// Takes hold of the TAP `name` of this network namespace, without offloads.
    pub fn open(name: &str) -> Result<(Self, TapHandle), TapError> {
        let kernel = |what| {
            move |source: io::Error| TapError::Kernel { name: name.to_owned(), what, source }
        };
        check_name(name)?;
        check_exists(name)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(CLONE_DEVICE)
            .map_err(|source| match source.kind() {
                io::ErrorKind::NotFound => TapError::NoTun { name: name.to_owned() },
                io::ErrorKind::PermissionDenied => {
                    TapError::Permission { name: name.to_owned(), what: CLONE_DEVICE }
                }
                _ => kernel("open /dev/net/tun")(source),
            })?;
        attach(&file, name)?;
        let header_len = libc::c_int::try_from(NET_HEADER_LEN).expect("it is 12");
        // SAFETY: the kernel reads the one `int`, during the call only.
        let done =
            unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header_len) };
        if done == -1 {
            return Err(kernel("set the length of its header")(io::Error::last_os_error()));
        }
        let offloads = probe(&file).map_err(kernel("set its offloads"))?;
        let file = Arc::new(file);
        Ok((Self { file: file.clone(), offloads }, TapHandle { file }))
    }
}

impl NetBackend for Tap {
    fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    fn offloads(&self) -> Offloads {
        self.offloads
    }

    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        set_offloads(&self.file, offloads)
    }

    fn receive(&mut self, to: &[GuestSlice<'_>], overflow: &mut [u8]) -> io::Result<usize> {
        let mut pieces = IoVecs::new(to);
        pieces.push(overflow);
        let len = pieces.read(&self.file)?;
        mark_dirty(to, len);
        Ok(len)
    }

    fn send(&mut self, frame: &[GuestSlice<'_>]) -> io::Result<()> {
        // The kernel takes a frame whole or not at all.
        IoVecs::new(frame).write(&self.file).map(drop)
    }
}

fn check_name(name: &str) -> Result<(), TapError> {
    let odd = |b: u8| b == b'/' || b == b':' || b == b'%' || b.is_ascii_whitespace() || b == 0;
    let fits = (1..libc::IFNAMSIZ).contains(&name.len()) && name != "." && name != "..";
    if !fits || name.bytes().any(odd) {
        return Err(TapError::Name { name: name.to_owned() });
    }
    Ok(())
}

/// `TUNSETIFF` would create what is missing, and nobody would have plugged it in.
fn check_exists(name: &str) -> Result<(), TapError> {
    let kernel = |e: rustix::io::Errno| TapError::Kernel {
        name: name.to_owned(),
        what: "look for it",
        source: e.into(),
    };
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(kernel)?;
    match netdevice::name_to_index(&socket, name) {
        Ok(_) => Ok(()),
        Err(rustix::io::Errno::NODEV) => Err(TapError::Missing { name: name.to_owned() }),
        Err(e) => Err(kernel(e)),
    }
}

/// Binds the open clone device to the TAP `name`.
fn attach(file: &File, name: &str) -> Result<(), TapError> {
    // SAFETY: all zeroes is a valid `ifreq`: an array of bytes and a union of plain data.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    #[allow(clippy::cast_possible_wrap, reason = "a byte of a name, whichever sign c_char has")]
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).expect("below 0x8000");
    // SAFETY: the kernel reads and writes the one `ifreq`, during the call only.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } != -1 {
        return Ok(());
    }
    let source = io::Error::last_os_error();
    let name = name.to_owned();
    Err(match source.raw_os_error() {
        Some(libc::EBUSY) => TapError::Busy { holder: holder(&name), name },
        Some(libc::EINVAL) => TapError::Kind { name },
        Some(libc::EPERM | libc::EACCES) => TapError::Permission { name, what: "this interface" },
        _ => TapError::Kernel { name, what: "take hold of it", source },
    })
}

/// Who has the TAP: the `fdinfo` of an open clone device names its interface.
fn holder(name: &str) -> String {
    let line = format!("iff:\t{name}");
    let pid = super::find_process(|pid, fd, link| {
        fs::read_link(link).is_ok_and(|to| to.ends_with("net/tun"))
            && fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}"))
                .is_ok_and(|info| info.lines().any(|l| l == line))
    });
    match pid {
        Some(pid) if pid == std::process::id() => "another interface of this VM".to_owned(),
        Some(pid) => {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            format!("pid {pid} ({})", name.trim_end())
        }
        None => "a process that can't be seen from here".to_owned(),
    }
}

/// Finds out which offloads the kernel has (UDP segmentation came with Linux 6.2), and leaves all off.
fn probe(file: &File) -> io::Result<Offloads> {
    let common = Offloads { csum: true, tso4: true, tso6: true, ecn: true, uso: false };
    let all = Offloads { uso: true, ..common };
    let found = match set_offloads(file, all) {
        Ok(()) => all,
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
            set_offloads(file, common)?;
            common
        }
        Err(e) => return Err(e),
    };
    set_offloads(file, Offloads::default())?;
    Ok(found)
}

fn set_offloads(file: &File, offloads: Offloads) -> io::Result<()> {
    let Offloads { csum, tso4, tso6, ecn, uso } = offloads;
    let bits = [
        (csum, libc::TUN_F_CSUM),
        (tso4, libc::TUN_F_TSO4),
        (tso6, libc::TUN_F_TSO6),
        (ecn, libc::TUN_F_TSO_ECN),
        (uso, libc::TUN_F_USO4 | libc::TUN_F_USO6),
    ];
    let bits = bits.iter().filter(|(on, _)| *on).fold(0, |all, (_, bit)| all | bit);
    // SAFETY: this call takes its argument by value.
    match unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, c_ulong::from(bits)) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
#[path = "tap_tests.rs"]
mod tests;
