//! What a VM is made of, as validated data: the command line writes it, `Machine` is built from it,
//! and it travels in a migration's `Reserve` message and in a snapshot (in the frozen form of [`saved`]). Whoever
//! reads a `Config` from a stream or a file calls [`Config::validate`] before use: it trusts no field.

mod mac;
mod saved;

use std::collections::HashSet;
use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

use crate::backend::disk::DiskOptions;

pub use self::mac::{MacAddr, MacError};
pub use self::saved::{SavedConfigError, VERSION};

/// One mebibyte, in bytes: the granularity of a VM's RAM.
pub const MIB: u64 = 1 << 20;
/// The smallest RAM of a VM, in bytes.
pub const RAM_BYTES_MIN: u64 = 32 * MIB;
/// The largest RAM of a VM, in bytes (4 TiB); the host may map less.
pub const RAM_BYTES_MAX: u64 = 4 << 40;
/// The most vCPUs: an 8-bit APIC id less the I/O APIC's and the broadcast id.
pub const CPUS_MAX: u32 = 254;
/// The longest kernel command line in bytes, without its NUL (x86 Linux's `COMMAND_LINE_SIZE` is 2048).
pub const CMDLINE_BYTES_MAX: usize = 2047;
/// The longest name of a VM, in bytes: it becomes a file name.
pub const NAME_BYTES_MAX: usize = 64;
/// The longest id of a device, in bytes.
pub const ID_BYTES_MAX: usize = 32;
/// The longest serial number of a disk, in bytes (virtio 1.2, 5.2.6: `VIRTIO_BLK_T_GET_ID`).
pub const DISK_SERIAL_BYTES_MAX: usize = 20;
/// The most devices (disks and network interfaces together): one interrupt each, and one is the entropy device's.
pub const DEVICES_MAX: usize = 17;
/// The longest name of a network interface, in bytes, without its NUL (`IFNAMSIZ` is 16).
pub const TAP_NAME_BYTES_MAX: usize = 15;
/// The smallest MTU (virtio 1.2, 5.1.4: 68 is IPv4's minimum).
pub const MTU_MIN: u16 = 68;

/// Why a configuration can't be a VM.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A name or an id breaks the rules for names.
    #[error(
        "{what} '{name}': a name has 1 to {max} letters, digits, '.', '_' or '-' and starts with a letter or digit"
    )]
    Name {
        /// What the name is for: `VM name`, `disk id`, `network id`.
        what: &'static str,
        /// The name as given.
        name: String,
        /// The most bytes it may have.
        max: usize,
    },
    /// Something that must be unique is there twice.
    #[error("{what} '{value}' is given twice: each must be unique")]
    Twice {
        /// What is there twice.
        what: &'static str,
        /// Its value.
        value: String,
    },
    /// The RAM is too small, too big or no whole number of pages' blocks.
    #[error("{} bytes of RAM: {}", .bytes, .rule)]
    Ram {
        /// The RAM's size in bytes.
        bytes: u64,
        /// The rule that it breaks.
        rule: &'static str,
    },
    /// The number of vCPUs is out of range.
    #[error("{0} vCPUs: it takes 1 to {CPUS_MAX}")]
    Cpus(u32),
    /// The kernel command line can't be handed to the guest.
    #[error("kernel command line: {0}")]
    Cmdline(String),
    /// A disk's option is out of range.
    #[error("disk '{id}': {problem}")]
    Disk {
        /// The disk's id.
        id: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A network interface's option is out of range.
    #[error("network interface '{id}': {problem}")]
    Net {
        /// The interface's id.
        id: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Too many devices.
    #[error("{0} disks and network interfaces: at most {DEVICES_MAX} are supported")]
    Devices(usize),
}

/// Everything that a VM is made of. Two VMs of equal `Config` differ only in their state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Config {
    /// The VM's name: unique on its host per user, since the control socket is called after it.
    pub name: String,
    /// The number of vCPUs, 1 to [`CPUS_MAX`].
    pub cpus: u32,
    /// The guest's RAM in bytes, a multiple of [`MIB`].
    pub ram_bytes: u64,
    /// Whether RAM is taken from 2 MiB huge pages.
    pub hugepages: bool,
    /// What the guest's CPUID shows.
    pub cpu_model: CpuModel,
    /// What the VM boots.
    pub boot: BootSource,
    /// The disks, in the order in which the guest sees them (`/dev/vda`, ...).
    pub disks: Vec<DiskConfig>,
    /// The network interfaces, in the order in which the guest sees them.
    pub nets: Vec<NetConfig>,
    /// Where the serial console goes.
    pub serial: SerialTarget,
    /// What the guest's reboot does.
    pub on_reboot: OnReboot,
}

