//! Snapshots that aren't what a writer makes, with right checksums, a right digest and a right count: what is wrong is
//! said in one line before anything runs, by whoever restores and by whoever looks. And files that are none.

mod support;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use support::guests::Guest;
use support::moves::check_last_line;
use support::vm::{LONG, Vm, binary, has_kvm};
use vmm_migration::message::{End, Message};
use vmm_migration::wire::record::{END, MEMORY_SUMS, SECTION, SNAPSHOT};
use vmm_migration::wire::{self, Digest, PREAMBLE_LEN, put_record};

/// A record: type and body.
type Record = (u32, Vec<u8>);

/// A guest's snapshot, from which the others are made.
struct Original {
    place: tempfile::TempDir,
    preamble: Vec<u8>,
    records: Vec<Record>,
}

impl Original {
    /// Of a guest that uses its memory from 16 MiB on, and some below.
    fn new() -> Self {
        let place = tempfile::tempdir().unwrap();
        let mut vm = Vm::start(Guest::dirtier(4, 0), &[]);
        vm.read_some(1);
        vm.tell(&["snapshot", place.path().join("good").to_str().unwrap()]);
        let state = fs::read(place.path().join("good/state")).unwrap();
        let (preamble, mut rest) = state.split_at(PREAMBLE_LEN);
        let (mut records, mut body) = (Vec::new(), Vec::new());
        while !rest.is_empty() {
            let (head, _) = wire::read_record(&mut rest, &mut body).unwrap();
            records.push((head.kind, body.clone()));
        }
        Self { preamble: preamble.to_vec(), records, place }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    /// A fresh directory with the original's memory in it.
    fn copy(&self) -> PathBuf {
        let dir = self.path("forged");
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir(&dir).unwrap();
        let (from, to) = (self.path("good/memory"), dir.join("memory"));
        let copied = Command::new("cp").arg("--sparse=always").arg(from).arg(to).status().unwrap();
        assert!(copied.success());
        dir
    }

    /// A copy with other records; their count and digest in `End` are right.
    fn forged(&self, lie: impl FnOnce(&mut Vec<Record>)) -> PathBuf {
        let dir = self.copy();
        let mut records = self.records.clone();
        lie(&mut records);
        let (mut out, mut digest) = (self.preamble.clone(), Digest::default());
        let sections = records.iter().filter(|(kind, _)| *kind == SECTION).count();
        for (kind, mut body) in records {
            if kind == END {
                let Message::End(end) = Message::parse(END, &body).unwrap() else { unreachable!() };
                let (records, digest) = digest.value();
                let sections = u32::try_from(sections).unwrap();
                body = Message::End(End { records, digest, sections, ..end }).body();
            }
            digest.add(put_record(&mut out, kind, &body));
        }
        fs::write(dir.join("state"), out).unwrap();
        dir
    }
}

/// Where the first record of a type is.
fn first(records: &[Record], kind: u32) -> usize {
    records.iter().position(|record| record.0 == kind).unwrap()
}

/// Changes the first section.
fn change(records: &mut [Record], change: impl FnOnce(&mut vmm_migration::state::Section)) {
    let at = first(records, SECTION);
    let mut section = wire::decode_section(&records[at].1).unwrap();
    change(&mut section);
    records[at].1 = wire::encode_section(&section);
}

/// Status 1, and these words in one line.
#[track_caller]
fn check_refused(command: &mut Command, words: &[&str]) {
    let output = command.env_remove("VMM_LOG").output().unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), err.lines().count()), (Some(1), 1), "{err}");
    check_last_line(&err, words);
}

/// `vmm inspect --check` of a snapshot.
fn inspect(dir: &Path) -> Command {
    let mut inspect = Command::new(binary());
    inspect.arg("inspect").arg(dir).arg("--check");
    inspect
}

