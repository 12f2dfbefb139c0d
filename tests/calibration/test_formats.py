from __future__ import annotations

import re
from typing import Any

import pytest

from stts_export.calibration.formats import SUPPORT, check_formats, needs_engines
from stts_export.calibration.layers import FORMATS, Format
from stts_export.calibration.recipe import Gates, LayerRule, Recipe, recipe_names
from stts_export.devices import DEVICES
from stts_export.engines.library import BACKENDS, ONNXRUNTIME, TENSORRT, TENSORRT_RTX
from stts_export.engines.tensorrt_rtx import TARGETS
from stts_export.errors import InputError

GATES = Gates(10, 0.9, 0.9, 1, 1)


def _recipe(form: Format, **changes: Any) -> Recipe:
    base = form if form in ("fp32", "fp16", "bf16") else "fp16"
    rules = () if form == base else (LayerRule(("decoder",), form),)
    return Recipe("mine", "", base, layers=rules, gates=GATES, **changes)


def _fits(recipe: Recipe, backend: str, target: str | None, version: str | None) -> bool:
    try:
        check_formats(recipe, backend, target, version)
    except InputError:
        return False
    return True


def _formats(backend: str, target: str | None, version: str | None = None) -> set[str]:
    return {form for form in FORMATS if _fits(_recipe(form), backend, target, version)}


ALL = set(FORMATS)
OLDER = ALL - {"fp8", "nvfp4"}


@pytest.mark.parametrize(
    ("backend", "target", "version", "expected"),
    [
        (ONNXRUNTIME, None, "1.31.0", ALL - {"bf16", "nvfp4"}),
        (TENSORRT, None, None, ALL),
        (TENSORRT, "sm75", "10.3.0.30", {"fp32", "fp16", "int8"}),
        (TENSORRT, "sm87", "10.3.0.30", OLDER),
        (TENSORRT, "sm89", "10.13.3", ALL - {"nvfp4"}),
        (TENSORRT, "sm90", "11.1", ALL - {"nvfp4"}),
        (TENSORRT, "sm100", "10.7.0", ALL - {"nvfp4"}),
        (TENSORRT, "sm100", "10.8.0", ALL),
        (TENSORRT, "sm110", "10.13.3.9", ALL),
        (TENSORRT, "sm121", "10.16", ALL),
        (TENSORRT, "sm87", "8.6.1", {"fp32", "fp16", "int8"}),
        (TENSORRT, None, "9.3", OLDER - {"int4"} | {"fp8"}),
        (TENSORRT_RTX, "sm80", "1.7.1.116", OLDER),
        (TENSORRT_RTX, "sm86", None, OLDER),
        (TENSORRT_RTX, "sm89", None, ALL - {"nvfp4"}),
        (TENSORRT_RTX, "sm100", None, ALL - {"nvfp4"}),
        (TENSORRT_RTX, "sm120", None, ALL),
        (TENSORRT_RTX, "sm121", "1.7.1.116", ALL),
    ],
)
def test_what_runs_where(backend: str, target: str | None, version: str | None, expected: set[str]):
    assert _formats(backend, target, version) == expected


def test_every_row_says_how_it_is_known_and_stands_once():
    assert all(row.source for row in SUPPORT)
    assert len({(row.format, row.backend) for row in SUPPORT}) == len(SUPPORT)
    assert {row.backend for row in SUPPORT} == set(BACKENDS)


@pytest.mark.parametrize(
    ("form", "place", "message"),
    [
        (
            "nvfp4",
            (TENSORRT, "sm87", "10.3.0.30"),
            "tensorrt 10.3.0.30 sm87: recipe mine uses nvfp4, which needs sm100 or newer, but the "
            "target is sm87\n  fix: take a recipe that runs there: bf16, cpu, fp16, fp32, int4, "
            "int8, orin",
        ),
        (
            "nvfp4",
            (TENSORRT, "sm110", "10.7.0"),
            "nvfp4, which needs tensorrt 10.8 or newer, but this is 10.7",
        ),
        (
            "bf16",
            (ONNXRUNTIME, None, None),
            "onnxruntime: recipe mine uses bf16, for which onnxruntime has no kernels; tensorrt, "
            "tensorrt-rtx can run it\n  fix: take a recipe that runs there: cpu, fp16, fp32, fp8, "
            "h200",
        ),
        ("fp8", ("tensorrt-rt", None, None), "did you mean 'tensorrt-rtx'"),
        ("fp8", (TENSORRT, "orin", None), "target: is 'orin'"),
        ("fp8", (TENSORRT, "sm8.7", None), "target: is 'sm8.7'"),
        ("fp8", (TENSORRT, None, "newest"), "tensorrt: version is 'newest'"),
    ],
)
def test_refusals_name_the_format_and_the_target(form: Format, place: Any, message: str):
    with pytest.raises(InputError, match=re.escape(message)):
        check_formats(_recipe(form), *place)


def test_the_cache_in_int8_is_for_onnx_runtime():
    recipe = _recipe("fp16", kv_cache="int8")
    check_formats(recipe, ONNXRUNTIME, None, None)
    with pytest.raises(InputError, match="kv_cache: int8, which only onnxruntime runs so far"):
        check_formats(recipe, TENSORRT, "sm87", "10.3")
    assert not needs_engines(recipe)


def test_only_engines_run_bf16_and_nvfp4():
    names = {name for name in recipe_names() if needs_engines(Recipe.load(name))}
    assert names == {"bf16", "nvfp4", "thor"}


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        ("orin", {"agx-orin", "orin-nano-8gb"}),
        ("thor", {"thor", "thor-t4000", "b200"}),
        ("h200", {"h100", "h200"}),
        ("rtx", {"rtx-4090", "rtx-5090", "dgx-spark", "l40s"}),
    ],
)
def test_recipes_of_device_classes_run_there(name: str, devices: set[str]):
    for device in (DEVICES[each] for each in devices):
        version = device.tensorrt and ".".join(map(str, device.tensorrt))
        check_formats(Recipe.load(name), device.backend, device.sm, version)


def test_all_targets_of_tensorrt_for_rtx_run_at_least_int4():
    for target in TARGETS:
        check_formats(Recipe.load("int4"), TENSORRT_RTX, target, None)
