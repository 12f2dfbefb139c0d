"""Trace a model into the graphs of `tensors`, and prove each graph right after it is written."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from stts_export.calibration.layers import Numerics
from stts_export.checkpoint.streamed import sources
from stts_export.errors import VerificationError
from stts_export.graphs.cache import quantise_cache
from stts_export.graphs.check import check_graph
from stts_export.graphs.modules import module_for
from stts_export.graphs.packing import packing_graph
from stts_export.graphs.quantization import quantise_graph
from stts_export.graphs.rewrites import decompose
from stts_export.graphs.split import split_queries
from stts_export.graphs.weights import (
    OnTensor,
    name_weights,
    refer_to_weights,
    share_tables,
    without_memory,
    write_weights,
)
from stts_export.model.vlm import SttsModel
from stts_export.tensors import (
    DATA_FILE,
    DECODER,
    DECOMPOSED,
    GATHER_WINDOWS,
    SELECT_PACK,
    SPLIT,
    VISION_UPPER_FRAMES,
    GraphSpec,
    TensorSpec,
    graph_file,
    graph_specs,
)

_OPSET = 23
_OPSET_CACHE = 24  # TensorScatter
# Any sizes that differ from each other and from 1, so that no axis is taken for a constant.
_TRACE_SIZES = {"frames": 2, "bins": 2, "slots": 4, "tokens": 6, "rows": 3, "capacity": 11}


def export_graph(
    model: SttsModel,
    graph: str,
    numerics: Numerics,
    folder: Path,
    on_tensor: OnTensor | None = None,
) -> Path:
    """Write a graph and compare it with PyTorch.

    Weights go to external data; those of a variant are the graph's that it varies, which must have
    been written to `folder` before. `select_pack` and `gather_windows` have none.

    Args:
        model: fp32, in evaluation mode; its weights may be on disk (`streamed_model`).
        graph: a name of `graph_specs`.
        numerics: types of weights and activations; what is compared rounds as the graph does.
        folder: the `onnx` folder of a bundle.
        on_tensor: called while weights are written; not called for variants, which have none.

    Returns:
        The file that was written.

    Raises:
        VerificationError: the graph's interface or its results differ from the model's, or it has
            no form that its targets can run.
    """
    spec = graph_specs(model.config, numerics.precision, numerics.kv_cache)[graph]
    file = folder / graph_file(graph)
    file.parent.mkdir(parents=True, exist_ok=True)
    _write(model, spec, numerics, file, on_tensor)
    onnx.checker.check_model(file, full_check=True)
    check_graph(spec, numerics, file, model)
    return file


def _write(
    model: SttsModel,
    spec: GraphSpec,
    numerics: Numerics,
    file: Path,
    on_tensor: OnTensor | None,
) -> None:
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
    if variant == SPLIT:
        split = ir.load(original)
        split_queries(split, model.config)
        ir.save(split, file)
        return
    traced = _traced(model, spec, numerics)
    if file == original:
        write_weights(traced.graph, file.with_name(DATA_FILE), on_tensor)
    else:
        refer_to_weights(traced.graph, ir.load(original).graph)
    ir.save(traced, file)


def _traced(model: SttsModel, spec: GraphSpec, numerics: Numerics) -> ir.Model:
    """Trace a graph without touching a weight; its weights are `WrittenTensor`s."""
    with torch.device("meta"):
        outline = SttsModel(model.config).eval()
    names = {id(parameter): name for name, parameter in outline.named_parameters()}
    values = sources(model)
    parameters = {
        name: names[id(p)] for name, p in module_for(spec.name, outline).named_parameters()
    }
    module = module_for(spec.name, outline, numerics.precision, numerics.fp32_layers)
    program = _trace(without_memory(module), spec, model.config.vision.patches_per_window)
    graph = program.model.graph
    name_weights(graph, module, {name: values[ours] for name, ours in parameters.items()})
    program.optimize()
    products = {name: ours.removesuffix(".weight") for name, ours in parameters.items()}
    quantise_graph(graph, products, numerics.layers, numerics.precision)
    if spec.name == DECODER and numerics.cache is not None:
        quantise_cache(graph, numerics.cache, numerics.precision)
    share_tables(graph)
    _name_axes(graph, spec)
    _drop_metadata(graph)
    return program.model


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
        dynamic = (*shapes[:5], shapes[5:])  # *cache is one argument
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
            optimize=False,  # that is done when the weights have their names
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