/// The snapshot isn't restored, and these words in one line say why.
#[track_caller]
fn check_not_restored(dir: &Path, options: &[&str], words: &[&str]) {
    let mut vm = Vm::restore(dir, options);
    let (status, err) = vm.wait_for(LONG);
    assert_eq!((status, err.lines().count()), (Some(1), 1), "{err}");
    check_last_line(&err, words);
    assert_eq!(vm.read_to_end(), b"", "it ran");
}

#[test]
fn state_that_no_writer_makes() {
    if !has_kvm() {
        return;
    }
    type Lie = fn(&mut Vec<Record>);
    let original = Original::new();
    let lies: [(Lie, &[&str]); 12] = [
        (|r| drop(r.remove(first(r, SECTION))), &["section irqchip/0 version 1 is missing"]),
        (|r| r.insert(first(r, SECTION), r[first(r, SECTION)].clone()), &["came twice"]),
        (|r| change(r, |s| s.kind = "flux".into()), &["section flux/0 version", "not announced"]),
        (|r| change(r, |s| s.version += 1), &["version 2 was not announced"]),
        (|r| change(r, |s| s.instance += 1000), &["/1000 version 1 was not announced"]),
        (|r| r.retain(|(kind, _)| *kind != SECTION), &["is missing"]),
        (|r| r.insert(1, (999, b"?".to_vec())), &["unknown", "999"]),
        (|r| r.insert(1, r[0].clone()), &["a record Snapshot is out of place"]),
        (|r| drop(r.remove(0)), &["its first record is no Snapshot"]),
        (|r| drop(r.pop()), &["cut short"]),
        (|r| r.push(r[first(r, END)].clone()), &["bytes after its end"]),
        (|r| r[0].1.truncate(100), &["Snapshot"]),
    ];
    for (lie, words) in lies {
        let dir = original.forged(lie);
        let words = [&["forged"], words].concat();
        check_refused(&mut inspect(&dir), &words);
        for load in ["--lazy", "--eager"] {
            check_not_restored(&dir, &[load], &words);
        }
    }
    // Nothing but the lies is in the way.
    let dir = original.forged(|r| r.insert(1, (1 << 31 | 999, b"?".to_vec())));
    assert!(inspect(&dir).status().unwrap().success());
    Vm::restore(&dir, &["--eager"]).read_some(2);
}

/// What a later vmm would write: whoever looks is shown it, and nothing is restored.
#[test]
fn a_section_of_a_newer_version_that_is_announced() {
    if !has_kvm() {
        return;
    }
    let original = Original::new();
    let dir = original.forged(|records| {
        let at = first(records, SECTION);
        let mut section = wire::decode_section(&records[at].1).unwrap();
        // In the plan: the kind with its length before it, the instance and the version, a byte each.
        let kind = section.kind.as_bytes();
        let mut listed = vec![u8::try_from(kind.len()).unwrap()];
        listed.extend(kind);
        listed.extend([0, 1]);
        let plan = first(records, SNAPSHOT);
        let plan = &mut records[plan].1;
        let found = plan.windows(listed.len()).position(|bytes| bytes == listed).unwrap();
        plan[found + listed.len() - 1] = 2;
        section.version = 2;
        records[at].1 = wire::encode_section(&section);
    });
    let shown = inspect(&dir).output().unwrap();
    assert!(shown.status.success(), "{shown:?}");
    assert!(String::from_utf8(shown.stdout).unwrap().contains("/0 version 2, "));
    for load in ["--lazy", "--eager"] {
        check_not_restored(
            &dir,
            &[load],
            &["forged", "saved state has version 2, this vmm reads up to 1"],
        );
    }
}

/// The checksums' record, as pairs.
fn sums(records: &mut [Record], change: impl FnOnce(&mut Vec<[u8; 8]>)) {
    let at = first(records, MEMORY_SUMS);
    let mut pairs = records[at].1.as_chunks::<8>().0.to_vec();
    change(&mut pairs);
    records[at].1 = pairs.concat();
}

