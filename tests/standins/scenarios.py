"""Small builds, right and wrong, that run alike on a real TensorRT for RTX and on the stand-in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import TensorProto, helper

FLOAT, HALF, INT64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64

Value = tuple[str, int, Sequence[int | str]]
Profile = dict[str, tuple[Any, Any, Any]]


def model(
    nodes: Sequence[Any],
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    constants: dict[str, Any] | None = None,
    *,
    opset: int = 20,
) -> bytes:
    """Serialized ONNX model; constants become int64 initializers."""
    tensors = [
        helper.make_tensor(name, INT64, np.shape(value), np.ravel(value))
        for name, value in (constants or {}).items()
    ]
    graph = helper.make_graph(
        nodes,
        "scenario",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        tensors,
    )
    domains = {node.domain for node in nodes} - {""}
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    data: bytes = made.SerializeToString()
    return data


def node(kind: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    """A node; names of tensors separated by spaces."""
    return helper.make_node(kind, inputs.split(), outputs.split(), name=kind.lower(), **attributes)


RELU = model([node("Relu", "x", "y")], [("x", FLOAT, ["a", 3])], [("y", FLOAT, ["a", 3])])
RANGE = model(
    [node("Range", "zero k one", "r"), node("Add", "r r", "y")],
    [("k", INT64, [])],
    [("y", INT64, ["n"])],
    {"zero": 0, "one": 1},
)
RANGE_AND_DATA = model(
    [node("Range", "zero k one", "r"), node("Add", "r k", "y")],
    [("k", INT64, [])],
    [("y", INT64, ["n"])],
    {"zero": 0, "one": 1},
)
RANGE_FROM_POSITION = model(
    [
        node("Squeeze", "k axis", "s"), node("Shape", "x", "sh"), node("Gather", "sh zero", "n"),
        node("Add", "s n", "e"), node("Range", "s e one", "y"),
    ],
    [("x", FLOAT, ["a", 3]), ("k", INT64, [1])],
    [("y", INT64, ["a"])],
    {"zero": 0, "one": 1, "axis": [0]},
)  # fmt: skip
SLICE = model(
    [node("Slice", "x k end axis", "y")],
    [("x", FLOAT, [8, 3]), ("k", INT64, [1])],
    [("y", FLOAT, ["n", 3])],
    {"end": [8], "axis": [0]},
)
POSITIONS_AS_DATA = model(
    [node("Add", "p p", "y")], [("p", INT64, [1, "t"])], [("y", INT64, [1, "t"])]
)
UNSUPPORTED = model([node("Det", "x", "y")], [("x", FLOAT, [3, 3])], [("y", FLOAT, [])])


def scatter(capacity: int | str) -> bytes:
    """A cache update."""
    return model(
        [node("TensorScatter", "past new at", "present", axis=2)],
        [("past", FLOAT, [1, 2, capacity, 8]), ("new", FLOAT, [1, 2, "t", 8]), ("at", INT64, [1])],
        [("present", FLOAT, [1, 2, capacity, 8])],
        opset=24,
    )


def attention(dtype: int) -> bytes:
    """Attention over four positions of eight values."""
    values = [(name, dtype, [1, 2, 4, 8]) for name in "qkv"]
    nodes = [node("Attention", "q k v", "y", scale=1.0)]
    return model(nodes, values, [("y", dtype, [1, 2, 4, 8])], opset=23)


SELECT_PACK = model(
    [
        node(
            "SttsSelectPack", "scores hidden kept_count",
            "bins segment kept_slot kept_window bin_count", domain="stts", refill=1,
            plugin_version="1", plugin_namespace="stts",
            tensorrt_plugin_shape_input_indices=[2],
        )
    ],
    [
        ("scores", FLOAT, ["frames", 6]), ("hidden", FLOAT, ["frames", 12, 4]),
        ("kept_count", INT64, [1]),
    ],
    [
        ("bins", FLOAT, ["bins", 12, 4]), ("segment", 6, ["bins", 6]),
        ("kept_slot", 6, ["kept"]), ("kept_window", 6, ["kept"]), ("bin_count", 6, []),
    ],
)  # fmt: skip


@dataclass(frozen=True)
class Scenario:
    """A build: a graph, its profiles, and what else is done on the way."""

    graph: bytes
    shapes: tuple[Profile, ...] = ()
    values: tuple[Profile, ...] = ()
    decomposable: bool = False


@dataclass
class Outcome:
    """What can be compared between the real library and the stand-in."""

    parsed: bool = False
    inputs: list[tuple[str, str, tuple[int, ...], bool, bool]] = field(default_factory=list)
    outputs: list[tuple[str, str, tuple[int, ...]]] = field(default_factory=list)
    added: list[int] = field(default_factory=list)
    built: bool = False
    errors: list[str] = field(default_factory=list)
    """Not compared word by word."""

    @property
    def facts(self) -> tuple[Any, ...]:
        return self.parsed, self.inputs, self.outputs, self.added, self.built


def three(*sides: Sequence[int]) -> Profile:
    """Ranges of the tensor `x`."""
    low, opt, high = sides
    return {"x": (low, opt, high)}


SCENARIOS = {
    "builds": Scenario(RELU, (three((1, 3), (2, 3), (4, 3)),)),
    "two profiles": Scenario(RELU, (three((1, 3), (1, 3), (1, 3)), three((1, 3), (2, 3), (4, 3)))),
    "no profile": Scenario(RELU),
    "empty profile": Scenario(RELU, ({},)),
    "second profile empty": Scenario(RELU, (three((1, 3), (1, 3), (1, 3)), {})),
    "min above opt": Scenario(RELU, (three((2, 3), (1, 3), (3, 3)),)),
    "min above max": Scenario(RELU, (three((2, 3), (2, 3), (1, 3)),)),
    "rank too low": Scenario(RELU, (three((2,), (2,), (2,)),)),
    "ranks differ": Scenario(RELU, (three((2,), (2, 3), (2, 3)),)),
    "fixed side": Scenario(RELU, (three((2, 4), (2, 4), (2, 4)),)),
    "name of no input": Scenario(
        RELU, ({**three((1, 3), (1, 3), (1, 3)), "z": ((1,), (1,), (1,))},)
    ),
    "shape tensor": Scenario(RANGE, ({},), ({"k": ([1], [2], [4])},)),
    "shape tensor without values": Scenario(RANGE, ({},)),
    "shape tensor without profile": Scenario(RANGE),
    "shape tensor and data": Scenario(RANGE_AND_DATA, ({},), ({"k": ([1], [2], [4])},)),
    "range from a position": Scenario(
        RANGE_FROM_POSITION, (three((1, 3), (1, 3), (4, 3)),), ({"k": ([1], [2], [4])},)
    ),
    "slice from an input": Scenario(SLICE, ({},), ({"k": ([0], [1], [4])},)),
    "positions that are data": Scenario(POSITIONS_AS_DATA, ({"p": ((1, 1), (1, 2), (1, 4))},)),
    "unknown operator": Scenario(UNSUPPORTED),
    "no model": Scenario(b"garbage"),
    "cache of fixed size": Scenario(
        scatter(16), ({"new": ((1, 2, 1, 8), (1, 2, 1, 8), (1, 2, 4, 8))},)
    ),
    "cache of free size": Scenario(scatter("capacity")),
    "fp32 attention": Scenario(attention(FLOAT)),
    "fp32 attention, decomposable": Scenario(attention(FLOAT), decomposable=True),
}


def run(trt: Any, scenario: Scenario, configure: Callable[[Any], None] | None = None) -> Outcome:
    """Build a scenario's engine as far as it goes.

    Args:
        trt: a TensorRT module.
        scenario: what to build.
        configure: called with the IBuilderConfig.
    """
    outcome = Outcome()

    class Collector(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                outcome.errors.append(msg)

    logger = Collector()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    outcome.parsed = parser.parse(scenario.graph)
    if not outcome.parsed:
        assert parser.num_errors > 0
        outcome.errors += [parser.get_error(i).desc() for i in range(parser.num_errors)]
        return outcome
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        outcome.inputs.append(
            (tensor.name, tensor.dtype.name, tuple(tensor.shape), tensor.is_shape_tensor,
             tensor.is_execution_tensor)
        )  # fmt: skip
    for index in range(network.num_outputs):
        tensor = network.get_output(index)
        outcome.outputs.append((tensor.name, tensor.dtype.name, tuple(tensor.shape)))
    if scenario.decomposable:
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            if layer.type == trt.LayerType.ATTENTION_OUTPUT:
                layer.__class__ = trt.IAttentionOutputLayer
                layer.attention.decomposable = True
    config = builder.create_builder_config()
    if configure is not None:
        configure(config)
    for index, shapes in enumerate(scenario.shapes):
        profile = builder.create_optimization_profile()
        for name, sides in shapes.items():
            profile.set_shape(name, *sides)
        for name, values in (scenario.values[index] if scenario.values else {}).items():
            profile.set_shape_input(name, *values)
        outcome.added.append(config.add_optimization_profile(profile))
    plan = builder.build_serialized_network(network, config)
    outcome.built = plan is not None
    return outcome


def serialized(trt: Any, graph: bytes, *profiles: Any, values: Any = None) -> Any:
    """A plan, or a failed test."""
    builder = trt.Builder(trt.Logger())
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, trt.Logger())
    assert parser.parse(graph), parser.get_error(0)
    config = builder.create_builder_config()
    for ranges in profiles:
        profile = builder.create_optimization_profile()
        for name, sides in ranges.items():
            profile.set_shape(name, *sides)
        for name, sides in (values or {}).items():
            profile.set_shape_input(name, *sides)
        assert config.add_optimization_profile(profile) >= 0
    plan = builder.build_serialized_network(network, config)
    assert plan is not None, trt.standin.messages
    return plan
