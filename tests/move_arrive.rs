//! `vmm migrate` between real processes: what a destination makes of the guest that comes. Where its console is when
//! the stream has standard input and output; which guests it turns away, and that it says everything that is in the way.

mod support;

use std::io::{Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use support::guests::Guest;
use support::moves::{EASY, check_last_line, until};
use support::vm::{LONG, Place, Vm, binary, has_kvm};

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

#[test]
fn the_console_is_not_where_the_stream_is() {
    let listen = ["migrate", "--listen", "stdio", "--serial", "stdio"];
    let output = Command::new(binary()).args(listen).output().unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{err}");
    assert!(err.contains("--serial stdio") && err.contains("carry the stream"), "{err}");
}
