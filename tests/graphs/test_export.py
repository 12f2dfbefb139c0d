"""Written graphs: interface, types, and that the check after the export can fail."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

from stts_export.bundle import Bundle
from stts_export.calibration.layers import Numerics
from stts_export.errors import InputError, VerificationError
from stts_export.graphs.check import check_graph
from stts_export.graphs.export import export_graph
from stts_export.graphs.modules import module_for
from stts_export.model.vlm import SttsModel
from stts_export.tensors import (
    CONNECTOR,
    DECODER,
    DECOMPOSED,
    VISION_LOWER,
    VISION_UPPER,
    VISION_UPPER_FRAMES,
    Precision,
    graph_specs,
    variant,
)
from tests.helpers import ON_CPU, random_model, small_config

_NUMPY_NAME = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.INT64: "int64",
    onnx.TensorProto.INT32: "int32",
    onnx.TensorProto.UINT8: "uint8",
    onnx.TensorProto.BOOL: "bool",
}


@pytest.fixture(scope="module")
def model() -> SttsModel:
    return random_model()


def _interface(values):
    return [
        (
            value.name,
            _NUMPY_NAME[value.type.tensor_type.elem_type],
            tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim),
        )
        for value in values
    ]


def test_files_have_the_contract_s_interface(golden_bundle: Path):
    bundle = Bundle.open(golden_bundle)
    for name, spec in graph_specs(bundle.config, bundle.manifest.precision).items():
        graph = onnx.load(bundle.graph(name), load_external_data=False).graph
        assert _interface(graph.input) == [(t.name, t.dtype, t.shape) for t in spec.inputs]
        assert _interface(graph.output) == [(t.name, t.dtype, t.shape) for t in spec.outputs]


def test_operators_are_those_that_engines_have(golden_bundle: Path):
    bundle = Bundle.open(golden_bundle)
    found: dict[str, set[str]] = {}
    for name in (VISION_LOWER, VISION_UPPER, VISION_UPPER_FRAMES, CONNECTOR, DECODER):
        model = onnx.load(bundle.graph(name), load_external_data=False)
        found[name] = {node.op_type for node in model.graph.node}
        opset = {entry.domain: entry.version for entry in model.opset_import}
        assert opset[""] == (24 if name == DECODER else 23)
    every = set.union(*found.values())
    assert "Attention" in every
    assert "TensorScatter" in found[DECODER]
    assert "RotaryEmbedding" in found[DECODER]
    assert "RMSNormalization" in found[DECODER]
    assert not every & {"NonZero", "TopK", "Loop", "If", "GatherND", "Compress", "ScatterElements"}


def test_every_graph_is_valid(golden_bundle: Path):
    bundle = Bundle.open(golden_bundle)
    for name in bundle.manifest.graphs:
        onnx.checker.check_model(bundle.graph(name), full_check=True)


def test_weights_of_both_upper_forms_are_stored_once(golden_bundle: Path):
    bundle = Bundle.open(golden_bundle)
    graphs = [bundle.graph(name) for name in (VISION_UPPER, VISION_UPPER_FRAMES)]
    stored = [
        {
            tuple(entry.value for entry in init.external_data)
            for init in onnx.load(file, load_external_data=False).graph.initializer
            if init.data_location == onnx.TensorProto.EXTERNAL
        }
        for file in graphs
    ]
    assert stored[0] == stored[1]
    assert len(stored[0]) > 50
    assert graphs[0].parent == graphs[1].parent
    assert graphs[1].stat().st_size < 200_000


def test_no_path_of_the_exporting_machine_is_left(golden_bundle: Path):
    for file in golden_bundle.rglob("*.onnx"):
        content = file.read_bytes()
        assert b"site-packages" not in content
        assert str(Path(__file__).parents[2]).encode() not in content


@pytest.mark.parametrize("precision", ON_CPU)
@pytest.mark.parametrize("scorer", [True, False])
def test_a_square_grid_and_towers_without_scorer(
    tmp_path: Path, precision: Precision, scorer: bool
):
    values = small_config(
        **{
            "vit_config.image_default_input_size": [126, 126],
            "vit_config.image_num_pos": 81,
            "text_config.num_key_value_heads": 4,
        }
    )
    model = random_model(values, scorer=scorer, seed=1)
    for graph in (VISION_LOWER, DECODER):
        export_graph(model, graph, Numerics(precision), tmp_path)
        export_graph(model, variant(graph, DECOMPOSED), Numerics(precision), tmp_path)


def test_fp16_never_rounds_what_stays_fp32(model: SttsModel):
    half = module_for(VISION_LOWER, model, "fp16").get_submodule("tower")
    full = model.vision
    assert half.get_parameter("blocks.0.attention.wq.weight").dtype == torch.float16
    for name in ("embedding", "scorer"):
        kept = dict(getattr(full, name).named_parameters())
        for key, parameter in getattr(half, name).named_parameters():
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, kept[key])
    norm = "blocks.0.ffn_norm.weight"
    assert torch.equal(half.get_parameter(norm), full.get_parameter(norm))


@pytest.mark.parametrize("graph", [VISION_LOWER, VISION_UPPER, CONNECTOR, DECODER])
def test_a_graph_that_differs_is_an_error(tmp_path: Path, graph: str):
    exported, other = random_model(seed=0), random_model(seed=0)
    with torch.no_grad():
        other.vision.blocks[0].get_parameter("feed_forward.w2.bias").add_(0.05)
        other.vision.connector.w2.weight.mul_(1.01)
        other.language.norm.weight.mul_(1.01)
    specs = graph_specs(exported.config, "fp32")
    for name in [name for name in specs if name.partition("-")[0] == graph]:
        file = export_graph(exported, name, Numerics("fp32"), tmp_path)
        with pytest.raises(VerificationError, match=f"{name} .fp32.: .* differs from PyTorch"):
            check_graph(specs[name], Numerics("fp32"), file, other)


def test_fp16_overflow_is_found(tmp_path: Path):
    model = random_model()
    with torch.no_grad():
        model.vision.blocks[3].get_parameter("feed_forward.w1.weight").mul_(1e5)
    with pytest.raises(InputError, match="precision fp32"):
        export_graph(model, VISION_UPPER, Numerics("fp16"), tmp_path)