/// What the guest's CPUID shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CpuModel {
    /// All that this host's CPU and KVM offer.
    Host,
    /// The psABI level x86-64-v2: moves between hosts since Nehalem.
    #[serde(rename = "x86-64-v2")]
    V2,
    /// The psABI level x86-64-v3: moves between hosts since Haswell.
    #[serde(rename = "x86-64-v3")]
    V3,
    /// A model file.
    File(PathBuf),
}

impl fmt::Display for CpuModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str("host"),
            Self::V2 => f.write_str("x86-64-v2"),
            Self::V3 => f.write_str("x86-64-v3"),
            Self::File(path) => write!(f, "{}", path.display()),
        }
    }
}

/// What the VM boots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BootSource {
    /// A bzImage or an ELF vmlinux.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line, at most [`CMDLINE_BYTES_MAX`] bytes.
    pub cmdline: String,
}

/// A virtio-blk disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DiskConfig {
    /// The disk's id, unique among all devices: what a migration's destination calls it by.
    pub id: String,
    /// A raw image or a block device.
    pub path: PathBuf,
    /// Whether the guest may only read.
    pub readonly: bool,
    /// Whether I/O bypasses the host's page cache (`O_DIRECT`).
    pub direct: bool,
    /// The serial number that the guest reads, at most [`DISK_SERIAL_BYTES_MAX`] printable ASCII bytes.
    pub serial: Option<String>,
}

/// A virtio-net interface on a TAP.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NetConfig {
    /// The interface's id, unique among all devices: what a migration's destination calls it by.
    pub id: String,
    /// The TAP's name on this host.
    pub tap: String,
    /// The guest's address.
    pub mac: MacAddr,
    /// The MTU that the guest is told, in bytes, from [`MTU_MIN`].
    pub mtu: Option<u16>,
}

/// What stands for the VM's name in the path of a serial console given to `vmm migrate --listen`.
pub const VM_NAME: &str = "{name}";

/// Where the serial console goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum SerialTarget {
    /// This process's standard input and output.
    Stdio,
    /// Nowhere: output is dropped, there is no input.
    Null,
    /// Output is written to a file; there is no input.
    File(PathBuf),
    /// A UNIX socket on which one client at a time is served.
    Unix(PathBuf),
}

impl SerialTarget {
    /// Whether its path has a place for the VM's name.
    #[must_use]
    pub fn is_per_vm(&self) -> bool {
        matches!(self, Self::File(path) | Self::Unix(path) if path.to_string_lossy().contains(VM_NAME))
    }

    /// That of one VM.
    #[must_use]
    pub fn of_vm(self, name: &str) -> Self {
        let fill = |path: PathBuf| match path.to_str() {
            Some(text) => text.replace(VM_NAME, name).into(),
            None => path,
        };
        match self {
            Self::File(path) => Self::File(fill(path)),
            Self::Unix(path) => Self::Unix(fill(path)),
            other => other,
        }
    }
}

/// What the guest's orderly reboot does. A panic's reset and a triple fault end the VM in either case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnReboot {
    /// The VMM ends, with status 0.
    Exit,
    /// The machine starts again from its boot source.
    Reset,
}

impl Config {
    /// Checks every rule that needs neither the host nor a file.
    ///
    /// # Errors
    /// The first broken rule, in the order of the fields.
    pub fn validate(&self) -> Result<(), ConfigError> {
        check_name("VM name", &self.name, NAME_BYTES_MAX)?;
        if !(1..=CPUS_MAX).contains(&self.cpus) {
            return Err(ConfigError::Cpus(self.cpus));
        }
        check_ram(self.ram_bytes, self.hugepages)?;
        check_cmdline(&self.boot.cmdline)?;
        let devices = self.disks.len() + self.nets.len();
        if devices > DEVICES_MAX {
            return Err(ConfigError::Devices(devices));
        }
        self.disks.iter().try_for_each(DiskConfig::validate)?;
        self.nets.iter().try_for_each(NetConfig::validate)?;
        self.check_unique()
    }

    fn check_unique(&self) -> Result<(), ConfigError> {
        let ids = self.disks.iter().map(|d| &d.id).chain(self.nets.iter().map(|n| &n.id));
        unique("device id", ids.cloned())?;
        unique("TAP", self.nets.iter().map(|n| n.tap.clone()))?;
        unique("MAC address", self.nets.iter().map(|n| n.mac.to_string()))?;
        for (i, disk) in self.disks.iter().enumerate() {
            let shared =
                |other: &&DiskConfig| other.path == disk.path && !(other.readonly && disk.readonly);
            if self.disks[..i].iter().find(shared).is_some() {
                let value = disk.path.display().to_string();
                return Err(ConfigError::Twice { what: "writable disk", value });
            }
        }
        Ok(())
    }
}

