"""The folder that is shipped: manifest, configuration, graphs, engines, reports.

Opened without torch, transformers or onnx; never unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, cast, get_args

from stts_export._version import __version__
from stts_export.config import ModelConfig
from stts_export.engines import onnxruntime
from stts_export.engines.engine_set import ENGINE_FOLDER, ENGINES_FILE, EngineSet
from stts_export.errors import InputError, VerificationError, did_you_mean
from stts_export.files import check_utf8, json_object
from stts_export.preprocessing import DEFAULT_MAX_FPS
from stts_export.tensors import (
    DATA_FILE,
    GATHER_WINDOWS,
    PRECISIONS,
    SELECT_PACK,
    KvCache,
    Precision,
    graph_file,
    graph_specs,
)

SCHEMA_VERSION = 4
MANIFEST = "manifest.json"
CONFIG_FOLDER = "config"
GRAPH_FOLDER = "onnx"
REPORT_FOLDER = "reports"
ONNXRUNTIME = onnxruntime.NAME
"""The target that every bundle has: its graphs run as they are."""

WITHOUT_WEIGHTS = (SELECT_PACK, GATHER_WINDOWS)
"""Graphs that have no data file."""

Positions = Literal["compact", "gapped"]
"""Rotary positions of a prompt without the tokens of removed windows: counted anew from 0, or as
before removal. New tokens go on after the last either way."""
POSITIONS: tuple[Positions, ...] = get_args(Positions)

_REBUILD = "build the bundle again with `stts-export build`"


@dataclass(frozen=True)
class Limits:
    """What a bundle accepts at run time; sizes profiles and caches."""

    max_frames: int
    max_tokens: int
    """Longest sequence: prompt after pruning plus new tokens."""
    min_prune_ratio: float = 0.0
    max_fps: float = DEFAULT_MAX_FPS
    """Most frames sampled from a second of video."""

    def __post_init__(self) -> None:
        for name in ("max_frames", "max_tokens"):
            value: object = getattr(self, name)
            self._demand(name, type(value) is int and value >= 1, "an integer, 1 or more")
        ratio, fps = self.min_prune_ratio, self.max_fps
        self._demand("min_prune_ratio", _is_number(ratio) and 0 <= ratio < 1, "[0, 1)")
        self._demand("max_fps", _is_number(fps) and 0 < fps < math.inf, "a positive number")

    def _demand(self, name: str, fits: bool, allowed: str) -> None:
        if not fits:
            raise InputError(f"{name} is {getattr(self, name)!r}", where="limits", allowed=allowed)


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


@dataclass(frozen=True)
class Judged:
    """What held-out clips said about a bundle; `GATES_FILE` has the rest."""

    passed: bool
    """False where it was written by force."""
    missed: tuple[str, ...]
    """Names of the gates that it misses."""


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`."""

    has_scorer: bool
    precision: Precision
    limits: Limits
    graphs: tuple[str, ...]
    targets: tuple[str, ...]
    """What the bundle runs on without another build step, preferred first: "onnxruntime", and names
    of engine folders. Empty where ONNX Runtime has no kernels and no engine was built."""
    source: str
    """Name of the checkpoint folder."""
    tool_versions: dict[str, str]
    licences: dict[str, str]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Relative path -> {"size": bytes, "sha256": hex}."""
    stts_export: str = __version__
    schema_version: int = SCHEMA_VERSION
    positions: Positions = "compact"
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """The number formats that were asked for, as `calibration.Recipe.to_dict` gives them."""
    formats: Mapping[str, str] = field(default_factory=dict)
    """Format by layer, of those that are not at `precision`."""
    judged: Judged | None = None
    """None where the recipe has no gates."""

    def to_json(self) -> str:
        """Serialise, keys sorted, so that equal bundles have equal manifests."""
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @staticmethod
    def from_json(text: str, where: str) -> Manifest:
        """Parse and validate.

        Raises:
            InputError: not JSON, another schema version, an unknown or missing key, or a value of
                the wrong type.
        """
        try:
            values = json.loads(text)
            version = values["schema_version"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise InputError("is not a bundle manifest", where=where, fix=_REBUILD) from None
        if type(version) is not int or version != SCHEMA_VERSION:
            raise InputError(
                f"schema version {version!r}, written by stts-export {values.get('stts_export')}",
                where=where,
                allowed=f"version {SCHEMA_VERSION} (this is stts-export {__version__})",
                fix=f"{_REBUILD} of this version",
            )
        known = set(Manifest.__dataclass_fields__)
        for key in values:
            if key not in known:
                raise InputError(
                    f"unknown key {key!r}{did_you_mean(key, known)}", where=where, fix=_REBUILD
                )
        missing = sorted(known - set(values))
        if missing:
            raise InputError(f"lacks {', '.join(missing)}", where=where, fix=_REBUILD)
        _check_values(values, where)
        try:
            limits = Limits(**values["limits"])
        except TypeError as error:
            raise InputError(f"cannot be read: {error}", where=where, fix=_REBUILD) from None
        judged = values["judged"]
        if judged is not None:
            judged = Judged(judged["passed"], tuple(judged["missed"]))
        graphs, targets = tuple(values["graphs"]), tuple(values["targets"])
        parsed = {"limits": limits, "graphs": graphs, "targets": targets, "judged": judged}
        return Manifest(**{**values, **parsed})

    @property
    def precision_name(self) -> str:
        """What `build --precision` was asked for."""
        return str(self.recipe.get("name", self.precision))

    @property
    def kv_cache(self) -> KvCache:
        """Type of the decoder's cache."""
        return "int8" if self.recipe.get("kv_cache") == "int8" else "base"


