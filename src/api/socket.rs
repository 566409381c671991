//! Where control sockets live: paths by name, a dead VM's socket replaced, a live VM's respected,
//! the socket removed at the end.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, fchmod, flock};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
};
use rustix::process::geteuid;

use crate::config::{self, NAME_BYTES_MAX};
use crate::migrate::uri::SOCKET_PATH_BYTES_MAX;

/// How long another VM's start in the same directory is waited for.
const LOCK_TIMEOUT: Duration = Duration::from_secs(2);
/// Clients that may wait to be accepted.
const BACKLOG: i32 = 16;

/// Why there is no control socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// A VM answers at this path.
    #[error("{path}: in use by a live VM{}: take another --name or --control", pid_text(*.pid))]
    Live {
        /// The socket's path.
        path: PathBuf,
        /// The process that listens, if the kernel tells.
        pid: Option<i32>,
    },
    /// Longer than a socket's address.
    #[error(
        "{path}: {} bytes, but a UNIX socket's path has at most {SOCKET_PATH_BYTES_MAX}: give a shorter --control",
        .path.as_os_str().len()
    )]
    TooLong {
        /// The path.
        path: PathBuf,
    },
    /// Something else has the socket's name.
    #[error("{path}: exists and is not a socket: remove it, or take another --control")]
    Occupied {
        /// The path.
        path: PathBuf,
    },
    /// The directory of sockets belongs to somebody else, who could take them away.
    #[error("{path}: not a directory of this user: remove it, or give --control")]
    Foreign {
        /// The directory.
        path: PathBuf,
    },
    /// There is no place for sockets by name.
    #[error("XDG_RUNTIME_DIR is not set to an absolute path: set it, or give the socket's path")]
    NoRuntimeDir,
    /// The kernel refused.
    #[error("{path}: can't {what}")]
    Io {
        /// The socket's path or its directory's.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

fn pid_text(pid: Option<i32>) -> String {
    pid.map_or_else(String::new, |pid| format!(" (pid {pid})"))
}

/// The directory of the sockets that are known by name: `/run/vmm` for root,
/// else `$XDG_RUNTIME_DIR/vmm`.
///
/// # Errors
/// [`SocketError::NoRuntimeDir`] for a user without one.
pub fn directory() -> Result<PathBuf, SocketError> {
    if geteuid().is_root() {
        return Ok("/run/vmm".into());
    }
    match std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from) {
        Some(dir) if dir.is_absolute() => Ok(dir.join("vmm")),
        _ => Err(SocketError::NoRuntimeDir),
    }
}

/// The socket of the VM of a name.
///
/// # Errors
/// As [`directory`].
pub fn path_of(name: &str) -> Result<PathBuf, SocketError> {
    Ok(directory()?.join(format!("{name}.sock")))
}

/// The socket of a VM's console beside its control socket: `NAME.tty` for `NAME.sock`.
#[must_use]
pub fn console_beside(control: &Path) -> PathBuf {
    let end = control.extension().filter(|end| *end == "sock").map_or(0, |_| ".sock".len());
    let bytes = control.as_os_str().as_bytes();
    let mut path = OsStr::from_bytes(&bytes[..bytes.len() - end]).to_owned();
    path.push(".tty");
    path.into()
}

/// The socket that a user means by `VM`: a path if it holds a `/`, else a name.
///
/// # Errors
/// As [`directory`].
pub fn resolve(vm: &str) -> Result<PathBuf, SocketError> {
    if vm.contains('/') { Ok(vm.into()) } else { path_of(vm) }
}

/// The names and sockets in a directory of sockets, sorted by name; none if there is no directory.
///
/// # Errors
/// [`SocketError::Io`] if it can't be read.
pub fn list(dir: &Path) -> Result<Vec<(String, PathBuf)>, SocketError> {
    let fail = |source| SocketError::Io { path: dir.into(), what: "read the directory", source };
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(fail)?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(fail)?;
        let is_socket = entry.file_type().is_ok_and(|kind| kind.is_socket());
        let file_name = entry.file_name();
        let name = file_name.to_str().and_then(|name| name.strip_suffix(".sock"));
        if let (true, Some(name)) = (is_socket, name)
            && config::check_name("VM name", name, NAME_BYTES_MAX).is_ok()
        {
            found.push((name.to_owned(), entry.path()));
        }
    }
    found.sort();
    Ok(found)
}

/// A control socket that listens; dropping it removes the socket, unless another took its place.
#[derive(Debug)]
pub struct ControlSocket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the socket's file.
    file: (u64, u64),
}

