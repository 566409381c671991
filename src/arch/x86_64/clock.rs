//! The guest's time: kvmclock, and each vCPU's TSC, carried from one host to another.
//!
//! After Documentation/virt/kvm/devices/vcpu.rst (`KVM_VCPU_TSC_OFFSET`): the source notes kvmclock,
//! real time and guest TSCs of one moment. The destination sets kvmclock ahead by the time gone by
//! ([`crate::downtime`]), reads it back, and sets every TSC ahead by just as much through its offset. So kvmclock and
//! TSCs stay in step, and vCPUs whose TSCs were equal have equal offsets, which KVM's master clock asks
//! for. What is saved is kvmclock as the guest saw it, which may have drifted from KVM's own.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, Msrs, kvm_clock_data, kvm_msr_entry};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use vmm_devices::GuestRam;
use vmm_migration::state::{RestoreError, SaveError, Section, Stateful};

use super::{msr, pvclock, vcpu_ioctl};
use crate::downtime::{Ahead, Downtime};

const KIND: &str = "clock";

/// Host and guest frequencies that KVM takes for the same, in parts per million.
const TSC_TOLERANCE_PPM: u64 = 250;
/// Longest believable time between KVM's reading of the clock and ours of the TSC, in milliseconds. A
/// greater difference means that KVM scales the TSC, and then the reading counts, not the sum.
const SAMPLE_GAP_MS_MAX: u64 = 1;
/// The most that kvmclock as the guest sees it is believed to have drifted, in nanoseconds: KVM writes it anew every
/// five minutes, and its page is the guest's to change.
const DRIFT_NS_MAX: u64 = 1_000_000_000;
/// How often the clocks are read at most, where no single call tells both.
const READINGS_MAX: u32 = 12;

/// The guest's time at one moment, version 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockStateV1 {
    /// kvmclock, in nanoseconds.
    pub kvmclock_ns: u64,
    /// Real time (`CLOCK_REALTIME` of the host) at that moment, in nanoseconds.
    pub realtime_ns: u64,
    /// Frequency of the guest's TSC, in kHz.
    pub tsc_khz: u32,
    /// Each vCPU's TSC at that moment.
    pub tsc: Vec<u64>,
}

/// kvmclock, real time and TSCs of one moment, with the offsets that were in force.
struct Sample {
    kvmclock_ns: u64,
    realtime_ns: u64,
    tsc: Vec<u64>,
    /// Whether KVM told both clocks of one moment: then kvmclock is made from the TSC.
    exact: bool,
    /// `None` on a kernel without the attribute.
    offsets: Option<Vec<u64>>,
}

/// The guest's time, as a part of its machine. It is restored before the vCPUs, which arm their timers
/// by it.
pub struct ClockPart<'a> {
    /// The VM.
    pub vm: &'a VmFd,
    /// All of its vCPUs, by index.
    pub vcpus: &'a [&'a VcpuFd],
    /// Guest RAM, where each vCPU's kvmclock is.
    pub ram: &'a GuestRam,
    /// Whether the time since the save passes for the guest. No matter on save.
    pub downtime: Downtime,
}

/// The clocks' state among the sections, if it can be read.
#[must_use]
pub fn saved_among(sections: &[Section]) -> Option<ClockStateV1> {
    let section = sections.iter().find(|section| section.kind == KIND)?;
    vmm_migration::state::decode::<ClockPart<'_>>(section).ok()
}

