//! As much of HTTP/1.1 (RFC 9112) as a control socket needs, for both ends: heads through `httparse`,
//! bodies by `Content-Length`, answers also chunked. What arrives is hostile: every length has a
//! limit, and what is ambiguous (two lengths, a length and an encoding) is refused.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::event::ApiError;

/// The longest head of a request or an answer, in bytes.
pub const HEAD_BYTES_MAX: usize = 8 << 10;
/// The most header lines.
pub const HEADERS_MAX: usize = 32;
/// The longest body of a request, in bytes.
pub const REQUEST_BODY_BYTES_MAX: usize = 64 << 10;
/// The longest body of an answer, or line of a streamed one, that a client takes, in bytes.
pub const ANSWER_BYTES_MAX: usize = 4 << 20;
/// The content type of a streamed answer: one JSON value a line.
pub const NDJSON: &str = "application/x-ndjson";

const READ_BYTES: usize = 4 << 10;

/// Why no message could be read.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// The peer closed the connection within a message.
    #[error("the connection ended within a message")]
    Truncated,
    /// Reading or writing failed, or its deadline passed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// A request that gets this answer, after which the connection closes.
    #[error(transparent)]
    Refused(ApiError),
    /// An answer that isn't HTTP as this side speaks it.
    #[error("the answer is not HTTP as a VM speaks it: {0}")]
    Answer(&'static str),
}

fn refused(status: u16, message: impl Into<String>) -> HttpError {
    HttpError::Refused(ApiError { status, message: message.into() })
}

/// A stream with a deadline for all reads together, so that a peer who sends one byte a second
/// gains nothing.
#[derive(Debug)]
pub struct Timed {
    stream: UnixStream,
    /// When reading ends; `None` for never.
    pub deadline: Option<Instant>,
}

impl Timed {
    /// A stream without a deadline, whose single writes take at most `write_timeout`.
    ///
    /// # Errors
    /// The kernel's, if the time limit can't be set.
    pub fn new(stream: UnixStream, write_timeout: Duration) -> io::Result<Timed> {
        stream.set_write_timeout(Some(write_timeout))?;
        Ok(Timed { stream, deadline: None })
    }

    /// Whether the peer has closed both directions: nobody is there to read an answer.
    #[must_use]
    pub fn peer_is_gone(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, poll};
        let mut fds = [PollFd::from_borrowed_fd(self.stream.as_fd(), PollFlags::empty())];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&now)).is_ok()
            && fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
    }

    /// The stream itself.
    #[must_use]
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }
}

impl Read for Timed {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let timeout = match self.deadline {
            None => None,
            Some(deadline) => match deadline.checked_duration_since(Instant::now()) {
                Some(left) if !left.is_zero() => Some(left),
                _ => return Err(io::ErrorKind::TimedOut.into()),
            },
        };
        self.stream.set_read_timeout(timeout)?;
        self.stream.read(buf).map_err(|e| match e.kind() {
            io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
            _ => e,
        })
    }
}

impl Write for Timed {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.stream.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A stream and what was read from it but not yet used.
#[derive(Debug)]
pub struct Connection<S> {
    /// The stream.
    pub stream: S,
    unread: Vec<u8>,
}

/// A whole request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpRequest {
    /// The method, as sent.
    pub method: String,
    /// The target, as sent.
    pub path: String,
    /// The body, at most [`REQUEST_BODY_BYTES_MAX`].
    pub body: Vec<u8>,
    /// Whether the client takes a streamed answer ([`NDJSON`] in `Accept`).
    pub streams: bool,
    /// Whether the connection serves another request after this one.
    pub keep_alive: bool,
}

/// How long a message's body is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body {
    /// This many bytes.
    Length(usize),
    /// In chunks.
    Chunked,
}

/// What the header lines say that matters here.
struct Headers {
    length: Option<usize>,
    encoded: bool,
    close: bool,
    keep: bool,
    streams: bool,
    awaits_continue: bool,
}

