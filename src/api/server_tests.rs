//! Tests of `server` and `client` together, with a control loop of a few lines instead of a VM.

use std::io::Read;
use std::path::PathBuf;

use super::*;
use crate::api::client::{Client as ApiClient, ClientError};
use crate::event::SnapshotRequest;

/// A served VM that isn't there: `answer` is its control loop.
struct Fake {
    dir: tempfile::TempDir,
    server: Option<Server>,
    control: Option<thread::JoinHandle<()>>,
    stop: Sender<Event>,
}

impl Fake {
    fn start(mut answer: impl FnMut(Request, Reply) + Send + 'static) -> Fake {
        let dir = tempfile::tempdir().expect("a directory");
        let socket = ControlSocket::bind(&dir.path().join("vm.sock")).expect("a free path");
        let (events, inbox) = mpsc::channel();
        let server = Server::start(socket, "vm", events.clone()).expect("a thread");
        let control = thread::spawn(move || {
            while let Ok(Event::Request { request, reply }) = inbox.recv() {
                answer(request, reply);
            }
        });
        Fake { dir, server: Some(server), control: Some(control), stop: events }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("vm.sock")
    }

    fn client(&self) -> ApiClient {
        ApiClient::connect(&self.path()).expect("it listens")
    }

    /// Sends raw bytes and reads to the end of the connection.
    fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = UnixStream::connect(self.path()).expect("it listens");
        stream.write_all(bytes).expect("it reads");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("it answers");
        answer
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        drop(self.stop.send(Event::ConsoleQuit));
        if let Some(control) = self.control.take() {
            control.join().expect("the fake control loop");
        }
        self.server.take();
    }
}

fn echo(request: Request, reply: Reply) {
    match request {
        Request::Info => reply.done(Ok(json!({ "state": "running" }))),
        Request::Pause => reply.done(Ok(Value::Null)),
        Request::Snapshot(_) => {
            for percent in [10, 50] {
                reply.progress(json!({ "percent": percent }));
            }
            reply.done(Ok(json!({ "bytes": 7 })));
        }
        Request::Stop { .. } => drop(reply),
        Request::CancelMigration => {
            reply.progress(json!(1));
            reply.done(Err(ApiError::conflict("late")));
        }
        _ => reply.done(Err(ApiError::conflict("not now"))),
    }
}

const SECONDS: Option<Duration> = Some(Duration::from_secs(20));

#[test]
fn requests_are_answered_one_after_another_on_one_connection() {
    let fake = Fake::start(echo);
    let mut client = fake.client();
    assert_eq!(client.call(&Request::Info, SECONDS).expect("info"), json!({ "state": "running" }));
    assert_eq!(client.call(&Request::Pause, SECONDS).expect("pause"), Value::Null);
    match client.call(&Request::Resume, SECONDS) {
        Err(ClientError::Refused(e)) => {
            assert_eq!((e.status, e.message.as_str()), (409, "not now"))
        }
        other => panic!("{other:?}"),
    }
    // A reply that is dropped is answered too.
    match client.call(&Request::Stop { force: true }, SECONDS) {
        Err(ClientError::Refused(e)) => assert_eq!(e.status, 410),
        other => panic!("{other:?}"),
    }
    assert_eq!(client.peer_pid(), i32::try_from(std::process::id()).ok());
}

