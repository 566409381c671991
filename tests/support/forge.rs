//! A relay that lies: it passes on what both ends say, but for one preamble or record, in whose place it tells something
//! else. Where that is records, whatever follows is true to them: the counts and the digest of `End`.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;

use vmm_migration::channel::Peer;
use vmm_migration::message::{End, Message};
use vmm_migration::wire::record::{END, PAGES, PAGES2, SECTION};
use vmm_migration::wire::{self, Digest, HEAD_LEN, PREAMBLE_LEN, RecordHead, SUM_LEN, put_record};

use super::vm::Place;

/// In place of a record's type: the preamble.
pub const PREAMBLE: u32 = 0;

/// What is told in place of what was said.
pub enum Told {
    /// Records, as type and body, each with its right checksum; and an `End` to which they are right.
    Records(Vec<(u32, Vec<u8>)>),
    /// These bytes. `End` comes as it was written.
    Bytes(Vec<u8>),
    /// These bytes, and nothing after.
    Last(Vec<u8>),
}

/// One lie.
pub struct Forgery {
    /// Whose words are changed.
    pub by: Peer,
    /// The first of this type, or [`PREAMBLE`]. `Pages` is `Pages2` as well: a source takes either.
    pub kind: u32,
    /// Only after one of this type.
    pub after: Option<u32>,
    /// Makes the lie of the whole preamble or record, its checksum with it.
    pub told: fn(&[u8]) -> Told,
}

/// Listens before a destination at a UNIX socket, as long as the place lasts. The first connection is lied to, later ones pass
/// untouched. Gives where a source connects to.
pub fn before(destination: &Path, forgery: Forgery) -> (Place, String) {
    let place = Place::new();
    let socket = place.path("forge.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let (destination, mut forgery) = (destination.to_owned(), Some(forgery));
    thread::spawn(move || {
        for source in listener.incoming() {
            // Where there is no destination, the source sees its connection end.
            let (Ok(source), Ok(there)) = (source, UnixStream::connect(&destination)) else {
                continue;
            };
            let forgery = forgery.take();
            let (by_source, by_destination) = match forgery {
                Some(forgery) if forgery.by == Peer::Source => (Some(forgery), None),
                other => (None, other),
            };
            spawn_pass(&source, &there, by_source);
            spawn_pass(&there, &source, by_destination);
        }
    });
    let uri = format!("unix:{}", socket.display());
    (place, uri)
}

fn spawn_pass(from: &UnixStream, to: &UnixStream, forgery: Option<Forgery>) {
    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
    thread::spawn(move || {
        // It ends with an error, the connection's end; or with a lie after which nothing comes.
        let cut = pass(&from, &to, forgery).is_ok();
        // What was said before is still heard, and answered.
        let _ = to.shutdown(Shutdown::Write);
        if cut {
            let _ = from.shutdown(Shutdown::Both);
        }
    });
}

/// Passes a preamble and records on until either end hangs up, or nothing more is told.
fn pass(
    mut from: &UnixStream,
    mut to: &UnixStream,
    mut forgery: Option<Forgery>,
) -> io::Result<()> {
    let mut whole = vec![0; PREAMBLE_LEN];
    from.read_exact(&mut whole)?;
    let mut kind = PREAMBLE;
    let mut count = Count::default();
    loop {
        let is_it = |forgery: &mut Forgery| {
            forgery.after.is_none()
                && (forgery.kind == kind || (forgery.kind, kind) == (PAGES, PAGES2))
        };
        match forgery.take_if(is_it).map(|forgery| (forgery.told)(&whole)) {
            Some(Told::Records(records)) => to.write_all(&count.lie(kind, &records))?,
            Some(Told::Bytes(bytes)) => to.write_all(&bytes)?,
            Some(Told::Last(bytes)) => return to.write_all(&bytes),
            None => to.write_all(&count.truth(kind, &whole))?,
        }
        if let Some(forgery) = forgery.as_mut().filter(|forgery| forgery.after == Some(kind)) {
            forgery.after = None;
        }
        let mut head = [0; HEAD_LEN];
        from.read_exact(&mut head)?;
        let record = RecordHead::decode(head).expect("an end of ours sends what it may");
        kind = record.kind;
        whole = vec![0; HEAD_LEN + record.body_len() + SUM_LEN];
        whole[..HEAD_LEN].copy_from_slice(&head);
        from.read_exact(&mut whole[HEAD_LEN..])?;
    }
}

/// The body of a whole record.
pub fn body(whole: &[u8]) -> &[u8] {
    &whole[HEAD_LEN..whole.len() - SUM_LEN]
}

/// The type of a whole record.
fn kind(whole: &[u8]) -> u32 {
    let (head, _) = whole.split_first_chunk().expect("a record");
    RecordHead::decode(*head).expect("one of ours").kind
}

/// The message of a whole record.
pub fn message(whole: &[u8]) -> Message {
    Message::parse(kind(whole), body(whole)).expect("one of ours")
}

/// A body in the place of a whole record's, with its right checksum.
pub fn framed(whole: &[u8], body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    put_record(&mut out, kind(whole), body);
    out
}

/// A whole record, and others before it.
pub fn behind(whole: &[u8], others: &[(u32, Vec<u8>)]) -> Told {
    Told::Records([others, &[(kind(whole), body(whole).to_vec())]].concat())
}

/// A message in its place.
pub fn say(message: &Message) -> Told {
    Told::Records(vec![(message.kind(), message.body())])
}

/// What was told so far, for `End`.
#[derive(Default)]
struct Count {
    digest: Digest,
    has_lied: bool,
    more_sections: i32,
}

impl Count {
    fn lie(&mut self, kind: u32, records: &[(u32, Vec<u8>)]) -> Vec<u8> {
        self.has_lied = true;
        let sections = records.iter().filter(|(kind, _)| *kind == SECTION).count();
        self.more_sections += i32::try_from(sections).unwrap() - i32::from(kind == SECTION);
        let mut out = Vec::new();
        for (kind, body) in records {
            self.digest.add(put_record(&mut out, *kind, body));
        }
        out
    }

    fn truth(&mut self, kind: u32, whole: &[u8]) -> Vec<u8> {
        if kind == END && self.has_lied {
            let Message::End(end) = message(whole) else { unreachable!("of that type") };
            let (records, digest) = self.digest.value();
            let sections = end.sections.checked_add_signed(self.more_sections).unwrap();
            let end = Message::End(End { records, digest, sections, ..end });
            return self.lie(END, &[(END, end.body())]);
        }
        if kind != PREAMBLE {
            let sum = whole.last_chunk::<{ wire::SUM_LEN }>().expect("a record");
            self.digest.add(u32::from_le_bytes(*sum));
        }
        whole.to_vec()
    }
}
