"""Rewrite a graph in operators of ONNX opset 20, for TensorRT older than 10.15.

A rule replaces one operator and says why it cannot where it cannot. Rules count what they did; a
count that is not the expected one is an error that lists those reasons.
Axes: N rows of the batch, h heads, g query heads of a key head, L tokens, P cache capacity, d width
of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from stts_export.config import ModelConfig
from stts_export.errors import VerificationError
from stts_export.graphs.quantization import TRT_DOMAIN
from stts_export.tensors import CONNECTOR, DECODER, VISION_LOWER, VISION_UPPER

OPSET = 20
OPSET_BLOCKS, OPSET_FP4 = 21, 23
"""Of graphs with int4 weights, and with nvfp4: the first whose DequantizeLinear has blocks, and
takes 4-bit floats. TensorRT has the first since 10.0, though its parser names opset 20 as its
newest, and the second since 10.8."""

_FLOAT = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
_NUMBER = _FLOAT | {ir.DataType.INT32, ir.DataType.INT64}
_ANY = _NUMBER | {ir.DataType.BOOL}
_SCALED = {ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN}

TENSORRT_10_3: dict[str, set[ir.DataType]] = {
    operator: types
    for operators, types in (
        ("And Or", {ir.DataType.BOOL}),
        ("Cos Gelu Gemm LayerNormalization Log MatMul Sigmoid Sin Softmax Sqrt", _FLOAT),
        ("Add Div Equal Greater GreaterOrEqual Less LessOrEqual Max Min Mul Range Sub", _NUMBER),
        ("ReduceMax ReduceMean ReduceMin ReduceSum", _NUMBER),
        ("Concat Expand Gather Reshape Shape Slice Split Squeeze Transpose Unsqueeze Where", _ANY),
        ("Cast", _ANY | {ir.DataType.UINT8}),
        ("QuantizeLinear", _FLOAT | _SCALED),
        ("DequantizeLinear", _FLOAT | _SCALED | {ir.DataType.INT4, ir.DataType.FLOAT4E2M1}),
    )
    for operator in operators.split()
}
"""Operators that a decomposed graph may hold, and the types that TensorRT 10.3 takes for their
inputs. Source: `docs/operators.md` of onnx-tensorrt 10.1, to which 10.2 and 10.3 added nothing used
here."""

TENSORRT_10_8: dict[str, set[ir.DataType]] = {"TRT_FP4DynamicQuantize": _FLOAT}
"""The same of TensorRT's own operators; nvfp4 needs this version, and recipes say so."""

# Below any score and far from the end of fp32: what is masked gets a weight of exactly 0.
_MASKED = -1e30
_LANES = 128  # block of a prefix sum; TF32 holds integers up to 2048 exactly


def decompose(model: ir.Model, graph: str, config: ModelConfig) -> None:
    """Rewrite a model in place.

    Args:
        model: a graph of `tensors` as it is exported; its weights stay references.
        graph: its name.
        config: the model that it was exported from; says how often each rule must apply.

    Raises:
        VerificationError: a rule applied more or less often than expected, or an operator is left
            that TensorRT 10.3 has not.
    """
    expected = expected_counts(graph, config)
    builder = _Builder(model.graph)
    for rule in _RULES:
        done = _apply(rule, model.graph, builder)
        if done.count != expected.get(rule.op_type, 0):
            raise VerificationError(
                f"{rule.op_type}: rewrote {done.count}{_listed(done.reasons)}",
                where=f"decomposed form of {graph}",
                allowed=f"{expected.get(rule.op_type, 0)}",
                fix="report this export, with the versions of torch and onnxscript",
            )
    RemoveUnusedNodesPass()(model)
    model.opset_imports[""] = max(map(_opset, model.graph))
    _check_operators(model.graph, graph)


def expected_counts(graph: str, config: ModelConfig) -> dict[str, int]:
    """How often each operator that is rewritten occurs in a canonical graph."""
    vision, layers = config.vision, config.text.num_layers
    if graph == VISION_LOWER:
        return {"Attention": vision.split_at + (vision.pruning is not None)}  # and the pooler's
    if graph == VISION_UPPER:
        return {"Attention": vision.num_layers - vision.split_at + 1}  # and the connector's
    if graph == CONNECTOR:
        return {"Attention": 1}
    if graph == DECODER:
        return {
            "Attention": layers,
            "TensorScatter": 2 * layers,
            "RotaryEmbedding": 2 * layers,
            "RMSNormalization": 4 * layers + 1,  # two per block, q and k, the last one
            "CumSum": 1,
            "Clip": 1 + config.bidirectional_visual,  # feature rows, groups of cached keys
        }
    raise KeyError(graph)


