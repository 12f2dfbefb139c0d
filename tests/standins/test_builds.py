"""Builds go, and fail, as in the real library; plugins."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.standins.conftest import installed, make, misuse
from tests.standins.cuda import CudaStandin
from tests.standins.fixtures import (
    plugin_library,
)
from tests.standins.plugins import ElfFile
from tests.standins.scenarios import (
    FLOAT,
    HALF,
    RANGE,
    RELU,
    SCENARIOS,
    SELECT_PACK,
    Scenario,
    attention,
    model,
    node,
    run,
    scatter,
    serialized,
    three,
)
from tests.standins.tensorrt import VERSIONS


@pytest.mark.skipif(not installed("tensorrt-rtx", "1.7"), reason="needs tensorrt-rtx 1.7")
@pytest.mark.parametrize("name", SCENARIOS)
def test_builds_go_as_in_the_real_library(name: str):
    real = importlib.import_module("tensorrt_rtx")
    ours = make("rtx")
    outcomes = [run(m, SCENARIOS[name], functools.partial(target, m)) for m in (real, ours)]
    assert outcomes[0].facts == outcomes[1].facts
    for error in outcomes[1].errors if outcomes[1].parsed else []:
        words = error.rstrip(").")
        assert any(words in spoken for spoken in outcomes[0].errors), error


def target(module: Any, config: Any) -> None:
    config.num_compute_capabilities = 1
    assert config.set_compute_capability(module.ComputeCapability.SM89, 0)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", [n for n, s in SCENARIOS.items() if s.graph in (RELU, RANGE)])
def test_builds_go_the_same_in_all_versions(version: str, name: str):
    assert run(make(version), SCENARIOS[name]).facts == run(make("rtx"), SCENARIOS[name]).facts


NEW_OPERATORS = {
    "Attention": attention(HALF),
    "TensorScatter": scatter(16),
    "RMSNormalization": model(
        [node("RMSNormalization", "x s", "y")],
        [("x", FLOAT, [2, 8]), ("s", FLOAT, [8])],
        [("y", FLOAT, [2, 8])],
        opset=23,
    ),
    "opset 21": model([node("Relu", "x", "y")], [("x", FLOAT, [2])], [("y", FLOAT, [2])], opset=21),
}


@pytest.mark.parametrize("name", NEW_OPERATORS)
def test_old_versions_lack_new_operators(name: str):
    shapes = ({"new": ((1, 2, 1, 8), (1, 2, 1, 8), (1, 2, 1, 8))},)
    parsed = {
        v: run(make(v), Scenario(NEW_OPERATORS[name], shapes)).parsed for v in ("10.3", "10.16")
    }
    assert parsed == {"10.3": False, "10.16": True}


def test_networks_must_be_strongly_typed_before_11():
    for version in ("10.3", "10.16"):
        trt = make(version)
        builder = trt.Builder(trt.Logger())
        network = builder.create_network()
        assert trt.OnnxParser(network, trt.Logger()).parse(RELU)
        misuse(
            trt.standin.cuda,
            "strongly typed",
            functools.partial(
                builder.build_serialized_network, network, builder.create_builder_config()
            ),
        )


def test_precision_flags_are_refused():
    trt = make("10.3")
    shapes = (three((1, 3), (1, 3), (1, 3)),)
    done = run(trt, Scenario(RELU, shapes), lambda config: config.set_flag(trt.BuilderFlag.FP16))
    assert not done.built
    assert "FP16" in done.errors[0]


def test_a_workspace_limit_can_be_too_small(trt: Any):
    def limit(config: Any) -> None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 4096)

    shapes = (three((1, 3), (1, 3), (1, 3)),)
    done = run(trt, Scenario(RELU, shapes), limit)
    assert not done.built
    assert "insufficient workspace" in done.errors[-1]


def test_a_build_can_run_out_of_device_memory():
    trt = make("10.3", CudaStandin(total_memory=1 << 19))
    done = run(trt, Scenario(RELU, (three((1, 3), (1, 3), (1, 3)),)))
    assert not done.built
    assert "OutOfMemory" in done.errors[-1]


def test_knobs_make_builds_fail(trt: Any):
    trt.standin.fail_build = "Error Code 9: something else"
    done = run(trt, Scenario(RELU, (three((1, 3), (1, 3), (1, 3)),)))
    assert not done.built
    assert "Error Code 9: something else" in done.errors[-1]


class Phases:
    """Makes a monitor that writes down what happens, and answers with `answers`."""

    def __init__(self, answer: Callable[[int], Any]) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.answer = answer

    def monitor(self, trt: Any) -> Any:
        owner = self

        class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()

            def phase_start(self, phase_name: str, parent_phase: Any, num_steps: int) -> None:
                owner.events.append(("start", phase_name, parent_phase, num_steps))

            def step_complete(self, phase_name: str, step: int) -> bool:
                owner.events.append(("step", phase_name, step))
                answer: bool = owner.answer(len(owner.events))
                return answer

            def phase_finish(self, phase_name: str) -> None:
                owner.events.append(("finish", phase_name))

        return Monitor()


def watched(trt: Any, answer: Callable[[int], Any]) -> tuple[Phases, Any]:
    phases = Phases(answer)

    def configure(config: Any) -> None:
        if trt.__name__ == "tensorrt_rtx":
            target(trt, config)
        config.progress_monitor = phases.monitor(trt)

    return phases, run(trt, SCENARIOS["builds"], configure)


def test_progress_is_nested_and_complete(trt: Any):
    phases, done = watched(trt, lambda _: True)
    assert done.built
    open_phases: list[str] = []
    for kind, name, *rest in phases.events:
        if kind == "start":
            parent, steps = rest
            assert parent == (open_phases[-1] if open_phases else None)
            assert steps > 0
            open_phases.append(name)
        elif kind == "step":
            assert name == open_phases[-1]
        else:
            assert name == open_phases.pop()
    assert not open_phases
    assert ("step", "Building engine", 5) in phases.events


def interrupt(_: int) -> bool:
    raise KeyboardInterrupt


@pytest.mark.parametrize("answer", [lambda _: False, lambda n: n < 20, interrupt])
def test_a_monitor_can_cancel(trt: Any, answer: Callable[[int], Any]):
    phases, done = watched(trt, answer)
    assert not done.built
    assert "Build canceled by user" in done.errors[-1]
    started = [name for kind, name, *_ in phases.events if kind == "start"]
    assert sorted(started) == sorted(name for kind, name, *_ in phases.events if kind == "finish")


@pytest.mark.skipif(not installed("tensorrt-rtx", "1.7"), reason="needs tensorrt-rtx 1.7")
def test_cancelling_goes_as_in_the_real_library():
    first = []
    for module in (importlib.import_module("tensorrt_rtx"), make("rtx")):
        phases, done = watched(module, lambda _: False)
        assert not done.built
        assert any("Build canceled by user" in error for error in done.errors)
        first.append(phases.events)
    assert first[0] == first[1]


def test_timing_caches_belong_to_a_version_and_a_device():
    trt = make("10.3")
    config = trt.Builder(trt.Logger()).create_builder_config()
    cache = config.create_timing_cache(b"")
    assert config.set_timing_cache(cache, ignore_mismatch=False)
    stored = bytes(config.get_timing_cache().serialize())
    for version, sm, fits in (("10.3", (8, 7), True), ("10.16", (8, 7), False),
                              ("10.3", (8, 9), False)):  # fmt: skip
        other = make(version, CudaStandin(compute_capability=sm))
        theirs = other.Builder(other.Logger()).create_builder_config()
        assert theirs.set_timing_cache(theirs.create_timing_cache(stored), False) is fits
        assert theirs.set_timing_cache(theirs.create_timing_cache(stored), True)
    assert config.create_timing_cache(b"damaged") is None
    with pytest.raises(TypeError):
        config.create_timing_cache("text")


def test_a_build_fills_the_timing_cache():
    trt = make("10.3")
    caches = []

    def configure(config: Any) -> None:
        config.set_timing_cache(config.create_timing_cache(b""), False)
        caches.append(config)

    shapes = (three((1, 3), (1, 3), (1, 3)),)
    before = len(bytes(trt.Builder(trt.Logger()).create_builder_config()
                       .create_timing_cache(b"").serialize()))  # fmt: skip
    assert run(trt, Scenario(RELU, shapes), configure).built
    assert len(bytes(caches[0].get_timing_cache().serialize())) > before


def test_nothing_starts_without_a_driver():
    for version in VERSIONS:
        trt = make(version, CudaStandin(driver=0))
        for kind in (trt.Builder, trt.Runtime):
            with pytest.raises(TypeError, match="factory function returned nullptr"):
                kind(trt.Logger())
        assert "CUDA initialization failure with error: 35" in trt.standin.messages[-1][1]
    rtx = make("rtx", CudaStandin(driver=0))
    assert rtx.Builder(rtx.Logger())


def test_host_memory_is_a_buffer_and_nothing_else(trt: Any, tmp_path: Path):
    plan = serialized(trt, RELU, three((1, 3), (1, 3), (4, 3)))
    (tmp_path / "file").write_bytes(plan)
    assert (tmp_path / "file").read_bytes() == bytes(plan)
    assert plan.nbytes == len(bytes(plan))
    assert bool(plan)
    for wrong in (lambda: len(plan), lambda: plan[0]):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(AttributeError):
        plan.decode()


def test_a_registry_takes_a_library_with_creators_once(tmp_path: Path):
    trt = make("10.3")
    registry = trt.get_plugin_registry()
    library = plugin_library(tmp_path)
    assert {"getCreators", "setLoggerFinder"} <= ElfFile.read(library).exports
    assert "printf" not in ElfFile.read(library).exports
    assert registry.get_creator("SttsSelectPack", "1", "stts") is None
    handle = registry.load_library(str(library))
    assert handle is not None
    creator = registry.get_creator("SttsSelectPack", "1", "stts")
    assert (creator.name, creator.plugin_namespace) == ("SttsSelectPack", "stts")
    assert [c.name for c in registry.all_creators] == ["SttsSelectPack"]
    assert registry.load_library(str(library)) is None
    assert registry.get_creator("SttsSelectPack", "2", "stts") is None
    assert registry.get_creator("SttsSelectPack", "1") is None
    registry.deregister_library(handle)
    assert registry.get_creator("SttsSelectPack", "1", "stts") is None


def test_a_registry_refuses_other_files(tmp_path: Path):
    trt = make("10.3")
    registry = trt.get_plugin_registry()
    text = tmp_path / "text.so"
    text.write_text("no library" * 20)
    other = plugin_library(tmp_path, exports=False)
    foreign = tmp_path / "foreign.so"
    data = bytearray(other.read_bytes())
    data[18:20] = (183 if os.uname().machine == "x86_64" else 62).to_bytes(2, "little")
    foreign.write_bytes(data)
    for file in (text, other, foreign, tmp_path / "missing.so"):
        assert registry.load_library(str(file)) is None
        assert str(file) in trt.standin.messages[-1][1]


def test_plugin_nodes_need_their_creator(tmp_path: Path):
    trt = make("10.3")
    ranges: Any = {
        "scores": ((1, 6), (2, 6), (4, 6)), "hidden": ((1, 12, 4), (2, 12, 4), (4, 12, 4)),
    }  # fmt: skip
    scenario = Scenario(SELECT_PACK, (ranges,), ({"kept_count": ([1], [6], [24])},))
    done = run(trt, scenario)
    assert not done.parsed
    assert "Plugin not found" in done.errors[-1]
    trt.get_plugin_registry().load_library(str(plugin_library(tmp_path)))
    done = run(trt, scenario)
    assert done.built
    assert done.inputs[2] == ("kept_count", "INT64", (1,), True, False)
    rtx = make("rtx")
    misuse(rtx.standin.cuda, "plugin node", lambda: run(rtx, scenario))
