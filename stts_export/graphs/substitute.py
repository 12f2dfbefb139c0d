"""What ONNX Runtime runs in place of a graph that it has no kernels for, so that all are checked.

bf16 becomes fp32, whose products round less; 4-bit floats become the numbers that they stand for;
and inputs that TensorRT would round to 4 bits stay as they are. What is checked is everything that
can be wrong in the file: weights, scales, and which goes where.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from stts_export.calibration.layers import NVFP4_BLOCK
from stts_export.graphs.quantization import TRT_DOMAIN
from stts_export.graphs.weights import add_initializer

_BF16, _FP4, _FP32 = ir.DataType.BFLOAT16, ir.DataType.FLOAT4E2M1, ir.DataType.FLOAT


def substitute(model: ir.Model) -> bool:
    """Rewrite a model in place where ONNX Runtime could not run it.

    Returns:
        Whether anything was rewritten.
    """
    graph = model.graph
    fp4 = [node for node in graph if node.op_type == "DequantizeLinear" and _takes_fp4(node)]
    for node in fp4:
        x = node.inputs[0]
        assert x is not None
        source = x.producer()
        if source is None:
            _replace(graph, node, _constant(graph, node, _weight(node)))
        else:
            given = source.inputs[0]
            assert given is not None
            _replace(graph, node, given)
    values = [
        *graph.initializers.values(),
        *(v for node in graph.all_nodes() for v in node.outputs),
    ]
    wide = [value for value in values if value.dtype == _BF16]
    for value in wide:
        value.dtype = _FP32
        if value.const_value is not None:
            array = value.const_value.numpy().astype(np.float32)
            value.const_value = ir.tensor(array, name=value.name)
    for node in graph.all_nodes():
        if node.op_type == "Cast" and node.attributes["to"].as_int() == _BF16:
            node.attributes["to"] = ir.AttrInt64("to", int(_FP32))
    if not (fp4 or wide):
        return False
    RemoveUnusedNodesPass()(model)
    model.opset_imports.pop(TRT_DOMAIN, None)
    return True


def _takes_fp4(node: ir.Node) -> bool:
    return node.inputs[0] is not None and node.inputs[0].dtype == _FP4


def _weight(node: ir.Node) -> NDArray[Any]:
    """(m, n): 4-bit values times the scales of their blocks along the first axis."""
    values, scales = node.inputs[0], node.inputs[1]
    assert values is not None
    assert values.const_value is not None
    spread = np.repeat(_scales(scales), NVFP4_BLOCK, axis=0)
    return values.const_value.numpy().astype(np.float32) * spread


def _scales(value: ir.Value | None) -> NDArray[np.float32]:
    """Scales of blocks, which DequantizeLinear makes of fp8 and their own scale."""
    assert value is not None
    node = value.producer()
    while node is not None and node.op_type == "Cast":
        value = node.inputs[0]
        assert value is not None
        node = value.producer()
    assert node is not None
    stored, whole = (one.const_value.numpy() for one in node.inputs if one and one.const_value)
    scales: NDArray[np.float32] = stored.astype(np.float32) * whole
    return scales


def _constant(graph: ir.Graph, node: ir.Node, array: NDArray[Any]) -> ir.Value:
    output = node.outputs[0]
    assert output.dtype is not None
    name = f"{output.name}.value"
    kind = np.float32 if output.dtype == _BF16 else output.dtype.numpy()
    return add_initializer(graph, ir.tensor(array.astype(kind), name=name))


def _replace(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    ir.convenience.replace_all_uses_with(node.outputs[0], value)
    graph.remove(node, safe=True)
