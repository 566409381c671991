//! Tests of `socket`: modes, dead and live sockets, names and paths.

use std::os::unix::fs::PermissionsExt;

use super::*;

#[test]
fn the_socket_is_private_and_goes_away() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("a.sock");
    let socket = ControlSocket::bind(&path).expect("a free path");
    let mode = fs::metadata(&path).expect("a socket").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let stream = connect(&path).expect("it listens");
    assert_eq!(peer_pid(&stream), Some(i32::try_from(std::process::id()).expect("a pid")));
    drop(socket);
    assert!(!path.exists());
    assert_eq!(connect(&path).expect_err("gone").kind(), io::ErrorKind::NotFound);
}

#[test]
fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("a.sock");
    drop(UnixListener::bind(&path).expect("a socket that dies"));
    assert!(path.exists());
    let live = ControlSocket::bind(&path).expect("the dead one is replaced");
    let error = ControlSocket::bind(&path).expect_err("the live one is not");
    let text = error.to_string();
    assert!(text.contains(&format!("(pid {})", std::process::id())), "{text}");
    drop(live);
}

#[test]
fn a_socket_that_was_replaced_is_left_alone() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("a.sock");
    let old = ControlSocket::bind(&path).expect("a free path");
    fs::remove_file(&path).expect("removed by hand");
    let other = UnixListener::bind(&path).expect("another's");
    drop(old);
    assert!(path.exists());
    drop(other);
}

#[test]
fn what_is_no_socket_is_kept() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("a.sock");
    fs::write(&path, "precious").expect("a file");
    assert!(matches!(ControlSocket::bind(&path), Err(SocketError::Occupied { .. })));
    assert_eq!(fs::read(&path).expect("still there"), b"precious");
}

#[test]
fn a_long_path_is_named_with_the_limit() {
    let path = Path::new("/tmp").join("x".repeat(104));
    let error = ControlSocket::bind(&path).expect_err("too long").to_string();
    assert!(error.contains("109 bytes") && error.contains("at most 107"), "{error}");
}

#[test]
fn the_longest_path_works() {
    let dir = tempfile::tempdir().expect("a directory");
    let room = SOCKET_PATH_BYTES_MAX - dir.path().as_os_str().len() - 1;
    let path = dir.path().join("x".repeat(room));
    let socket = ControlSocket::bind(&path).expect("107 bytes fit");
    drop(connect(&path).expect("it listens"));
    drop(socket);
}

#[test]
fn starting_at_once_leaves_one_owner() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("a.sock");
    for _ in 0..20 {
        drop(UnixListener::bind(&path).expect("a socket that dies"));
        let results: Vec<_> = std::thread::scope(|scope| {
            let start = || scope.spawn(|| ControlSocket::bind(&path));
            let threads = [start(), start(), start(), start()];
            threads.map(|thread| thread.join().expect("no panic")).into_iter().collect()
        });
        assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1, "{results:?}");
        connect(&path).expect("the one listens");
    }
}

#[test]
fn the_list_holds_sockets_with_good_names() {
    let dir = tempfile::tempdir().expect("a directory");
    assert_eq!(list(&dir.path().join("none")).expect("no directory"), Vec::new());
    let listeners = ["b.sock", "a.sock", "other", ".sock", "bad name.sock"]
        .map(|name| UnixListener::bind(dir.path().join(name)).expect("a socket"));
    fs::write(dir.path().join("file.sock"), "").expect("a file");
    let names: Vec<_> =
        list(dir.path()).expect("a directory").into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["a", "b"]);
    drop(listeners);
}

#[test]
fn a_directory_that_is_none_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let made = dir.path().join("vmm");
    make_directory(&made).expect("made");
    make_directory(&made).expect("there already");
    assert_eq!(fs::metadata(&made).expect("made").permissions().mode() & 0o777, 0o700);
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&made, &link).expect("a link");
    assert!(matches!(make_directory(&link), Err(SocketError::Foreign { .. })));
}

#[test]
fn unnamed_dead_sockets_are_swept_and_others_kept() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = |name: &str| dir.path().join(name);
    for name in ["vm-1.sock", "vm-2x.sock", "web.sock"] {
        drop(UnixListener::bind(path(name)).expect("a socket that dies"));
    }
    let live = UnixListener::bind(path("vm-3.sock")).expect("a socket that lives");
    fs::write(path("vm-4.sock"), "").expect("a file");
    sweep(dir.path()).expect("a directory");
    assert!(!path("vm-1.sock").exists());
    for name in ["vm-2x.sock", "web.sock", "vm-3.sock", "vm-4.sock"] {
        assert!(path(name).exists(), "{name}");
    }
    drop(live);
}

#[test]
fn a_console_stands_beside_the_control_socket() {
    for (control, console) in [
        ("/run/vmm/web.sock", "/run/vmm/web.tty"),
        ("/run/vmm/web.1.sock", "/run/vmm/web.1.tty"),
        ("/run/vmm/web", "/run/vmm/web.tty"),
        ("/run/vmm/web.tty", "/run/vmm/web.tty.tty"),
        ("/run/x.sock/web", "/run/x.sock/web.tty"),
    ] {
        assert_eq!(console_beside(Path::new(control)), Path::new(console));
    }
}
