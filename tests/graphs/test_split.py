"""decoder-split: the numbers of decoder, in turns, without a tensor of all queries and keys."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto

from stts_export.calibration.layers import Numerics
from stts_export.config import ModelConfig
from stts_export.engines import onnxruntime
from stts_export.errors import VerificationError
from stts_export.graphs import split
from stts_export.graphs.check import check_graph
from stts_export.graphs.export import export_graph
from stts_export.graphs.split import PAIRS, TURN, split_queries
from stts_export.runtime.session import Session
from stts_export.tensors import (
    ACTIVATION,
    CAPACITY,
    DECODER,
    SCORES,
    SPLIT,
    Precision,
    graph_file,
    graph_specs,
    past_names,
    present_names,
    variant,
)
from tests.helpers import ON_CPU, random_model, small_config

_SPLIT = variant(DECODER, SPLIT)
_CAPACITY, _TURN = 90, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Decoders of several models."""
    folder = tmp_path_factory.mktemp("split")
    for precision in ON_CPU:
        for visual in ("bidirectional", "causal"):
            model = _model(visual)
            for graph in (DECODER, _SPLIT):
                export_graph(model, graph, Numerics(precision), folder / f"{visual}-{precision}")
    return folder


@pytest.fixture(params=["bidirectional", "causal"])
def visual(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=ON_CPU)
def precision(request: pytest.FixtureRequest) -> Precision:
    return request.param


def _model(visual: str) -> Any:
    return random_model(small_config(bidirectional_visual=visual == "bidirectional"))


@pytest.fixture
def config() -> ModelConfig:
    return ModelConfig.from_dict(small_config(), has_scorer=True)


@pytest.fixture
def source(folder: Path) -> Path:
    return folder / "bidirectional-fp32" / graph_file(DECODER)


def _in_turns(file: Path, pairs: int) -> ir.Model:
    """decoder-split with turns of few pairs."""
    model = ir.load(file)
    model.graph.initializers[PAIRS].const_value = ir.tensor(np.array([pairs]), name=PAIRS)
    return model