impl ControlSocket {
    /// Listens at a path, with mode 0600. `/run/vmm` and its like are made, with mode 0700.
    ///
    /// # Errors
    /// [`SocketError::Live`] if a VM answers there; the others for what their texts say.
    pub fn bind(path: &Path) -> Result<ControlSocket, SocketError> {
        let fail = |what| move |source| SocketError::Io { path: path.into(), what, source };
        if path.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
            return Err(SocketError::TooLong { path: path.into() });
        }
        let parent = directory_of(path);
        let by_name = directory().is_ok_and(|dir| dir == parent);
        if by_name {
            make_directory(parent)?;
        }
        // Two VMs that start at once must not both find a dead socket and replace each other's.
        let _lock = lock(parent)?;
        if by_name {
            sweep(parent)?;
        }
        make_room(path)?;
        let socket = listening(path).map_err(|e| fail("listen there")(e.into()))?;
        let metadata = fs::symlink_metadata(path).map_err(fail("listen there"))?;
        let file = (metadata.dev(), metadata.ino());
        Ok(ControlSocket { listener: socket.into(), path: path.into(), file })
    }

    /// The listening socket.
    #[must_use]
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// The socket's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl ControlSocket {
    /// Removes the socket's file, if it is still this one: nobody can connect any more.
    pub fn remove(&self) {
        // Without the lock, a VM that starts could replace the file between the look and the removal.
        let _lock = lock(directory_of(&self.path));
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == self.file);
        if ours && let Err(e) = fs::remove_file(&self.path) {
            tracing::warn!("{}: can't remove the control socket: {e}", self.path.display());
        }
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        self.remove();
    }
}

fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A socket that is mode 0600 from its first moment: on Linux the file takes the mode of the
/// unbound socket's inode (unix(7) leaves that out, `unix_bind` in the kernel does it).
fn listening(path: &Path) -> Result<OwnedFd, Errno> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// Makes a directory of sockets, for this user only, if it isn't there.
///
/// # Errors
/// It can't be made, or is somebody else's.
pub fn make_directory(dir: &Path) -> Result<(), SocketError> {
    let fail = |source| SocketError::Io { path: dir.into(), what: "make the directory", source };
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        other => return other.map_err(fail),
    }
    let metadata = fs::symlink_metadata(dir).map_err(fail)?;
    if !metadata.is_dir() || metadata.uid() != geteuid().as_raw() {
        return Err(SocketError::Foreign { path: dir.into() });
    }
    Ok(())
}

/// Locks a directory against other VMs that start, until the file is dropped.
fn lock(dir: &Path) -> Result<File, SocketError> {
    let fail = |source| SocketError::Io { path: dir.into(), what: "lock the directory", source };
    let file = File::open(dir).map_err(fail)?;
    let deadline = Instant::now() + LOCK_TIMEOUT;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(e) => return Err(fail(e.into())),
        }
    }
}

/// The name of a VM that was given none.
#[must_use]
pub fn default_name() -> String {
    format!("vm-{}", std::process::id())
}

/// Removes the sockets of dead VMs that had no name of their own: no other VM would ever take their
/// place. The caller has the directory's lock, so none of them belongs to a VM that starts.
fn sweep(dir: &Path) -> Result<(), SocketError> {
    let unnamed = |name: &str| {
        name.strip_prefix("vm-").is_some_and(|pid| pid.bytes().all(|b| b.is_ascii_digit()))
    };
    for (_, path) in list(dir)?.into_iter().filter(|(name, _)| unnamed(name)) {
        if connect_at_once(&path).is_err_and(|e| e == Errno::CONNREFUSED) {
            // One that can't be removed harms nobody.
            drop(fs::remove_file(&path));
        }
    }
    Ok(())
}

/// Removes a dead VM's socket.
fn make_room(path: &Path) -> Result<(), SocketError> {
    let fail = |what| move |source| SocketError::Io { path: path.into(), what, source };
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(fail("look at it")(e)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(SocketError::Occupied { path: path.into() });
        }
        Ok(_) => {}
    }
    match connect_at_once(path) {
        Ok(stream) => Err(SocketError::Live { path: path.into(), pid: peer_pid(&stream) }),
        // A backlog that is full has a living owner.
        Err(Errno::AGAIN) => Err(SocketError::Live { path: path.into(), pid: None }),
        Err(Errno::CONNREFUSED) => match fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(fail("remove the dead VM's socket")(e))
            }
            _ => Ok(()),
        },
        Err(Errno::NOENT) => Ok(()),
        Err(e) => Err(fail("ask whether its VM lives")(e.into())),
    }
}

/// Connects without waiting for room in the backlog.
fn connect_at_once(path: &Path) -> Result<UnixStream, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::io::ioctl_fionbio(&socket, false)?;
    Ok(socket.into())
}

/// Connects to a VM.
///
/// # Errors
/// `NotFound` if there is no socket, `ConnectionRefused` if its VM is dead, `WouldBlock` if more
/// clients wait than the VM takes.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    Ok(connect_at_once(path)?)
}

/// The process at the other end, if it is in a PID namespace that this one sees. (rustix has the
/// call too, but its type for a pid can't hold the 0 that stands for an unseen process.)
#[must_use]
pub fn peer_pid(stream: &UnixStream) -> Option<i32> {
    let mut credentials = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut length = libc::socklen_t::try_from(size_of::<libc::ucred>()).ok()?;
    // SAFETY: `credentials` is a live ucred and `length` its size: the kernel writes no more.
    let status = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut length,
        )
    };
    (status == 0 && credentials.pid != 0).then_some(credentials.pid)
}

#[cfg(test)]
#[path = "socket_tests.rs"]
mod tests;
