//! The client's side of the control socket: what `vmm info`, `vmm stop` and their like speak.

use std::io::{self, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::http::{ANSWER_BYTES_MAX, Body, Connection, HttpError, NDJSON, Timed};
use super::{route, socket};
use crate::event::{ApiError, Request};

/// How long sending a request may wait for a VM that doesn't read.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a VM didn't do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There is no socket.
    #[error("{path}: no such VM: `vmm list` shows those that run")]
    NoSuchVm {
        /// The socket's path.
        path: PathBuf,
    },
    /// The socket is there, but nobody listens.
    #[error("{path}: the VM is dead, only its socket is left")]
    Dead {
        /// The socket's path.
        path: PathBuf,
    },
    /// It is something else.
    #[error("{path}: not a control socket: a VM is a name or its socket's path")]
    NoSocket {
        /// The path.
        path: PathBuf,
    },
    /// The kernel doesn't let us connect.
    #[error("{path}: can't connect")]
    Connect {
        /// The socket's path.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The VM ended, or the connection to it.
    #[error("the VM ended before it answered")]
    Gone,
    /// No answer in time.
    #[error("the VM didn't answer in time")]
    TimedOut,
    /// The VM said that its guest has ended, but its process didn't.
    #[error("the guest has ended, but its VMM hangs: kill its process")]
    StillThere,
    /// The VM answered with an error.
    #[error(transparent)]
    Refused(ApiError),
    /// The answer makes no sense.
    #[error("{0}")]
    Protocol(String),
}

impl From<HttpError> for ClientError {
    fn from(error: HttpError) -> ClientError {
        match error {
            HttpError::Truncated => ClientError::Gone,
            HttpError::Io(e) => e.into(),
            other => ClientError::Protocol(other.to_string()),
        }
    }
}

impl From<io::Error> for ClientError {
    fn from(error: io::Error) -> ClientError {
        match error.kind() {
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => ClientError::TimedOut,
            _ => ClientError::Gone,
        }
    }
}

/// A connection to a VM.
#[derive(Debug)]
pub struct Client {
    connection: Connection<Timed>,
}

impl Client {
    /// Connects to the VM at a path.
    ///
    /// # Errors
    /// [`ClientError::NoSuchVm`], [`ClientError::Dead`] or [`ClientError::Connect`].
    pub fn connect(path: &Path) -> Result<Client, ClientError> {
        let fail = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => ClientError::NoSuchVm { path: path.into() },
            io::ErrorKind::ConnectionRefused if !is_socket(path) => {
                ClientError::NoSocket { path: path.into() }
            }
            io::ErrorKind::ConnectionRefused => ClientError::Dead { path: path.into() },
            _ => ClientError::Connect { path: path.into(), source },
        };
        let stream = socket::connect(path).map_err(fail)?;
        let stream = Timed::new(stream, WRITE_TIMEOUT).map_err(fail)?;
        Ok(Client { connection: Connection::new(stream) })
    }

    /// The process that serves the socket, if the kernel tells.
    #[must_use]
    pub fn peer_pid(&self) -> Option<i32> {
        socket::peer_pid(self.connection.stream.stream())
    }

    /// Sends a request and waits for its end, for ever if `timeout` is `None`.
    ///
    /// # Errors
    /// [`ClientError::Refused`] has the VM's own words.
    pub fn call(
        &mut self,
        request: &Request,
        timeout: Option<Duration>,
    ) -> Result<Value, ClientError> {
        self.call_with_progress(request, timeout, |_| {})
    }

    /// Sends a request, hands each report of progress to `progress`, and waits for the end.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn call_with_progress(
        &mut self,
        request: &Request,
        timeout: Option<Duration>,
        progress: impl FnMut(Value),
    ) -> Result<Value, ClientError> {
        self.connection.stream.deadline = timeout.map(|timeout| Instant::now() + timeout);
        self.send(request)?;
        match self.connection.read_answer_head()? {
            (status, Body::Length(length)) => {
                let body = self.connection.take(length)?;
                let value = if body.is_empty() { Value::Null } else { parse(&body)? };
                if (200..300).contains(&status) { Ok(value) } else { Err(refused(&value, status)) }
            }
            (_, Body::Chunked) => self.read_stream(progress),
        }
    }

    /// Waits until the VM has let go of its disks and its socket: then it closes its connections.
    /// False if it didn't within `timeout`, which is under the server's limit for silent connections.
    pub fn wait_gone(mut self, timeout: Duration) -> bool {
        self.connection.stream.deadline = Some(Instant::now() + timeout);
        !matches!(self.connection.wait(), Err(e) if e.kind() == io::ErrorKind::TimedOut)
    }

    fn send(&mut self, request: &Request) -> Result<(), ClientError> {
        let (method, path, body) = route::write(request);
        let body = body.map_or_else(String::new, |body| body.to_string());
        let text = format!(
            "{method} {path} HTTP/1.1\r\nHost: vm\r\nAccept: application/json, {NDJSON}\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        Ok(self.connection.stream.write_all(text.as_bytes())?)
    }

    fn read_stream(&mut self, mut progress: impl FnMut(Value)) -> Result<Value, ClientError> {
        let mut unread = Vec::new();
        let mut end = None;
        loop {
            let chunk = self.connection.read_chunk()?;
            if chunk.is_empty() {
                return end.unwrap_or(Err(ClientError::Gone));
            }
            unread.extend_from_slice(&chunk);
            while let Some(newline) = unread.iter().position(|byte| *byte == b'\n') {
                let rest = unread.split_off(newline + 1);
                let mut line = parse(&std::mem::replace(&mut unread, rest))?;
                if let Some(value) = line.get_mut("progress") {
                    progress(value.take());
                } else if let Some(value) = line.get_mut("done") {
                    end = Some(Ok(value.take()));
                } else {
                    let status = line.get("status").and_then(Value::as_u64).unwrap_or(500);
                    end = Some(Err(refused(&line, u16::try_from(status).unwrap_or(500))));
                }
            }
            if unread.len() > ANSWER_BYTES_MAX {
                return Err(ClientError::Protocol("a line of the answer is too long".into()));
            }
        }
    }
}

fn parse(bytes: &[u8]) -> Result<Value, ClientError> {
    serde_json::from_slice(bytes)
        .map_err(|e| ClientError::Protocol(format!("the answer is not JSON: {e}")))
}

fn refused(value: &Value, status: u16) -> ClientError {
    let message = value.get("error").and_then(Value::as_str);
    let message = message.map_or_else(|| format!("the VM answered {status}"), str::to_owned);
    ClientError::Refused(ApiError { status, message })
}

/// A connection to a file of another kind is refused like one to a dead VM.
fn is_socket(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket())
}
