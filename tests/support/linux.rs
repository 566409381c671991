//! Stock Linux guests under `vmm run`: what a test asks of one, its console, and how it ended.
//!
//! tests/run says where kernels and initramfs are. A guest runs a script of the test's, which says what it
//! found in lines of `name=value`; whatever a test finds wrong, it shows the whole console.

#![allow(dead_code, reason = "each test program uses a part")]

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// How long anything may take. Long: a guest in an emulated host on a busy machine is slow.
pub const LONG: Duration = Duration::from_secs(240);

/// Lines, as a pattern of grep -iE, that a guest's kernel has no reason to log once it has booted.
pub const BAD_LOG: &str = "lockup|stall|unstable|hung|blocked for more|call trace|BUG:|WARNING:|I/O error|skewed|skew is|backwards";

/// What every guest tells of itself; see [`Ended::check_basics`].
const BASICS: &str = r#"
echo "release=$(uname -r)"
echo "online=$(cat /sys/devices/system/cpu/online)"
echo "processors=$(grep -c ^processor /proc/cpuinfo)"
echo "clocksource=$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
echo "rng=$(cat /sys/class/misc/hw_random/rng_current)"
echo "random=$(dd if=/dev/hwrng bs=64 count=1 2>/dev/null | od -An -v -tx1 | tr -d ' \n')"
"#;

/// A file of the guest directory that tests/run names.
pub fn guest_file(name: &str) -> PathBuf {
    let dir = std::env::var_os("VMM_GUEST_DIR");
    Path::new(&dir.expect("VMM_GUEST_DIR: make test-linux runs these tests")).join(name)
}

/// `vmm` with arguments.
pub fn vmm(args: &[&str]) -> Command {
    let binary = std::env::var_os("VMM_BIN");
    let mut command =
        Command::new(binary.unwrap_or_else(|| env!("CARGO_BIN_EXE_vmm").to_owned().into()));
    command.args(args).env_remove("VMM_LOG").stdin(Stdio::null());
    command
}

/// The release that a kernel's bzImage says it has: the word at its `kernel_version`.
fn release(kernel: &str) -> String {
    let image = fs::read(guest_file(&format!("vmlinuz-{kernel}"))).unwrap();
    let at = 0x200 + usize::from(u16::from_le_bytes([image[0x20e], image[0x20f]]));
    let word: Vec<u8> = image[at..].iter().copied().take_while(u8::is_ascii_graphic).collect();
    String::from_utf8(word).unwrap()
}

/// A guest to be.
pub struct Guest {
    kernel: &'static str,
    image: String,
    mem: String,
    cmdline: String,
    options: Vec<String>,
    files: Vec<(String, u32, Vec<u8>)>,
    prefix: Vec<String>,
    dir: tempfile::TempDir,
}

impl Guest {
    /// Of the kernel named so in the guest directory (`6.12-cloud`, ...): 1 vCPU, 256 MiB, its bzImage
    /// and its initramfs.
    pub fn new(kernel: &'static str) -> Self {
        Self {
            kernel,
            image: "vmlinuz".to_owned(),
            mem: "256M".to_owned(),
            cmdline: "console=ttyS0 quiet panic=-1".to_owned(),
            options: Vec::new(),
            files: Vec::new(),
            prefix: Vec::new(),
            dir: tempfile::tempdir().unwrap(),
        }
    }

    /// Boots the ELF vmlinux.
    pub fn elf(mut self) -> Self {
        self.image = "vmlinux".to_owned();
        self
    }

    /// Boots these bytes as its bzImage.
    pub fn image(mut self, image: &[u8]) -> Self {
        self.image = self.path("image").display().to_string();
        fs::write(format!("{}-{}", self.image, self.kernel), image).unwrap();
        self
    }

    /// With that much RAM.
    pub fn mem(mut self, mem: &str) -> Self {
        mem.clone_into(&mut self.mem);
        self
    }

    /// With that many vCPUs.
    pub fn cpus(self, cpus: u32) -> Self {
        self.option("--cpus", &cpus.to_string())
    }

    /// With one more option of `vmm run`.
    pub fn option(mut self, name: &str, value: &str) -> Self {
        self.options.push(format!("{name}={value}"));
        self
    }

    /// With one more option that has no value.
    pub fn flag(mut self, name: &str) -> Self {
        self.options.push(name.to_owned());
        self
    }

    /// With more words on the kernel's command line.
    pub fn cmdline(mut self, words: &str) -> Self {
        write!(self.cmdline, " {words}").unwrap();
        self
    }