#[test]
fn progress_is_streamed_to_who_asks_for_it() {
    let fake = Fake::start(echo);
    let mut client = fake.client();
    let request = Request::Snapshot(SnapshotRequest::new("/snap".into(), false));
    let mut seen = Vec::new();
    let end = client.call_with_progress(&request, SECONDS, |value| seen.push(value));
    assert_eq!(end.expect("the end"), json!({ "bytes": 7 }));
    assert_eq!(seen, [json!({ "percent": 10 }), json!({ "percent": 50 })]);
    match client.call(&Request::CancelMigration, SECONDS) {
        Err(ClientError::Refused(e)) => assert_eq!((e.status, e.message.as_str()), (409, "late")),
        other => panic!("{other:?}"),
    }
    let body = r#"{"dir":"/snap"}"#;
    let plain = fake.raw(
        format!(
            "PUT /snapshot HTTP/1.1\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .as_bytes(),
    );
    assert!(plain.ends_with("\r\n\r\n{\"bytes\":7}\n"), "{plain}");
}

#[test]
fn who_listens_is_told_without_the_control_thread() {
    let (release, wait) = mpsc::channel::<()>();
    let fake = Fake::start(move |_, reply| {
        wait.recv().expect_err("the test only drops its end");
        reply.done(Ok(Value::Null));
    });
    let busy = UnixStream::connect(fake.path()).expect("it listens");
    (&busy).write_all(b"GET /vm HTTP/1.1\r\n\r\n").expect("sent");
    let answer = fake.raw(b"GET / HTTP/1.0\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(answer.contains(r#""name":"vm""#), "{answer}");
    drop(release);
}

#[test]
fn bad_requests_are_answered_and_closed() {
    let fake = Fake::start(echo);
    assert!(fake.raw(b"hello\r\n\r\n").starts_with("HTTP/1.1 400 "));
    let huge = fake.raw(b"PUT /vm HTTP/1.1\r\nContent-Length: 9999999\r\n\r\n");
    assert!(huge.starts_with("HTTP/1.1 413 ") && huge.contains(r#"{"error":"#), "{huge}");
    // Wrong JSON is answered, and the connection goes on.
    let two = fake.raw(
        b"PUT /vm HTTP/1.1\r\nContent-Length: 1\r\n\r\n{GET / HTTP/1.1\r\nConnection: close\r\n\r\n",
    );
    assert!(two.starts_with("HTTP/1.1 400 ") && two.contains("HTTP/1.1 200 OK"), "{two}");
}

#[test]
fn one_client_too_many_is_sent_away_and_room_comes_back() {
    let fake = Fake::start(echo);
    let idle: Vec<_> = (0..CONNECTIONS_MAX)
        .map(|_| {
            let mut client = fake.client();
            client.call(&Request::Info, SECONDS).expect("room");
            client
        })
        .collect();
    let mut refused = String::new();
    let mut stream = UnixStream::connect(fake.path()).expect("it listens");
    stream.read_to_string(&mut refused).expect("it answers");
    assert!(refused.starts_with("HTTP/1.1 503 "), "{refused}");
    drop(idle);
    let deadline = Instant::now() + Duration::from_secs(10);
    while fake.client().call(&Request::Info, SECONDS).is_err() {
        assert!(Instant::now() < deadline, "the room never came back");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn clients_that_left_while_they_waited_take_no_room() {
    let (held, replies) = mpsc::channel();
    let fake = Fake::start(move |request, reply| match request {
        Request::Stop { .. } => held.send(reply).expect("the test holds them"),
        _ => reply.done(Ok(Value::Null)),
    });
    for _ in 0..2 * CONNECTIONS_MAX {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let mut client = fake.client();
            let short = Some(Duration::from_millis(20));
            match client.call(&Request::Stop { force: false }, short) {
                Err(ClientError::TimedOut) => break,
                Err(ClientError::Refused(e)) if e.status == 503 => {}
                Err(ClientError::Gone) => {}
                other => panic!("{other:?}"),
            }
            assert!(Instant::now() < deadline, "dead clients hold the room");
            thread::sleep(Duration::from_millis(50));
        }
    }
    drop(replies);
}

#[test]
fn the_end_answers_who_waits_and_removes_the_socket() {
    let fake = Fake::start(echo);
    let path = fake.path();
    let idle = fake.client();
    let mut waiting = UnixStream::connect(&path).expect("it listens");
    waiting.write_all(b"GET /v").expect("half a request");
    let start = Instant::now();
    drop(fake);
    assert!(start.elapsed() < SHUTDOWN_TIMEOUT, "the end waited for idle clients");
    assert!(idle.wait_gone(Duration::from_secs(5)));
    assert!(matches!(ApiClient::connect(&path), Err(ClientError::NoSuchVm { .. })));
}

#[test]
fn an_answer_under_way_at_the_end_arrives() {
    for _ in 0..50 {
        let fake = Fake::start(echo);
        let mut client = fake.client();
        let (sent, go) = mpsc::channel();
        let asking = thread::spawn(move || {
            sent.send(()).expect("the test waits");
            client.call(&Request::Info, SECONDS)
        });
        go.recv().expect("it starts");
        drop(fake);
        // Either it was answered, or it is told that the VM has ended: never silence for long.
        match asking.join().expect("no panic") {
            Ok(value) => assert_eq!(value, json!({ "state": "running" })),
            Err(ClientError::Refused(e)) => assert_eq!(e.status, 410),
            Err(ClientError::Gone) => {}
            Err(other) => panic!("{other:?}"),
        }
    }
}