impl Headers {
    /// Errors are texts, since client and server wrap them differently.
    fn read(headers: &[httparse::Header<'_>]) -> Result<Headers, &'static str> {
        let mut found = Headers {
            length: None,
            encoded: false,
            close: false,
            keep: false,
            streams: false,
            awaits_continue: false,
        };
        for header in headers {
            let value = std::str::from_utf8(header.value).unwrap_or("").trim();
            if header.name.eq_ignore_ascii_case("content-length") {
                if found.length.is_some() {
                    return Err("Content-Length is given twice");
                }
                if value.is_empty() || !value.bytes().all(|b| b.is_ascii_digit()) {
                    return Err("Content-Length is not a number");
                }
                found.length = Some(value.parse().map_err(|_| "Content-Length is too big")?);
            } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
                found.encoded = true;
            } else if header.name.eq_ignore_ascii_case("connection") {
                found.close |= has_token(value, "close");
                found.keep |= has_token(value, "keep-alive");
            } else if header.name.eq_ignore_ascii_case("accept") {
                found.streams |= has_token(value, NDJSON);
            } else if header.name.eq_ignore_ascii_case("expect") {
                found.awaits_continue |= has_token(value, "100-continue");
            }
        }
        if found.encoded && found.length.is_some() {
            return Err("Content-Length and Transfer-Encoding exclude each other");
        }
        Ok(found)
    }
}

fn has_token(value: &str, token: &str) -> bool {
    value
        .split(',')
        .map(|item| item.split(';').next().unwrap_or("").trim())
        .any(|item| item.eq_ignore_ascii_case(token))
}

/// The head of a request, with its length in the buffer.
struct RequestHead {
    bytes: usize,
    method: String,
    path: String,
    version: u8,
    headers: Headers,
}

impl<S: Read + Write> Connection<S> {
    /// A connection on which nothing was read yet.
    pub fn new(stream: S) -> Connection<S> {
        Connection { stream, unread: Vec::new() }
    }

    /// Waits for the first bytes of a message. False if the peer closed the connection instead.
    ///
    /// # Errors
    /// The stream's.
    pub fn wait(&mut self) -> io::Result<bool> {
        if self.unread.is_empty() {
            self.fill()?;
        }
        Ok(!self.unread.is_empty())
    }

    fn fill(&mut self) -> io::Result<usize> {
        let mut bytes = [0; READ_BYTES];
        loop {
            match self.stream.read(&mut bytes) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
                Ok(count) => {
                    self.unread.extend_from_slice(&bytes[..count]);
                    return Ok(count);
                }
            }
        }
    }

    fn fill_or_truncated(&mut self) -> Result<(), HttpError> {
        if self.fill()? == 0 { Err(HttpError::Truncated) } else { Ok(()) }
    }

