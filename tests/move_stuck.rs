//! Ends of a migration that stand still: stopped, or behind a pipe that nobody reads any more. The other end's patience is
//! over after a while: one line says so, the guest runs on at the source, and what stood still starts no second copy when
//! it goes on. What takes long here is waiting, so it is done side by side.

mod support;

use std::fs::{self, File};
use std::io::{self, PipeReader, PipeWriter, Read, Write, pipe};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::process::Signal;
use support::disk;
use support::guests::Guest;
use support::moves::{Answer, Count, EASY, check_last_line, until};
use support::relay::{Point, Relay};
use support::vm::{Place, Vm, binary, has_kvm};
use vmm_migration::wire::record::*;
use vmm_migration::wire::{HEAD_LEN, PREAMBLE_LEN, RecordHead, SUM_LEN};

/// What the source says when the destination does nothing, and of how many milliseconds at least.
const STILL_THERE: (&str, u64) = ("the destination has not answered or taken data for ", 10_000);
/// What the destination says when the source does nothing.
const STILL_HERE: (&str, u64) = ("the source has not answered or taken data for ", 30_000);

const NOW: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

/// A guest that checks 8 MiB of its memory, and dirties them meanwhile; with a disk.
fn dirtier() -> Vm {
    let mut vm = disk::start(Guest::dirtier(8, 0), &[]);
    runs(&mut vm);
    vm
}

/// It was waited for as long as that. (A busy machine is told of more.)
#[track_caller]
fn check_patience(err: &str, (words, at_least): (&str, u64)) {
    let (_, rest) = err.split_once(words).unwrap_or_else(|| panic!("no {words:?} in {err}"));
    let ms: u64 = rest.split(' ').next().unwrap().parse().unwrap();
    assert!(ms >= at_least, "{err}");
}

/// The source has lost its patience.
#[track_caller]
fn check_gave_up(answer: &Answer, stage: &str) {
    answer.check_failed(&[stage, STILL_THERE.0]);
    check_patience(&answer.err, STILL_THERE);
}

/// It prints a dot for each pass over its memory without a difference.
fn runs(vm: &mut Vm) {
    // What is in the pipe already doesn't count.
    while !vm.read(Duration::ZERO).is_empty() {}
    let dots = vm.read_some(3);
    assert!(dots.iter().all(|c| *c == b'.'), "its memory changed: {dots:?}");
}

/// The guest runs at the source only, nobody else has had its disk, and it moves if it is asked to.
fn stays(mut source: Vm) {
    disk::check_untouched(&source);
    until("runs on at the source", || source.info()["state"] == "running");
    runs(&mut source);
    let (mut again, uri) = Vm::listen(&[]);
    source.move_to(&uri, &EASY);
    runs(&mut again);
}

/// Does these at the same time.
fn side_by_side(scenes: &[&(dyn Fn() + Sync)]) {
    if has_kvm() {
        thread::scope(|scope| scenes.iter().for_each(|scene| drop(scope.spawn(scene))));
    }
}

/// A source and a destination, one of which is stopped just before this record reaches it; and what the source's client says
/// in the end. `wait` sees to it that the other has lost its patience.
fn stopped_at(
    mut source: Vm,
    kind: u32,
    is_source: bool,
    wait: impl FnOnce(&mut Vm, &mut Vm),
) -> (Answer, Vm, Vm) {
    let (mut destination, _) = Vm::listen(&[]);
    let stopped = if is_source { &source } else { &destination };
    let stop = stopped.signaller(Signal::STOP);
    let go_on = stopped.signaller(Signal::CONT);
    let point = Point { kind, after: None, delivered: false };
    let relay = Relay::watching(&destination.place.path("move.sock"), point, stop);
    let client = source.start_move(&relay.uri(), &EASY);
    relay.wait();
    wait(&mut source, &mut destination);
    go_on();
    (client.wait(), source, destination)
}

