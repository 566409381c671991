//! ELF64 kernels: headers, the PVH note, and segments on their way into guest RAM.
//!
//! System V gABI chapters 4 and 5; the note is XEN_ELFNOTE_PHYS32_ENTRY (xen/include/public/elfnote.h).
//! A file's segments are read by offset; a payload's come as a stream, as the decoder yields them.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::error::Problem;
use super::ram::Ram;
use super::{Entry, KERNEL_START_MIN, Loaded};

/// First bytes of an ELF file.
pub(super) const MAGIC: &[u8] = b"\x7fELF";

const HEADER_LEN: usize = 64;
const PHDR_LEN: usize = 56;
/// A kernel has five program headers or so.
const PHDRS_MAX: usize = 62;
/// In a payload, the program headers end within its first page.
const HEAD_LEN: usize = 4096;
/// Linux's notes take 0.5 KiB.
const NOTES_LEN_MAX: u64 = 64 << 10;
/// A file is read in pieces that stay in the second-level cache while they are checked for zeros.
const PIECE_LEN: usize = 256 << 10;

const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;
const PT_NOTE: u32 = 4;
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const EM_X86_64: u16 = 62;
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

/// A PT_LOAD: bytes of the file and where they go.
#[derive(Debug, Clone)]
struct Segment {
    offset: u64,
    vaddr: u64,
    paddr: u64,
    file_len: u64,
    mem_len: u64,
}

/// The checked headers of a kernel that fits the RAM.
#[derive(Debug)]
pub(super) struct Program {
    entry: u64,
    segments: Vec<Segment>,
    notes: Vec<Phdr>,
}

#[derive(Debug, Clone)]
struct Phdr {
    kind: u32,
    offset: u64,
    vaddr: u64,
    paddr: u64,
    file_len: u64,
    mem_len: u64,
    align: u64,
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    // Callers have checked the length; zeros fail every check that follows.
    bytes.get(at..at + N).and_then(|field| field.try_into().ok()).unwrap_or([0; N])
}
fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(field(bytes, at))
}
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(field(bytes, at))
}
fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(field(bytes, at))
}

/// Checks the ELF header, and returns where in the file the program headers are.
fn phdr_range(header: &[u8], file_len: u64) -> Result<Range<u64>, Problem> {
    if header.len() < HEADER_LEN {
        return Err(Problem::Truncated { have: header.len() as u64, need: HEADER_LEN as u64 });
    }
    let (class, order) = (header[4], header[5]);
    let machine =
        if order == 2 { u16::from_be_bytes(field(header, 18)) } else { u16_at(header, 18) };
    if machine != EM_X86_64 || class != 2 || order != 1 {
        return Err(Problem::OtherArch(arch_name(machine, class)));
    }
    match u16_at(header, 16) {
        ET_EXEC | ET_DYN => {}
        1 => return Err(Problem::NotAKernel("an object file (a kernel module?)")),
        4 => return Err(Problem::NotAKernel("a core dump")),
        _ => return Err(Problem::NotAKernel("an ELF file of an unknown type")),
    }
    let (entry_len, count) = (usize::from(u16_at(header, 54)), usize::from(u16_at(header, 56)));
    if count == 0 || count > PHDRS_MAX || entry_len != PHDR_LEN {
        return Err(Problem::Malformed("its ELF program headers are missing or of a wrong size"));
    }
    let start = u64_at(header, 32);
    let end = start.saturating_add((count * PHDR_LEN) as u64);
    if end > file_len {
        return Err(Problem::Truncated { have: file_len, need: end });
    }
    Ok(start..end)
}

fn arch_name(machine: u16, class: u8) -> String {
    match (machine, class) {
        (3, _) => "32-bit x86".into(),
        (EM_X86_64, 1) => "x86-64 with 32-bit pointers (x32)".into(),
        (8, _) => "MIPS".into(),
        (20 | 21, _) => "POWER".into(),
        (22, _) => "s390".into(),
        (40, _) => "32-bit arm".into(),
        (183, _) => "arm64".into(),
        (243, _) => "RISC-V".into(),
        (258, _) => "LoongArch".into(),
        _ => format!("another architecture (ELF machine {machine})"),
    }
}