impl Stateful for ClockPart<'_> {
    const KIND: &'static str = KIND;
    const VERSION: u16 = 1;
    type State = ClockStateV1;

    fn save(&self) -> Result<ClockStateV1, SaveError> {
        let fail = |(what, source): Failure| SaveError { kind: KIND, what, source: source.into() };
        let tsc_khz = tsc_khz(self.vcpus).map_err(fail)?;
        let Sample { mut kvmclock_ns, realtime_ns, tsc, exact, offsets: _ } =
            sample(self.vm, self.vcpus, tsc_khz).map_err(fail)?;
        if !exact {
            let seen = self.vcpus.iter().zip(&tsc);
            let seen = seen.filter_map(|(vcpu, tsc)| pvclock::seen_ns(vcpu, self.ram, *tsc));
            let believed = |ns: &u64| ns.abs_diff(kvmclock_ns) <= DRIFT_NS_MAX;
            // The latest: no vCPU's clock may go back.
            let latest = seen.filter(believed).max().unwrap_or(kvmclock_ns);
            tracing::debug!("kvmclock: {kvmclock_ns} ns, {latest} ns as the guest sees it");
            kvmclock_ns = latest;
        }
        Ok(ClockStateV1 { kvmclock_ns, realtime_ns, tsc_khz, tsc })
    }

    fn restore(&mut self, state: ClockStateV1) -> Result<(), RestoreError> {
        let fail = |(what, source): Failure| RestoreError::Kernel {
            kind: KIND,
            what,
            source: source.into(),
        };
        let Self { vm, vcpus, ram: _, downtime } = *self;
        if state.tsc.len() != vcpus.len() {
            let why = format!("{} TSCs for {} vCPUs", state.tsc.len(), vcpus.len());
            return Err(RestoreError::Invalid { kind: KIND, why });
        }
        let host_khz = tsc_khz(vcpus).map_err(fail)?;
        if host_khz != state.tsc_khz {
            if !tsc_fits(state.tsc_khz, host_khz, vm.check_extension(Cap::TscControl)) {
                let why = format!(
                    "the guest's TSC runs at {} kHz, this host's at {host_khz} kHz and can't be scaled",
                    state.tsc_khz
                );
                return Err(RestoreError::Invalid { kind: KIND, why });
            }
            for vcpu in vcpus {
                vcpu.set_tsc_khz(state.tsc_khz).map_err(|e| fail(("KVM_SET_TSC_KHZ", e)))?;
            }
        }
        set_kvmclock(vm, &state, downtime).map_err(fail)?;
        set_tscs(vm, vcpus, &state).map_err(fail)
    }
}

/// Sets every TSC ahead of its saved value by the time that kvmclock is ahead of its own.
fn set_tscs(vm: &VmFd, vcpus: &[&VcpuFd], state: &ClockStateV1) -> Result<(), Failure> {
    let now = sample(vm, vcpus, state.tsc_khz)?;
    let elapsed_ns = now.kvmclock_ns.saturating_sub(state.kvmclock_ns);
    let ahead = ticks(elapsed_ns, state.tsc_khz);
    for (i, vcpu) in vcpus.iter().enumerate() {
        let wanted = state.tsc[i].wrapping_add(ahead);
        match &now.offsets {
            Some(offsets) => {
                let offset = offsets[i].wrapping_add(wanted.wrapping_sub(now.tsc[i]));
                vcpu_ioctl::set_tsc_offset(vcpu, offset).map_err(|e| ("KVM_VCPU_TSC_OFFSET", e))?;
            }
            // Writes within a second of each other KVM takes for one: TSCs stay equal.
            None => write_tsc(vcpu, wanted)?,
        }
    }
    Ok(())
}

/// Whether a guest whose TSC runs at `guest_khz` can go on here: the frequencies are the same within
/// KVM's tolerance, or the host scales.
#[must_use]
pub fn tsc_fits(guest_khz: u32, host_khz: u32, scaling: bool) -> bool {
    let apart = u64::from(guest_khz.abs_diff(host_khz));
    guest_khz != 0 && (scaling || apart * 1_000_000 <= u64::from(host_khz) * TSC_TOLERANCE_PPM)
}

/// Tells the guest that it was paused (`KVM_KVMCLOCK_CTRL`), so that its watchdogs don't count the
/// pause as a lockup. To be called for every vCPU before it runs again. A guest without kvmclock can't
/// be told, and some KVMs can't tell: neither is an error.
///
/// # Errors
/// KVM's others.
pub fn pause_notify(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    match vcpu.kvmclock_ctrl() {
        Err(e) if !matches!(e.errno(), libc::EINVAL | libc::ENOTTY) => Err(e),
        _ => Ok(()),
    }
}