/// The destination is stopped: the source's guest runs on before that one goes on.
fn destination_stopped(kind: u32, stage: &str) {
    let (answer, source, mut destination) = stopped_at(dirtier(), kind, false, |source, _| {
        until("stays", || source.info()["state"] == "running");
        runs(source);
    });
    check_gave_up(&answer, stage);
    let err = gives_up(&mut destination);
    assert!(err.lines().last().unwrap().contains("the source"), "{err}");
    stays(source);
}

/// A destination gives up the guest, which never ran there. Gives what it said.
fn gives_up(destination: &mut Vm) -> String {
    let socket = destination.place.path("vm.sock");
    until("gives up", || !socket.exists());
    assert_eq!(destination.read(Duration::ZERO), b"", "a second copy ran");
    // Where it was ready, it waits for a source that may ask.
    destination.signal(Signal::TERM);
    let (status, err) = destination.wait();
    assert_eq!(status, Some(1), "{err}");
    err
}

/// The destination is stopped before it has accepted the connection, and so before `HelloReply`: once it goes on, it finds
/// that the connection has ended, and takes the guest over the next.
fn destination_stopped_before_it_answers() {
    let mut source = dirtier();
    let (mut destination, uri) = Vm::listen(&[]);
    destination.signal(Signal::STOP);
    let answer = source.try_move(&uri, &EASY);
    check_gave_up(&answer, "pre-migration failed");
    runs(&mut source);
    destination.signal(Signal::CONT);
    source.move_to(&uri, &EASY);
    runs(&mut destination);
    destination.tell(&["stop", "--force"]);
    let (status, err) = destination.wait();
    let words =
        "a connection brought no guest: pre-migration failed: the source closed the connection";
    assert!(status == Some(0) && err.lines().next().unwrap().ends_with(words), "{err}");
}

/// The destination was told to run the guest, which has no disk, and does so as soon as it can: the source waits for that.
fn commit_is_read_late() {
    let source = Vm::start(Guest::dirtier(8, 0), &[]);
    source.wait_until_up();
    let (answer, mut source, mut destination) =
        stopped_at(source, COMMIT, false, |source, destination| {
            until("is in doubt", || source.info()["state"] == "in-doubt");
            assert_eq!(destination.read(Duration::ZERO), b"");
        });
    runs(&mut destination);
    source.read_to_end();
    assert_eq!(source.wait().0, Some(0), "the guest has moved: {answer:?}");
}

/// By the locks of its disk the source knows meanwhile that no copy runs, and has it back: what the destination was told
/// counts no more.
fn commit_is_read_too_late() {
    let (answer, source, mut destination) = stopped_at(dirtier(), COMMIT, false, |source, _| {
        until("goes on", || source.info()["state"] == "running");
        runs(source);
    });
    let last = answer.err.lines().last().unwrap();
    assert!(answer.status == Some(1) && last.contains("commitment failed"), "{answer:?}");
    check_patience(last, STILL_THERE);
    let err = gives_up(&mut destination);
    assert!(err.lines().last().unwrap().contains("/disk: locked by pid "), "{err}");
    stays(source);
}

#[test]
fn a_destination_that_is_stopped() {
    side_by_side(&[
        &destination_stopped_before_it_answers,
        &|| destination_stopped(PING, "reservation"),
        &|| destination_stopped(ROUND_END, "pre-copy"),
        &|| destination_stopped(END, "stop-and-copy"),
        &commit_is_read_late,
        &commit_is_read_too_late,
    ]);
}

/// The source is stopped before it has committed: the destination gives up, and the guest goes on when the source does.
fn source_stopped(kind: u32, stage: &str) {
    let (answer, source, mut destination) = stopped_at(dirtier(), kind, true, |_, destination| {
        let socket = destination.place.path("vm.sock");
        until("gives up", || !socket.exists());
    });
    answer.check_failed(&[]);
    // Or it was stopped while it flushed its disk, and finds that its time for that is over.
    let words = ["the destination", "the flush goes on after 3"];
    assert!(words.iter().any(|words| answer.err.contains(words)), "{answer:?}");
    stays(source);
    let err = gives_up(&mut destination);
    assert!(err.contains(stage), "{err}");
    check_patience(&err, STILL_HERE);
    assert!(err.contains("the guest is gone") && err.contains("disks are untouched"), "{err}");
}

