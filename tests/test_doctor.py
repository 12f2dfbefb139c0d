"""What doctor says of machines that this one is not, and that nothing ends it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from stts_export import doctor
from stts_export.doctor import (
    GAP,
    INFO,
    OK,
    REQUIRED,
    Ability,
    Diagnosis,
    Finding,
    ask,
    diagnose,
    diagnosis_text,
)
from stts_export.errors import InputError
from tests.standins.fixtures import (
    install_cuda,
    install_tensorrt,
    install_tensorrt_rtx,
    plugin_library,
    uninstall,
)

ROOT = Path(__file__).parents[1]
_PROBES: dict[str, Any] = {
    "test_this_environment_builds_and_runs": "all",
    "test_two_wheels_in_one_folder_are_found": ("onnxruntime",),
    "test_a_wheel_whose_files_are_of_another_is_found": ("onnxruntime",),
    "test_an_old_onnxruntime_is_not_used": ("onnxruntime",),
    "test_a_gpu_build_whose_provider_does_not_start_says_so": ("onnxruntime", "cuda_python"),
    "test_a_library_that_aborts_does_not_end_it": ("tensorrt",),
    "test_a_jetson_is_recognised": ("cuda_python", "tensorrt"),
    "test_tensorrt_needs_the_plugin_for_models_that_prune": ("cuda_python", "tensorrt", "plugin"),
    "test_an_rtx_gpu_runs_engines_of_tensorrt_rtx": ("cuda_python", "tensorrt_rtx"),
    "test_a_driver_without_a_gpu_says_so": ("cuda_python",),
}
"""By test, probes or modules that are really looked for; a process each."""


def _find(diagnosis: Diagnosis, section: str, name: str) -> Finding:
    found = [f for f in diagnosis.findings if (f.section, f.name) == (section, name)]
    assert len(found) == 1, [(f.section, f.name) for f in diagnosis.findings]
    return found[0]


def _can(diagnosis: Diagnosis, backend: str, action: str) -> Ability:
    found = [a for a in diagnosis.abilities if (a.backend, a.action) == (backend, action)]
    assert len(found) == 1, diagnosis.abilities
    return found[0]


def _distribution(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def _package(
    folder: Path, package: str, version: str, *, gpu: bool, starts: Iterable[str] = ()
) -> None:
    """An `onnxruntime` as one of its wheels would leave it."""
    capi = folder / "onnxruntime" / "capi"
    capi.mkdir(parents=True)
    info = f"package_name = '{package}'\n__version__ = '{version}'\n"
    (capi / "build_and_package_info.py").write_text(info)
    providers = ["CUDAExecutionProvider"] * gpu + ["CPUExecutionProvider"]
    if gpu:
        (capi / "libonnxruntime_providers_cuda.so").write_bytes(b"")
    (folder / "onnxruntime" / "__init__.py").write_text(f"""
__version__ = {version!r}
get_available_providers = lambda: {providers!r}
class SessionOptions:
    pass
class InferenceSession:
    def __init__(self, model, options, providers):
        self.providers = [p for p in providers if p in {[*starts, "CPUExecutionProvider"]!r}]
    def get_providers(self):
        return self.providers
""")


@pytest.fixture(autouse=True)
def _few_processes(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Start processes only for the probes that `_PROBES` has for a test."""
    real, wanted = doctor.ask, _PROBES.get(request.node.originalname, ())

    def asked(probe: str, *arguments: str) -> doctor._Answer:
        if wanted == "all" or (probe, *arguments)[-1] in wanted or probe in wanted:
            return real(probe, *arguments)
        if probe == "library":
            return doctor._Answer(None, f"No module named '{arguments[0]}'")
        if probe == "onnxruntime":
            started = ["CPUExecutionProvider"]
            values = {"version": "1.31.1", "providers": started, "started": started}
            return doctor._Answer(values)
        return doctor._Answer(None, "not tried")

    monkeypatch.setattr(doctor, "ask", asked)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where imports and installed distributions are looked for first."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    for name in [name for name in sys.modules if name.partition(".")[0] == "onnxruntime"]:
        monkeypatch.delitem(sys.modules, name)
    return folder


