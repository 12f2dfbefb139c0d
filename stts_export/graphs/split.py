"""Split the queries of the decoder's attentions: a long prompt needs no matrix of all pairs.

In `decoder`, attention holds a mask of all queries with all cached keys, and the scores of every
head: more than 160 GB at 36,000 tokens and 32 heads. Here it is in the body of a Loop over queries:
a turn takes as many of them as `SCORES` allows and makes their part of the mask. No query depends
on another, so results are the same. A call that is short enough, as each that decodes a token, is
one turn.

Weights of matrices stay outside: ONNX Runtime 1.31 does not prepare those of a body, and converts
what it computes in another type once a turn.

Axes: L tokens, P cache capacity, R queries of a turn, d width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from stts_export.config import ModelConfig
from stts_export.errors import VerificationError
from stts_export.tensors import CAPACITY, DECODER, SCORES, SPLIT, past_names, variant

PAIRS = "split.pairs"
"""Initializer (1,): most queries times keys of a turn."""
TURN = "turn"
"""Axis R in the body of a loop."""
_TOKENS = "tokens"
_TAKERS = {"MatMul", "Mul", "QuantizeLinear", "TRT_FP4DynamicQuantize"}
"""What takes an attention's output: the projection, or what a recipe puts before it."""
_BOOL, _INT64 = ir.DataType.BOOL, ir.DataType.INT64