    /// With a file in its initramfs.
    pub fn file(mut self, path: &str, content: Vec<u8>) -> Self {
        self.files.push((path.to_owned(), 0o100_755, content));
        self
    }

    /// `vmm` started by another program, whose words these are; it becomes `vmm` in the end.
    pub fn through(mut self, words: &[&str]) -> Self {
        self.prefix = words.iter().map(|word| (*word).to_owned()).collect();
        self
    }

    /// Runs a script and powers off. It tells the basics first.
    pub fn run(self, script: &str) -> Self {
        let script = format!("#!/bin/sh\n{BASICS}{script}");
        self.file("vmm.run", script.into_bytes())
    }

    /// A path in the guest's own directory, which lasts until [`Ended`] is dropped.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// With a disk of that content, in the file of that name; `keys` as in `--disk PATH,KEYS`.
    pub fn disk(self, name: &str, content: &[u8], keys: &str) -> Self {
        fs::write(self.path(name), content).unwrap();
        let value = format!("{}{keys}", self.path(name).display());
        self.option("--disk", &value)
    }

    /// `vmm run`, ready to be started.
    pub fn command(&self) -> Command {
        let initrd = self.path("initrd");
        let mut archive = fs::read(guest_file(&format!("initramfs-{}.cpio", self.kernel))).unwrap();
        archive.extend(cpio(&self.files));
        fs::write(&initrd, archive).unwrap();
        let mut command = vmm(&["run", "--mem", &self.mem, "--cmdline", &self.cmdline]);
        command.arg("--kernel").arg(guest_file(&format!("{}-{}", self.image, self.kernel)));
        command.arg("--initrd").arg(initrd).args(&self.options);
        if !self.options.iter().any(|option| option.starts_with("--name")) {
            command.arg("--control").arg(self.path("vmm.sock"));
        }
        let Some((program, words)) = self.prefix.split_first() else { return command };
        let mut through = Command::new(program);
        through.args(words).arg(command.get_program()).args(command.get_args());
        through.env_remove("VMM_LOG");
        through
    }

    /// Starts it, its console going to a file and coming from a pipe.
    pub fn start(self) -> Vm {
        let command = self.command();
        self.spawn(command)
    }

    /// Lets the guest in a snapshot go on, with options of `vmm restore`. Of what this guest was to be, only
    /// its directory counts.
    pub fn restore(self, snapshot: &Path, options: &[&str]) -> Vm {
        let mut command = vmm(&["restore"]);
        command.arg(snapshot).arg("--control").arg(self.path("vm.sock")).args(options);
        self.spawn(command)
    }

    fn spawn(self, mut command: Command) -> Vm {
        command.stdin(Stdio::piped()).stdout(File::create(self.path("console")).unwrap());
        command.stderr(File::create(self.path("stderr")).unwrap());
        let mut child = command.spawn().unwrap();
        let stdin = child.stdin.take().unwrap();
        Vm { guest: self, child, stdin }
    }

    /// Starts it and waits for its end.
    pub fn boot(self) -> Ended {
        self.start().wait()
    }

    fn read(&self, name: &str) -> String {
        String::from_utf8_lossy(&fs::read(self.path(name)).unwrap()).into_owned()
    }

    fn fail(&self, what: &str) -> ! {
        let (stderr, console) = (self.read("stderr"), self.read("console"));
        panic!("{what}\n--- stderr\n{stderr}--- console\n{console}---")
    }
}

/// A guest that runs. Dropping it kills it.
pub struct Vm {
    guest: Guest,
    child: Child,
    stdin: ChildStdin,
}