def test_this_environment_builds_and_runs():
    diagnosis = diagnose()
    for package in ("numpy", "av", "tokenizers"):
        finding = _find(diagnosis, "python", package)
        assert (finding.state, finding.found) == (OK, metadata.version(package))
    assert _can(diagnosis, "onnxruntime", "build graphs from a checkpoint").possible
    assert _can(diagnosis, "onnxruntime (cpu)", "run").possible
    assert diagnosis.can_run
    values = json.loads(json.dumps(diagnosis.to_json()))
    assert values["can_run"]
    assert len(values["findings"]) == len(diagnosis.findings)
    text = diagnosis_text(diagnosis)
    assert "what can be done here" in text
    assert re.search(r"memory +\S+ GB available of \S+ GB", text)


def test_oldest_versions_are_those_of_the_project():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {
        "runtime": project["dependencies"],
        **{name: project["optional-dependencies"][name] for name in ("train", "export")},
    }
    for extra, requirements in asked.items():
        oldest: dict[str, tuple[int, ...]] = {}
        for requirement in requirements:
            if match := re.match(r"([\w-]+)>=([\d.]+)", requirement):
                oldest[match[1]] = tuple(map(int, match[2].split(".")))
        held = dict(REQUIRED[extra])
        if extra == "export":  # stts-export[train] is in it
            assert all(held.pop(name) == version for name, version in REQUIRED["train"].items())
        assert held == oldest


def test_with_the_base_dependencies_alone_it_says_what_to_install(tmp_path: Path):
    site = tmp_path / "site"
    site.mkdir()
    for name in ("numpy", "av", "tokenizers"):
        there = Path(str(metadata.distribution(name).locate_file("")))
        for entry in there.iterdir():
            if re.fullmatch(rf"{name}(\.libs|-[\d.]+\.dist-info)?", entry.name):
                (site / entry.name).symlink_to(entry)
    code = (
        f"import sys; sys.path += [{str(site)!r}, {str(ROOT)!r}]\n"
        "from stts_export.cli import main\n"
        "sys.exit(main(['doctor', '--json']))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code],
        capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    values = json.loads(done.stdout)
    found = {(f["section"], f["name"]): f for f in values["findings"]}
    assert found["python", "numpy"]["state"] == OK
    assert found["packages", "torch"]["found"] == "not installed"
    assert found["packages", "torch"]["fix"] == "pip install 'stts-export[export]'"
    assert found["onnxruntime", "onnxruntime"]["fix"] == "pip install 'stts-export[cpu]'"
    assert found["tensorrt", "TensorRT for RTX"]["fix"] == "pip install 'stts-export[trt-rtx]'"
    assert not any(f["found"].startswith("failed") for f in values["findings"])
    abilities = {(a["backend"], a["action"]): a for a in values["abilities"]}
    assert not any(ability["possible"] for ability in abilities.values())
    export = abilities["onnxruntime", "build graphs from a checkpoint"]
    assert export["fix"] == "pip install 'stts-export[cpu,export]'"
    assert "torch" in export["why"]


def test_two_wheels_in_one_folder_are_found(packages: Path):
    _distribution(packages, "onnxruntime", "1.31.1")
    _distribution(packages, "onnxruntime-gpu", "1.31.0")
    _package(packages, "onnxruntime", "1.31.1", gpu=False)
    finding = _find(diagnose(), "onnxruntime", "onnxruntime")
    assert finding.state == GAP
    assert "onnxruntime 1.31.1 and onnxruntime-gpu 1.31.0 installed" in finding.found
    assert "files are those of onnxruntime 1.31.1, without libonnxruntime_providers_cuda.so" in (
        finding.found
    )
    assert finding.fix == (
        "pip uninstall -y onnxruntime onnxruntime-gpu && "
        "pip install --no-cache-dir 'onnxruntime>=1.31'"
    )


def test_a_wheel_whose_files_are_of_another_is_found(packages: Path):
    _distribution(packages, "onnxruntime", "1.31.1")
    _package(packages, "onnxruntime-gpu", "1.30.0", gpu=True)
    diagnosis = diagnose()
    finding = _find(diagnosis, "onnxruntime", "onnxruntime")
    assert finding.state == GAP
    assert "those of onnxruntime-gpu 1.30.0" in finding.found
    version = _find(diagnosis, "onnxruntime", "version")
    assert version.found == "1.30.0 is too old: 1.31 or newer"
    assert not diagnosis.can_run or _can(diagnosis, "tensorrt-rtx", "run").possible


def test_an_old_onnxruntime_is_not_used(packages: Path):
    _distribution(packages, "onnxruntime", "1.24.0")
    _package(packages, "onnxruntime", "1.24.0", gpu=False)
    ability = _can(diagnose(), "onnxruntime (cpu)", "run")
    assert not ability.possible
    assert ability.why == "1.24.0 is too old: 1.31 or newer"
    assert ability.fix == "pip install --upgrade 'onnxruntime>=1.31'"


def test_a_gpu_build_whose_provider_does_not_start_says_so(
    packages: Path, monkeypatch: pytest.MonkeyPatch
):
    _distribution(packages, "onnxruntime-gpu", "1.31.0")
    _package(packages, "onnxruntime-gpu", "1.31.0", gpu=True)
    install_cuda(monkeypatch, compute_capability=(9, 0))
    diagnosis = diagnose()
    assert _find(diagnosis, "onnxruntime", "CUDA provider").state == INFO
    assert _can(diagnosis, "onnxruntime (cpu)", "run").possible
    ability = _can(diagnosis, "onnxruntime (cuda)", "run")
    assert not ability.possible
    assert ability.fix == "pip install 'onnxruntime-gpu[cuda,cudnn]'"


def test_a_library_that_aborts_does_not_end_it(packages: Path, monkeypatch: pytest.MonkeyPatch):
    (packages / "tensorrt").mkdir()
    (packages / "tensorrt" / "__init__.py").write_text("import os; os.abort()")
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    diagnosis = diagnose()
    finding = _find(diagnosis, "tensorrt", "TensorRT")
    assert finding.state == GAP
    assert "crashed (SIGABRT)" in finding.found
    assert not _can(diagnosis, "tensorrt", "run").possible
    assert _find(diagnosis, "video", "hardware decode")  # it went on


def test_a_probe_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "_TIMEOUT", 0.01)
    answer = ask("hardware_decode")
    assert answer.values is None
    assert answer.error == "no answer within 0.01 s"