impl DiskConfig {
    /// How it is opened.
    pub(crate) fn options(&self) -> DiskOptions {
        DiskOptions { path: self.path.clone(), read_only: self.readonly, direct: self.direct }
    }

    fn validate(&self) -> Result<(), ConfigError> {
        check_name("disk id", &self.id, ID_BYTES_MAX)?;
        let fail = |problem: String| Err(ConfigError::Disk { id: self.id.clone(), problem });
        if self.path.as_os_str().is_empty() {
            return fail("the path is empty".into());
        }
        if let Some(serial) = &self.serial {
            let printable = serial.bytes().all(|b| (0x20..0x7f).contains(&b));
            if serial.is_empty() || serial.len() > DISK_SERIAL_BYTES_MAX || !printable {
                return fail(format!(
                    "serial '{}': it takes 1 to {DISK_SERIAL_BYTES_MAX} printable ASCII characters",
                    serial.escape_default()
                ));
            }
        }
        Ok(())
    }
}

impl NetConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        check_name("network id", &self.id, ID_BYTES_MAX)?;
        let fail = |problem: String| Err(ConfigError::Net { id: self.id.clone(), problem });
        let odd = |c: char| c == '/' || c.is_whitespace() || c.is_control();
        let dots = self.tap == "." || self.tap == "..";
        if self.tap.is_empty()
            || self.tap.len() > TAP_NAME_BYTES_MAX
            || self.tap.contains(odd)
            || dots
        {
            return fail(format!(
                "TAP '{}': an interface's name has 1 to {TAP_NAME_BYTES_MAX} characters, no '/' and no space",
                self.tap.escape_default()
            ));
        }
        if !self.mac.is_usable() {
            return fail(format!("MAC address {}: it must be unicast and not zero", self.mac));
        }
        match self.mtu {
            Some(mtu) if mtu < MTU_MIN => fail(format!("MTU {mtu}: at least {MTU_MIN}")),
            _ => Ok(()),
        }
    }
}

/// The rules for names: of VMs (`max` [`NAME_BYTES_MAX`]) and of devices (`max` [`ID_BYTES_MAX`]).
///
/// # Errors
/// [`ConfigError::Name`], with `what` the name is for.
pub fn check_name(what: &'static str, name: &str, max: usize) -> Result<(), ConfigError> {
    let first = name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    let rest = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    if first && rest && name.len() <= max {
        return Ok(());
    }
    Err(ConfigError::Name { what, name: shorten(name), max })
}

/// A hostile string made fit for one line of an error: escaped, and cut after 80 characters.
fn shorten(text: &str) -> String {
    let mut out: String = text.chars().take(80).flat_map(char::escape_default).collect();
    if text.chars().nth(80).is_some() {
        out.push_str("...");
    }
    out
}

/// The rules for the size of RAM.
///
/// # Errors
/// [`ConfigError::Ram`], with the rule that is broken.
pub fn check_ram(bytes: u64, hugepages: bool) -> Result<(), ConfigError> {
    let rule = if bytes < RAM_BYTES_MIN {
        "at least 32M is needed"
    } else if bytes > RAM_BYTES_MAX {
        "at most 4T is supported"
    } else if !bytes.is_multiple_of(MIB) {
        "it must be a whole number of MiB"
    } else if hugepages && !bytes.is_multiple_of(2 * MIB) {
        "with huge pages it must be a multiple of 2M"
    } else {
        return Ok(());
    };
    Err(ConfigError::Ram { bytes, rule })
}

fn check_cmdline(cmdline: &str) -> Result<(), ConfigError> {
    if cmdline.len() > CMDLINE_BYTES_MAX {
        return Err(ConfigError::Cmdline(format!(
            "{} bytes: at most {CMDLINE_BYTES_MAX} fit",
            cmdline.len()
        )));
    }
    if cmdline.contains('\0') {
        return Err(ConfigError::Cmdline("it holds a NUL byte".into()));
    }
    Ok(())
}

fn unique(what: &'static str, values: impl Iterator<Item = String>) -> Result<(), ConfigError> {
    let mut seen = HashSet::new();
    for value in values {
        if let Some(value) = seen.replace(value) {
            return Err(ConfigError::Twice { what, value });
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
