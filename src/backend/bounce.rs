//! Direct I/O of what isn't aligned: through a buffer of our own that is, block by block.
//!
//! A guest's buffers may lie anywhere and its requests may be smaller than the blocks that `O_DIRECT`
//! wants. Reads take the covering blocks and copy what was asked for; writes read the blocks that they
//! cover in part, change them and write them back. That is safe because one thread drives a disk.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use vmm_devices::GuestSlice;

/// How much is bounced at once, in bytes: a multiple of every alignment.
const BOUNCE_LEN: usize = 256 << 10;

/// What the kernel wants aligned, in bytes, and the buffer for the rest. Without `O_DIRECT` nothing is
/// (1 and 1), and the buffer serves to write zeroes only.
pub(super) struct Bounce {
    memory_align: usize,
    offset_align: usize,
    buffer: Vec<u8>,
}

impl Bounce {
    /// Alignments are powers of two up to [`BOUNCE_LEN`].
    pub(super) fn new(memory_align: usize, offset_align: usize) -> Self {
        for align in [memory_align, offset_align] {
            assert!(align.is_power_of_two() && align <= BOUNCE_LEN, "alignment {align}");
        }
        Self { memory_align, offset_align, buffer: Vec::new() }
    }

    /// What offsets in the file are aligned to, in bytes.
    pub(super) fn offset_align(&self) -> u64 {
        self.offset_align as u64
    }

    /// Whether the kernel takes this transfer as it is.
    pub(super) fn is_aligned(&self, slices: &[GuestSlice<'_>], offset: u64) -> bool {
        if self.offset_align == 1 {
            return true;
        }
        offset.is_multiple_of(self.offset_align as u64)
            && slices.iter().all(|s| {
                let address = s.ptr_guard().as_ptr().addr();
                address.is_multiple_of(self.memory_align)
                    && s.len().is_multiple_of(self.offset_align)
            })
    }

    /// Fills `slices` from `offset`.
    pub(super) fn read(
        &mut self,
        file: &File,
        slices: &[GuestSlice<'_>],
        offset: u64,
    ) -> io::Result<()> {
        let mut done = 0;
        let len = total(slices);
        while done < len {
            let (start, skip, span) = self.window(offset + done as u64, len - done);
            let buffer = &mut self.buffer()[..span];
            file.read_exact_at(buffer, start)?;
            let part = &buffer[skip..span.min(skip + len - done)];
            copy(slices, done, part.len(), |slice, at| slice.copy_from(&part[at..]));
            done += part.len();
        }
        Ok(())
    }

    /// Writes `slices` at `offset`.
    pub(super) fn write(
        &mut self,
        file: &File,
        slices: &[GuestSlice<'_>],
        offset: u64,
    ) -> io::Result<()> {
        self.rewrite(file, offset, total(slices) as u64, |done, part| {
            copy(slices, done, part.len(), |slice, at| {
                slice.copy_to(&mut part[at..]);
            });
        })
    }

    /// Writes zeroes.
    pub(super) fn write_zeroes(&mut self, file: &File, offset: u64, len: u64) -> io::Result<()> {
        self.rewrite(file, offset, len, |_, part| part.fill(0))
    }

    /// Writes `len` bytes at `offset` as `fill` gives them: it gets how much came before, and the part.
    fn rewrite(
        &mut self,
        file: &File,
        offset: u64,
        len: u64,
        mut fill: impl FnMut(usize, &mut [u8]),
    ) -> io::Result<()> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut done = 0;
        while done < len {
            let (start, skip, span) = self.window(offset + done as u64, len - done);
            let end = span.min(skip + len - done);
            let buffer = &mut self.buffer()[..span];
            if skip > 0 || end < span {
                file.read_exact_at(buffer, start)?;
            }
            fill(done, &mut buffer[skip..end]);
            file.write_all_at(buffer, start)?;
            done += end - skip;
        }
        Ok(())
    }

    /// The blocks that cover `len` bytes from `offset`, at most a buffer full: where they start in the
    /// file, where `offset` is in them, and how long they are.
    fn window(&self, offset: u64, len: usize) -> (u64, usize, usize) {
        let align = self.offset_align;
        let start = offset & !(align as u64 - 1);
        let skip = usize::try_from(offset - start).expect("less than a block");
        let span = skip.saturating_add(len).min(BOUNCE_LEN).next_multiple_of(align);
        (start, skip, span)
    }

    /// [`BOUNCE_LEN`] bytes, aligned. Made when first needed.
    fn buffer(&mut self) -> &mut [u8] {
        if self.buffer.is_empty() {
            self.buffer = vec![0; BOUNCE_LEN + self.memory_align];
        }
        let start = self.buffer.as_ptr().align_offset(self.memory_align);
        &mut self.buffer[start..start + BOUNCE_LEN]
    }
}

fn total(slices: &[GuestSlice<'_>]) -> usize {
    slices.iter().map(GuestSlice::len).sum()
}

/// Calls `each` for the pieces of `slices` that make up `len` bytes after the first `skip`, with how far
/// into those `len` bytes the piece is.
fn copy(
    slices: &[GuestSlice<'_>],
    mut skip: usize,
    len: usize,
    mut each: impl FnMut(&GuestSlice<'_>, usize),
) {
    let mut at = 0;
    for slice in slices {
        if skip >= slice.len() {
            skip -= slice.len();
            continue;
        }
        let count = (slice.len() - skip).min(len - at);
        each(&slice.subslice(skip, count).expect("within the slice"), at);
        skip = 0;
        at += count;
        if at == len {
            return;
        }
    }
}
