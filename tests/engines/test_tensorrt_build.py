"""The tensorrt back end against stand-ins that have what the bindings of each version have."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from stts_export import __version__
from stts_export.build import BuildSpec, bundle_from_bundle
from stts_export.bundle import Bundle
from stts_export.cli import main
from stts_export.config import ModelConfig
from stts_export.engines import engine_build, plugin, tensorrt
from stts_export.engines.engine_build import EngineSpec, engine_specs
from stts_export.engines.network import build_engine
from stts_export.engines.plugin import PLUGIN_VARIABLE
from stts_export.errors import InputError, MissingDependencyError
from stts_export.tensors import Range
from tests.helpers import small_config
from tests.standins import running
from tests.standins.cuda import CudaStandin
from tests.standins.fixtures import (
    child_calls,
    install_cuda,
    install_tensorrt,
    plugin_library,
    uninstall,
)

VERSIONS = {"10.3": "10.3.0", "10.16": "10.16.1", "11.4": "11.4.0"}
SPEC = BuildSpec(backends=("tensorrt",), max_frames=16, max_tokens=512)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> CudaStandin:
    return install_cuda(monkeypatch, compute_capability=(8, 7))


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, cuda: CudaStandin) -> Callable[..., ModuleType]:
    return lambda version, **knobs: install_tensorrt(monkeypatch, version, cuda, **knobs)


@pytest.fixture(autouse=True)
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The plugin, where the environment says."""
    folder = tmp_path / "library"
    folder.mkdir()
    path = plugin_library(folder)
    monkeypatch.setenv(PLUGIN_VARIABLE, str(path))
    monkeypatch.setattr(plugin, "_BUILD_TREE", tmp_path / "none.so")
    return path


def _arguments(name: str) -> list[dict[str, str]]:
    return [arguments for called, arguments in child_calls() if called == name]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_builds_what_it_can(
    small_bundle: Path, tmp_path: Path, install, library: Path, version: str
):
    install(version)
    spec = replace(SPEC, targets=("sm87",), memory_limit=1 << 30)
    output = bundle_from_bundle(small_bundle, tmp_path / "out", spec)
    bundle = Bundle.open(output)
    bundle.check_hashes()
    folder = f"tensorrt-{VERSIONS[version]}-sm87"
    assert bundle.manifest.targets == (folder, "onnxruntime")
    (engines,) = bundle.engine_sets()
    assert (engines.backend, engines.target) == ("tensorrt", "sm87")
    decomposed = version == "10.3"
    assert {name: engine.graph for name, engine in engines.engines.items()} == {
        "vision_lower": "vision_lower-decomposed" if decomposed else "vision_lower",
        "vision_upper": "vision_upper-decomposed" if decomposed else "vision_upper",
        "connector": "connector-decomposed" if decomposed else "connector",
        "select_pack": "select_pack",
        "gather_windows": "gather_windows",
        "decoder": "decoder-decomposed" if decomposed else "decoder-fixed",
    }
    select = engines.engines["select_pack"]
    assert [tensor.is_shape for tensor in select.inputs] == [False, False, True]
    assert select.profiles[0]["kept_count"] == Range((1,), (48,), (96,))
    pooled = engines.engines["connector"].profiles[0]["pooled_patches"]
    assert pooled == Range((1, 4), (512, 4), (512, 4))
    decoder = engines.engines["decoder"]
    caches = {t.shape for t in decoder.inputs if t.name.startswith("past_key_values")}
    assert caches == {(1, 2, -1 if decomposed else 512, 16)}
    assert ("past_key_values.0.key" in decoder.profiles[0]) == decomposed
    assert (output / "plugins/libstts_plugins.so").read_bytes() == library.read_bytes()
    assert (output / "engines" / folder / "timing.cache").exists()
    assert "plugins/libstts_plugins.so" in bundle.manifest.files
    _check_calls(version, tmp_path / "out.partial/plugins/libstts_plugins.so")