def _calls(
    config: ModelConfig, precision: Precision, length: int, start: int
) -> Iterator[dict[str, NDArray[Any]]]:
    """A prompt of two clips at `start`, then a token; positions have gaps."""
    text, tokens = config.text, config.tokens
    rng = np.random.default_rng(length)
    ids = rng.integers(0, text.vocab_size, (1, length + 1))
    group = np.full(ids.shape, -1, np.int32)
    if length > 3:
        group[0, 1 : length // 3] = 0
        group[0, length // 3 : length - 2] = 1
        ids[group >= 0] = tokens.im_patch
    features = rng.standard_normal((max(1, int((group >= 0).sum())), text.hidden_size))
    positions = 3 * start + np.cumsum(rng.integers(1, 4, ids.shape), axis=1)
    for first, last in ((0, length), (length, length + 1)):
        yield {
            "input_ids": np.ascontiguousarray(ids[:, first:last]),
            "features": features.astype(ACTIVATION[precision]),
            "visual_group": np.ascontiguousarray(group[:, first:last]),
            "position_ids": np.ascontiguousarray(positions[:, first:last]),
            "cache_position": np.array([start + first]),
        }


def _run(
    file: Path, config: ModelConfig, precision: Precision, length: int, start: int
) -> list[NDArray[Any]]:
    """Logits of each call, then the cache, which is never empty before."""
    run = onnxruntime.open_graph(file, threads=1)
    text, rng = config.text, np.random.default_rng(7)
    layers = range(text.num_layers)
    names = [name for layer in layers for name in past_names(layer)]
    written = [name for layer in layers for name in present_names(layer)]
    shape = (1, text.num_kv_heads, _CAPACITY, text.head_dim)
    cache = {n: rng.standard_normal(shape).astype(ACTIVATION[precision]) for n in names}
    outputs = []
    for call in _calls(config, precision, length, start):
        got = run({**call, **cache})
        outputs.append(got["logits"])
        cache = {name: got[new] for name, new in zip(names, written, strict=True)}
    return [*outputs, *cache.values()]


@pytest.mark.parametrize("start", [0, 11])
@pytest.mark.parametrize(
    "length", [1, 5, _TURN - 1, _TURN, _TURN + 1, 3 * _TURN, 3 * _TURN + 1, 70]
)
def test_the_numbers_of_decoder(
    folder: Path,
    config: ModelConfig,
    visual: str,
    precision: Precision,
    length: int,
    start: int,
):
    """Clips begin and end within turns; text sees what an earlier call left in the cache."""
    whole = folder / f"{visual}-{precision}" / graph_file(DECODER)
    # A product of seven rows and one of a single row may be summed in another order.
    limit = {"fp32": 1e-5, "fp16": 1e-2}[precision]
    expected = _run(whole, config, precision, length, start)
    short = whole.with_name("in_turns.onnx")
    for pairs in (_TURN * _CAPACITY, SCORES):
        ir.save(_in_turns(whole.with_name(Path(graph_file(_SPLIT)).name), pairs), short)
        got = _run(short, config, precision, length, start)
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=limit)


def _loops(graph: ir.Graph) -> list[ir.Graph]:
    return [node.attributes["body"].as_graph() for node in graph if node.op_type == "Loop"]


def _axes(value: ir.Value) -> set[object]:
    return {axis if isinstance(axis, int) else axis.value for axis in value.shape or ()}


def test_no_tensor_is_of_all_queries_and_keys(folder: Path, config: ModelConfig, visual: str):
    file = folder / f"{visual}-fp32" / graph_file(_SPLIT)
    model = ir.load(file)
    bodies = _loops(model.graph)
    assert len(bodies) == config.text.num_layers
    values = [value for node in model.graph.all_nodes() for value in node.outputs]
    assert not [value.name for value in values if {"tokens", CAPACITY} <= _axes(value)]
    # Attention is in the bodies, where the mask's rows are a turn's.
    assert "Attention" not in {node.op_type for node in model.graph}
    for body in bodies:
        (attention,) = (node for node in body if node.op_type == "Attention")
        for value in (attention.inputs[0], attention.inputs[3]):
            assert value is not None
            assert value.graph is body
            assert TURN in _axes(value)
        # All that a turn does not take rows of comes from outside whole: keys, values, a constant.
        assert not [v.name for node in body for v in node.outputs if "tokens" in _axes(v)]


def test_a_turn_has_the_scores_that_the_contract_says(folder: Path, config: ModelConfig):
    model = ir.load(folder / "causal-fp32" / graph_file(_SPLIT))
    pairs = model.graph.initializers[PAIRS].const_value
    assert pairs is not None
    assert pairs.numpy().tolist() == [SCORES // config.text.num_heads]


def test_it_shares_the_weights_and_passes_the_checker(folder: Path, precision: Precision):
    def external(file: Path) -> set[tuple[str, ...]]:
        return {
            tuple(entry.value for entry in init.external_data)
            for init in onnx.load(file, load_external_data=False).graph.initializer
            if init.data_location == TensorProto.EXTERNAL
        }

    original, varied = (
        folder / f"bidirectional-{precision}" / graph_file(name) for name in (DECODER, _SPLIT)
    )
    onnx.checker.check_model(varied, full_check=True)
    assert external(varied) == external(original) != set()
    assert varied.stat().st_size < original.stat().st_size + 50_000


_PEAK = """
import sys
from pathlib import Path
import numpy as np
from stts_export.engines import onnxruntime

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

run = onnxruntime.open_graph(Path(sys.argv[1]), threads=1)
length = int(sys.argv[2])
calls = {value.name: value.shape for value in run._session.get_inputs()}
cache = {
    name: np.ones((1, shape[1], length, shape[3]), np.float32)
    for name, shape in calls.items() if name.startswith("past")
}
present = {name.replace("past_key_values", "present"): array for name, array in cache.items()}
call = {
    "input_ids": np.full((1, length), 3),
    "features": np.zeros((1, calls["features"][1]), np.float32),
    "visual_group": np.full((1, length), -1, np.int32),
    "position_ids": np.arange(length)[None],
    "cache_position": np.array([0]),
}
before = peak()
run({**call, **cache}, present)
print(peak() - before)
"""


def _peak(file: Path, length: int) -> int:
    """Bytes that a prefill adds to the peak memory of a process."""
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, str(file), str(length)],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    return int(done.stdout)


def test_a_long_prefill_needs_little_memory(folder: Path, config: ModelConfig):
    """Far below a matrix of all pairs of one head; the canonical graph holds one of each head."""
    length, pairs = 3000, 2**17
    whole = folder / "bidirectional-fp32" / graph_file(DECODER)
    short = whole.with_name("short_turns.onnx")
    ir.save(_in_turns(whole.with_name(Path(graph_file(_SPLIT)).name), pairs), short)
    one_head = 4 * length**2
    assert _peak(whole, length) > config.text.num_heads * one_head
    assert _peak(short, length) < one_head


def test_export_checks_a_prompt_of_several_turns(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Turns that start at the wrong row: a prompt of one turn would not show it."""
    original = split._into_loop

    def broken(graph: ir.Graph, part: Any, turns: Any, name: str) -> None:
        original(graph, part, turns, name)
        body = _loops(graph)[-1]
        start = next(node for node in body if body.inputs[0] in node.inputs)
        start.replace_input_with(1, turns.last)

    monkeypatch.setattr(split, "_into_loop", broken)
    file = folder / "bidirectional-fp32"
    with pytest.raises(VerificationError, match=r"decoder-split \(fp32\): logits .* differs"):
        export_graph(_model("bidirectional"), _SPLIT, Numerics("fp32"), file)
    monkeypatch.undo()
    export_graph(_model("bidirectional"), _SPLIT, Numerics("fp32"), file)


def test_sessions_run_it(small_bundle: Path, monkeypatch: pytest.MonkeyPatch):
    real, opened = onnxruntime.open_graph, list[str]()

    def recording(file: Path, **options: Any) -> onnxruntime.Runner:
        opened.append(f"{file.parent.name}/{file.name}")
        return real(file, **options)

    monkeypatch.setattr(onnxruntime, "open_graph", recording)
    with Session.open(small_bundle):
        assert [name for name in opened if name.startswith(DECODER)] == [graph_file(_SPLIT)]


def test_another_models_graph_differs(folder: Path):
    other = random_model(small_config(), seed=3)
    spec = graph_specs(other.config, "fp32")[_SPLIT]
    file = folder / "bidirectional-fp32" / graph_file(_SPLIT)
    with pytest.raises(VerificationError, match=r"decoder-split \(fp32\): logits .* differs"):
        check_graph(spec, Numerics("fp32"), file, other)
    names = {path.name for path in file.parent.iterdir()}
    assert not {name for name in names if name.startswith("tmp")}


def _attention(model: ir.Model) -> ir.Node:
    return next(node for node in model.graph if node.op_type == "Attention")


def _without_mask(model: ir.Model) -> None:
    _attention(model).resize_inputs(3)


def _without_an_attention(model: ir.Model) -> None:
    model.graph.remove(_attention(model))


def _with_queries_from_elsewhere(model: ir.Model) -> None:
    _attention(model).replace_input_with(0, model.graph.inputs[1])


def _attended_twice(model: ir.Model) -> None:
    model.graph.append(ir.node("Identity", [_attention(model).outputs[0]]))


def _with_a_mask_elsewhere(model: ir.Model) -> None:
    mask = _attention(model).inputs[3]
    assert mask is not None
    model.graph.outputs.append(mask)


def _spread(model: ir.Model) -> ir.Value:
    """A value of all pairs on the way to the masks."""
    value = _attention(model).inputs[3]
    assert value is not None
    made = value.producer()
    assert made is not None
    return next(value for value in made.inputs if value and {"tokens", CAPACITY} <= _axes(value))


def _with_a_mask_of_no_shape(model: ir.Model) -> None:
    _spread(model).shape = None


def _with_a_mask_of_an_unknown_axis(model: ir.Model) -> None:
    value = _spread(model)
    assert value.shape is not None
    value.shape = ir.Shape([*value.shape[:-1], None])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_mask, "has 3 inputs.*allowed: q, k, v and a mask"),
        (_without_an_attention, "has 1 Attention.*allowed: 2, one a layer"),
        (_with_queries_from_elsewhere, "has queries from elsewhere"),
        (_attended_twice, "is used otherwise.*allowed: a projection of rows"),
        (_with_a_mask_elsewhere, "allowed: no tensor of all queries and keys"),
        (_with_a_mask_of_no_shape, "is None.*allowed: a mask of values with shapes"),
        (_with_a_mask_of_an_unknown_axis, "None.*allowed: a mask of values with shapes"),
    ],
)
def test_a_graph_of_another_kind_is_refused(
    source: Path, config: ModelConfig, change: Callable[[ir.Model], None], message: str
):
    model = ir.load(source)
    change(model)
    with pytest.raises(VerificationError, match=f"(?s)decoder-split: .*{message}"):
        split_queries(model, config)
