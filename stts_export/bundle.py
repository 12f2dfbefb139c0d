"""The folder that is shipped: manifest, configuration, graphs, engines, reports.

Opened without torch, transformers or onnx; never unpickled.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stts_export._version import __version__
from stts_export.config import ModelConfig
from stts_export.errors import InputError, VerificationError, did_you_mean
from stts_export.tensors import PRECISIONS, Precision, graph_file

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
CONFIG_FOLDER = "config"
GRAPH_FOLDER = "onnx"
REPORT_FOLDER = "reports"

_REBUILD = "build the bundle again with `stts-export build`"


@dataclass(frozen=True)
class Limits:
    """What a bundle accepts at run time; sizes profiles and caches."""

    max_frames: int
    max_tokens: int
    """Longest sequence: prompt after pruning plus new tokens."""
    min_prune_ratio: float = 0.0

    def __post_init__(self) -> None:
        if self.max_frames < 1:
            raise InputError(
                f"max_frames is {self.max_frames}", where="limits", allowed="1 or more"
            )
        if not 0 <= self.min_prune_ratio < 1:
            raise InputError(
                f"min_prune_ratio is {self.min_prune_ratio}", where="limits", allowed="[0, 1)"
            )


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`."""

    has_scorer: bool
    precision: Precision
    limits: Limits
    graphs: tuple[str, ...]
    targets: tuple[str, ...]
    """Back ends that the bundle runs on without another build step."""
    source: str
    """Name of the checkpoint folder."""
    tool_versions: dict[str, str]
    licences: dict[str, str]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Relative path -> {"size": bytes, "sha256": hex}."""
    stts_export: str = __version__
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """Serialise, keys sorted, so that equal bundles have equal manifests."""
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @staticmethod
    def from_json(text: str, where: str) -> Manifest:
        """Parse and validate.

        Raises:
            InputError: not JSON, another schema version, or an unknown or missing key.
        """
        try:
            values = json.loads(text)
            version = values["schema_version"]
        except (ValueError, TypeError, KeyError):
            raise InputError("is not a bundle manifest", where=where, fix=_REBUILD) from None
        if version != SCHEMA_VERSION:
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
        if values["precision"] not in PRECISIONS:
            raise InputError(
                f"precision {values['precision']!r}", where=where, allowed=" or ".join(PRECISIONS)
            )
        try:
            limits = Limits(**values.pop("limits"))
            graphs, targets = tuple(values.pop("graphs")), tuple(values.pop("targets"))
        except TypeError as error:
            raise InputError(f"cannot be read: {error}", where=where, fix=_REBUILD) from None
        return Manifest(**{**values, "limits": limits, "graphs": graphs, "targets": targets})


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
            size = file.stat().st_size if file.is_file() else None
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
        return Bundle(folder, manifest, config)

    def graph(self, name: str) -> Path:
        """Path of a graph's ONNX file."""
        return self.folder / GRAPH_FOLDER / graph_file(name)

    def check_hashes(self) -> None:
        """Compare every file with its SHA-256.

        Raises:
            VerificationError: a file was changed after the build.
        """
        for name, entry in self.manifest.files.items():
            if sha256(self.folder / name) != entry["sha256"]:
                raise VerificationError(
                    "was changed after the build (its SHA-256 differs from the manifest)",
                    where=str(self.folder / name),
                    fix=f"copy the bundle again, or {_REBUILD}",
                )


def is_bundle(folder: Path) -> bool:
    """Whether a folder looks like a bundle, of any version."""
    return (folder / MANIFEST).is_file()


def list_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below a folder, for the manifest."""
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def sha256(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
