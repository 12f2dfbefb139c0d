"""Decomposed variants: what they hold, that they compute the same, and that rules are loud."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from stts_export.calibration.layers import Numerics
from stts_export.checkpoint import open_checkpoint
from stts_export.config import ModelConfig
from stts_export.engines import onnxruntime
from stts_export.errors import VerificationError
from stts_export.graphs import rewrites
from stts_export.graphs.export import export_graph
from stts_export.graphs.rewrites import TENSORRT_10_3, decompose, expected_counts
from stts_export.tensors import (
    ACTIVATION,
    CONNECTOR,
    DATA_FILE,
    DECODER,
    DECOMPOSED,
    VISION_LOWER,
    VISION_UPPER,
    Precision,
    graph_file,
    past_names,
    present_names,
    variant,
)
from stts_export.tolerances import difference
from tests.helpers import GOLDEN, random_model

_GRAPHS = (VISION_LOWER, VISION_UPPER, CONNECTOR, DECODER)
_FP32, _FP16, _INT64, _BOOL = (
    TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64, TensorProto.BOOL,
)  # fmt: skip


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return open_checkpoint(GOLDEN).config


def _file(bundle: Path, graph: str) -> Path:
    return bundle / "onnx" / graph_file(graph)


def _precision(bundle: Path) -> Precision:
    return "fp16" if bundle.name.endswith("fp16") else "fp32"


def _operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize("graph", _GRAPHS)
def test_variants_hold_only_what_tensorrt_10_3_has(golden_bundle: Path, graph: str):
    file = _file(golden_bundle, variant(graph, DECOMPOSED))
    model = onnx.load(file, load_external_data=False)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
    assert model.ir_version <= 10
    onnx.checker.check_model(file, full_check=True)

    typed = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    types = {init.name: init.data_type for init in typed.initializer}
    for value in (*typed.input, *typed.value_info, *typed.output):
        types[value.name] = value.type.tensor_type.elem_type
    for node in typed.node:
        allowed = {int(dtype) for dtype in TENSORRT_10_3[node.op_type]}
        assert {types[name] for name in node.input} <= allowed, node.name


def test_the_operator_list_is_of_opset_20():
    for operator in TENSORRT_10_3:
        onnx.defs.get_schema(operator, 20)  # raises for one that is younger


@pytest.mark.parametrize("graph", _GRAPHS)
def test_each_rule_applies_as_often_as_the_model_says(
    golden_bundle: Path, config: ModelConfig, graph: str
):
    model = ir.load(_file(golden_bundle, graph))
    before = _operators(model)
    expected = expected_counts(graph, config)
    assert {name: before[name] for name in expected} == expected
    decompose(model, graph, config)
    after = _operators(model)
    assert not set(expected) & set(after)
    assert after["Softmax"] == expected["Attention"]
    if graph == VISION_LOWER:
        assert after["Expand"] == before["Expand"] - 1  # the bias is not spread over the queries
    if graph == DECODER:
        layers = config.text.num_layers
        assert after["MatMul"] == before["MatMul"] + 2 * layers + 2  # two more sum the flags
        # The cache's rows are computed once, each layer's key and value then select by them.
        scatters = expected["TensorScatter"]
        assert after["Gather"] == before["Gather"] + scatters + 1
        assert after["Where"] == before["Where"] + scatters + layers + 1
        assert after["Concat"] == before["Concat"] + expected["RotaryEmbedding"] + 1  # the mask


@pytest.mark.parametrize("graph", _GRAPHS)
def test_variants_share_the_weights_of_their_graph(golden_bundle: Path, graph: str):
    def external(file: Path) -> set[tuple[str, ...]]:
        return {
            tuple(entry.value for entry in init.external_data)
            for init in onnx.load(file, load_external_data=False).graph.initializer
            if init.data_location == TensorProto.EXTERNAL
        }

    original, varied = (_file(golden_bundle, name) for name in (graph, variant(graph, DECOMPOSED)))
    assert external(varied) == external(original)
    assert {entry[0] for entry in external(varied)} == {DATA_FILE}
    assert varied.stat().st_size < original.stat().st_size + 50_000
    assert {path.name for path in original.parent.glob("*.data")} == {DATA_FILE}


def test_decoding_through_both_forms_gives_the_same(golden_bundle: Path, config: ModelConfig):
    """Calls of several lengths on one cache; over 128 tokens, so that flags span blocks."""
    precision = _precision(golden_bundle)
    dtype = ACTIVATION[precision]
    limit = {"fp32": 2e-5, "fp16": 5e-3}[precision]
    text, tokens = config.text, config.tokens
    rng = np.random.default_rng(0)
    lengths = (300, 1, 5, 1, 1)
    capacity = sum(lengths) + 7
    ids = rng.integers(0, text.vocab_size, (1, sum(lengths)))
    ids[0, 3:200] = tokens.im_patch
    ids[0, 100], ids[0, 302] = tokens.frame_start, tokens.im_patch
    features = rng.standard_normal((196, text.hidden_size)).astype(dtype)
    group = np.where(ids == tokens.im_patch, 0, -1).astype(np.int32)
    positions = np.cumsum(rng.integers(1, 4, ids.shape), axis=1)

    names = [name for layer in range(text.num_layers) for name in past_names(layer)]
    written = [name for layer in range(text.num_layers) for name in present_names(layer)]
    shape = (1, text.num_kv_heads, capacity, text.head_dim)
    results = []
    for graph in (DECODER, variant(DECODER, DECOMPOSED)):
        run = onnxruntime.open_graph(_file(golden_bundle, graph), threads=1)
        cache = dict.fromkeys(names, np.full(shape, 0.5, dtype))
        outputs = []
        at = 0
        for length in lengths:
            call = {
                "input_ids": ids[:, at : at + length],
                "features": features if at == 0 else features[:1],
                "visual_group": group[:, at : at + length],
                "position_ids": positions[:, at : at + length],
                "cache_position": np.array([at]),
            }
            got = run({**{k: np.ascontiguousarray(v) for k, v in call.items()}, **cache})
            cache = {name: got[new] for name, new in zip(names, written, strict=True)}
            at += length
            outputs.append(got["logits"])
            assert all((value[:, :, at:] == 0.5).all() for value in cache.values())
        results.append([*outputs, *cache.values()])
    for canonical, decomposed in zip(*results, strict=True):
        assert difference(decomposed, canonical, "l2") < limit


def _one_node(
    op_type: str,
    inputs: Mapping[str, tuple[int, tuple[int, ...]]],
    output: int,
    **attributes: object,
) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(k, t, shape) for k, (t, shape) in inputs.items()]
    node = helper.make_node(op_type, list(inputs), ["y"], "node", **attributes)
    shape = values[0].type.tensor_type.shape.dim
    result = helper.make_tensor_value_info("y", output, [None] * len(shape))
    graph = helper.make_graph([node], "g", values, [result])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)


def _decomposed(model: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> onnx.ModelProto:
    count = Counter(node.op_type for node in model.graph.node)
    monkeypatch.setattr(rewrites, "expected_counts", lambda *_: count)
    made = ir.from_proto(model)
    decompose(made, DECODER, open_checkpoint(GOLDEN).config)
    proto = ir.to_proto(made)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def _run(model: onnx.ModelProto, folder: Path, values: dict[str, np.ndarray]) -> np.ndarray:
    file = folder / "one.onnx"
    onnx.save(model, file)
    return onnxruntime.open_graph(file, threads=1)(values)["y"]


_ATTENTION_CASES = {
    "plain": (4, 4, _FP32, None, {}),
    "scaled": (4, 4, _FP32, None, {"scale": 0.7}),
    "boolean mask": (4, 4, _FP32, (_BOOL, (1, 1, 5, 7)), {}),
    "boolean mask by head": (4, 4, _FP32, (_BOOL, (1, 4, 5, 7)), {}),
    "additive mask": (4, 4, _FP32, (_FP32, (1, 1, 5, 7)), {}),
    "grouped": (6, 2, _FP32, None, {}),
    "grouped, boolean mask": (6, 2, _FP32, (_BOOL, (1, 1, 5, 7)), {}),
    "grouped, additive mask": (6, 2, _FP32, (_FP32, (1, 1, 5, 7)), {}),
    "one key head, fp16": (6, 1, _FP16, (_BOOL, (1, 1, 5, 7)), {}),
    "fp16, additive mask": (4, 4, _FP16, (_FP16, (1, 1, 5, 7)), {}),
}


@pytest.mark.parametrize("case", _ATTENTION_CASES)
def test_attention(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    heads, kv_heads, dtype, mask, attributes = _ATTENTION_CASES[case]
    inputs = {
        "q": (dtype, (1, heads, 5, 16)), "k": (dtype, (1, kv_heads, 7, 16)),
        "v": (dtype, (1, kv_heads, 7, 16)),
    }  # fmt: skip
    rng = np.random.default_rng(0)
    if mask is not None:
        inputs["mask"] = mask
    values = {
        name: rng.standard_normal(shape).astype(helper.tensor_dtype_to_np_dtype(kind))
        for name, (kind, shape) in inputs.items()
    }
    if mask is not None and mask[0] == _BOOL:
        values["mask"] = rng.random(mask[1]) < 0.6
        values["mask"][..., 0] = True
    model = _one_node("Attention", inputs, dtype, **attributes)
    made = _decomposed(model, monkeypatch)
    expected = _run(model, tmp_path, values)
    assert difference(_run(made, tmp_path, values), expected, "max") < (
        1e-6 if dtype == _FP32 else 2e-3
    )


def test_fp16_attention_is_scaled_before_its_product(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shape = (1, 1, 2, 64)
    inputs = dict.fromkeys("qkv", (_FP16, shape))
    values = {name: np.full(shape, 60, np.float16) for name in "qkv"}  # q k^T = 230400
    made = _decomposed(_one_node("Attention", inputs, _FP16), monkeypatch)
    first = next(node for node in made.graph.node if node.op_type in ("Mul", "MatMul"))
    assert first.op_type == "Mul"
    assert "q" in first.input
    assert (_run(made, tmp_path, values) == 60).all()


@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 256, 1000])
def test_prefix_sums_are_exact(length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    flags = helper.make_tensor_value_info("flags", _BOOL, [None])
    result = helper.make_tensor_value_info("y", _INT64, [None])
    axis = helper.make_tensor("axis", _INT64, (), [0])
    nodes = [
        helper.make_node("Cast", ["flags"], ["x"], to=_INT64),
        helper.make_node("CumSum", ["x", "axis"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "g", [flags], [result], [axis])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
    model = onnx.shape_inference.infer_shapes(model)
    monkeypatch.setattr(rewrites, "expected_counts", lambda *_: {"CumSum": 1})
    made = ir.from_proto(model)
    decompose(made, DECODER, open_checkpoint(GOLDEN).config)
    for share in (0.5, 1.0):
        given = np.random.default_rng(0).random(length) < share
        got = _run(ir.to_proto(made), tmp_path, {"flags": given})
        np.testing.assert_array_equal(got, np.cumsum(given))


_QKV = dict.fromkeys("qkv", (_FP32, (1, 4, 5, 16)))


@pytest.mark.parametrize(
    ("op_type", "inputs", "attributes", "reason"),
    [
        ("Attention", _QKV, {"is_causal": 1}, "is_causal is set"),
        ("Attention", _QKV, {"softcap": 2.0}, "softcap is set"),
        ("Attention", {**_QKV, "mask": (_FP32, (5, 5))}, {}, "has not four axes"),
        (
            "Attention",
            {**_QKV, "q": (_FP32, (1, 8, 5, 16)), "mask": (_BOOL, (1, 8, 5, 5))},
            {},
            "the mask differs by head",
        ),
        (
            "TensorScatter",
            {
                "past": (_FP32, (2, 1, 9, 4)),
                "update": (_FP32, (2, 1, 2, 4)),
                "position": (_INT64, (2,)),
            },
            {},
            "no single write position",
        ),
        (
            "RotaryEmbedding",
            {"x": (_FP32, (1, 2, 5, 8)), "cos": (_FP32, (1, 5, 4)), "sin": (_FP32, (1, 5, 4))},
            {"interleaved": 1},
            "is interleaved",
        ),
        (
            "RMSNormalization",
            {"x": (_FP16, (1, 5, 8)), "weight": (_FP16, (8,))},
            {},
            "is not fp32",
        ),
        (
            "Clip",
            {"x": (_FP32, (5,)), "low": (_FP32, ()), "high": (_FP32, ())},
            {},
            "is not int64",
        ),
        (
            "CumSum",
            {"x": (_INT64, (5,)), "axis": (_INT64, ())},
            {},
            "does not sum flags",
        ),
    ],
)  # fmt: skip
def test_a_form_that_a_rule_does_not_know_is_an_error_with_its_reason(
    op_type: str,
    inputs: Mapping[str, tuple[int, tuple[int, ...]]],
    attributes: dict[str, object],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
):
    model = _one_node(op_type, inputs, next(iter(inputs.values()))[0], **attributes)
    with pytest.raises(VerificationError, match=f"{op_type}: rewrote 0; not node: .*{reason}"):
        _decomposed(model, monkeypatch)


def test_a_missing_pattern_is_an_error(golden_bundle: Path, config: ModelConfig):
    model = ir.load(_file(golden_bundle, variant(VISION_UPPER, DECOMPOSED)))
    with pytest.raises(VerificationError, match="Attention: rewrote 0") as error:
        decompose(model, VISION_UPPER, config)
    assert error.value.allowed == str(expected_counts(VISION_UPPER, config)["Attention"])


def test_a_pattern_that_is_not_expected_is_an_error(golden_bundle: Path, config: ModelConfig):
    model = ir.load(_file(golden_bundle, DECODER))
    with pytest.raises(VerificationError, match=r"Attention: rewrote 3|TensorScatter: rewrote 6"):
        decompose(model, VISION_LOWER, config)


@pytest.mark.parametrize(("op_type", "kind"), [("NonZero", _FP32), ("Sqrt", TensorProto.DOUBLE)])
def test_an_operator_that_tensorrt_10_3_has_not_is_an_error(
    op_type: str, kind: int, monkeypatch: pytest.MonkeyPatch
):
    model = ir.from_proto(_one_node(op_type, {"x": (kind, (5, 5))}, kind))
    monkeypatch.setattr(rewrites, "expected_counts", lambda *_: {})
    with pytest.raises(VerificationError, match=f"node is {op_type} of"):
        decompose(model, DECODER, open_checkpoint(GOLDEN).config)


def test_a_decoder_whose_visual_tokens_are_causal(tmp_path: Path):
    model = random_model()
    model.config = model.language.config = replace(model.config, bidirectional_visual=False)
    for graph in (DECODER, variant(DECODER, DECOMPOSED)):
        export_graph(model, graph, Numerics("fp32"), tmp_path)
