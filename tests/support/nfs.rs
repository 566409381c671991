//! A directory that two emulated hosts share by NFS 4.2: host 1's kernel serves it, and both mount it, so that locks go
//! by the server for either.
//!
//! The server needs no daemons: what they would answer to the kernel's questions is told to it beforehand.

use std::process::Command;

use crate::talk::until;

/// Where both have it.
pub const SHARED: &str = "/nfs";

/// Who may reach what: every client is "hosts", which may write to /srv (no root squash, no subtree check), the root of all that
/// is served (fsid 0). Version 3 would want an rpcbind.
/// No client of an earlier server has a lock to claim, so its 90 seconds for that are cut short.
const SERVE: &str = r"
set -e
modprobe nfsd
mkdir -p /srv /var/lib/nfs/v4recovery
mount -t tmpfs tmpfs /srv
mount -t nfsd nfsd /proc/fs/nfsd
ever=2147483000
for address in 10.77.0.1 10.77.0.2; do
    echo nfsd $address $ever hosts >/proc/net/rpc/auth.unix.ip/channel
done
echo hosts /srv $ever $((0x2402)) 65534 65534 0 >/proc/net/rpc/nfsd.export/channel
echo hosts 1 '\x00000000' $ever /srv >/proc/net/rpc/nfsd.fh/channel
echo -3 >/proc/fs/nfsd/versions
echo tcp 2049 >/proc/fs/nfsd/portlist
echo 2 >/proc/fs/nfsd/threads
echo Y >/proc/fs/nfsd/v4_end_grace
";

const MOUNT: &str = r"
modprobe nfsv4 && mkdir -p /nfs &&
mount -t nfs4 -o vers=4.2,sec=sys,proto=tcp,addr=10.77.0.1,clientaddr=10.77.0.$HOST 10.77.0.1:/ /nfs
";

fn shell(script: &str) -> Result<(), String> {
    let output = Command::new("sh").args(["-c", script]).output().unwrap();
    if output.status.success() { Ok(()) } else { Err(format!("{output:?}")) }
}

/// Host 1: serves.
pub fn serve() {
    shell(SERVE).unwrap();
}

/// Either: mounts, when it is served.
#[track_caller]
pub fn mount() {
    until("NFS is mounted", || match shell(MOUNT) {
        Ok(()) => Some(()),
        Err(why) => {
            eprintln!("{why}");
            None
        }
    });
}
