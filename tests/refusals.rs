//! What the real binary refuses once it has a KVM, in one line each: kernels that can't be, what doesn't fit, and what
//! another VM has already.

#[path = "support/flat.rs"]
mod flat;

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use flat::{LONG, Vm, World, endless, guest, text};

/// The one line on standard error of a command that fails with status 1.
#[track_caller]
fn refusal(command: &mut Command) -> String {
    let output = command.output().expect("the binary runs");
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.starts_with("vmm: ") && stderr.ends_with('\n'), "{stderr:?}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    stderr
}

/// `vmm run` in this world, its console nowhere.
fn run(world: &World, args: &[&str]) -> Command {
    let mut command = world.command();
    command.args(["run", "--serial", "null"]).args(args);
    // A default name's socket would be in root's directory, or in none.
    if !args.contains(&"--name") {
        command.args(["--control", "./other.sock"]);
    }
    command.env("XDG_RUNTIME_DIR", world.dir.path());
    command
}

/// A bzImage of boot protocol 2.15 whose payload is a gzip file with one stored block.
fn bzimage(content: &[u8], checksum: u32) -> Vec<u8> {
    const CODE: usize = 1024;
    let length = u16::try_from(content.len()).expect("one block");
    let mut payload = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3, 1];
    payload.extend(length.to_le_bytes());
    payload.extend((!length).to_le_bytes());
    payload.extend(content);
    payload.extend(checksum.to_le_bytes());
    payload.extend(u32::from(length).to_le_bytes());
    let code_len = payload.len().next_multiple_of(16);
    let mut image = vec![0; CODE + code_len];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]); // sectors of setup, beside the first
    put(0x1f4, &u32::try_from(code_len / 16).expect("small").to_le_bytes());
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(0x202, b"HdrS\x0f\x02");
    put(0x230, &0x20_0000u32.to_le_bytes()); // alignment
    put(0x236, &[0x7f]); // a 64-bit entry
    put(0x238, &100u32.to_le_bytes()); // length of the command line
    put(0x24c, &u32::try_from(payload.len()).expect("small").to_le_bytes());
    put(0x258, &0x10_0000u64.to_le_bytes()); // preferred address
    put(0x260, &0x10_0000u32.to_le_bytes()); // size at the start
    put(CODE, &payload);
    image
}

#[test]
fn kernels_that_cannot_be_are_named() {
    let good = guest().print("x").power_off().spin().elf();
    let packed = bzimage(&good, crc32fast::hash(&good));
    let changed = |at: usize, bytes: &[u8]| {
        let mut elf = good.clone();
        elf[at..at + bytes.len()].copy_from_slice(bytes);
        elf
    };
    // e_machine; p_memsz of the one segment.
    let (machine, memory) = (18, 64 + 40);
    for (kernel, words) in [
        (good[..good.len() - 1].to_vec(), "is truncated"),
        (packed[..packed.len() - 16].to_vec(), "is truncated"),
        (changed(machine, &[183, 0]), "arm64"),
        (bzimage(&good, 0), "checksum"),
        (changed(memory, &(40u64 << 20).to_le_bytes()), "--mem"),
        (b"not a kernel".to_vec(), "isn't a Linux kernel but"),
    ] {
        let world = World::new(&guest());
        fs::write(world.path("kernel"), kernel).expect("a file");
        let line = refusal(&mut run(&world, &["--kernel", "kernel", "--mem", "32M"]));
        assert!(line.contains("kernel") && line.contains(words), "{words}: {line}");
    }
    // The same bzImage, whole, is one; and says how long a command line it takes.
    let world = World::new(&guest());
    fs::write(world.path("kernel"), packed).expect("a file");
    let args = ["--kernel", "kernel", "--mem", "32M", "--cmdline"];
    let status = run(&world, &[&args[..], &["short"]].concat()).status().expect("the binary runs");
    assert!(status.success());
    let long = "x".repeat(101);
    let line = refusal(&mut run(&world, &[&args[..], &[&long]].concat()));
    assert!(line.contains("has 101 bytes, this kernel takes at most 100"), "{line}");
}

#[test]
fn what_is_too_big_is_named() {
    let world = World::new(&guest().spin());
    fs::File::create(world.path("initrd")).and_then(|file| file.set_len(40 << 20)).expect("a file");
    let args = ["--kernel", "kernel", "--mem", "32M", "--initrd", "initrd"];
    let line = refusal(&mut run(&world, &args));
    assert!(line.contains("the initrd has 40 MiB") && line.contains("--mem"), "{line}");
    // A GiB more than this host has.
    let info = rustix::system::sysinfo();
    let mib = ((info.totalram + info.totalswap) * u64::from(info.mem_unit)) >> 20;
    let mem = format!("{}M", mib + 1024);
    let line = refusal(&mut run(&world, &["--kernel", "kernel", "--mem", &mem]));
    let words = format!("{} MiB of guest memory, but this host has {mib} MiB", mib + 1024);
    assert!(line.contains(&words) && line.contains("--mem"), "{line}");
}

#[test]
fn a_disk_that_another_vm_writes_is_named_with_its_process() {
    let world = World::new(&endless());
    fs::write(world.path("disk"), [0; 4096]).expect("a file");
    let mut first = world.run(&["--disk", "disk"]);
    first.reads("up");
    let args = ["--kernel", "kernel", "--mem", "32M", "--disk", "disk"];
    let line = refusal(&mut run(&world, &args));
    let pid = format!("pid {}", first.child().id());
    assert!(line.contains("/disk: ") && line.contains(&pid), "{line}");
    // And one that reads it isn't let in beside a writer either.
    let args = ["--kernel", "kernel", "--mem", "32M", "--disk", "disk,readonly"];
    assert!(refusal(&mut run(&world, &args)).contains(&pid));
}

#[test]
fn a_name_is_one_vms_at_its_default_path() {
    let world = World::new(&endless());
    let name = format!("refused-{}", std::process::id());
    let args = ["--kernel", "kernel", "--mem", "32M", "--name", &name];
    let first = run(&world, &args).spawn().expect("the binary runs");
    let pid = format!("in use by a live VM (pid {})", first.id());
    let _first = Vm { child: Some(first) };
    let info = || {
        let mut info = world.command();
        info.env("XDG_RUNTIME_DIR", world.dir.path()).args(["info", &name]);
        info.output().expect("the binary runs").status.success()
    };
    let start = Instant::now();
    while !info() {
        assert!(start.elapsed() < LONG, "the VM doesn't come up");
        std::thread::sleep(Duration::from_millis(5));
    }
    let line = refusal(&mut run(&world, &args));
    assert!(line.contains(&format!("{name}.sock")) && line.contains(&pid), "{line}");
}
