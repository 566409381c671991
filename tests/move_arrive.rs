//! `vmm migrate` between real processes: what a destination makes of the guest that comes. Where its console is when
//! the stream has standard input and output; which guests it turns away, and that it says everything that is in the way; and
//! that a guest may come back at once.

mod support;

use std::io::{Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{FileType, Mode};
use support::guests::Guest;
use support::moves::{EASY, check_last_line, listens, until};
use support::vm::{LONG, Place, Vm, binary, has_kvm};
use vmm::api::socket;
use vmm::migrate::verdicts::Verdicts;
use vmm_migration::destination::Verdict;
use vmm_migration::message::{Message, Reasons, Resolve};
use vmm_migration::plan::MigrationId;
use vmm_migration::wire::{self, StreamKind};

/// A directory for `PATH`, with `vmm` and a stand-in for ssh that runs its command here, as a shell there would.
fn programs(place: &Place) -> PathBuf {
    let dir = place.path("bin");
    std::fs::create_dir(&dir).unwrap();
    symlink(binary(), dir.join("vmm")).unwrap();
    let ssh = dir.join("ssh");
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = host ] || exit 255\nshift\nXDG_RUNTIME_DIR={} exec /bin/sh -c \"$*\"\n",
        place.path("there").display()
    );
    std::fs::write(&ssh, script).unwrap();
    std::fs::set_permissions(&ssh, PermissionsExt::from_mode(0o755)).unwrap();
    dir
}

/// Where a VM of this name has its control socket, at a destination that [`programs`] starts.
fn socket_there(place: &Place, name: &str) -> PathBuf {
    let dir = match rustix::process::geteuid().is_root() {
        true => PathBuf::from("/run/vmm"),
        false => place.path("there/vmm"),
    };
    dir.join(format!("{name}.sock"))
}

#[test]
fn the_literal_command_over_ssh() {
    if !has_kvm() {
        return;
    }
    let place = Place::new();
    std::fs::create_dir(place.path("there")).unwrap();
    let name = format!("ssh-{}", std::process::id());
    let control = socket_there(&place, &name);
    let path = format!("{}:{}", programs(&place).display(), std::env::var("PATH").unwrap());
    let home = Place::new();
    let mut command = home.run(Guest::echo(), &["--name", &name]);
    command.env("PATH", path);
    let mut source = Vm::spawn(home, command);
    source.type_in(b"here");
    assert_eq!(source.read_some(4), b"here");
    source.try_move("exec:ssh host vmm migrate --listen stdio", &EASY).check_moved();
    // Its console is a socket there, as it says, so that the stream was only the stream.
    let mut console = UnixStream::connect(control.with_extension("tty")).unwrap();
    console.set_read_timeout(Some(LONG)).unwrap();
    console.write_all(b"there").unwrap();
    let mut echoed = [0; 5];
    console.read_exact(&mut echoed).unwrap();
    assert_eq!(&echoed, b"there");
    console.write_all(b"\x04").unwrap();
    until("ends there", || !control.exists());
    let (status, err) = source.wait();
    assert_eq!(status, Some(0), "{err}");
    let word = format!("{name} is here, its console at unix:{}/{name}.tty", parent(&control));
    assert_eq!(err.lines().filter(|line| line.ends_with(&word)).count(), 1, "{err}");
    assert!(!control.with_extension("tty").exists());
}

/// The VM's process has the signals blocked that ask it to end, and what it starts would inherit that. A shell would too,
/// until it has waited for a command.
#[test]
fn a_command_that_is_told_to_end_hears_it() {
    if !has_kvm() {
        return;
    }
    let source = Vm::start(Guest::spin(), &[]);
    source.wait_until_up();
    let (word, fifo) = (source.place.path("word"), source.place.path("fifo"));
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, Mode::RWXU, 0).unwrap();
    let uri = format!(
        "exec:trap 'echo told >{}; exit' TERM; echo this is no stream of ours; read -r line <>{}",
        word.display(),
        fifo.display(),
    );
    source.try_move(&uri, &EASY).check_failed(&["not a vmm stream"]);
    until("is told to end", || word.exists());
}

fn parent(path: &Path) -> String {
    path.parent().unwrap().display().to_string()
}

#[test]
fn only_listed_disks_are_opened() {
    if !has_kvm() {
        return;
    }
    let place = Place::new();
    let paths = ["root", "data"].map(|id| {
        let path = place.path(id);
        std::fs::write(&path, vec![0; 1 << 20]).unwrap();
        path.display().to_string()
    });
    let [root, data] = &paths;
    let (root, data) = (format!("{root},id=root"), format!("{data},id=data"));
    let options = ["--disk", &root, "--disk", &data];
    let mut source = Vm::start(Guest::counter(), &options);
    source.wait_until_up();
    let listed = |id: &str| format!("id={id},path={}", place.path(id).display());
    let turned_away = |listed: &[&str], words: &[&str]| {
        let (mut destination, uri) = Vm::listen(&[&["--only-listed"], listed].concat());
        source.try_move(&uri, &EASY).check_failed(words);
        let (status, err) = destination.wait();
        assert_eq!(status, Some(1), "{err}");
        check_last_line(&err, words);
    };
    turned_away(&[], &["disk root is not listed here", "disk data is not listed here"]);
    turned_away(&["--disk", &listed("root")], &["--disk id=data,path=PATH"]);
    let (destination, uri) =
        Vm::listen(&["--only-listed", "--disk", &listed("root"), "--disk", &listed("data")]);
    source.move_to(&uri, &EASY);
    assert_eq!(destination.info()["state"], "running");
    // One that can boot again would read its kernel here.
    let other = Vm::start(Guest::counter(), &["--on-reboot", "reset"]);
    other.wait_until_up();
    let (_refusing, uri) = Vm::listen(&["--only-listed"]);
    other.try_move(&uri, &EASY).check_failed(&["its kernel's files", "--only-listed"]);
}