/// The source is stopped in reservation, before the destination has anything of its guest: that one is over by itself.
fn source_stopped_in_reservation() {
    let mut told = None;
    let (answer, source, mut destination) =
        stopped_at(dirtier(), HELLO_REPLY, true, |_, destination| told = Some(destination.wait()));
    answer.check_failed(&["the destination"]);
    stays(source);
    let (status, err) = told.unwrap();
    assert_eq!((status, destination.read_to_end()), (Some(1), vec![]), "{err}");
    check_last_line(&err, &["reservation failed", STILL_HERE.0, "the guest is gone"]);
    check_patience(&err, STILL_HERE);
}

/// The source is stopped once it has written `Commit`: the guest runs at the destination, and there only; the source learns
/// so when it goes on, and ends, however late that is. What it puts out then was printed before: the count goes on after it
/// at the destination.
fn source_stopped_with_commit_written(pause: Duration) {
    let (mut source, mut count) = (disk::start(Guest::counter(), &[]), Count::default());
    count.check(&source.read_some(1000));
    let mut there = Vec::new();
    let (answer, mut source, mut destination) =
        stopped_at(source, COMMIT, true, |_, destination| {
            there = destination.read_some(1000);
            thread::sleep(pause);
        });
    answer.check_moved();
    count.check(&source.read_to_end());
    let (status, err) = source.wait();
    assert!(status == Some(0) && err.contains("the guest moved to unix:"), "{err}");
    count.check(&there);
    count.check(&destination.read_some(20_000));
}

#[test]
fn a_source_that_is_stopped() {
    side_by_side(&[
        &source_stopped_in_reservation,
        &|| source_stopped_with_commit_written(Duration::ZERO),
        // Its own time for the answer is over, so that it asks.
        &|| source_stopped_with_commit_written(Duration::from_secs(11)),
        // The destination waits for its word no longer.
        &|| source_stopped_with_commit_written(Duration::from_secs(31)),
        &|| source_stopped(ACCEPTED, "pre-copy failed"),
        &|| source_stopped(ROUND_ACK, "pre-copy failed"),
        &|| source_stopped(READY, "commitment failed"),
    ]);
}

