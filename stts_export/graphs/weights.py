"""Weights of a graph: named while it is traced, read when they are written, tensor by tensor.

A piece of a matrix is cast at a time; a transposed one is cut into columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stts_export.checkpoint.streamed import Source
from stts_export.errors import InputError
from stts_export.tensors import DATA_ALIGNMENT

OnTensor = Callable[[int, int], None]
"""(tensors that are written, of how many)."""

_IR_TYPE = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
}
PIECE_BYTES = 2**26


@dataclass(frozen=True)
class _Part:
    """One parameter at the type that the graph has it in."""

    source: Source
    dtype: torch.dtype

    def pieces(self, *, transposed: bool = False) -> Iterator[Tensor]:
        """Some rows after the other; of the transposed matrix if asked for."""
        stored = self.source.load()
        stored = stored.T if transposed else stored
        rows = max(1, PIECE_BYTES // max(1, math.prod(stored.shape[1:]) * 4))
        for start in range(0, len(stored), rows):
            yield self._cast(stored[start : start + rows]).contiguous()

    def _cast(self, stored: Tensor) -> Tensor:
        cast = self.source.check(stored).to(self.dtype)
        if cast.numel() and not all(torch.isfinite(bound) for bound in torch.aminmax(cast)):
            raise InputError(
                f"{self.source.name} has values up to {float(stored.abs().max()):.3g}",
                where="weights at fp16",
                allowed=f"up to {torch.finfo(self.dtype).max:g}",
                fix="build with --precision fp32",
            )
        return cast


class WrittenTensor(ir.LazyTensor):
    """An initializer that lies in the data file of its graph."""

    def pieces(self) -> Iterator[NDArray[Any]]:
        """Contiguous arrays whose bytes make up the whole, one after the other."""
        raise NotImplementedError


class ArrayTensor(WrittenTensor):
    """An initializer that is there as an array, such as scales."""

    def __init__(self, name: str, array: ir.TensorProtocol) -> None:
        self._array = array
        super().__init__(lambda: array, array.dtype, ir.Shape(array.shape.numpy()), name=name)

    def pieces(self) -> Iterator[NDArray[Any]]:
        """See `WrittenTensor`."""
        yield np.ascontiguousarray(self._array.numpy())


class WeightTensor(WrittenTensor):
    """An initializer made of parameters: one, one transposed, or several one below the other."""

    def __init__(self, name: str, parts: tuple[_Part, ...], *, transposed: bool = False) -> None:
        self.parts = parts
        self.transposed = transposed
        rows = sum(part.source.shape[0] for part in parts)
        shape = (rows, *parts[0].source.shape[1:])
        super().__init__(
            self._evaluate,
            _IR_TYPE[parts[0].dtype],
            ir.Shape(shape[::-1] if transposed else shape),
            name=name,
        )

    def _evaluate(self) -> ir.TensorProtocol:
        """For the exporter's optimiser, which looks into small tensors; checks nothing."""
        values = torch.cat([part.source.load().to(part.dtype) for part in self.parts])
        return ir.tensor(_array(values.T if self.transposed else values), name=self.name)

    def pieces(self) -> Iterator[NDArray[Any]]:
        """See `WrittenTensor`."""
        for part in self.parts:
            for piece in part.pieces(transposed=self.transposed):
                yield _array(piece)

    def begins_with(self, other: WeightTensor) -> bool:
        """Whether the bytes of `other` are the first of this one's."""
        first, second = self.parts[0], other.parts[0]
        if self.transposed or other.transposed or len(other.parts) > 1:
            return False
        if (first.dtype, first.source.shape) != (second.dtype, second.source.shape):
            return False
        if first.source.name == second.source.name:
            return True
        return all(torch.equal(a, b) for a, b in zip(first.pieces(), second.pieces(), strict=True))


def _array(tensor: Tensor) -> NDArray[Any]:
    """The same numbers in NumPy, which has bfloat16 from elsewhere only."""
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    bits: NDArray[Any] = tensor.contiguous().view(torch.uint16).numpy()
    return bits.view(ml_dtypes.bfloat16)


