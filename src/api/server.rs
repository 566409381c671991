//! The server's side of the control socket: one thread accepts, up to [`CONNECTIONS_MAX`] threads
//! serve a connection each. They hold no state of the VM: each request becomes an [`Event`], and since
//! a connection waits for its answer, no client can make the control thread's channel grow.

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::http::{Connection, HttpError, HttpRequest, NDJSON, Timed, reason};
use super::route::{self, Route};
use super::socket::ControlSocket;
use crate::event::{Answer, ApiError, Event, Reply, Request};

/// The most connections at one time; another one is answered 503 and closed.
pub const CONNECTIONS_MAX: usize = 8;
/// How long a connection may be silent between requests.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a request may take to arrive, from its first byte.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// How long one write to a client may wait.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a connection that waits for an answer looks whether its client is still there.
const PEER_CHECK: Duration = Duration::from_millis(250);
/// How long the answers that are under way at the VM's end may take.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);
/// How long to wait after `accept` failed, as when no file descriptors are left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A running API server. Dropping it ends it: first drop the receiver of its events, so that
/// clients who still wait learn that the VM has ended.
#[derive(Debug)]
pub struct Server {
    socket: ControlSocket,
    accepting: Option<thread::JoinHandle<Vec<UnixStream>>>,
    /// Disconnected when the last connection has ended.
    ended: Receiver<()>,
}

impl Server {
    /// Starts to serve. `name` is the VM's.
    ///
    /// # Errors
    /// The kernel's, if there can be no thread.
    pub fn start(socket: ControlSocket, name: &str, events: Sender<Event>) -> io::Result<Server> {
        let listener = socket.listener().try_clone()?;
        let identity = json!({
            "name": name,
            "pid": std::process::id(),
            "version": env!("CARGO_PKG_VERSION"),
        });
        let (alive, ended) = mpsc::channel();
        let accepting = thread::Builder::new().name("api".into()).spawn(move || {
            let mut connections = Connections { open: Vec::new(), identity, events, alive };
            loop {
                match listener.accept() {
                    Ok((stream, _)) => connections.serve(stream),
                    // `shutdown` on a listening socket makes accept fail so.
                    Err(e) if e.kind() == io::ErrorKind::InvalidInput => break,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) => {
                        tracing::warn!("control socket: can't accept: {e}");
                        thread::sleep(ACCEPT_PAUSE);
                    }
                }
            }
            connections.open.into_iter().map(|(stream, _)| stream).collect()
        })?;
        Ok(Server { socket, accepting: Some(accepting), ended })
    }

    /// Removes the socket's file: another VM may take its place. Who is connected is still answered.
    pub fn vacate(&self) {
        self.socket.remove();
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &std::path::Path {
        self.socket.path()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.socket.remove();
        let listening = rustix::net::shutdown(self.socket.listener(), rustix::net::Shutdown::Both);
        let accepting = self.accepting.take().filter(|_| listening.is_ok());
        let Some(Ok(streams)) = accepting.map(thread::JoinHandle::join) else {
            return;
        };
        // Idle connections see their end; answers under way are still written.
        for stream in &streams {
            drop(stream.shutdown(Shutdown::Read));
        }
        let deadline = Instant::now() + SHUTDOWN_TIMEOUT;
        let left = |now| deadline.saturating_duration_since(now);
        while self.ended.recv_timeout(left(Instant::now())).is_ok() {}
    }
}

/// What the accepting thread owns.
struct Connections {
    open: Vec<(UnixStream, thread::JoinHandle<()>)>,
    identity: Value,
    events: Sender<Event>,
    alive: Sender<()>,
}

impl Connections {
    fn serve(&mut self, mut stream: UnixStream) {
        self.open.retain(|(_, thread)| !thread.is_finished());
        if self.open.len() >= CONNECTIONS_MAX {
            let message = format!("{CONNECTIONS_MAX} clients are connected: try again later");
            let answer = answer_bytes(&Err(ApiError { status: 503, message }), false);
            // The socket's buffer is empty: this can't wait.
            drop(stream.write_all(&answer));
            return;
        }
        if let Err(e) = self.spawn(stream) {
            tracing::warn!("control socket: can't serve a client: {e}");
        }
    }

    fn spawn(&mut self, stream: UnixStream) -> io::Result<()> {
        let kept = stream.try_clone()?;
        let client = Client {
            connection: Connection::new(Timed::new(stream, WRITE_TIMEOUT)?),
            identity: self.identity.clone(),
            events: self.events.clone(),
            _alive: self.alive.clone(),
        };
        let thread = thread::Builder::new().name("api-client".into()).spawn(|| client.serve())?;
        self.open.push((kept, thread));
        Ok(())
    }
}

/// One connection, on its own thread.
struct Client {
    connection: Connection<Timed>,
    identity: Value,
    events: Sender<Event>,
    _alive: Sender<()>,
}

