"""Files with which `polygraphy run` reproduces a difference that `verify` found.

A folder per graph that differs: the inputs of its worst call, what the PyTorch model makes of
them, and the commands that compare. The graphs and engines stay in the bundle.
"""

from __future__ import annotations

import importlib
import os
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stts_export.bundle import GRAPH_FOLDER, ONNXRUNTIME, Bundle
from stts_export.engines.library import TENSORRT_RTX
from stts_export.engines.runner import fitting_profile
from stts_export.errors import InputError, MissingDependencyError
from stts_export.runtime.decoder import ObservedRunner, Runner
from stts_export.tensors import (
    CONNECTOR,
    DECODER,
    SPLIT,
    VISION_LOWER,
    VISION_UPPER,
    Precision,
    graph_file,
    variant,
)
from stts_export.tolerances import TOLERANCES, Tolerance, difference

if TYPE_CHECKING:
    from stts_export.model.vlm import SttsModel

Arrays = dict[str, NDArray[Any]]

_INPUTS = '''\
"""The inputs of the call: inputs.json, and what is all zero, as a cache that is still empty."""

import numpy as np
from polygraphy.json import load_json

ZEROS = {zeros!r}


def load_data():
    zeros = {{name: np.zeros(shape, dtype) for name, (shape, dtype) in ZEROS.items()}}
    return [{{**load_json("inputs.json"), **zeros}}]
'''


@dataclass(frozen=True)
class Call:
    """One call of a graph."""

    graph: str
    inputs: Arrays
    outputs: Arrays


