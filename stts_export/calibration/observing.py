"""Outputs of linear layers, a sample of their rows: of a PyTorch model and of a bundle's graphs.

A graph gives what its layers compute as further outputs, cut down to the sampled rows before they
leave it: all of them would take more memory than the model. Which rows are sampled follows from the
number of rows of each call, and both sides make the same calls (`LOWER_CHUNK`, `UPPER_CHUNK`,
`planner.group_frames`, one for a prompt), so they sample the same.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import Tensor

from stts_export.config import ModelConfig
from stts_export.engines import onnxruntime
from stts_export.errors import InputError, VerificationError
from stts_export.model.vlm import SttsModel
from stts_export.runtime.decoder import ObservedRunner, Runner
from stts_export.runtime.session import Session
from stts_export.tensors import (
    DECODER,
    SPLIT,
    VISION_LOWER,
    VISION_UPPER,
    VISION_UPPER_FRAMES,
    variant,
)

ROWS = 128
"""Rows of a call that are looked at, at most, and of a layer that are kept, at most."""

_HEAD = "language.lm_head"
_GRAPHS = {
    VISION_LOWER: VISION_LOWER,
    VISION_UPPER_FRAMES: VISION_UPPER_FRAMES,
    DECODER: variant(DECODER, SPLIT),
}
"""What a session on ONNX Runtime runs: name among its runners, and of the graph."""
_PREFIXES = {"vision": "tower", "language": "decoder"}
"""Of a module in the model, and in the graphs."""
_AFTER_WEIGHT = ("DequantizeLinear", "Transpose", "Reshape", "Cast", "Identity")
"""Operators that may lie between a weight and its product."""
_TO_THE_END = 2**63 - 1


def graph_of(layer: str, config: ModelConfig) -> str:
    """Name of the graph that computes a layer: vision_lower, vision_upper or decoder."""
    if not layer.startswith("vision."):
        return DECODER
    block = layer.split(".")[2]
    below = layer.startswith("vision.blocks.") and int(block) < config.vision.split_at
    return VISION_LOWER if below else VISION_UPPER


class Observations:
    """Rows of layers, in the order of the calls; thinned out evenly when they become too many."""

    def __init__(self) -> None:
        self._layers: dict[str, _Rows] = {}

    def add(self, layer: str, rows: NDArray[np.float32]) -> None:
        """Add the sampled rows (R, out) of a call."""
        self._layers.setdefault(layer, _Rows()).add(rows)

    def take(self) -> dict[str, NDArray[np.float32]]:
        """Return (R, out) by layer, R <= `ROWS`, and forget them."""
        taken = {layer: rows.array() for layer, rows in self._layers.items()}
        self._layers.clear()
        return taken


class _Rows:
    """Every n-th row of all, with n the smallest power of two at which they are few enough.

    So they depend on the rows alone, and not on how many come at a time.
    """

    def __init__(self) -> None:
        self._kept: list[NDArray[np.float32]] = []
        self._seen = 0
        self._step = 1

    def add(self, rows: NDArray[np.float32]) -> None:
        first = -self._seen % self._step
        self._kept.append(rows[first :: self._step].copy())  # no view: `rows` may be large
        self._seen += len(rows)
        while self._seen > ROWS * self._step:
            self._kept = [self.array()[::2].copy()]
            self._step *= 2

    def array(self) -> NDArray[np.float32]:
        return np.concatenate(self._kept)


@contextmanager
def observed(model: SttsModel, layers: Collection[str]) -> Iterator[Observations]:
    """Observe layers of a model while the block runs.

    Args:
        model: runs in PyTorch; its linear layers may be modules that stand in for them.
        layers: names of its modules.
    """
    observations = Observations()

    def hook(layer: str) -> Any:
        def add(_module: object, _inputs: object, output: Tensor) -> None:
            rows = output.detach().flatten(0, -2)
            sampled = rows[:: _step(len(rows))].float().cpu()
            observations.add(layer, sampled.numpy())

        return add

    modules = {layer: model.get_submodule(layer) for layer in layers}
    handles = [module.register_forward_hook(hook(layer)) for layer, module in modules.items()]
    try:
        yield observations
    finally:
        for handle in handles:
            handle.remove()


def _step(rows: int) -> int:
    """Every how manieth row of a call is looked at."""
    return max(1, -(-rows // ROWS))


@contextmanager
def tapped(
    session: Session, layers: Collection[str], threads: int | None = None
) -> Iterator[tuple[Session, Observations]]:
    """Open the graphs of a session again, with layers observed.

    Further outputs keep ONNX Runtime from fusing some operators, so the session given runs as its
    users have it, and stays as it is. Weights stay in their file and take no memory twice.

    Args:
        session: of a bundle, on ONNX Runtime.
        layers: names of modules of the model that the bundle was built from.
        threads: within an operator, as for `Session.open`.

    Yields:
        Another session, which computes the same on the CPU; and what it observes.

    Raises:
        InputError: the session runs on another back end, or the bundle's folder cannot be written
            to: a graph has to lie beside its weights.
        VerificationError: a graph does not have a layer.
    """
    if session.backend != onnxruntime.NAME:
        raise InputError(
            f"runs on {session.backend}, which shows no outputs of layers",
            where=str(session.bundle.folder),
            allowed=onnxruntime.NAME,
            fix=f"open it with --backend {onnxruntime.NAME}",
        )
    observations = Observations()
    runners: dict[str, Runner] = {}
    for name, graph in _GRAPHS.items():
        part = name.partition("-")[0]
        wanted = [layer for layer in layers if graph_of(layer, session.config) == part]
        taps, runner = _open_tapped(session.bundle.graph(graph), wanted, threads)
        runners[name] = _TappedRunner(runner, taps, observations)
    with Session(session.bundle, runners, session.prompts) as opened:
        yield opened, observations


class _TappedRunner(ObservedRunner):
    """Runs a graph and takes the rows of layers from its outputs.

    Args:
        runner: of the tapped graph.
        taps: layers by the name of the output that has their rows.
        observations: where to add them.
    """

    def __init__(self, runner: Runner, taps: Mapping[str, str], observations: Observations) -> None:
        super().__init__(runner)
        self._taps = taps
        self._observations = observations

    def __call__(
        self, inputs: dict[str, Any], in_place: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """See `decoder.Runner`."""
        outputs = self._runner(inputs, in_place)
        for output, layer in self._taps.items():
            self._observations.add(layer, outputs.pop(output))
        return outputs


def _open_tapped(
    file: Path, layers: Sequence[str], threads: int | None
) -> tuple[dict[str, str], Runner]:
    """Open a graph with layers' rows as further outputs; returns layers by output, and a runner."""
    model = ir.load(file)
    taps = tap_layers(model.graph, layers, str(file))
    try:
        # Beside the other, so that it finds its weights.
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=file.suffix) as copy:
            ir.save(model, copy.name)
            return taps, onnxruntime.open_graph(Path(copy.name), threads=threads, lean=True)
    except OSError as error:
        raise InputError(
            f"no graph can be written beside it: {error.strerror}",
            where=str(file),
            fix="make the folder writable, or copy the bundle to one that is",
        ) from None