impl Client {
    fn serve(mut self) {
        if let Err(e) = self.serve_requests() {
            tracing::debug!("control socket: a client is gone: {e}");
        }
        // The accepting thread holds a clone until it next looks: end the connection for both.
        drop(self.connection.stream.stream().shutdown(Shutdown::Both));
    }

    fn serve_requests(&mut self) -> io::Result<()> {
        loop {
            self.connection.stream.deadline = Some(Instant::now() + IDLE_TIMEOUT);
            if !self.connection.wait()? {
                return Ok(());
            }
            self.connection.stream.deadline = Some(Instant::now() + REQUEST_TIMEOUT);
            let http = match self.connection.read_request() {
                Ok(http) => http,
                Err(error) => return self.refuse(error),
            };
            tracing::debug!("control socket: {} {}", http.method, http.path);
            match route::read(&http) {
                Ok(Route::Control(request)) => self.control(&http, request)?,
                Ok(Route::Identity) => {
                    let identity = Ok(self.identity.clone());
                    self.answer(&identity, http.keep_alive)?;
                }
                Err(error) => self.answer(&Err(error), http.keep_alive)?,
            }
            if !http.keep_alive {
                return Ok(());
            }
        }
    }

    fn refuse(&mut self, error: HttpError) -> io::Result<()> {
        let error = match error {
            HttpError::Refused(error) => error,
            HttpError::Io(e) if e.kind() == io::ErrorKind::TimedOut => {
                ApiError { status: 408, message: "the request took too long to arrive".into() }
            }
            HttpError::Io(e) => return Err(e),
            HttpError::Truncated | HttpError::Answer(_) => {
                ApiError::bad_request("the request is cut short")
            }
        };
        self.answer(&Err(error), false)
    }

    fn control(&mut self, http: &HttpRequest, request: Request) -> io::Result<()> {
        let (reply, answers) = Reply::channel();
        if self.events.send(Event::Request { request, reply }).is_err() {
            return self.answer(&Err(ended()), http.keep_alive);
        }
        let mut streaming = false;
        loop {
            match self.next_answer(&answers)? {
                Answer::Still => {}
                Answer::Progress(_) if !http.streams => {}
                Answer::Progress(value) => {
                    if !streaming {
                        self.start_stream(http.keep_alive)?;
                        streaming = true;
                    }
                    self.line(&json!({ "progress": value }))?;
                }
                Answer::Done(result) if streaming => {
                    self.line(&match result {
                        Ok(value) => json!({ "done": value }),
                        Err(e) => json!({ "error": e.message, "status": e.status }),
                    })?;
                    return self.connection.stream.write_all(b"0\r\n\r\n");
                }
                Answer::Done(result) => return self.answer(&result, http.keep_alive),
            }
        }
    }

    /// Waits a while for an answer, as long as the client does: `Still` if there is none.
    fn next_answer(&self, answers: &Receiver<Answer>) -> io::Result<Answer> {
        match answers.recv_timeout(PEER_CHECK) {
            Ok(Answer::Still) | Err(RecvTimeoutError::Timeout) => {
                if self.connection.stream.peer_is_gone() {
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
                Ok(Answer::Still)
            }
            Ok(answer) => Ok(answer),
            Err(RecvTimeoutError::Disconnected) => Ok(Answer::Done(Err(ended()))),
        }
    }

    fn answer(&mut self, result: &Result<Value, ApiError>, keep_alive: bool) -> io::Result<()> {
        self.connection.stream.write_all(&answer_bytes(result, keep_alive))
    }

    fn start_stream(&mut self, keep_alive: bool) -> io::Result<()> {
        let connection = if keep_alive { "keep-alive" } else { "close" };
        let head = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: {NDJSON}\r\nTransfer-Encoding: chunked\r\nConnection: {connection}\r\n\r\n"
        );
        self.connection.stream.write_all(head.as_bytes())
    }

    fn line(&mut self, value: &Value) -> io::Result<()> {
        let line = format!("{value}\n");
        let chunk = format!("{:x}\r\n{line}\r\n", line.len());
        self.connection.stream.write_all(chunk.as_bytes())
    }
}

fn ended() -> ApiError {
    ApiError { status: 410, message: "the VM has ended".into() }
}

/// A whole answer. One without a value is 204 and has no body.
fn answer_bytes(result: &Result<Value, ApiError>, keep_alive: bool) -> Vec<u8> {
    let (status, body) = match result {
        Ok(Value::Null) => (204, String::new()),
        Ok(value) => (200, format!("{value}\n")),
        Err(e) => (e.status, format!("{}\n", json!({ "error": e.message }))),
    };
    let mut head = format!("HTTP/1.1 {status} {}\r\n", reason(status));
    if status != 204 {
        head += &format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len());
    }
    head += if keep_alive { "Connection: keep-alive\r\n\r\n" } else { "Connection: close\r\n\r\n" };
    (head + &body).into_bytes()
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
