"""An int8 cache holds what rounding by hand gives, head by head, and answers follow from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from stts_export.bundle import Limits, Manifest
from stts_export.calibration.cache_scales import CacheScales, cache_scales
from stts_export.calibration.calibrate import Calibration
from stts_export.calibration.layers import Numerics
from stts_export.calibration.recipe import Gates, Recipe
from stts_export.calibration.rounding import rounded_model
from stts_export.engines import onnxruntime
from stts_export.errors import InputError, VerificationError
from stts_export.graphs.cache import quantise_cache, round_cache
from stts_export.graphs.check import check_graph
from stts_export.graphs.export import _traced
from stts_export.graphs.split import PAIRS, split_queries
from stts_export.graphs.weights import write_weights
from stts_export.live.opening import laid_out_cache
from stts_export.model.language import attention_mask
from stts_export.model.vlm import SttsModel
from stts_export.runtime import decoder
from stts_export.runtime.decoder import KVCache
from stts_export.tensors import (
    DATA_FILE,
    DECODER,
    DECOMPOSED,
    SPLIT,
    KvCache,
    Precision,
    cache_dtype,
    graph_specs,
    past_names,
    variant,
)
from stts_export.tolerances import difference
from tests.helpers import random_model

_TOKENS, _CAPACITY = 14, 17
_LAST: NDArray[np.float32] = np.array([[1], [1.5]], np.float32)
_LOUD = 100
"""How much larger the values of the last head are than those of the first."""
_FP32_LAYER = "language.blocks.0.att_proj"
"""At fp16, so that a graph has caches of both types."""

Written = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, (1, kv_heads, L, d)."""


@pytest.fixture(scope="module")
def model() -> SttsModel:
    model = random_model()
    text = model.config.text
    block: Any
    with torch.no_grad():
        for block in model.language.blocks:
            block.att_proj.weight[-text.head_dim :] *= _LOUD
            block.attn_out.weight[:, -text.head_dim * text.num_heads // 2 :] /= _LOUD
    return model


@pytest.fixture(scope="module")
def call(model: SttsModel) -> tuple[Tensor, Tensor]:
    """Ids (1, L), of a clip of 4 windows and text, and features."""
    tokens = model.config.tokens
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.text.vocab_size, (1, _TOKENS), generator=generator)
    ids[0, 1:7] = torch.tensor([tokens.frame_start, *[tokens.im_patch] * 4, tokens.frame_end])
    return ids, torch.randn(4, model.config.text.hidden_size, generator=generator)


@pytest.fixture(scope="module")
def exact(model: SttsModel, call: Any) -> tuple[Written, NDArray[np.float32]]:
    """What the model caches and answers when nothing is rounded."""
    return _by_hand(model, call, lambda _, x: x)


@pytest.fixture(scope="module")
def scales(exact: Any) -> CacheScales:
    statistics: Any = SimpleNamespace(
        keys={layer: _amax(key) for layer, (key, _) in enumerate(exact[0])},
        values={layer: _amax(value) for layer, (_, value) in enumerate(exact[0])},
    )
    return cache_scales(statistics)


@pytest.fixture(scope="module")
def traced(model: SttsModel, tmp_path_factory: pytest.TempPathFactory) -> dict[Precision, Path]:
    """Decoders with an int8 cache that nothing scales yet."""
    numerics = Numerics("fp32"), Numerics("fp16", fp32_layers=frozenset({_FP32_LAYER}))
    files: dict[Precision, Path] = {}
    for one in numerics:
        spec = graph_specs(model.config, one.precision, "int8")[DECODER]
        files[one.precision] = tmp_path_factory.mktemp(one.precision) / "traced.onnx"
        graph = _traced(model, spec, one)
        write_weights(graph.graph, files[one.precision].with_name(DATA_FILE), None)
        ir.save(graph, files[one.precision])
    return files


def _amax(x: Tensor) -> NDArray[np.float32]:
    largest: NDArray[np.float32] = x.abs().amax((0, 2)).numpy()
    return largest


def _rounded(x: Tensor, scale: NDArray[np.float32]) -> NDArray[np.int8]:
    """Codes of (1, kv_heads, L, d), a scale per head."""
    steps = np.rint(x.numpy().astype(np.float64) / scale[:, None, None])
    return steps.clip(-128, 127).astype(np.int8)


def _codes(written: Written, scales: CacheScales) -> list[NDArray[np.int8]]:
    """Codes of keys and values, layer by layer."""
    pairs = zip(written, scales.layers(), strict=True)
    return [_rounded(x, scale) for pair in pairs for x, scale in zip(*pair, strict=True)]