@dataclass
class _Done:
    count: int = 0
    reasons: list[str] = field(default_factory=list)


def _listed(reasons: list[str]) -> str:
    return "".join(f"; not {reason}" for reason in reasons[:5])


def _apply(rule: _Rule, graph: ir.Graph, builder: _Builder) -> _Done:
    done = _Done()
    for node in [node for node in graph if node.op_type == rule.op_type]:
        reason = rule.why_not(node)
        if reason:
            done.reasons.append(f"{node.name}: {reason}")
            continue
        builder.replace(node, rule.rewrite(builder, node))
        done.count += 1
    return done


def _opset(node: ir.Node) -> int:
    """The oldest opset that a decomposed graph with this node can have."""
    if any(value is not None and value.dtype == ir.DataType.FLOAT4E2M1 for value in node.inputs):
        return OPSET_FP4
    return OPSET_BLOCKS if "block_size" in node.attributes else OPSET


def _check_operators(graph: ir.Graph, name: str) -> None:
    for node in graph:
        table = {"": TENSORRT_10_3, TRT_DOMAIN: TENSORRT_10_8}.get(node.domain, {})
        allowed = table.get(node.op_type, set())
        types = {value.dtype for value in node.inputs if value is not None}
        if not (types and types <= allowed):
            raise VerificationError(
                f"{node.name} is {node.op_type} of {', '.join(sorted(map(str, types)))}",
                where=f"decomposed form of {name}",
                allowed="operators and types of TensorRT 10.3",
                fix="report this export, with the versions of torch and onnxscript",
            )


class _Builder:
    """Makes nodes before the one that is replaced, with types; shares what several need."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._nodes: list[ir.Node] = []
        self._shared: dict[Hashable, ir.Value] = {}

    def __call__(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """Add a node with one output."""
        return self.several(op_type, inputs, 1, **attributes)[0]

    def several(
        self, op_type: str, inputs: tuple[ir.Value, ...], outputs: int, **attributes: Any
    ) -> tuple[ir.Value, ...]:
        """Add a node with several outputs of one type."""
        node = ir.node(op_type, inputs, attributes, num_outputs=outputs)
        for value in node.outputs:
            value.type = ir.TensorType(_result_type(node))
        self._nodes.append(node)
        return tuple(node.outputs)

    def constant(self, value: object, dtype: ir.DataType) -> ir.Value:
        """An initializer; equal ones are stored once."""
        array: NDArray[np.generic] = np.asarray(value, dtype.numpy())
        key = ("constant", dtype, array.shape, array.tobytes())
        if key not in self._shared:
            name = f"decomposed_{len(self._shared)}"
            tensor = ir.tensor(array, name=name)
            constant = ir.Value(
                name=name,
                type=ir.TensorType(dtype),
                shape=ir.Shape(array.shape),
                const_value=tensor,
            )
            self._graph.register_initializer(constant)
            self._shared[key] = constant
        return self._shared[key]

    def once(self, key: Hashable, make: Callable[[], ir.Value]) -> ir.Value:
        """What `make` returns, made by the first replacement that asks for it."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """`value` in another type."""
        return value if value.dtype == dtype else self("Cast", value, to=int(dtype))

    def replace(self, node: ir.Node, value: ir.Value) -> None:
        """Put the nodes made since the last call in the place of `node`."""
        old = node.outputs[0]
        self._graph.insert_before(node, self._nodes)
        self._nodes.clear()
        name, value.type, value.shape = old.name, old.type, old.shape
        ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
        self._graph.remove(node, safe=True)
        value.name = name


def _result_type(node: ir.Node) -> ir.DataType:
    if node.op_type in ("And", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"):
        return ir.DataType.BOOL
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    if node.op_type == "Shape":
        return ir.DataType.INT64
    source = node.inputs[1 if node.op_type == "Where" else 0]
    assert source is not None
    assert source.dtype is not None
    return source.dtype


def _shape(value: ir.Value | None) -> tuple[int | str | None, ...]:
    """Sizes of axes: numbers, or names of free axes."""
    if value is None or value.shape is None:
        return ()
    return tuple(axis if isinstance(axis, int) else axis.value for axis in value.shape)


def _fixed(value: ir.Value, axis: int) -> int:
    size = _shape(value)[axis]
    assert isinstance(size, int)
    return size


def _given(node: ir.Node) -> list[ir.Value]:
    """Inputs up to the first that is left out."""
    return [value for value in node.inputs if value is not None]


def _int(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _float(node: ir.Node, name: str, default: float) -> float:
    return node.attributes[name].as_float() if name in node.attributes else default


def _int64(op: _Builder, value: object) -> ir.Value:
    return op.constant(value, ir.DataType.INT64)


def _size(op: _Builder, value: ir.Value, axis: int) -> ir.Value:
    """Size of an axis, a scalar."""
    return op("Squeeze", op("Shape", value, start=axis, end=axis + 1), _int64(op, [0]))


class _Rule:
    """Replaces one operator."""

    op_type: str

    def why_not(self, node: ir.Node) -> str | None:
        """Reason why a node of this operator is not one that `rewrite` knows; None if it is."""
        raise NotImplementedError

    def rewrite(self, op: _Builder, node: ir.Node) -> ir.Value:
        """Build what takes the place of the node's output."""
        raise NotImplementedError


