//! A [`Config`] as it travels in a migration's `Reserve` and lies in a snapshot: JSON of a frozen struct, with a version
//! like a section's. `PROTOCOL.md`, "Configuration", is the specification.
//!
//! A reader has to understand every field: an unknown one is an error. So a new field is a new version, with a struct of
//! its own (`ConfigV2`) whose JSON opens with `"version":2`, a conversion from the last one and back, and a golden
//! file of both. A source writes the newest version that its destination reads.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{BootSource, Config, CpuModel, DiskConfig, MacAddr, NetConfig, OnReboot, SerialTarget};

/// The newest version.
pub const VERSION: u16 = 1;

/// Why bytes are no configuration.
#[derive(Debug, thiserror::Error)]
pub enum SavedConfigError {
    /// Made by a newer release than this one.
    #[error("the guest's configuration has version {0}, this vmm reads up to version {VERSION}")]
    Unknown(u64),
    /// They are something else.
    #[error("the guest's configuration can't be read")]
    Malformed(#[from] serde_json::Error),
}

/// What every version but the first says of itself.
#[derive(Deserialize)]
struct Head {
    version: Option<u64>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ConfigV1 {
    name: String,
    cpus: u32,
    ram_bytes: u64,
    hugepages: bool,
    cpu_model: CpuModelV1,
    boot: BootV1,
    disks: Vec<DiskV1>,
    nets: Vec<NetV1>,
    serial: SerialV1,
    on_reboot: OnRebootV1,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum CpuModelV1 {
    Host,
    #[serde(rename = "x86-64-v2")]
    V2,
    #[serde(rename = "x86-64-v3")]
    V3,
    File(PathBuf),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct BootV1 {
    kernel: PathBuf,
    initrd: Option<PathBuf>,
    cmdline: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct DiskV1 {
    id: String,
    path: PathBuf,
    readonly: bool,
    direct: bool,
    serial: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct NetV1 {
    id: String,
    tap: String,
    mac: MacAddr,
    mtu: Option<u16>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum SerialV1 {
    Stdio,
    Null,
    File(PathBuf),
    Unix(PathBuf),
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum OnRebootV1 {
    Exit,
    Reset,
}

impl Config {
    /// As bytes, in the newest version up to this one. There is only one so far, which everybody reads.
    ///
    /// # Errors
    /// A path in it isn't UTF-8.
    pub fn save(&self, _newest: u16) -> Result<Vec<u8>, SavedConfigError> {
        Ok(serde_json::to_vec(&ConfigV1::from(self.clone()))?)
    }

    /// From such bytes. They are hostile input, as all is that [`Config::validate`] checks.
    ///
    /// # Errors
    /// They are of a newer version, or none.
    pub fn restore(bytes: &[u8]) -> Result<Self, SavedConfigError> {
        match serde_json::from_slice::<Head>(bytes)?.version {
            None => Ok(serde_json::from_slice::<ConfigV1>(bytes)?.into()),
            Some(version) => Err(SavedConfigError::Unknown(version)),
        }
    }
}

impl From<Config> for ConfigV1 {
    fn from(config: Config) -> Self {
        let Config {
            name,
            cpus,
            ram_bytes,
            hugepages,
            cpu_model,
            boot,
            disks,
            nets,
            serial,
            on_reboot,
        } = config;
        let BootSource { kernel, initrd, cmdline } = boot;
        let disk = |DiskConfig { id, path, readonly, direct, serial }: DiskConfig| DiskV1 {
            id,
            path,
            readonly,
            direct,
            serial,
        };
        let net = |NetConfig { id, tap, mac, mtu }: NetConfig| NetV1 { id, tap, mac, mtu };
        Self {
            name,
            cpus,
            ram_bytes,
            hugepages,
            cpu_model: match cpu_model {
                CpuModel::Host => CpuModelV1::Host,
                CpuModel::V2 => CpuModelV1::V2,
                CpuModel::V3 => CpuModelV1::V3,
                CpuModel::File(path) => CpuModelV1::File(path),
            },
            boot: BootV1 { kernel, initrd, cmdline },
            disks: disks.into_iter().map(disk).collect(),
            nets: nets.into_iter().map(net).collect(),
            serial: match serial {
                SerialTarget::Stdio => SerialV1::Stdio,
                SerialTarget::Null => SerialV1::Null,
                SerialTarget::File(path) => SerialV1::File(path),
                SerialTarget::Unix(path) => SerialV1::Unix(path),
            },
            on_reboot: match on_reboot {
                OnReboot::Exit => OnRebootV1::Exit,
                OnReboot::Reset => OnRebootV1::Reset,
            },
        }
    }
}

impl From<ConfigV1> for Config {
    fn from(v1: ConfigV1) -> Self {
        let BootV1 { kernel, initrd, cmdline } = v1.boot;
        let disk = |DiskV1 { id, path, readonly, direct, serial }: DiskV1| DiskConfig {
            id,
            path,
            readonly,
            direct,
            serial,
        };
        let net = |NetV1 { id, tap, mac, mtu }: NetV1| NetConfig { id, tap, mac, mtu };
        Self {
            name: v1.name,
            cpus: v1.cpus,
            ram_bytes: v1.ram_bytes,
            hugepages: v1.hugepages,
            cpu_model: match v1.cpu_model {
                CpuModelV1::Host => CpuModel::Host,
                CpuModelV1::V2 => CpuModel::V2,
                CpuModelV1::V3 => CpuModel::V3,
                CpuModelV1::File(path) => CpuModel::File(path),
            },
            boot: BootSource { kernel, initrd, cmdline },
            disks: v1.disks.into_iter().map(disk).collect(),
            nets: v1.nets.into_iter().map(net).collect(),
            serial: match v1.serial {
                SerialV1::Stdio => SerialTarget::Stdio,
                SerialV1::Null => SerialTarget::Null,
                SerialV1::File(path) => SerialTarget::File(path),
                SerialV1::Unix(path) => SerialTarget::Unix(path),
            },
            on_reboot: match v1.on_reboot {
                OnRebootV1::Exit => OnReboot::Exit,
                OnRebootV1::Reset => OnReboot::Reset,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN: &str = include_str!("golden-v1.json");

    fn config() -> Config {
        let disk = |id: &str, readonly, serial: Option<&str>| DiskConfig {
            id: id.into(),
            path: format!("/srv/{id}.img").into(),
            readonly,
            direct: !readonly,
            serial: serial.map(str::to_owned),
        };
        let mac = MacAddr([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
        Config {
            name: "web".into(),
            cpus: 2,
            ram_bytes: 512 << 20,
            hugepages: true,
            cpu_model: CpuModel::File("/etc/cpu.json".into()),
            boot: BootSource {
                kernel: "/boot/vmlinuz".into(),
                initrd: Some("/boot/initrd".into()),
                cmdline: "console=ttyS0 \"quiet\"".into(),
            },
            disks: vec![disk("root", false, Some("S1")), disk("data", true, None)],
            nets: vec![NetConfig { id: "net0".into(), tap: "tap0".into(), mac, mtu: Some(1500) }],
            serial: SerialTarget::Unix("/run/web.tty".into()),
            on_reboot: OnReboot::Reset,
        }
    }

    /// Each line is another configuration, the first that above. A line is never edited once released.
    fn golden() -> Vec<(&'static str, Config)> {
        let change = |change: fn(&mut Config)| {
            let mut config = config();
            change(&mut config);
            config
        };
        let configs = [
            config(),
            change(|c| {
                c.hugepages = false;
                c.cpu_model = CpuModel::Host;
                c.boot.initrd = None;
                c.disks.clear();
                c.nets[0].mtu = None;
                c.serial = SerialTarget::Stdio;
                c.on_reboot = OnReboot::Exit;
            }),
            change(|c| {
                (c.cpu_model, c.serial) = (CpuModel::V2, SerialTarget::Null);
                c.nets.clear();
            }),
            change(|c| (c.cpu_model, c.serial) = (CpuModel::V3, SerialTarget::File("/log".into()))),
        ];
        let lines: Vec<_> = GOLDEN.lines().collect();
        assert_eq!(lines.len(), configs.len());
        lines.into_iter().zip(configs).collect()
    }

    #[test]
    fn golden_configurations_are_written_and_read() {
        for (line, config) in golden() {
            assert_eq!(Config::restore(line.as_bytes()).unwrap(), config);
            for newest in [0, 1, u16::MAX] {
                assert_eq!(String::from_utf8(config.save(newest).unwrap()).unwrap(), line);
            }
        }
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        let refused = |from: &str, to: &str| {
            assert!(golden()[0].0.contains(from), "{from}");
            let bytes = golden()[0].0.replacen(from, to, 1);
            Config::restore(bytes.as_bytes()).unwrap_err()
        };
        for (from, to) in [
            ("{", r#"{"gpu":1,"#),
            (r#"{"kernel""#, r#"{"dtb":"/d","kernel""#),
            (r#""readonly""#, r#""cache":true,"readonly""#),
            (r#""tap""#, r#""queues":2,"tap""#),
            (r#""reset""#, r#""halt""#),
            (r#""cpus":2,"#, ""),
        ] {
            let error = refused(from, to);
            assert!(matches!(error, SavedConfigError::Malformed(_)), "{to}: {error}");
        }
        let newer = refused("{", r#"{"version":2,"gpu":1,"#);
        assert_eq!(
            newer.to_string(),
            "the guest's configuration has version 2, this vmm reads up to version 1"
        );
    }
}