/// The command that carries the stream, a stand-in for ssh, takes none of it any more from this record on.
fn command_stands_still(kind: u32, stage: &str) {
    let source = dirtier();
    let (mut destination, _) = Vm::listen(&[]);
    let place = Place::new();
    let (forth, back, mark) = (place.path("forth"), place.path("back"), place.path("mark"));
    fs::write(&mark, "").unwrap();
    for fifo in [&forth, &back] {
        mknodat(CWD, fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    }
    let [to, from, end] = [&forth, &back, &mark].map(|path| path.display());
    let client = source.start_move(&format!("exec:cat {from} & cat - {end} >{to}"), &EASY);
    let (mut forth, mut back) =
        (File::open(forth).unwrap(), File::options().write(true).open(back).unwrap());
    let stream = UnixStream::connect(destination.place.path("move.sock")).unwrap();
    let their_end = stream.try_clone().unwrap();
    let passing = thread::spawn(move || drop(pass_all(&their_end, &mut back)));
    pass(&mut forth, &stream, kind, || true);
    check_gave_up(&client.wait(), stage);
    let marked = place.path("").display().to_string();
    until("leaves no process behind", || processes(&marked) == 0);
    stream.shutdown(Shutdown::Both).unwrap();
    passing.join().unwrap();
    stays(source);
    let err = gives_up(&mut destination);
    assert!(err.lines().last().unwrap().contains("the source closed the connection"), "{err}");
}

/// Passes all on at once. (`io::copy` splices, and then waits for more.)
fn pass_all(mut from: impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut bytes = [0; 4096];
    loop {
        match from.read(&mut bytes)? {
            0 => return Ok(()),
            count => to.write_all(&bytes[..count])?,
        }
    }
}

/// How many have this in their command line.
fn processes(text: &str) -> usize {
    let lines = fs::read_dir("/proc").unwrap().flatten();
    let lines = lines.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    lines.filter(|line| String::from_utf8_lossy(line).contains(text)).count()
}

#[test]
fn a_command_that_reads_no_more() {
    side_by_side(&[
        &|| command_stands_still(PING, "reservation"),
        &|| command_stands_still(PAGES, "pre-copy"),
        &|| command_stands_still(STOP_AND_COPY, "stop-and-copy"),
    ]);
}

/// Fills a pipe, so that the next write to it waits.
fn fill(pipe: &mut PipeWriter) {
    while poll(&mut [PollFd::new(pipe, PollFlags::OUT)], Some(&NOW)).unwrap() > 0 {
        pipe.write_all(&[0; 4096]).unwrap();
    }
}

/// Passes on what the source says, until it hangs up, or `ends` says so when a record of this type comes.
fn pass(from: &mut impl Read, mut to: impl Write, kind: u32, mut ends: impl FnMut() -> bool) {
    let mut bytes = [0; PREAMBLE_LEN];
    from.read_exact(&mut bytes).unwrap();
    to.write_all(&bytes).unwrap();
    let mut head = [0; HEAD_LEN];
    while from.read_exact(&mut head).is_ok() {
        let record = RecordHead::decode(head).unwrap();
        let is_it = record.kind == kind || (record.kind, kind) == (PAGES2, PAGES);
        if is_it && ends() {
            return;
        }
        let mut rest = vec![0; record.body_len() + SUM_LEN];
        from.read_exact(&mut rest).unwrap();
        if to.write_all(&head).and_then(|()| to.write_all(&rest)).is_err() {
            return;
        }
    }
}

/// Passes on what the destination says, until its pipe is filled or it has ended.
fn pass_back(
    mut from: PipeReader,
    mut to: &UnixStream,
    back: &Mutex<Option<PipeWriter>>,
) -> PipeReader {
    let mut bytes = [0; 4096];
    loop {
        let not_filled = back.lock().unwrap();
        if not_filled.is_none() {
            return from;
        }
        let mut fds = [PollFd::from_borrowed_fd(from.as_fd(), PollFlags::IN)];
        if poll(&mut fds, Some(&NOW)).unwrap() > 0 {
            let count = from.read(&mut bytes).unwrap();
            to.write_all(&bytes[..count]).unwrap();
        }
        drop(not_filled);
        thread::sleep(Duration::from_millis(1));
    }
}

/// A destination on standard input and output, whose output nobody reads from when this record comes.
fn output_is_full(kind: u32, stage: &str) {
    let source = dirtier();
    let place = Place::new();
    let socket = place.path("relay.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let (reader, writer) = pipe().unwrap();
    rustix::pipe::fcntl_setpipe_size(&writer, 4096).unwrap();
    let mut command = Command::new(binary());
    command.args(["migrate", "--listen", "stdio", "--serial", "null", "--control"]);
    command.arg(place.path("vm.sock")).env_remove("VMM_LOG");
    command.stdin(Stdio::piped()).stdout(writer.try_clone().unwrap()).stderr(Stdio::piped());
    let mut destination = command.spawn().unwrap();
    drop(command);
    let client = source.start_move(&format!("unix:{}", socket.display()), &EASY);
    let (stream, _) = listener.accept().unwrap();
    let (input, back) = (destination.stdin.take().unwrap(), Mutex::new(Some(writer)));
    let full = thread::scope(|scope| {
        scope.spawn(|| {
            pass(&mut &stream, input, kind, || {
                back.lock().unwrap().take().iter_mut().for_each(fill);
                false
            });
        });
        scope.spawn(|| pass_back(reader, &stream, &back)).join().unwrap()
    });
    check_gave_up(&client.wait(), stage);
    stays(source);
    // With the pipe still there, still full.
    let output = destination.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let err = String::from_utf8(output.stderr).unwrap();
    check_patience(err.lines().last().unwrap(), STILL_HERE);
    drop(full);
}

#[test]
fn a_standard_output_that_is_full() {
    side_by_side(&[
        &|| output_is_full(PING, "reservation"),
        &|| output_is_full(ROUND_END, "pre-copy"),
        &|| output_is_full(END, "stop-and-copy"),
    ]);
}
