//! A stock guest whose disk lies on NFS, which both hosts mount: its lock is one for both. This file runs in both of two
//! emulated hosts at once. Host 1 boots the guest, which moves to host 2 and back; then twice it is in doubt who
//! has it, and the lock decides: host 1 at first, host 2 in the end.

mod support;

#[path = "support/image.rs"]
mod image;
#[path = "support/linux.rs"]
mod linux;
#[path = "support/load.rs"]
mod load;
#[path = "support/nfs.rs"]
mod nfs;
#[path = "support/talk.rs"]
mod talk;
#[path = "support/travel.rs"]
mod travel;

use std::fs::{self, File};
use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::{sleep, spawn};
use std::time::Duration;

use image::check_image;
use linux::{Guest, guest_file, vmm};
use load::Load;
use rustix::fs::{FlockOperation, fcntl_lock};
use serde_json::{Value, json};
use support::relay::{Point, Relay};
use support::vm::Place;
use talk::Talk;
use travel::Trip;
use vmm_migration::wire::record::{ACTIVATED, COMMIT};

const NAME: &str = "a_disk_on_nfs_has_one_owner_on_two_hosts";
/// On either host, the ports of its destinations: the guest's, and one whose disk is another.
const PORT: u16 = 4444;
const OTHER_PORT: u16 = 4446;
const THERE: &str = "tcp:10.77.0.2:4444";
const BACK: &str = "tcp:10.77.0.1:4444";
/// What the command line says of a lock of another host's.
const HELD: &str = "locked by a process that can't be seen from here";
const EASY: [&str; 2] = ["--downtime-limit", "3s"];

fn shared(name: &str) -> PathBuf {
    Path::new(nfs::SHARED).join(name)
}

/// The guest's disk can't be had here.
fn check_held() {
    let mut second =
        vmm(&["run", "--mem", "64M", "--serial", "null", "--name", "second", "--kernel"]);
    second.arg(guest_file("vmlinux-6.12-cloud")).arg("--disk").arg(shared("disk"));
    let output = second.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && said.contains(HELD), "{output:?}");
}

/// What one half tells the other of the guest.
fn word(trip: &Trip, typed: u64) -> Value {
    json!({ "console": trip.console(), "typed": typed })
}

fn take_over(trip: &mut Trip, word: &Value) {
    trip.take_over(word["console"].as_str().unwrap().to_owned(), word["typed"].as_u64().unwrap());
}

/// Types, and waits for what the guest says of it, and of its work.
fn lives(trip: &mut Trip) {
    trip.type_line();
    trip.goes_on();
    trip.hears();
}

/// A UNIX socket that leads to host 2's port, for the relay's sake.
fn tunnel(path: &Path) {
    let listener = UnixListener::bind(path).unwrap();
    let pass = |mut near: UnixStream| -> io::Result<()> {
        let mut far = TcpStream::connect(THERE.trim_start_matches("tcp:"))?;
        let (mut answers, mut to) = (far.try_clone()?, near.try_clone()?);
        let back = spawn(move || {
            let _ = io::copy(&mut answers, &mut to);
            to.shutdown(Shutdown::Both)
        });
        let _ = io::copy(&mut near, &mut far);
        far.shutdown(Shutdown::Both)?;
        back.join().unwrap()
    };
    spawn(move || {
        for near in listener.incoming() {
            // Either end may go at any time.
            let near = near.unwrap();
            spawn(move || drop(pass(near)));
        }
    });
}

/// Moves the guest to host 2, and cuts the connection at a record, for ever: nobody answers there any more.
fn cut_off(trip: &mut Trip, kind: u32) -> (std::process::Child, Relay, Place) {
    let place = Place::new();
    tunnel(&place.path("tunnel.sock"));
    let address = place.path("there.sock");
    let gone = address.clone();
    let point = Point { kind, after: None, delivered: false };
    let relay = Relay::start(&place.path("tunnel.sock"), point, move || {
        fs::remove_file(gone).unwrap();
    });
    symlink(relay.path(), &address).unwrap();
    let client = trip.start_move(&format!("unix:{}", address.display()), &EASY);
    relay.wait();
    (client, relay, place)
}