def test_values_that_the_engine_does_not_tell_are_those_asked_for(
    small_bundle: Path, tmp_path: Path, install, monkeypatch: pytest.MonkeyPatch
):
    install("10.3")
    monkeypatch.setattr(running.Engine, "get_tensor_profile_values", lambda *_, **__: [])
    monkeypatch.setattr(
        engine_build,
        "run_job",
        lambda job, _=None: build_engine(sys.modules["tensorrt"], job, lambda _: True),
    )
    output = bundle_from_bundle(small_bundle, tmp_path / "out", SPEC)
    (engines,) = Bundle.open(output).engine_sets()
    profile = engines.engines["select_pack"].profiles[0]
    assert profile["kept_count"] == Range((1,), (48,), (96,))


def _check_calls(version: str, kept: Path) -> None:
    """Networks are strongly typed and exact, memory is bounded, one build needs the plugin."""
    flags = {call["flags"] for call in _arguments("Builder.create_network")}
    assert flags == {"1" if version == "11.4" else "2"}
    cleared = {call["flag"] for call in _arguments("IBuilderConfig.clear_flag")}
    assert {flag.rpartition(".")[2].split(":")[0] for flag in cleared} == {"TF32"}
    limits = _arguments("IBuilderConfig.set_memory_pool_limit")
    assert {call["pool_size"] for call in limits} == {str(1 << 30)}
    loaded = [call["plugin_path"] for call in _arguments("IPluginRegistry.load_library")]
    assert loaded == [repr(str(kept))]


def test_the_equivalent_command_is_printed_and_kept(
    small_bundle: Path, tmp_path: Path, install, capsys
):
    install("10.3")
    output = tmp_path / "out"
    arguments = ["build", str(small_bundle), "-o", str(output), "--backend", "tensorrt"]
    assert main([*arguments, "--max-frames", "16", "--memory-limit", "2"]) == 0
    printed = capsys.readouterr().err
    (engines,) = Bundle.open(output).engine_sets()
    for engine in engines.engines.values():
        assert engine.command in printed
    assert engines.engines["select_pack"].command == (
        "trtexec --onnx=onnx/select_pack/model.onnx --noTF32 --skipInference --stronglyTyped "
        "--dynamicPlugins=plugins/libstts_plugins.so --memPoolSize=workspace:2147483648B "
        "--minShapes=scores:1x6,hidden:1x54x24,kept_count:1 "
        "--optShapes=scores:16x6,hidden:16x54x24,kept_count:48 "
        "--maxShapes=scores:16x6,hidden:16x54x24,kept_count:96 "
        "--saveEngine=select_pack.engine"
    )
    for engine in engines.engines.values():  # what is written is none of the manifest's files
        (written,) = re.findall("--(?:saveEngine|timingCacheFile)=([^ ]+)", engine.command)
        (output / written).write_bytes(b"another engine")
    Bundle.open(output).check_hashes()
    decoder = engines.engines["decoder"].command
    assert decoder.index("--profile=0 --minShapes=") < decoder.index("--profile=1 --minShapes=")


def test_measured_times_are_kept_and_a_damaged_file_of_them_is_not_trusted(
    small_bundle: Path, tmp_path: Path, install, caplog: pytest.LogCaptureFixture
):
    install("10.16")
    first = bundle_from_bundle(small_bundle, tmp_path / "first", SPEC)
    cache = "engines/tensorrt-10.16.1-sm87/timing.cache"
    known = (first / cache).stat().st_size
    again = bundle_from_bundle(first, tmp_path / "again", SPEC)
    assert (again / cache).stat().st_size >= known
    assert not caplog.messages
    damaged = Path(shutil.copytree(first, tmp_path / "damaged"))
    (damaged / cache).write_bytes(b"x" * known)
    last = bundle_from_bundle(damaged, tmp_path / "last", SPEC)
    assert "timing.cache is damaged or of another GPU or TensorRT" in caplog.text
    assert (last / cache).read_bytes() == (first / cache).read_bytes()


