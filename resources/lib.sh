# shellcheck shell=bash
# What the scripts of resources/ and tests/host/ share: where products lie, Debian's packages without
# installing them, and the programs in those packages. Sourced, never run.
#
# VMM_BUILD  directory of everything fetched or built here (default: build/ of the checkout)
#
# Nothing is installed and no root is needed: packages come through a private apt (own sources, lists
# and an empty dpkg status under $VMM_BUILD/apt), are unpacked into $VMM_BUILD/root and run from there
# with their own dynamic loader. So the same QEMU and the same tools serve on every machine.

set -euo pipefail
export LC_ALL=C

VMM_TOP=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VMM_BUILD=${VMM_BUILD:-$VMM_TOP/build}
mkdir -p "$VMM_BUILD"
VMM_BUILD=$(cd "$VMM_BUILD" && pwd)
export VMM_BUILD
# Private root of unpacked packages, its library directories and loader.
TOOLS=$VMM_BUILD/root
TOOLS_LIB=$TOOLS/usr/lib/x86_64-linux-gnu
# Debian's release whose packages are used, whatever release this machine runs.
SUITE=bookworm
# The QEMU that emulates hosts has a root of its own, from the release whose backports have a later one: up to
# 10.0 a VMEXIT clears a bit of the emulated CPU's pending interrupts while another thread sets one, which is
# then lost (the host sleeps for ever) or comes back (a guest or the host meets a triple fault).
EMULATOR=$VMM_BUILD/emulator
EMULATOR_SUITE=trixie

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() {
    say "$*"
    exit 1
}

# Runs the rest of the arguments unless the stamp file $1 exists and equals the text $2; writes it after.
once() {
    local stamp=$1 text=$2
    shift 2
    [ -e "$stamp" ] && [ "$(cat "$stamp")" = "$text" ] && return 0
    "$@"
    printf '%s\n' "$text" >"$stamp"
}

# Takes the lock $1 for the rest of this process: two runs that build the same product take turns.
lock() {
    exec 8>"$VMM_BUILD/.lock-$1"
    flock 8
}