class _Attention(_Rule):
    """softmax(q k^T / sqrt(d) + mask) v.

    q is scaled before the product, whose fp16 form would overflow else; the softmax is fp32. The
    query heads of a key head become rows of one matrix, so that keys and values are read once:
    (N, h, L, d) -> (N, h/g, g*L, d).
    """

    op_type = "Attention"

    def why_not(self, node: ir.Node) -> str | None:
        given = _given(node)
        if not 3 <= len(given) == len(node.inputs) <= 4 or len(node.outputs) != 1:
            return "it has other inputs than q, k, v, mask, or more than one output"
        q, k, v = given[:3]
        for name in ("is_causal", "softmax_precision", "q_num_heads", "kv_num_heads"):
            if _int(node, name, 0):
                return f"{name} is set"
        if _float(node, "softcap", 0.0):
            return "softcap is set"
        if any(len(_shape(part)) != 4 for part in given):
            return "an input has not four axes"
        if not all(isinstance(size, int) for part in (q, k, v) for size in _shape(part)[1::2]):
            return "heads or their size are not fixed"
        if q.dtype not in _FLOAT or {k.dtype, v.dtype} != {q.dtype}:
            return f"types are {q.dtype}, {k.dtype}, {v.dtype}"
        if len(given) > 3 and given[3].dtype not in (ir.DataType.BOOL, q.dtype):
            return f"the mask is {given[3].dtype}"
        if _shape(q)[1] != _shape(k)[1] and not isinstance(_shape(q)[0], int):
            return "query heads are grouped and the batch is not fixed"
        if _shape(q)[1] != _shape(k)[1] and len(given) > 3 and _shape(given[3])[1] != 1:
            return "query heads are grouped and the mask differs by head"
        return None

    def rewrite(self, op: _Builder, node: ir.Node) -> ir.Value:
        q, k, v, *masks = _given(node)
        rows, dtype = _shape(q)[0], q.dtype
        heads, kv_heads, d = _fixed(q, 1), _fixed(k, 1), _fixed(q, 3)
        scale, grouped = _float(node, "scale", d**-0.5), heads // kv_heads
        assert dtype is not None
        q = op("Mul", q, op.constant(scale, dtype))
        if grouped > 1:
            q = op("Reshape", q, _int64(op, [rows, kv_heads, -1, d]))
        scores = op("MatMul", q, op("Transpose", k, perm=(0, 1, 3, 2)))
        scores = op.cast(scores, ir.DataType.FLOAT)
        for mask in masks:
            scores = self._masked(op, scores, mask, grouped)
        out = op("MatMul", op.cast(op("Softmax", scores, axis=-1), dtype), v)
        if grouped > 1:
            out = op("Reshape", out, _int64(op, [rows, heads, -1, _shape(v)[3]]))
        return out

    def _masked(self, op: _Builder, scores: ir.Value, mask: ir.Value, grouped: int) -> ir.Value:
        expand = mask.producer()
        if expand is not None and expand.op_type == "Expand" and expand.inputs[0] is not None:
            mask = expand.inputs[0]  # Where and Add broadcast
        if grouped > 1 and _shape(mask)[2] != 1:
            rows = partial(op, "Concat", *[mask] * grouped, axis=2)
            mask = op.once(("grouped", mask, grouped), rows)
        if mask.dtype == ir.DataType.BOOL:
            return op("Where", mask, scores, op.constant(_MASKED, ir.DataType.FLOAT))
        bias = op.once(("fp32", mask), partial(op.cast, mask, ir.DataType.FLOAT))
        return op("Add", scores, bias)