/// The call that failed, and KVM's answer.
type Failure = (&'static str, kvm_ioctls::Error);

fn tsc_khz(vcpus: &[&VcpuFd]) -> Result<u32, Failure> {
    vcpus.first().map_or(Ok(0), |vcpu| vcpu.get_tsc_khz().map_err(|e| ("KVM_GET_TSC_KHZ", e)))
}

fn sample(vm: &VmFd, vcpus: &[&VcpuFd], khz: u32) -> Result<Sample, Failure> {
    let first =
        vcpus.first().ok_or(("KVM_GET_CLOCK without a vCPU", kvm_ioctls::Error::new(libc::EIO)))?;
    let offsets: Option<Vec<u64>> = vcpus
        .iter()
        .map(|vcpu| vcpu_ioctl::tsc_offset(vcpu).map_err(|e| ("KVM_VCPU_TSC_OFFSET", e)))
        .collect::<Result<_, _>>()?;
    let first_offset = offsets.as_ref().and_then(|offsets| offsets.first().copied());
    let reading = closest(
        || {
            let clock = vm.get_clock().map_err(|e| ("KVM_GET_CLOCK", e))?;
            let told = clock.flags & KVM_CLOCK_REALTIME != 0;
            let realtime_ns = if told { clock.realtime } else { realtime_now() };
            Ok(Reading { clock, realtime_ns, tsc: read_tsc(first)? })
        },
        || read_tsc(first),
        |reading| exact_tsc(reading.tsc, first_offset, reading.host_tsc(), khz).is_some(),
    )?;
    let host_tsc = reading.host_tsc();
    let Reading { clock, realtime_ns, tsc } = reading;
    let mut tscs = vec![tsc];
    for vcpu in vcpus.iter().skip(1) {
        tscs.push(read_tsc(vcpu)?);
    }
    if let Some(offsets) = &offsets {
        tscs = at_one_moment(tsc, offsets, host_tsc, khz);
    }
    let exact = host_tsc.is_some();
    Ok(Sample { kvmclock_ns: clock.clock, realtime_ns, tsc: tscs, exact, offsets })
}

/// A reading whose TSC is known to the tick. If there is none (KVM doesn't tell the host's TSC, or scales), the host
/// may have done something else between clock and TSC: the reading that took least of a few is taken, or else the
/// guest would find its TSC and kvmclock apart after a move.
fn closest(
    mut read: impl FnMut() -> Result<Reading, Failure>,
    mut read_tsc: impl FnMut() -> Result<u64, Failure>,
    is_exact: impl Fn(&Reading) -> bool,
) -> Result<Reading, Failure> {
    let (mut best, mut least_ticks) = (read()?, u64::MAX);
    for _ in 0..READINGS_MAX {
        if is_exact(&best) {
            break;
        }
        let before = read_tsc()?;
        let reading = read()?;
        let took_ticks = reading.tsc.wrapping_sub(before);
        if took_ticks < least_ticks || is_exact(&reading) {
            (best, least_ticks) = (reading, took_ticks);
        }
    }
    Ok(best)
}

/// The clocks, and the first vCPU's TSC just after.
struct Reading {
    clock: kvm_clock_data,
    realtime_ns: u64,
    tsc: u64,
}

impl Reading {
    /// The host's TSC at the clock's moment, if KVM told it.
    fn host_tsc(&self) -> Option<u64> {
        (self.clock.flags & KVM_CLOCK_HOST_TSC != 0).then_some(self.clock.host_tsc)
    }
}

fn read_tsc(vcpu: &VcpuFd) -> Result<u64, Failure> {
    let read = msr::get(vcpu, msr::index::TSC).map_err(|e| ("KVM_GET_MSRS", e))?;
    read.ok_or(("KVM_GET_MSRS of the TSC", kvm_ioctls::Error::new(libc::EIO)))
}

/// The first vCPU's TSC at the moment of KVM's clock reading, to the tick, where KVM told the host's TSC of that
/// moment and doesn't scale. It is not believed if the guest's TSC, which was read just after, says otherwise.
fn exact_tsc(first: u64, offset: Option<u64>, host_tsc: Option<u64>, khz: u32) -> Option<u64> {
    let sum = host_tsc?.wrapping_add(offset?);
    (first.wrapping_sub(sum) <= SAMPLE_GAP_MS_MAX * u64::from(khz)).then_some(sum)
}

/// The TSCs at the moment of KVM's clock reading: the first exactly if that can be, else as it was read just after;
/// the others by their offsets.
fn at_one_moment(first: u64, offsets: &[u64], host_tsc: Option<u64>, khz: u32) -> Vec<u64> {
    let exact = exact_tsc(first, offsets.first().copied(), host_tsc, khz);
    let base = exact.unwrap_or(first).wrapping_sub(offsets.first().copied().unwrap_or(0));
    offsets.iter().map(|offset| base.wrapping_add(*offset)).collect()
}

fn set_kvmclock(vm: &VmFd, state: &ClockStateV1, downtime: Downtime) -> Result<(), Failure> {
    let by_kvm = vm.check_extension_int(Cap::AdjustClock) & KVM_CLOCK_REALTIME.cast_signed() != 0;
    let mut clock = kvm_clock_data { clock: state.kvmclock_ns, ..kvm_clock_data::default() };
    let realtime_ns = realtime_now();
    match downtime.ahead(state.realtime_ns, realtime_ns, Instant::now()) {
        Ahead::RealTime if by_kvm => {
            clock.flags = KVM_CLOCK_REALTIME;
            clock.realtime = state.realtime_ns;
        }
        Ahead::RealTime => {
            let gone_ns = realtime_ns.saturating_sub(state.realtime_ns);
            clock.clock = clock.clock.saturating_add(gone_ns);
        }
        Ahead::Of(time) => {
            let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
            clock.clock = clock.clock.saturating_add(ns);
        }
    }
    vm.set_clock(&clock).map_err(|e| ("KVM_SET_CLOCK", e))
}

fn write_tsc(vcpu: &VcpuFd, data: u64) -> Result<(), Failure> {
    let entry = kvm_msr_entry { index: msr::index::TSC, data, ..kvm_msr_entry::default() };
    let msrs = Msrs::from_entries(&[entry]).expect("one entry fits");
    match vcpu.set_msrs(&msrs) {
        Ok(1) => Ok(()),
        Ok(_) => Err(("KVM_SET_MSRS of the TSC", kvm_ioctls::Error::new(libc::EIO))),
        Err(e) => Err(("KVM_SET_MSRS", e)),
    }
}

/// Nanoseconds in ticks of a TSC.
fn ticks(ns: u64, khz: u32) -> u64 {
    let ticks = u128::from(ns) * u128::from(khz) / 1_000_000;
    u64::try_from(ticks).unwrap_or(u64::MAX)
}

/// The host's real time, in nanoseconds.
pub fn realtime_now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequencies_fit_within_the_tolerance_or_scaled() {
        assert!(tsc_fits(2_000_000, 2_000_000, false));
        assert!(tsc_fits(2_000_500, 2_000_000, false));
        assert!(!tsc_fits(2_000_501, 2_000_000, false));
        assert!(tsc_fits(3_000_000, 2_000_000, true));
        assert!(!tsc_fits(0, 2_000_000, true));
    }

    #[test]
    fn ticks_do_not_overflow() {
        assert_eq!(ticks(1_000_000_000, 2_500_000), 2_500_000_000);
        assert_eq!(ticks(u64::MAX, u32::MAX), u64::MAX);
    }

    #[test]
    fn tscs_are_exact_unless_scaled() {
        let khz = 1_000_000;
        // 1000 + 500 at the clock's moment, read 40 ticks later.
        assert_eq!(at_one_moment(1540, &[500, 500, 600], Some(1000), khz), [1500, 1500, 1600]);
        // Scaled: the sum is far off. No host TSC: nothing to sum.
        assert_eq!(at_one_moment(9_000_000, &[500, 600], Some(1000), khz), [9_000_000, 9_000_100]);
        assert_eq!(at_one_moment(1540, &[500, 600], None, khz), [1540, 1640]);
        // Offsets are negative as a rule.
        let offset = 0_u64.wrapping_sub(900);
        assert_eq!(at_one_moment(101, &[offset], Some(1000), khz), [100]);
    }

    #[test]
    fn a_reading_that_was_interrupted_is_taken_again() {
        let reading = |host_tsc: u64, tsc: u64| {
            let clock =
                kvm_clock_data { flags: KVM_CLOCK_HOST_TSC, host_tsc, ..Default::default() };
            Ok(Reading { clock, realtime_ns: 0, tsc })
        };
        let take = |mut readings: Vec<(u64, u64)>, before: u64, khz| {
            readings.reverse();
            let read = || {
                let (host_tsc, tsc) = readings.pop().expect("no more is wanted");
                reading(host_tsc, tsc)
            };
            let is_exact = |r: &Reading| exact_tsc(r.tsc, Some(0), r.host_tsc(), khz).is_some();
            closest(read, || Ok(before), is_exact).unwrap().tsc
        };
        // At 1 GHz: the first TSC is read 2.4 ms after the clock, the next 50 ns.
        assert_eq!(take(vec![(1000, 2_401_000), (3_000_000, 3_000_050)], 0, 1_000_000), 3_000_050);
        // Scaled, so that none is exact: the one that took least.
        let scaled = [(0, 9_000_000), (0, 9_005_000), (0, 9_000_040), (0, 9_002_000)];
        let scaled = scaled.into_iter().cycle().take(13).collect();
        assert_eq!(take(scaled, 9_000_000, 1_000_000), 9_000_000);
    }
}