def test_a_look_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch):
    def broken() -> Any:
        raise KeyError("no such thing")

    monkeypatch.setattr(doctor, "_resources", broken)
    finding = _find(diagnose(), "machine", "probe")
    assert finding.state == GAP
    assert finding.found == "failed: KeyError: 'no such thing'"


def test_a_working_folder_that_is_gone_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    disk = _find(diagnose(), "machine", "disk")
    assert disk.state == GAP
    assert disk.found.startswith("the working folder cannot be used: No such file")
    assert disk.fix == "cd to a folder that is there"


@pytest.mark.parametrize(
    ("version", "known"), [("10.3.0", (10, 3)), ("11", (11, 0)), ("unknown", None), (None, None)]
)
def test_the_gpu_to_plan_with_has_the_version_that_is_told(
    version: str | None, known: Any, monkeypatch: pytest.MonkeyPatch
):
    def answer(probe: str, *arguments: str) -> doctor._Answer:
        if probe == "library":
            return doctor._Answer({"version": version} if version else None)
        gpu = {"name": "NVIDIA H200", "memory": 141 * 10**9, "sm": "sm90", "unified": False}
        return doctor._Answer({"cuda": "13.0", "gpus": [gpu]})

    monkeypatch.setattr(doctor, "ask", answer)
    gpu = doctor.this_gpu()
    assert gpu is not None
    assert gpu.tensorrt == known


def test_a_jetson_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "proc" / "device-tree").mkdir(parents=True)
    (tmp_path / "etc").mkdir()
    model = tmp_path / "proc" / "device-tree" / "model"
    model.write_bytes(b"NVIDIA Jetson Orin NX Engineering Reference Developer Kit\0")
    release = tmp_path / "etc" / "nv_tegra_release"
    release.write_text("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic\n")
    monkeypatch.setattr(doctor, "_ROOT", tmp_path)
    cuda = install_cuda(monkeypatch, compute_capability=(8, 7))
    install_tensorrt(monkeypatch, "10.3", cuda)
    diagnosis = diagnose(plugin=plugin_library(tmp_path))
    assert _find(diagnosis, "jetson", "model").found.startswith("NVIDIA Jetson Orin NX")
    assert _find(diagnosis, "jetson", "L4T").found == "R36.4.3 (JetPack 6)"
    assert "sm87" in _find(diagnosis, "gpu", "cuda:0").found
    assert _find(diagnosis, "tensorrt", "TensorRT").found.startswith("10.3")
    release.write_text("# R35 (release), REVISION: 4.1, GCID: 1, BOARD: t186ref\n")
    old = _find(diagnose(), "jetson", "L4T")
    assert (old.state, old.found) == (GAP, "R35.4.1 (JetPack 5)")
    assert old.fix is not None
    assert "JetPack 6.2" in old.fix