impl Program {
    /// Checks the program headers against the file's length and against the RAM.
    fn parse(header: &[u8], phdrs: &[u8], file_len: u64, ram: &Ram) -> Result<Self, Problem> {
        let mut program =
            Self { entry: u64_at(header, 24), segments: Vec::new(), notes: Vec::new() };
        for raw in phdrs.chunks_exact(PHDR_LEN) {
            let phdr = Phdr {
                kind: u32_at(raw, 0),
                offset: u64_at(raw, 8),
                vaddr: u64_at(raw, 16),
                paddr: u64_at(raw, 24),
                file_len: u64_at(raw, 32),
                mem_len: u64_at(raw, 40),
                align: u64_at(raw, 48),
            };
            match phdr.kind {
                PT_INTERP => return Err(Problem::NotAKernel("a user-space program")),
                PT_LOAD if phdr.mem_len > 0 => program.push(phdr, file_len, ram)?,
                PT_NOTE => program.notes.push(phdr),
                _ => {}
            }
        }
        if program.segments.is_empty() {
            return Err(Problem::Malformed("its ELF headers name nothing to load"));
        }
        program.segments.sort_by_key(|segment| segment.paddr);
        let overlap = |pair: &[Segment]| pair[0].paddr + pair[0].mem_len > pair[1].paddr;
        if program.segments.windows(2).any(overlap) {
            return Err(Problem::Malformed("its ELF segments overlap in memory"));
        }
        Ok(program)
    }

    fn push(&mut self, phdr: Phdr, file_len: u64, ram: &Ram) -> Result<(), Problem> {
        let Phdr { offset, vaddr, paddr, file_len: seg_len, mem_len, .. } = phdr;
        if seg_len > mem_len {
            return Err(Problem::Malformed("an ELF segment is longer in the file than in memory"));
        }
        let end = offset.saturating_add(seg_len);
        if end > file_len {
            return Err(Problem::Truncated { have: file_len, need: end });
        }
        if paddr < KERNEL_START_MIN {
            return Err(Problem::Malformed(
                "an ELF segment goes below 1 MiB, where the boot data are: link it higher",
            ));
        }
        ram.check(paddr, mem_len)?;
        self.segments.push(Segment { offset, vaddr, paddr, file_len: seg_len, mem_len });
        Ok(())
    }

    /// Guest-physical address of the first byte.
    pub(super) fn start(&self) -> u64 {
        self.segments.iter().map(|segment| segment.paddr).min().unwrap_or(0)
    }

    /// Guest-physical address past the last byte, bss included.
    pub(super) fn end(&self) -> u64 {
        self.segments.iter().map(|segment| segment.paddr + segment.mem_len).max().unwrap_or(0)
    }

    /// Guest-physical address of the ELF's entry, which Linux states as one and others as virtual.
    pub(super) fn entry(&self) -> Result<u64, Problem> {
        if self.holds(self.entry) {
            return Ok(self.entry);
        }
        let offset = |segment: &Segment| {
            let offset = self.entry.checked_sub(segment.vaddr)?;
            (offset < segment.mem_len).then(|| segment.paddr + offset)
        };
        self.segments
            .iter()
            .find_map(offset)
            .ok_or(Problem::Malformed("its ELF entry lies outside of its segments"))
    }

    fn holds(&self, paddr: u64) -> bool {
        self.segments.iter().any(|s| paddr >= s.paddr && paddr - s.paddr < s.mem_len)
    }

    /// The PVH entry, if a note of the file names one.
    fn pvh_entry(&self, file: &File, file_len: u64) -> Result<Option<u64>, Problem> {
        for note in &self.notes {
            let end = note.offset.saturating_add(note.file_len);
            if end > file_len {
                return Err(Problem::Truncated { have: file_len, need: end });
            }
            if note.file_len > NOTES_LEN_MAX {
                return Err(Problem::Malformed("its ELF notes are longer than 64 KiB"));
            }
            let mut bytes = vec![0; usize::try_from(note.file_len).unwrap_or(0)];
            file.read_exact_at(&mut bytes, note.offset).map_err(Problem::Read)?;
            let Some(entry) = find_pvh_note(&bytes, if note.align == 8 { 8 } else { 4 }) else {
                continue;
            };
            if entry > u64::from(u32::MAX) || !self.holds(entry) {
                return Err(Problem::Malformed("its PVH entry lies outside of its segments"));
            }
            return Ok(Some(entry));
        }
        Ok(None)
    }
}

/// The value of XEN_ELFNOTE_PHYS32_ENTRY among the notes in `bytes`.
fn find_pvh_note(mut bytes: &[u8], align: usize) -> Option<u64> {
    while bytes.len() >= 12 {
        let name_len = usize::try_from(u32_at(bytes, 0)).ok()?;
        let desc_len = usize::try_from(u32_at(bytes, 4)).ok()?;
        let desc_at = name_len.checked_add(12)?.checked_next_multiple_of(align)?;
        let desc_end = desc_at.checked_add(desc_len)?;
        let name = bytes.get(12..12 + name_len)?;
        let desc = bytes.get(desc_at..desc_end)?;
        if name == b"Xen\0" && u32_at(bytes, 8) == XEN_ELFNOTE_PHYS32_ENTRY {
            return match desc.len() {
                4 => Some(u32_at(desc, 0).into()),
                8 => Some(u64_at(desc, 0)),
                _ => None,
            };
        }
        // The last note needs no padding after it.
        bytes = bytes.get(desc_end.checked_next_multiple_of(align)?..)?;
    }
    None
}

