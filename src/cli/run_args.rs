//! The arguments of `vmm run`, as a validated [`Config`].

use std::convert::Infallible;
use std::path::PathBuf;

use super::args::{Arg, Args, Keys, Stop, absolute, split_list, usage, utf8};
use super::units::parse_size;
use crate::config::{
    BootSource, CPUS_MAX, Config, ConfigError, CpuModel, DiskConfig, ID_BYTES_MAX, MacAddr,
    NetConfig, OnReboot, SerialTarget, check_name, check_ram,
};

/// The command's help.
pub const HELP: &str = "\
usage: vmm run --kernel PATH --mem SIZE [OPTION]...

Boots a VM and stays with it until it ends. On a terminal, the guest's console is yours; Ctrl-a x ends the VM.

  --kernel PATH       a bzImage as distributions ship it, or an ELF vmlinux
  --mem SIZE          the guest's RAM: 512M, 4G, ... (from 32M, whole MiB; at most the host's memory and swap)
  --cpus N            vCPUs, 1 to 254 (default 1)
  --initrd PATH       the initial RAM disk
  --cmdline STRING    the kernel's command line (default 'console=ttyS0 panic=-1'), at most 2047 bytes
  --disk PATH[,readonly][,direct][,id=ID][,serial=S]
                      a raw image or block device, /dev/vda and on in the order given; ',,' is a comma in PATH
                        readonly   the guest can't write
                        direct     bypass the host's page cache
                        id=ID      what a migration's destination calls it by (default disk0, disk1, ...)
                        serial=S   the serial number that the guest reads, up to 20 characters
  --net tap=NAME[,mac=MAC][,id=ID][,mtu=N]
                      a network interface on the TAP of that name
                        mac=MAC    the guest's address (default: derived from the VM's name and the id, always the same)
                        id=ID      what a migration's destination calls it by (default net0, net1, ...)
                        mtu=N      the MTU that the guest is told, 68 to 65535
  --serial stdio|null|file:PATH|unix:PATH
                      where the console goes (default stdio); file: gets output only, unix: is a socket to connect to
                      and keeps the newest 64 KiB for the next client. Output that nobody takes is dropped beyond 1 MiB,
                      and the console says so
  --name NAME         the VM's name: letters, digits, '.', '_', '-', up to 64 (default vm-PID); no other VM may have
                      it in the same directory of control sockets
  --control PATH      the control socket (default $XDG_RUNTIME_DIR/vmm/NAME.sock, root /run/vmm/NAME.sock)
  --on-reboot exit|reset
                      what the guest's orderly reboot does: end the VM (default), or boot it again
  --hugepages         take the RAM from 2 MiB huge pages (SIZE is then a multiple of 2M)
  --cpu-model host|x86-64-v2|x86-64-v3|FILE
                      what CPU the guest sees (default host); the levels and a FILE move between unlike hosts of one vendor

exit status: 0 the guest powered off, rebooted with --on-reboot exit, or was stopped; 1 the VMM failed;
2 wrong usage; 3 the guest failed: a triple fault, or a reset without an orderly shutdown (a panic with panic=)

example: vmm run --kernel vmlinuz --mem 512M --cpus 2 --initrd initrd.img \\
                 --cmdline 'console=ttyS0 root=/dev/vda panic=-1' --disk root.img --net tap=tap0 --name web
";

/// Where the kernel's messages are seen and a panic ends the VM.
const CMDLINE_DEFAULT: &str = "console=ttyS0 panic=-1";
const DISK_KEYS: [&str; 4] = ["readonly", "direct", "id=ID", "serial=S"];
const NET_KEYS: [&str; 4] = ["tap=NAME", "mac=MAC", "id=ID", "mtu=N"];

/// What `vmm run` is asked to do.
#[derive(Debug, PartialEq, Eq)]
pub struct RunArgs {
    /// The VM, validated.
    pub config: Config,
    /// Its control socket, if not the default one.
    pub control: Option<PathBuf>,
}