class _TensorScatter(_Rule):
    """A new cache: rows of this call from the update, the others from the past."""

    op_type = "TensorScatter"

    def why_not(self, node: ir.Node) -> str | None:
        past, update, *position = _given(node)
        if len(position) != 1 or _shape(position[0]) != (1,):
            return "there is no single write position"
        if "mode" in node.attributes and node.attributes["mode"].as_string() != "linear":
            return "mode is not linear"
        if _int(node, "axis", -2) != -2 or len(_shape(past)) != 4 or _shape(past)[0] != 1:
            return "it does not write along axis -2 of (1, heads, capacity, d)"
        if None in (_shape(past)[2], _shape(update)[2]):
            return "axes have no names"
        return None

    def rewrite(self, op: _Builder, node: ir.Node) -> ir.Value:
        past, update, position = _given(node)
        axes = (position, _shape(past)[2], _shape(update)[2])
        length = op.once(("length", axes), partial(_size, op, update, 2))
        offset = op.once(("offset", axes), partial(self._offset, op, past, position))  # (P,)
        row = op.once(("row", axes), partial(self._row, op, offset, length))
        written = op.once(("written", axes), partial(self._written, op, offset, length))
        return op("Where", written, op("Gather", update, row, axis=2), past)

    def _offset(self, op: _Builder, past: ir.Value, position: ir.Value) -> ir.Value:
        slots = op("Range", _int64(op, 0), _size(op, past, 2), _int64(op, 1))
        return op("Sub", slots, position)

    def _row(self, op: _Builder, offset: ir.Value, length: ir.Value) -> ir.Value:
        last = op("Sub", length, _int64(op, 1))
        return op("Min", op("Max", offset, _int64(op, 0)), last)

    def _written(self, op: _Builder, offset: ir.Value, length: ir.Value) -> ir.Value:
        inside = op("And", op("GreaterOrEqual", offset, _int64(op, 0)), op("Less", offset, length))
        return op("Unsqueeze", inside, _int64(op, [1]))  # (P, 1)


class _RotaryEmbedding(_Rule):
    """Rotation of the two halves of a head: see `model.language.rotate_half`."""

    op_type = "RotaryEmbedding"

    def why_not(self, node: ir.Node) -> str | None:
        given = _given(node)
        if len(given) != 3:
            return "it has position ids"
        if _int(node, "interleaved", 0) or _int(node, "rotary_embedding_dim", 0):
            return "it is interleaved or rotates a part of the head"
        if [len(_shape(value)) for value in given] != [4, 3, 3]:
            return "its inputs are not (N, h, L, d), (N, L, d/2), (N, L, d/2)"
        if len({value.dtype for value in given}) != 1 or given[0].dtype not in _FLOAT:
            return f"types are {', '.join(str(value.dtype) for value in given)}"
        return None

    def rewrite(self, op: _Builder, node: ir.Node) -> ir.Value:
        x, *tables = _given(node)
        cos, sin = (
            op.once(("heads", table), partial(op, "Unsqueeze", table, _int64(op, [1])))
            for table in tables
        )
        first, second = op.several("Split", (x,), 2, axis=-1, num_outputs=2)
        rotated = (
            op("Sub", op("Mul", first, cos), op("Mul", second, sin)),
            op("Add", op("Mul", second, cos), op("Mul", first, sin)),
        )
        return op("Concat", *rotated, axis=-1)