def test_tensorrt_needs_the_plugin_for_models_that_prune(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("STTS_PLUGIN_PATH", raising=False)
    cuda = install_cuda(monkeypatch, compute_capability=(8, 7))
    install_tensorrt(monkeypatch, "10.3", cuda)
    library = plugin_library(tmp_path)
    diagnosis = diagnose(plugin=library)
    assert _find(diagnosis, "plugin", "libstts_plugins.so").state == OK
    assert _find(diagnosis, "plugin", "registry").found == "loads in TensorRT 10.3.0"
    assert _can(diagnosis, "tensorrt", "build engines").possible
    assert _can(diagnosis, "tensorrt", "run").possible
    empty = plugin_library(tmp_path, exports=False)
    registry = _find(diagnose(plugin=empty), "plugin", "registry")
    assert registry.state == GAP
    assert registry.found.startswith("TensorRT does not take it:")
    missing = diagnose(plugin=tmp_path / "nowhere.so")
    assert _find(missing, "plugin", "libstts_plugins.so").state == GAP
    ability = _can(missing, "tensorrt", "build engines")
    assert not ability.possible
    assert "need the plugin" in ability.why


def test_an_rtx_gpu_runs_engines_of_tensorrt_rtx(monkeypatch: pytest.MonkeyPatch):
    cuda = install_cuda(monkeypatch, compute_capability=(8, 9))
    install_tensorrt_rtx(monkeypatch, cuda)
    diagnosis = diagnose()
    assert _can(diagnosis, "tensorrt-rtx", "run").possible
    assert _can(diagnosis, "tensorrt-rtx", "build engines").possible
    cuda = install_cuda(monkeypatch, compute_capability=(9, 0))
    other = _can(diagnose(), "tensorrt-rtx", "run")
    assert not other.possible
    assert other.why.startswith("not for sm90")


def test_a_driver_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch):
    install_cuda(monkeypatch, devices=0)
    diagnosis = diagnose()
    assert not _can(diagnosis, "tensorrt-rtx", "run").possible
    assert "no GPU" in _can(diagnosis, "onnxruntime (cuda)", "run").why


def test_missing_cuda_python_is_named_where_it_matters(monkeypatch: pytest.MonkeyPatch):
    real = doctor.ask

    def with_driver(probe: str, *arguments: str) -> Any:
        if probe == "cuda_driver":
            gpu = {"name": "NVIDIA L4", "memory": 24 * 10**9, "sm": "sm89", "unified": False}
            return doctor._Answer({"cuda": "13.0", "gpus": [gpu]})
        if probe == "cuda_python":
            return doctor._Answer(None, "no module named cuda")
        return real(probe, *arguments)

    monkeypatch.setattr(doctor, "ask", with_driver)
    monkeypatch.setattr(doctor, "_version", lambda package: None if "cuda" in package else "99.0")
    diagnosis = diagnose()
    finding = _find(diagnosis, "gpu", "cuda-python")
    assert (finding.state, finding.fix) == (GAP, "pip install 'cuda-python>=12.6.2'")
    assert _find(diagnosis, "gpu", "cuda:0").found == (
        "NVIDIA L4, 24.00 GB, compute capability 8.9 (sm89)"
    )
    assert not _can(diagnosis, "tensorrt-rtx", "run").possible


def test_a_bundle_is_judged_target_by_target(small_bundle: Path, monkeypatch: pytest.MonkeyPatch):
    diagnosis = diagnose(small_bundle)
    (verdict,) = diagnosis.verdicts
    assert (verdict.target, verdict.runs, verdict.why) == ("onnxruntime", True, "on cpu")
    assert diagnosis.can_run
    assert "onnxruntime: runs here (on cpu)" in diagnosis_text(diagnosis)
    uninstall(monkeypatch, "onnxruntime")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    without = diagnose(small_bundle)
    assert not without.can_run
    assert without.verdicts[0].why == "not installed"


def test_what_is_no_bundle_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="is not a bundle"):
        diagnose(tmp_path)