/// Another disk there is locked by somebody else: that is seen before a page moves.
fn refused_over_anothers_lock(trip: &Trip) {
    let uri = THERE.replace(&PORT.to_string(), &OTHER_PORT.to_string());
    let output = trip.start_move(&uri, &["--dry-run"]).wait_with_output().unwrap();
    let said = trip.progress();
    trip.check(output.status.code() == Some(1), &format!("{output:?}"));
    trip.check(said.contains("/nfs/other") && said.contains(HELD), &said);
    trip.check(!said.contains("pre-copy"), &said);
}

/// Host 1: has the server, and boots the guest.
fn first() {
    nfs::serve();
    nfs::mount();
    fs::copy(guest_file("root.ext4"), shared("disk")).unwrap();
    fs::copy(guest_file("root.ext4"), shared("other")).unwrap();
    let other = File::options().write(true).open(shared("other")).unwrap();
    fcntl_lock(&other, FlockOperation::LockExclusive).unwrap();
    let load = Load { writers: 1, writer_mib: 4, rest_ms: 50, disk: true, ..Load::default() };
    let guest = Guest::new("6.12-cloud")
        .cpus(2)
        .mem("160M")
        .option("--disk", &format!("{},id=data", shared("disk").display()))
        .file("load", load::program())
        .run(&load.script(NAME));
    let mut trip = Trip::start(guest);
    let mut talk = Talk::connect();
    talk.say(&json!("booted"));
    assert_eq!(talk.hear(), "refused");
    refused_over_anothers_lock(&trip);
    lives(&mut trip);

    let client = trip.start_move(THERE, &EASY);
    trip.arrive(client, THERE);
    check_held();
    let mut back = Trip::expect(PORT, &[]);
    talk.say(&word(&trip, 1));
    take_over(&mut back, &talk.hear());
    lives(&mut back);
    assert_eq!(talk.hear(), "listens");

    let (client, _relay, _place) = cut_off(&mut back, COMMIT);
    let output = client.wait_with_output().unwrap();
    back.check(output.status.code() == Some(1), &format!("{output:?}"));
    back.until("it is known to be here", |trip| trip.info()["state"] == "running");
    lives(&mut back);
    talk.say(&json!("stays"));
    assert_eq!(talk.hear(), "listens");

    let (client, _relay, _place) = cut_off(&mut back, ACTIVATED);
    let in_doubt = |trip: &Trip| trip.info()["state"] == "in-doubt";
    back.until("it is in doubt", in_doubt);
    talk.say(&word(&back, 4));
    assert_eq!(talk.hear(), "ended");
    // More than one try: nobody has the lock any more, but the disk isn't what it was.
    sleep(Duration::from_secs(5));
    back.check(in_doubt(&back), "another copy ran");
    back.ask(&["migrate", "--resolve", "discard"]);
    back.wait_for_end(0);
    let output = client.wait_with_output().unwrap();
    back.check(output.status.success(), &format!("{output:?}"));
}

/// Host 2: takes the guest in, gives it back, and has it in the end.
fn second() {
    let listener = Talk::listen();
    nfs::mount();
    let mut talk = Talk::accept(&listener);
    assert_eq!(talk.hear(), "booted");
    check_held();
    let _other = Trip::expect(OTHER_PORT, &["--disk", "id=data,path=/nfs/other"]);
    let mut trip = Trip::expect(PORT, &[]);
    talk.say(&json!("refused"));
    take_over(&mut trip, &talk.hear());
    lives(&mut trip);
    let client = trip.start_move(BACK, &EASY);
    trip.arrive(client, BACK);
    talk.say(&word(&trip, 2));

    let trip = Trip::expect(PORT, &[]);
    talk.say(&json!("listens"));
    // It could tell the source, who can't ask.
    assert_eq!(talk.hear(), "stays");
    trip.check(trip.said_here().contains("nothing of it runs here"), "it has given up");
    check_held();
    drop(trip);

    let mut trip = Trip::expect(PORT, &[]);
    talk.say(&json!("listens"));
    take_over(&mut trip, &talk.hear());
    lives(&mut trip);
    let told = trip.finish();
    check_image(&shared("disk"), told.number("disk_blocks"));
    talk.say(&json!("ended"));
}

#[test]
fn a_disk_on_nfs_has_one_owner_on_two_hosts() {
    if let Some(load) = Load::told() {
        return load::run(&load);
    }
    match std::env::var("HOST").expect("HOST: see tests/run").as_str() {
        "1" => first(),
        _ => second(),
    }
}
