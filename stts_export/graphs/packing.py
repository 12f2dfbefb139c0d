"""The graphs between lower and upper: they have no weights and are made, not traced."""

from __future__ import annotations

import onnx_ir as ir

from stts_export.config import VisionConfig
from stts_export.engines.plugin import PLUGIN_NAME, PLUGIN_NAMESPACE, PLUGIN_VERSION
from stts_export.graphs.rewrites import OPSET
from stts_export.tensors import (
    GATHER_WINDOWS,
    SELECT_PACK,
    GraphSpec,
    TensorSpec,
)

_IR_VERSION = 10  # of onnx 1.16, which TensorRT 10.3 reads


def packing_graph(spec: GraphSpec, vision: VisionConfig) -> ir.Model:
    """Make `select_pack` or `gather_windows`."""
    inputs = [_value(tensor) for tensor in spec.inputs]
    outputs = [_value(tensor) for tensor in spec.outputs]
    make = {SELECT_PACK: _select_pack, GATHER_WINDOWS: _gather_windows}[spec.name]
    nodes, constants = make(inputs, outputs, vision)
    opsets = {domain: 1 if domain else OPSET for domain in sorted({n.domain for n in nodes} | {""})}
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=nodes,
        initializers=constants,
        opset_imports=opsets,
        name=spec.name,
    )
    return ir.Model(graph, ir_version=_IR_VERSION, producer_name="stts-export")


def _value(tensor: TensorSpec) -> ir.Value:
    dtype = ir.DataType[tensor.dtype.upper().replace("FLOAT32", "FLOAT")]
    return ir.Value(name=tensor.name, type=ir.TensorType(dtype), shape=ir.Shape(tensor.shape))


_Made = tuple[list[ir.Node], list[ir.Value]]


def _select_pack(inputs: list[ir.Value], outputs: list[ir.Value], _: VisionConfig) -> _Made:
    """One node of the TensorRT plugin of `trt_plugins`; no other engine has the operator.

    It selects, packs and gathers as `planner.select`, `planner.pack` with refill, and
    `gather_windows` do, on the device:

    * Keep the `kept_count` windows of highest score, the first frame counted as 100; of equal
      scores the higher index is kept.
    * Place frames first-fit descending by kept windows in bins of W slots; a frame alone in its
      bin gets its other windows back.
    * `bins` holds rows of `hidden`, window by window, zeros in free slots; `segment` is the frame
      of a slot, -1 where free; `kept_slot` and `kept_window` say for every kept window, in
      ascending order, which slot of `bins` and which window of the clip it is; `bin_count` is the
      first axis of `bins`, which depends on the data (a size tensor of TensorRT).
    """
    node = ir.node(
        PLUGIN_NAME,
        inputs,
        {
            "refill": 1,
            "plugin_version": PLUGIN_VERSION,
            "plugin_namespace": PLUGIN_NAMESPACE,
            "tensorrt_plugin_shape_input_indices": [
                i for i, value in enumerate(inputs) if value.name == "kept_count"
            ],
        },
        domain=PLUGIN_NAMESPACE,
        outputs=outputs,
        name=SELECT_PACK,
    )
    return [node], []


def _gather_windows(inputs: list[ir.Value], outputs: list[ir.Value], vision: VisionConfig) -> _Made:
    """bins[b, s] = windows[gather_window[b, s]], a window being a row of (T*W, G*D)."""
    hidden, gather_window = inputs
    (bins,) = outputs
    G, D = vision.patches_per_window, vision.hidden_size
    flat = _shape_constant("flat", [-1, G * D])
    packed = _shape_constant("packed", [-1, vision.windows * G, D])
    windows = ir.node("Reshape", [hidden, flat])
    rows = ir.node("Gather", [windows.outputs[0], gather_window], {"axis": 0})
    last = ir.node("Reshape", [rows.outputs[0], packed], outputs=[bins])
    return [windows, rows, last], [flat, packed]


def _shape_constant(name: str, shape: list[int]) -> ir.Value:
    tensor = ir.tensor(shape, dtype=ir.DataType.INT64, name=name)
    return ir.Value(
        name=name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape([len(shape)]),
        const_value=tensor,
    )