/// What became of a migration is told meanwhile, too, as far as it is kept for other processes.
#[test]
fn a_source_in_doubt_is_answered_while_another_guest_comes() {
    if !has_kvm() {
        return;
    }
    let pid = std::process::id().to_le_bytes();
    let id = MigrationId(std::array::from_fn(|i| pid[i % 4] ^ 0x5a));
    Verdicts::of_this_host().keep(&Verdict::never_activated(id, "it was full"));
    let source = Vm::start(Guest::counter(), &["--serial", "null"]);
    source.wait_until_up();
    let (destination, uri) = Vm::listen(&[]);
    // Its state alone takes longer: it stays on its way, however slow this machine is.
    let never = ["--downtime-limit", "1ms", "--timeout", "1h", "--on-timeout", "stop-and-copy"];
    let _client = source.start_move(&uri, &[&["--bandwidth", "1M"], &never[..]].concat());
    source.until_pre_copy();
    let mut stream = UnixStream::connect(destination.place.path("move.sock")).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    let question = Message::Resolve(Resolve { protocol_min: 1, protocol_max: 1, id });
    let mut bytes = wire::preamble(StreamKind::Live).to_vec();
    wire::put_record(&mut bytes, question.kind(), &question.body());
    stream.write_all(&bytes).unwrap();
    stream.read_exact(&mut bytes[..wire::preamble(StreamKind::Live).len()]).unwrap();
    let mut body = Vec::new();
    let (head, _) = wire::read_record(&mut stream, &mut body).unwrap();
    let answer = Message::parse(head.kind, &body).unwrap();
    assert_eq!(answer, Message::NeverActivated(Reasons::one("it was full")));
    assert_eq!(source.info()["state"], "migrating");
    std::fs::remove_file(socket::directory().unwrap().join(format!("{id}.verdict"))).unwrap();
}

#[test]
fn the_console_is_not_where_the_stream_is() {
    let listen = ["migrate", "--listen", "stdio", "--serial", "stdio"];
    let output = Command::new(binary()).args(listen).output().unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{err}");
    assert!(err.contains("--serial stdio") && err.contains("carry the stream"), "{err}");
}

/// Its process is still there, as nobody reads the last of its output, but holds nothing that the guest needs.
#[test]
fn a_guest_comes_back_as_soon_as_it_has_gone() {
    if !has_kvm() {
        return;
    }
    let disks = Place::new();
    let (image, tty) = (disks.path("image"), disks.path("tty"));
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    let option = format!("{},id=data", image.display());
    let there = format!("id=data,path={}", image.display());
    let serial = format!("unix:{}", tty.display());
    let source = Vm::start(Guest::counter(), &["--disk", &option, "--serial", &serial]);
    until("listens", || listens(&tty));
    // Its reader doesn't read.
    let reader = UnixStream::connect(&tty).unwrap();
    source.wait_until_up();
    let (away, uri) = Vm::listen(&["--disk", &there, "--serial", "null"]);
    source.try_move(&uri, &EASY).check_moved();
    let socket = disks.path("move.sock");
    let uri = format!("unix:{}", socket.display());
    let mut back = Command::new(binary());
    back.args(["migrate", "--listen", &uri, "--serial", &serial, "--disk", &there]);
    back.arg("--control").arg(source.place.path("vm.sock"));
    let _back = Vm::spawn(Place::new(), back);
    until("listens", || listens(&socket));
    away.try_move(&uri, &EASY).check_moved();
    assert_eq!(source.info()["state"], "running");
    let mut source = source;
    drop(reader);
    assert_eq!(source.wait().0, Some(0));
    assert!(source.place.path("vm.sock").exists() && tty.exists(), "its successor's are removed");
}

/// As one that has as many guests as it takes, which says so in the same way.
#[test]
fn a_listener_that_can_not_start_a_guests_process_says_so() {
    if !has_kvm() {
        return;
    }
    let source = Vm::start(Guest::spin(), &[]);
    source.wait_until_up();
    let place = Place::new();
    let (program, socket) = (place.path("vmm"), place.path("move.sock"));
    std::fs::copy(binary(), &program).unwrap();
    let uri = format!("unix:{}", socket.display());
    let mut command = Command::new(&program);
    command.args(["migrate", "--listen", &uri, "--keep"]);
    let _listener = Vm::spawn(place, command);
    until("listens", || listens(&socket));
    std::fs::remove_file(&program).unwrap();
    let words = ["the destination says", "can't start", "for a guest"];
    source.try_move(&uri, &EASY).check_failed(&words);
    assert_eq!(source.info()["state"], "running");
}
