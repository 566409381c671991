//! Tests of `run_args`: the whole grammar of `vmm run`, and one line for each wrong use of it.

use super::*;
use crate::cli::args::options;

fn parsed(args: &[&str]) -> Result<RunArgs, Stop> {
    let args = lexopt::Parser::from_args(args.iter().copied());
    parse(Args::new(args, HELP), "vm-1")
}

/// `vmm run` with what must be there, and more.
fn with(more: &[&str]) -> Result<RunArgs, Stop> {
    parsed(&[&["--kernel", "/k", "--mem", "512M"], more].concat())
}

fn error(more: &[&str]) -> String {
    match with(more) {
        Err(Stop::Usage(message)) => message,
        other => panic!("{more:?}: {other:?} is no wrong usage"),
    }
}

#[test]
fn defaults() {
    let RunArgs { config, control } = with(&[]).expect("enough");
    assert_eq!(control, None);
    assert_eq!(
        config,
        Config {
            name: "vm-1".into(),
            cpus: 1,
            ram_bytes: 512 << 20,
            hugepages: false,
            cpu_model: CpuModel::Host,
            boot: BootSource {
                kernel: "/k".into(),
                initrd: None,
                cmdline: "console=ttyS0 panic=-1".into()
            },
            disks: Vec::new(),
            nets: Vec::new(),
            serial: SerialTarget::Stdio,
            on_reboot: OnReboot::Exit,
        }
    );
}

#[test]
fn everything() {
    let args = with(&[
        "--cpus=4",
        "--initrd=/i",
        "--cmdline",
        "--odd 'one'",
        "--disk",
        "/a,,b.img,readonly,id=root,direct,serial=S 1",
        "--disk=/b",
        "--net",
        "tap=tap0,mac=52:54:00:12:34:56,id=lan,mtu=9000",
        "--net=tap=tap1",
        "--serial",
        "unix:/s",
        "--name",
        "web",
        "--control",
        "./c.sock",
        "--on-reboot",
        "reset",
        "--hugepages",
        "--cpu-model",
        "x86-64-v3",
    ])
    .expect("all of it");
    assert_eq!(args.control, Some("./c.sock".into()));
    let config = args.config;
    assert_eq!((config.cpus, config.hugepages, config.on_reboot), (4, true, OnReboot::Reset));
    assert_eq!((config.cpu_model, config.name.as_str()), (CpuModel::V3, "web"));
    assert_eq!(config.boot.initrd, Some("/i".into()));
    assert_eq!(config.boot.cmdline, "--odd 'one'");
    assert_eq!(config.serial, SerialTarget::Unix("/s".into()));
    let root = DiskConfig {
        id: "root".into(),
        path: "/a,b.img".into(),
        readonly: true,
        direct: true,
        serial: Some("S 1".into()),
    };
    assert_eq!(config.disks[0], root);
    assert_eq!((config.disks[1].id.as_str(), config.disks[1].readonly), ("disk1", false));
    let lan = NetConfig {
        id: "lan".into(),
        tap: "tap0".into(),
        mac: MacAddr([0x52, 0x54, 0, 0x12, 0x34, 0x56]),
        mtu: Some(9000),
    };
    assert_eq!(config.nets[0], lan);
    assert_eq!(config.nets[1].mac, MacAddr::derive("web", "net1"));
}

#[test]
fn paths_become_absolute() {
    let config = with(&["--disk", "x.img", "--cpu-model", "m.json", "--serial", "file:out"])
        .expect("relative paths")
        .config;
    let here = std::env::current_dir().expect("a directory");
    assert_eq!(config.disks[0].path, here.join("x.img"));
    assert_eq!(config.cpu_model, CpuModel::File(here.join("m.json")));
    assert_eq!(config.serial, SerialTarget::File(here.join("out")));
}