def without_memory(module: nn.Module) -> nn.Module:
    """Give parameters of the meta device values to trace with: zeros that share one number."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            setattr(part, name, nn.Parameter(zeros, requires_grad=False))
    return module


def name_weights(graph: ir.Graph, module: nn.Module, sources: Mapping[str, Source]) -> None:
    """Replace the values that a module was traced with by those that its parameters have.

    Args:
        graph: traced, not optimised yet.
        module: what was traced; its parameters' names are the initializers'.
        sources: where the values of its parameters lie, by these names.
    """
    for name, parameter in module.named_parameters():
        if name in graph.initializers:
            part = _Part(sources[name], parameter.dtype)
            graph.initializers[name].const_value = WeightTensor(name, (part,))
    for node in list(graph):
        tensor = _moved(node)
        if tensor is None:
            continue
        output = node.outputs[0]
        value = ir.Value(
            name=tensor.name,
            type=ir.TensorType(tensor.dtype),
            shape=tensor.shape,
            const_value=tensor,
        )
        if tensor.name not in graph.initializers:
            graph.register_initializer(value)
        output.replace_all_uses_with(graph.initializers[str(tensor.name)])
        graph.remove(node, safe=True)


def _moved(node: ir.Node) -> WeightTensor | None:
    """What a node makes of weights alone, where that is no computation."""
    weights = [value.const_value for value in node.inputs if value is not None]
    given = [weight for weight in weights if isinstance(weight, WeightTensor)]
    if not given or len(given) < len(weights):
        return None
    axis = node.attributes.get_int("axis", 0)
    if node.op_type == "Transpose" and not given[0].transposed and len(given[0].shape) == 2:
        return WeightTensor(f"{given[0].name}.transposed", given[0].parts, transposed=True)
    if node.op_type == "Concat" and axis == 0 and not any(tensor.transposed for tensor in given):
        name = " ".join(str(tensor.name) for tensor in given)
        return WeightTensor(name, sum((tensor.parts for tensor in given), ()))
    return None


def write_weights(graph: ir.Graph, file: Path, on_tensor: OnTensor | None = None) -> None:
    """Write the weights of a graph to a file, and make its initializers refer to it.

    Args:
        graph: traced and optimised.
        file: data file, beside the graph's.
        on_tensor: called before the first tensor and after each.
    """
    weights = {
        name: value.const_value
        for name, value in graph.initializers.items()
        if isinstance(value.const_value, WrittenTensor)
    }
    with file.open("wb") as data:
        for done, (name, tensor) in enumerate(weights.items()):
            if on_tensor:
                on_tensor(done, len(weights))
            offset = data.seek(_aligned(data.tell(), tensor.nbytes))
            for piece in tensor.pieces():
                data.write(piece.tobytes() if piece.dtype.kind == "V" else piece.data)
            graph.initializers[name].const_value = _reference(tensor, file, offset)
        if on_tensor:
            on_tensor(len(weights), len(weights))


def share_tables(graph: ir.Graph) -> None:
    """Let a product take a table that begins with its matrix, and drop the other columns.

    One initializer for both, not two that overlap in the data file: TensorRT refuses those.
    """
    found = [(value, value.const_value) for value in graph.initializers.values()]
    weights = [(value, tensor) for value, tensor in found if isinstance(tensor, WeightTensor)]
    tables = [(value, tensor) for value, tensor in weights if len(tensor.parts) > 1]
    for value, tensor in weights:
        users = [node for node in value.consumers() if node.op_type == "Gemm"]
        if len(tensor.parts) > 1 or not users or len(users) < len(value.uses()):
            continue
        whole = next((table for table, held in tables if held.begins_with(tensor)), None)
        if whole is not None and all(is_plain_product(node, value) for node in users):
            for node in users:
                _take_columns(graph, node, whole, tensor.parts[0].source.shape[0])
            del graph.initializers[str(value.name)]


def add_initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Add a constant of a graph under the name of the tensor."""
    value = ir.Value(
        name=tensor.name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(tensor.shape.numpy()),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def is_plain_product(node: ir.Node, value: ir.Value) -> bool:
    """Whether a Gemm is x @ value.T."""
    return node.attributes.get_int("transB", 0) == 1 and tuple(node.inputs[1:]) == (value,)


def _take_columns(graph: ir.Graph, node: ir.Node, table: ir.Value, count: int) -> None:
    """Multiply with a whole table and keep the first columns."""
    old = node.outputs[0]
    assert old.shape is not None
    assert table.shape is not None
    node.replace_input_with(1, table)
    bounds = []
    for name, bound in (("first", 0), ("last", count), ("axis", 1)):
        tensor = ir.tensor([bound], dtype=ir.DataType.INT64, name=f"{old.name}.{name}")
        bounds.append(add_initializer(graph, tensor))
    whole = ir.Value(
        name=f"{old.name}.whole", type=old.type, shape=ir.Shape([old.shape[0], table.shape[0]])
    )
    product = ir.node(
        "Gemm", node.inputs, dict(node.attributes), outputs=[whole], name=f"{node.name}.whole"
    )
    columns = ir.node("Slice", [whole, *bounds], num_outputs=1, name=f"{node.name}.columns")
    kept = columns.outputs[0]
    kept.type, kept.shape, output = old.type, old.shape, old.name
    graph.insert_before(node, [product, columns])
    ir.convenience.replace_all_uses_with(old, kept, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    kept.name = output


def refer_to_weights(graph: ir.Graph, written: ir.Graph) -> None:
    """Make the weights of a variant references to those of the graph that it varies.

    Of equal vectors the optimiser keeps one; where it kept another, the variant holds its own.
    """
    for name, value in graph.initializers.items():
        if isinstance(value.const_value, WrittenTensor) and name in written.initializers:
            value.const_value = written.initializers[name].const_value


def _aligned(offset: int, nbytes: int) -> int:
    """Where a tensor may begin at or after an offset; small ones are copied, and lie anywhere."""
    return offset if nbytes < DATA_ALIGNMENT else -(-offset // DATA_ALIGNMENT) * DATA_ALIGNMENT


def _reference(tensor: WrittenTensor, file: Path, offset: int) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        file.name,
        offset,
        tensor.nbytes,
        tensor.dtype,
        shape=tensor.shape,
        name=str(tensor.name),
        base_dir=file.parent,
    )
