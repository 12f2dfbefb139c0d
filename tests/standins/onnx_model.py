"""What a parser would find in an ONNX file: operators it lacks, inputs, shape tensors, the cache.

Loading is eager, so that a test may hide the package `onnx` from the code under test.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx.checker
import onnx.external_data_helper
import onnx.shape_inference

PLUGIN_DOMAINS = ("stts",)
_SHAPE_OPERANDS: dict[str, tuple[int, ...]] = {
    # operands whose values decide a shape
    "Reshape": (1,), "Expand": (1,), "Range": (0, 1, 2), "Slice": (1, 2, 3, 4), "Tile": (1,),
    "ConstantOfShape": (0,), "TopK": (1,), "Resize": (2, 3), "Pad": (1,), "Unsqueeze": (1,),
    "Squeeze": (1,), "Split": (1,), "OneHot": (1,),
}  # fmt: skip
_STOPS = ("Shape", "Size", "Constant")
"""Operators whose output's values do not depend on their input's values."""

_OPERATORS = json.loads((Path(__file__).parent / "api/onnx_operators.json").read_text())


@dataclass(frozen=True)
class ParseFailure:
    """An error of the parser; `code` names a member of `ErrorCode`."""

    code: str
    text: str
    node: int = -1
    node_name: str = ""
    operator: str = ""


@dataclass(frozen=True)
class Operators:
    """What a version's parser takes."""

    names: frozenset[str]
    opset: int


def operators_of(version: tuple[int, ...], *, is_rtx: bool) -> Operators:
    """TensorRT 10.3 knows no Attention; 10.15 and later know what TensorRT for RTX knows."""
    key = "newer" if is_rtx or version >= (10, 15) else "10.3"
    entry = _OPERATORS[key]
    return Operators(frozenset(entry["operators"].split()), entry["opset"])


def dims(value: Any) -> tuple[int | str, ...]:
    """Axes of a graph's input or output: numbers, or names of free ones."""
    return tuple(
        axis.dim_value if axis.HasField("dim_value") else axis.dim_param or f"?{value.name}.{i}"
        for i, axis in enumerate(value.type.tensor_type.shape.dim)
    )


def load(file: str) -> Any:
    """Load a model with its external data.

    Raises:
        OSError: the file or its data is not there.
        ValueError: it is not an ONNX model.
    """
    try:
        return onnx.load(file)
    except (OSError, onnx.checker.ValidationError) as error:
        raise OSError(str(error)) from error
    except Exception as error:  # protobuf's DecodeError lies in several places
        raise ValueError(str(error)) from error


def nodes(graph: Any) -> Iterator[Any]:
    """Nodes of a graph and its subgraphs."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes(attribute.g)


def shape_inputs(graph: Any) -> set[str]:
    """Inputs whose values decide shapes: they must lie in host memory."""
    producers = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name for tensor in graph.initializer}
    needed: list[str] = []
    for node in graph.node:
        operands = _SHAPE_OPERANDS.get(node.op_type, ()) or plugin_shape_operands(node)
        needed += [node.input[index] for index in operands if index < len(node.input)]
    seen: set[str] = set()
    while needed:
        name = needed.pop()
        if name in seen or name in constants or not name:
            continue
        seen.add(name)
        producer = producers.get(name)
        if producer is not None and producer.op_type not in _STOPS:
            needed.extend(producer.input)
    return seen & {value.name for value in graph.input}


def plugin_shape_operands(node: Any) -> tuple[int, ...]:
    """Inputs that a plugin node declares as shape tensors (onnx-tensorrt since 10.1)."""
    if node.domain not in PLUGIN_DOMAINS:
        return ()
    attribute = attributes(node).get("tensorrt_plugin_shape_input_indices", [])
    return tuple(index % len(node.input) for index in attribute)


def attributes(node: Any) -> dict[str, Any]:
    """Attributes of a node by name; texts as str."""
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return {n: v.decode() if isinstance(v, bytes) else v for n, v in values.items()}


def is_shape_only(graph: Any, name: str) -> bool:
    """Whether an input is used for nothing but shapes: its own, or others' by its values."""
    for node in graph.node:
        if node.op_type in _STOPS:
            continue
        operands = _SHAPE_OPERANDS.get(node.op_type, ()) or plugin_shape_operands(node)
        for index, operand in enumerate(node.input):
            if operand == name and index not in operands:
                return False
    return True