@torch.no_grad()
def _by_hand(model: SttsModel, call: Any, change: Any) -> tuple[Written, NDArray[np.float32]]:
    """Keys and values before `change` (number of a cache tensor, x), and logits (L, V)."""
    ids, features = call
    language, written = model.language, []

    def write(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        written.append((key, value))
        return change(2 * layer, key), change(2 * layer + 1, value)

    order, groups = torch.arange(_TOKENS)[None], model.visual_groups(ids)
    mask = attention_mask(order, groups, order, groups, model.config.bidirectional_visual)
    x = language.transform(language.embed(ids, features), order, mask, write)
    return written, language.lm_head(x)[0].float().numpy()


def _expected(model: SttsModel, call: Any, scales: CacheScales) -> tuple[Any, NDArray[np.float32]]:
    """Codes and logits of a model that attends to what its codes stand for."""
    flat = [scale for pair in scales.layers() for scale in pair]

    def change(number: int, x: Tensor) -> Tensor:
        codes = torch.from_numpy(_rounded(x, flat[number])).float()
        return codes * torch.from_numpy(flat[number])[:, None, None]

    written, logits = _by_hand(model, call, change)
    return _codes(written, scales), logits


def _opened(
    traced: dict[Precision, Path],
    scales: CacheScales,
    precision: Precision,
    *,
    split: bool = False,
    model: SttsModel,
) -> onnxruntime.Runner:
    graph = ir.load(traced[precision])
    quantise_cache(graph.graph, scales, precision)
    if split:
        split_queries(graph, model.config)
        pairs = graph.graph.initializers[PAIRS]
        pairs.const_value = ir.tensor(np.array([3 * _CAPACITY]), name=PAIRS)  # several turns
    file = traced[precision].with_name("quantised.onnx")
    ir.save(graph, file)
    return onnxruntime.open_graph(file, threads=1)


def _run(
    runner: onnxruntime.Runner,
    model: SttsModel,
    call: Any,
    precision: Precision,
    cuts: tuple[int, ...] = (9, 10, 11),
) -> tuple[KVCache, dict[int, NDArray[np.float32]]]:
    """Feed a sequence in parts; returns the cache, and logits by the tokens fed so far."""
    ids, features = call
    cache = KVCache(runner, model.config, precision, _CAPACITY, "int8")
    groups = model.visual_groups(ids)[0].numpy().astype(np.int32)
    rows, logits = features.numpy().astype(cache_dtype(precision, "base")), {}
    for start, stop in zip((0, *cuts), (*cuts, _TOKENS), strict=True):
        part = slice(start, stop)
        logits[stop] = decoder.step(
            runner, cache, ids[0, part].numpy(), groups[part], rows, np.arange(start, stop)
        )
        rows = np.zeros_like(rows[:1])
    return cache, logits


def _check(
    cache: KVCache, logits: dict[int, NDArray[np.float32]], expected: Any, precision: Precision
) -> None:
    """Codes may differ by one where a value lies between two: few at fp32, more at fp16."""
    codes, reference = expected
    held = list(cache.past.values())
    moved, limit = (0.002, 1e-3) if precision == "fp32" else (0.25, 2e-2)
    for got, wanted in zip(held, codes, strict=True):
        off = np.abs(got[:, :, :_TOKENS].astype(int) - wanted)
        assert got.dtype == np.int8
        assert off.max() <= 1
        assert np.mean(off > 0) <= moved
        assert not got[:, :, _TOKENS:].any()
    for stop, got in logits.items():
        assert difference(got, reference[stop - 1], "l2") <= limit


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("split", [False, True])
def test_the_graph_caches_and_answers_as_pytorch_does_that_rounds(
    traced: Any,
    model: SttsModel,
    call: Any,
    scales: CacheScales,
    exact: Any,
    precision: Any,
    split: bool,
):
    runner = _opened(traced, scales, precision, split=split, model=model)
    cache, logits = _run(runner, model, call, precision)
    expected = _expected(model, call, scales)
    _check(cache, logits, expected, precision)
    assert difference(expected[1], exact[1], "l2") > 2e-3  # more than is allowed above


def test_each_head_keeps_its_own_precision(
    traced: Any, model: SttsModel, call: Any, scales: CacheScales, exact: Any
):
    """One is 100 times as large as the other; with a scale for both it would drown it."""
    assert (scales.values[:, 1] > 0.2 * _LOUD * scales.values[:, 0]).all()
    runner = _opened(traced, scales, "fp32", model=model)
    cache, _ = _run(runner, model, call, "fp32", ())
    value = exact[0][0][1]  # of layer 0: nothing before it is rounded
    held = cache.past[past_names(0)[1]][:, :, :_TOKENS]
    for head in range(2):
        read = held[0, head] * scales.values[0, head]
        assert difference(read, value[0, head].numpy(), "l2") < 0.02


def test_what_is_larger_than_calibration_saw_saturates(
    traced: Any, model: SttsModel, call: Any, scales: CacheScales
):
    third = np.float32(1 / 3)
    small = CacheScales(scales.keys * third, scales.values * third)
    cache, logits = _run(_opened(traced, small, "fp32", model=model), model, call, "fp32")
    expected = _expected(model, call, small)
    _check(cache, logits, expected, "fp32")
    for codes in expected[0]:
        assert {codes.min(), codes.max()} == {-128, 127}


_MUTANTS: dict[str, Callable[[CacheScales], CacheScales]] = {
    "keys and values change places": lambda s: CacheScales(s.values, s.keys),
    "layers change places": lambda s: CacheScales(s.keys[[1, 0]], s.values[[1, 0]]),
    "heads change places": lambda s: CacheScales(s.keys[:, [1, 0]], s.values[:, [1, 0]]),
    "one scale for both heads": lambda s: replace(s, values=s.values[:, 1:].repeat(2, 1)),
    "the last layer's keys alone": lambda s: replace(s, keys=s.keys * _LAST),
}


@pytest.mark.parametrize("mutant", _MUTANTS)
def test_scales_in_the_wrong_place_are_found_out(
    traced: Any, model: SttsModel, call: Any, scales: CacheScales, mutant: str
):
    wrong = _MUTANTS[mutant](scales)
    cache, logits = _run(_opened(traced, wrong, "fp32", model=model), model, call, "fp32")
    with pytest.raises(AssertionError):
        _check(cache, logits, _expected(model, call, scales), "fp32")


def test_how_a_sequence_is_cut_into_calls_changes_nothing(
    traced: Any, model: SttsModel, call: Any, scales: CacheScales
):
    runner = _opened(traced, scales, "fp32", model=model)
    whole, at_once = _run(runner, model, call, "fp32", ())
    stepwise, in_steps = _run(runner, model, call, "fp32", tuple(range(7, _TOKENS)))
    for one, other in zip(whole.past.values(), stepwise.past.values(), strict=True):
        assert np.abs(one.astype(int) - other).max() <= 1
    assert difference(in_steps[_TOKENS], at_once[_TOKENS], "l2") <= 1e-3


def test_a_rounded_model_is_the_reference(
    model: SttsModel, call: Any, scales: CacheScales, exact: Any
):
    """And what it was made from stays exact."""
    ids, features = call
    rounded = rounded_model(model, {}, "fp32")
    round_cache(rounded, scales, "fp32")
    with torch.no_grad():
        got, before = (
            one.language(ids, features, model.visual_groups(ids))[0].numpy()
            for one in (rounded, model)
        )
    np.testing.assert_allclose(got, _expected(model, call, scales)[1], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(before, exact[1])


def test_scales_of_fp16_graphs_are_those_of_their_reference(traced: Any, scales: CacheScales):
    """Rounded to fp16 in both, also in a layer that is fp32."""
    graph = ir.load(traced["fp16"]).graph
    quantise_cache(graph, scales, "fp16")
    held = graph.initializers
    for layer, dtype in ((0, np.float32), (1, np.float16)):
        stored = held[f"{past_names(layer)[0]}.scale"].const_value
        assert stored is not None
        assert stored.numpy().dtype == dtype
        np.testing.assert_array_equal(stored.numpy(), scales.keys[layer].astype(np.float16))


@pytest.mark.parametrize(("precision", "times"), [("fp32", 4), ("fp16", 2)])
def test_memory(traced: Any, model: SttsModel, scales: CacheScales, precision: Any, times: int):
    runner = _opened(traced, scales, precision, model=model)
    of_type: dict[KvCache, int] = {}
    for kv_cache in ("base", "int8"):
        cache = KVCache(runner, model.config, precision, 1000, kv_cache)
        of_type[kv_cache] = sum(held.nbytes for held in cache.past.values())
        assert all(
            cache.present[name.replace("past_key_values", "present")] is held
            for name, held in cache.past.items()
        )
    text = model.config.text
    assert of_type["int8"] == 2 * text.num_layers * text.num_kv_heads * text.head_dim * 1000
    assert of_type["base"] == times * of_type["int8"]


def test_answers_come_from_an_int8_cache(
    traced: Any, model: SttsModel, call: Any, scales: CacheScales
):
    """The loop of a session, with each new token fed back."""
    ids, features = call
    runner = _opened(traced, scales, "fp32", split=True, model=model)
    cache = KVCache(runner, model.config, "fp32", _TOKENS + 4, "int8")
    groups = model.visual_groups(ids)[0].numpy().astype(np.int32)
    out = decoder.generate(
        runner, cache, ids[0].numpy(), groups, features.numpy(), max_new_tokens=4, eos_ids=()
    )
    rounded = rounded_model(model, {}, "fp32")
    round_cache(rounded, scales, "fp32")
    assert out.token_ids == rounded.greedy(ids[0], features, 4)
    assert cache.length == _TOKENS + 3


@pytest.mark.parametrize("cut", ["write", "read", "layer"])
def test_a_graph_without_the_casts_is_refused(traced: Any, scales: CacheScales, cut: str):
    graph = ir.load(traced["fp32"]).graph
    scatter = next(node for node in graph if node.op_type == "TensorScatter")
    update: Any = scatter.inputs[1]
    if cut == "write":
        update.producer().op_type = "Floor"
    elif cut == "read":
        next(iter(scatter.outputs[0].consumers())).op_type = "Floor"
    else:
        scales = CacheScales(np.repeat(scales.keys, 2, 0), np.repeat(scales.values, 2, 0))
    with pytest.raises(VerificationError, match="int8 cache of decoder"):
        quantise_cache(graph, scales, "fp32")


@given(
    layers=st.integers(1, 3), heads=st.integers(1, 3), width=st.integers(1, 4), seed=st.integers(0)
)
def test_the_largest_magnitude_of_a_head_is_127(layers: int, heads: int, width: int, seed: int):
    rng = np.random.default_rng(seed)
    order = rng.permutation(layers)
    largest = rng.uniform(1e-3, 1e3, (2, layers, heads, width)).astype(np.float32)
    keys, values = ({int(layer): one[layer] for layer in order} for one in largest)
    found = cache_scales(SimpleNamespace(keys=keys, values=values))  # type: ignore[arg-type]
    for scale, one in zip((found.keys, found.values), largest, strict=True):
        assert scale.dtype == np.float32
        assert scale.shape == (layers, heads)
        np.testing.assert_allclose(scale * 127, one.max(-1), rtol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_only_the_cache_of_the_decoder_is_int8(model: SttsModel, precision: Precision):
    base, int8 = (graph_specs(model.config, precision, cache) for cache in ("base", "int8"))
    assert set(base) - set(int8) == {variant(DECODER, DECOMPOSED)}
    for name, spec in int8.items():
        before = (*base[name].inputs, *base[name].outputs)
        for tensor, other in zip((*spec.inputs, *spec.outputs), before, strict=True):
            is_cache = tensor.name.startswith(("past_key_values.", "present."))
            assert tensor == (replace(other, dtype="int8") if is_cache else other)
    assert sum(tensor.dtype == "int8" for tensor in int8[DECODER].outputs) == 4


def test_incremental_streams_are_refused():
    manifest = Manifest(
        True, "fp16", Limits(8, 100), ("decoder",), ("onnxruntime",), "x", {}, {},
        recipe={"kv_cache": "int8"},
    )  # fmt: skip
    session: Any = SimpleNamespace(bundle=SimpleNamespace(manifest=manifest))
    nothing: Any = None
    with pytest.raises(InputError, match="moves cached keys") as error:
        laid_out_cache(session, nothing, nothing, nothing, 0.5)
    assert error.match("mode: ")
    assert error.match("--mode exact")


@pytest.mark.parametrize("split", [False, True])
def test_the_check_after_an_export_compares_with_a_rounded_cache(
    traced: Any, model: SttsModel, scales: CacheScales, split: bool
):
    name = variant(DECODER, SPLIT) if split else DECODER
    spec = graph_specs(model.config, "fp32", "int8")[name]
    file = traced["fp32"].with_name("quantised.onnx")
    numerics = Numerics("fp32", cache=scales)
    _opened(traced, scales, "fp32", split=split, model=model)
    check_graph(spec, numerics, file, model)
    with pytest.raises(VerificationError, match="logits"):
        check_graph(spec, Numerics("fp32"), file, model)
    other = replace(scales, values=scales.values[:, [1, 0]])
    _opened(traced, other, "fp32", split=split, model=model)
    with pytest.raises(VerificationError, match="logits"):
        check_graph(spec, numerics, file, model)


def test_a_calibration_keeps_the_scales_of_the_cache(tmp_path: Path, scales: CacheScales):
    gates = Gates(min_sqnr=0, min_jaccard=0, min_cosine=0, max_kl=1, max_answers_changed=1)
    recipe = Recipe("mine", "of a test", "fp16", "int8", gates=gates)
    for made_for, cache in ((recipe, scales), (replace(recipe, kv_cache="base"), None)):
        made = Calibration(made_for, {}, cache, "digest", None, "clips", 0.5, 8, {"a": 1.5}, 3, 6)
        made.to_folder(tmp_path)
        read = Calibration.from_folder(tmp_path)
        assert replace(read, cache=None) == replace(made, cache=None)
        if cache is None:
            assert read.cache is None
        else:
            assert read.cache is not None
            np.testing.assert_array_equal(read.cache.keys, cache.keys)
            np.testing.assert_array_equal(read.cache.values, cache.values)