/// Loads an ELF vmlinux of `file_len` bytes, reading nothing but its segments.
pub(super) fn load_file(file: &File, file_len: u64, ram: &Ram) -> Result<Loaded, Problem> {
    let mut header = vec![0; usize::try_from(file_len).map_or(HEADER_LEN, |l| l.min(HEADER_LEN))];
    file.read_exact_at(&mut header, 0).map_err(Problem::Read)?;
    let range = phdr_range(&header, file_len)?;
    let mut phdrs = vec![0; usize::try_from(range.end - range.start).unwrap_or(0)];
    file.read_exact_at(&mut phdrs, range.start).map_err(Problem::Read)?;
    let program = Program::parse(&header, &phdrs, file_len, ram)?;
    let entry = match program.pvh_entry(file, file_len)? {
        Some(entry) => Entry::Pvh { entry },
        None => Entry::Linux64 { entry: program.entry()?, setup_header: None },
    };
    let mut piece = vec![0; PIECE_LEN];
    for segment in &program.segments {
        let mut done = 0;
        while done < segment.file_len {
            let len =
                usize::try_from(segment.file_len - done).map_or(PIECE_LEN, |l| l.min(PIECE_LEN));
            file.read_exact_at(&mut piece[..len], segment.offset + done).map_err(Problem::Read)?;
            ram.write(segment.paddr + done, &piece[..len])?;
            done += len as u64;
        }
    }
    let (start, end) = (program.start(), program.end());
    Ok(Loaded { entry, end, init_size: end - start })
}

/// Takes an ELF file as a stream and writes its segments as their bytes pass by.
pub(super) struct Loader<'a> {
    ram: &'a Ram<'a>,
    /// The stream's length, known beforehand.
    len: u64,
    /// What came before the headers were whole.
    head: Vec<u8>,
    program: Option<Program>,
    /// Bytes that passed by.
    position: u64,
}

impl<'a> Loader<'a> {
    /// A loader of a stream of `len` bytes.
    pub(super) fn new(ram: &'a Ram<'a>, len: u64) -> Self {
        Self { ram, len, head: Vec::new(), program: None, position: 0 }
    }

    /// Bytes that are still to come.
    pub(super) fn remaining(&self) -> u64 {
        self.len - self.position - self.head.len() as u64
    }

    /// Takes the next bytes of the stream, at most [`Loader::remaining`].
    pub(super) fn feed(&mut self, bytes: &[u8]) -> Result<(), Problem> {
        assert!(bytes.len() as u64 <= self.remaining(), "decoders are bounded by the length");
        if self.program.is_some() {
            return self.store(bytes);
        }
        // Most decoders yield the whole head at once: no copy.
        if self.head.is_empty() && self.is_head(bytes) {
            self.program = Some(self.parse(bytes)?);
            return self.store(bytes);
        }
        self.head.extend_from_slice(bytes);
        if self.is_head(&self.head) {
            self.program = Some(self.parse(&self.head)?);
            let head = std::mem::take(&mut self.head);
            return self.store(&head);
        }
        Ok(())
    }

    fn is_head(&self, bytes: &[u8]) -> bool {
        bytes.len() as u64 >= self.len.min(HEAD_LEN as u64)
    }

    fn parse(&self, head: &[u8]) -> Result<Program, Problem> {
        if !head.starts_with(MAGIC) {
            return Err(Problem::Malformed("its payload is no ELF file: give a standard kernel"));
        }
        let range = phdr_range(head, self.len)?;
        let (start, end) = (usize::try_from(range.start), usize::try_from(range.end));
        let phdrs =
            start.ok().zip(end.ok()).and_then(|(start, end)| head.get(start..end)).ok_or(
                Problem::Malformed("its payload's ELF program headers aren't at its start"),
            )?;
        Program::parse(head, phdrs, self.len, self.ram)
    }

    fn store(&mut self, bytes: &[u8]) -> Result<(), Problem> {
        let here = self.position..self.position + bytes.len() as u64;
        for segment in self.program.iter().flat_map(|program| &program.segments) {
            let from = here.start.max(segment.offset);
            let to = here.end.min(segment.offset + segment.file_len);
            if from < to {
                let index = |at: u64| usize::try_from(at - here.start).unwrap_or(bytes.len());
                let part = &bytes[index(from)..index(to)];
                self.ram.write(segment.paddr + (from - segment.offset), part)?;
            }
        }
        self.position = here.end;
        Ok(())
    }

    /// The program, once the whole stream has passed.
    pub(super) fn finish(self) -> Result<Program, Problem> {
        let have = self.position + self.head.len() as u64;
        match self.program {
            Some(program) if have == self.len => Ok(program),
            _ => Err(Problem::Truncated { have, need: self.len }),
        }
    }
}