/// The options as they come, before defaults.
#[derive(Default)]
struct Raw {
    kernel: Option<String>,
    mem: Option<String>,
    cpus: Option<String>,
    initrd: Option<String>,
    cmdline: Option<String>,
    disks: Vec<String>,
    nets: Vec<String>,
    serial: Option<String>,
    name: Option<String>,
    control: Option<String>,
    on_reboot: Option<String>,
    cpu_model: Option<String>,
    hugepages: bool,
}

/// Parses the arguments. `default_name` is the VM's name if none is given.
///
/// # Errors
/// Wrong usage, or the wish for help.
pub fn parse(mut args: Args, default_name: &str) -> Result<RunArgs, Stop> {
    let mut raw = Raw::default();
    while let Some(arg) = args.next_arg()? {
        let name = match arg {
            Arg::Option(name) => name,
            Arg::Operand(operand) => {
                let operand = utf8(operand, "argument")?;
                return Err(usage(format!("unexpected '{operand}': run takes options only")));
            }
        };
        match name.as_str() {
            "kernel" => args.text_once(&name, &mut raw.kernel)?,
            "mem" => args.text_once(&name, &mut raw.mem)?,
            "cpus" => args.text_once(&name, &mut raw.cpus)?,
            "initrd" => args.text_once(&name, &mut raw.initrd)?,
            "cmdline" => args.text_once(&name, &mut raw.cmdline)?,
            "disk" => raw.disks.push(args.text(&name)?),
            "net" => raw.nets.push(args.text(&name)?),
            "serial" => args.text_once(&name, &mut raw.serial)?,
            "name" => args.text_once(&name, &mut raw.name)?,
            "control" => args.text_once(&name, &mut raw.control)?,
            "on-reboot" => args.text_once(&name, &mut raw.on_reboot)?,
            "cpu-model" => args.text_once(&name, &mut raw.cpu_model)?,
            "hugepages" => raw.hugepages = true,
            _ => return Err(args.unknown(&name)),
        }
    }
    raw.build(default_name)
}

impl Raw {
    fn build(self, default_name: &str) -> Result<RunArgs, Stop> {
        let need = |what| usage(format!("{what} is needed"));
        let kernel = self.kernel.ok_or_else(|| need("--kernel PATH"))?;
        let mem = self.mem.ok_or_else(|| need("--mem SIZE"))?;
        let name = self.name.unwrap_or_else(|| default_name.to_owned());
        let nets = self.nets.iter().enumerate();
        let disks = self.disks.iter().enumerate();
        let config = Config {
            cpus: self.cpus.as_deref().map_or(Ok(1), parse_cpus)?,
            ram_bytes: parse_mem(&mem, self.hugepages)?,
            hugepages: self.hugepages,
            cpu_model: self.cpu_model.as_deref().map_or(Ok(CpuModel::Host), parse_cpu_model)?,
            boot: BootSource {
                kernel: absolute("--kernel", &kernel)?,
                initrd: self.initrd.map(|path| absolute("--initrd", &path)).transpose()?,
                cmdline: self.cmdline.unwrap_or_else(|| CMDLINE_DEFAULT.to_owned()),
            },
            disks: disks.map(|(i, text)| parse_disk(text, i)).collect::<Result<_, _>>()?,
            nets: nets.map(|(i, text)| parse_net(text, i, &name)).collect::<Result<_, _>>()?,
            serial: self.serial.as_deref().map_or(Ok(SerialTarget::Stdio), parse_serial)?,
            on_reboot: self.on_reboot.as_deref().map_or(Ok(OnReboot::Exit), parse_on_reboot)?,
            name,
        };
        config.validate().map_err(|e| usage(in_options(&e)))?;
        let control = self.control.map(PathBuf::from);
        if control.as_ref().is_some_and(|path| path.as_os_str().is_empty()) {
            return Err(usage("--control: the path is empty"));
        }
        Ok(RunArgs { config, control })
    }
}

/// A configuration's error in terms of the option that brought it.
fn in_options(error: &ConfigError) -> String {
    let option = match error {
        ConfigError::Name { what: "VM name", .. } => "--name: ",
        ConfigError::Name { what: "disk id", .. } | ConfigError::Disk { .. } => "--disk: ",
        ConfigError::Name { .. } | ConfigError::Net { .. } => "--net: ",
        ConfigError::Cmdline(_) => "--cmdline: ",
        _ => "",
    };
    format!("{option}{error}")
}

