"""Estimates: what is counted is exact, and what does not fit is refused with what does."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.harness.random_checkpoint import config_json
from stts_export import estimate as estimating
from stts_export import machine
from stts_export.bundle import Bundle
from stts_export.calibration.building import CALIBRATE, JUDGE, RANGES
from stts_export.calibration.layers import Numerics, input_groups
from stts_export.calibration.recipe import LayerRule, Recipe
from stts_export.calibration.statistics import ROWS
from stts_export.checkpoint import open_checkpoint
from stts_export.config import ModelConfig
from stts_export.devices import DEVICES, GB
from stts_export.errors import InputError
from stts_export.estimate import (
    Estimate,
    check_build,
    check_fits,
    estimate,
    nearest,
)
from stts_export.estimate_report import estimate_json, estimate_source, estimate_text
from stts_export.footprint import Part, Stage, peak
from stts_export.graphs.export import export_graph
from stts_export.limits import MAX_ENGINE_FRAMES, kept_windows, needed_tokens
from stts_export.model.vlm import SttsModel
from stts_export.runtime.decoder import KVCache
from stts_export.sizes import cache_bytes, graph_bytes, weights
from stts_export.tensors import (
    CONNECTOR,
    DATA_ALIGNMENT,
    DATA_FILE,
    DECODER,
    VISION_LOWER,
    VISION_UPPER,
    Precision,
)
from tests.helpers import GOLDEN, any_scales, random_model, small_config

ROOT = Path(__file__).parents[1]
_DISK = namedtuple("_DISK", "total used free")


def _full_size() -> ModelConfig:
    """Molmo2-4B with a scorer."""
    return ModelConfig.from_dict(
        small_config(**{
            "vit_config.image_default_input_size": [378, 378],
            "vit_config.image_num_pos": 729,
            "vit_config.hidden_size": 1152,
            "vit_config.intermediate_size": 4304,
            "vit_config.num_hidden_layers": 27,
            "vit_config.num_attention_heads": 16,
            "vit_config.num_key_value_heads": 16,
            "vit_config.head_dim": 72,
            "vit_config.prune_at": 3,
            "adapter_config.vit_layers": [-3, -9],
            "adapter_config.hidden_size": 1152,
            "adapter_config.num_attention_heads": 16,
            "adapter_config.num_key_value_heads": 16,
            "adapter_config.head_dim": 72,
            "adapter_config.intermediate_size": 9728,
            "adapter_config.text_hidden_size": 2560,
            "text_config.hidden_size": 2560,
            "text_config.num_hidden_layers": 36,
            "text_config.intermediate_size": 9728,
            "text_config.head_dim": 128,
            "text_config.num_attention_heads": 32,
            "text_config.num_key_value_heads": 8,
            "text_config.vocab_size": 151936,
            "text_config.max_position_embeddings": 36864,
        }),
        has_scorer=True,
    )  # fmt: skip


FULL_SIZE = _full_size()


@pytest.mark.parametrize("scorer", [True, False])
def test_all_weights_are_counted(scorer: bool):
    config = ModelConfig.from_dict(small_config(), has_scorer=scorer)
    with torch.device("meta"):
        model = SttsModel(config)
    held = weights(config)
    counted = {name: graph.count for name, graph in held.items()}
    sides = {
        VISION_LOWER: [model.vision.embedding, *model.vision.blocks[: config.vision.split_at]],
        VISION_UPPER: [*model.vision.blocks[config.vision.split_at :], model.vision.connector],
        CONNECTOR: [model.vision.connector],
        DECODER: [model.language],
    }
    if model.vision.scorer is not None:
        sides[VISION_LOWER].append(model.vision.scorer)
    for name, modules in sides.items():
        assert counted[name] == sum(p.numel() for module in modules for p in module.parameters())


def test_files_have_the_sizes_that_are_told(golden_bundle: Path):
    bundle = Bundle.open(golden_bundle)
    told = graph_bytes(bundle.config, bundle.manifest.precision)
    graphs = golden_bundle / "onnx"
    for file, size in told.items():
        written = (graphs / file).stat().st_size
        if file.endswith(DATA_FILE):
            assert size == written, file
        else:
            assert abs(size - written) < 20_000, file
    known = {str(file.relative_to(graphs)) for file in graphs.rglob("*") if file.is_file()}
    assert known == set(told)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_decoder_of_a_tied_checkpoint_has_the_size_that_is_told(
    tmp_path: Path, precision: Precision, tied: bool
):
    changes = {"text_config.intermediate_size": 1024, "text_config.vocab_size": 3000}
    model = random_model(small_config(**changes))
    with torch.no_grad():
        if tied:
            model.language.lm_head.weight.copy_(model.language.embedding)
    file = export_graph(model, DECODER, Numerics(precision), tmp_path)
    written = file.with_name(DATA_FILE).stat().st_size
    assert weights(model.config, tied=tied)[DECODER].nbytes(precision) == written


_POOLING = "vision.connector.pooling"
_MIXED = {
    f"{_POOLING}.wq": LayerRule(("*",), "int8", "smoothquant"),
    f"{_POOLING}.wk": LayerRule(("*",), "fp8"),
    f"{_POOLING}.wv": LayerRule(("*",), "fp8"),
    f"{_POOLING}.wo": LayerRule(("*",), "int8"),
    "vision.connector.w1": LayerRule(("*",), "int4"),
    "vision.connector.w3": LayerRule(("*",), "int4"),
    "vision.connector.w2": LayerRule(("*",), "nvfp4"),
    "language.blocks.0.att_proj": LayerRule(("*",), "int4"),
    "language.blocks.0.ff_proj": LayerRule(("*",), "int8", "max"),
    "language.blocks.0.ff_out": LayerRule(("*",), "int8", "smoothquant"),
    "language.lm_head": LayerRule(("*",), "int8", "max"),
}


@pytest.mark.parametrize("graph", [CONNECTOR, DECODER])
@pytest.mark.parametrize("tied", [True, False])
def test_quantised_graphs_have_the_sizes_that_are_told(tmp_path: Path, graph: str, tied: bool):
    changes = {
        "adapter_config.hidden_size": 32, "adapter_config.intermediate_size": 48,
        "text_config.hidden_size": 32, "adapter_config.text_hidden_size": 32,
        "text_config.intermediate_size": 1024, "text_config.vocab_size": 3000,
    }  # fmt: skip
    model = random_model(small_config(**changes))
    if tied:
        with torch.no_grad():
            model.language.lm_head.weight.copy_(model.language.embedding)
    shapes = {name.removesuffix(".weight"): p.shape for name, p in model.named_parameters()}
    layers = {name: any_scales(tuple(shapes[name]), rule) for name, rule in _MIXED.items()}
    file = export_graph(model, graph, Numerics("fp16", layers), tmp_path)
    written = file.with_name(DATA_FILE).stat().st_size
    held = weights(model.config, tied=tied, rules=_MIXED)[graph]
    assert held.nbytes("fp16") == written
    assert held.count == weights(model.config, tied=False)[graph].count


def test_bytes_of_quantised_layers_by_hand():
    name = "language.blocks.0.ff_out"
    config = ModelConfig.from_dict(
        small_config(**{"text_config.intermediate_size": 320}), has_scorer=True
    )
    outputs = config.text.hidden_size

    def told(rules: dict[str, LayerRule]) -> int:
        tensors = weights(config, rules=rules)[DECODER].tensors
        return sum(tensor.nbytes("fp16") for tensor in tensors)

    for rule, bits in (
        (LayerRule(("*",), "int4"), 4 + 16 / 64),  # 320 inputs have blocks of 64
        (LayerRule(("*",), "nvfp4"), 4 + 8 / 16),
        (LayerRule(("*",), "int8", "max"), 8 + 16 / 320),
        (LayerRule(("*",), "fp8"), 8 + 16 / 320),
    ):
        smooth = 320 * 2 * (rule.format == "int4")
        assert told({}) - told({name: rule}) == outputs * 320 * (16 - bits) / 8 - smooth


def test_a_tied_head_is_stored_once():
    own, tied = (weights(FULL_SIZE, tied=tied)[DECODER].nbytes("fp16") for tied in (False, True))
    head = 2 * FULL_SIZE.text.vocab_size * FULL_SIZE.text.hidden_size
    assert abs(own - tied - head) <= DATA_ALIGNMENT
    assert tied == pytest.approx(8.04e9, rel=0.002)  # as the full-size dry run writes it


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_cache_is_what_a_session_allocates(precision: Precision):
    config = ModelConfig.from_dict(small_config(), has_scorer=True)

    class Runner:
        updates_in_place = True
        cache_capacity = None
        zeros = staticmethod(np.zeros)

    runner: Any = Runner()
    cache = KVCache(runner, config, precision, 77)
    assert sum(array.nbytes for array in cache.past.values()) == cache_bytes(config, precision, 77)


def test_old_tensorrt_has_the_cache_twice():
    def cache(target: str) -> int:
        planned = estimate(FULL_SIZE, precision="fp16", target=target, max_tokens=1000)
        return next(part.bytes for part in planned.parts if part.name.startswith("KV cache"))

    once = cache_bytes(FULL_SIZE, "fp16", 1000)
    assert cache("h200") == once
    assert cache("orin-nx-16gb") == 2 * once


def test_longer_clips_and_lower_ratios_need_more():
    def needed(**settings: Any) -> int:
        return estimate(FULL_SIZE, precision="fp16", target="h200", **settings).needed

    frames = [needed(max_frames=count) for count in (1, 8, 64, 256)]
    assert frames == sorted(frames)
    assert len(set(frames)) == 4
    ratios = [needed(min_prune_ratio=ratio) for ratio in (0.8, 0.5, 0.0)]
    assert ratios == sorted(ratios)
    assert needed(max_tokens=2000) < needed(max_tokens=8000)


def test_the_longest_sequence_is_what_the_longest_clip_needs():
    assert kept_windows(FULL_SIZE, 64, 0.5) == 2592
    assert needed_tokens(FULL_SIZE, 64, 0.5) == 2592 + 64 * 12 + 1024
    assert estimate(FULL_SIZE, max_frames=64, min_prune_ratio=0.5).tokens == 4384
    whole = dataclasses.replace(
        FULL_SIZE, vision=dataclasses.replace(FULL_SIZE.vision, pruning=None)
    )
    assert kept_windows(whole, 64, 0.5) == 64 * 81


def test_what_fits_is_returned():
    planned = check_fits(FULL_SIZE, target="thor", precision="fp16", tied=True)
    assert planned.fits
    assert nearest(planned) == []


def test_what_does_not_fit_is_refused_with_the_nearest_that_does():
    settings: dict[str, Any] = {
        "precision": "fp16", "max_frames": 128, "min_prune_ratio": 0.5, "tied": True
    }  # fmt: skip
    with pytest.raises(InputError) as error:
        check_fits(FULL_SIZE, target="orin-nx-16gb", **settings)
    text = str(error.value)
    assert text.startswith("Jetson Orin NX 16GB: a session needs ")
    assert "decoder: engine" in text
    assert "16.00 GB less" in text
    planned = estimate(FULL_SIZE, target="orin-nx-16gb", **settings)
    ways = dict(nearest(planned))
    assert all(way in text for way in ways)
    frames = next(int(way.split()[1]) for way in ways if way.startswith("--max-frames"))
    for count, fits in ((frames, True), (frames + 1, False)):
        changed = estimate(FULL_SIZE, target="orin-nx-16gb", **{**settings, "max_frames": count})
        assert changed.fits is fits
    tokens = next(int(way.split()[1]) for way in ways if way.startswith("--max-tokens"))
    assert estimate(FULL_SIZE, target="orin-nx-16gb", max_tokens=tokens, **settings).fits
    assert not estimate(FULL_SIZE, target="orin-nx-16gb", max_tokens=tokens + 64, **settings).fits
    assert any(way.startswith("--min-prune-ratio") for way in ways)
    assert "--target agx-orin-32gb" in ways


def test_weights_that_do_not_fit_leave_another_target():
    planned = estimate(FULL_SIZE, target="orin-nano-8gb", precision="fp16", tied=True)
    assert [way for way, _ in nearest(planned)] == ["--target agx-orin-32gb"]


def test_half_precision_is_proposed_where_it_is_enough():
    tight = dataclasses.replace(DEVICES["rtx-4090"], memory=16 * GB)
    planned = estimate(FULL_SIZE, target=tight, max_frames=16, tied=True)
    assert planned.fits is False
    ways = dict(nearest(planned))
    assert ways["--precision fp16"].fits
    assert ways["--precision fp16"].needed < 0.6 * planned.needed


def test_int4_is_proposed_where_half_precision_is_not_enough():
    orin: dict[str, Any] = {"target": "orin-nano-8gb", "max_frames": 8, "tied": True}
    for precision in ("fp32", "fp16"):
        planned = estimate(FULL_SIZE, precision=precision, **orin)
        ways = dict(nearest(planned))
        assert "--precision fp16" not in ways
        assert ways["--precision int4"].fits
        told = estimate(FULL_SIZE, precision="int4", **orin)
        assert ways["--precision int4"].needed == told.needed
    # Nothing is proposed to who has chosen a recipe, and no device that cannot run it.
    chosen = estimate(FULL_SIZE, precision="nvfp4", target="thor", max_frames=2000, tied=True)
    assert chosen.fits is False
    ways = dict(nearest(chosen))
    assert not any("--precision" in way or "orin" in way for way in ways)


def test_a_recipe_that_does_not_run_there_is_refused():
    with pytest.raises(InputError, match="recipe nvfp4 uses nvfp4") as error:
        estimate(FULL_SIZE, precision="nvfp4", target="agx-orin-32gb")
    assert "int4" in str(error.value)


@pytest.mark.parametrize(("precision", "least", "most"), [
    ("int8", 0.5, 0.65),  # the head, the table and the blocks below the scorer stay fp16
    ("int4", 0.4, 0.5),
    ("nvfp4", 0.35, 0.5),
])  # fmt: skip
def test_quantised_weights_take_less_on_a_gpu(precision: str, least: float, most: float):
    settings: dict[str, Any] = {"target": "rtx-5090", "max_frames": 8, "tied": True}
    half = estimate(FULL_SIZE, precision="fp16", **settings)
    quantised = estimate(FULL_SIZE, precision=precision, **settings)
    share = sum(quantised.engines.values()) / sum(half.engines.values())
    assert least < share < most
    assert quantised.needed < half.needed
    assert quantised.cache_per_token == half.cache_per_token


def test_an_int8_cache_takes_half_of_one_in_half_precision():
    recipe = dataclasses.replace(Recipe.load("int8"), kv_cache="int8")
    half, int8 = (estimate(FULL_SIZE, precision=one) for one in ("fp16", recipe))
    assert 2 * int8.cache_per_token == half.cache_per_token


@pytest.mark.parametrize("precision", ["int8", "int4", "fp8", "cpu"])
def test_a_session_on_the_cpu_holds_what_its_formats_take(precision: str):
    """fp16 weights become fp32 there; 4-bit ones stay, and 8-bit ones are converted in turn."""
    planned = estimate(FULL_SIZE, precision=precision, max_frames=8, tied=True)
    parts = {part.name: part for part in planned.parts}
    text = FULL_SIZE.text
    C, d, hidden = text.hidden_size, text.head_dim, text.intermediate_size
    layer = 2 * C * (text.num_heads + text.num_kv_heads) * d + 3 * C * hidden
    head = 4 * C * (text.vocab_size + text.additional_vocab_size)
    held = text.num_layers * layer * {"int4": 1.2, "int8": 0, "fp8": 0, "cpu": 1}[precision] + head
    assert parts["decoder: weights"].bytes == pytest.approx(held, rel=0.001)
    prefill = next(part for name, part in parts.items() if "prefill" in name)
    assert prefill.when == ("called" if precision in ("int4", "cpu") else "answer")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "int3"}, "no recipe 'int3'.*did you mean"),
        ({"max_frames": 0}, "max_frames is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"min_prune_ratio": 1.0}, "min_prune_ratio is 1.0"),
        ({"backend": "torch"}, "back end 'torch'"),
        ({"target": "orin"}, "target 'orin'"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        estimate(FULL_SIZE, **settings)


# --- What build refuses ---


def test_engines_take_no_longer_clips_than_the_plugin():
    most: dict[str, Any] = {"precision": "fp16", "target": "h200", "max_tokens": 8192}
    estimate(FULL_SIZE, max_frames=MAX_ENGINE_FRAMES, **most)
    estimate(FULL_SIZE, max_frames=MAX_ENGINE_FRAMES + 1)  # on ONNX Runtime
    with pytest.raises(InputError, match="max_frames is 4097") as error:
        estimate(FULL_SIZE, max_frames=MAX_ENGINE_FRAMES + 1, **most)
    assert "up to 4096 in engines" in str(error.value)


def test_sequences_without_positions_are_refused_and_not_proposed():
    with pytest.raises(InputError, match="max_tokens is 40000") as error:
        estimate(FULL_SIZE, max_tokens=40_000)
    assert "36864" in str(error.value)
    tight = dataclasses.replace(DEVICES["rtx-4090"], memory=15 * GB)
    planned = estimate(
        FULL_SIZE, target=tight, precision="fp16", max_frames=1000, max_tokens=36_864, tied=True
    )
    (tokens,) = (
        int(way.split()[1]) for way, _ in nearest(planned) if way.startswith("--max-tokens")
    )
    assert needed_tokens(FULL_SIZE, 1, 0.0) < tokens < 36_864


def test_a_proposed_sequence_holds_a_frame_and_a_question():
    one = needed_tokens(FULL_SIZE, 1, 0.0)
    settings: dict[str, Any] = {"precision": "fp16", "max_frames": 8, "tied": True}
    least = estimate(FULL_SIZE, target="h200", max_tokens=one, **settings).needed
    device = dataclasses.replace(DEVICES["h200"], memory=least - 1, reserve=0)
    ways = nearest(estimate(FULL_SIZE, target=device, **settings))
    assert not any(way.startswith("--max-tokens") for way, _ in ways)


def test_a_clip_that_the_model_has_no_positions_for_is_told(monkeypatch: pytest.MonkeyPatch):
    planned = estimate(FULL_SIZE, max_frames=500, target="h200", precision="fp16")
    assert planned.tokens == 36_864
    assert planned.wanted == 500 * (81 + 12) + 1024
    assert f"may need {planned.wanted} tokens: prompts of more than 36864" in estimate_text(planned)
    assert estimate(FULL_SIZE, max_frames=64).too_long is None
    lines = _check(monkeypatch, memory=100, disk=100, max_frames=500, max_tokens=36_864)
    assert f"may need {planned.wanted} tokens" in lines[-1]


def test_a_bundle_is_not_planned_wider_than_it_is(small_bundle: Path):
    limits = Bundle.open(small_bundle).manifest.limits
    with pytest.raises(InputError, match=f"max_frames is {limits.max_frames + 1}"):
        estimate_source(small_bundle, max_frames=limits.max_frames + 1)
    with pytest.raises(InputError, match="revision main, but it is a bundle"):
        estimate_source(small_bundle, revision="main")


def test_engines_need_a_gpu_here(small_bundle: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("stts_export.doctor.this_gpu", lambda: None)
    for backend in ("tensorrt", "tensorrt-rtx"):
        with pytest.raises(InputError, match=f"{backend} needs a GPU, and none was found") as error:
            estimate_source(small_bundle, backend=backend)
        assert "--target" in str(error.value)

    def broken() -> None:
        raise KeyError("memory")

    monkeypatch.setattr("stts_export.doctor.this_gpu", broken)
    with pytest.raises(InputError, match="the GPU cannot be looked at: KeyError"):
        estimate_source(small_bundle)


@pytest.mark.parametrize(
    ("backend", "target", "message"),
    [
        ("tensorrt-rtx", "h200", "tensorrt-rtx is not for sm90"),
        ("onnxruntime", "h200", "takes memory of the host"),
    ],
)
def test_a_back_end_that_does_not_run_there_is_refused(backend: str, target: str, message: str):
    with pytest.raises(InputError, match=message):
        estimate(FULL_SIZE, backend=backend, target=target)


# --- Against the dry run of full size ---

_RUN = json.loads((ROOT / "benchmarks" / "results" / "full_size_4b.json").read_text())
_LIMIT = 0.15


def _dry_run(**settings: Any) -> Estimate:
    """The estimate of what `benchmarks/full_size.py` runs."""
    config = ModelConfig.from_dict(config_json("4b"), has_scorer=True)
    new = _RUN["answer"]["prompt_tokens"] + _RUN["answer"]["new_tokens"]
    asked = {"max_frames": 4, "max_tokens": new, "min_prune_ratio": 0.5}
    return estimate(config, precision="fp16", tied=True, **{**asked, **settings})


def test_stages_of_the_dry_run_need_what_is_told():
    config = ModelConfig.from_dict(config_json("4b"), has_scorer=True)
    told = {
        stage.name.partition(":")[0]: stage.memory
        for stage in estimate(config, precision="fp16", tied=True).stages
        if stage.name != RANGES  # later than that run
    }
    stages = _RUN["steps"]["build"]["stages"][1:]  # the first is Python's start
    assert [stage["stage"].partition(":")[0] for stage in stages] == list(told)
    for stage in stages:
        name = stage["stage"].partition(":")[0]
        assert told[name] == pytest.approx(stage["peak_anonymous"], rel=_LIMIT), name


def _on(free: int) -> Estimate:
    device = dataclasses.replace(DEVICES["thor"], memory=free, reserve=0)
    return _dry_run(target=device, backend="onnxruntime")


def test_sessions_of_the_dry_run_need_what_is_told():
    planned = _on(15 * GB)
    lean, roomy = _RUN["answer"], _RUN["answer_with_room"]
    assert planned.fits
    assert planned.needed == pytest.approx(lean["peak_anonymous"], rel=_LIMIT)
    assert planned.with_copies == pytest.approx(roomy["peak_anonymous"], rel=_LIMIT)
    tower = [part for part in planned.parts if not part.name.startswith(DECODER)]
    encode = next(stage for stage in lean["stages"] if stage["stage"] == "encode")
    assert peak(tower) == pytest.approx(encode["peak_anonymous"], rel=_LIMIT)
    assert _on(30 * GB).needed == planned.with_copies
    assert planned.without_copies is not None
    assert planned.without_copies < planned.needed
    assert "with copies of all weights" in estimate_text(planned)


def test_what_is_held_at_once_is_the_peak():
    parts = [
        Part("weights", 100), Part("conversion", 30, "open"), Part("arena", 10, "called"),
        Part("frames", 5, "encode"), Part("cache", 7, "answer"),
    ]  # fmt: skip
    assert peak(parts) == 130
    assert peak(parts[:1] + parts[2:]) == 117


# --- Folders ---


def test_a_bundle_and_its_checkpoint_tell_the_same(golden_bundle: Path):
    precision = Bundle.open(golden_bundle).manifest.precision
    settings: dict[str, Any] = {"target": "agx-orin", "max_frames": 8}
    bundle = estimate_source(golden_bundle, **settings)
    checkpoint = estimate_source(GOLDEN, precision=precision, **settings)
    for name in ("files", "engines", "parts", "tokens", "needed", "cache_per_token"):
        assert getattr(bundle, name) == getattr(checkpoint, name), name
    assert bundle.stages[0].name == "copy the graphs"
    other = "fp16" if precision == "fp32" else "fp32"
    with pytest.raises(InputError, match=f"precision {other}, but the bundle's graphs"):
        estimate_source(golden_bundle, precision=other)


def test_this_machine_is_planned_with_what_is_free(
    golden_bundle: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("stts_export.estimate_report.available_memory", lambda: 10**9)
    monkeypatch.setattr("stts_export.estimate_report.total_memory", lambda: 4 * 10**9)
    planned = estimate_source(golden_bundle, backend="onnxruntime", max_frames=4)
    assert planned.device is not None
    assert planned.device.usable == 10**9
    assert planned.fits
    text = estimate_text(planned)
    assert "this machine" in text
    assert "fits: 1.00 GB usable" in text
    values = json.loads(json.dumps(estimate_json(planned)))
    assert values["fits"] is True
    assert values["kv_cache"]["bytes"] == values["kv_cache"]["bytes_per_token"] * planned.tokens


def test_a_machine_that_does_not_tell_its_memory_is_unknown(
    small_bundle: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("stts_export.estimate_report.available_memory", lambda: None)
    monkeypatch.setattr("stts_export.estimate_report.total_memory", lambda: None)
    planned = estimate_source(small_bundle, backend="onnxruntime")
    assert planned.device is None
    assert planned.fits is None


def test_of_a_name_on_the_hub_no_weights_are_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[Any] = []

    def download(name: str, revision: str | None, *, weights: bool) -> Path:
        asked.append((name, revision, weights))
        return tmp_path

    monkeypatch.setattr("stts_export.checkpoint.hub.download", download)
    for file in GOLDEN.glob("*.json"):
        shutil.copy(file, tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.unlink(missing_ok=True)
    with pytest.raises(InputError, match=r"has no model\.safetensors\.index\.json") as error:
        estimate_source("someone/model", target="h200")
    assert "pass the folder" in str(error.value)
    whole = open_checkpoint(GOLDEN)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(whole.tensors, "a.safetensors")}))
    planned = estimate_source("someone/model", revision="v1", target="h200", max_frames=4)
    assert asked[-1] == ("someone/model", "v1", False)
    local = estimate_source(GOLDEN, target="h200", max_frames=4)
    assert planned.needed == local.needed
    assert planned.files == local.files


def test_a_bundle_is_estimated_without_torch(golden_bundle: Path):
    code = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnx", "onnxruntime", "safetensors", "yaml"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
from stts_export.cli import main
sys.exit(main(["estimate", {str(golden_bundle)!r}, "--target", "agx-orin", "--json"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fits"] is True


# --- Before a build ---


def _check(
    monkeypatch: pytest.MonkeyPatch, *, memory: float, disk: float, **changes: Any
) -> list[str]:
    monkeypatch.setattr(estimating, "available_memory", lambda: int(memory * GB))
    monkeypatch.setattr(estimating, "free_swap", lambda: 0)
    usage = _DISK(10**13, 0, int(disk * GB))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    settings: dict[str, Any] = {
        "output": Path("bundle"), "recipe": Recipe.plain("fp16"), "max_frames": 64,
        "max_tokens": 8192, "min_prune_ratio": 0.0, "tied": True, **changes,
    }  # fmt: skip
    return check_build(FULL_SIZE, **settings)


def test_a_build_that_can_be_held_is_told_stage_by_stage(monkeypatch: pytest.MonkeyPatch):
    total, *rest = _check(monkeypatch, memory=24, disk=20, backends=(("tensorrt", True),))
    assert "of memory (in decoder: build the engine; 24.00 GB available)" in total
    stages = [line.partition(": ")[0].strip() for line in rest]
    assert stages.count("decoder") == 2  # exported, and its engine
    assert "KV cache" in rest[-1]
    assert "8192 tokens" in rest[-1]


def test_scales_and_gates_need_the_checkpoint_in_memory(monkeypatch: pytest.MonkeyPatch):
    def stages(**changes: Any) -> dict[str, str]:
        lines = _check(monkeypatch, memory=100, disk=100, **changes)[1:]
        return dict(line.strip().split(": ", 1) for line in lines if " of disk" in line)

    assert not {CALIBRATE, JUDGE} & set(stages())
    names = list(stages(recipe=Recipe.load("int4")))
    assert names[:2] == [RANGES, CALIBRATE]
    assert names[-1] == JUDGE
    names = list(stages(recipe=Recipe.load("int4"), calibrated=True))
    assert CALIBRATE not in names
    assert names[-1] == JUDGE
    assert RANGES not in stages(recipe=Recipe.load("cpu"))
    whole = 4 * sum(weights(FULL_SIZE, tied=True)[name].count for name in (
        VISION_LOWER, VISION_UPPER, DECODER
    ))  # fmt: skip
    for stage in _stages(Recipe.load("int4")):
        if stage.name in (CALIBRATE, JUDGE):
            assert whole < stage.memory < 3 * whole
    # Where they do not fit, weights stay on disk (`reference_model`), and a session is lean.
    lines = _check(monkeypatch, memory=24, disk=100, recipe=Recipe.load("int8"))
    assert float(lines[0].split(" GB")[0].split()[-1]) < 24
    with pytest.raises(InputError, match="of memory are available"):
        _check(monkeypatch, memory=2, disk=100, recipe=Recipe.load("int8"))


def _stages(recipe: Recipe) -> tuple[Stage, ...]:
    return estimate(FULL_SIZE, precision=recipe, max_frames=64, tied=True).stages


def test_calibration_keeps_samples_of_every_input():
    kept = next(one.disk for one in _stages(Recipe.load("int4")) if one.name == CALIBRATE)
    with torch.device("meta"):
        model: torch.nn.Module = SttsModel(FULL_SIZE)
    layers = (model.get_submodule(names[0]) for names in input_groups(FULL_SIZE))
    widths = [layer.in_features for layer in layers if isinstance(layer, torch.nn.Linear)]
    assert len(widths) == len(input_groups(FULL_SIZE))
    # The head of a tied checkpoint is not counted.
    assert kept == 4 * ROWS * (sum(widths) - FULL_SIZE.text.hidden_size)


def test_layers_that_are_fp32_with_others_are_counted():
    """As `Precision.numerics` builds them."""
    rules = (
        LayerRule(("language.blocks.*.attn_out", "vision.connector.w2"), "fp32"),
        LayerRule(("decoder",), "int4"),
    )
    some = Recipe("some", "", "fp16", layers=rules, gates=Recipe.load("int4").gates)
    parts = ("language.blocks.*.att*", "vision.connector.*")
    every = dataclasses.replace(some, layers=(LayerRule(parts, "fp32"), rules[1]))
    counted, expected = (
        {
            graph: of.nbytes("fp16")
            for graph, of in weights(FULL_SIZE, rules=r.plan(FULL_SIZE)).items()
        }
        for r in (some, every)
    )
    assert counted == expected


def test_no_recipe_is_proposed_that_the_model_has_no_blocks_for():
    odd = dataclasses.replace(
        FULL_SIZE, text=dataclasses.replace(FULL_SIZE.text, intermediate_size=9736)
    )
    settings: dict[str, Any] = {"precision": "fp16", "target": "orin-nano-8gb", "tied": True}
    planned = estimate(odd, max_frames=8, **settings)
    assert not any("int4" in way for way, _ in nearest(planned))
    with pytest.raises(InputError, match="a session needs"):
        check_fits(odd, max_frames=8, **settings)
    for precision in ("int4", "nvfp4"):
        with pytest.raises(InputError, match=r"ff_out: has 9736 inputs"):
            estimate(odd, precision=precision)


def test_fp16_is_advised_to_who_builds_in_fp32_only(monkeypatch: pytest.MonkeyPatch):
    for name, is_advised in (("fp32", True), ("cpu", False), ("int4", False)):
        with pytest.raises(InputError, match="free") as error:
            _check(monkeypatch, memory=100, disk=1, recipe=Recipe.load(name))
        assert ("--precision fp16" in str(error.value)) == is_advised


def test_a_disk_that_is_too_small_is_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match=r"5.00 GB free") as error:
        _check(monkeypatch, memory=24, disk=5)
    assert "-o" in str(error.value)
    _check(monkeypatch, memory=24, disk=5, done=6 * GB)  # of an interrupted build
    with pytest.raises(InputError, match="--precision fp16"):
        _check(monkeypatch, memory=24, disk=15, recipe=Recipe.plain("fp32"))


def test_memory_that_is_too_small_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    with pytest.raises(InputError, match="of memory are available") as error:
        _check(monkeypatch, memory=1, disk=100)
    assert "it runs here without torch" in str(error.value)
    _check(monkeypatch, memory=8, disk=100, exported=True, backends=(("tensorrt", True),))
    assert "decoder: build the engine needs about" in caplog.text
    assert "same GPU architecture" in caplog.text
    caplog.clear()
    monkeypatch.setattr(estimating, "free_swap", lambda: 100 * GB)
    settings: Any = {"output": Path("b"), "recipe": Recipe.plain("fp16"), "max_frames": 64,
                     "max_tokens": 8192, "min_prune_ratio": 0.0}  # fmt: skip
    monkeypatch.setattr(estimating, "available_memory", lambda: GB)
    check_build(FULL_SIZE, **settings)  # with swap it can be done
    assert "it may swap" in caplog.text


def test_memory_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    (tmp_path / "meminfo").write_text("MemTotal: 4000000 kB\nMemAvailable: 3000000 kB\n")
    monkeypatch.setattr(machine, "_MEMINFO", tmp_path / "meminfo")
    assert machine.available_memory() == 3_000_000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1\n")
    assert machine.available_memory() == 3_000_000 * 1024
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert machine.available_memory() == 600_000
    (tmp_path / "memory.stat").write_text("anon 90000\nfile 310000\ninactive_file 250000\n")
    assert machine.available_memory() == 850_000  # pages of files can be dropped
    monkeypatch.setattr(machine, "_MEMINFO", tmp_path / "nothing")
    assert machine.available_memory() == 850_000


def test_memory_of_an_older_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    monkeypatch.setattr(machine, "_MEMINFO", tmp_path / "nothing")
    assert machine.available_memory() is None
    folder = tmp_path / "memory"
    folder.mkdir()
    (folder / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (folder / "memory.usage_in_bytes").write_text("400000\n")
    (folder / "memory.stat").write_text("inactive_file 7\ntotal_inactive_file 50000\n")
    assert machine.available_memory() is None  # no limit
    (folder / "memory.limit_in_bytes").write_text("1000000\n")
    assert machine.available_memory() == 650_000


def test_an_estimate_of_no_device_says_nothing_of_fitting():
    planned: Estimate = estimate(FULL_SIZE)
    assert planned.fits is None
    assert "fit" not in estimate_text(planned)
