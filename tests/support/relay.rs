//! A relay between a source and a destination that reads the stream's records as they pass, and springs a
//! trap at one of them: it kills an end, or cuts the connection.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;

use vmm_migration::wire::{CRC_LEN, HEAD_LEN, PREAMBLE_LEN, RecordHead};

use super::vm::{LONG, Place};

/// Any record.
pub const ANY: u32 = 0;

/// Where in the stream a trap springs: at the first record of type `kind`, once one of type `after` (if
/// any) has passed.
#[derive(Clone, Copy, Debug)]
pub struct Point {
    /// The record's type.
    pub kind: u32,
    /// Only after one of this type.
    pub after: Option<u32>,
    /// Whether the record is passed on before the trap springs.
    pub delivered: bool,
}

struct Trap {
    point: Point,
    spring: Box<dyn FnOnce() + Send>,
    sprung: Sender<()>,
}

/// The relay, for as long as its thread lives: until the test ends.
pub struct Relay {
    place: Place,
    sprung: Receiver<()>,
}

impl Relay {
    /// Between whoever connects here and the destination at a UNIX socket. The trap springs once; later
    /// connections pass untouched.
    pub fn start(destination: &Path, point: Point, spring: impl FnOnce() + Send + 'static) -> Self {
        let place = Place::new();
        let listener = UnixListener::bind(place.path("relay.sock")).unwrap();
        let (sender, sprung) = channel();
        let trap = Trap { point, spring: Box::new(spring), sprung: sender };
        let trap = Arc::new(Mutex::new(Some(trap)));
        let destination = destination.to_owned();
        thread::spawn(move || {
            for source in listener.incoming() {
                join(&source.unwrap(), &destination, &trap);
            }
        });
        Self { place, sprung }
    }

    /// Where the source connects to.
    pub fn uri(&self) -> String {
        format!("unix:{}", self.path().display())
    }

    fn path(&self) -> PathBuf {
        self.place.path("relay.sock")
    }

    /// Waits until the trap has sprung.
    pub fn wait(&self) {
        self.sprung.recv_timeout(LONG).expect("the record comes");
    }
}

/// Joins two ends. Where there is no destination, the source sees its connection end.
fn join(source: &UnixStream, destination: &Path, trap: &Arc<Mutex<Option<Trap>>>) {
    let Ok(destination) = UnixStream::connect(destination) else { return };
    for (from, to) in [(source, &destination), (&destination, source)] {
        let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
        let trap = Arc::clone(trap);
        thread::spawn(move || {
            // Either end may go at any time.
            let _ = pump(&from, &to, &trap);
            let _ = from.shutdown(Shutdown::Both);
            let _ = to.shutdown(Shutdown::Both);
        });
    }
}

/// Passes a preamble and records on, until the end or the trap.
fn pump(mut from: &UnixStream, mut to: &UnixStream, trap: &Mutex<Option<Trap>>) -> io::Result<()> {
    let mut preamble = [0; PREAMBLE_LEN];
    from.read_exact(&mut preamble)?;
    to.write_all(&preamble)?;
    loop {
        let mut head = [0; HEAD_LEN];
        from.read_exact(&mut head)?;
        let record = RecordHead::decode(head).expect("an end of ours sends what it may");
        let mut rest = vec![0; record.body_len() + CRC_LEN];
        from.read_exact(&mut rest)?;
        let mut whole = head.to_vec();
        whole.extend(rest);
        let caught = {
            let mut trap = trap.lock().unwrap();
            let kind = u32::from_le_bytes([head[0], head[1], head[2], head[3]]);
            match trap.as_mut() {
                Some(Trap { point: Point { after: after @ Some(_), .. }, .. })
                    if *after == Some(kind) =>
                {
                    *after = None;
                    None
                }
                Some(Trap { point: Point { kind: at, after: None, .. }, .. })
                    if [ANY, kind].contains(at) =>
                {
                    trap.take()
                }
                _ => None,
            }
        };
        let Some(Trap { point, spring, sprung }) = caught else {
            to.write_all(&whole)?;
            continue;
        };
        if point.delivered {
            to.write_all(&whole)?;
        }
        spring();
        from.shutdown(Shutdown::Both)?;
        to.shutdown(Shutdown::Both)?;
        // The test may have given up.
        let _ = sprung.send(());
        return Ok(());
    }
}
