//! Writes a VM to a directory; it goes on afterwards as it was.

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use vmm_migration::guest::Live;
use vmm_migration::pages::PAGE_SIZE;
use vmm_migration::plan::MigrationId;
use vmm_migration::report::{Observer, micros};
use vmm_migration::snapshot::{self, Header, NotSaved, Saved, SnapshotError};

use super::leaving::LiveGuest;
use super::outgoing::software;
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
    match snapshot::save(&dir, guest, header, request.live, observer) {
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

fn answer(error: &SnapshotError) -> ApiError {
    match error {
        SnapshotError::Cancelled => ApiError::conflict("the snapshot was cancelled"),
        SnapshotError::Exists(_) => ApiError::conflict(chain(error)),
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
