//! The VMMs that are compared, and the command line of each for the same guest.

use std::fmt;
use std::path::Path;
use std::process::Command;
use std::str::FromStr;

use crate::Result;

/// A VMM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Peer {
    /// Ours.
    Vmm,
    /// QEMU's microvm, as it comes.
    Qemu,
    /// Cloud Hypervisor.
    CloudHypervisor,
    /// Firecracker.
    Firecracker,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vmm => "vmm",
            Self::Qemu => "qemu",
            Self::CloudHypervisor => "cloud-hypervisor",
            Self::Firecracker => "firecracker",
        })
    }
}

impl FromStr for Peer {
    type Err = Box<dyn std::error::Error>;

    fn from_str(name: &str) -> Result<Self> {
        let all = [Self::Vmm, Self::Qemu, Self::CloudHypervisor, Self::Firecracker];
        let found = all.into_iter().find(|peer| peer.to_string() == name);
        found.ok_or_else(|| format!("BENCH_PEERS: '{name}' is not known").into())
    }
}

/// What they all are given.
pub struct Guest {
    /// The kernel, an ELF file: Firecracker takes no other.
    pub kernel: &'static str,
    /// The initramfs.
    pub initrd: Option<String>,
    /// The kernel's command line.
    pub cmdline: String,
    /// RAM.
    pub mem_mib: u32,
    /// A raw image.
    pub disk: Option<String>,
    /// A TAP's name.
    pub tap: Option<&'static str>,
    /// Where it can be told what to do: vmm's control socket, QEMU's QMP.
    pub control: Option<String>,
}

impl Guest {
    /// The smallest one: it writes a byte and halts.
    pub fn tiny(mem_mib: u32) -> Self {
        let cmdline = String::new();
        Self {
            kernel: "tiny",
            initrd: None,
            cmdline,
            mem_mib,
            disk: None,
            tap: None,
            control: None,
        }
    }

    /// A stock kernel, with more words on its command line.
    pub fn stock(mem_mib: u32, initrd: &str, words: &str) -> Self {
        let kernel = "vmlinux-6.12-cloud";
        let cmdline = format!("console=ttyS0 quiet panic=-1{words}");
        Self { kernel, initrd: Some(initrd.to_owned()), cmdline, ..Self::tiny(mem_mib) }
    }
}

impl Peer {
    /// The command that boots a guest, its console on standard output.
    pub fn boot(self, guest: &Guest) -> Result<Command> {
        Ok(match self {
            Self::Vmm => vmm(guest),
            Self::Qemu => qemu(guest),
            Self::CloudHypervisor => cloud_hypervisor(guest),
            Self::Firecracker => firecracker(guest)?,
        })
    }
}

fn vmm(guest: &Guest) -> Command {
    let mut command = Command::new("./vmm");
    command.args(["run", "--kernel", guest.kernel, "--mem", &format!("{}M", guest.mem_mib)]);
    if let Some(initrd) = &guest.initrd {
        command.args(["--initrd", initrd, "--cmdline", &guest.cmdline]);
    }
    if let Some(disk) = &guest.disk {
        command.args(["--disk", disk]);
    }
    if let Some(tap) = guest.tap {
        command.args(["--net", &format!("tap={tap}")]);
    }
    if let Some(control) = &guest.control {
        command.args(["--control", control]);
    }
    command
}

/// QEMU's microvm with the devices that vmm has, otherwise as it is by default; less a CPU feature whose MSR
/// a software-only KVM refuses, where QEMU then aborts.
pub fn qemu(guest: &Guest) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args([
        "-M",
        "microvm,rtc=on",
        "-accel",
        "kvm",
        "-cpu",
        "host,-arch-capabilities",
        "-nodefaults",
    ]);
    command.args(["-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"]);
    command.args(["-m", &guest.mem_mib.to_string(), "-kernel", guest.kernel]);
    if let Some(initrd) = &guest.initrd {
        command.args(["-initrd", initrd, "-append", &guest.cmdline]);
    }
    if let Some(disk) = &guest.disk {
        command.args(["-drive", &format!("file={disk},format=raw,if=none,id=d")]);
        command.args(["-device", "virtio-blk-device,drive=d"]);
    }
    if let Some(tap) = guest.tap {
        let netdev = format!("tap,id=n,ifname={tap},script=no,downscript=no");
        command.args(["-netdev", &netdev, "-device", "virtio-net-device,netdev=n"]);
    }
    if let Some(control) = &guest.control {
        command.args(["-qmp", &format!("unix:{control},server=on,wait=off")]);
    }
    command
}

fn cloud_hypervisor(guest: &Guest) -> Command {
    let mut command = Command::new("./cloud-hypervisor");
    command.args(["--kernel", guest.kernel, "--cpus", "boot=1", "--serial", "tty"]);
    command.args(["--console", "off", "--memory", &format!("size={}M", guest.mem_mib)]);
    if let Some(initrd) = &guest.initrd {
        command.args(["--initramfs", initrd, "--cmdline", &guest.cmdline]);
    }
    if let Some(disk) = &guest.disk {
        command.args(["--disk", &format!("path={disk}")]);
    }
    if let Some(tap) = guest.tap {
        command.args(["--net", &format!("tap={tap}")]);
    }
    command
}

fn firecracker(guest: &Guest) -> Result<Command> {
    use serde_json::json;
    let mut source = json!({"kernel_image_path": guest.kernel, "boot_args": guest.cmdline});
    if let Some(initrd) = &guest.initrd {
        source["initrd_path"] = json!(initrd);
    }
    let machine = json!({"vcpu_count": 1, "mem_size_mib": guest.mem_mib});
    let mut config = json!({"boot-source": source, "machine-config": machine, "drives": []});
    if let Some(disk) = &guest.disk {
        config["drives"] = json!([{"drive_id": "d", "path_on_host": disk,
            "is_root_device": false, "is_read_only": false}]);
    }
    if let Some(tap) = guest.tap {
        config["network-interfaces"] = json!([{"iface_id": "n", "host_dev_name": tap}]);
    }
    let path = Path::new("firecracker.json");
    std::fs::write(path, config.to_string())?;
    let mut command = Command::new("./firecracker");
    command.args(["--no-api", "--config-file"]).arg(path);
    Ok(command)
}
