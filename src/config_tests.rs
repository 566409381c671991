//! Tests of `config`: every rule of `validate`, addresses, and the trip through JSON.

use super::*;

fn config() -> Config {
    Config {
        name: "web".into(),
        cpus: 2,
        ram_bytes: 512 * MIB,
        hugepages: false,
        cpu_model: CpuModel::V2,
        boot: BootSource { kernel: "/vmlinuz".into(), initrd: None, cmdline: "panic=-1".into() },
        disks: vec![disk("root", "/root.img"), disk("data", "/data.img")],
        nets: vec![net("net0", "tap0")],
        serial: SerialTarget::Unix("/run/serial".into()),
        on_reboot: OnReboot::Reset,
    }
}

fn disk(id: &str, path: &str) -> DiskConfig {
    DiskConfig { id: id.into(), path: path.into(), readonly: false, direct: false, serial: None }
}

fn net(id: &str, tap: &str) -> NetConfig {
    NetConfig { id: id.into(), tap: tap.into(), mac: MacAddr::derive("web", id), mtu: Some(1500) }
}

/// The error of a configuration that `change` has broken.
fn error(change: impl FnOnce(&mut Config)) -> String {
    let mut config = config();
    change(&mut config);
    config.validate().expect_err("the configuration is broken").to_string()
}

#[test]
fn a_good_config_passes_and_survives_json() {
    let config = config();
    config.validate().expect("a good configuration");
    let json = serde_json::to_string(&config).expect("a configuration is JSON");
    assert!(json.contains(r#""cpu_model":"x86-64-v2""#), "{json}");
    assert_eq!(Config::restore(json.as_bytes()).expect("our own JSON"), config);
}

#[test]
fn an_unknown_field_is_an_error() {
    let json = serde_json::to_string(&config()).expect("a configuration is JSON");
    let json = json.replacen('{', r#"{"gpu":1,"#, 1);
    assert!(Config::restore(json.as_bytes()).is_err());
}

#[test]
fn names_and_ids_follow_the_rules() {
    for name in ["", ".web", "-web", "a/b", "a b", "ü", "a\n", &"x".repeat(65)] {
        assert!(error(|c| c.name = name.into()).starts_with("VM name"), "{name}");
        assert!(error(|c| c.disks[0].id = name.into()).starts_with("disk id"), "{name}");
        assert!(error(|c| c.nets[0].id = name.into()).starts_with("network id"), "{name}");
    }
    assert!(!error(|c| c.name = "a\n".repeat(999)).contains('\n'));
}

#[test]
fn sizes_have_limits() {
    assert!(error(|c| c.cpus = 0).contains("1 to 254"));
    assert!(error(|c| c.cpus = 255).contains("1 to 254"));
    assert!(error(|c| c.ram_bytes = 0).contains("32M"));
    assert!(error(|c| c.ram_bytes = 31 * MIB).contains("32M"));
    assert!(error(|c| c.ram_bytes = RAM_BYTES_MAX + MIB).contains("4T"));
    assert!(error(|c| c.ram_bytes += 4096).contains("MiB"));
    let odd = |c: &mut Config| (c.ram_bytes, c.hugepages) = (33 * MIB, true);
    assert!(error(odd).contains("huge pages"));
    assert!(error(|c| c.boot.cmdline = "x".repeat(2048)).contains("2047"));
    assert!(error(|c| c.boot.cmdline = "a\0".into()).contains("NUL"));
    assert!(error(|c| c.nets[0].mtu = Some(67)).contains("68"));
    let many = |c: &mut Config| c.disks = (0..17).map(|i| disk(&format!("d{i}"), "/x")).collect();
    assert!(error(many).starts_with("18 disks"));
}

#[test]
fn what_must_be_unique_is() {
    assert_eq!(
        error(|c| c.nets[0].id = "root".into()),
        "device id 'root' is given twice: each must be unique"
    );
    assert!(error(|c| c.nets.push(net("net1", "tap0"))).starts_with("TAP 'tap0'"));
    let mac = |c: &mut Config| {
        c.nets.push(net("net1", "tap1"));
        c.nets[1].mac = c.nets[0].mac;
    };
    assert!(error(mac).starts_with("MAC address"));
    let one_reads = |c: &mut Config| {
        c.disks[1].path = "/root.img".into();
        c.disks[1].readonly = true;
    };
    assert!(error(one_reads).starts_with("writable disk '/root.img'"));
    let mut both_read = config();
    one_reads(&mut both_read);
    both_read.disks[0].readonly = true;
    assert_eq!(both_read.validate(), Ok(()));
}

#[test]
fn device_options_have_rules() {
    for serial in ["", "123456789012345678901", "ü", "a\tb"] {
        assert!(error(|c| c.disks[0].serial = Some(serial.into())).contains("serial"), "{serial}");
    }
    assert!(error(|c| c.disks[0].path = "".into()).contains("path"));
    for tap in ["", "..", "a/b", "a b", "sixteen-letters-"] {
        assert!(error(|c| c.nets[0].tap = tap.into()).contains("TAP"), "{tap}");
    }
    assert!(error(|c| c.nets[0].mac = MacAddr([1, 0, 0, 0, 0, 1])).contains("unicast"));
    assert!(error(|c| c.nets[0].mac = MacAddr([0; 6])).contains("unicast"));
}

#[test]
fn addresses_read_as_they_print() {
    let mac: MacAddr = "52:54:00:AB:cd:ef".parse().expect("an address");
    assert_eq!(mac.to_string(), "52:54:00:ab:cd:ef");
    for text in ["", "52:54:00:12:34", "52:54:00:12:34:56:78", "5254.0012.3456", "+2:54:0:1:2:3"] {
        assert_eq!(text.parse::<MacAddr>(), Err(MacError), "{text}");
    }
}

#[test]
fn a_derived_address_never_changes() {
    // A guest's udev rules and DHCP leases hang on these: a new value here is a broken promise.
    assert_eq!(MacAddr::derive("web", "net0").to_string(), "82:de:72:b4:17:0c");
    assert_ne!(MacAddr::derive("web", "net1"), MacAddr::derive("web", "net0"));
    assert_ne!(MacAddr::derive("we", "bnet0"), MacAddr::derive("web", "net0"));
    for i in 0..256 {
        let mac = MacAddr::derive("vm", &format!("net{i}"));
        assert!(mac.is_usable() && mac.0[0] & 2 == 2, "{mac}");
    }
}
