"""The library `libstts_plugins.so`: where it lies, whether it is ours, and loading it.

Found by, in this order: the caller, the environment variable STTS_PLUGIN_PATH, the bundle, the
build tree of a source checkout.
"""

from __future__ import annotations

import ctypes
import logging
import os
import struct
from pathlib import Path
from typing import Any

from stts_export._version import __version__
from stts_export.errors import InputError, MissingDependencyError

PLUGIN_VARIABLE = "STTS_PLUGIN_PATH"
PLUGIN_FOLDER = "plugins"
PLUGIN_FILE = "libstts_plugins.so"
PLUGIN_NAME, PLUGIN_VERSION, PLUGIN_NAMESPACE = "SttsSelectPack", "1", "stts"

_loaded: Path | None = None
"""What `load_plugin` made known to TensorRT; it stays for the life of the process."""
_log = logging.getLogger(__name__)

_BUILD_TREE = Path(__file__).parents[2] / "build" / "release" / PLUGIN_FILE
_HOW = (
    "cmake --preset release && cmake --build --preset release in a source checkout of stts-export "
    f"{__version__}, then pass it with --plugin or {PLUGIN_VARIABLE}"
)


def find_plugin(given: Path | None = None, bundle: Path | None = None) -> Path:
    """Return the plugin library, after checking its version.

    Args:
        given: the caller's choice.
        bundle: folder that may hold one.

    Raises:
        InputError: a library that was chosen, or found first, is missing, is no library of ours,
            or is of another version.
        MissingDependencyError: there is none.
    """
    chosen = _chosen(given)
    if chosen is not None:
        source = "--plugin" if given else PLUGIN_VARIABLE
        if not chosen.is_file():
            raise InputError(f"is no file (named by {source})", where=str(chosen), fix=_HOW)
        return check_plugin(chosen)
    places = [*([bundle / PLUGIN_FOLDER / PLUGIN_FILE] if bundle else []), _BUILD_TREE]
    for place in places:
        if place.is_file():
            return check_plugin(place)
    raise MissingDependencyError(
        f"{PLUGIN_FILE} is not there", where="tensorrt", allowed=_listed(places), fix=_HOW
    )


def _chosen(given: Path | None) -> Path | None:
    """What the caller or the environment names."""
    variable = os.environ.get(PLUGIN_VARIABLE)
    return given or (Path(variable) if variable else None)


def _listed(places: list[Path]) -> str:
    return f"--plugin, {PLUGIN_VARIABLE}, " + ", ".join(map(str, places))


def check_plugin(path: Path) -> Path:
    """Check that a library is the plugin of this version of stts-export; return its full path.

    Raises:
        InputError: it is not, or it cannot be loaded on this machine.
    """
    path = path.absolute()
    if _is_cut_short(path):
        raise InputError("is cut short", where=str(path), fix=f"copy it again, or {_HOW}")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise InputError(
            f"cannot be loaded: {error}",
            where=str(path),
            allowed="a library built for this machine's processor and C++ runtime",
            fix=_HOW,
        ) from None
    try:
        version = library.sttsPluginsVersion
    except AttributeError:
        raise InputError(
            "is not the plugin library of stts-export (it has no sttsPluginsVersion)",
            where=str(path),
            fix=_HOW,
        ) from None
    version.restype = ctypes.c_char_p
    found = (version() or b"").decode(errors="replace")
    if found != __version__:
        raise InputError(
            f"is of version {found}", where=str(path), allowed=f"version {__version__}", fix=_HOW
        )
    return path


def _is_cut_short(path: Path) -> bool:
    """Whether an ELF file lacks its end, the section table; loading it would raise SIGBUS."""
    header = struct.Struct("<4s36xQ10xHH2x")  # magic, e_shoff, e_shentsize, e_shnum
    with path.open("rb") as file:
        start = file.read(header.size)
    if len(start) < header.size or not start.startswith(b"\x7fELF"):
        return False
    _, offset, size, count = header.unpack(start)
    return bool(path.stat().st_size < offset + size * count)


def load_plugin(trt: Any, given: Path | None = None, bundle: Path | None = None) -> None:
    """Make the plugin known to a TensorRT, once per process; later ones are named in a warning.

    Args:
        trt: the module `tensorrt`.
        given: see `find_plugin`.
        bundle: see `find_plugin`.

    Raises:
        InputError: see `find_plugin`; or TensorRT does not accept the library.
        MissingDependencyError: there is no library.
    """
    global _loaded
    registry = trt.get_plugin_registry()
    known = _known(registry)
    if known and _chosen(given) is None:
        return
    path = find_plugin(given, bundle)  # what was named is checked in any case
    if known:
        if path.resolve() != _loaded:
            before = _loaded or "the plugin that was loaded before"
            _log.warning("%s is not loaded: %s stays until this process ends", path, before)
        return
    try:
        loaded = registry.load_library(str(path))
    except Exception as error:  # the bindings raise what their C++ side threw
        raise InputError(
            f"is refused by TensorRT {trt.__version__}: {error}", where=str(path), fix=_HOW
        ) from None
    if loaded is None or not _known(registry):
        raise InputError(
            f"brings no plugin {PLUGIN_NAMESPACE}::{PLUGIN_NAME} version {PLUGIN_VERSION} "
            f"to TensorRT {trt.__version__}",
            where=str(path),
            fix=_HOW,
        )
    _loaded = path.resolve()


def _known(registry: Any) -> bool:
    """Whether our plugin is registered; `get_creator` would log an error where it is not."""
    ours = (PLUGIN_NAME, PLUGIN_VERSION, PLUGIN_NAMESPACE)
    return any(
        (creator.name, creator.plugin_version, creator.plugin_namespace) == ours
        for creator in registry.all_creators
    )
