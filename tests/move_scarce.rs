//! A destination that is short of something: memory, which is told before a page moves; room for its console's file, which
//! costs the guest nothing but that output.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use support::guests::Guest;
use support::moves::{EASY, check_last_line, listens, until};
use support::vm::{Place, Vm, binary, has_kvm};

fn dirtier() -> Vm {
    let mut vm = Vm::start(Guest::dirtier(8, 0), &["--mem", "512M"]);
    check_intact(&mut vm);
    vm
}

fn check_intact(vm: &mut Vm) {
    let dots = vm.read_some(3);
    assert!(dots.iter().all(|b| *b == b'.'), "its memory changed: {dots:?}");
}

/// A listener that a command starts: the words that end with the binary's are given to it.
fn listen_through(place: Place, words: &[&str], options: &[&str]) -> (Vm, String) {
    let socket = place.path("move.sock");
    let uri = format!("unix:{}", socket.display());
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).arg(binary()).args(["migrate", "--listen", &uri]).args(options);
    command.arg("--control").arg(place.path("vm.sock")).env_remove("VMM_LOG");
    let vm = Vm::spawn(place, command);
    until("listens", || listens(&socket));
    (vm, uri)
}

#[test]
fn memory_that_it_may_not_have() {
    if !has_kvm() {
        return;
    }
    let mut source = dirtier();
    let less = ["sh", "-c", "ulimit -v 300000 && exec \"$@\"", "sh"];
    let (mut destination, uri) = listen_through(Place::new(), &less, &[]);
    let words = ["can't map 512 MiB of guest memory", "give the guest less"];
    let answer = source.try_move(&uri, &EASY);
    answer.check_failed(&words);
    assert!(!answer.err.contains("pre-copy"), "no page moved: {answer:?}");
    let (status, err) = destination.wait();
    assert_eq!(status, Some(1), "{err}");
    check_last_line(&err, &words);
    check_intact(&mut source);
    let (mut again, uri) = Vm::listen(&[]);
    source.move_to(&uri, &EASY);
    check_intact(&mut again);
}

#[test]
fn room_for_its_console_s_file() {
    const SMALL: &str = "mount -t tmpfs -o size=64k small \"$0\" && exec \"$@\"";
    if !has_kvm() {
        return;
    }
    let mut source = dirtier();
    let place = Place::new();
    let small = place.path("small");
    fs::create_dir(&small).unwrap();
    let file = format!("file:{}", small.join("console").display());
    let through = ["unshare", "-rm", "sh", "-c", SMALL, small.to_str().unwrap()];
    let (mut there, uri) = listen_through(place, &through, &["--serial", &file]);
    source.move_to(&uri, &EASY);
    let seen = PathBuf::from(format!("/proc/{}/root", there.info()["pid"]));
    let console = seen.join(small.strip_prefix(Path::new("/")).unwrap()).join("console");
    until("fills its file", || fs::metadata(&console).unwrap().len() >= 64 << 10);
    let bytes = fs::read(&console).unwrap();
    assert!(bytes.iter().all(|b| *b == b'.'), "its memory changed");
    // It runs on, unheard, and is heard again where there is room.
    std::thread::sleep(std::time::Duration::from_millis(200));
    assert_eq!(there.info()["state"], "running");
    let (mut again, uri) = Vm::listen(&[]);
    there.move_to(&uri, &EASY);
    check_intact(&mut again);
    let (status, err) = there.wait();
    assert_eq!(status, Some(0), "{err}");
    let lines: Vec<_> = err.lines().filter(|line| line.contains("No space left")).collect();
    assert!(lines.len() == 1 && lines[0].contains("console: can't write"), "{err}");
}
