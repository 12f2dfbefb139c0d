#!/usr/bin/env python3
"""Checks a built libstts_plugins.so: GPU code for every architecture, exports, needed libraries.

    check_library.py --cubins 80,87 --ptx 87 --exports a,b --max GLIBC=2.35 libstts_plugins.so
    check_library.py libstts_plugins.so

Reads the ELF file itself, so that a cross-built library is checked without the target's tools.
Exit status: 0 all as asked, 1 something is not (each on one line), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

# Libraries that exist on every Linux machine. TensorRT and the CUDA runtime must not be needed:
# one .so serves several versions of the first and carries the second.
ALLOWED_LIBRARIES = (
    "libc.so", "libm.so", "libdl.so", "librt.so", "libpthread.so", "libstdc++.so", "libgcc_s.so",
    "ld-linux-",
)  # fmt: skip

SHT_DYNAMIC, SHT_DYNSYM, SHT_GNU_VERNEED = 6, 11, 0x6FFFFFFE
FATBIN_MAGIC = 0xBA55ED50
FATBIN_PTX, FATBIN_CUBIN = 1, 2


class LibraryError(Exception):
    """The file is not what it should be."""


class Section(NamedTuple):
    """One section of an ELF file."""

    name: str
    kind: int
    link: int
    data: bytes


@dataclass
class Library:
    """What was read from a shared library; architectures are numbers such as 87."""

    cubins: set[int] = field(default_factory=set)
    ptx: set[int] = field(default_factory=set)
    exports: set[str] = field(default_factory=set)
    needed: set[str] = field(default_factory=set)
    versions: set[tuple[str, tuple[int, ...]]] = field(default_factory=set)  # ("GLIBC", (2, 34))

    def newest(self, prefix: str) -> tuple[int, ...] | None:
        """The newest symbol version with this prefix, or None."""
        return max((number for name, number in self.versions if name == prefix), default=None)


def elf_sections(image: bytes) -> list[Section]:
    """Sections of a 64-bit little-endian ELF file."""
    if image[:6] != b"\x7fELF\x02\x01":
        raise LibraryError("not a 64-bit little-endian ELF file")
    offset, entry_size, count, names_index = struct.unpack_from("<Q10xHHH", image, 0x28)
    headers = [
        struct.unpack_from("<IIQQQQIIQQ", image, offset + i * entry_size) for i in range(count)
    ]
    names_offset = headers[names_index][4] if headers else 0
    sections = []
    for name, kind, _, _, start, size, link, *_ in headers:
        data = b"" if kind == 8 else image[start : start + size]  # 8: no bits in the file
        sections.append(Section(c_string(image, names_offset + name), kind, link, data))
    return sections


def c_string(data: bytes, offset: int) -> str:
    """The zero-terminated text at `offset`."""
    return data[offset : data.index(b"\0", offset)].decode()


def fatbin_entries(data: bytes) -> Iterator[tuple[int, int]]:
    """(kind, architecture) of each entry of a .nv_fatbin section.

    The section is a row of containers: magic u32, version u16, header size u16, size of the entries
    u64. An entry: kind u16, version u16, header size u32, payload size u64, ..., architecture u32
    at byte 28.
    """
    position = 0
    while position + 16 <= len(data):
        magic, _, header, size = struct.unpack_from("<IHHQ", data, position)
        if magic == 0:
            position += 8  # padding between containers
            continue
        if magic != FATBIN_MAGIC:
            raise LibraryError(f".nv_fatbin: unknown container 0x{magic:08x} at byte {position}")
        entry = position + header
        position = entry + size
        while entry < position:
            kind, _, entry_header, payload = struct.unpack_from("<HHIQ", data, entry)
            (architecture,) = struct.unpack_from("<I", data, entry + 28)
            if entry_header == 0 or kind not in (FATBIN_PTX, FATBIN_CUBIN):
                raise LibraryError(f".nv_fatbin: unknown entry of kind {kind} at byte {entry}")
            yield kind, architecture
            entry += entry_header + payload


def dynamic_exports(symbols: bytes, names: bytes) -> set[str]:
    """Names that the library defines for others (global or weak, not hidden)."""
    exports = set()
    for name, info, other, section, _, _ in struct.iter_unpack("<IBBHQQ", symbols):
        if section != 0 and info >> 4 != 0 and other & 3 in (0, 3):
            exports.add(c_string(names, name))
    return exports


def needed_versions(data: bytes, names: bytes) -> Iterator[tuple[str, tuple[int, ...]]]:
    """("GLIBC", (2, 34)) for each symbol version that the library needs from another."""
    position = 0
    while data:
        _, count, _, first, following = struct.unpack_from("<HHIII", data, position)
        item = position + first
        for _ in range(count):
            _, _, _, name, step = struct.unpack_from("<IHHII", data, item)
            prefix, _, number = c_string(names, name).rpartition("_")
            if all(part.isdigit() for part in number.split(".")):
                yield prefix, tuple(int(part) for part in number.split("."))
            item += step
        if following == 0:
            return
        position += following


def read_library(path: Path) -> Library:
    """Reads `path`; LibraryError when it is no whole ELF file."""
    try:
        return _read_library(path.read_bytes())
    except (struct.error, ValueError, IndexError) as error:
        raise LibraryError(f"damaged ELF file ({error})") from error


def _read_library(image: bytes) -> Library:
    library = Library()
    sections = elf_sections(image)
    for section in sections:
        names = sections[section.link].data if section.link else b""
        if section.name == ".nv_fatbin":
            for kind, architecture in fatbin_entries(section.data):
                (library.cubins if kind == FATBIN_CUBIN else library.ptx).add(architecture)
        elif section.kind == SHT_DYNSYM:
            library.exports = dynamic_exports(section.data, names)
        elif section.kind == SHT_DYNAMIC:
            for tag, value in struct.iter_unpack("<qQ", section.data):
                if tag == 1:
                    library.needed.add(c_string(names, value))
        elif section.kind == SHT_GNU_VERNEED:
            library.versions.update(needed_versions(section.data, names))
    return library


def problems(library: Library, arguments: argparse.Namespace) -> Iterator[str]:
    """What is not as asked for, one line each."""
    for what, asked, found in (
        ("cubin for sm_", arguments.cubins, library.cubins),
        ("PTX for compute_", arguments.ptx, library.ptx),
    ):
        if asked is not None and asked - found:
            yield f"no {what}{_listed(asked - found)}; it has {_listed(found)}"
    if arguments.exports is not None and library.exports != arguments.exports:
        missing, extra = arguments.exports - library.exports, library.exports - arguments.exports
        yield f"exports: missing {_listed(missing)}; not allowed {_listed(extra)}"
    needed = {name for name in library.needed if not name.startswith(ALLOWED_LIBRARIES)}
    if needed:
        yield f"needs {_listed(needed)}, which must be linked statically or loaded at run time"
    for prefix, allowed in arguments.max:
        newest = library.newest(prefix)
        if newest is not None and newest > allowed:
            yield f"needs {prefix}_{_dotted(newest)}; at most {_dotted(allowed)} is allowed"


def _listed(values: set[int] | set[str]) -> str:
    return ", ".join(str(value) for value in sorted(values)) or "none"


def _dotted(number: tuple[int, ...]) -> str:
    return ".".join(map(str, number))


def _numbers(text: str) -> set[int]:
    return {int(part) for part in text.split(",") if part}


def _names(text: str) -> set[str]:
    return {part for part in text.split(",") if part}


def _limit(text: str) -> tuple[str, tuple[int, ...]]:
    prefix, _, number = text.partition("=")
    return prefix, tuple(int(part) for part in number.split("."))


def _describe(library: Library) -> str:
    versions: dict[str, str] = {}
    for prefix in sorted({name for name, _ in library.versions}):
        versions[prefix] = _dotted(library.newest(prefix) or ())
    symbols = ", ".join(f"{prefix} {number}" for prefix, number in versions.items())
    return (
        f"cubins sm_{_listed(library.cubins)}; PTX compute_{_listed(library.ptx)}; "
        f"exports {_listed(library.exports)}; needs {_listed(library.needed)} ({symbols})"
    )


def main() -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(description="Checks a built libstts_plugins.so.")
    parser.add_argument("library", type=Path)
    parser.add_argument("--cubins", type=_numbers, help="architectures such as 80,87")
    parser.add_argument("--ptx", type=_numbers, help="architectures with PTX")
    parser.add_argument("--exports", type=_names, help="exactly these symbols")
    parser.add_argument("--max", type=_limit, action="append", default=[], metavar="GLIBC=2.35")
    parser.add_argument("--delete-on-failure", action="store_true")
    arguments = parser.parse_args()
    try:
        library = read_library(arguments.library)
        found = list(problems(library, arguments))
    except (OSError, LibraryError) as error:
        found = [str(error)]
    for line in found:
        print(f"error: {arguments.library}: {line}", file=sys.stderr)
    if found:
        if arguments.delete_on_failure:
            arguments.library.unlink(missing_ok=True)
        return 1
    print(f"{arguments.library.name}: {_describe(library)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