def _check_values(values: Mapping[str, Any], where: str) -> None:
    """Check the type of every value of a manifest."""
    for key, (allowed, fits) in _KINDS.items():
        if not fits(values[key]):
            raise InputError(
                f"{key} is {values[key]!r:.200}", where=where, allowed=allowed, fix=_REBUILD
            )
    for name, entry in values["files"].items():
        if not _is_below(name):
            raise InputError(
                f"files has {name!r:.200}",
                where=where,
                allowed="paths below the bundle, as onnx/decoder/model.onnx",
                fix=_REBUILD,
            )
        if not (
            isinstance(entry, dict)
            and type(entry.get("size")) is int
            and isinstance(entry.get("sha256"), str)
        ):
            raise InputError(
                f"files has {entry!r:.200} for {name}",
                where=where,
                allowed='{"size": bytes, "sha256": hex}',
                fix=_REBUILD,
            )


def _is_below(name: str) -> bool:
    """Whether a name of a file is a plain path below a folder."""
    parts = PurePosixPath(name).parts
    return bool(parts) and parts[0] != "/" and ".." not in parts and "/".join(parts) == name


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def _is_names(value: object) -> bool:
    return _is_texts(value) and all(Path(name).name == name for name in cast("list[str]", value))


def _is_table(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())


def _is_judged(value: object) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict) or set(value) != {"passed", "missed"}:
        return False
    missed = value["missed"]
    names = isinstance(missed, list) and all(isinstance(name, str) for name in missed)
    return isinstance(value["passed"], bool) and names


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "has_scorer": ("true or false", lambda value: isinstance(value, bool)),
    "precision": (" or ".join(PRECISIONS), lambda value: value in PRECISIONS),
    "positions": (" or ".join(POSITIONS), lambda value: value in POSITIONS),
    "limits": ("an object", lambda value: isinstance(value, dict)),
    "graphs": ("an array of names", _is_texts),
    "targets": ("an array of names", lambda value: value == [] or _is_names(value)),
    "source": ("a string", lambda value: isinstance(value, str)),
    "tool_versions": ("an object of strings", _is_table),
    "licences": ("an object of strings", _is_table),
    "files": ("an object", lambda value: isinstance(value, dict)),
    "recipe": ("an object", lambda value: isinstance(value, dict)),
    "formats": ("an object of strings", _is_table),
    "judged": ('null or {"passed": bool, "missed": [names]}', _is_judged),
    "stts_export": ("a string", lambda value: isinstance(value, str)),
}


