//! What carries a migration's stream: TCP, a UNIX socket, a command, or standard input and output.
//!
//! Every link gives up a read or write after [`PATIENCE`], so that the choreography can look at its
//! deadlines and at who wants to cancel.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};
use vmm_migration::channel::{Channel, SystemClock, Transport};

use super::carrier::Carrier;
use super::uri::Uri;
use crate::api::socket::{ControlSocket, SocketError};

/// How long a read or write blocks at most.
const PATIENCE: Duration = Duration::from_millis(100);
/// How long a destination may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A write to a pipe that is writable never blocks up to this length (POSIX `PIPE_BUF`).
const PIPE_WRITE_MAX: usize = 4096;

/// Why there is no link.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Nobody answers.
    #[error("can't connect to {uri}")]
    Connect {
        /// Where to.
        uri: Uri,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The address can't be listened on.
    #[error("can't listen on {uri}")]
    Listen {
        /// Where.
        uri: Uri,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The UNIX socket's path is of no use.
    #[error("can't listen")]
    Socket(#[from] SocketError),
    /// A place that this end can't use.
    #[error("{uri}: {why}")]
    Unfit {
        /// Which.
        uri: Uri,
        /// What to use.
        why: &'static str,
    },
    /// The connection can't be set up.
    #[error("can't set up the connection")]
    SetUp(#[source] io::Error),
}

/// Connects a source to its destination, by way of a command perhaps.
///
/// # Errors
/// Nobody listens there, or the command can't be started.
pub fn connect(uri: &Uri) -> Result<(Channel, Option<Carrier>), LinkError> {
    let fail = |source| LinkError::Connect { uri: uri.clone(), source };
    match uri {
        Uri::Tcp { host, port } => {
            let stream = connect_tcp(host, *port).map_err(fail)?;
            Ok((tcp(stream).map_err(LinkError::SetUp)?, None))
        }
        Uri::Unix(path) => {
            let stream = connect_unix(path).map_err(fail)?;
            Ok((unix(stream).map_err(LinkError::SetUp)?, None))
        }
        Uri::Exec(command) => {
            let (stream, carrier) = Carrier::start(command).map_err(fail)?;
            Ok((unix(stream).map_err(LinkError::SetUp)?, Some(carrier)))
        }
        Uri::Stdio => Err(LinkError::Unfit {
            uri: uri.clone(),
            why: "the VM's own process connects, and its standard input is the guest's console: use exec:",
        }),
    }
}

fn connect_tcp(host: &str, port: u16) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Err(e) => last = e,
        }
    }
    Err(last)
}

/// Where a listener's backlog is full, as one's is that was stopped, the kernel waits for as long as a write may take.
fn connect_unix(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    set_socket_timeout(&socket, Timeout::Send, Some(CONNECT_TIMEOUT))?;
    let there = SocketAddrUnix::new(path)?;
    // A connection that a signal cut short, such as a debugger's stop, can be asked for again.
    match retry_on_intr(|| rustix::net::connect(&socket, &there)) {
        Err(Errno::AGAIN) => {
            Err(io::Error::new(io::ErrorKind::TimedOut, "it accepts no connection"))
        }
        connected => Ok(connected.map(|()| socket.into())?),
    }
}

fn channel(io: impl Transport + 'static) -> Channel {
    Channel::new(io, SystemClock::default())
}

/// TCP's connections have `TCP_NODELAY`, whichever process uses them.
fn accept_tcp(listener: &TcpListener) -> io::Result<TcpStream> {
    let stream = listener.accept()?.0;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn tcp(stream: TcpStream) -> io::Result<Channel> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(channel(stream))
}

fn unix(stream: UnixStream) -> io::Result<Channel> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(channel(stream))
}

/// A channel over what [`Listener::accept_for_another`] gave, a socket of either kind.
///
/// # Errors
/// The kernel's.
pub fn over(connection: OwnedFd) -> io::Result<Channel> {
    unix(UnixStream::from(connection))
}

/// Standard input and output, which may be pipes that others share: never made non-blocking.
struct Pipes {
    input: File,
    output: File,
}

