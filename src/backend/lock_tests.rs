//! The disk's lock between processes: this test starts another one that holds it.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use super::*;

const PATH_VARIABLE: &str = "VMM_TEST_LOCK_PATH";

fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

#[test]
fn readers_share_and_writers_exclude() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path();
    let [a, b, c] = [open(path), open(path), open(path)];
    take(&a, path, LockMode::Shared).unwrap();
    take(&b, path, LockMode::Shared).unwrap();
    let error = take(&c, path, LockMode::Exclusive).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "disk {}: locked by another disk of this VM; stop it, or open the disk read-only in both",
            path.display()
        )
    );
    release(&a, path).unwrap();
    drop(b);
    take(&c, path, LockMode::Exclusive).unwrap();
    assert!(matches!(take(&a, path, LockMode::Shared), Err(LockError::Held { .. })));
}

#[test]
fn the_source_s_lock_is_told_from_another_s() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path();
    let [source, other, ours] = [open(path), open(path), open(path)];
    let seen = |mode, mark| obstacle(&ours, path, mode, mark).unwrap();
    let (write, read) = (LockMode::Exclusive, LockMode::Shared);
    assert_eq!(seen(write, Some(mark())), Obstacle::None);
    assert!((DISK_BYTES_MAX..2 * DISK_BYTES_MAX).contains(&mark()));

    take(&source, path, write).unwrap();
    assert_eq!(seen(write, Some(mark())), Obstacle::Source);
    assert_eq!(seen(write, None), Obstacle::Source, "an older source doesn't tell");
    assert_eq!(seen(write, Some(mark() ^ 1)), Obstacle::Other(Holder::Myself));
    assert_eq!(seen(read, Some(mark())), Obstacle::Other(Holder::Myself));
    release(&source, path).unwrap();

    // An older vmm's, or another program's, over the whole file; a reader's; QEMU's, on single bytes.
    control(&other, libc::F_OFD_SETLK, libc::F_WRLCK, WHOLE).unwrap();
    assert_eq!(seen(write, Some(mark())), Obstacle::Other(Holder::Myself));
    release(&other, path).unwrap();
    take(&other, path, read).unwrap();
    assert_eq!(seen(write, Some(mark())), Obstacle::Other(Holder::Myself));
    assert_eq!(seen(read, Some(mark())), Obstacle::None);
    release(&other, path).unwrap();
    control(&other, libc::F_OFD_SETLK, libc::F_RDLCK, 101).unwrap();
    assert_eq!(seen(write, Some(mark())), Obstacle::Other(Holder::Myself));
}

/// Not a test by itself: the other process of the next one. Holds the lock until its input ends.
#[test]
#[ignore = "run by names_the_process_that_holds_the_lock"]
fn helper_that_holds_a_lock() {
    let path = std::env::var_os(PATH_VARIABLE).expect("set by the test that runs this");
    let file = open(path.as_ref());
    take(&file, path.as_ref(), LockMode::Exclusive).unwrap();
    println!("held");
    std::io::stdout().flush().unwrap();
    std::io::stdin().read_line(&mut String::new()).unwrap();
}

#[test]
fn names_the_process_that_holds_the_lock() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "--nocapture"])
        .arg("backend::lock::tests::helper_that_holds_a_lock")
        .env(PATH_VARIABLE, path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|l| l.unwrap().ends_with("held")), "the helper died");

    let ours = open(path);
    let error = take(&ours, path, LockMode::Shared).unwrap_err();
    let LockError::Held { holder: Holder::Process { pid, name }, .. } = &error else {
        panic!("{error}")
    };
    assert_eq!(*pid, child.id());
    assert!(!name.is_empty());
    assert!(error.to_string().contains(&format!("locked by pid {pid} ({name})")));

    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
    take(&ours, path, LockMode::Exclusive).unwrap();
}
