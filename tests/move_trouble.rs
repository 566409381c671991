//! `vmm migrate` between real processes when things go wrong: cancelled, killed, answered by a liar or by
//! nobody (`move_stuck.rs` has ends that stand still). Each time one line says why, the guest runs on where it was, and the
//! retry works.

mod support;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
};
use rustix::process::Signal;
use support::guests::Guest;
use support::moves::{Client, EASY, check_last_line, fill, until};
use support::vm::{LONG, Place, Vm, has_kvm};

/// A guest whose first round takes a minute at this bandwidth, so that there is time for trouble.
const SLOW: [&str; 2] = ["--bandwidth", "4M"];

/// What a stop within pre-copy looks like to a guest that checks its own memory: nothing.
fn dirtier() -> Vm {
    let mut vm = Vm::start(Guest::dirtier(16, 0), &[]);
    check_dirtier(&mut vm);
    vm
}

/// It goes on printing a dot for each pass over its memory without a difference.
fn check_dirtier(vm: &mut Vm) {
    let until = Instant::now() + Duration::from_millis(200);
    while Instant::now() < until {
        let dots = vm.read_some(1);
        assert!(dots.iter().all(|c| *c == b'.'), "its memory changed: {dots:?}");
    }
}

/// The guest runs here, and moves if it is asked to.
fn check_stayed(mut vm: Vm) {
    check_dirtier(&mut vm);
    assert_eq!(vm.info()["state"], "running");
    let (mut there, uri) = Vm::listen(&[]);
    let rest = vm.move_to(&uri, &EASY);
    assert!(rest.iter().all(|c| *c == b'.'), "{rest:?}");
    check_dirtier(&mut there);
}

/// A slow move of a dirtier in its pre-copy: source, client and destination.
fn in_pre_copy() -> (Vm, Client, Vm) {
    let source = dirtier();
    let (destination, uri) = Vm::listen(&[]);
    let client = source.start_move(&uri, &SLOW);
    source.until_pre_copy();
    (source, client, destination)
}

/// The destination gives up with one line about it. Gives all that it said.
fn check_gone(mut destination: Vm, words: &[&str]) -> String {
    let (status, err) = destination.wait();
    assert_eq!(status, Some(1), "{err}");
    assert_eq!(destination.read_to_end(), b"", "no guest ran there");
    check_last_line(&err, words);
    for name in ["vm.sock", "move.sock"] {
        assert!(!destination.place.path(name).exists(), "{name} is left behind");
    }
    err
}

#[test]
fn cancelled_by_command() {
    if has_kvm() {
        let (source, client, destination) = in_pre_copy();
        source.tell(&["migrate", "--cancel"]);
        client.wait().check_failed(&["cancelled"]);
        check_gone(destination, &["cancelled"]);
        check_stayed(source);
    }
}

#[test]
fn cancelled_by_ctrl_c() {
    if has_kvm() {
        let (source, client, destination) = in_pre_copy();
        client.interrupt();
        client.wait().check_failed(&["cancelled"]);
        check_gone(destination, &["cancelled"]);
        check_stayed(source);
    }
}

#[test]
fn cancelled_at_the_destination() {
    if has_kvm() {
        let (source, client, destination) = in_pre_copy();
        destination.signal(Signal::INT);
        client.wait().check_failed(&["the destination"]);
        check_gone(destination, &["cancelled"]);
        check_stayed(source);
    }
}

/// Where it arrives, a VM is known, says how far it is, and can be turned away.
#[test]
fn cancelled_by_command_at_the_destination() {
    if has_kvm() {
        let (source, client, destination) = in_pre_copy();
        let info = destination.info();
        assert_eq!(info["state"], "arriving");
        assert_eq!(info["migration"]["stage"], "pre-copy");
        let output = destination.place.tell(&["pause"]);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        destination.tell(&["migrate", "--cancel"]);
        client.wait().check_failed(&["the destination says", "cancelled"]);
        check_gone(destination, &["cancelled"]);
        check_stayed(source);
    }
}

#[test]
fn stopped_by_force_at_the_destination() {
    if has_kvm() {
        let (source, client, destination) = in_pre_copy();
        destination.tell(&["stop", "--force"]);
        client.wait().check_failed(&["the destination says", "cancelled"]);
        check_gone(destination, &["cancelled"]);
        check_stayed(source);
    }
}

#[test]
fn the_destination_is_killed() {
    if has_kvm() {
        let (source, client, destination) = in_pre_copy();
        destination.signal(Signal::KILL);
        client.wait().check_failed(&["the destination"]);
        check_stayed(source);
    }
}

#[test]
fn the_source_is_killed() {
    if has_kvm() {
        let (source, client, destination) = in_pre_copy();
        source.signal(Signal::KILL);
        client.wait().check_failed(&[]);
        check_gone(destination, &["the guest is gone"]);
    }
}

