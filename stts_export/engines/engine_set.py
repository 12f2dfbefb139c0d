"""Engine files of one back end for one GPU: the folder in the bundle, and what each engine takes.

Written after a build, read by the runtime; opened without TensorRT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stts_export.errors import InputError
from stts_export.files import json_object, write_json
from stts_export.tensors import Profile, Range, TensorSpec

ENGINE_FOLDER = "engines"
ENGINES_FILE = "engines.json"
TIMING_CACHE = "timing.cache"

_REBUILD = "build the engines again with `stts-export build`"


@dataclass(frozen=True)
class EngineInfo:
    """One engine."""

    file: str
    """Name in the engine folder."""
    graph: str
    """Name of the graph it was built from, a variant included."""
    inputs: tuple[TensorSpec, ...]
    """Shapes have -1 for free axes."""
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Profile, ...]
    """Ranges of shapes; of a shape tensor, ranges of its values."""
    command: str
    """The command line that builds the same engine, run in the bundle folder."""
    read_back: bool = True
    """Whether inputs, outputs and profiles were read from the built engine, which takes its GPU;
    otherwise they are the network's."""


@dataclass(frozen=True)
class EngineSet:
    """All engines of one back end, library version and GPU."""

    folder: Path
    backend: str
    version: str
    """Version of the library that built them, in full."""
    target: str
    """Streaming multiprocessor version of the GPU, such as sm89."""
    engines: dict[str, EngineInfo] = field(default_factory=dict)
    """By graph, without the variant."""

    def path(self, graph: str) -> Path:
        """Path of a graph's engine file."""
        return self.folder / self.engines[graph].file

    def write(self) -> None:
        """Write `engines.json` into the folder."""
        write_json(
            self.folder / ENGINES_FILE,
            {
                "backend": self.backend,
                "version": self.version,
                "target": self.target,
                "engines": {name: engine_json(engine) for name, engine in self.engines.items()},
            },
        )

    @staticmethod
    def read(folder: Path) -> EngineSet:
        """Read what `write` wrote.

        Raises:
            InputError: `engines.json` is missing or damaged, or its folder has another name than
                its content says.
        """
        file = folder / ENGINES_FILE
        values = json_object(file)
        if not values:
            raise InputError("is missing or empty", where=str(file), fix=_REBUILD)
        try:
            backend, version, target = (
                _text(values[key]) for key in ("backend", "version", "target")
            )
            engines = {name: _engine(engine) for name, engine in values["engines"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"cannot be read: {type(error).__name__} {error}", where=str(file), fix=_REBUILD
            ) from None
        if folder.name != folder_name(backend, version, target):
            raise InputError(
                f"describes {folder_name(backend, version, target)}", where=str(file), fix=_REBUILD
            )
        return EngineSet(folder, backend, version, target, engines)


def folder_name(backend: str, version: str, target: str) -> str:
    """Name of an engine folder; of the version, the first three numbers."""
    return f"{backend}-{'.'.join(version.split('.')[:3])}-{target}"


def _range_json(value: Range) -> dict[str, list[int]]:
    """Plain values of a range."""
    return {"min": list(value.min), "opt": list(value.opt), "max": list(value.max)}


def tensor_json(tensor: TensorSpec) -> dict[str, Any]:
    """Plain values of an input or output; `is_shape` only where it is true."""
    values: dict[str, Any] = {
        "name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape)
    }  # fmt: skip
    return {**values, "is_shape": True} if tensor.is_shape else values


def engine_json(engine: EngineInfo) -> dict[str, Any]:
    """Plain values of an engine's description."""
    return {
        "file": engine.file,
        "graph": engine.graph,
        "inputs": [tensor_json(tensor) for tensor in engine.inputs],
        "outputs": [tensor_json(tensor) for tensor in engine.outputs],
        "profiles": [
            {name: _range_json(value) for name, value in profile.items()}
            for profile in engine.profiles
        ],
        "command": engine.command,
        "read_back": engine.read_back,
    }


def _engine(values: Mapping[str, Any]) -> EngineInfo:
    file = _text(values["file"])
    if Path(file).name != file:
        raise ValueError(f"file {file!r}")
    return EngineInfo(
        file,
        _text(values["graph"]),
        tuple(_tensor(tensor) for tensor in values["inputs"]),
        tuple(_tensor(tensor) for tensor in values["outputs"]),
        tuple(
            {name: _range(value) for name, value in profile.items()}
            for profile in values["profiles"]
        ),
        _text(values["command"]),
        values["read_back"] is True,
    )


def _tensor(values: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(
        _text(values["name"]),
        _text(values["dtype"]),
        _integers(values["shape"]),
        values.get("is_shape", False) is True,
    )


def _range(values: Mapping[str, Any]) -> Range:
    low, opt, high = (_integers(values[key]) for key in ("min", "opt", "max"))
    if not len(low) == len(opt) == len(high):
        raise ValueError(f"range {dict(values)}")
    return Range(low, opt, high)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.100} is not a string")
    return value


def _integers(values: object) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise TypeError(f"{values!r:.100} is not an array of integers")
    return tuple(values)
