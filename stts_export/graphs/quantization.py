"""Q/DQ nodes around the products of a graph: scales in, no calibrator objects left.

    x -> Mul(smooth) -> QuantizeLinear -> DequantizeLinear -> MatMul <- DequantizeLinear <- weight

Axes: m inputs of a layer, n its outputs, b blocks of inputs that share a weight's scale.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from stts_export.calibration.layers import (
    LARGEST,
    NVFP4_BLOCK,
    NVFP4_SCALE_LARGEST,
    Format,
    LayerQuantization,
)
from stts_export.calibration.rounding import quantised_weight, rounded_scale
from stts_export.checkpoint.streamed import Source
from stts_export.errors import VerificationError
from stts_export.graphs.weights import (
    PIECE_BYTES,
    ArrayTensor,
    WeightTensor,
    WrittenTensor,
    add_initializer,
    is_plain_product,
)
from stts_export.tensors import Precision

TRT_DOMAIN = "trt"
"""Of `TRT_FP4DynamicQuantize`, which TensorRT 10.8 and newer have."""

_TYPE: dict[Format, ir.DataType] = {
    "int8": ir.DataType.INT8,
    "fp8": ir.DataType.FLOAT8E4M3FN,
    "int4": ir.DataType.INT4,
    "nvfp4": ir.DataType.FLOAT4E2M1,
}
_BASE_ARRAY: dict[Precision, Any] = {
    "fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16,
}  # fmt: skip


class QuantisedTensor(WrittenTensor):
    """The weight of a layer, (m, n), made when it is written.

    Args:
        name: of the initializer.
        source: the parameter, (n, m).
        how: how the layer is quantised.
        precision: of the graph.
    """

    def __init__(
        self, name: str, source: Source, how: LayerQuantization, precision: Precision
    ) -> None:
        self._source, self._how, self._precision = source, how, precision
        shape = ir.Shape(source.shape[::-1])
        super().__init__(self._evaluate, _TYPE[how.format], shape, name=name)

    def _evaluate(self) -> ir.TensorProtocol:
        packed = np.concatenate([piece.view(np.uint8).ravel() for piece in self.pieces()])
        return ir.PackedTensor(packed, self.dtype, shape=self.shape, name=self.name)

    def pieces(self) -> Iterator[NDArray[Any]]:
        """Some inputs after the other, packed as ONNX packs them."""
        outputs, inputs = self._source.shape
        # Two 4-bit values share a byte, so that a piece has whole blocks, whose size is even.
        step = max(1, PIECE_BYTES // (4 * outputs * NVFP4_BLOCK)) * NVFP4_BLOCK
        step = math.ceil(step / (self._how.block or 1)) * (self._how.block or 1)
        stored = self._source.load()
        for start in range(0, inputs, step):
            columns = slice(start, min(start + step, inputs))
            part = self._source.check(stored[:, columns])
            values = quantised_weight(part, self._how, self._precision, columns)
            yield _packed(values.T.contiguous(), self._how.format)


def _packed(values: Tensor, target: Format) -> NDArray[Any]:
    """Bytes of values of a format."""
    if target == "int8":
        return values.to(torch.int8).numpy()
    if target == "fp8":
        return values.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    if target == "int4":
        codes = values.to(torch.int8).numpy().ravel().view(np.uint8) & 0xF
    else:
        codes = values.numpy().ravel().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    codes = np.append(codes, np.zeros(len(codes) % 2, np.uint8))
    packed: NDArray[Any] = codes[::2] | codes[1::2] << 4
    return packed


def quantise_graph(
    graph: ir.Graph,
    names: Mapping[str, str],
    layers: Mapping[str, LayerQuantization],
    precision: Precision,
) -> None:
    """Quantise the products of a traced and optimised graph.

    Args:
        graph: its weights are `WeightTensor`s.
        names: layer by the name that its weight has in the graph.
        layers: how layers are quantised; those of other graphs are passed over.
        precision: of the graph.

    Raises:
        VerificationError: a layer of this graph was not found as a product of its own.
    """
    builder = _Builder(graph, precision)
    held = {name.removesuffix(".transposed") for name in graph.initializers}
    wanted = {layer for name, layer in names.items() if name in held and layer in layers}
    for node in list(graph):
        layer = names.get(_weight_name(node))
        if layer in wanted:
            assert layer is not None
            builder.quantise(node, layers[layer])
            wanted.discard(layer)
    if wanted:
        raise VerificationError(
            f"has no product of its own for {', '.join(sorted(wanted))}",
            where="quantisation",
            fix="leave these layers out of the recipe, and report this",
        )


def _weight_name(node: ir.Node) -> str:
    """Name of the parameter that a node multiplies with; empty for other nodes."""
    if node.op_type not in ("MatMul", "Gemm") or node.inputs[1] is None:
        return ""
    weight = node.inputs[1].const_value
    if not isinstance(weight, WeightTensor) or len(weight.parts) > 1:
        return ""
    if node.op_type == "Gemm":
        return str(weight.name) if is_plain_product(node, node.inputs[1]) else ""
    return str(weight.name).removesuffix(".transposed") if weight.transposed else ""


class _Builder:
    """Makes nodes, and each quantised input once."""

    def __init__(self, graph: ir.Graph, precision: Precision) -> None:
        self._graph = graph
        self._precision = precision
        self._inputs: dict[Hashable, ir.Value] = {}
        self._before: ir.Node | None = None

    def quantise(self, node: ir.Node, how: LayerQuantization) -> None:
        """Put a quantised product in the place of `node`."""
        weight, x, old = node.inputs[1], node.inputs[0], node.outputs[0]
        assert weight is not None
        assert x is not None
        assert isinstance(weight.const_value, WeightTensor)
        self._before = node
        name = f"{str(weight.name).removesuffix('.transposed')}.transposed"
        source = weight.const_value.parts[0].source
        product = ir.node(
            "MatMul", [self._input(x, how), self._weight(name, source, how)], name=f"{node.name}"
        )
        value, label = product.outputs[0], old.name
        value.type, value.shape = old.type, old.shape
        self._graph.insert_before(node, product)
        ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
        self._graph.remove(node, safe=True)
        value.name = label
        if not weight.uses() and weight.name in self._graph.initializers:
            del self._graph.initializers[str(weight.name)]

    def _input(self, x: ir.Value, how: LayerQuantization) -> ir.Value:
        smooth = None if how.smooth is None else how.smooth.tobytes()
        key = (x, smooth, how.input_scale, how.format if how.input_scale is not None else None)
        if key not in self._inputs:
            self._inputs[key] = self._made_input(x, how, len(self._inputs))
        return self._inputs[key]

    def _made_input(self, x: ir.Value, how: LayerQuantization, number: int) -> ir.Value:
        label = f"{x.name}.q{number}"
        if how.smooth is not None:
            x = self._node("Mul", x, self._array(f"{label}.smooth", how.smooth), like=x)
        if how.input_scale is None:
            return x
        if how.format == "nvfp4":
            return self._nvfp4_input(x, how.input_scale, label)
        scale = self._array(f"{label}.scale", self._scale(np.float32(how.input_scale)))
        zero = self._constant(f"{label}.zero", ir.tensor(_zero(how.format)))
        quantised = self._node("QuantizeLinear", x, scale, zero, like=x, dtype=_TYPE[how.format])
        return self._node("DequantizeLinear", quantised, scale, zero, like=x)

    def _nvfp4_input(self, x: ir.Value, scale: float, label: str) -> ir.Value:
        """Blocks with scales that follow the data (TensorRT: TRT_FP4DynamicQuantize)."""
        whole = self._constant(f"{label}.scale", ir.tensor(np.float32(scale)))
        node = ir.node(
            "TRT_FP4DynamicQuantize",
            [x, whole],
            {"axis": -1, "block_size": NVFP4_BLOCK, "scale_type": int(ir.DataType.FLOAT8E4M3FN)},
            domain=TRT_DOMAIN,
            num_outputs=2,
        )
        self._graph.opset_imports[TRT_DOMAIN] = 1
        values, scales = node.outputs
        values.type, values.shape = ir.TensorType(ir.DataType.FLOAT4E2M1), x.shape
        scales.type = ir.TensorType(ir.DataType.FLOAT8E4M3FN)
        assert x.shape is not None
        last = x.shape[-1]
        assert isinstance(last, int)
        scales.shape = ir.Shape([*x.shape[:-1], last // NVFP4_BLOCK])
        assert self._before is not None
        self._graph.insert_before(self._before, node)
        both = self._node("DequantizeLinear", scales, whole, like=scales, dtype=ir.DataType.FLOAT)
        if x.dtype != ir.DataType.FLOAT:
            assert x.dtype is not None
            both = self._node("Cast", both, like=both, dtype=x.dtype, to=int(x.dtype))
        return self._node("DequantizeLinear", values, both, like=x, axis=-1, block_size=NVFP4_BLOCK)

    def _weight(self, name: str, source: Source, how: LayerQuantization) -> ir.Value:
        stored = QuantisedTensor(f"{name}.{how.format}", source, how, self._precision)
        value = self._initializer(stored)
        dtype = ir.DataType.from_numpy(np.dtype(_BASE_ARRAY[self._precision]))
        if how.format == "nvfp4":
            return self._nvfp4_weight(name, value, how, dtype)
        scales = self._array(f"{name}.scale", self._scale(how.weight_scale).T)
        attributes = {"axis": 1} if how.block is None else {"axis": 0, "block_size": how.block}
        return self._node("DequantizeLinear", value, scales, like=value, dtype=dtype, **attributes)

    def _nvfp4_weight(
        self, name: str, value: ir.Value, how: LayerQuantization, dtype: ir.DataType
    ) -> ir.Value:
        """Scales of blocks are fp8 themselves, with one scale of their own."""
        whole = float(how.weight_scale.max()) / NVFP4_SCALE_LARGEST
        codes = np.clip(how.weight_scale.T / whole, 0, LARGEST["fp8"])
        blocks = self._initializer(
            ArrayTensor(f"{name}.scale", ir.tensor(codes.astype(ml_dtypes.float8_e4m3fn)))
        )
        scale = self._constant(f"{name}.scale_of_scales", ir.tensor(np.float32(whole)))
        both = self._node("DequantizeLinear", blocks, scale, like=blocks, dtype=ir.DataType.FLOAT)
        if dtype != ir.DataType.FLOAT:
            both = self._node("Cast", both, like=both, dtype=dtype, to=int(dtype))
        return self._node(
            "DequantizeLinear", value, both, like=value, dtype=dtype, axis=0,
            block_size=NVFP4_BLOCK,
        )  # fmt: skip

    def _scale(self, scale: NDArray[np.float32] | np.float32) -> NDArray[np.float32]:
        rounded: NDArray[np.float32] = rounded_scale(torch.tensor(scale), self._precision).numpy()
        return rounded

    def _array(self, name: str, values: NDArray[np.float32]) -> ir.Value:
        """An initializer in the type of the graph."""
        array = np.ascontiguousarray(values).astype(_BASE_ARRAY[self._precision])
        array = array.reshape(values.shape)  # ascontiguousarray makes a vector of a scalar
        if array.size == 1:
            return self._constant(name, ir.tensor(array))
        return self._initializer(ArrayTensor(name, ir.tensor(array)))

    def _constant(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        tensor.name = name
        return self._initializer(tensor)

    def _initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        return add_initializer(self._graph, tensor)

    def _node(
        self,
        op_type: str,
        *inputs: ir.Value,
        like: ir.Value,
        dtype: ir.DataType | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """Add a node whose output has the shape of `like`, and its type unless one is given."""
        node = ir.node(op_type, inputs, attributes, num_outputs=1)
        value = node.outputs[0]
        value.shape = like.shape
        assert like.dtype is not None
        value.type = ir.TensorType(dtype or like.dtype)
        assert self._before is not None
        self._graph.insert_before(self._before, node)
        return value


def _zero(target: Format) -> NDArray[Any]:
    kind = np.int8 if target == "int8" else ml_dtypes.float8_e4m3fn
    return np.zeros((), kind)
