# shellcheck shell=bash
# The userland that the guest's initramfs and its root file system have in common. Sourced.
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

# Fills the directory $1: busybox and its links, the little of /etc, mount points, the power button.
add_userland() {
    local root=$1 applet
    mkdir -p "$root"/{bin,dev,etc/acpi/PWRF,mnt,newroot,proc,root,run,sbin,sys,tmp,var}
    chmod 1777 "$root/tmp"
    cp "$TOOLS/usr/bin/busybox" "$root/bin/busybox"
    for applet in $("$root/bin/busybox" --list | grep -v '^busybox$'); do
        ln -s busybox "$root/bin/$applet"
    done
    echo 'root::0:0:root:/root:/bin/sh' >"$root/etc/passwd"
    echo 'root:x:0:' >"$root/etc/group"
    echo '127.0.0.1 localhost' >"$root/etc/hosts"
    echo "export PS1='\\h:\\w\\$ '" >"$root/etc/profile"
    # acpid's own output goes nowhere.
    printf '#!/bin/sh\necho "init: power button" >/dev/console\nsync\npoweroff -f\n' \
        >"$root/etc/acpi/PWRF/00000080"
    chmod +x "$root/etc/acpi/PWRF/00000080"
}