/// Of the client that only looks on, nothing hangs.
#[test]
fn the_client_is_killed() {
    if has_kvm() {
        let (source, client, mut destination) = in_pre_copy();
        client.kill();
        source.tell(&["migrate", "--cancel"]);
        assert_eq!(destination.wait().0, Some(1));
        until("stays", || source.info()["state"] == "running");
        check_stayed(source);
    }
}

#[test]
fn while_it_migrates() {
    if has_kvm() {
        let (source, client, destination) = in_pre_copy();
        let uri = format!("unix:{}", destination.place.path("move.sock").display());
        source.try_move(&uri, &[]).check_failed(&["the VM is migrating"]);
        let output = source.place.tell(&["pause"]);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        // Another source at the listener is refused, though connections that say nothing came first.
        let knock = || UnixStream::connect(destination.place.path("move.sock")).unwrap();
        let _silent: Vec<_> = (0..12).map(|_| knock()).collect();
        let other = dirtier();
        other.try_move(&uri, &[]).check_failed(&["another migration is under way"]);
        check_stayed(other);
        // To end the source's process is to cancel: the guest ends with it, not at the destination.
        source.signal(Signal::TERM);
        client.wait().check_failed(&["cancelled", "told to end"]);
        let err = check_gone(destination, &["cancelled"]);
        assert_eq!(err.matches("vmm: another source is refused").count(), 1, "{err}");
    }
}

#[test]
fn nobody_listens() {
    if !has_kvm() {
        return;
    }
    let source = dirtier();
    let nowhere = format!("unix:{}", source.place.path("nobody").display());
    source.try_move(&nowhere, &[]).check_failed(&["can't connect", "No such file"]);
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let nowhere = format!("tcp:127.0.0.1:{port}");
    source.try_move(&nowhere, &[]).check_failed(&["can't connect", &nowhere, "refused"]);
    source.try_move("exec:exit 3", &[]).check_failed(&["the destination"]);
    source.try_move("exec:echo hello; cat", &[]).check_failed(&["not a vmm stream"]);
    let answer = source.try_move("stdio", &[]);
    assert!(answer.status == Some(2) && answer.err.contains("use exec:"), "{answer:?}");
    check_stayed(source);
    let place = Place::new();
    let unknown = place.tell(&["migrate", "--connect", "unix:/nowhere"]);
    assert_eq!(unknown.status.code(), Some(1));
    let err = String::from_utf8(unknown.stderr).unwrap();
    assert!(err.contains("vm.sock") && err.lines().count() == 1, "{err}");
}

/// The kernel neither accepts the connection nor refuses it. That the source stood meanwhile, as in a debugger, is no reason
/// to give up.
#[test]
fn cancelled_while_it_connects() {
    if !has_kvm() {
        return;
    }
    let place = Place::new();
    let path = place.path("full.sock");
    let listener = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::empty(), None);
    let listener = listener.unwrap();
    bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    listen(&listener, 0).unwrap();
    let _queued = fill(&path);
    let source = dirtier();
    let client = source.start_move(&format!("unix:{}", path.display()), &[]);
    until("connects", || source.info()["state"] == "migrating");
    source.signal(Signal::STOP);
    source.signal(Signal::CONT);
    source.tell(&["migrate", "--cancel"]);
    client.wait().check_failed(&["cancelled while connecting to unix:", "full.sock"]);
    check_stayed(source);
}

#[test]
fn the_destination_answers_garbage() {
    if !has_kvm() {
        return;
    }
    let source = dirtier();
    for garbage in [&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], &[0; 4096], &[0xff; 100_000]] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("tcp:{}", listener.local_addr().unwrap());
        let client = source.start_move(&uri, &[]);
        let (mut stream, _) = listener.accept().unwrap();
        // It may close before it has read all.
        let _ = stream.write_all(garbage);
        client.wait().check_failed(&["not a vmm stream"]);
    }
    check_stayed(source);
}

/// Whoever knocks without a guest is told off in one line, and the wait for the guest goes on.
#[test]
fn the_source_sends_garbage() {
    if !has_kvm() {
        return;
    }
    let (mut destination, uri) = Vm::listen(&[]);
    let garbage = [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 4096], &[0xff; 100_000]];
    for garbage in garbage {
        let mut stream = UnixStream::connect(destination.place.path("move.sock")).unwrap();
        let _ = stream.write_all(garbage);
        stream.set_read_timeout(Some(LONG)).unwrap();
        // It is hung up on, maybe after a word.
        let _ = stream.read_to_end(&mut Vec::new());
    }
    let mut source = dirtier();
    source.move_to(&uri, &EASY);
    check_dirtier(&mut destination);
    destination.tell(&["stop", "--force"]);
    let (status, err) = destination.wait();
    assert_eq!(status, Some(0), "{err}");
    let lines: Vec<_> = err.lines().filter(|line| line.contains("not a vmm stream")).collect();
    assert_eq!(lines.len(), garbage.len(), "{err}");
}