@pytest.mark.parametrize(
    ("knobs", "message", "fix"),
    [
        ({"build_bytes": 2 << 20}, "insufficient workspace", "allow more with --memory-limit"),
        (
            {"fail_build": "Error Code 2: OutOfMemory (Requested amount)"},
            "OutOfMemory",
            "free memory of the GPU",
        ),
        ({"fail_build": "Error Code 10: Internal Error (Odd.)"}, "Internal Error", None),
    ],
)
def test_a_failed_build_tells_in_the_words_of_the_library(
    small_bundle: Path, tmp_path: Path, install, knobs, message: str, fix: str | None
):
    install("10.3", **knobs)
    spec = BuildSpec(backends=("tensorrt",), memory_limit=1 << 20)
    with pytest.raises(InputError, match=f"cannot be built by tensorrt: .*{message}") as error:
        bundle_from_bundle(small_bundle, tmp_path / "out", spec)
    assert fix is None or fix in (error.value.fix or "")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.engine*"))


def test_a_model_without_a_scorer_needs_no_plugin(install, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(PLUGIN_VARIABLE)
    install("10.3")
    config = ModelConfig.from_dict(small_config(), has_scorer=False)
    (target,) = tensorrt.targets((), prunes=False)
    specs = engine_specs(target, EngineSpec(config, "fp16", max_frames=4, max_tokens=64))
    assert set(specs) == {"vision_lower", "vision_upper", "connector", "decoder"}
    assert target.plugin is None
    with pytest.raises(MissingDependencyError, match=r"libstts_plugins\.so is not there"):
        tensorrt.targets((), prunes=True)


def test_a_target_must_be_the_machine(install):
    install("10.3")
    assert tensorrt.targets(("sm87",), prunes=False)[0].folder == "tensorrt-10.3.0-sm87"
    with pytest.raises(InputError, match="target 'sm89', but this machine's GPU is sm87") as error:
        tensorrt.targets(("sm89",), prunes=False)
    assert error.value.where == "tensorrt"
    assert "run another build, with that back end alone" in str(error.value)


def test_a_plugin_of_another_version_is_refused_before_the_work(
    small_bundle: Path, tmp_path: Path, install
):
    install("10.3")
    old = tmp_path / "old"
    old.mkdir()
    spec = BuildSpec(backends=("tensorrt",), plugin=plugin_library(old, version="0.0.1"))
    with pytest.raises(InputError, match=rf"of version 0\.0\.1\n  allowed: version {__version__}"):
        bundle_from_bundle(small_bundle, tmp_path / "out", spec)
    assert {path.name for path in tmp_path.iterdir()} == {"library", "old"}


@pytest.mark.parametrize("version", ["10.2.0", "12.0.0", "8.6.1"])
def test_versions_that_are_not_supported(install, monkeypatch: pytest.MonkeyPatch, version: str):
    monkeypatch.setattr(install("10.3"), "__version__", version)
    with pytest.raises(MissingDependencyError, match=r"allowed: 10\.3 to 11\.x"):
        tensorrt.targets((), prunes=False)


def test_what_is_missing_is_said(install, monkeypatch: pytest.MonkeyPatch):
    uninstall(monkeypatch, "tensorrt")
    with pytest.raises(MissingDependencyError, match=r"tensorrt: is not installed.*\n.*JetPack"):
        tensorrt.targets((), prunes=False)
    install("10.3")
    uninstall(monkeypatch, "cuda")
    with pytest.raises(MissingDependencyError, match="cuda-python"):
        tensorrt.targets((), prunes=False)
    install_cuda(monkeypatch, driver=0)
    with pytest.raises(MissingDependencyError, match="driver"):
        tensorrt.targets((), prunes=False)
