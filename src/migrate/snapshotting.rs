//! Writes a VM to a directory; it goes on afterwards as it was.

use std::io;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use vmm_migration::channel::Flow;
use vmm_migration::guest::Live;
use vmm_migration::pages::PAGE_SIZE;
use vmm_migration::plan::MigrationId;
use vmm_migration::report::{Observer, micros};
use vmm_migration::snapshot::{self, Header, NotSaved, Saved, SnapshotError, Step, Storage};

use super::aside::aside;
use super::leaving::LiveGuest;
use super::outgoing::{limits, software};
use crate::chain::chain;
use crate::event::{ApiError, SnapshotRequest};
use crate::vm::Vm;

/// Writes a snapshot. Gives the VM back, as it was unless it couldn't be started again: then it is
/// paused; and what the client hears.
pub fn write(
    vm: Vm,
    request: &SnapshotRequest,
    observer: &mut dyn Observer,
) -> (Vm, Result<Value, ApiError>) {
    let mut guest = LiveGuest::new(vm);
    let header = match header(&mut guest) {
        Ok(header) => header,
        Err(why) => return (guest.into_vm(), Err(ApiError::internal(why))),
    };
    // Without a slash at its end, behind which a name beside it would be one inside it.
    let dir: PathBuf = request.dir.components().collect();
    let limits = limits(request.downtime_limit_ms, request.timeout_ms, request.on_timeout);
    let live = request.live.then_some(limits);
    match snapshot::save(&dir, guest, header, live, &mut OnAThread, observer) {
        Ok(Saved { guest, header, pages, stood }) => {
            let vm = guest.into_vm();
            let was_running = matches!(vm, Vm::Running(_));
            let told = json!({
                "dir": dir,
                "id": header.id.to_string(),
                "pages": pages,
                "memory_bytes": pages.saturating_mul(PAGE_SIZE as u64),
                "paused": !was_running,
                "stood_us": was_running.then(|| micros(stood)),
            });
            (vm, Ok(told))
        }
        Err(failed) => {
            let NotSaved { guest, error } = *failed;
            let vm = match guest {
                Ok(guest) => guest.into_vm(),
                Err(halted) => halted.into_vm(),
            };
            (vm, Err(answer(&error)))
        }
    }
}

/// Storage may be slow: this thread answers its clients meanwhile.
struct OnAThread;

impl Storage for OnAThread {
    fn beside(&mut self, work: Box<dyn FnOnce() + Send>) -> bool {
        std::thread::Builder::new().name("sums".to_owned()).spawn(work).is_ok()
    }

    fn take(&mut self, step: Step, poll: &mut dyn FnMut() -> Flow) -> io::Result<Flow> {
        match aside("sync", move || step.take(), poll)? {
            Some(taken) => taken.map(|()| Flow::Continue),
            None => Ok(Flow::Cancel),
        }
    }
}

fn answer(error: &SnapshotError) -> ApiError {
    match error {
        SnapshotError::Cancelled => ApiError::conflict("the snapshot was cancelled"),
        SnapshotError::Exists(_) => ApiError::conflict(chain(error)),
        SnapshotError::NoConvergence { .. } | SnapshotError::Unreachable { .. } => {
            ApiError::conflict(format!("no snapshot was written: {}", chain(error)))
        }
        _ => ApiError::internal(format!("no snapshot was written: {}", chain(error))),
    }
}

