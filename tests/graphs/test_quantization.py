"""Q/DQ in graphs: what is stored, where it stands, and that a wrong scale is found out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from stts_export.calibration.layers import (
    LARGEST,
    Format,
    LayerQuantization,
    Numerics,
    input_groups,
    layers_by_group,
)
from stts_export.calibration.rounding import quantised_weight
from stts_export.errors import VerificationError
from stts_export.graphs.check import check_graph
from stts_export.graphs.export import export_graph
from stts_export.model.vlm import SttsModel
from stts_export.tensors import (
    CONNECTOR,
    DECODER,
    DECOMPOSED,
    SPLIT,
    VISION_LOWER,
    VISION_UPPER,
    VISION_UPPER_FRAMES,
    Precision,
    graph_specs,
    variant,
)
from tests.helpers import random_model, small_config

# Widths that blocks of 16 divide.
_SHAPE = {
    "vit_config.hidden_size": 32, "vit_config.intermediate_size": 48,
    "vit_config.head_dim": 16, "adapter_config.hidden_size": 32,
    "adapter_config.head_dim": 16, "text_config.num_hidden_layers": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> SttsModel:
    return random_model(small_config(**_SHAPE))


def _layers(model: SttsModel, target: Format, *groups: str) -> dict[str, LayerQuantization]:
    """Scales from the weights, and inputs up to 6."""
    generator = torch.Generator().manual_seed(3)
    chosen = [name for group in groups for name in layers_by_group(model.config)[group]]
    smooth: dict[str, Any] = {}
    for names in input_groups(model.config):
        width = _linear(model, names[0]).in_features
        smooth |= dict.fromkeys(names, (0.7 + 0.6 * torch.rand(width, generator=generator)).numpy())
    found = {}
    for name in chosen:
        block = {"int4": 16, "nvfp4": 16}.get(str(target))
        own = None if target == "nvfp4" else smooth[name]
        weight = _linear(model, name).weight.detach()
        weight = weight if own is None else weight / torch.from_numpy(own)
        amax = weight.unflatten(1, (-1, block)).abs().amax(-1) if block else weight.abs().amax(1)
        inputs = 6 / LARGEST[target] / (448 if target == "nvfp4" else 1)
        found[name] = LayerQuantization(
            target, (amax / LARGEST[target]).numpy(), None if target == "int4" else inputs, own,
            block,
        )  # fmt: skip
    return found


@pytest.mark.parametrize(
    ("target", "precision", "graphs"),
    [
        ("int8", "fp32", (VISION_UPPER, VISION_UPPER_FRAMES)),
        ("fp8", "fp16", (CONNECTOR,)),
        ("int4", "fp16", (DECODER,)),
        ("nvfp4", "fp16", (CONNECTOR,)),
    ],
)
def test_graphs_round_as_pytorch_does(
    tmp_path: Path,
    model: SttsModel,
    target: Format,
    precision: Precision,
    graphs: tuple[str, ...],
):
    layers = _layers(model, target, "vision", "connector", "decoder")
    weights = {}
    for graph in graphs:
        weights = _stored(export_graph(model, graph, Numerics(precision, layers), tmp_path))
    name, ours = {
        DECODER: ("decoder.blocks.0.ff_proj", "language.blocks.0.ff_proj"),
        CONNECTOR: ("connector.w1", "vision.connector.w1"),
        VISION_UPPER_FRAMES: ("tower.blocks.4.feed_forward.w1", "vision.blocks.4.feed_forward.w1"),
    }[graphs[-1]]
    values = weights[f"{name}.weight.transposed.{target}"]
    weight = _linear(model, ours).weight.detach()
    expected = quantised_weight(weight, layers[ours], precision)
    assert np.array_equal(values.astype(np.float32), expected.numpy().T)


def _linear(model: SttsModel, name: str) -> torch.nn.Linear:
    layer = model.get_submodule(name)
    assert isinstance(layer, torch.nn.Linear)
    return layer


def _stored(file: Path) -> dict[str, np.ndarray]:
    graph = ir.load(file).graph
    return {
        name: value.const_value.numpy()
        for name, value in graph.initializers.items()
        if value.const_value is not None
    }


def test_every_layer_of_a_recipe_is_quantised_and_nothing_else(tmp_path: Path, model: SttsModel):
    layers = _layers(model, "int8", "vision")
    file = export_graph(model, VISION_LOWER, Numerics("fp16", layers), tmp_path)
    graph = ir.load(file).graph
    quantised = {
        str(value.name).removeprefix("tower.").removesuffix(".weight.transposed.int8")
        for value in graph.initializers.values()
        if value.dtype == ir.DataType.INT8 and value.shape
    }
    # vision_lower ends with the block above the scorer's.
    block = model.config.vision.split_at - 1
    assert quantised == {
        name.removeprefix("vision.") for name in layers if f"blocks.{block}." in name
    }
    # wq, wk and wv read one quantised tensor.
    assert sum(node.op_type == "QuantizeLinear" for node in graph) == 4
    scorer = [name for name in graph.initializers if "scorer" in name and "weight" in name]
    assert scorer
    assert all(graph.initializers[name].dtype == ir.DataType.FLOAT for name in scorer)


def test_variants_carry_the_same_scales_and_a_quantised_head_is_a_matrix_of_its_own(
    tmp_path: Path, model: SttsModel
):
    numerics = Numerics("fp16", _layers(model, "int8", "decoder", "head"))
    for name in (DECODER, variant(DECODER, DECOMPOSED), variant(DECODER, SPLIT)):
        export_graph(model, name, numerics, tmp_path)
    assert not list((tmp_path / "decoder").glob("tmp*"))
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "decoder").iterdir()}
    assert sum(name.endswith(".data") for name in sizes) == 1
    weights = _stored(tmp_path / "decoder" / "model.onnx")
    head = weights["decoder.lm_head.weight.transposed.int8"]
    assert head.shape == (model.config.text.hidden_size, model.config.text.vocab_size)


@pytest.mark.parametrize("what", ["transposed.scale", "q1.smooth", "q1.scale"])
def test_a_scale_in_the_wrong_place_is_found_out(tmp_path: Path, model: SttsModel, what: str):
    layers = _layers(model, "int8", "connector")
    # The others read small numbers, for which these scales are coarse.
    layers = {name: how for name, how in layers.items() if "pooling" in name}
    numerics = Numerics("fp32", layers)
    file = export_graph(model, CONNECTOR, numerics, tmp_path)
    damaged = ir.load(file)
    names = [name for name in damaged.graph.initializers if name.endswith(what)]
    value = damaged.graph.initializers[names[-1]]
    assert value.const_value is not None
    wrong = value.const_value.numpy()[..., ::-1] * 2 if value.shape else np.float32(0.001)
    value.const_value = ir.tensor(np.ascontiguousarray(wrong), name=value.name)
    ir.save(damaged, file)
    with pytest.raises(VerificationError, match="differs from PyTorch"):
        check_graph(graph_specs(model.config, "fp32")[CONNECTOR], numerics, file, model)


def test_bf16_graphs_are_checked_too(tmp_path: Path, model: SttsModel):
    file = export_graph(model, CONNECTOR, Numerics("bf16"), tmp_path)
    types = {value.dtype for value in ir.load(file).graph.initializers.values()}
    assert ir.DataType.BFLOAT16 in types
    assert ir.DataType.FLOAT16 not in types
