#!/bin/sh
# Makes the packed kernels of the tests: a tiny ELF, and it in every compression of Linux's build, with
# the options of scripts/Makefile.lib. Needs python3, gzip, zstd, xz, lz4, bzip2, lzop.
set -e
cd "$(dirname "$0")"
python3 - <<'PY'
import struct
# Segment A: code-like bytes with x86 calls (the BCJ filter changes them), then noise.
a, x = b"", 1
for i in range(300):
    a += b"\x55\x48\x89\xe5\xe8" + struct.pack("<i", 4096 - 13 * i) + b"\x5d\xc3\x90\x90"
for i in range(900):
    x = (x * 1103515245 + 12345) % 2**31
    a += bytes([x >> 16 & 255])
# Segment B: data, two pages of zeros, data; then bss. Behind it a tail that is not loaded.
b = b"data" * 256 + bytes(3 * 4096 - 1024) + b"more" * 100
off_a, off_b = 4096, 12288
phdr = lambda kind, off, va, pa, fs, ms: struct.pack("<IIQQQQQQ", kind, 7, off, va, pa, fs, ms, 4096)
note = struct.pack("<III4sQ", 4, 8, 18, b"Xen\0", 0x1000010)
elf = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, 62, 1, 0x1000020, 64, 0, 0, 64, 56, 3, 0, 0, 0)
elf += phdr(1, off_a, 0xffffffff81000000, 0x1000000, len(a), len(a))
elf += phdr(1, off_b, 0xffffffff81200000, 0x1200800, len(b), len(b) + 10000)
elf += phdr(4, 512, 0, 0, len(note), len(note))
elf = elf.ljust(512, b"\0") + note
elf = elf.ljust(off_a, b"\0") + a
elf = elf.ljust(off_b, b"\0") + b + b"tail" * 500
open("tiny.elf", "wb").write(elf)
PY
size() { python3 -c 'import struct,sys; sys.stdout.buffer.write(struct.pack("<I", len(open("tiny.elf","rb").read())))'; }
gzip -n -9 -c tiny.elf >tiny.gzip
{ zstd -q -22 --ultra -c <tiny.elf; size; } >tiny.zstd
{ xz --check=crc32 --x86 --lzma2=dict=32MiB -c <tiny.elf; size; } >tiny.xz
{ xz --format=lzma -9 -c <tiny.elf; size; } >tiny.lzma
{ lz4 -q -l -9 -c <tiny.elf; size; } >tiny.lz4
{ bzip2 -9 -c <tiny.elf; size; } >tiny.bzip2
{ lzop -9 -c <tiny.elf; size; } >tiny.lzo