#[test]
fn wrong_usage_is_named() {
    for (args, words) in [
        (&["--mem", "1G"][..], "--mem is given twice"),
        (&["--cpus"], "--cpus needs a value"),
        (&["--cpus", "0"], "--cpus '0': it takes a number from 1 to 254"),
        (&["--cpus", "255"], "from 1 to 254"),
        (&["--cpus", "two"], "from 1 to 254"),
        (&["--hugepages=1"], "--hugepages takes no value"),
        (&["--kernal", "x"], "unknown option --kernal: do you mean --kernel?"),
        (&["--zebra"], "unknown option --zebra"),
        (&["-x"], "unknown option -x"),
        (&["image"], "unexpected 'image'"),
        (&["--initrd", ""], "--initrd: the path is empty"),
        (&["--control", ""], "--control: the path is empty"),
        (&["--serial", "tty"], "--serial 'tty': it takes stdio, null, file:PATH or unix:PATH"),
        (&["--serial", "file:"], "the path is empty"),
        (&["--on-reboot", "halt"], "it takes exit or reset"),
        (&["--name", "a/b"], "--name: VM name 'a/b': a name has 1 to 64"),
        (&["--cmdline", &"x".repeat(2048)], "--cmdline: kernel command line: 2048 bytes"),
        (&["--disk", ""], "the path is empty"),
        (
            &["--disk", "/x,rdonly"],
            "--disk: unknown key 'rdonly': it takes readonly, direct, id=ID, serial=S",
        ),
        (&["--disk", "/x,id"], "'id' needs a value"),
        (&["--disk", "/x,id="], "disk id ''"),
        (&["--disk", "/x,readonly=on"], "'readonly' takes no value"),
        (&["--disk", "/x,id=a,id=b"], "'id' is given twice"),
        (&["--disk", "/x,id=a b"], "--disk: id=a b: disk id 'a b'"),
        (&["--disk", "/x,serial=123456789012345678901"], "--disk: disk 'disk0': serial"),
        (&["--disk", "/x,id=a", "--disk", "/y,id=a"], "device id 'a' is given twice"),
        (&["--disk", "/x", "--disk", "/x"], "writable disk '/x' is given twice"),
        (&["--net", "mtu=1500"], "tap=NAME is needed"),
        (&["--net", "tap0"], "unknown key 'tap0': it takes tap=NAME, mac=MAC, id=ID, mtu=N"),
        (&["--net", "tap=t,mac=52:54"], "mac=52:54: not a MAC address"),
        (&["--net", "tap=t,mac=01:00:00:00:00:01"], "unicast"),
        (&["--net", "tap=t,mtu=67"], "MTU 67"),
        (&["--net", "tap=t,mtu=65536"], "mtu=65536: it takes a number"),
        (&["--net", "tap=t", "--net", "tap=t"], "TAP 't' is given twice"),
        (&["--disk", "/x,id=net0", "--net", "tap=t"], "device id 'net0' is given twice"),
    ] {
        let message = error(args);
        assert!(message.contains(words), "{args:?}: {message}");
    }
}

#[test]
fn sizes_of_ram_are_named() {
    for (mem, words) in [
        ("0", "--mem '0': at least 32M is needed"),
        ("1M", "at least 32M is needed"),
        ("5T", "--mem '5T': at most 4T is supported"),
        ("abc", "--mem 'abc': not a size"),
        ("512", "not a size: it takes a whole number and a unit"),
        ("33000K", "whole number of MiB"),
        ("-1G", "not a size"),
    ] {
        let Err(Stop::Usage(message)) = parsed(&["--kernel", "/k", "--mem", mem]) else {
            panic!("{mem}");
        };
        assert!(message.contains(words), "{mem}: {message}");
    }
    assert!(parsed(&["--kernel", "/k", "--mem", "33M", "--hugepages"]).is_err());
}

#[test]
fn what_must_be_there_is_asked_for() {
    assert_eq!(parsed(&["--mem", "1G"]), Err(usage("--kernel PATH is needed")));
    assert_eq!(parsed(&["--kernel", "/k"]), Err(usage("--mem SIZE is needed")));
    assert_eq!(parsed(&["--help"]), Err(Stop::Help));
}

#[test]
fn the_help_tells_of_every_option_and_no_other() {
    for option in options(HELP) {
        let message = match with(&[&format!("--{option}")]) {
            Err(Stop::Usage(message)) => message,
            _ => continue,
        };
        assert!(!message.contains("unknown"), "{message}");
    }
    // Those of `everything` are told of.
    for option in ["kernel", "mem", "cpus", "initrd", "cmdline", "disk", "net", "serial", "name"] {
        assert!(options(HELP).contains(&option), "{option}");
    }
    for option in ["control", "on-reboot", "hugepages", "cpu-model"] {
        assert!(options(HELP).contains(&option), "{option}");
    }
}