class _RMSNormalization(_Rule):
    """x / sqrt(mean(x^2) + epsilon) * weight."""

    op_type = "RMSNormalization"

    def why_not(self, node: ir.Node) -> str | None:
        given = _given(node)
        if {value.dtype for value in given} != {ir.DataType.FLOAT}:
            return "it is not fp32"
        if _int(node, "axis", -1) != -1 or _int(node, "stash_type", 1) != 1:
            return "it is not over the last axis, or not computed in fp32"
        return None

    def rewrite(self, op: _Builder, node: ir.Node) -> ir.Value:
        x, weight = _given(node)
        epsilon = _float(node, "epsilon", 1e-5)
        mean = op("ReduceMean", op("Mul", x, x), _int64(op, [-1]), keepdims=1)
        norm = op("Sqrt", op("Add", mean, op.constant(epsilon, ir.DataType.FLOAT)))
        return op("Mul", op("Div", x, norm), weight)


class _CumSum(_Rule):
    """Prefix sums of flags as matrix products over blocks.

    TensorRT 10.3 makes a loop over the tokens of CumSum, which no CUDA graph can hold.
    """

    op_type = "CumSum"

    def why_not(self, node: ir.Node) -> str | None:
        x, axis = _given(node)
        source = x.producer()
        if source is None or source.op_type != "Cast" or x.dtype != ir.DataType.INT64:
            return "it does not sum flags cast to int64"
        if source.inputs[0] is None or source.inputs[0].dtype != ir.DataType.BOOL:
            return "it does not sum flags cast to int64"
        if len(_shape(x)) != 1 or axis.const_value is None or axis.const_value.numpy().item() != 0:
            return "it is not over the only axis"
        if _int(node, "exclusive", 0) or _int(node, "reverse", 0):
            return "it is exclusive or in reverse"
        return None

    def rewrite(self, op: _Builder, node: ir.Node) -> ir.Value:
        x = _given(node)[0]
        flags = op.cast(x, ir.DataType.FLOAT)
        length = _size(op, x, 0)
        rounded = op("Add", length, _int64(op, _LANES - 1))
        blocks = op("Range", _int64(op, 0), op("Div", rounded, _int64(op, _LANES)), _int64(op, 1))
        down, across = op("Unsqueeze", blocks, _int64(op, [1])), np.arange(_LANES)
        index = op("Add", op("Mul", down, _int64(op, _LANES)), _int64(op, across))  # (n, lanes)
        last = op("Sub", length, _int64(op, 1))
        padded = op(
            "Where",
            op("Less", index, length),
            op("Gather", flags, op("Min", index, last), axis=0),
            op.constant(0, ir.DataType.FLOAT),
        )
        upper = op("LessOrEqual", _int64(op, across[:, None]), _int64(op, across[None]))
        within = op("MatMul", padded, op.cast(upper, ir.DataType.FLOAT))
        total = op("ReduceSum", padded, _int64(op, [1]), keepdims=1)  # (n, 1)
        earlier = op("Greater", down, op("Unsqueeze", blocks, _int64(op, [0])))  # (n, n)
        before = op("MatMul", op.cast(earlier, ir.DataType.FLOAT), total)
        sums = op("Reshape", op("Add", within, before), _int64(op, [-1]))
        stop = op("Shape", x, start=0, end=1)
        sums = op("Slice", sums, _int64(op, [0]), stop, _int64(op, [0]))
        return op.cast(sums, ir.DataType.INT64)


class _Clip(_Rule):
    """Min(Max(x, low), high): TensorRT 10.3 lists no integers for Clip."""

    op_type = "Clip"

    def why_not(self, node: ir.Node) -> str | None:
        given = _given(node)
        if len(given) != 3 or {value.dtype for value in given} != {ir.DataType.INT64}:
            return "it is not int64 between two bounds"
        return None

    def rewrite(self, op: _Builder, node: ir.Node) -> ir.Value:
        x, low, high = _given(node)
        return op("Min", op("Max", x, low), high)


_RULES: tuple[_Rule, ...] = (
    _Attention(),
    _TensorScatter(),
    _RotaryEmbedding(),
    _RMSNormalization(),
    _CumSum(),
    _Clip(),
)