@dataclass(frozen=True)
class Bundle:
    """An opened bundle."""

    folder: Path
    manifest: Manifest
    config: ModelConfig

    @staticmethod
    def open(folder: Path) -> Bundle:
        """Read the manifest and check that every file is there with its size.

        Raises:
            InputError: no bundle, another schema, or a missing or changed file.
        """
        check_utf8(folder)
        path = folder / MANIFEST
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(
                "is not a bundle: manifest.json is missing",
                where=str(folder),
                fix="pass the folder that `stts-export build -o` wrote",
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot be read: {error}", where=str(path)) from None
        manifest = Manifest.from_json(text, str(path))
        for name, entry in manifest.files.items():
            file = folder / name
            size = _size(file)
            if size != entry["size"]:
                raise InputError(
                    "is missing" if size is None else f"has {size} bytes",
                    where=str(file),
                    allowed=f"{entry['size']} bytes, as the manifest says",
                    fix=f"copy the bundle again, or {_REBUILD}",
                )
        config = ModelConfig.from_file(
            folder / CONFIG_FOLDER / "config.json", has_scorer=manifest.has_scorer
        )
        _check_graphs(manifest, config, str(path))
        bundle = Bundle(folder, manifest, config)
        for engines in bundle.engine_sets():
            _check_engines(engines, manifest, config)
        return bundle

    def graph(self, name: str) -> Path:
        """Path of a graph's ONNX file."""
        return self.folder / GRAPH_FOLDER / graph_file(name)

    def engine_sets(self) -> tuple[EngineSet, ...]:
        """Engines of every target that has some.

        Raises:
            InputError: a set cannot be read.
        """
        return tuple(
            EngineSet.read(self.folder / ENGINE_FOLDER / target)
            for target in self.manifest.targets
            if target != ONNXRUNTIME
        )

    def check_hashes(self) -> None:
        """Compare every file with its SHA-256.

        Raises:
            VerificationError: a file was changed after the build.
            InputError: a file cannot be read.
        """
        for name, entry in self.manifest.files.items():
            try:
                digest = sha256(self.folder / name)
            except OSError as error:
                raise InputError(f"cannot be read: {error}", where=str(self.folder)) from None
            if digest != entry["sha256"]:
                raise VerificationError(
                    "was changed after the build (its SHA-256 differs from the manifest)",
                    where=str(self.folder / name),
                    fix=f"copy the bundle again, or {_REBUILD}",
                )


def _size(file: Path) -> int | None:
    """Bytes of a regular file; None when there is no such file."""
    try:
        return file.stat().st_size if file.is_file() else None
    except (OSError, ValueError):
        return None


def _check_graphs(manifest: Manifest, config: ModelConfig, where: str) -> None:
    """Check that the manifest names this model's graphs and lists their files."""
    known = set(graph_specs(config, manifest.precision, manifest.kv_cache))
    if set(manifest.graphs) != known:
        raise InputError(
            f"graphs is {list(manifest.graphs)}",
            where=where,
            allowed=", ".join(sorted(known)),
            fix=_REBUILD,
        )
    for name in manifest.graphs:
        file = f"{GRAPH_FOLDER}/{graph_file(name)}"
        data = f"{file.rpartition('/')[0]}/{DATA_FILE}"
        for needed in (file,) if name in WITHOUT_WEIGHTS else (file, data):
            if needed not in manifest.files:
                raise InputError(f"files lacks {needed}", where=where, fix=_REBUILD)


def _check_engines(engines: EngineSet, manifest: Manifest, config: ModelConfig) -> None:
    """Check that the manifest lists the files of an engine set, and that none is missing."""
    where = str(engines.folder / ENGINES_FILE)
    graphs = {name.partition("-")[0] for name in graph_specs(config, manifest.precision)}
    allowed = (graphs, graphs - {SELECT_PACK})  # its plugin runs in TensorRT only
    if set(engines.engines) not in allowed:
        raise InputError(
            f"has engines for {', '.join(engines.engines)}",
            where=where,
            allowed=", ".join(sorted(graphs)),
            fix=_REBUILD,
        )
    for file in (ENGINES_FILE, *(engine.file for engine in engines.engines.values())):
        needed = f"{ENGINE_FOLDER}/{engines.folder.name}/{file}"
        if needed not in manifest.files:
            raise InputError(f"files lacks {needed}", where=where, fix=_REBUILD)


def is_bundle(folder: Path) -> bool:
    """Whether a folder holds a manifest of ours, of any version."""
    try:
        values = json_object(folder / MANIFEST)
    except InputError:
        return False
    return {"schema_version", "graphs", "files"} <= set(values)


def list_files(folder: Path, ignore: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below a folder, for the manifest.

    Args:
        folder: the bundle.
        ignore: names of what lies in the folder itself and will not stay.
    """
    found = {path.relative_to(folder): path for path in sorted(folder.rglob("*"))}
    return {
        name.as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)}
        for name, path in found.items()
        if path.is_file() and name.parts[0] not in (MANIFEST, *ignore)
    }


def sha256(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
