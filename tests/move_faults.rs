//! Either end of a migration killed, or the connection cut, at every message between them, before it arrives
//! and after: never two guests; and none only where the end that owned it was the one that was killed.

mod support;

use std::time::{Duration, Instant};

use rustix::process::Signal;
use support::disk;
use support::guests::Guest;
use support::moves::{EASY, until};
use support::relay::{ANY, Point, Relay};
use support::vm::{Vm, has_kvm};
use vmm_migration::wire::record::*;

/// What happens at the point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Cut,
    KillSource,
    KillDestination,
}

/// How far the guest's ownership had passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    Source,
    /// `Commit` reached the destination, which has perhaps activated the guest.
    Passing,
    /// The destination said that it runs the guest.
    Destination,
    /// The source heard that.
    DestinationAlone,
}

fn owner(point: Point) -> Owner {
    match (point.kind, point.delivered) {
        (COMMIT, true) => Owner::Passing,
        (ACTIVATED, false) => Owner::Destination,
        (ACTIVATED, true) | (DONE, _) => Owner::DestinationAlone,
        _ => Owner::Source,
    }
}

/// A guest that checks its memory, with a disk, and its destination.
struct Scene {
    source: Vm,
    destination: Vm,
}

impl Scene {
    fn new() -> Self {
        let mut source = disk::start(Guest::dirtier(8, 300), &["--mem", "32M"]);
        runs(&mut source);
        let (destination, _) = Vm::listen(&[]);
        Self { source, destination }
    }

    /// To the destination it was a connection that ended: it still takes the next guest. Gives whether it was only that.
    fn was_never_heard_of(&mut self) -> bool {
        let mut other = Vm::start(Guest::dirtier(8, 0), &[]);
        runs(&mut other);
        let uri = format!("unix:{}", self.destination.place.path("move.sock").display());
        if other.try_move(&uri, &EASY).status != Some(0) {
            return false;
        }
        runs(&mut self.destination);
        self.destination.tell(&["stop", "--force"]);
        let (status, err) = self.destination.wait();
        let first = err.lines().next().unwrap_or_default();
        let words =
            "a connection brought no guest: pre-migration failed: the source closed the connection";
        assert!(status == Some(0) && first.ends_with(words), "{err}");
        disk::check_untouched(&self.source);
        true
    }

    /// The guest runs at the source; it moves if it is asked to.
    fn stays(mut self) {
        until("runs on at the source", || self.source.info()["state"] == "running");
        runs(&mut self.source);
        assert_eq!(self.destination.read(Duration::from_millis(1)), b"", "a second copy ran");
        self.destination.signal(Signal::KILL);
        let (mut again, uri) = Vm::listen(&[]);
        self.source.move_to(&uri, &EASY);
        runs(&mut again);
        disk::check_content(&self.source);
    }

    /// The guest ended with the source. The destination says so, ran nothing of it, and has left its disk alone.
    fn lost(mut self, point: Point) {
        if point.kind == HELLO && self.was_never_heard_of() {
            return;
        }
        if matches!((point.kind, point.delivered), (END, true) | (READY | COMMIT, _)) {
            // Ready, it waits for a source that may ask.
            let socket = self.destination.place.path("vm.sock");
            until("gives up", || !socket.exists());
            self.destination.signal(Signal::TERM);
        }
        let (status, err) = self.destination.wait();
        assert_eq!((status, self.destination.read_to_end()), (Some(1), vec![]), "{err}");
        let last = err.lines().last().unwrap_or_default();
        let words = " failed: the source closed the connection; if the source is gone, the guest is gone: nothing of it \
                     runs here, and its disks are untouched";
        assert!(last.starts_with("vmm: the migration failed: ") && last.ends_with(words), "{err}");
        disk::check_untouched(&self.source);
    }

    /// The guest runs at the destination only.
    fn has_moved(mut self) {
        runs(&mut self.destination);
        self.source.read_to_end();
        let (status, err) = self.source.wait();
        assert!(status == Some(0) || status.is_none(), "{status:?} {err}");
        disk::check_content(&self.source);
    }
}