/// A port scanner that says nothing at all, and one that begins to.
#[test]
fn silent_connections_keep_no_source_waiting() {
    if !has_kvm() {
        return;
    }
    let (mut destination, uri) = Vm::listen(&[]);
    let knock = || UnixStream::connect(destination.place.path("move.sock")).unwrap();
    let (_silent, mut halting) = (knock(), knock());
    halting.write_all(b"VMM").unwrap();
    let mut source = dirtier();
    source.move_to(&uri, &EASY);
    check_dirtier(&mut destination);
}

#[test]
fn what_the_destination_lacks() {
    if !has_kvm() {
        return;
    }
    let place = Place::new();
    let image = place.path("image");
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    let small = place.path("small");
    std::fs::write(&small, vec![0; 4096]).unwrap();
    let option = format!("{},id=data", image.display());
    let mut source = Vm::start(Guest::dirtier(16, 0), &["--disk", &option]);
    check_dirtier(&mut source);
    let disk = |id: &str, path: &Path| format!("id={id},path={}", path.display());
    for (option, value, words) in [
        ("--disk", disk("other", &image), &["id=other", "no such disk"][..]),
        (
            "--disk",
            disk("data", &place.path("missing")),
            &["missing is not here", "--disk id=data,"],
        ),
        ("--disk", disk("data", &small), &["small"]),
        ("--net", "id=net0,tap=tap0".to_owned(), &["net0"]),
        ("--serial", "unix:/nowhere/at/all".to_owned(), &["/nowhere/at/all"]),
    ] {
        let (destination, uri) = Vm::listen(&[option, &value]);
        source.try_move(&uri, &[]).check_failed(words);
        check_gone(destination, words);
        check_dirtier(&mut source);
    }
}

/// Who else has the disk is told before a page moves; and the source itself isn't in its own way.
#[test]
fn the_disk_is_somebody_else_s_there() {
    if !has_kvm() {
        return;
    }
    let place = Place::new();
    let (image, copy) = (place.path("image"), place.path("copy"));
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    std::fs::copy(&image, &copy).unwrap();
    let option = format!("{},id=data", image.display());
    let mut source = Vm::start(Guest::dirtier(16, 0), &["--disk", &option]);
    check_dirtier(&mut source);
    let holder = Vm::start(Guest::spin(), &["--disk", copy.to_str().unwrap()]);
    holder.wait_until_up();
    let pid = format!("pid {}", holder.info()["pid"]);
    let there = format!("id=data,path={}", copy.display());
    let (destination, uri) = Vm::listen(&["--disk", &there]);
    let answer = source.try_move(&uri, &EASY);
    answer.check_failed(&["copy", &pid]);
    assert!(!answer.err.contains("pre-copy"), "{answer:?}");
    check_gone(destination, &[&pid]);
    check_dirtier(&mut source);
    // Nobody has it; but it isn't the source's, as the report says.
    drop(holder);
    let (destination, uri) = Vm::listen(&["--disk", &there]);
    let answer = source.try_move(&uri, &["--dry-run", EASY[0], EASY[1]]);
    assert_eq!(answer.status, Some(0), "{answer:?}");
    let warning = "the source's lock isn't seen here";
    assert!(answer.out.contains("warning: disk ") && answer.out.contains(warning), "{answer:?}");
    drop(destination);
    let (mut destination, uri) = Vm::listen(&[]);
    let answer = source.try_move(&uri, &EASY);
    assert!(!answer.check_moved().out.contains("warning:"), "{answer:?}");
    check_dirtier(&mut destination);
}

#[test]
fn a_listener_that_can_t_listen() {
    if !has_kvm() {
        return;
    }
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    for (uri, words) in [
        (format!("tcp:127.0.0.1:{port}"), ["can't listen", "in use"]),
        ("tcp:192.0.2.1:4444".to_owned(), ["can't listen", "192.0.2.1"]),
        ("unix:/nowhere/at/all".to_owned(), ["can't listen", "/nowhere/at"]),
        ("exec:true".to_owned(), ["exec:true", "--connect"]),
    ] {
        let output = support::moves::listen_output(&uri);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let err = String::from_utf8(output.stderr).unwrap();
        assert!(words.iter().all(|word| err.contains(word)), "{err}");
        assert_eq!(err.lines().count(), 1, "{err}");
    }
}

/// Its first round takes a minute at this bandwidth: the time is up within it.
#[test]
fn the_time_is_up_within_a_round() {
    if !has_kvm() {
        return;
    }
    let source = dirtier();
    let (destination, uri) = Vm::listen(&[]);
    let answer = source.try_move(&uri, &["--bandwidth", "4M", "--timeout", "1s"]);
    answer.check_failed(&["no convergence", "of the first round"]);
    check_gone(destination, &["the source"]);
    check_stayed(source);
    let mut source = dirtier();
    let (mut destination, uri) = Vm::listen(&[]);
    let fast = ["--bandwidth", "64M", "--timeout", "1s", "--on-timeout", "stop-and-copy"];
    let dots = source.move_to(&uri, &fast);
    assert!(dots.iter().all(|c| *c == b'.'), "{dots:?}");
    check_dirtier(&mut destination);
}
