"""Plugin registries: a library is looked at, not loaded, and its one plugin becomes known."""

from __future__ import annotations

import platform
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.standins.api import Capsule, WeakShell

if TYPE_CHECKING:
    from tests.standins.state import State

_MACHINES = {62: "x86_64", 183: "aarch64"}
_DYNSYM = 11


@dataclass
class ElfFile:
    """What the dynamic loader would see."""

    machine: str
    exports: frozenset[str]

    @classmethod
    def read(cls, file: Path) -> ElfFile:
        """Read a 64-bit little-endian ELF file.

        Raises:
            ValueError: it is none.
        """
        data = file.read_bytes()
        if data[:6] != b"\x7fELF\x02\x01":
            raise ValueError("file too short" if len(data) < 64 else "invalid ELF header")
        machine = struct.unpack_from("<H", data, 18)[0]
        offset, size, count = (
            *struct.unpack_from("<Q", data, 40),
            *struct.unpack_from("<HH", data, 58),
        )
        sections = [
            struct.unpack_from("<IIQQQQIIQQ", data, offset + i * size) for i in range(count)
        ]
        names: set[str] = set()
        for section in sections:
            if section[1] == _DYNSYM:
                strings = sections[section[6]]
                for at in range(section[4], section[4] + section[5], 24):
                    name, _, _, index = struct.unpack_from("<IBBH", data, at)
                    if name and index:  # index 0: undefined, asked of another library
                        start = strings[4] + name
                        names.add(data[start : data.index(b"\0", start)].decode())
        return cls(_MACHINES.get(machine, str(machine)), frozenset(names))


class PluginCreator(WeakShell):
    """SttsSelectPack's creator, as `all_creators` lists it."""

    API = "IPluginCreatorV3One"

    def __init__(self, name: str, version: str, namespace: str) -> None:
        self.name = name
        self.plugin_version = version
        self.plugin_namespace = namespace


class Library(Capsule):
    """A loaded library."""

    def __init__(self, path: str, creators: list[PluginCreator]) -> None:
        self.path = path
        self.creators = creators


class PluginRegistry(WeakShell):
    """The global registry, or a builder's or runtime's own with the global one as its parent."""

    API = "IPluginRegistry"

    def __init__(self, state: State, parent: PluginRegistry | None = None) -> None:
        self._state = state
        self._parent = parent
        self._libraries: list[Library] = []
        self.error_recorder: Any = None
        self.parent_search_enabled = True

    def load_library(self, plugin_path: str) -> Library | None:
        path = Path(plugin_path)
        where = "pluginRegistry.cpp::loadLibrary"
        try:
            elf = ElfFile.read(path)
        except (OSError, ValueError) as error:
            self._state.error(f"[{where}] Unable to load library: {path}: {error}")
            return None
        if elf.machine != platform.machine():
            self._state.error(f"[{where}] Unable to load library: {path}: wrong ELF class")
            return None
        if "getCreators" not in elf.exports:
            self._state.error(
                f"[{where}] Could not find getCreators or getPluginCreators in {path}"
            )
            return None
        if self._find("SttsSelectPack", "1", "stts", only_here=True) is not None:
            self._state.error(f"[{where}] Plugin SttsSelectPack is already registered: {path}")
            return None
        library = Library(str(path), [PluginCreator("SttsSelectPack", "1", "stts")])
        self._libraries.append(library)
        return library

    def deregister_library(self, handle: Library) -> None:
        if handle not in self._libraries:
            self._state.error("deregisterLibrary: unknown handle")
            return
        self._libraries.remove(handle)

    def get_creator(
        self, type: str, version: str, plugin_namespace: str = ""
    ) -> PluginCreator | None:
        found = self._find(type, version, plugin_namespace)
        if found is None:
            self._state.error(
                f"IPluginRegistry::getCreator: Error Code 4: API Usage Error (Cannot find plugin:"
                f" {type}, version: {version}, namespace:{plugin_namespace}.)"
            )
        return found

    def get_plugin_creator(
        self, type: str, version: str, plugin_namespace: str = ""
    ) -> PluginCreator | None:
        """V1 creators only: SttsSelectPack's is none."""
        self._state.error(f"getPluginCreator could not find plugin: {type} version: {version}")
        return None

    @property
    def all_creators(self) -> list[PluginCreator]:
        return [creator for library in self._libraries for creator in library.creators]

    @property
    def all_creators_recursive(self) -> list[PluginCreator]:
        parents = self._parent.all_creators_recursive if self._parent else []
        return self.all_creators + parents

    @property
    def plugin_creator_list(self) -> list[PluginCreator]:
        return []

    def has(self, name: str, version: str, namespace: str) -> bool:
        """Whether a plugin can be created; says nothing to the logger."""
        return self._find(name, version, namespace) is not None

    def _find(
        self, name: str, version: str, namespace: str, *, only_here: bool = False
    ) -> PluginCreator | None:
        for creator in self.all_creators:
            if (creator.name, creator.plugin_version, creator.plugin_namespace) == (
                name, version, namespace,
            ):  # fmt: skip
                return creator
        if self._parent is not None and self.parent_search_enabled and not only_here:
            return self._parent._find(name, version, namespace)
        return None
