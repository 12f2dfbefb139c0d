"""Why TensorRT would not build an engine, in its words: those of TensorRT for RTX 1.7."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx

from tests.standins.plan import TensorInfo, volume

_USAGE = "Error Code 4: API Usage Error"


def refusals(network: Any, config: Any) -> Iterator[str]:
    """Everything that would stop a build; a network that is not strongly typed is misuse."""
    if network.model is None:
        yield f"{_USAGE} (Network must have at least one output.)"
    if not network.is_strongly_typed:
        raise network.state.cuda.misuse(
            "the network is not strongly typed: before TensorRT 11,"
            " create_network(1 << int(NetworkDefinitionCreationFlag.STRONGLY_TYPED))"
        )
    weak = [name for name in ("FP16", "BF16", "INT8", "FP8") if _has_flag(config, name)]
    if weak:
        yield f"{_USAGE} (Precision flags {weak} are not allowed in a strongly typed network.)"
    inputs = [tensor._info for tensor in network.inputs]
    free = [tensor for tensor in inputs if -1 in tensor.runtime_shape or tensor.is_shape]
    if free and not config.profiles:
        yield (
            f"{_USAGE} (Network has dynamic or shape inputs, but no optimization profile has"
            " been defined.)"
        )
    for index, profile in enumerate(config.profiles):
        for tensor in inputs:
            yield from _of_shape(index, profile.shapes.get(tensor.name), tensor)
            yield from _of_values(index, profile.values.get(tensor.name), tensor)
    yield from _of_memory(network, config)
    yield from _of_attention(network)
    if network.state.fail_build is not None:
        yield network.state.fail_build


def _has_flag(config: Any, name: str) -> bool:
    flag = config.state.module.BuilderFlag.__members__.get(name)
    return flag is not None and bool(config.get_flag(flag))


def _of_shape(index: int, given: Any, tensor: TensorInfo) -> Iterator[str]:
    shape = tensor.runtime_shape
    if given is None:
        if -1 in shape:
            yield (
                f"{_USAGE} (Dynamic input tensor {tensor.name} is missing dimensions in profile"
                f" {index}.)"
            )
        return
    if len(given[0]) != len(shape):
        yield (
            f"{_USAGE} (Dynamic-shaped input tensor {tensor.name} has {len(shape)} dimensions but"
            f" profile {index} has {len(given[0])} dimensions.)"
        )
        return
    for axis, side in enumerate(shape):
        low, opt, high = (sides[axis] for sides in given)
        if side != -1 and {low, opt, high} != {side}:
            yield (
                f"{_USAGE} (Dimension mismatch for tensor {tensor.name} and profile {index}. At"
                f" dimension axis {axis}, profile has min={low}, opt={opt}, max={high} but tensor"
                f" has {side}.)"
            )


def _of_values(index: int, values: Any, tensor: TensorInfo) -> Iterator[str]:
    if not tensor.is_shape:
        if values is not None:
            yield f"{_USAGE} ({tensor.name} has values in profile {index}, is no shape tensor.)"
        return
    if values is None:
        yield (
            f"{_USAGE} (Optimization profile {index} is missing values for shape input tensor"
            f" {tensor.name}.)"
        )
    elif -1 not in tensor.runtime_shape and len(values[0]) != volume(tensor.runtime_shape):
        yield (
            f"{_USAGE} (Shape input tensor {tensor.name} has {volume(tensor.runtime_shape)} values"
            f" but profile {index} has {len(values[0])}.)"
        )


def _of_memory(network: Any, config: Any) -> Iterator[str]:
    state = network.state
    limit = config.get_memory_pool_limit(state.member("MemoryPoolType", "WORKSPACE"))
    if limit < min(state.build_bytes, state.cuda.total_memory):
        yield (
            "Error Code 10: Internal Error (Could not find any implementation for node"
            f" {{ForeignNode[{network.layers[0].name}...]}} due to insufficient workspace. See"
            f" verbose log for requested sizes: {state.build_bytes} > workspace limit {limit})"
        )
    if not state.is_rtx and state.cuda.total_memory - state.cuda.live_bytes < state.build_bytes:
        yield (
            "Error Code 2: OutOfMemory (Requested amount of GPU memory"
            f" ({state.build_bytes} bytes) could not be allocated.)"
        )


def _of_attention(network: Any) -> Iterator[str]:
    for layer in network.layers:
        elem_type = getattr(layer, "elem_type", None)
        if elem_type == onnx.TensorProto.FLOAT and not layer.attention.decomposable:
            yield (
                "Error Code 1: Myelin ([myelin_graph.h:1295: attachExceptionMsgToGraph]"
                " MyelinCheckException: decompose_composite_ops.cpp:59:"
                " CHECK(composite_op->is_decomposable()) failed. Attention operation was not"
                " supported by a dedicated kernel.)"
            )
