"""Layers that stay fp32 in a fp16 graph, and bf16."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from stts_export.calibration.layers import Numerics, layer_names
from stts_export.graphs import modules
from stts_export.graphs.export import export_graph
from stts_export.graphs.modules import model_at, module_for
from stts_export.model.vlm import SttsModel
from stts_export.tensors import (
    CONNECTOR,
    DECODER,
    VISION_LOWER,
    VISION_UPPER,
    VISION_UPPER_FRAMES,
    Precision,
    TensorSpec,
    graph_specs,
)
from stts_export.tolerances import TOLERANCES, difference
from tests.helpers import random_frames, random_model, small_config

GRAPHS = (VISION_LOWER, VISION_UPPER, VISION_UPPER_FRAMES, CONNECTOR, DECODER)
FACTOR = {"fp16": 1, "bf16": 8}
"""Of fp16's tolerances: bf16 has three bits less."""
DTYPE = {"fp16": torch.float16, "bf16": torch.bfloat16}
FRAMES, TOKENS, CAPACITY = 2, 7, 9
SEED = 2
FEED_FORWARD = "vision.blocks.3.feed_forward"


@pytest.fixture(scope="module")
def model() -> SttsModel:
    return random_model(seed=SEED)


@pytest.fixture(autouse=True)
def _eager_cache(monkeypatch: pytest.MonkeyPatch):
    """TensorScatter exists in graphs only."""

    def scatter(past: Tensor, update: Tensor, position: Tensor) -> Tensor:
        assert update.dtype == past.dtype
        start = int(position)
        present = past.clone()
        present[:, :, start : start + update.shape[2]] = update
        return present

    monkeypatch.setattr(modules, "_tensor_scatter", scatter)


def _input(model: SttsModel, tensor: TensorSpec) -> Tensor:
    vision, generator = model.config.vision, torch.Generator().manual_seed(3)
    sizes = {
        "frames": FRAMES, "bins": FRAMES, "tokens": TOKENS, "rows": 20, "capacity": CAPACITY,
        "patches": vision.windows * vision.patches_per_window,
    }  # fmt: skip
    shape = [axis if isinstance(axis, int) else sizes[axis] for axis in tensor.shape]
    if tensor.name == "frames":
        return torch.from_numpy(random_frames(FRAMES))
    if tensor.name == "input_ids":
        return torch.tensor([[1, *[model.config.tokens.im_patch] * (TOKENS - 3), 2, 3]])
    if tensor.name == "fresh":
        return torch.tensor([True, False])
    if tensor.name == "cache_position":
        return torch.tensor([2])
    if "int" in tensor.dtype:
        return torch.randint(0, 4, shape, generator=generator).to(getattr(torch, tensor.dtype))
    return torch.randn(shape, generator=generator).to(getattr(torch, tensor.dtype))


@torch.no_grad()
def _results(
    model: SttsModel,
    graph: str,
    precision: Precision = "fp32",
    fp32_layers: frozenset[str] = frozenset(),
) -> dict[str, Tensor]:
    """Outputs of a graph's module, which have the types that the contract says."""
    spec = graph_specs(model.config, precision)[graph]
    module = module_for(graph, model, precision, fp32_layers)
    outputs = module(*(_input(model, tensor) for tensor in spec.inputs))
    types = {tensor.name: getattr(torch, tensor.dtype) for tensor in spec.outputs}
    named = dict(zip(types, outputs, strict=True))
    assert {name: value.dtype for name, value in named.items()} == types
    return named


def _check_near(
    model: SttsModel, graph: str, precision: Precision, fp32_layers: frozenset[str]
) -> None:
    exact = _results(model, graph)
    got = _results(model, graph, precision, fp32_layers)
    if "scores" in got:  # the bias magnifies what differs there
        inputs = [_input(model, t) for t in graph_specs(model.config, "fp32")[graph].inputs]
        with torch.no_grad():
            before = model.vision.before_scoring(inputs[0])
            exact["hidden"] = model.vision.after_scoring(before, got["scores"], inputs[1])
    for name, value in got.items():
        row = TOLERANCES["hidden" if name.startswith("present") else name, "fp16"]
        off = difference(value.float().numpy(), exact[name].numpy(), row.measure)
        assert off <= row.limit * FACTOR[precision], (graph, name)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_layers_may_stay_fp32(
    model: SttsModel, precision: Precision, graph: str, data: st.DataObject
):
    names = st.sampled_from(layer_names(model.config))
    _check_near(model, graph, precision, frozenset(data.draw(st.sets(names, max_size=8))))


