//! Tests of CPU models on made-up hosts.

use std::io::Write as _;

use super::*;

/// The last byte of RAM that any model's addresses reach.
const RAM_LAST: u64 = (1 << 30) - 1;

fn leaf(function: u32, index: u32, regs: [u32; 4]) -> kvm_cpuid_entry2 {
    let [eax, ebx, ecx, edx] = regs;
    kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..kvm_cpuid_entry2::default() }
}

/// A host with everything, but for AMX.
fn host() -> CpuId {
    from_entries(&[
        leaf(0, 0, [0x1f, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
        leaf(1, 0, [0x906ea, 0, u32::MAX, u32::MAX]),
        leaf(7, 0, [2, u32::MAX, u32::MAX, u32::MAX]),
        leaf(0xd, 0, [0xe7, 0x240, 0xa80, 0]),
        leaf(0xd, 1, [0xf, 0, 0, 0]),
        leaf(0xd, 2, [0x100, 0x240, 0, 0]),
        leaf(0xd, 5, [0x40, 0x440, 0, 0]),
        leaf(0xd, 6, [0x200, 0x480, 0, 0]),
        leaf(0xd, 7, [0x400, 0x680, 0, 0]),
        leaf(0x4000_0001, 0, [0x0100_18cb, 0, 0, 0]),
        leaf(0x8000_0001, 0, [0, 0, u32::MAX, u32::MAX]),
        leaf(0x8000_0007, 0, [0, 0, 0, 0x100]),
        leaf(0x8000_0008, 0, [0x302e, 0xffff, 0, 0]),
    ])
}

/// The host, changed in one leaf.
fn host_with(function: u32, index: u32, change: impl Fn(&mut kvm_cpuid_entry2)) -> CpuId {
    let mut entries = host().as_slice().to_vec();
    change(find(&mut entries, function, index).unwrap());
    from_entries(&entries)
}

fn get(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
    entry(cpuid.as_slice(), function, index).unwrap()
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

#[test]
fn a_model_shows_its_features_and_kvms_and_no_others() {
    let v3 = apply(&CpuModel::V3, &host(), RAM_LAST).unwrap();
    let kvm = 1 << 21 | 1 << 24 | 1 << 31;
    assert_eq!(get(&v3, 1, 0).ecx & !(1 << 27), 0x76d8_3203 & !(1 << 21 | 1 << 24) | kvm);
    assert_eq!(get(&v3, 1, 0).eax, 0x906ea, "not a feature");
    assert_eq!(get(&v3, 7, 0).ebx, 0x1a9);
    assert_eq!((get(&v3, 7, 0).ecx & !(1 << 4), get(&v3, 7, 0).edx), (0, 0));
    assert_eq!((get(&v3, 0xd, 0).eax, get(&v3, 0xd, 0).ecx), (7, 0x340));
    assert_eq!(entry(v3.as_slice(), 0xd, 5).map(|e| e.eax), None);
    assert_eq!(get(&v3, 0x8000_0007, 0).edx, 0);
    assert_eq!(get(&v3, 0x4000_0001, 0).eax, 0x0100_18cb);
    assert_eq!(
        get(&v3, 0x8000_0008, 0).eax,
        0x3027,
        "39 bits of a physical address, of the host's 46"
    );

    let v2 = apply(&CpuModel::V2, &host(), RAM_LAST).unwrap();
    assert!(v2.as_slice().iter().all(|e| e.function != 0xd), "no XSAVE, no leaf of it");
    assert_eq!(missing(&v2, &v3), [""; 0], "v3 has all of v2");
    assert!(missing(&v3, &v2).contains(&"avx2".to_owned()));
}

#[test]
fn v2_is_the_psabis() {
    let bits: Vec<String> = FEATURE_REGISTERS
        .iter()
        .flat_map(|r| r.names(Model::v2().bits(r)).collect::<Vec<_>>())
        .collect();
    for name in ["cmov", "cx8", "fpu", "fxsr", "mmx", "syscall", "sse", "sse2"] {
        assert!(bits.contains(&name.to_owned()), "{name} of v1");
    }
    for name in ["cx16", "lahf_lm", "popcnt", "sse3", "sse4_1", "sse4_2", "ssse3"] {
        assert!(bits.contains(&name.to_owned()), "{name} of v2");
    }
    for name in ["vme", "acpi", "avx"] {
        assert!(!bits.contains(&name.to_owned()), "{name}");
    }
}

#[test]
fn what_the_host_lacks_is_named() {
    let old = host_with(7, 0, |e| e.ebx &= !(1 << 5 | 1 << 8));
    let refused = apply(&CpuModel::V3, &old, RAM_LAST).unwrap_err().to_string();
    assert_eq!(refused, "CPU model x86-64-v3 needs what this host lacks: avx2, bmi2");
    apply(&CpuModel::V2, &old, RAM_LAST).unwrap();
}

#[test]
fn a_hosts_model_goes_through_its_file() {
    let model = Model::of_host(&host());
    let file = file(&model.to_json());
    let loaded = Model::load(file.path()).unwrap();
    assert_eq!(loaded, model);
    let guest = apply(&CpuModel::File(file.path().to_owned()), &host(), RAM_LAST).unwrap();
    assert_eq!(guest, host(), "all of the host is the host");
}

#[test]
fn the_common_model_fits_both() {
    let a = host_with(7, 0, |e| e.ebx = 0x1ab);
    let b = host_with(0xd, 0, |e| e.eax = 7);
    let common = Model::common(&Model::of_host(&a), &Model::of_host(&b));
    assert_eq!(common.name, "host and host");
    for home in [&a, &b] {
        let guest = common.apply(home).unwrap();
        for other in [&a, &b] {
            assert_eq!(missing(&guest, other), [""; 0]);
        }
    }
    let guest = common.apply(&a).unwrap();
    assert_eq!((get(&guest, 7, 0).ebx, get(&guest, 0xd, 0).eax), (0x1ab, 7));
    assert!(Model::of_host(&a).apply(&b).is_err());
}

#[test]
fn a_bad_file_is_refused_by_name() {
    for (text, why) in [
        ("", "EOF"),
        ("{\"name\":\"x\"}", "missing field `leaves`"),
        ("{\"name\":\"x\",\"leaves\":[{\"leaf\":1}]}", "expected a string"),
        ("{\"name\":\"x\",\"leaves\":[{\"leaf\":\"1\"}]}", "is no number like"),
        ("{\"name\":\"x\",\"leaves\":[{\"leaf\":\"0x1\",\"esx\":\"0x1\"}]}", "unknown field"),
        ("{\"name\":\"x\",\"leaves\":[{\"leaf\":\"0x2\",\"eax\":\"0x1\"}]}", "no CPU features"),
        ("{\"name\":\"x\",\"leaves\":[{\"leaf\":\"0x1\"},{\"leaf\":\"0x1\"}]}", "twice"),
        ("{\"name\":\"x\",\"physical_bits\":53,\"leaves\":[]}", "32 to 52 bits, not 53"),
        (&" ".repeat(70_000), "longer than"),
    ] {
        let file = file(text);
        let refused = Model::load(file.path()).unwrap_err().to_string();
        assert!(refused.contains(why), "{refused}");
        assert!(refused.contains(file.path().to_str().unwrap()));
    }
    let gone = Model::load(Path::new("/nonexistent/model.json")).unwrap_err();
    assert!(matches!(gone, ModelError::Read { .. }));
}

#[test]
fn what_a_destination_lacks_is_named() {
    assert_eq!(missing(&host(), &host()), [""; 0]);
    let poor = host_with(1, 0, |e| e.ecx &= !(1 << 25 | 1 << 27));
    assert_eq!(missing(&host(), &poor), ["aes"], "OSXSAVE is the guest's own doing");
    let poor = host_with(0x4000_0001, 0, |e| e.eax &= !(1 << 24));
    assert_eq!(missing(&host(), &poor), ["kvm_clocksource_stable"]);
    let narrow = host_with(0x8000_0008, 0, |e| e.eax = 0x3027);
    assert_eq!(missing(&host(), &narrow), ["physical addresses of 46 bits (here 39)"]);
    let moved = host_with(0xd, 7, |e| e.ebx = 0x700);
    assert_eq!(
        missing(&host(), &moved),
        ["XSAVE component 7 of 1024 bytes at 1664 (here 1024 at 1792)"]
    );
    let other = host_with(0, 0, |e| e.ebx = 0x6874_7541);
    assert_eq!(missing(&host(), &other).len(), 1);
    assert!(missing(&host(), &other)[0].starts_with("a CPU of GenuineIntel"));
    let none = from_entries(&[]);
    assert!(missing(&host(), &none).len() > 100);
}

/// A host of the next generation: 52 bits of a physical address, 57 of a linear one, and what nested guests have.
#[test]
fn addresses_have_no_more_bits_than_the_model() {
    let new = host_with(0x8000_0008, 0, |e| e.eax = 0x0034_3934);
    let old = host_with(7, 0, |e| e.ecx &= !(1 << 16));
    for model in
        [Model::v2(), Model::v3(), Model::common(&Model::of_host(&new), &Model::of_host(&old))]
    {
        let guest = model.apply(&new).unwrap();
        assert_eq!(missing(&guest, &old), [""; 0], "{}", model.name);
    }
    let common = Model::common(&Model::of_host(&new), &Model::of_host(&old));
    assert_eq!(get(&common.apply(&new).unwrap(), 0x8000_0008, 0).eax, 0x302e);
    let all = Model::of_host(&new);
    assert_eq!(all.apply(&new).unwrap(), new, "all of the host is the host");
    assert_eq!(
        missing(&all.apply(&new).unwrap(), &old),
        [
            "la57",
            "physical addresses of 52 bits (here 46)",
            "linear addresses of 57 bits (here 48)"
        ]
    );
    // A narrower host keeps what it has.
    let client = host_with(0x8000_0008, 0, |e| e.eax = 0x3024);
    assert_eq!(get(&Model::v3().apply(&client).unwrap(), 0x8000_0008, 0).eax, 0x3024);
}

#[test]
fn a_file_without_address_bits_leaves_the_hosts() {
    let file = file(r#"{"name": "old", "leaves": [{"leaf": "0x1", "edx": "0x1"}]}"#);
    let guest = apply(&CpuModel::File(file.path().to_owned()), &host(), RAM_LAST).unwrap();
    assert_eq!(get(&guest, 0x8000_0008, 0).eax, 0x302e);
}

#[test]
fn ram_that_no_address_reaches_is_refused() {
    apply(&CpuModel::V3, &host(), (1 << 39) - 1).unwrap();
    let refused = apply(&CpuModel::V3, &host(), 1 << 39).unwrap_err().to_string();
    assert!(refused.contains("39 bits, as --cpu-model x86-64-v3 has here"), "{refused}");
    apply(&CpuModel::Host, &host(), 1 << 39).unwrap();
}
