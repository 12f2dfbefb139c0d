"""Which back end, GPU and library version can run the number formats of a recipe."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec

from stts_export.calibration.layers import Format
from stts_export.calibration.recipe import Recipe, recipe_names
from stts_export.engines.library import BACKENDS, ONNXRUNTIME, TENSORRT, TENSORRT_RTX
from stts_export.errors import InputError, did_you_mean


@dataclass(frozen=True)
class Support:
    """A format that a back end runs."""

    format: Format
    backend: str
    source: str
    """How it is known."""
    sm: int = 0
    """Lowest streaming multiprocessor version of the GPU, such as 89 for sm89."""
    version: tuple[int, int] = (0, 0)
    """Oldest version of the library."""


_ORT = "run with ONNX Runtime 1.32 on the CPU"
_T4 = "TensorRT support matrix: on T4 (sm75) and newer"
_OPTIMIZER = "Model Optimizer support matrix"
_RTX_BUILT = "built with TensorRT for RTX 1.7 for sm75 to sm121; refused below this one"

SUPPORT: tuple[Support, ...] = (
    Support("fp32", ONNXRUNTIME, _ORT),
    Support("fp16", ONNXRUNTIME, _ORT),
    Support("int8", ONNXRUNTIME, _ORT),
    Support("int4", ONNXRUNTIME, _ORT),
    Support("fp8", ONNXRUNTIME, _ORT),
    Support("fp32", TENSORRT, _T4, 75),
    Support("fp16", TENSORRT, _T4, 75),
    Support("int8", TENSORRT, _T4, 75),
    Support("bf16", TENSORRT, "release notes of TensorRT 9.0: Ampere and newer", 80, (9, 0)),
    Support("int4", TENSORRT, f"{_OPTIMIZER}: Ampere and later; TensorRT 10.0", 80, (10, 0)),
    Support("fp8", TENSORRT, f"{_OPTIMIZER}: Ada and later", 89),
    Support("nvfp4", TENSORRT, f"{_OPTIMIZER}: Blackwell; TensorRT 10.8", 100, (10, 8)),
    Support("fp32", TENSORRT_RTX, "tried: no fp32 matrix product for sm75", 80),
    Support("fp16", TENSORRT_RTX, _RTX_BUILT, 75),
    Support("int8", TENSORRT_RTX, _RTX_BUILT, 75),
    Support("bf16", TENSORRT_RTX, _RTX_BUILT, 80),
    Support("int4", TENSORRT_RTX, _RTX_BUILT, 80),
    Support("fp8", TENSORRT_RTX, _RTX_BUILT, 89),
    Support("nvfp4", TENSORRT_RTX, "support matrix of TensorRT for RTX: 12.0 and 12.1", 120),
)
"""What is not here does not run: on the CPU, ONNX Runtime has no matrix product in bf16, and reads
no 4-bit floats (tried: NOT_IMPLEMENTED)."""

KV_CACHE_INT8 = (ONNXRUNTIME,)
"""Back ends whose decoder graphs can hold the cache in int8."""


def check_formats(
    recipe: Recipe, backend: str, target: str | None, library_version: str | None
) -> None:
    """Refuse a recipe that cannot run, before anything is calibrated or built.

    Args:
        recipe: the recipe.
        backend: one of `engines.library.BACKENDS`.
        target: GPU such as "sm87"; None for none, or one that is not known yet.
        library_version: of the back end, such as "10.3.0.30"; None if not known yet.

    Raises:
        InputError: a format, or the cache's, does not run there; or `target` or
            `library_version` is not of that form.
    """
    if backend not in BACKENDS:
        raise InputError(
            f"is {backend!r}{did_you_mean(backend, BACKENDS)}",
            where="backend",
            allowed=", ".join(BACKENDS),
        )
    sm, version = _sm(target), _version(backend, library_version)
    problem = _problem(recipe, backend, sm, version)
    if problem is not None:
        fitting = []
        if find_spec("yaml"):  # a machine that only runs bundles has none
            fitting = [name for name in recipe_names() if _runs(name, backend, sm, version)]
        place = " ".join(part for part in (backend, library_version, target) if part)
        raise InputError(
            f"recipe {recipe.name} uses {problem}",
            where=place,
            fix=f"take a recipe that runs there: {', '.join(fitting) or 'see docs/precision.md'}",
        )


def needs_engines(recipe: Recipe) -> bool:
    """Whether ONNX Runtime cannot run it, so that only engines can."""
    return _problem(recipe, ONNXRUNTIME, None, None) is not None


def _runs(name: str, backend: str, sm: int | None, version: tuple[int, int] | None) -> bool:
    return _problem(Recipe.load(name), backend, sm, version) is None


def _problem(
    recipe: Recipe, backend: str, sm: int | None, version: tuple[int, int] | None
) -> str | None:
    """Say which format does not run, and what it would need; None if all do."""
    rows = {row.format: row for row in SUPPORT if row.backend == backend}
    for name in recipe.formats():
        row = rows.get(name)
        if row is None:
            able = ", ".join(row.backend for row in SUPPORT if row.format == name)
            return f"{name}, for which {backend} has no kernels; {able} can run it"
        if sm is not None and sm < row.sm:
            return f"{name}, which needs sm{row.sm} or newer, but the target is sm{sm}"
        if version is not None and version < row.version:
            oldest, own = (".".join(map(str, numbers)) for numbers in (row.version, version))
            return f"{name}, which needs {backend} {oldest} or newer, but this is {own}"
    if recipe.kv_cache == "int8" and backend not in KV_CACHE_INT8:
        return f"kv_cache: int8, which only {', '.join(KV_CACHE_INT8)} runs so far"
    return None


def _sm(target: str | None) -> int | None:
    if target is None:
        return None
    found = re.fullmatch(r"sm([0-9]{2,3})", target)
    if found is None:
        raise InputError(f"is {target!r}", where="target", allowed="a GPU such as sm87 or sm120")
    return int(found[1])


def _version(backend: str, text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.match(r"([0-9]+)\.([0-9]+)", text)
    if found is None:
        raise InputError(f"version is {text!r}", where=backend, allowed="numbers such as 10.3")
    return int(found[1]), int(found[2])