fn parse_cpus(text: &str) -> Result<u32, Stop> {
    let cpus = text.parse().ok().filter(|cpus| (1..=CPUS_MAX).contains(cpus));
    cpus.ok_or_else(|| usage(format!("--cpus '{text}': it takes a number from 1 to {CPUS_MAX}")))
}

fn parse_mem(text: &str, hugepages: bool) -> Result<u64, Stop> {
    let fail = |problem: &str| usage(format!("--mem '{text}': {problem}"));
    let bytes = parse_size(text).map_err(|e| fail(&e.to_string()))?;
    match check_ram(bytes, hugepages) {
        Ok(()) => Ok(bytes),
        Err(ConfigError::Ram { rule, .. }) => Err(fail(rule)),
        Err(other) => Err(fail(&other.to_string())),
    }
}

fn parse_cpu_model(text: &str) -> Result<CpuModel, Stop> {
    match text {
        "host" => Ok(CpuModel::Host),
        "x86-64-v2" => Ok(CpuModel::V2),
        "x86-64-v3" => Ok(CpuModel::V3),
        path => absolute("--cpu-model", path).map(CpuModel::File),
    }
}

pub(super) fn parse_serial(text: &str) -> Result<SerialTarget, Stop> {
    match (text, text.split_once(':')) {
        ("stdio", _) => Ok(SerialTarget::Stdio),
        ("null", _) => Ok(SerialTarget::Null),
        (_, Some(("file", path))) => absolute("--serial file:", path).map(SerialTarget::File),
        (_, Some(("unix", path))) => absolute("--serial unix:", path).map(SerialTarget::Unix),
        _ => Err(usage(format!("--serial '{text}': it takes stdio, null, file:PATH or unix:PATH"))),
    }
}

fn parse_on_reboot(text: &str) -> Result<OnReboot, Stop> {
    match text {
        "exit" => Ok(OnReboot::Exit),
        "reset" => Ok(OnReboot::Reset),
        _ => Err(usage(format!("--on-reboot '{text}': it takes exit or reset"))),
    }
}

fn parse_disk(text: &str, index: usize) -> Result<DiskConfig, Stop> {
    let items = split_list(text);
    let (path, rest) = items.split_first().ok_or_else(|| usage("--disk needs a path"))?;
    let keys = Keys::new("disk", rest, &DISK_KEYS)?;
    Ok(DiskConfig {
        id: keys.value("id", parse_id("disk id"))?.unwrap_or_else(|| format!("disk{index}")),
        path: absolute("--disk", path)?,
        readonly: keys.flag("readonly"),
        direct: keys.flag("direct"),
        serial: keys.value("serial", as_text)?,
    })
}

fn parse_net(text: &str, index: usize, vm_name: &str) -> Result<NetConfig, Stop> {
    let keys = Keys::new("net", &split_list(text), &NET_KEYS)?;
    let id = keys.value("id", parse_id("network id"))?.unwrap_or_else(|| format!("net{index}"));
    let tap = keys.value("tap", as_text)?;
    let mtu =
        keys.value("mtu", |text| text.parse().map_err(|_| "it takes a number from 68 to 65535"))?;
    Ok(NetConfig {
        tap: tap.ok_or_else(|| usage(format!("--net '{text}': tap=NAME is needed")))?,
        mac: keys.value("mac", str::parse)?.unwrap_or_else(|| MacAddr::derive(vm_name, &id)),
        mtu,
        id,
    })
}

/// A value that any text is; `Config::validate` has the rules.
fn as_text(text: &str) -> Result<String, Infallible> {
    Ok(text.to_owned())
}

fn parse_id(what: &'static str) -> impl FnOnce(&str) -> Result<String, ConfigError> {
    move |text| check_name(what, text, ID_BYTES_MAX).map(|()| text.to_owned())
}

#[cfg(test)]
#[path = "run_args_tests.rs"]
mod tests;