def split_queries(model: ir.Model, config: ModelConfig) -> None:
    """Rewrite the decoder in place.

    Args:
        model: `decoder` as it is exported; its weights stay references.
        config: the model that it was exported from.

    Raises:
        VerificationError: the graph is not made as the decoder is.
    """
    graph = model.graph
    attentions = [node for node in graph if node.op_type == "Attention"]
    if len(attentions) != config.text.num_layers:
        raise _refused(f"has {len(attentions)} Attention", f"{config.text.num_layers}, one a layer")
    parts = [_part(graph, node) for node in attentions]
    turns = _turns(graph, SCORES // config.text.num_heads)
    for layer, part in enumerate(parts):
        _into_loop(graph, part, turns, f"split.layer_{layer}")
    RemoveUnusedNodesPass()(model)
    for value in (value for node in graph for value in node.outputs):
        if _is_of_pairs(value):
            raise _refused(f"{value.name} is {value.shape}", "no tensor of all queries and keys")


@dataclass(frozen=True)
class _Part:
    """What a Loop takes of a layer: all that it does with its queries, but for weights."""

    nodes: list[ir.Node]
    """Of this layer alone, in order."""
    mask: list[ir.Node]
    """What spreads queries and keys over all pairs, in order; all layers share these."""
    output: ir.Value
    """(1, L, heads * d)."""

    def row_inputs(self) -> list[ir.Value]:
        """Values (1, L, ...) from outside, of which a turn takes rows."""
        nodes = (*self.mask, *self.nodes)
        inside = {value for node in nodes for value in node.outputs}
        taken = dict.fromkeys(
            value
            for node in nodes
            for value in node.inputs
            if value is not None and value not in inside and _TOKENS in _axes(value)
        )
        for value in taken:
            if _axes(value)[:2] != (1, _TOKENS):
                raise _refused(f"{value.name} is {value.shape}", f"(1, {_TOKENS}, ...)")
        return list(taken)


def _part(graph: ir.Graph, attention: ir.Node) -> _Part:
    if len(attention.inputs) != 4:
        raise _refused(f"{attention.name} has {len(attention.inputs)} inputs", "q, k, v and a mask")
    query, mask = attention.inputs[0], attention.inputs[3]
    while (made := query and query.producer()) and made.op_type != "Split":
        query = made.inputs[0]
    if made is None:
        raise _refused(f"{attention.name} has queries from elsewhere", "a part of a projection")
    output = _attended(attention)
    after = _after(graph, query)
    nodes = [node for node in _before(graph, output) if node in after]
    before = _before(graph, mask)
    for value in (value for node in before for value in node.outputs):
        if value.shape is None or (None in _axes(value) and len(value.shape) > 1):
            raise _refused(f"{value.name} is {value.shape}", "a mask of values with shapes")
    pairs = [node for node in before if any(map(_is_of_pairs, node.outputs))]
    return _Part(nodes, pairs, output)


def _attended(attention: ir.Node) -> ir.Value:
    """What the output projection takes of an attention, (1, L, heads * d)."""
    value = attention.outputs[0]
    while len(users := value.consumers()) == 1 and users[0].op_type in ("Transpose", "Reshape"):
        value = users[0].outputs[0]
    takers = {user.op_type for user in users}
    if len(users) != 1 or not takers <= _TAKERS or _axes(value)[:2] != (1, _TOKENS):
        raise _refused(f"{value.name} {value.shape} is used otherwise", "a projection of rows")
    return value


def _before(graph: ir.Graph, value: ir.Value | None) -> list[ir.Node]:
    """Nodes that a value needs, in the graph's order."""
    needed, found = {value}, []
    for node in reversed(graph):
        if not needed.isdisjoint(node.outputs):
            needed.update(node.inputs)
            found.append(node)
    return found[::-1]


def _after(graph: ir.Graph, value: ir.Value | None) -> set[ir.Node]:
    """Nodes that need a value."""
    made, found = {value}, set()
    for node in graph:
        if not made.isdisjoint(node.inputs):
            made.update(node.outputs)
            found.add(node)
    return found


@dataclass(frozen=True)
class _Turns:
    """Sizes that the loops of all layers share, int64."""

    count: ir.Value
    """(), how many turns a call takes."""
    rows: ir.Value
    """(1,), R."""
    offsets: ir.Value
    """(R,), 0, 1, ..."""
    last: ir.Value
    """(1,), L - 1: the row that the last turn repeats where there are no more."""
    length: ir.Value
    """(1,), L."""


def _turns(graph: ir.Graph, pairs: int) -> _Turns:
    """Share a call out over turns of at most `pairs` queries times keys, and of one query at least.

    The sizes hang on no result, so their nodes are the graph's first.
    """
    op = _Builder(graph, "split.sizes")
    one = op.constant([1])
    inputs = {value.name: value for value in graph.inputs}
    length = op("Shape", inputs["input_ids"], dtype=_INT64, start=1, end=2)
    capacity = op("Shape", inputs[past_names(0)[0]], dtype=_INT64, start=2, end=3)
    rows = op("Div", op.constant([max(pairs, 1)], PAIRS), capacity)
    rows = op("Min", op("Max", rows, one), length)
    last = op("Sub", length, one)
    first = op.constant([0])
    count = op("Squeeze", op("Add", op("Div", last, rows), one), first)
    offsets = op("Range", op.constant(0), op("Squeeze", rows, first), op.constant(1))
    graph.insert_before(graph[0], op.nodes)
    return _Turns(count, rows, offsets, last, length)


def _into_loop(graph: ir.Graph, part: _Part, turns: _Turns, name: str) -> None:
    """Move a layer's part into the body of a Loop."""
    turn, going = _value(f"{name}.turn", _INT64), _value(f"{name}.going", _BOOL)
    op = _Builder(graph, name)
    row = op("Min", op("Add", op("Mul", turn, turns.rows), turns.offsets), turns.last)
    inside: dict[ir.Value | None, ir.Value] = {
        value: op("Gather", value, row, axis=1) for value in part.row_inputs()
    }
    for node in (*part.mask, *part.nodes):
        op.copy(node, inside)
    rows = inside[part.output]
    body = ir.Graph([turn, going], [op("Identity", going), rows], nodes=op.nodes, name=name)

    op = _Builder(graph, f"{name}.output")
    # (turns, 1, R, heads * d)
    turned = op("Loop", turns.count, op.constant(True), dtype=rows.dtype, body=body)
    output = op("Reshape", turned, op.constant([1, -1, _axes(part.output)[2]]))
    output = op("Slice", output, op.constant([0]), turns.length, op.constant([1]))
    output.shape = part.output.shape
    graph.insert_before(part.nodes[-1], op.nodes)
    ir.convenience.replace_all_uses_with(part.output, output)
    graph.remove(part.nodes, safe=True)


class _Builder:
    """Makes nodes; their outputs are called after a place and numbered."""

    def __init__(self, graph: ir.Graph, place: str) -> None:
        self.nodes: list[ir.Node] = []
        self._graph = graph
        self._place = place

    def __call__(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        dtype: ir.DataType | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """Add a node with one output, of the type of its first input unless told otherwise."""
        node = ir.node(op_type, inputs, attributes)
        if dtype is None:
            assert inputs[0] is not None
            dtype = inputs[0].dtype
        assert dtype is not None
        node.outputs[0].type = ir.TensorType(dtype)
        self._add(node)
        return node.outputs[0]

    def constant(self, value: object, name: str | None = None) -> ir.Value:
        """A bool, an int64 or a vector of those, that the whole graph shares."""
        array = np.array(value)
        name = name or f"split.{'_'.join(map(str, array.flat))}.{array.ndim}"
        if name not in self._graph.initializers:
            tensor = ir.tensor(array, name=name)
            constant = _value(name, tensor.dtype, *array.shape)
            constant.const_value = tensor
            self._graph.register_initializer(constant)
        return self._graph.initializers[name]

    def copy(self, node: ir.Node, inside: dict[ir.Value | None, ir.Value]) -> None:
        """Add a node like another, with what stands for its inputs, and for its outputs, inside."""
        inputs = [inside.get(value, value) for value in node.inputs]
        made = ir.node(
            node.op_type, inputs, node.attributes, domain=node.domain, num_outputs=len(node.outputs)
        )
        for old, new in zip(node.outputs, made.outputs, strict=True):
            new.type = old.type
            new.shape = ir.Shape([TURN if axis == _TOKENS else axis for axis in _axes(old)])
            inside[old] = new
        self._add(made)

    def _add(self, node: ir.Node) -> None:
        node.name = f"{self._place}.{len(self.nodes)}"
        for index, value in enumerate(node.outputs):
            value.name = f"{node.name}.{index}"
        self.nodes.append(node)


def _value(name: str, dtype: ir.DataType, *shape: int) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def _axes(value: ir.Value) -> tuple[int | str | None, ...]:
    """Sizes of axes: numbers, or names of free ones."""
    axes = value.shape or ()
    return tuple(axis if isinstance(axis, int) else axis.value for axis in axes)


def _is_of_pairs(value: ir.Value) -> bool:
    return {_TOKENS, CAPACITY} <= set(_axes(value))


def _refused(got: str, allowed: str) -> VerificationError:
    return VerificationError(
        got,
        where=variant(DECODER, SPLIT),
        allowed=allowed,
        fix="report this export, with the versions of torch and onnxscript",
    )
