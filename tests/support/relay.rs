//! A relay between a source and a destination that reads the stream's records as they pass, and springs a
//! trap at one of them: it kills an end, or cuts the connection.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;

use vmm_migration::wire::{self, HEAD_LEN, PREAMBLE_LEN, RecordHead, SUM_LEN, record};

use super::vm::{LONG, Place};

/// Any record.
pub const ANY: u32 = 0;

/// Where in the stream a trap springs: at the first record of type `kind`, once one of type `after` (if
/// any) has passed.
#[derive(Clone, Copy, Debug)]
pub struct Point {
    /// The record's type. `Pages` is `Pages2` as well: a source takes either.
    pub kind: u32,
    /// Only after one of this type.
    pub after: Option<u32>,
    /// Whether the record is passed on before the trap springs.
    pub delivered: bool,
}

struct Trap {
    point: Point,
    /// The connection ends at the point.
    cuts: bool,
    spring: Box<dyn FnOnce() + Send>,
    sprung: Sender<()>,
}

/// What all connections of a relay share.
struct Watch {
    trap: Option<Trap>,
    /// Records of this type are not passed on.
    hidden: Option<u32>,
    /// Types of the records that have passed.
    kinds: BTreeSet<u32>,
    /// Kind and version of each section that has passed.
    sections: Vec<(String, u16)>,
}

/// The relay, for as long as its thread lives: until the test ends.
pub struct Relay {
    place: Place,
    sprung: Receiver<()>,
    watch: Arc<Mutex<Watch>>,
}

impl Relay {
    /// Between whoever connects here and the destination at a UNIX socket. The trap springs once; later
    /// connections pass untouched.
    pub fn start(destination: &Path, point: Point, spring: impl FnOnce() + Send + 'static) -> Self {
        Self::trapping(destination, point, true, Box::new(spring))
    }

    /// As [`Self::start`], but the connection stays, and all passes.
    pub fn watching(
        destination: &Path,
        point: Point,
        spring: impl FnOnce() + Send + 'static,
    ) -> Self {
        Self::trapping(destination, point, false, Box::new(spring))
    }

    fn trapping(
        destination: &Path,
        point: Point,
        cuts: bool,
        spring: Box<dyn FnOnce() + Send>,
    ) -> Self {
        let (sender, sprung) = channel();
        let trap = Trap { point, cuts, spring, sprung: sender };
        Self::between(destination, sprung, Some(trap), None)
    }

    /// As [`Self::start`], without a trap; records of one type are kept from both ends.
    pub fn hiding(destination: &Path, kind: u32) -> Self {
        Self::between(destination, channel().1, None, Some(kind))
    }

    fn between(
        destination: &Path,
        sprung: Receiver<()>,
        trap: Option<Trap>,
        hidden: Option<u32>,
    ) -> Self {
        let place = Place::new();
        let listener = UnixListener::bind(place.path("relay.sock")).unwrap();
        let watch = Arc::new(Mutex::new(Watch {
            trap,
            hidden,
            kinds: BTreeSet::new(),
            sections: Vec::new(),
        }));
        let (destination, watched) = (destination.to_owned(), Arc::clone(&watch));
        thread::spawn(move || {
            for source in listener.incoming() {
                join(&source.unwrap(), &destination, &watched);
            }
        });
        Self { place, sprung, watch }
    }

    /// The versions of the sections of a kind that have passed, in order.
    pub fn versions(&self, kind: &str) -> Vec<u16> {
        let watch = self.watch.lock().unwrap();
        watch.sections.iter().filter(|(k, _)| k == kind).map(|(_, version)| *version).collect()
    }

    /// Whether a record of this type has passed.
    pub fn has_passed(&self, kind: u32) -> bool {
        self.watch.lock().unwrap().kinds.contains(&kind)
    }

    /// Where the source connects to.
    pub fn uri(&self) -> String {
        format!("unix:{}", self.path().display())
    }

    /// Its socket.
    pub fn path(&self) -> PathBuf {
        self.place.path("relay.sock")
    }

    /// Waits until the trap has sprung.
    pub fn wait(&self) {
        self.sprung.recv_timeout(LONG).expect("the record comes");
    }
}

/// Joins two ends. Where there is no destination, the source sees its connection end.
fn join(source: &UnixStream, destination: &Path, watch: &Arc<Mutex<Watch>>) {
    let Ok(destination) = UnixStream::connect(destination) else { return };
    let trapped = Arc::new(AtomicBool::new(false));
    for (from, to) in [(source, &destination), (&destination, source)] {
        let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
        let (watch, trapped) = (Arc::clone(watch), Arc::clone(&trapped));
        thread::spawn(move || {
            // Either end may go at any time.
            let _ = pump(&from, &to, &watch, &trapped);
            let _ = from.shutdown(Shutdown::Both);
            let _ = to.shutdown(Shutdown::Both);
        });
    }
}

/// Passes a preamble and records on, until the end or the trap. `trapped`: it is about to cut the connection. Nothing that
/// answers the record that was delivered passes any more, but the connection stays until whom the trap kills has ended.
fn pump(
    mut from: &UnixStream,
    mut to: &UnixStream,
    watch: &Mutex<Watch>,
    trapped: &AtomicBool,
) -> io::Result<()> {
    let mut preamble = [0; PREAMBLE_LEN];
    from.read_exact(&mut preamble)?;
    to.write_all(&preamble)?;
    loop {
        let mut head = [0; HEAD_LEN];
        from.read_exact(&mut head)?;
        let record = RecordHead::decode(head).expect("an end of ours sends what it may");
        let mut rest = vec![0; record.body_len() + SUM_LEN];
        from.read_exact(&mut rest)?;
        let mut whole = head.to_vec();
        whole.extend(rest);
        let caught = {
            let mut watch = watch.lock().unwrap();
            let kind = record.kind;
            if watch.hidden == Some(kind) {
                continue;
            }
            watch.kinds.insert(kind);
            if kind == record::SECTION {
                let body = &whole[HEAD_LEN..][..record.body_len()];
                let section = wire::decode_section(body).expect("a section");
                watch.sections.push((section.kind, section.version));
            }
            match watch.trap.as_mut() {
                Some(Trap { point: Point { after: after @ Some(_), .. }, .. })
                    if *after == Some(kind) =>
                {
                    *after = None;
                    None
                }
                Some(Trap { point: Point { kind: at, after: None, .. }, .. })
                    if [ANY, kind].contains(at)
                        || (*at, kind) == (record::PAGES, record::PAGES2) =>
                {
                    watch.trap.take()
                }
                _ => None,
            }
        };
        let Some(Trap { point, cuts, spring, sprung }) = caught else {
            if !trapped.load(Ordering::SeqCst) {
                to.write_all(&whole)?;
            }
            continue;
        };
        trapped.store(cuts, Ordering::SeqCst);
        if point.delivered {
            to.write_all(&whole)?;
        }
        spring();
        if cuts {
            from.shutdown(Shutdown::Both)?;
            to.shutdown(Shutdown::Both)?;
        }
        // The test may have given up.
        let _ = sprung.send(());
        if !cuts && !point.delivered {
            // To an end that was stopped this may take as long as it stands.
            to.write_all(&whole)?;
        }
        if cuts {
            return Ok(());
        }
    }
}
