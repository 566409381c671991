//! Stock guests in snapshots: taken while they stand and while they run, restored lazily and eagerly, once
//! and twice at a time. Memory, disk, clocks and the kernel's log are as they should be, and clones know
//! that they are clones.

#[path = "support/linux.rs"]
mod linux;

use std::fs;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use linux::{BAD_LOG, Ended, Guest, Vm};
use vmm::arch::layout;

/// Set for the program in the guest, which is this test binary itself (it is static), told to run the same
/// test.
const IN_GUEST: &str = "VMM_TEST_IN_GUEST";
/// Words of memory that the program verifies and rewrites: 16 MiB.
const WORDS: usize = 2 << 20;
/// How old a snapshot is when it is restored, at least.
const AGE: Duration = Duration::from_secs(5);
/// By how much the guest's clock may be wrong, and far less than [`AGE`].
const CLOCK_SLACK: f64 = 2.0;

fn real_s() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64()
}

/// In the guest: goes over its memory until "end" is typed, and tells after each pass its number, the time,
/// and 16 random bytes. What is wrong becomes a line FAULT.
fn program_in_the_guest() {
    let listener = std::thread::spawn(|| {
        let mut line = String::new();
        std::io::stdin().read_line(&mut line).unwrap();
        line
    });
    let (mut words, mut latest) = (vec![0_u64; WORDS], Instant::now());
    for pass in 1.. {
        let key =
            |pass: u64, at: usize| (pass << 32 | at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        for (at, word) in words.iter_mut().enumerate() {
            if pass > 1 && *word != key(pass - 1, at) {
                println!("FAULT word {at} of pass {pass} is {word:#x}");
            }
            *word = key(pass, at);
        }
        words = std::hint::black_box(words);
        let now = Instant::now();
        if now.checked_duration_since(latest).is_none() {
            println!("FAULT CLOCK_MONOTONIC went back");
        }
        latest = now;
        let mut random = [0; 16];
        File::open("/dev/urandom").unwrap().read_exact(&mut random).unwrap();
        // One write, so that no line is half of one guest and half of its copy.
        let line = format!("pass {pass} {:.3} {:032x}\n", real_s(), u128::from_le_bytes(random));
        std::io::stdout().write_all(line.as_bytes()).unwrap();
        if listener.is_finished() {
            break;
        }
        sleep(Duration::from_millis(50));
    }
    assert_eq!(listener.join().unwrap(), "end\n");
}

/// This binary without what it doesn't need to run: its symbols are larger than the guest.
fn program() -> Vec<u8> {
    let mut file = fs::read(std::env::current_exe().unwrap()).unwrap();
    let word = |at: usize| {
        usize::try_from(u64::from_le_bytes(file[at..at + 8].try_into().unwrap())).unwrap()
    };
    let half = |at: usize| usize::from(u16::from_le_bytes([file[at], file[at + 1]]));
    // ELF64: e_phnum (56) program headers, e_phentsize (54) long, from e_phoff (32) on; in each p_offset
    // (8) and p_filesz (32).
    let headers = (0..half(56)).map(|i| word(32) + i * half(54));
    let end = headers.map(|at| word(at + 8) + word(at + 32)).max().unwrap();
    file.truncate(end);
    // No section headers: e_shoff, e_shnum, e_shstrndx.
    file[40..48].fill(0);
    file[60..64].fill(0);
    file
}

/// A guest that runs the program, and afterwards looks at its disk, if it has one, and its log.
fn guest(kernel: &'static str, test: &str) -> Guest {
    // Of the VMClock's page it tells magic, seq_count, disruption_marker and vm_generation_counter (their low halves).
    let page = layout::VMCLOCK_PAGE.0 >> 12;
    let script = format!(
        "#!/bin/sh\nstty -echo\ndmesg -c > /boot.log\n\
         [ ! -e /dev/vda ] || dd if=/load of=/dev/vda bs=64k count=16 conv=fsync 2>/dev/null || exit 1\n\
         {IN_GUEST}=1 /load --exact {test} --nocapture || exit 2\n\
         if [ -e /dev/vda ]; then\n\
         echo 3 > /proc/sys/vm/drop_caches\n\
         cmp -n 1048576 /load /dev/vda || exit 3\n\
         echo written after | dd of=/dev/vda bs=1M seek=1 conv=notrunc,fsync 2>/dev/null || exit 4\n\
         fi\n\
         dmesg > /log\n\
         echo \"forks=$(grep -c 'crng reseeded due to virtual machine fork' /log)\"\n\
         grep -iE '{BAD_LOG}' /log | sed 's/^/FAULT log: /'\n\
         cat /sys/bus/acpi/devices/AMZNC10C:00/path || exit 5\n\
         set -- $(dd if=/dev/mem bs=4096 skip={page} count=1 2>/dev/null | od -An -v -tx4)\n\
         echo \"vmclock=$1 $4 $5 ${{27}}\"\n\
         true"
    );
    Guest::new(kernel).mem("128M").file("load", program()).file("vmm.run", script.into_bytes())
}

/// A line of the program.
#[derive(Clone, Debug, PartialEq)]
struct Pass {
    number: u64,
    real_s: f64,
    random: String,
}

/// The passes on a console; without the first line of a restored one, if that is cut.
fn passes(console: &str) -> Vec<Pass> {
    let whole = console.rfind('\n').map_or("", |end| &console[..end]);
    whole
        .lines()
        .filter_map(|line| {
            let mut words = line.trim_end().strip_prefix("pass ")?.split(' ');
            let mut word = || words.next().unwrap_or_default();
            let (number, real_s) = (word().parse().ok()?, word().parse().ok()?);
            Some(Pass { number, real_s, random: word().to_owned() })
        })
        .collect()
}

/// Waits for that many more passes; gives all.
fn await_passes(vm: &mut Vm, more: usize) -> Vec<Pass> {
    let before = passes(&vm.console()).len();
    vm.wait_until("more passes are made", |vm| passes(&vm.console()).len() >= before + more);
    passes(&vm.console())
}

fn snapshot(vm: &mut Vm, dir: &Path, options: &[&str]) -> Vec<Pass> {
    await_passes(vm, 2);
    vm.ask("snapshot", &[&[dir.to_str().unwrap()], options].concat());
    // The guest runs on.
    await_passes(vm, 2)
}

/// Ends the program, and looks at what it and its kernel have to say. Gives all passes.
fn end(mut vm: Vm) -> (Ended, Vec<Pass>) {
    vm.type_in("end\n");
    let ended = vm.wait();
    ended.check_success().check(!ended.console.contains("FAULT"), "a fault");
    let passes = passes(&ended.console);
    let in_turn = passes.windows(2).all(|pair| pair[1].number == pair[0].number + 1);
    ended.check(in_turn, "a pass is missing");
    (ended, passes)
}

/// A guest goes on where its snapshot was taken; its clock is right, although time has passed; its disk is
/// what it was, and takes more.
#[test]
fn snapshots_go_on_lazily_and_eagerly() {
    if std::env::var_os(IN_GUEST).is_some() {
        return program_in_the_guest();
    }
    for kernel in ["6.1-cloud", "6.12-cloud"] {
        let dir = tempfile::tempdir().unwrap();
        let (still, live) = (dir.path().join("still"), dir.path().join("live"));
        let disk = dir.path().join("disk");
        fs::write(&disk, vec![0; 2 << 20]).unwrap();
        let mut vm = guest(kernel, "snapshots_go_on_lazily_and_eagerly")
            .option("--disk", disk.to_str().unwrap())
            .start();
        let last = snapshot(&mut vm, &still, &[]);
        snapshot(&mut vm, &live, &["--live", "--downtime-limit", "10s"]);
        vm.ask("stop", &["--force"]);
        vm.wait().check_status(0);
        sleep(AGE);
        for (from, load) in [(&still, "--lazy"), (&live, "--eager"), (&live, "--lazy")] {
            fs::File::options().write(true).open(&disk).unwrap().set_len(1 << 20).unwrap();
            fs::File::options().write(true).open(&disk).unwrap().set_len(2 << 20).unwrap();
            let restored_s = real_s();
            let mut vm = Guest::new(kernel).restore(from, &[load]);
            let passes = await_passes(&mut vm, 3);
            let now_s = real_s();
            // What the first line says may be from before the snapshot.
            let guest_s = passes[1].real_s;
            if guest_s < restored_s - CLOCK_SLACK || guest_s > now_s + CLOCK_SLACK {
                vm.fail(&format!("{load}: it is {guest_s}, between {restored_s} and {now_s}"));
            }
            let (ended, passes) = end(vm);
            if from == &still {
                ended.check(passes[0].number <= last.last().unwrap().number, "it went on later");
            }
            let image = fs::read(&disk).unwrap();
            ended.check(image[1 << 20..].starts_with(b"written after\n"), "nothing was written");
        }
    }
}

/// Two clones run at once and do the same, but for their random numbers. Their clocks may stand still.
#[test]
fn clones_draw_unlike_random_numbers() {
    if std::env::var_os(IN_GUEST).is_some() {
        return program_in_the_guest();
    }
    let dir = tempfile::tempdir().unwrap();
    let from: PathBuf = dir.path().join("snapshot");
    let mut vm = guest("6.12-cloud", "clones_draw_unlike_random_numbers").start();
    snapshot(&mut vm, &from, &[]);
    let (ended, _) = end(vm);
    ended.check_value("forks", "0").check_value("vmclock", "4b4c4356 00000000 00000000 00000000");
    sleep(AGE);
    let clones = ["--lazy", "--eager"].map(|load| {
        Guest::new("6.12-cloud").restore(&from, &[load, "--clock", "saved", "--name", &load[2..]])
    });
    let ends = clones.map(|mut clone| {
        await_passes(&mut clone, 3);
        let late_s = real_s() - AGE.as_secs_f64() + CLOCK_SLACK;
        let (ended, passes) = end(clone);
        ended
            .check_value("forks", "1")
            .check_value("vmclock", "4b4c4356 00000004 00000001 00000001");
        ended.check(passes[2].real_s < late_s, "time passed for it");
        passes
    });
    assert_eq!(ends[0][0].number, ends[1][0].number);
    // The first line may be from before the snapshot.
    for (one, other) in ends[0].iter().zip(&ends[1]).skip(1) {
        assert_ne!(one.random, other.random, "pass {}", one.number);
    }
}