#[test]
fn checksums_that_lie() {
    if !has_kvm() {
        return;
    }
    let original = Original::new();
    type Lie = fn(&mut Vec<[u8; 8]>);
    // Of the first block, and of the guest's RAM of 64 MiB.
    let of_its_state: [(Lie, &str); 3] = [
        (|s| s.swap(0, 1), "blocks out of order"),
        (|s| s.push(s[s.len() - 1]), "blocks out of order"),
        (|s| s.push([64, 0, 0, 0, 1, 2, 3, 4]), "a checksum of no memory"),
    ];
    for (lie, what) in of_its_state {
        let dir = original.forged(|records| sums(records, lie));
        check_refused(&mut inspect(&dir), &["forged", what]);
        for load in ["--lazy", "--eager"] {
            check_not_restored(&dir, &[load], &["forged", what]);
        }
    }
    // Who maps the memory can't look at these, by its nature. The guest dirties 4 MiB from 16 MiB on.
    let of_its_memory: [(Lie, &str); 3] = [
        (|s| s[0][4] ^= 1, "the checksum of block 0 is wrong"),
        (|s| s.truncate(s.len() - 1), "the checksum of block 19 is wrong"),
        (|s| s.push([40, 0, 0, 0, 1, 2, 3, 4]), "the checksum of block 40 is wrong"),
    ];
    for (lie, what) in of_its_memory {
        let dir = original.forged(|records| sums(records, lie));
        check_refused(&mut inspect(&dir), &["forged", what]);
        check_not_restored(&dir, &["--eager"], &["forged", what]);
    }
}

#[test]
fn a_memory_file_of_another_length() {
    if !has_kvm() {
        return;
    }
    let original = Original::new();
    for (bytes, what) in [
        ((64 << 20) - 1, "its memory has 67108863 bytes, its state says 67108864"),
        ((64 << 20) + 1, "its memory has 67108865 bytes, its state says 67108864"),
        (0, "its memory has 0 bytes, its state says 67108864"),
        (1 << 40, "its memory has 1099511627776 bytes, its state says 67108864"),
    ] {
        let dir = original.forged(|_| {});
        File::options().write(true).open(dir.join("memory")).unwrap().set_len(bytes).unwrap();
        check_refused(&mut inspect(&dir), &["forged", what]);
        for load in ["--lazy", "--eager"] {
            check_not_restored(&dir, &[load], &["forged", what]);
        }
    }
}

#[test]
fn what_is_no_file_is_not_waited_for() {
    if !has_kvm() {
        return;
    }
    let original = Original::new();
    let fifo = |path: &Path| {
        mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    };
    let directory = |path: &Path| fs::create_dir(path).unwrap();
    let device = |path: &Path| std::os::unix::fs::symlink("/dev/zero", path).unwrap();
    let makes: [&dyn Fn(&Path); 3] = [&fifo, &directory, &device];
    for file in ["state", "memory"] {
        for make in makes {
            let dir = original.forged(|_| {});
            fs::remove_file(dir.join(file)).unwrap();
            make(&dir.join(file));
            let words = ["can't open", &format!("forged/{file}"), "it is no regular file"];
            check_refused(&mut inspect(&dir), &words);
            for load in ["--lazy", "--eager"] {
                check_not_restored(&dir, &[load], &words);
            }
        }
    }
}

#[test]
fn what_is_inspected_record_by_record_may_come_through_a_pipe() {
    if !has_kvm() {
        return;
    }
    let original = Original::new();
    let state = original.path("good/state");
    let shown = |path: &Path, stdin: Stdio| {
        let mut inspect = Command::new(binary());
        let output = inspect.arg("inspect").arg(path).stdin(stdin).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let mut cat = Command::new("cat").arg(&state).stdout(Stdio::piped()).spawn().unwrap();
    let piped = cat.stdout.take().unwrap();
    assert_eq!(shown(Path::new("/dev/stdin"), piped.into()), shown(&state, Stdio::null()));
    cat.wait().unwrap();
}