/// It prints a dot for each pass over its memory without a difference.
fn runs(vm: &mut Vm) {
    // What it printed before doesn't count. (It prints a few thousand dots a second: this is all.)
    vm.read_some(1);
    let until = Instant::now() + Duration::from_millis(50);
    while Instant::now() < until {
        let dots = vm.read_some(1);
        assert!(dots.iter().all(|c| *c == b'.'), "its memory changed: {dots:?}");
    }
}

fn at(point: Point, fault: Fault) {
    let scene = Scene::new();
    let (source, destination) = (scene.source.killer(), scene.destination.killer());
    let relay =
        Relay::start(&scene.destination.place.path("move.sock"), point, move || match fault {
            Fault::Cut => {}
            Fault::KillSource => source(),
            Fault::KillDestination => destination(),
        });
    let client = scene.source.start_move(&relay.uri(), &EASY);
    relay.wait();
    match (owner(point), fault) {
        (Owner::Source, Fault::Cut | Fault::KillDestination) => scene.stays(),
        (Owner::Source, Fault::KillSource) => {
            scene.lost(point);
            return client.wait().check_failed(&["the VM ended"]);
        }
        (_, Fault::Cut | Fault::KillSource) => scene.has_moved(),
        (owner, Fault::KillDestination) => killed_with_the_guest(scene, owner),
    }
    let status = client.wait().status;
    assert!(status.is_some(), "the client ends");
}

/// The destination owned the guest, or was about to, when it was killed.
fn killed_with_the_guest(mut scene: Scene, owner: Owner) {
    if owner == Owner::DestinationAlone {
        scene.source.read_to_end();
        assert_eq!(scene.source.wait().0, Some(0), "the source has let go of it");
        return disk::check_content(&scene.source);
    }
    // The source knows of no copy that runs; whether one ran, the disk tells. Or the destination was quick, and
    // the source has heard its word before the kill: then it has gone.
    let state = |source: &Vm| {
        let output = source.place.tell(&["info", "--json"]);
        let info = serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap_or_default();
        info["state"].as_str().unwrap_or("ended").to_owned()
    };
    until("is settled", || {
        ["running", "in-doubt", "ended"].contains(&state(&scene.source).as_str())
    });
    std::thread::sleep(Duration::from_secs(3));
    let state = state(&scene.source);
    if state == "ended" && owner == Owner::Passing {
        scene.source.read_to_end();
        assert_eq!(scene.source.wait().0, Some(0), "the source has let go of it");
        return disk::check_content(&scene.source);
    }
    if owner == Owner::Destination {
        assert_eq!(state, "in-doubt", "another copy ran: only the operator may say");
    }
    if state == "in-doubt" {
        scene.source.tell(&["migrate", "--resolve", "resume"]);
    }
    // What it printed there, if it ran, it printed before the kill.
    scene.destination.read_to_end();
    scene.stays();
}

macro_rules! points {
    ($($name:ident: $kind:ident $(after $after:ident)?;)*) => {$(
        mod $name {
            use super::*;

            fn both(fault: Fault) {
                if has_kvm() {
                    let after: &[u32] = &[$($after)?];
                    for delivered in [false, true] {
                        let after = after.first().copied();
                        at(Point { kind: $kind, after, delivered }, fault);
                    }
                }
            }

            #[test]
            fn cut() {
                both(Fault::Cut);
            }

            #[test]
            fn source_killed() {
                both(Fault::KillSource);
            }

            #[test]
            fn destination_killed() {
                both(Fault::KillDestination);
            }
        }
    )*};
}

points! {
    hello: HELLO;
    hello_reply: HELLO_REPLY;
    reserve: RESERVE;
    example_section: SECTION;
    accepted: ACCEPTED;
    first_pages: PAGES;
    round_end: ROUND_END;
    round_ack: ROUND_ACK;
    stop_and_copy: STOP_AND_COPY;
    // Pages, if any were dirtied at the last.
    what_follows_the_stop: ANY after STOP_AND_COPY;
    last_section: SECTION after STOP_AND_COPY;
    end: END;
    ready: READY;
    commit: COMMIT;
    activated: ACTIVATED;
    done: DONE;
}