def aliases(graph: Any) -> dict[str, str]:
    """Outputs that a cache update writes in place: output -> input."""
    inputs = {value.name for value in graph.input}
    outputs = {value.name for value in graph.output}
    producers = {name: node for node in graph.node for name in node.output}
    found = {}
    for output in outputs:
        node = producers.get(output)
        while node is not None and node.op_type == "Identity":
            node = producers.get(node.input[0])
        if node is not None and node.op_type == "TensorScatter" and node.input[0] in inputs:
            found[output] = node.input[0]
    return found


def attention_types(model: Any) -> list[int]:
    """Element type of every Attention node's query."""
    if not any(node.op_type == "Attention" for node in model.graph.node):
        return []
    inferred = onnx.shape_inference.infer_shapes(model)
    values = [*inferred.graph.value_info, *inferred.graph.input]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in inferred.graph.initializer}
    return [types.get(n.input[0], 0) for n in model.graph.node if n.op_type == "Attention"]


def failures(model: Any, operators: Operators, has_plugin: Any) -> list[ParseFailure]:
    """Why a parser would refuse a model.

    Args:
        model: loaded.
        operators: of the version.
        has_plugin: (name, version, namespace) -> whether the registry has its creator.
    """
    opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
    if opset > operators.opset:
        # the real one goes on with a warning; what comes out is nothing to rely on
        return [ParseFailure("UNSUPPORTED_GRAPH", f"opset {opset} > {operators.opset}")]
    found = []
    fixed = {v.name: dims(v) for v in model.graph.input}
    for index, node in enumerate(model.graph.node):
        text = _refusal(node, operators, has_plugin, fixed)
        if text:
            code = "INVALID_NODE" if node.op_type == "TensorScatter" else "UNSUPPORTED_NODE"
            found.append(ParseFailure(code, text, index, node.name, node.op_type))
    uint8 = {
        v.name for v in model.graph.input if v.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    }
    for index, node in enumerate(model.graph.node):
        if node.op_type != "Cast" and uint8 & set(node.input):
            text = "a UINT8 network input must go into a Cast"
            found.append(ParseFailure("UNSUPPORTED_NODE", text, index, node.name, node.op_type))
    return found


def _refusal(
    node: Any, operators: Operators, has_plugin: Any, inputs: dict[str, tuple[int | str, ...]]
) -> str | None:
    if node.domain in ("", "ai.onnx") and node.op_type in operators.names:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                for inner in nodes(attribute.g):
                    if text := _refusal(inner, operators, has_plugin, inputs):
                        return text
        if node.op_type == "TensorScatter":
            shape = inputs.get(node.input[0], ())
            if len(shape) != 4 or isinstance(shape[2], str):
                return (
                    f"Invalid Node - {node.name}\nITensor::getDimensions: Error Code 3: API Usage"
                    f" Error ({node.name}: The KV cache tensor must have a static sequence length"
                    " dimension.)"
                )
        if node.op_type == "Attention" and (
            len([o for o in node.output if o]) > 1 or "softmax_precision" in attributes(node)
        ):
            return "only supports Attention nodes with one output and without softmax_precision"
        return None
    known = attributes(node)
    version = known.get("plugin_version", "1")
    namespace = known.get("plugin_namespace", "")
    if has_plugin(node.op_type, version, namespace):
        return None
    return (
        "Assertion failed: creator: Plugin not found, are the plugin name, version, and namespace"
        f" correct? ({node.op_type}, {version!r}, {namespace!r})"
    )
