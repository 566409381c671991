//! One number of KVM's statistics of a vCPU: the page faults that it took and KVM resolved.
//!
//! KVM tells its statistics in a binary file for each vCPU (KVM API 4.131): a header, a description of
//! each number with its name, and the numbers. All of it is checked; what doesn't add up is "not there".

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use kvm_bindings::{KVM_STATS_TYPE_CUMULATIVE, KVM_STATS_TYPE_MASK, KVMIO};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;

use crate::arch;

mod nr {
    //! The ioctl number that kvm-ioctls lacks.
    #![allow(missing_docs, reason = "the macro writes a public function without docs")]
    use super::{KVMIO, ioctl_io_nr};
    ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);
}
use nr::KVM_GET_STATS_FD;

/// `struct kvm_stats_header`: six words.
const HEADER_LEN: usize = 24;
/// `struct kvm_stats_desc` without the name that follows.
const DESCRIPTION_LEN: usize = 16;
/// More than any kernel has: in Linux 6.12 names of 48 bytes, and some 60 numbers.
const NAME_LEN_MAX: usize = 1024;
const DESCRIPTIONS_MAX: usize = 4096;

/// A vCPU's count of page faults. It may be read while the vCPU runs.
#[derive(Debug)]
pub struct FaultCount {
    file: File,
    /// Where in the file the number stands.
    at: u64,
}

impl FaultCount {
    /// Of a vCPU at rest: its file answers no call while it runs. `None`: this kernel doesn't tell.
    #[must_use]
    pub fn of(vcpu: &VcpuFd) -> Option<Self> {
        // SAFETY: a vCPU's file; the call takes no argument.
        let fd = unsafe { ioctl(vcpu, KVM_GET_STATS_FD()) };
        if fd < 0 {
            return None;
        }
        // SAFETY: KVM has just made this file for us, and nobody else knows its number.
        let file = unsafe { OwnedFd::from_raw_fd(fd) };
        Self::named(file.into(), arch::FAULTS_RESOLVED)
    }

    fn named(file: File, name: &str) -> Option<Self> {
        let header = read(&file, 0, HEADER_LEN)?;
        let [name_len, count, descriptions, data] =
            [4, 8, 16, 20].map(|at| word(&header, at).unwrap_or_default());
        let (name_len, count) = (usize::try_from(name_len).ok()?, usize::try_from(count).ok()?);
        if name_len > NAME_LEN_MAX || count > DESCRIPTIONS_MAX {
            return None;
        }
        let each = DESCRIPTION_LEN + name_len;
        let descriptions = read(&file, u64::from(descriptions), count * each)?;
        let wanted = descriptions.chunks_exact(each).find(|description| {
            let found = description[DESCRIPTION_LEN..].split(|byte| *byte == 0).next();
            found == Some(name.as_bytes())
        })?;
        // One number that only grows; its place counts from the data's start.
        let is_sum = word(wanted, 0)? & KVM_STATS_TYPE_MASK == KVM_STATS_TYPE_CUMULATIVE;
        if !is_sum || wanted[6..8] != [1, 0] {
            return None;
        }
        let count = Self { file, at: u64::from(data) + u64::from(word(wanted, 8)?) };
        count.get().is_some().then_some(count)
    }

    /// The count since the vCPU was made.
    #[must_use]
    pub fn get(&self) -> Option<u64> {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, self.at).ok()?;
        Some(u64::from_le_bytes(bytes))
    }
}

fn read(file: &File, at: u64, len: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, at).ok()?;
    Some(bytes)
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const NAME_LEN: u32 = 12;

    /// A file as KVM gives it: an id, two descriptions, two numbers; the second is "wanted".
    fn file(edit: impl FnOnce(&mut Vec<u8>)) -> File {
        let description = |flags: u32, offset: u32, name: &[u8]| {
            let mut bytes = flags.to_le_bytes().to_vec();
            bytes.extend([0, 0, 1, 0]);
            bytes.extend(offset.to_le_bytes());
            bytes.extend([0; 4]);
            bytes.extend(name);
            bytes.resize(DESCRIPTION_LEN + NAME_LEN as usize, 0);
            bytes
        };
        let mut bytes = Vec::new();
        for word in [0, NAME_LEN, 2, 24, 36, 92] {
            bytes.extend(u32::to_le_bytes(word));
        }
        bytes.extend(b"kvm-1/vcpu-0");
        bytes.extend(description(1, 0, b"wanted_not"));
        bytes.extend(description(0, 8, b"wanted"));
        bytes.extend(7_u64.to_le_bytes());
        bytes.extend(42_u64.to_le_bytes());
        edit(&mut bytes);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        file
    }

    fn number(edit: impl FnOnce(&mut Vec<u8>)) -> Option<u64> {
        FaultCount::named(file(edit), "wanted")?.get()
    }

    #[test]
    fn a_number_is_found_by_its_name() {
        assert_eq!(number(|_| ()), Some(42));
        // Not a sum, and not there.
        assert!(FaultCount::named(file(|_| ()), "wanted_not").is_none());
        assert!(FaultCount::named(file(|_| ()), "want").is_none());
    }

    #[test]
    fn what_does_not_add_up_is_not_there() {
        const SECOND: usize = 36 + 28;
        for len in 0..92 + 16 {
            assert_eq!(number(|bytes| bytes.truncate(len)), None, "{len} bytes");
        }
        // Sizes and places that lead anywhere; a histogram; a name without an end.
        for at in [4, 8, 16, 20, SECOND, SECOND + 6, SECOND + 8] {
            assert_eq!(number(|bytes| bytes[at..at + 2].fill(0xff)), None, "at {at}");
        }
        assert_eq!(number(|bytes| bytes[4..8].fill(0)), None);
        assert_eq!(number(|bytes| bytes[8..12].fill(0)), None);
        assert_eq!(number(|bytes| bytes[SECOND + 16..SECOND + 28].fill(b'w')), None);
    }
}
