//! Tests of what a destination says of a guest before it makes a place for it.

use vmm_migration::plan::{CpuNeeds, DiskNeed, Plan, Region, SPACE_RAM, Space};

use super::*;
use crate::backend::lock::{self, LockMode};
use crate::config::{
    BootSource, CpuModel, DiskConfig, MIB, MacAddr, NetConfig, OnReboot, SerialTarget,
};

/// A guest with a disk and a network interface, neither of which is here.
fn plan() -> Plan {
    let config = Config {
        name: "web".into(),
        cpus: 1,
        ram_bytes: 64 * MIB,
        hugepages: false,
        cpu_model: CpuModel::Host,
        boot: BootSource { kernel: "/vmlinuz".into(), initrd: None, cmdline: String::new() },
        disks: vec![DiskConfig {
            id: "root".into(),
            path: "/nowhere/root.img".into(),
            readonly: false,
            direct: false,
            serial: None,
        }],
        nets: vec![NetConfig {
            id: "net0".into(),
            tap: "tap-elsewhere".into(),
            mac: MacAddr([2, 0, 0, 0, 0, 1]),
            mtu: None,
        }],
        serial: SerialTarget::Stdio,
        on_reboot: OnReboot::Exit,
    };
    Plan {
        name: "web".into(),
        paused: false,
        config: config.save(1).unwrap(),
        spaces: Vec::new(),
        touched_pages: u64::MAX,
        sections: Vec::new(),
        cpu: CpuNeeds { arch: "s390x".into(), ..CpuNeeds::default() },
        disks: vec![DiskNeed {
            id: "root".into(),
            path: "/nowhere/root.img".into(),
            bytes: 512,
            read_only: false,
        }],
        nets: Vec::new(),
    }
}

fn destination(overrides: Overrides) -> LocalHost {
    LocalHost { overrides, events: std::sync::mpsc::channel().0 }
}

/// Each reason begins or goes on with its words.
#[track_caller]
fn check(reasons: &[String], words: &[&str]) {
    assert_eq!(reasons.len(), words.len(), "{reasons:#?}");
    for (reason, words) in reasons.iter().zip(words) {
        assert!(reason.contains(words), "{reason}: no {words}");
    }
}

#[test]
fn every_reason_is_told_at_once() {
    let here = destination(Overrides {
        control: Some("/proc/none/web.sock".into()),
        serial: Some(SerialTarget::File("/nowhere/log".into())),
        ..Overrides::default()
    });
    // Another of its disks is here, in other hands.
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(1024).unwrap();
    lock::take(image.as_file(), image.path(), LockMode::Exclusive).unwrap();
    let mut plan = plan();
    plan.config = String::from_utf8(plan.config)
        .unwrap()
        .replace(
            r#""disks":["#,
            &format!(
                r#""disks":[{{"id":"data","path":"{}","readonly":false,"direct":false,"serial":null}},"#,
                image.path().display()
            ),
        )
        .into();
    plan.disks.push(DiskNeed { id: "data".into(), ..plan.disks[0].clone() });
    plan.spaces = vec![Space { id: SPACE_RAM, regions: vec![Region { first_page: 0, pages: 1 }] }];
    let Err(mut reasons) = here.make_place(&plan, Some(1)) else { panic!("it has a place here") };
    // Without KVM that is the first reason.
    if std::env::var_os("NO_KVM").is_some_and(|v| v == "1") {
        reasons[0] = "the guest is for s390x".to_owned();
    }
    check(
        &reasons,
        &[
            "the guest is for s390x",
            "MiB of memory, this host has",
            "has 1024 bytes here, 512 at the source",
            "/nowhere/root.img is not here: say where it is with --disk id=root,path=PATH",
            "locked by another disk of this VM",
            "guest RAM is laid out differently here",
            "say which it is here with --net id=net0,tap=NAME",
            "/proc/none",
            "--serial file:/nowhere/log",
        ],
    );
}

#[test]
fn a_configuration_that_can_t_be_is_told_beside_the_rest() {
    let here = destination(Overrides {
        disks: vec![("other".into(), "/x".into())],
        only_listed: true,
        ..Overrides::default()
    });
    let Err(reasons) = here.make_place(&plan(), None) else { panic!("it has a place here") };
    check(
        &reasons[1..],
        &[
            "MiB of memory",
            "--disk id=other: the guest has no such disk",
            "disk root is not listed here",
            "net net0 is not listed here",
        ],
    );
    let mut garbage = plan();
    garbage.config = b"{".to_vec();
    let Err(reasons) = here.make_place(&garbage, None) else { panic!("it has a place here") };
    check(&reasons[1..], &["MiB of memory", "the guest's configuration can't be read"]);
}

#[test]
fn without_standard_output_the_console_is_a_socket() {
    let mut overrides = Overrides { stdio_taken: true, ..Overrides::default() };
    overrides.control = Some("/tmp/vmm/other.sock".into());
    let serial = |overrides: &Overrides| {
        destination(overrides.clone()).configure(&plan()).map(|config| config.serial).unwrap()
    };
    assert_eq!(serial(&overrides), SerialTarget::Unix("/tmp/vmm/other.tty".into()));
    overrides.serial = Some(SerialTarget::Null);
    assert_eq!(serial(&overrides), SerialTarget::Null);
    assert_eq!(serial(&Overrides::default()), SerialTarget::Stdio);
}

#[test]
fn a_guest_is_given_back_only_if_no_disk_was_marked() {
    let failed = || Err(DiskError::Missing { path: "/disk".into() });
    for (marks, given_back) in [
        (vec![], false),
        (vec![Ok(()), Ok(())], false),
        (vec![Ok(()), failed()], false),
        (vec![failed(), Ok(())], false),
        (vec![failed()], true),
        (vec![failed(), failed()], true),
    ] {
        let what = format!("{marks:?}");
        assert_eq!(mark_any(marks.into_iter()).is_err(), given_back, "{what}");
    }
}