impl Read for Pipes {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        wait(&self.input, PollFlags::IN)?;
        self.input.read(bytes)
    }
}

impl Write for Pipes {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        wait(&self.output, PollFlags::OUT)?;
        self.output.write(&bytes[..bytes.len().min(PIPE_WRITE_MAX)])
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn wait(fd: impl AsFd, what: PollFlags) -> io::Result<()> {
    let timeout = Timespec { tv_sec: 0, tv_nsec: i64::from(PATIENCE.subsec_nanos()) };
    match retry_on_intr(|| poll(&mut [PollFd::new(&fd, what)], Some(&timeout)))? {
        0 => Err(io::ErrorKind::WouldBlock.into()),
        _ => Ok(()),
    }
}

/// Where a destination waits for its source.
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// A UNIX socket, removed at the end.
    Unix(ControlSocket),
    /// The one connection that standard input and output are.
    Stdio(AtomicBool),
}

impl Listener {
    /// Listens.
    ///
    /// # Errors
    /// The address is taken or not of this host, or the place can't be listened on.
    pub fn bind(uri: &Uri) -> Result<Self, LinkError> {
        let fail = |source| LinkError::Listen { uri: uri.clone(), source };
        match uri {
            Uri::Tcp { host, port } => {
                let addresses: Vec<_> =
                    (host.as_str(), *port).to_socket_addrs().map_err(fail)?.collect();
                Ok(Self::Tcp(TcpListener::bind(addresses.as_slice()).map_err(fail)?))
            }
            Uri::Unix(path) => {
                let unfit = |why| LinkError::Unfit { uri: uri.clone(), why };
                let socket = ControlSocket::bind(path).map_err(|e| match e {
                    SocketError::Live { .. } => {
                        unfit("can't listen: somebody does already: take another path")
                    }
                    SocketError::Occupied { .. } => {
                        unfit("can't listen: it exists and is not a socket: take another path")
                    }
                    e => LinkError::Socket(e),
                })?;
                Ok(Self::Unix(socket))
            }
            Uri::Stdio => Ok(Self::Stdio(AtomicBool::new(false))),
            Uri::Exec(_) => {
                Err(LinkError::Unfit { uri: uri.clone(), why: "only --connect takes exec:" })
            }
        }
    }

    /// A connection that waits, for another process; waits for it no longer than [`PATIENCE`].
    ///
    /// # Errors
    /// `WouldBlock` if there is none; the kernel's. Standard input and output can't be handed on.
    pub fn accept_for_another(&self) -> io::Result<OwnedFd> {
        match self {
            Self::Tcp(listener) => {
                wait(listener, PollFlags::IN)?;
                Ok(accept_tcp(listener)?.into())
            }
            Self::Unix(socket) => {
                wait(socket.listener(), PollFlags::IN)?;
                Ok(socket.listener().accept()?.0.into())
            }
            Self::Stdio(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Waits for a connection. `None`: there will be no more.
    ///
    /// # Errors
    /// The kernel's.
    pub fn accept(&self) -> io::Result<Option<Channel>> {
        match self {
            Self::Tcp(listener) => tcp(accept_tcp(listener)?).map(Some),
            Self::Unix(socket) => unix(socket.listener().accept()?.0).map(Some),
            Self::Stdio(used) => {
                if used.swap(true, Ordering::SeqCst) {
                    return Ok(None);
                }
                let input = File::from(io::stdin().as_fd().try_clone_to_owned()?);
                let output = File::from(io::stdout().as_fd().try_clone_to_owned()?);
                Ok(Some(channel(Pipes { input, output })))
            }
        }
    }

    /// Ends another thread's wait in [`Self::accept`], and all that come.
    pub fn close(&self) {
        let _ = match self {
            Self::Tcp(listener) => rustix::net::shutdown(listener, rustix::net::Shutdown::Both),
            Self::Unix(socket) => {
                socket.remove();
                rustix::net::shutdown(socket.listener(), rustix::net::Shutdown::Both)
            }
            Self::Stdio(_) => Ok(()),
        };
    }
}
