"""From a graph to an engine with the real TensorRT for RTX, and what it refuses."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from stts_export.engines import tensorrt_rtx
from stts_export.engines.network import EngineJob, PhaseTree, build_engine
from stts_export.engines.worker import run_job
from stts_export.errors import InputError
from stts_export.tensors import GraphSpec, Range, TensorSpec
from tests.standins.building import BuilderConfig
from tests.standins.fixtures import child_calls, install_cuda, install_tensorrt_rtx

trt = pytest.importorskip("tensorrt_rtx", reason="pip install 'stts-export[trt-rtx]'")


def _graph(
    folder: Path,
    operator: str = "Relu",
    *,
    to: int = TensorProto.FLOAT,
    weights: NDArray[np.float32] | None = None,
) -> Path:
    """x float32 (rows, 4) -> y float32 (rows, 4)."""
    constants = [] if weights is None else [numpy_helper.from_array(weights, "w")]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 4])
    shape = ["rows", 4] if to == TensorProto.FLOAT else None
    y = helper.make_tensor_value_info("y", to, shape)
    inputs = ["x", *(constant.name for constant in constants)]
    node = helper.make_node(operator, inputs, ["y"], name="odd_one")
    graph = helper.make_graph([node], "tiny", [x], [y], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    file = folder / "model.onnx"
    onnx.save(model, file)
    return file


@pytest.fixture
def job(tmp_path: Path) -> EngineJob:
    spec = GraphSpec(
        "tiny",
        (TensorSpec("x", "float32", ("rows", 4)),),
        (TensorSpec("y", "float32", ("rows", 4)),),
    )
    profile = {"x": Range((1, 4), (8, 4), (8, 4))}
    return EngineJob(
        "tensorrt_rtx", spec, _graph(tmp_path), tmp_path / "tiny.engine", (profile,), ("SM89",)
    )


def _left(job: EngineJob) -> set[str]:
    return {path.name for path in job.engine.parent.iterdir()} - {"model.onnx"}


def test_an_engine_is_built_and_described(job: EngineJob):
    fractions: list[float] = []
    built = run_job(job, fractions.append)
    assert built.inputs == (TensorSpec("x", "float32", (-1, 4)),)
    assert built.outputs == (TensorSpec("y", "float32", (-1, 4)),)
    assert built.profiles == job.profiles
    assert _left(job) == {"tiny.engine"}
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)
    assert fractions == sorted(fractions)


def test_no_profile_gets_weights_of_its_own(job: EngineJob, monkeypatch: pytest.MonkeyPatch):
    taken = []

    def add(config: Any, profile: Any) -> int:
        taken.append(profile.extra_memory_target)
        return len(taken) - 1

    install_tensorrt_rtx(monkeypatch, install_cuda(monkeypatch, driver=0))
    standin = sys.modules["tensorrt_rtx"]
    monkeypatch.setattr(BuilderConfig, "add_optimization_profile", add)
    with suppress(InputError):  # profiles are missing, then
        build_engine(standin, replace(job, profiles=job.profiles * 2), lambda fraction: True)
    assert taken == [0, 0]


def test_a_build_that_is_told_to_stop_leaves_nothing(job: EngineJob):
    told: list[float] = []

    def stop(fraction: float) -> bool:
        told.append(fraction)
        return len(told) < 3

    with pytest.raises(InputError, match="cannot be built by tensorrt_rtx"):
        build_engine(trt, job, stop)
    assert len(told) == 3
    assert _left(job) == set()


@pytest.mark.parametrize(
    ("change", "allowed"),
    [
        ({"inputs": (TensorSpec("z", "float32", ("rows", 4)),)}, r"z float32\(rows, 4\)"),
        ({"inputs": (TensorSpec("x", "float16", ("rows", 4)),)}, "x float16"),
        ({"inputs": (TensorSpec("x", "float32", ("rows", 5)),)}, r"x float32\(rows, 5\)"),
        ({"inputs": (TensorSpec("x", "float32", ("rows",)),)}, r"x float32\(rows\)"),
        ({"outputs": (TensorSpec("y", "float32", (1, 4)),) * 2}, r"y float32\(1, 4\), y"),
    ],
)
def test_a_graph_with_another_interface_is_refused(job: EngineJob, change, allowed: str):
    odd = replace(job, spec=replace(job.spec, **change))
    with pytest.raises(InputError, match=rf"has [xy] float32\(-1, 4\)\n  allowed: {allowed}"):
        run_job(odd)
    assert _left(job) == set()


def test_an_operator_that_is_not_supported_is_named(job: EngineJob, tmp_path: Path):
    _graph(tmp_path, "NonZero", to=TensorProto.INT64)
    with pytest.raises(InputError, match=r"node odd_one \(NonZero\)"):
        run_job(job)
    assert _left(job) == set()


def test_a_file_that_is_no_graph_is_refused(job: EngineJob):
    job.onnx.write_bytes(b"no graph at all")
    with pytest.raises(InputError, match=r"model\.onnx: cannot be read by tensorrt_rtx") as error:
        run_job(job)
    assert error.value.fix == (
        "build the bundle again with this stts-export, or use another tensorrt_rtx"
    )


def test_a_full_disk(job: EngineJob):
    job.engine.with_name("tiny.engine.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as error:
        run_job(job)
    assert error.value.filename == str(job.engine)
    assert _left(job) == set()


@pytest.mark.parametrize("target", tensorrt_rtx.TARGETS)
def test_every_target_multiplies_matrices_of_fp32(job: EngineJob, tmp_path: Path, target: str):
    _graph(tmp_path, "MatMul", weights=np.ones((4, 4), np.float32))
    run_job(replace(job, compute_capabilities=(target.upper(),)))
    assert _left(job) == {"tiny.engine"}


@pytest.mark.parametrize(("gpu", "read_back"), [((8, 9), True), ((12, 0), False), (None, False)])
def test_an_engine_for_this_machine_s_gpu_is_read_back(
    job: EngineJob, monkeypatch: pytest.MonkeyPatch, gpu: tuple[int, int] | None, read_back: bool
):
    knobs: dict[str, Any] = {"compute_capability": gpu} if gpu else {"driver": 0}
    install_tensorrt_rtx(monkeypatch, install_cuda(monkeypatch, **knobs))
    built = run_job(job)
    assert built.read_back == read_back
    deserialized = [name for name, _ in child_calls() if name == "Runtime.deserialize_cuda_engine"]
    assert bool(deserialized) == read_back
    assert built.profiles == job.profiles


@pytest.mark.parametrize(
    "sides", [((8, 4), (1, 4), (8, 4)), ((1, 4), (8, 5), (8, 5)), ((1,), (8,), (8,))]
)
def test_a_profile_that_does_not_fit_is_refused(job: EngineJob, sides):
    odd = replace(job, profiles=({"x": Range(*sides)},))
    with pytest.raises(InputError, match=r"model\.onnx: .* by tensorrt_rtx: .*[Pp]rofile"):
        run_job(odd)
    assert _left(job) == set()


def test_progress_of_nested_phases_never_falls():
    tree = PhaseTree()
    tree.start("all", None, 4)
    assert tree.step("all", 0) == 0.25
    tree.start("inner", "all", 2)
    assert tree.step("inner", 0) == 0.375
    tree.start("innermost", "inner", 10)
    assert tree.step("innermost", 4) == pytest.approx(0.4375)
    tree.finish("innermost")
    assert tree.step("inner", 1) == 0.5
    tree.finish("inner")
    assert tree.step("all", 1) == 0.5
    assert tree.step("unknown", 1) == 0.5
    assert tree.step("all", 3) == 1.0
