//! Records have the same names in `PROTOCOL.md`, in the code and in the model of the hand-over; and in the first two the same
//! numbers, limits and bit 31.

use vmm_migration::wire::{RecordHead, len_max, record_name};

const PROTOCOL: &str = include_str!("../PROTOCOL.md");
const WIRE: &str = include_str!("../src/wire.rs");
const MODEL: &str = include_str!("model/state.rs");

/// What stands between two marks.
fn between<'a>(text: &'a str, from: &str, to: &str) -> &'a str {
    let (_, rest) = text.split_once(from).unwrap_or_else(|| panic!("no {from:?}"));
    rest.split_once(to).unwrap_or_else(|| panic!("no {to:?} after {from:?}")).0
}

/// A row of the specification's table of messages: type, name, sender, limit and body.
type Row = [&'static str; 5];

fn rows() -> Vec<Row> {
    let table = between(PROTOCOL, "\n## Messages\n", "\n## ");
    table.lines().filter_map(row).collect()
}

fn row(line: &'static str) -> Option<Row> {
    let cells = line.strip_prefix("| ")?.strip_suffix(" |")?;
    let cells: Vec<_> = cells.splitn(5, " | ").collect();
    let row: Row = cells.try_into().ok()?;
    row[0].parse::<u32>().ok().map(|_| row)
}

/// `HELLO_REPLY` as a type's name.
fn camel_case(constant: &str) -> String {
    let word = |word: &str| word[..1].to_owned() + &word[1..].to_lowercase();
    constant.split('_').map(word).collect()
}

/// A limit, as the table has it, in bytes.
fn bytes(limit: &str) -> u32 {
    let part = |part: &str| match part.split_once(' ') {
        Some((count, "KiB")) => count.parse::<u32>().unwrap() << 10,
        Some((count, "MiB")) => count.parse::<u32>().unwrap() << 20,
        _ => part.parse().unwrap(),
    };
    limit.split(" + ").map(part).sum()
}

#[test]
fn every_record_is_in_the_protocol_and_in_the_code_alike() {
    let constants = between(WIRE, "pub mod record {\n", "}").lines().map(|line| {
        let line = line.trim().strip_prefix("pub const ").and_then(|l| l.strip_suffix(';'));
        let (name, number) = line.and_then(|line| line.split_once(": u32 = ")).expect("a constant");
        (number.parse::<u32>().expect("a number"), camel_case(name))
    });
    let constants: Vec<_> = constants.collect();
    let rows = rows();
    let name = |row: &Row| row[1].trim_matches('`').to_owned();
    let told: Vec<(u32, String)> =
        rows.iter().map(|row| (row[0].parse().unwrap(), name(row))).collect();
    assert_eq!(constants, told, "constants in wire.rs, and the table of PROTOCOL.md");
    for ((number, name), [.., limit, body]) in told.iter().zip(&rows) {
        assert_eq!(record_name(*number), name);
        assert_eq!(len_max(*number), bytes(limit), "{name}'s limit");
        let is_optional = body.contains("bit 31 is set");
        assert_eq!(RecordHead::new(*number, 0).optional, is_optional, "{name}'s bit 31");
    }
    let last = told.last().expect("a record").0;
    assert_eq!(record_name(last + 1), "unknown");
}

#[test]
fn the_models_messages_are_records() {
    let names: Vec<_> = rows().iter().map(|row| row[1].trim_matches('`')).collect();
    let variants = between(MODEL, "pub enum Message {\n", "}").lines();
    let variants: Vec<_> = variants.map(|line| line.trim().trim_end_matches(',')).collect();
    assert!(variants.len() > 5, "the model has changed its shape: {variants:?}");
    for variant in variants {
        assert!(names.contains(&variant), "{variant} is no record");
    }
}
