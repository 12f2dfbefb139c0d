"""Trace a model into the graphs of `tensors`, and prove each graph right after it is written."""

from __future__ import annotations

import hashlib
import logging
import warnings
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from stts_export.errors import VerificationError
from stts_export.graphs.check import check_graph
from stts_export.graphs.modules import at_precision, module_for
from stts_export.graphs.packing import packing_graph
from stts_export.graphs.rewrites import decompose
from stts_export.model.vlm import SttsModel
from stts_export.tensors import (
    DECODER,
    DECOMPOSED,
    GATHER_WINDOWS,
    SELECT_PACK,
    VISION_UPPER_FRAMES,
    GraphSpec,
    Precision,
    TensorSpec,
    graph_file,
    graph_specs,
)

_OPSET = 23
_OPSET_CACHE = 24  # TensorScatter
# Any sizes that differ from each other and from 1, so that no axis is taken for a constant.
_TRACE_SIZES = {"frames": 2, "bins": 2, "slots": 4, "tokens": 6, "rows": 3, "capacity": 11}


def export_graph(model: SttsModel, graph: str, precision: Precision, folder: Path) -> Path:
    """Write a graph and compare it with PyTorch.

    Weights go to external data; those of a variant are the graph's that it varies, which must have
    been written to `folder` before. `select_pack` and `gather_windows` have none.

    Args:
        model: fp32, in evaluation mode.
        graph: a name of `graph_specs`.
        precision: type of weights and activations.
        folder: the `onnx` folder of a bundle.

    Returns:
        The file that was written.

    Raises:
        VerificationError: the graph's interface or its results differ from the model's, or it has
            no form that its targets can run.
    """
    spec = graph_specs(model.config, precision)[graph]
    file = folder / graph_file(graph)
    file.parent.mkdir(parents=True, exist_ok=True)
    _write(model, spec, precision, file)
    onnx.checker.check_model(file, full_check=True)
    check_graph(spec, precision, file, model)
    return file


def _write(model: SttsModel, spec: GraphSpec, precision: Precision, file: Path) -> None:
    graph, _, variant = spec.name.partition("-")
    original = file.with_name("model.onnx")
    if graph in (SELECT_PACK, GATHER_WINDOWS):
        ir.save(packing_graph(spec, model.config.vision), file)
        return
    if variant == DECOMPOSED:
        decomposed = ir.load(original)
        decompose(decomposed, graph, model.config)
        ir.save(decomposed, file)
        return
    module = at_precision(module_for(spec.name, model), precision)
    program = _trace(module, spec, model.config.vision.patches_per_window)
    _name_axes(program.model.graph, spec)
    _drop_metadata(program.model.graph)
    if file == original:
        program.save(file, external_data=True)
    else:
        _refer_to_weights(program.model.graph, original)
        ir.save(program.model, file)


def _refer_to_weights(graph: ir.Graph, original: Path) -> None:
    """Replace initializers by references to equal ones in the data file of `original`."""
    stored = {
        _content(value.const_value): value.const_value
        for value in ir.load(original).graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    for value in graph.initializers.values():
        value.const_value = stored.get(_content(value.const_value), value.const_value)


def _content(tensor: ir.TensorProtocol | None) -> tuple[object, ...]:
    assert tensor is not None
    digest = hashlib.sha256(tensor.numpy().tobytes()).digest()
    return tensor.dtype, tuple(tensor.shape), digest


def _trace(module: nn.Module, spec: GraphSpec, patches_per_window: int) -> Any:
    arguments = tuple(_example(tensor, patches_per_window) for tensor in spec.inputs)
    axes = {
        name: torch.export.Dim(name)
        for tensor in spec.inputs
        for name in tensor.shape
        if isinstance(name, str) and name != "patches"
    }
    if spec.name == VISION_UPPER_FRAMES:
        axes["patches"] = patches_per_window * torch.export.Dim("slots")
    shapes = tuple(
        {i: axes[axis] for i, axis in enumerate(tensor.shape) if isinstance(axis, str)}
        for tensor in spec.inputs
    )
    dynamic: Any = shapes
    if spec.name == DECODER:
        dynamic = (*shapes[:4], shapes[4:])  # *cache is one argument
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    # With gradients, attention is traced as a kernel whose output has other strides.
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the exporter's own internals
        return torch.onnx.export(
            module,
            arguments,
            dynamo=True,
            opset_version=_OPSET_CACHE if spec.name == DECODER else _OPSET,
            dynamic_shapes=dynamic,
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[tensor.name for tensor in spec.outputs],
            verbose=False,
        )


def _example(tensor: TensorSpec, patches_per_window: int) -> Tensor:
    sizes = {**_TRACE_SIZES, "patches": _TRACE_SIZES["slots"] * patches_per_window}
    shape = [axis if isinstance(axis, int) else sizes[axis] for axis in tensor.shape]
    return torch.zeros(shape, dtype=getattr(torch, tensor.dtype))


def _name_axes(graph: Any, spec: GraphSpec) -> None:
    """Give inputs and outputs the contract's axis names; refuse another interface."""
    for values, tensors in ((graph.inputs, spec.inputs), (graph.outputs, spec.outputs)):
        if [value.name for value in values] != [tensor.name for tensor in tensors]:
            raise VerificationError(
                f"has {[value.name for value in values]}",
                where=f"export of {spec.name}",
                allowed=f"{[tensor.name for tensor in tensors]}",
            )
        for value, tensor in zip(values, tensors, strict=True):
            dtype = ir.DataType[tensor.dtype.upper().replace("FLOAT32", "FLOAT")]
            if value.dtype != dtype or len(value.shape) != len(tensor.shape):
                raise VerificationError(
                    f"{tensor.name} is {value.dtype} {value.shape}",
                    where=f"export of {spec.name}",
                    allowed=f"{tensor.dtype} {tensor.shape}",
                )
            value.shape = ir.Shape(tensor.shape)


def _drop_metadata(graph: Any) -> None:
    """Remove the exporter's stack traces: they name this machine's paths and cost megabytes."""
    graph.metadata_props.clear()
    for node in graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