    /// Reads one request.
    ///
    /// # Errors
    /// [`HttpError::Refused`] has an answer for the client; after any error the connection is of
    /// no more use.
    pub fn read_request(&mut self) -> Result<HttpRequest, HttpError> {
        let head = loop {
            if let Some(head) = parse_request(&self.unread)? {
                break head;
            }
            if self.unread.len() >= HEAD_BYTES_MAX {
                return Err(refused(431, format!("the head is over {HEAD_BYTES_MAX} bytes")));
            }
            self.fill_or_truncated()?;
        };
        if head.bytes > HEAD_BYTES_MAX {
            return Err(refused(431, format!("the head is over {HEAD_BYTES_MAX} bytes")));
        }
        if head.headers.encoded {
            return Err(refused(501, "send the body with Content-Length, not encoded"));
        }
        let length = head.headers.length.unwrap_or(0);
        if length > REQUEST_BODY_BYTES_MAX {
            return Err(refused(413, format!("the body is over {REQUEST_BODY_BYTES_MAX} bytes")));
        }
        self.unread.drain(..head.bytes);
        if head.headers.awaits_continue && self.unread.len() < length {
            self.stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        let body = self.take(length)?;
        let keep_alive = !head.headers.close && (head.version == 1 || head.headers.keep);
        let streams = head.headers.streams && head.version == 1;
        Ok(HttpRequest { method: head.method, path: head.path, body, streams, keep_alive })
    }

    /// Reads the head of an answer: its status and how its body is to be read.
    ///
    /// # Errors
    /// [`HttpError::Answer`] if it is no HTTP that this client speaks.
    pub fn read_answer_head(&mut self) -> Result<(u16, Body), HttpError> {
        loop {
            let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
            let mut answer = httparse::Response::new(&mut headers);
            match answer.parse(&self.unread) {
                Ok(httparse::Status::Complete(bytes)) => {
                    let status = answer.code.ok_or(HttpError::Answer("no status"))?;
                    let headers = Headers::read(answer.headers).map_err(HttpError::Answer)?;
                    self.unread.drain(..bytes);
                    if status == 100 {
                        continue;
                    }
                    return Ok((
                        status,
                        match headers.length {
                            Some(length) if length > ANSWER_BYTES_MAX => {
                                return Err(HttpError::Answer("its body is too long"));
                            }
                            Some(length) => Body::Length(length),
                            None if headers.encoded => Body::Chunked,
                            None => Body::Length(0),
                        },
                    ));
                }
                Ok(httparse::Status::Partial) if self.unread.len() < HEAD_BYTES_MAX => {}
                Ok(httparse::Status::Partial) => {
                    return Err(HttpError::Answer("its head is too long"));
                }
                Err(_) => return Err(HttpError::Answer("its head can't be parsed")),
            }
            self.fill_or_truncated()?;
        }
    }

    /// Reads exactly `length` bytes, which the caller has checked against a limit.
    ///
    /// # Errors
    /// [`HttpError::Truncated`] if the stream ends before.
    pub fn take(&mut self, length: usize) -> Result<Vec<u8>, HttpError> {
        while self.unread.len() < length {
            self.fill_or_truncated()?;
        }
        let rest = self.unread.split_off(length);
        Ok(std::mem::replace(&mut self.unread, rest))
    }

    /// Reads one chunk of a chunked answer; an empty one is the last.
    ///
    /// # Errors
    /// [`HttpError::Answer`] for a bad or too long chunk.
    pub fn read_chunk(&mut self) -> Result<Vec<u8>, HttpError> {
        loop {
            match httparse::parse_chunk_size(&self.unread) {
                Ok(httparse::Status::Complete((bytes, size))) => {
                    let size = usize::try_from(size).unwrap_or(usize::MAX);
                    if size > ANSWER_BYTES_MAX {
                        return Err(HttpError::Answer("a chunk is too long"));
                    }
                    self.unread.drain(..bytes);
                    let chunk = self.take(size)?;
                    if self.take(2)? != b"\r\n" {
                        return Err(HttpError::Answer("a chunk doesn't end where it says"));
                    }
                    return Ok(chunk);
                }
                Ok(httparse::Status::Partial) if self.unread.len() < 256 => {
                    self.fill_or_truncated()?
                }
                _ => return Err(HttpError::Answer("a chunk's length can't be parsed")),
            }
        }
    }
}

fn parse_request(bytes: &[u8]) -> Result<Option<RequestHead>, HttpError> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    let length = match request.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => {
            return Err(refused(431, format!("more than {HEADERS_MAX} header lines")));
        }
        Err(httparse::Error::Version) => return Err(refused(505, "it takes HTTP/1.1")),
        Err(e) => return Err(refused(400, format!("not an HTTP request: {e}"))),
    };
    let headers = Headers::read(request.headers).map_err(|text| refused(400, text))?;
    Ok(Some(RequestHead {
        bytes: length,
        method: request.method.unwrap_or("").into(),
        path: request.path.unwrap_or("").into(),
        version: request.version.unwrap_or(0),
        headers,
    }))
}

/// The text that HTTP gives to a status.
#[must_use]
pub fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        204 => "No Content",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        409 => "Conflict",
        410 => "Gone",
        413 => "Content Too Large",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        505 => "HTTP Version Not Supported",
        _ => "Status",
    }
}

#[cfg(test)]
#[path = "http_tests.rs"]
mod tests;