impl Vm {
    /// The VMM's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A path in the guest's own directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.guest.path(name)
    }

    /// What the console has shown.
    pub fn console(&self) -> String {
        self.guest.read("console")
    }

    /// Fails with the console.
    pub fn fail(&self, what: &str) -> ! {
        self.guest.fail(what)
    }

    /// Waits until the console has shown a text.
    pub fn wait_for(&mut self, text: &str) {
        self.wait_until(&format!("{text:?} comes"), |vm| vm.console().contains(text));
    }

    /// Waits until something is so.
    pub fn wait_until(&mut self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        // Looked at first: what it printed before its end counts.
        loop {
            let ended = self.child.try_wait().unwrap();
            if is_so(self) {
                return;
            }
            if let Some(status) = ended {
                self.fail(&format!("ended with {status} before {what}"));
            }
            if start.elapsed() > LONG {
                self.fail(&format!("waited for {LONG:?} until {what}"));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Types on the console.
    pub fn type_in(&mut self, text: &str) {
        self.stdin.write_all(text.as_bytes()).unwrap();
    }

    /// Runs `vmm COMMAND` for this VM, by its socket.
    pub fn tell(&self, command: &str, args: &[&str]) -> Output {
        vmm(&[command]).arg(self.guest.path("vmm.sock")).args(args).output().unwrap()
    }

    /// As [`Self::tell`], which must succeed; gives what it said.
    pub fn ask(&self, command: &str, args: &[&str]) -> String {
        let output = self.tell(command, args);
        if !output.status.success() {
            self.fail(&format!("vmm {command}: {output:?}"));
        }
        String::from_utf8(output.stdout).unwrap()
    }

    /// Waits for its end.
    pub fn wait(mut self) -> Ended {
        let start = Instant::now();
        let status = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break status,
                None if start.elapsed() > LONG => self.fail(&format!("it runs on after {LONG:?}")),
                None => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        let Some(status) = status.code() else { self.fail(&format!("it was killed: {status}")) };
        // Moved out of a type that has a Drop.
        let gone = Guest { dir: tempfile::tempdir().unwrap(), ..Guest::new(self.guest.kernel) };
        let guest = std::mem::replace(&mut self.guest, gone);
        Ended { status, console: guest.read("console"), guest }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // Either fails only for one that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A guest that ran.
pub struct Ended {
    guest: Guest,
    /// The VMM's exit status.
    pub status: i32,
    /// All that the console showed.
    pub console: String,
}

impl Ended {
    /// Fails with the console unless `condition`.
    #[track_caller]
    pub fn check(&self, condition: bool, what: &str) -> &Self {
        if !condition {
            self.guest.fail(&format!("{}: {what}", self.guest.kernel));
        }
        self
    }

    /// The VMM ended with that status.
    #[track_caller]
    pub fn check_status(&self, status: i32) -> &Self {
        self.check(self.status == status, &format!("exit status {}, not {status}", self.status))
    }

    /// The script succeeded, and the guest powered off.
    #[track_caller]
    pub fn check_success(&self) -> &Self {
        self.check_status(0).check(self.console.contains("init: exit 0"), "the script failed")
    }

    /// What the script said that `name` is.
    #[track_caller]
    pub fn value(&self, name: &str) -> &str {
        let found = self
            .console
            .lines()
            .find_map(|line| line.trim_end().strip_prefix(name)?.strip_prefix('='));
        found.unwrap_or_else(|| self.guest.fail(&format!("the script said no {name}=")))
    }

    /// The script said that `name` is `value`.
    #[track_caller]
    pub fn check_value(&self, name: &str, value: &str) -> &Self {
        let said = self.value(name);
        self.check(said == value, &format!("{name} is {said:?}, not {value:?}"))
    }

    /// It is the kernel that was meant, with all its vCPUs, a paravirtual clock and a source of entropy.
    #[track_caller]
    pub fn check_basics(&self, cpus: u32) -> &Self {
        let online = if cpus == 1 { "0".to_owned() } else { format!("0-{}", cpus - 1) };
        self.check_success();
        self.check_value("release", &release(self.guest.kernel));
        self.check_value("online", &online).check_value("processors", &cpus.to_string());
        self.check_value("rng", "virtio_rng.0");
        let random = self.value("random");
        self.check(
            random.len() == 128 && random != random[..2].repeat(64),
            "/dev/hwrng gives no entropy",
        );
        let clock = self.value("clocksource");
        self.check(matches!(clock, "kvm-clock" | "tsc"), "the clock isn't paravirtual")
    }

    /// What the VMM said on standard error.
    pub fn stderr(&self) -> String {
        self.guest.read("stderr")
    }

    /// A path in the guest's own directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.guest.path(name)
    }
}

/// A newc archive of files, given with their modes.
fn cpio(files: &[(String, u32, Vec<u8>)]) -> Vec<u8> {
    let mut archive = Vec::new();
    let end = ("TRAILER!!!".to_owned(), 0, Vec::new());
    for (number, (name, mode, content)) in files.iter().chain([&end]).enumerate() {
        let (len, name_len) = (content.len(), name.len() + 1);
        // inode, mode, owner, group, links, time, length, device, device of a device file, name's length, sum
        let header =
            format!("070701{number:08x}{mode:08x}{0:08x}{0:08x}{1:08x}{0:08x}{len:08x}", 0, 1)
                + &format!("{0:08x}{0:08x}{0:08x}{0:08x}{name_len:08x}{0:08x}", 0);
        for part in [format!("{header}{name}\0").as_bytes(), content] {
            archive.extend(part);
            archive.resize(archive.len().next_multiple_of(4), 0);
        }
    }
    archive
}