fn header(guest: &mut LiveGuest) -> Result<Header, String> {
    let mut id = [0; 16];
    rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())
        .map_err(|e| e.to_string())?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Ok(Header {
        id: MigrationId(id),
        software: software(),
        created_unix_ms: u64::try_from(now.as_millis()).unwrap_or(u64::MAX),
        plan: guest.plan(u16::MAX).map_err(|e| e.to_string())?,
    })
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::OwnedFd;
    use std::sync::mpsc;

    use vmm_migration::report::{Progress, Stage};

    use super::*;
    use crate::config::Config;
    use crate::event::{Answer, Event, GuestExit, Reply, Request};
    use crate::watch::{Errand, Watch};

    /// A file that takes no more than a pipe does until somebody reads.
    fn slow_write(bytes: usize) -> (std::io::PipeReader, Step) {
        let (reader, writer) = std::io::pipe().unwrap();
        let file = File::from(OwnedFd::from(writer));
        (reader, Step::Write { file, path: "pipe".into(), bytes: vec![7; bytes] })
    }

    #[test]
    fn who_waits_for_storage_looks_up_and_may_go() {
        let (mut reader, step) = slow_write(1 << 20);
        let mut looks = 0;
        let mut poll = || {
            looks += 1;
            if looks == 3 { Flow::Cancel } else { Flow::Continue }
        };
        assert_eq!(OnAThread.take(step, &mut poll).unwrap(), Flow::Cancel);
        assert_eq!(looks, 3);
        // It goes on by itself.
        let mut all = Vec::new();
        assert_eq!(reader.read_to_end(&mut all).unwrap(), 1 << 20);

        let (mut reader, step) = slow_write(1 << 20);
        let mut read = 0;
        let mut poll = || {
            read += reader.read(&mut vec![0; 1 << 19]).unwrap();
            Flow::Continue
        };
        assert_eq!(OnAThread.take(step, &mut poll).unwrap(), Flow::Continue);
        assert!(read > 0);
        let (reader, step) = slow_write(1 << 20);
        drop(reader);
        OnAThread.take(step, &mut || Flow::Continue).unwrap_err();
    }

    /// The control thread as it waits for a disk that never comes to an end: it tells where it is, and ends when it is told.
    #[test]
    fn clients_are_heard_while_storage_is_slow() {
        let golden = include_str!("../config/golden-v1.json");
        let config = Config::restore(golden.lines().next().unwrap().as_bytes()).unwrap();
        let (events, inbox) = mpsc::channel();
        let ask = |request| {
            let (reply, answers) = Reply::channel();
            events.send(Event::Request { request, reply }).unwrap();
            answers
        };
        let answer = |answers: &mpsc::Receiver<Answer>| match answers.try_recv().unwrap() {
            Answer::Done(told) => told,
            other => panic!("{other:?}"),
        };
        let progress = Progress { stage: Stage::Commitment, ..Progress::default() };
        let mut deferred = VecDeque::new();
        let mut watch = Watch::new(Errand::Snapshot, &inbox, &mut deferred, &config, None);

        let (_reader, step) = slow_write(1 << 20);
        let (info, pause) = (ask(Request::Info), ask(Request::Pause));
        let mut cancel = None;
        let mut poll = || {
            let flow = watch.observe(&progress);
            cancel.get_or_insert_with(|| ask(Request::CancelSnapshot));
            flow
        };
        assert_eq!(OnAThread.take(step, &mut poll).unwrap(), Flow::Cancel);
        let info = answer(&info).unwrap();
        assert_eq!(
            (&info["state"], &info["snapshot"]["stage"]),
            (&"snapshotting".into(), &"commitment".into())
        );
        assert_eq!(answer(&pause).unwrap_err().status, 409);
        assert_eq!(answer(&cancel.unwrap()).unwrap(), json!({}));

        let mut watch = Watch::new(Errand::Snapshot, &inbox, &mut deferred, &config, None);
        let (_reader, step) = slow_write(1 << 20);
        events.send(Event::Signal(15)).unwrap();
        let mut poll = || watch.observe(&progress);
        assert_eq!(OnAThread.take(step, &mut poll).unwrap(), Flow::Cancel);
        assert!(
            matches!(deferred.pop_front(), Some(Event::Signal(15))),
            "it is acted on afterwards"
        );
    }

    /// What is written is whole when it is made durable; before that, it ends with its guest. A migration does at any time.
    #[test]
    fn a_guest_that_ends_takes_no_snapshot_along_that_has_all_of_it() {
        let golden = include_str!("../config/golden-v1.json");
        let config = Config::restore(golden.lines().next().unwrap().as_bytes()).unwrap();
        for (errand, stage, flow) in [
            (Errand::Snapshot, Stage::Commitment, Flow::Continue),
            (Errand::Snapshot, Stage::StopAndCopy, Flow::Cancel),
            (Errand::Snapshot, Stage::PreCopy, Flow::Cancel),
            (Errand::Migration, Stage::Commitment, Flow::Cancel),
        ] {
            let ((events, inbox), mut deferred) = (mpsc::channel(), VecDeque::new());
            events.send(Event::Guest(GuestExit::PowerOff)).unwrap();
            let mut watch = Watch::new(errand, &inbox, &mut deferred, &config, None);
            let progress = Progress { stage, ..Progress::default() };
            assert_eq!(watch.observe(&progress), flow, "{errand:?} {stage:?}");
            assert!(matches!(deferred.pop_front(), Some(Event::Guest(_))), "it is acted on then");
        }
    }
}
