//! Says what a recorded stream holds, record by record: a snapshot's `state`, or one direction of a
//! migration.

use std::io::Read;

use crate::chunk::{self, CHUNK_HEAD_LEN, ENTRY_LEN, Encoding};
use crate::message::{Message, Reserve, unpack};
use crate::plan::{CpuNeeds, DiskNeed, NetNeed, Plan};
use crate::snapshot::Header;
use crate::wire::{self, Digest, RecordHead, StreamKind, WireError, record};

/// One record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Where it begins, in bytes from the stream's start.
    pub offset: u64,
    /// Its type's number.
    pub kind: u32,
    /// Its type's name.
    pub name: &'static str,
    /// A reader may skip it.
    pub optional: bool,
    /// Length of its body, in bytes.
    pub len: u32,
    /// What it says, in one line or several.
    pub text: String,
}

/// Walks a stream from its preamble to its end and hands every record to `each`.
///
/// # Errors
/// The first thing wrong with it; `each` has seen everything before.
pub fn inspect(input: &mut impl Read, mut each: impl FnMut(Item)) -> Result<StreamKind, WireError> {
    let mut preamble = [0; wire::PREAMBLE_LEN];
    input.read_exact(&mut preamble)?;
    let stream = wire::parse_preamble(&preamble)?;
    let mut offset = wire::PREAMBLE_LEN as u64;
    let mut digest = Digest::default();
    let mut body = Vec::new();
    loop {
        let mut first = [0; 1];
        if input.read(&mut first)? == 0 {
            return Ok(stream);
        }
        let (head, sum) = wire::read_record(&mut first.as_slice().chain(&mut *input), &mut body)?;
        let text = describe(head, &body, &digest)?;
        let name = wire::record_name(head.kind);
        let RecordHead { kind, optional, len } = head;
        each(Item { offset, kind, name, optional, len, text });
        digest.add(sum);
        offset += (wire::HEAD_LEN + body.len() + wire::SUM_LEN) as u64;
    }
}

fn describe(head: RecordHead, body: &[u8], before: &Digest) -> Result<String, WireError> {
    match head.kind {
        record::PAGES | record::PAGES2 => describe_pages(head.kind, body),
        record::SNAPSHOT => {
            let header: Header = unpack(head.kind, body)?;
            let Header { id, software, created_unix_ms, plan } = header;
            let head = format!("{id} by {software}, {created_unix_ms} ms since 1970 UTC");
            Ok(format!("{head}\n{}", describe_plan(&plan)))
        }
        record::MEMORY_SUMS => Ok(format!("checksums of {} MiB of memory", body.len() / 8)),
        _ => match Message::parse(head.kind, body) {
            Ok(Message::Section(s)) => {
                let (kind, instance, version) = (s.kind, s.instance, s.version);
                Ok(format!("{kind}/{instance} version {version}, {} bytes", s.body.len()))
            }
            Ok(Message::End(end)) => {
                let right = (end.records, end.digest) == before.value();
                let verdict = if right { "right" } else { "WRONG" };
                Ok(format!("{end:?}, which is {verdict}"))
            }
            Ok(Message::Reserve(reserve)) => {
                let Reserve { plan, example_sections, dry_run } = *reserve;
                let head = format!("{example_sections} example sections, dry run: {dry_run}");
                Ok(format!("{head}\n{}", describe_plan(&plan)))
            }
            Ok(message) => Ok(format!("{message:?}")),
            Err(WireError::UnknownRecord { .. }) if head.optional => Ok("unknown".to_owned()),
            Err(error) => Err(error),
        },
    }
}

fn describe_plan(plan: &Plan) -> String {
    let Plan { name, paused, config, spaces, touched_pages, sections, cpu, disks, nets } = plan;
    let mut lines =
        vec![format!("guest {name:?}, paused: {paused}, {touched_pages} pages touched")];
    lines.push(format!("config {}", String::from_utf8_lossy(config)));
    for space in spaces {
        let regions = space.regions.iter();
        let regions = regions.map(|r| format!("{} from {:#x}", r.pages, r.first_page));
        lines.push(format!("space {}: pages {}", space.id, regions.collect::<Vec<_>>().join(", ")));
    }
    let (leaves, msrs) = (cpu.cpuid.len(), cpu.msrs.len());
    let CpuNeeds { arch, model, vcpus, xsave_bytes, xcr0, xss, tsc_khz, .. } = cpu;
    lines.push(format!("{vcpus} vCPUs of {arch}, model {model:?}, TSC {tsc_khz} kHz"));
    lines.push(format!(
        "{leaves} CPUID leaves, {msrs} MSRs, XSAVE {xsave_bytes} bytes, XCR0 {xcr0:#x}, XSS {xss:#x}"
    ));
    for DiskNeed { id, path, bytes, read_only } in disks {
        lines.push(format!("disk {id:?} at {path:?}, {bytes} bytes, read-only: {read_only}"));
    }
    for NetNeed { id, tap, mac } in nets {
        lines.push(format!("interface {id:?} on {tap:?}, MAC {mac:02x?}"));
    }
    lines.extend(sections.iter().map(|section| format!("section {section}")));
    lines.join("\n")
}

fn describe_pages(kind: u32, body: &[u8]) -> Result<String, WireError> {
    let bad = |what| WireError::Malformed { kind, what };
    let (head, table) = body.split_first_chunk::<CHUNK_HEAD_LEN>().ok_or(bad("no head"))?;
    let (space, runs) = chunk::decode_head(*head)?;
    let (entries, _) = table.as_chunks::<ENTRY_LEN>();
    let (mut data, mut zero) = (0, 0);
    for entry in entries.get(..runs).ok_or(bad("table cut short"))? {
        let entry = chunk::decode_entry(*entry)?;
        match entry.encoding {
            Encoding::Zero => zero += entry.run.count(),
            Encoding::Raw => data += entry.run.count(),
        }
    }
    Ok(format!("space {space}: {runs} runs, {data} pages with data, {zero} zero pages"))
}