def test_without_a_scorer(model: SttsModel):
    plain = random_model(scorer=False, seed=SEED)
    for kept in (frozenset(), frozenset(["vision.blocks.0.attention.wv"])):
        _check_near(plain, VISION_LOWER, "fp16", kept)
        _check_near(plain, VISION_LOWER, "bf16", kept)


@pytest.mark.parametrize(
    ("layer", "part"),
    [
        ("vision.blocks.3.feed_forward.w2", "vision.blocks.3.feed_forward.*"),
        ("vision.blocks.0.attention.wk", "vision.blocks.0.attention.*"),
        ("vision.connector.pooling.wo", "vision.connector.*"),
        ("vision.connector.w3", "vision.connector.*"),
        ("language.blocks.1.attn_out", "language.blocks.1.att[_n]*[jt].weight"),
        ("language.blocks.0.ff_proj", "language.blocks.0.ff_[po]*.weight"),
        ("language.lm_head", "language.lm_head.weight"),
    ],
)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_part_stays_fp32_as_a_whole(
    model: SttsModel, precision: Precision, layer: str, part: str
):
    before = {name: value.clone() for name, value in model.named_parameters()}
    kept = dict(model_at(model, precision, {layer}).named_parameters())
    assert list(kept) == list(before)
    always = ("vision.embedding.*", "vision.scorer.*", "*norm.weight", "*norm.bias")
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name])
        if any(fnmatch(name, pattern) for pattern in (part, *always)):
            assert kept[name] is value  # never rounded and cast back
        else:
            assert kept[name].dtype == DTYPE[precision]
            assert torch.equal(kept[name], value.to(DTYPE[precision]))
    assert any(fnmatch(name, part) for name in before)


def test_at_fp32_the_model_is_itself(model: SttsModel):
    assert model_at(model, "fp32", {"language.lm_head"}) is model


@pytest.mark.parametrize("layer", ["vision.scorer.w1", "vision.blocks.9.attention.wq", "lm_head"])
def test_a_name_of_no_layer_is_refused(model: SttsModel, layer: str):
    with pytest.raises(KeyError, match=layer):
        module_for(DECODER, model, "fp16", {layer})


def test_a_layer_whose_output_overflows_may_stay_fp32():
    """ONNX Runtime on a CPU computes fp16 in fp32, so that its results would show nothing."""
    model = random_model(seed=SEED)
    with torch.no_grad():
        model.get_parameter(f"{FEED_FORWARD}.w1.weight").mul_(2**15)
        model.get_parameter(f"{FEED_FORWARD}.w2.weight").div_(2**15)
    for graph in (VISION_UPPER, VISION_UPPER_FRAMES):
        assert not _results(model, graph, "fp16")["tapped"].isfinite().all()
        _check_near(model, graph, "fp16", frozenset([f"{FEED_FORWARD}.w1"]))
        _check_near(model, graph, "bf16", frozenset())


def test_a_weight_that_fp16_cannot_hold_may_stay_fp32(tmp_path: Path):
    model = random_model(seed=SEED)
    with torch.no_grad():
        model.get_parameter(f"{FEED_FORWARD}.w1.weight").mul_(1e5)
        model.get_parameter(f"{FEED_FORWARD}.w2.weight").div_(1e5)
    kept = Numerics("fp16", fp32_layers=frozenset([f"{FEED_FORWARD}.w2"]))
    export_graph(model, VISION_UPPER, kept, tmp_path)


def test_the_residual_stream_is_fp32_from_the_first_fp32_part_on():
    """What a later block takes away again need not fit into fp16."""
    values = small_config(
        **{"vit_config.num_hidden_layers": 6, "adapter_config.vit_layers": [-1, -3]}
    )
    model = random_model(values, seed=SEED)
    for block, sign in ((4, 1), (5, -1)):
        with torch.no_grad():
            bias = model.get_parameter(f"vision.blocks.{block}.feed_forward.w2.bias")
            bias[0] = sign * 1e5
    parts = [f"vision.blocks.{block}.feed_forward.w2" for block in (4, 5)]
    for graph in (VISION_UPPER, VISION_UPPER_FRAMES):
        assert not _results(model, graph, "fp16")["tapped"].isfinite().all()
        _check_near(model, graph, "fp16", frozenset(parts))
        _check_near(model, graph, "bf16", frozenset(parts))
