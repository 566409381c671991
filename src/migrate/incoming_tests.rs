//! Tests of a listener's door: who waits there keeps nobody from ending it.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::*;
use crate::migrate::uri::Uri;

fn open(socket: &Path) -> Door {
    Door::open(Listener::bind(&Uri::Unix(socket.to_owned())).unwrap()).unwrap()
}

/// Comes, says nothing of sense, and has been heard out, or soon will be, when this returns.
fn stray(socket: &Path) {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let _ = std::io::copy(&mut stream, &mut std::io::sink());
}

#[test]
fn of_many_that_bring_no_guest_few_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("move.sock");
    let door = open(&socket);
    (0..3 * GREETED_MAX).for_each(|_| stray(&socket));
    let (_sender, events) = mpsc::channel();
    let until = Instant::now() + Duration::from_secs(1);
    let callers = std::iter::from_fn(|| door.next(&events, Some(until)));
    let kept = callers.filter(|(caller, _)| caller.is_err()).count();
    // The last may still be on their way to the queue when it is read.
    assert!((GREETED_MAX..2 * GREETED_MAX).contains(&kept), "{kept}");
    // There is room again.
    stray(&socket);
    assert!(door.next(&events, None).is_some());
}

#[test]
fn who_waits_keeps_no_signal_unheard_and_no_end_from_coming() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("move.sock");
    let door = open(&socket);
    stray(&socket);
    let (sender, events) = mpsc::channel();
    assert!(door.next(&events, Some(Instant::now())).is_none());
    sender.send(Event::ConsoleQuit).unwrap();
    assert!(door.next(&events, None).is_none());
    assert!(door.next(&events, None).is_some());
}
