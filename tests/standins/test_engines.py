"""Engines run, and what a device would not forgive is noticed."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stts_export.runtime import planner
from tests.standins.conftest import make, misuse
from tests.standins.cuda import CudaStandin
from tests.standins.fixtures import (
    plugin_library,
)
from tests.standins.scenarios import (
    RANGE,
    RELU,
    SELECT_PACK,
    scatter,
    serialized,
    three,
)


class Bench:
    """A context of a small engine, with memory for its tensors."""

    def __init__(self, trt: Any, graph: bytes, *profiles: Any, **options: Any) -> None:
        self.trt = trt
        self.cuda: CudaStandin = trt.standin.cuda
        self.runtime = trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR))
        plan = serialized(trt, graph, *profiles, **options)
        self.engine = self.runtime.deserialize_cuda_engine(plan)
        self.context = self.engine.create_execution_context()

    def memory(self, name: str, size: int) -> int:
        """Fresh device memory bound to a tensor."""
        address = self.cuda.allocate(size)
        assert self.context.set_tensor_address(name, address)
        return address

    def put(self, name: str, array: Any) -> int:
        """Set shape, address and contents of an input."""
        address = self.memory(name, array.nbytes)
        assert self.context.set_input_shape(name, array.shape)
        self.cuda.cudaMemcpy(
            address, array, array.nbytes, self.cuda.enums["cudaMemcpyKind"].cudaMemcpyHostToDevice
        )
        return address

    def get(self, address: int, shape: tuple[int, ...], dtype: Any) -> Any:
        """Contents of device memory, now."""
        array = np.empty(shape, dtype)
        kind = self.cuda.enums["cudaMemcpyKind"].cudaMemcpyDeviceToHost
        self.cuda.cudaMemcpy(array, address, array.nbytes, kind)
        return array


@pytest.fixture
def relu(trt: Any) -> Bench:
    return Bench(trt, RELU, three((1, 3), (2, 3), (4, 3)), three((8, 3), (8, 3), (8, 3)))


X = np.array([[-1, 2, -3], [4, -5, 6]], np.float32)


def test_an_engine_runs(relu: Bench):
    relu.put("x", X)
    out = relu.memory("y", 24)
    assert relu.context.get_tensor_shape("y") == (2, 3)
    assert relu.context.execute_async_v3(0)
    np.testing.assert_array_equal(relu.get(out, (2, 3), np.float32), np.maximum(X, 0))
    assert relu.trt.standin.executions == ["Unnamed Network 0"]


def test_a_run_happens_when_something_waits_for_it(relu: Bench):
    stream = relu.cuda.cudaStreamCreate()
    relu.put("x", X)
    out = relu.memory("y", 24)
    assert relu.context.execute_async_v3(int(stream))
    assert relu.trt.standin.executions == []
    relu.cuda.cudaStreamSynchronize(stream)
    assert relu.trt.standin.executions == ["Unnamed Network 0"]
    assert relu.get(out, (2, 3), np.float32)[0, 1] == 2


def test_an_engine_tells_what_it_takes(relu: Bench):
    engine, trt = relu.engine, relu.trt
    assert [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)] == ["x", "y"]
    assert engine.get_tensor_mode("x") == trt.TensorIOMode.INPUT
    assert engine.get_tensor_mode("y") == trt.TensorIOMode.OUTPUT
    assert engine.get_tensor_mode("z") == trt.TensorIOMode.NONE
    assert engine.get_tensor_dtype("x") == trt.float32
    assert engine.get_tensor_shape("x") == (-1, 3)
    assert engine.num_optimization_profiles == 2
    assert engine.get_tensor_profile_shape("x", 1) == [(8, 3)] * 3
    assert engine.get_tensor_profile_shape("x", 2) == []
    assert not engine.is_shape_inference_io("x")
    assert engine.get_tensor_location("x") == trt.TensorLocation.DEVICE


def test_shapes_are_held_against_the_active_profile(relu: Bench):
    context = relu.context
    assert context.set_input_shape("x", (4, 3))
    assert context.set_input_shape("x", [1, 3])
    for wrong in ((5, 3), (0, 3), (2, 4), (2,), (2, 3, 1)):
        assert not context.set_input_shape("x", wrong)
    assert "Valid range for profile 0: [1, 3]..[4, 3]" in relu.trt.standin.messages[-1][1]
    assert not context.set_input_shape("y", (2, 3))
    assert not context.set_input_shape("z", (2, 3))
    assert context.set_optimization_profile_async(1, 0)
    assert not context.all_binding_shapes_specified
    assert not context.set_input_shape("x", (4, 3))
    assert context.set_input_shape("x", (8, 3))
    with pytest.raises(RuntimeError, match="Error in set optimization profile async"):
        context.set_optimization_profile_async(2, 0)
    assert "profile 2 does not exist" in relu.trt.standin.messages[-1][1]


def test_a_run_needs_shapes_and_addresses(relu: Bench):
    assert not relu.context.execute_async_v3(0)
    assert relu.context.infer_shapes() == ["x"]
    relu.put("x", X)
    assert not relu.context.execute_async_v3(0)
    assert "Address is not set for output y" in relu.trt.standin.messages[-1][1]
    relu.memory("y", 24)
    assert relu.context.execute_async_v3(0)


def test_addresses_are_checked(relu: Bench):
    cuda, context = relu.cuda, relu.context
    address = relu.put("x", X)
    assert not context.set_tensor_address("x", address + 4)
    assert "not aligned" in relu.trt.standin.messages[-1][1]
    assert not context.set_tensor_address("z", address)
    host = np.zeros(1024, np.float32)
    aligned = -(-host.ctypes.data // 256) * 256
    misuse(cuda, "no live device memory", lambda: context.set_tensor_address("x", aligned))
    with pytest.raises(TypeError):
        context.set_tensor_address("x", host)


def test_an_overrun_is_noticed(relu: Bench):
    relu.put("x", X)
    relu.memory("y", 20)
    misuse(relu.cuda, "overrun an allocation of 20 bytes by 4",
           lambda: relu.context.execute_async_v3(0))  # fmt: skip
    relu.memory("y", 24)
    relu.memory("x", 12)
    misuse(relu.cuda, "overrun", lambda: relu.context.execute_async_v3(0))


def test_freed_memory_is_noticed(relu: Bench):
    relu.put("x", X)
    relu.cuda.release(relu.memory("y", 24))
    misuse(relu.cuda, "no live device memory", lambda: relu.context.execute_async_v3(0))
    stream = relu.cuda.cudaStreamCreate()
    out = relu.memory("y", 24)
    assert relu.context.execute_async_v3(int(stream))
    relu.cuda.release(out)  # past the stream's order, as no CUDA call would
    misuse(relu.cuda, "when it ran", lambda: relu.cuda.cudaStreamSynchronize(stream))


def test_an_output_may_not_overlap_an_input(relu: Bench):
    relu.context.set_tensor_address("y", relu.put("x", X))
    misuse(relu.cuda, "output y overlaps x", lambda: relu.context.execute_async_v3(0))


def test_a_context_may_live_in_memory_of_the_caller(trt: Any):
    bench = Bench(trt, RELU, three((1, 3), (2, 3), (4, 3)))
    strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    bench.context = bench.engine.create_execution_context(strategy)
    bench.put("x", X)
    bench.memory("y", 24)
    assert not bench.context.execute_async_v3(0)
    assert "device memory was not set" in trt.standin.messages[-1][1]
    size = bench.engine.device_memory_size_v2
    scratch = bench.cuda.allocate(size)
    bench.context.set_device_memory(scratch, size)
    assert bench.context.execute_async_v3(0)
    bench.cuda.cudaDeviceSynchronize()
    misuse(bench.cuda, "overrun", lambda: bench.context.set_device_memory(scratch, size + 1))


def test_engines_free_what_they_hold(trt: Any):
    cuda = trt.standin.cuda
    gc.disable()
    try:
        bench = Bench(trt, RELU, three((1, 3), (2, 3), (4, 3)))
        engine, context = bench.engine, bench.context
        assert cuda.live_bytes > trt.standin.context_bytes
        del bench, engine
        assert cuda.live_bytes > 0  # the context keeps its engine
        del context
        cuda.assert_clean()
    finally:
        gc.enable()


def test_a_context_must_not_go_while_it_runs(relu: Bench):
    stream = relu.cuda.cudaStreamCreate()
    relu.put("x", X)
    relu.memory("y", 24)
    assert relu.context.execute_async_v3(int(stream))
    relu.context = None
    assert "destroyed while it ran" in relu.cuda.violations.pop()
    relu.cuda.cudaStreamSynchronize(stream)


@pytest.mark.parametrize("damage", ["garbage", "truncated", "flipped"])
def test_damaged_engines_are_refused(trt: Any, damage: str):
    plan = bytes(serialized(trt, RELU, three((1, 3), (1, 3), (1, 3))))
    data = {"garbage": b"x" * 900, "truncated": plan[:-9], "flipped": plan[:-1] + b"?"}[damage]
    assert trt.Runtime(trt.Logger()).deserialize_cuda_engine(data) is None
    assert "Serialization" in trt.standin.messages[-1][1]


def test_engines_belong_to_a_version_and_a_device():
    plan = serialized(make("10.3"), RELU, three((1, 3), (1, 3), (1, 3)))
    for version, sm, words in (
        ("10.16", (8, 7), "Version tag does not match"),
        ("rtx", (8, 7), "Version tag does not match"),
        ("10.3", (8, 9), "expecting compute sm89 got compute sm87"),
    ):
        trt = make(version, CudaStandin(compute_capability=sm))
        assert trt.Runtime(trt.Logger()).deserialize_cuda_engine(plan) is None
        assert words in trt.standin.messages[-1][1]


def test_memory_of_the_device_can_be_too_small():
    plan = serialized(make("10.3"), RELU, three((1, 3), (1, 3), (1, 3)))
    trt = make("10.3", CudaStandin(total_memory=16))
    assert trt.Runtime(trt.Logger()).deserialize_cuda_engine(plan) is None
    assert "OutOfMemory" in trt.standin.messages[-1][1]
    trt = make("10.3", CudaStandin(total_memory=1 << 12))
    engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine(plan)
    assert engine.create_execution_context() is None
    assert "OutOfMemory" in trt.standin.messages[-1][1]


def test_cached_keys_are_updated_in_place():
    new = {"new": ((1, 2, 1, 8), (1, 2, 1, 8), (1, 2, 4, 8))}
    for version in ("10.16", "11.4", "rtx"):
        bench = Bench(make(version), scatter(16), new)
        assert bench.engine.get_aliased_input_tensor("present") == "past"
        cache = bench.put("past", np.zeros((1, 2, 16, 8), np.float32))
        bench.put("new", np.ones((1, 2, 2, 8), np.float32))
        bench.put("at", np.array([3]))
        bench.memory("present", 1024)
        assert not bench.context.execute_async_v3(0)
        assert "must have the same address" in bench.trt.standin.messages[-1][1]
        assert bench.context.set_tensor_address("present", cache)
        assert bench.context.execute_async_v3(0)
        rows = bench.get(cache, (1, 2, 16, 8), np.float32)[0, 0, :, 0]
        np.testing.assert_array_equal(np.flatnonzero(rows), [3, 4])


def test_shape_tensors_lie_on_the_host(trt: Any):
    bench = Bench(trt, RANGE, {}, values={"k": ([1], [2], [4])})
    engine, context = bench.engine, bench.context
    assert engine.is_shape_inference_io("k")
    assert engine.get_tensor_location("k") == trt.TensorLocation.HOST
    assert engine.get_tensor_profile_values(0, "k") == [[1], [2], [4]]
    with pytest.raises(TypeError):  # the bindings name the arguments the wrong way round
        engine.get_tensor_profile_values("k", 0)
    with pytest.raises(RuntimeError):
        engine.get_tensor_profile_values(0, "y")
    device = bench.cuda.allocate(8)
    misuse(bench.cuda, "shape tensor", lambda: context.set_tensor_address("k", device))
    assert context.infer_shapes() == ["k"]
    value = np.array(3)
    assert context.set_tensor_address("k", value.ctypes.data)
    assert context.infer_shapes() == []
    bench.memory("y", 64)
    value[...] = 5
    assert not context.execute_async_v3(0)
    assert "do not satisfy profile 0: [1]..[4]" in trt.standin.messages[-1][1]


class Grower:
    """Makes an IOutputAllocator."""

    def __init__(self, cuda: CudaStandin) -> None:
        self.cuda = cuda
        self.address = 0
        self.shape: tuple[int, ...] = ()

    def allocator(self, trt: Any) -> Any:
        owner = self

        class Allocator(trt.IOutputAllocator):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()

            def reallocate_output_async(
                self, tensor_name: str, memory: int, size: int, alignment: int, stream: int
            ) -> int:
                owner.address = owner.cuda.allocate(size)
                return owner.address

            def notify_shape(self, tensor_name: str, shape: Any) -> None:
                owner.shape = tuple(shape)

        return Allocator()


def test_an_output_allocator_learns_the_size(trt: Any):
    bench = Bench(trt, RANGE, {}, values={"k": ([1], [2], [4])})
    value = np.array(3)
    assert bench.context.set_tensor_address("k", value.ctypes.data)
    assert bench.context.get_tensor_shape("y") == (-1,)
    grower = Grower(bench.cuda)
    assert bench.context.set_output_allocator("y", grower.allocator(trt))
    assert bench.context.execute_async_v3(0)
    assert grower.shape == (3,)
    np.testing.assert_array_equal(bench.get(grower.address, (3,), np.int64), [0, 2, 4])


@pytest.mark.parametrize("refill", [1, 0])
def test_select_pack_runs_the_plugin(tmp_path: Path, refill: int):
    trt = make("10.3")
    trt.get_plugin_registry().load_library(str(plugin_library(tmp_path)))
    ranges = {
        "scores": ((1, 6), (2, 6), (9, 6)), "hidden": ((1, 12, 4), (2, 12, 4), (9, 12, 4)),
    }  # fmt: skip
    graph = SELECT_PACK if refill else SELECT_PACK.replace(b"refill\x18\x01", b"refill\x18\x00")
    bench = Bench(trt, graph, ranges, values={"kept_count": ([1], [6], [54])})
    rng = np.random.default_rng(0)
    scores = rng.random((9, 6), np.float32)
    hidden = rng.random((9, 12, 4), np.float32)
    bench.put("scores", scores)
    bench.put("hidden", hidden)
    kept = np.array([20])
    assert bench.context.set_tensor_address("kept_count", kept.ctypes.data)
    assert bench.context.get_tensor_shape("bins") == (-1, 12, 4)
    assert bench.context.get_tensor_shape("kept_slot") == (20,)
    assert bench.context.get_tensor_shape("bin_count") == ()
    sizes = {
        "bins": bench.context.get_max_output_size("bins"),
        "segment": bench.context.get_max_output_size("segment"),
        "kept_slot": 80, "kept_window": 80, "bin_count": 4,
    }  # fmt: skip
    out = {name: bench.memory(name, size) for name, size in sizes.items()}
    assert bench.context.execute_async_v3(0)
    keep = planner.select(scores, 34)
    plan = planner.pack(keep, refill=bool(refill))
    count = int(bench.get(out["bin_count"], (), np.int32))
    assert count == len(plan.segment)
    np.testing.assert_array_equal(bench.get(out["segment"], (count, 6), np.int32), plan.segment)
    np.testing.assert_array_equal(bench.get(out["kept_slot"], (20,), np.int32), plan.kept_slot)
    np.testing.assert_array_equal(
        bench.get(out["kept_window"], (20,), np.int32), np.flatnonzero(keep)
    )
    rows = hidden.reshape(54, 8)[plan.gather_window] * (plan.segment != planner.FREE)[..., None]
    np.testing.assert_array_equal(
        bench.get(out["bins"], (count, 12, 4), np.float32), rows.reshape(count, 12, 4)
    )


def test_a_plugin_engine_needs_its_creator(tmp_path: Path):
    trt = make("10.3")
    registry = trt.get_plugin_registry()
    handle = registry.load_library(str(plugin_library(tmp_path)))
    ranges = {"scores": ((1, 6),) * 3, "hidden": ((1, 12, 4),) * 3}
    plan = serialized(trt, SELECT_PACK, ranges, values={"kept_count": ([1], [1], [6])})
    registry.deregister_library(handle)
    assert trt.Runtime(trt.Logger()).deserialize_cuda_engine(plan) is None
    assert "SttsSelectPack" in trt.standin.messages[-1][1]


def test_runs_can_be_captured(relu: Bench):
    cuda = relu.cuda
    stream = cuda.cudaStreamCreate()
    mode = cuda.enums["cudaStreamCaptureMode"].cudaStreamCaptureModeThreadLocal
    address = relu.put("x", X)
    out = relu.memory("y", 24)
    cuda.cudaStreamBeginCapture(stream, mode)
    assert not relu.context.execute_async_v3(int(stream))  # never ran outside of a capture
    with pytest.raises(Exception, match="cudaErrorStreamCaptureInvalidated"):
        cuda.cudaStreamEndCapture(stream)
    assert relu.context.execute_async_v3(int(stream))
    cuda.cudaStreamSynchronize(stream)
    cuda.cudaStreamBeginCapture(stream, mode)
    assert relu.context.execute_async_v3(int(stream))
    graph = cuda.cudaGraphInstantiate(cuda.cudaStreamEndCapture(stream), 0)
    assert relu.trt.standin.executions == ["Unnamed Network 0"]
    kinds = cuda.enums["cudaMemcpyKind"]
    for factor in (1, 2):
        values = np.ascontiguousarray(X * factor)
        cuda.cudaMemcpy(address, values, 24, kinds.cudaMemcpyHostToDevice)
        cuda.cudaGraphLaunch(graph, stream)
        cuda.cudaStreamSynchronize(stream)
        np.testing.assert_array_equal(relu.get(out, (2, 3), np.float32), np.maximum(X * factor, 0))


def test_knobs_make_runs_fail(relu: Bench):
    relu.put("x", X)
    relu.memory("y", 24)
    relu.trt.standin.fail_execute = "illegal memory access"
    assert not relu.context.execute_async_v3(0)
    assert "illegal memory access" in relu.trt.standin.messages[-1][1]