class Recorder(ObservedRunner):
    """Runs a graph and keeps what went in and came out.

    Args:
        graph: name of the graph.
        runner: what runs it.
        calls: where to add calls.
    """

    def __init__(self, graph: str, runner: Runner, calls: list[Call]) -> None:
        self._graph = graph
        super().__init__(runner)
        self._calls = calls

    def __call__(
        self, inputs: dict[str, Any], in_place: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """See `decoder.Runner`."""
        before = self._copies(inputs)
        outputs = self._runner(inputs, in_place)
        self._calls.append(Call(self._graph, before, self._copies({**outputs, **(in_place or {})})))
        return outputs

    def _copies(self, arrays: Mapping[str, Any]) -> Arrays:
        return {
            name: array.copy() if isinstance(array, np.ndarray) else self._runner.to_host(array)
            for name, array in arrays.items()
        }


@dataclass(frozen=True)
class Difference:
    """A call beside what the PyTorch model computes from its inputs."""

    call: Call
    expected: Arrays
    excess: float
    """Largest difference of an output over its limit; above 1 is a failure."""


def compare_call(call: Call, model: SttsModel, precision: Precision) -> Difference | None:
    """Run the PyTorch model on the inputs of a call; None for graphs without weights."""
    import torch

    given = {
        name: torch.from_numpy(a).float() if a.dtype.kind == "f" else torch.from_numpy(a)
        for name, a in call.inputs.items()
    }
    graph = call.graph.partition("-")[0]
    with torch.no_grad():
        if graph == VISION_LOWER:
            results = _lower(model, given, call.outputs)
        elif graph == VISION_UPPER:
            tapped = model.vision.tapped(given["bins"], given.get("segment"))
            results = {"packed_features": model.vision.connect(tapped), "tapped": tapped}
        elif graph == CONNECTOR:
            pooled = given["pooled_patches"]
            results = {"features": model.vision.connector.pool(given["patches"], pooled)}
        elif graph == DECODER and int(call.inputs["cache_position"][0]) == 0:
            ids, groups = given["input_ids"], given["visual_group"].long()
            logits = model.language(ids, given["features"], groups, given["position_ids"])
            results = {"logits": logits[:, -1]}
        else:
            return None
    expected = {name: value.numpy() for name, value in results.items()}
    excess = max(
        difference(call.outputs[name], value, TOLERANCES[name, precision].measure)
        / TOLERANCES[name, precision].limit
        for name, value in expected.items()
    )
    return Difference(call, expected, excess)


def _lower(model: SttsModel, given: Mapping[str, Any], outputs: Arrays) -> dict[str, Any]:
    """Outputs of vision_lower; the bias magnifies the scores' rounding, so the graph's are used."""
    import torch

    if model.config.vision.pruning is None:
        return {"hidden": model.vision.lower_plain(given["frames"])}
    x = model.vision.before_scoring(given["frames"])
    scores, pooled = model.vision.score(x, given["fresh"], given["prev_pooled"])
    used = torch.from_numpy(outputs["scores"])
    hidden = model.vision.after_scoring(x, used, given["fresh"])
    return {"hidden": hidden, "scores": scores, "last_pooled": pooled}


def check_folder(folder: Path) -> None:
    """Refuse, before any work, a folder that is not ours to fill, and a missing polygraphy.

    Raises:
        InputError: the folder holds something.
        MissingDependencyError: polygraphy is not installed.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            "is there already", where=str(folder), allowed="a new folder, or an empty one"
        )
    try:
        importlib.import_module("polygraphy")
    except ImportError as error:
        raise MissingDependencyError(
            f"needs polygraphy ({error})",
            where="--keep-repro",
            fix="pip install 'polygraphy>=0.53'",
        ) from None


def write_repro(
    folder: Path, bundle: Bundle, backend: str, found: Sequence[Difference]
) -> list[Path]:
    """Write a folder per graph: those that differ, or else the one nearest to its limit.

    Args:
        folder: new or empty.
        bundle: what was verified.
        backend: what ran it.
        found: calls that were compared.

    Returns:
        The folders, worst first.

    Raises:
        InputError: they cannot be written.
    """
    worst: dict[str, Difference] = {}
    for entry in sorted(found, key=lambda entry: entry.excess, reverse=True):
        worst.setdefault(entry.call.graph, entry)
    chosen = [entry for entry in worst.values() if entry.excess > 1]
    chosen = chosen or list(worst.values())[:1]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".repro-") as beside:
            partial = Path(beside) / "repro"
            for entry in chosen:
                _write(partial / entry.call.graph, bundle, backend, entry)
            os.replace(partial, folder)
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", where=str(folder)) from None
    return [folder / entry.call.graph for entry in chosen]


def _write(folder: Path, bundle: Bundle, backend: str, entry: Difference) -> None:
    comparator: Any = importlib.import_module("polygraphy.comparator")
    json: Any = importlib.import_module("polygraphy.json")
    folder.mkdir(parents=True)
    inputs = entry.call.inputs
    zeros = {name: (a.shape, a.dtype.name) for name, a in inputs.items() if not a.any()}
    others = {name: a for name, a in inputs.items() if name not in zeros}
    json.save_json(others, str(folder / "inputs.json"))
    (folder / "inputs.py").write_text(_INPUTS.format(zeros=zeros), encoding="utf-8")
    results = comparator.RunResults()
    results.append(("pytorch-fp32", [comparator.IterationResult(dict(entry.expected))]))
    results.save(str(folder / "expected.json"))
    script = folder / "reproduce.sh"
    script.write_text(_script(bundle, backend, entry), encoding="utf-8")
    script.chmod(0o755)


def _script(bundle: Bundle, backend: str, entry: Difference) -> str:
    graph, precision = entry.call.graph, bundle.manifest.precision
    shared = [
        "--data-loader-script", "inputs.py", "--load-outputs", "expected.json",
        *_comparison(entry.expected, precision),
    ]  # fmt: skip
    lines = [
        "#!/bin/sh",
        f"# {graph} of {bundle.folder.name} ({backend}, {precision}) beside the PyTorch model in"
        " fp32, on one call's inputs.",
        f"# The largest difference was {entry.excess:.3g} times its limit. Exit 0: within limits.",
        'cd "$(dirname "$0")" || exit 2',
        f"BUNDLE=${{BUNDLE:-{shlex.quote(str(bundle.folder.absolute()))}}}",
    ]
    commands = [
        ["polygraphy", "run", f"$BUNDLE/{file}", *options, *shared]
        for file, options in _models(bundle, backend, entry.call)
    ]
    if backend == TENSORRT_RTX:
        lines.append("export POLYGRAPHY_USE_TENSORRT_RTX=1")
    lines += ["status=0", *(f"{_quoted(command)} || status=1" for command in commands)]
    return "\n".join([*lines, "exit $status", ""])


def _models(bundle: Bundle, backend: str, call: Call) -> list[tuple[str, list[str]]]:
    """Files of a graph below the bundle with the options that run them: engines, then ONNX."""
    base = call.graph.partition("-")[0]
    models: list[tuple[str, list[str]]] = []
    for engines in bundle.engine_sets():
        if engines.backend == backend and base in engines.engines:
            file = engines.path(base).relative_to(bundle.folder).as_posix()
            profile = fitting_profile(engines.engines[base], call.inputs)
            options = ["--model-type", "engine", "--trt", "--optimization-profile", str(profile)]
            models.append((file, options))
    # What a session calls decoder is this variant of it, where ONNX Runtime runs.
    split = backend == ONNXRUNTIME and call.graph == DECODER
    file = graph_file(variant(DECODER, SPLIT) if split else call.graph)
    return [*models, (f"{GRAPH_FOLDER}/{file}", ["--onnxrt"])]


def _comparison(expected: Arrays, precision: Precision) -> list[str]:
    """Options with our tolerances: `simple` for largest differences, `l2` for norms."""
    simple: list[str] = []
    norms: list[str] = []
    for name, value in expected.items():
        tolerance = TOLERANCES[name, precision]
        limit = f"{name}:{_absolute(tolerance, value):.9g}"
        (norms if tolerance.measure == "l2" else simple).append(limit)
    chosen = [name for name, limits in (("simple", simple), ("l2", norms)) if limits]
    options = ["--compare", *chosen]
    if simple:
        options += ["--atol", "inf", *simple, "--rtol", "0"]
    if norms:
        options += ["--l2-threshold", "inf", *norms]
    return options


def _absolute(tolerance: Tolerance, reference: NDArray[Any]) -> float:
    """Return the limit without its division by the reference."""
    values = reference.astype(np.float64)
    if tolerance.measure == "l2":
        return tolerance.limit * float(np.linalg.norm(values))
    if tolerance.measure == "max_rel":
        return tolerance.limit * float(np.abs(values).max(initial=0))
    return tolerance.limit


def _quoted(command: Sequence[str]) -> str:
    words = (f'"{w}"' if w.startswith("$BUNDLE/") else shlex.quote(w) for w in command)
    return " ".join(words)