# Prints the path of a program of the unpacked packages.
tool_path() {
    local file
    for file in "$TOOLS/usr/bin/$1" "$TOOLS/usr/sbin/$1"; do
        # An absolute link points into the packages' root, not this machine's.
        case $(readlink "$file") in /*) file=$TOOLS$(readlink "$file") ;; esac
        [ -x "$file" ] && echo "$file" && return
    done
    die "$1 is not among the unpacked packages: run tests/host/setup"
}

# Runs a program of the unpacked packages: tool NAME ARGS...
tool() {
    local name=$1 file
    shift
    file=$(tool_path "$name")
    "$TOOLS_LIB/ld-linux-x86-64.so.2" --library-path "$TOOLS_LIB" --argv0 "$name" "$file" "$@"
}

# Prints, a word a line, the command that starts the QEMU that emulates hosts.
emulator() {
    local lib=$EMULATOR/usr/lib/x86_64-linux-gnu share=$EMULATOR/usr/share
    printf '%s\n' "$lib/ld-linux-x86-64.so.2" --library-path "$lib" "$EMULATOR/usr/bin/qemu-system-x86_64" \
        -L "$share/qemu" -L "$share/seabios"
}

# Prints the shared libraries (paths under $TOOLS_LIB) that the programs named need, loader included.
libraries() {
    local f
    for f in "$@"; do
        "$TOOLS_LIB/ld-linux-x86-64.so.2" --library-path "$TOOLS_LIB" --list "$f" |
            awk '$2 == "=>" && $3 ~ /^\// { print $3 }'
    done | sort -u - <(echo "$TOOLS_LIB/ld-linux-x86-64.so.2")
}

# Packs the directory $1 as an uncompressed newc archive into the file $2, owned by root.
pack() {
    (cd "$1" && find . -mindepth 1 | sort | tool cpio --quiet -o -H newc -R 0:0) >"$2.new"
    mv "$2.new" "$2"
}

# Prints "URI suite" of each index that this machine's apt is set up for.
_mirrors() {
    apt-get update --print-uris -o Debug::NoLocking=true 2>/dev/null |
        sed -n "s|^'\(.*\)/dists/\([^/]*\)/InRelease'.*|\1 \2|p"
}

# Writes the private apt's sources for the release $1. Mirrors are this machine's own where it is a Debian
# one ($2 = own), else Debian's default.
_sources() {
    local suite=$1 main='' security='' keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    if [ "$2" = own ]; then
        main=$(_mirrors | awk '$2 ~ /^(bookworm|trixie|forky|testing|sid)$/ { print $1; exit }')
        security=$(_mirrors | awk '$2 ~ /^(bookworm|trixie|forky)-security$/ { print $1; exit }')
    fi
    main=${main:-http://deb.debian.org/debian}
    security=${security:-http://deb.debian.org/debian-security}
    [ -e "$keyring" ] || die "$keyring is missing: apt-get install debian-archive-keyring"
    printf "deb [arch=amd64 signed-by=$keyring] %s %s main\n" \
        "$main" "$suite" "$main" "$suite-backports" "$security" "$suite-security" \
        >"$VMM_BUILD/apt/$suite/sources.list"
}

# Makes the private apt for the release $1 ready and its lists fresh (once, unless another's come between).
apt_ready() {
    local suite=$1 dir=$VMM_BUILD/apt/$1
    [ "${_apt_is_ready:-}" = "$suite" ] && return 0
    mkdir -p "$dir/lists/partial" "$dir/cache/archives/partial" "$dir/none"
    : >"$dir/status"
    cat >"$dir/apt.conf" <<-EOF
	Dir::Etc::SourceList "$dir/sources.list";
	Dir::Etc::SourceParts "$dir/none";
	Dir::Etc::Preferences "$dir/none/preferences";
	Dir::Etc::PreferencesParts "$dir/none";
	Dir::State "$dir";
	Dir::State::Lists "$dir/lists";
	Dir::State::status "$dir/status";
	Dir::Cache "$dir/cache";
	APT::Architecture "amd64";
	APT::Sandbox::User "root";
	Debug::NoLocking "true";
	EOF
    export APT_CONFIG=$dir/apt.conf
    local which
    for which in own default; do
        APT_CONFIG='' _sources "$suite" "$which"
        if apt-get -qq update -o APT::Update::Error-Mode=any; then
            _apt_is_ready=$suite
            return 0
        fi
    done
    die "no package lists: is a Debian mirror reachable? (sources tried: $dir/sources.list)"
}

# Downloads the packages named ($3...) of the release $2 with all that they need, from its backports where
# they have them, and unpacks them into the directory $1. Maintainer scripts are not run.
unpack_packages() {
    local root=$1 suite=$2 deb part archives=$VMM_BUILD/apt/$2/cache/archives
    shift 2
    apt_ready "$suite"
    rm -rf "$archives"/*.deb "$root.new"
    apt-get -qq -y --no-install-recommends --download-only -t "$suite-backports" install "$@" >/dev/null
    # Debian's merged /usr, as the packages expect it.
    for part in bin sbin lib lib64; do
        mkdir -p "$root.new/usr/$part"
        ln -s "usr/$part" "$root.new/$part"
    done
    for deb in "$archives"/*.deb; do
        dpkg-deb --fsys-tarfile "$deb" |
            tar -x --keep-directory-symlink --no-same-owner --exclude='./usr/share/doc*' \
                --exclude='./usr/share/man*' --exclude='./usr/share/locale*' -C "$root.new"
    done
    rm -f "$archives"/*.deb
    rm -rf "$root"
    mv "$root.new" "$root"
}

# Copies modules of the kernel $1 (a name under $VMM_BUILD/kernels) and all that they depend on into
# the image root $2, unpacked, flat under /modules; their names are in /modules/order in loading order,
# and what each needs, itself last, in /modules/needs. Modules named ($3...) that this kernel has built in, or not at all, are left out.
add_modules() {
    local dir=$VMM_BUILD/kernels/$1 root=$2 release tree what path rest file
    shift 2
    release=$(cat "$dir/release")
    tree=$dir/modules/lib/modules/$release
    mkdir -p "$root/modules"
    awk -v names="$*" '
        function base(p) { sub(/.*\//, "", p); sub(/\.ko.*/, "", p); gsub(/-/, "_", p); return p }
        { sub(/:$/, "", $1); by[base($1)] = $0 }
        END {
            n = split(names, want, " ")
            for (i = 1; i <= n; i++) {
                # modules.dep lists what a module needs, nearest first; loading goes the other way.
                m = split(by[want[i]], files, " ")
                for (j = m; j >= 1; j--) {
                    if (!(files[j] in seen)) print "copy", files[j]
                    seen[files[j]] = 1
                    line = j == m ? base(files[j]) : line " " base(files[j])
                }
                if (m) print "needs", want[i], line
            }
        }' "$tree/modules.dep" |
        while read -r what path rest; do
            if [ "$what" = needs ]; then
                echo "$path: $rest" >>"$root/modules/needs"
                continue
            fi
            file=$(basename "${path%.xz}")
            file=${file//-/_}
            case $path in
            *.xz) tool xz -dc "$tree/$path" >"$root/modules/$file" ;;
            *) cp "$tree/$path" "$root/modules/$file" ;;
            esac
            unsign "$root/modules/$file"
            echo "$file" >>"$root/modules/order"
        done
}

# Cuts the signature off the end of a kernel module: checking it costs more under emulation than all
# else in loading it, and no kernel here enforces it. The file ends in the signature, 12 bytes whose
# last four are its length (big-endian), and a line of 28 bytes (Linux, scripts/sign-file.c).
unsign() {
    local length
    [ "$(tail -c 28 "$1")" = '~Module signature appended~' ] || return 0
    length=$((16#$(tail -c 32 "$1" | head -c 4 | od -An -v -t x1 | tr -d ' ')))
    truncate -s "-$((length + 12 + 28))" "$1"
}

kvm_opens() { (: <>/dev/kvm) 2>/dev/null; }

# Says where stock kernels can run: prints "direct", or "emulated" and, after a space, why.
# VMM_HOST=direct|emulated decides it.
host_kind() {
    local module=/sys/module
    case ${VMM_HOST:-} in
    direct) echo direct ;;
    emulated) echo "emulated VMM_HOST asks for it" ;;
    '')
        if [ ! -e /dev/kvm ]; then
            echo "emulated there is no /dev/kvm"
        elif ! kvm_opens; then
            echo "emulated /dev/kvm can't be opened (join its group: see ls -l /dev/kvm)"
        elif [ -d "$module/kvm_pvm" ]; then
            echo "emulated kvm_pvm can't run a stock kernel"
        elif [ -d "$module/kvm_intel" ] || [ -d "$module/kvm_amd" ]; then
            echo direct
        else
            echo "emulated nothing is known of this /dev/kvm (VMM_HOST=direct tries it)"
        fi
        ;;
    *) die "VMM_HOST=$VMM_HOST: direct or emulated" ;;
    esac
}
