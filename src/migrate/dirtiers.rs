//! Which vCPU dirties how much, as far as a host can tell.
//!
//! While a slot's writes are logged by write protection, a vCPU's first write to a page is a page fault,
//! and KVM counts the faults of each. Where the hardware keeps the log (Intel's PML), there are none: then
//! the processor time of each vCPU's thread stands for it, since one that sleeps dirties nothing.

use crate::machine::Machine;
use crate::running::Running;
use crate::stats::FaultCount;

/// What is counted of each vCPU, by index. Empty: not known.
#[derive(Debug, Default)]
struct Counts {
    faults: Vec<u64>,
    cpu_ns: Vec<u64>,
}

/// The counts of all vCPUs, read again and again.
#[derive(Debug, Default)]
pub struct Dirtiers {
    /// Of every vCPU, or of none.
    faults: Vec<FaultCount>,
    last: Counts,
}

impl Dirtiers {
    /// Those of a machine that is about to run.
    #[must_use]
    pub fn of(machine: &Machine) -> Self {
        let faults = machine.vcpus.iter().map(|vcpu| FaultCount::of(vcpu.fd()));
        Self { faults: faults.collect::<Option<_>>().unwrap_or_default(), last: Counts::default() }
    }

    /// Counts from here on.
    pub fn start(&mut self, running: &Running) {
        self.last = self.counts(running);
    }

    /// Attributes the pages found dirty to the vCPUs, by what was counted since the last call.
    pub fn attribute(&mut self, running: &Running, dirty_pages: u64) -> Vec<u64> {
        let now = self.counts(running);
        let faults = since(&now.faults, &self.last.faults);
        let cpu_ns = since(&now.cpu_ns, &self.last.cpu_ns);
        self.last = now;
        tracing::debug!("{dirty_pages} pages dirty; by vCPU, faults {faults:?}, ns {cpu_ns:?}");
        attribute(&faults, &cpu_ns, dirty_pages)
    }

    fn counts(&self, running: &Running) -> Counts {
        let faults = self.faults.iter().map(FaultCount::get).collect::<Option<_>>();
        let cpu_ns = running.vcpu_times().map(|time| time.map(nanos)).collect::<Option<_>>();
        Counts { faults: faults.unwrap_or_default(), cpu_ns: cpu_ns.unwrap_or_default() }
    }
}

fn nanos(time: std::time::Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// The growth of each; empty if either isn't known.
fn since(now: &[u64], before: &[u64]) -> Vec<u64> {
    if now.len() != before.len() {
        return Vec::new();
    }
    now.iter().zip(before).map(|(now, before)| now.saturating_sub(*before)).collect()
}

/// The pages that each vCPU dirtied: by their page faults if those explain half of the pages, or else by their
/// processor time. Not more than `dirty_pages` together. Empty: not known.
fn attribute(faults: &[u64], cpu_ns: &[u64], dirty_pages: u64) -> Vec<u64> {
    let taken = faults.iter().fold(0, |sum: u64, faults| sum.saturating_add(*faults));
    if taken >= dirty_pages.div_ceil(2) && !faults.is_empty() {
        // A fault may be another than a first write, and a page may be a device's.
        return divide(dirty_pages.min(taken), faults);
    }
    if cpu_ns.iter().all(|time| *time == 0) { Vec::new() } else { divide(dirty_pages, cpu_ns) }
}

/// Divides the pages in proportion to the weights.
fn divide(pages: u64, weights: &[u64]) -> Vec<u64> {
    let sum: u128 = weights.iter().map(|weight| u128::from(*weight)).sum();
    let part = |weight: &u64| u128::from(pages) * u128::from(*weight) / sum.max(1);
    weights.iter().map(|weight| u64::try_from(part(weight)).unwrap_or(u64::MAX)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_tell_who_wrote() {
        assert_eq!(attribute(&[10, 990], &[5, 5], 1000), [10, 990]);
        // Some pages are devices'; some faults are no writes.
        assert_eq!(attribute(&[0, 500], &[5, 5], 1000), [0, 500]);
        assert_eq!(attribute(&[500, 1500], &[5, 5], 1000), [250, 750]);
        assert_eq!(attribute(&[3, 7], &[5, 5], 0), [0, 0]);
        assert_eq!(attribute(&[0, 0], &[5, 5], 0), [0, 0]);
        assert_eq!(attribute(&[u64::MAX, u64::MAX], &[], u64::MAX), [u64::MAX / 2; 2]);
    }

    #[test]
    fn processor_time_tells_where_faults_do_not() {
        assert_eq!(attribute(&[0, 499], &[30, 10], 1000), [750, 250]);
        assert_eq!(attribute(&[], &[0, 10], 1000), [0, 1000]);
        assert_eq!(attribute(&[], &[u64::MAX, u64::MAX], u64::MAX), [u64::MAX / 2; 2]);
    }

    #[test]
    fn nothing_known_is_said_so() {
        assert!(attribute(&[], &[], 1000).is_empty());
        assert!(attribute(&[1, 2], &[], 1000).is_empty());
        assert!(attribute(&[1, 2], &[0, 0], 1000).is_empty());
        assert!(since(&[1, 2], &[]).is_empty());
        assert_eq!(since(&[5, 2], &[1, 3]), [4, 0]);
    }
}