def tap_layers(graph: ir.Graph, layers: Sequence[str], where: str) -> dict[str, str]:
    """Add outputs to a graph, f32 (R, out) with the sampled rows of layers.

    Args:
        graph: of a bundle, quantised or not; is changed.
        layers: names of modules of the model.
        where: name of the graph, for the message.

    Returns:
        Layers by the name of their output, in the order of `layers`.

    Raises:
        VerificationError: the graph does not have a layer.
    """
    products = {
        name: node
        for node in graph
        if node.op_type in ("MatMul", "Gemm") and (name := _weight_name(node.inputs[1]))
    }
    taps = {}
    for layer in layers:
        value = _output_of(graph, products, layer)
        if value is None:
            raise VerificationError(
                f"has no product with the weight of {layer}",
                where=where,
                fix="report this export, with the recipe",
            )
        taps[_add_sample(graph, value, layer)] = layer
    return taps


def _weight_name(value: ir.Value | None) -> str | None:
    """Name of the initializer that a value is made of; None where it is not."""
    while value is not None and not value.is_initializer():
        node = value.producer()
        if node is None or node.op_type not in _AFTER_WEIGHT:
            return None
        value = node.inputs[0]
    return None if value is None else value.name


def _output_of(graph: ir.Graph, products: Mapping[str, ir.Node], layer: str) -> ir.Value | None:
    """Find what a layer's module returns; None if it is not there."""
    if layer == _HEAD:
        # Its weight may be part of a table of another name, with the other columns cut off.
        return next((value for value in graph.outputs if value.name == "logits"), None)
    prefix, _, rest = layer.partition(".")
    weight = f"{_PREFIXES[prefix]}.{rest}.weight"
    node = next(
        (node for name, node in products.items() if f"{name}.".startswith(f"{weight}.")), None
    )
    if node is None:
        return None
    output = node.outputs[0]
    users = [use.node for use in output.uses()]
    if node.op_type == "MatMul" and len(users) == 1 and _adds_bias(users[0]):
        output = users[0].outputs[0]
    return output


def _adds_bias(node: ir.Node) -> bool:
    """Whether a node adds a bias; not always the layer's own, as equal vectors are stored once."""
    return node.op_type == "Add" and any(
        value is not None and value.is_initializer() and str(value.name).endswith(".bias")
        for value in node.inputs
    )


def _add_sample(graph: ir.Graph, value: ir.Value, layer: str) -> str:
    """Add an output with every n-th row of a value, as in `_step`; returns its name."""

    def op(op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        node = ir.node(op_type, inputs, attributes)
        node.outputs[0].name = f"sample.{layer}.{op_type}"
        graph.append(node)
        return node.outputs[0]

    rows = op("Flatten", value, axis=-1)
    count = op("Shape", rows, start=0, end=1)
    step = op("Div", op("Add", count, _integer(graph, ROWS - 1)), _integer(graph, ROWS))
    zero, end = _integer(graph, 0), _integer(graph, _TO_THE_END)
    sample = op("Cast", op("Slice", rows, zero, end, zero, step), to=ir.DataType.FLOAT)
    sample.type = ir.TensorType(ir.DataType.FLOAT)
    sample.shape = ir.Shape([f"rows of {layer}", f"width of {layer}"])
    graph.outputs.append(sample)
    return str(sample.name)


def _integer(graph: ir.Graph, number: int) -> ir.Value:
    """Return a constant (1,) int64 that all samples share."""
    name = f"sample.{number}"
    if name not in graph.initializers:
        tensor = ir.tensor([number], dtype=ir.DataType.INT64, name=name)
        value = ir.Value(
            name=name,
            type=ir.TensorType(ir.DataType.INT64),
            shape=ir.Shape([1]),
            const_value=tensor,
        )
        graph.register_initializer(value)
    return graph.initializers[name]
