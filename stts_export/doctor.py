"""What this machine has, what can be built and run on it, and the command that closes each gap.

Needs nothing but the runtime's own dependencies. No probe can end the others: each reports what it
found or how it failed, and libraries that may abort a process are loaded in another.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stts_export._version import __version__
from stts_export.devices import THIS, Device
from stts_export.engines import tensorrt, tensorrt_rtx
from stts_export.engines.engine_set import folder_name
from stts_export.engines.library import INSTALL, MODULES, ONNXRUNTIME, TENSORRT, TENSORRT_RTX
from stts_export.engines.onnxruntime import MIN_VERSION
from stts_export.engines.plugin import PLUGIN_FILE, PLUGIN_VARIABLE, find_plugin
from stts_export.errors import MissingDependencyError, SttsError
from stts_export.files import readable_size
from stts_export.machine import available_memory, total_memory

OK, INFO, GAP = "ok", "info", "gap"
"""States of a finding: as it should be; neither good nor bad; something is missing."""

REQUIRED: dict[str, dict[str, tuple[int, ...]]] = {
    "runtime": {"numpy": (1, 26), "av": (17,), "tokenizers": (0, 21)},
    "train": {"torch": (2, 11), "safetensors": (0, 6), "pyyaml": (6,)},
    "export": {
        "torch": (2, 11), "safetensors": (0, 6), "pyyaml": (6,), "onnx": (1, 20),
        "onnxscript": (0, 7), "ml-dtypes": (0, 5), "huggingface-hub": (1, 31),
    },
}  # fmt: skip
"""Oldest versions of the packages of each extra, as `pyproject.toml` has them."""
_WHEELS = ("onnxruntime", "onnxruntime-gpu")
"""Distributions that own the folder `onnxruntime`."""
_TIMEOUT = 60.0
_ROOT = Path("/")
_CUDA_LIBRARY = "libonnxruntime_providers_cuda.so"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    section: str
    name: str
    state: str
    found: str
    fix: str | None = None
    """The command that closes the gap."""


@dataclass(frozen=True)
class Ability:
    """Something that can be done here, or not."""

    backend: str
    action: str
    possible: bool
    why: str = ""
    """What is missing when it is not possible; what to know when it is."""
    fix: str | None = None


@dataclass(frozen=True)
class Verdict:
    """Whether a bundle runs here, on one of its targets."""

    target: str
    runs: bool
    why: str = ""
    fix: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was found."""

    findings: tuple[Finding, ...]
    abilities: tuple[Ability, ...]
    bundle: str | None = None
    verdicts: tuple[Verdict, ...] = ()

    @property
    def can_run(self) -> bool:
        """Whether anything runs here; of a bundle, whether that does."""
        if self.bundle is not None:
            return any(verdict.runs for verdict in self.verdicts)
        return any(ability.possible for ability in self.abilities if ability.action == "run")

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "stts_export": __version__,
            "findings": [asdict(finding) for finding in self.findings],
            "abilities": [asdict(ability) for ability in self.abilities],
            "bundle": self.bundle,
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
            "can_run": self.can_run,
        }


@dataclass(frozen=True)
class _Answer:
    """What a child process found out."""

    values: dict[str, Any] | None
    error: str = ""

    @property
    def good(self) -> dict[str, Any]:
        return self.values or {}


Ask = Callable[..., _Answer]
"""Runs a probe of `doctor_probes` by name, with its arguments."""


def ask(probe: str, *arguments: str) -> _Answer:
    """Run a probe in a child process, so that no crash of a library reaches ours."""
    reader, writer = os.pipe()
    program = (
        f"import sys; sys.path[:] = {_import_path()!r}; "
        "from stts_export import doctor_probes; "
        "doctor_probes.main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])"
    )
    command = [sys.executable, "-c", program, probe, str(writer), *arguments]
    with os.fdopen(reader, encoding="utf-8") as answers:
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, pass_fds=(writer,), timeout=_TIMEOUT, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return _Answer(None, f"no answer within {_TIMEOUT:g} s")
        except OSError as error:
            return _Answer(None, f"no process could be started: {error}")
        finally:
            os.close(writer)
        text = answers.read()
    try:
        answer = json.loads(text)
    except ValueError:
        return _Answer(None, _death(done))
    return _Answer(answer.get("values"), answer.get("error", ""))


def _import_path() -> list[str]:
    """What the child imports from, in this process's order."""
    return [*filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *sys.path]


def _death(done: subprocess.CompletedProcess[bytes]) -> str:
    last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
    if done.returncode < 0:
        ended = f"crashed ({signal.Signals(-done.returncode).name})"
    else:
        ended = f"ended with status {done.returncode}"
    return ": ".join([f"the process that tried it {ended}", *last])


@dataclass
class _Machine:
    """What later findings depend on."""

    sms: list[str] = field(default_factory=list)
    """Of the GPUs, such as sm87."""
    cuda_python: bool = False
    no_gpu: str = ""
    jetson: bool = False
    ort: dict[str, Any] = field(default_factory=dict)
    no_ort: str = ""
    ort_fix: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    """Of TensorRT and TensorRT for RTX that load."""
    no_library: dict[str, str] = field(default_factory=dict)
    no_plugin: str = ""
    lacking: dict[str, list[str]] = field(default_factory=dict)
    """Packages that are missing or too old, by extra."""


def diagnose(bundle: Path | None = None, *, plugin: Path | None = None) -> Diagnosis:
    """Look at this machine.

    Args:
        bundle: to say whether it runs here.
        plugin: library to try in place of the one that would be found.

    Raises:
        InputError: there is no such bundle, or it is damaged.
    """
    machine = _Machine()
    sections: Sequence[tuple[str, Callable[[], Iterable[Finding]]]] = (
        ("python", lambda: _python(machine)),
        ("packages", lambda: _packages(machine)),
        ("machine", _resources),
        ("jetson", lambda: _jetson(machine)),
        ("gpu", lambda: _gpu(machine)),
        ("onnxruntime", lambda: _onnxruntime(machine)),
        ("tensorrt", lambda: _libraries(machine)),
        ("plugin", lambda: _plugin(machine, plugin, bundle)),
        ("video", _video),
    )
    findings: list[Finding] = []
    for section, look in sections:
        try:
            findings += look()
        except Exception as error:  # a bug, or a machine unlike any known: the others go on
            findings.append(
                Finding(section, "probe", GAP, f"failed: {type(error).__name__}: {error}")
            )
    abilities = tuple(_abilities(machine))
    if bundle is None:
        return Diagnosis(tuple(findings), abilities)
    return Diagnosis(
        tuple(findings), abilities, str(bundle), tuple(_verdicts(bundle, machine, abilities))
    )


# --- Python and packages ------------------------------------------------------------------------


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """Leading numbers of a version: (2, 13, 0) of "2.13.0+cpu"."""
    numbers: list[int] = []
    for part in version.replace("+", ".").split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def _text(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _python(machine: _Machine) -> Iterable[Finding]:
    where = "virtual environment" if sys.prefix != sys.base_prefix else "system"
    yield Finding(
        "python", "Python", OK, f"{platform.python_version()}, {platform.machine()}, {where}"
    )
    for package, oldest in REQUIRED["runtime"].items():
        yield _package("python", package, oldest, "pip install stts-export", machine, "runtime")


def _packages(machine: _Machine) -> Iterable[Finding]:
    for extra in ("export", "train"):
        for package, oldest in REQUIRED[extra].items():
            if extra == "train" and package in REQUIRED["export"]:
                _package(extra, package, oldest, "", machine, extra)
                continue
            yield _package(
                "packages", package, oldest, f"pip install 'stts-export[{extra}]'", machine, extra
            )


def _package(
    section: str, package: str, oldest: tuple[int, ...], fix: str, machine: _Machine, extra: str
) -> Finding:
    version = _version(package)
    if version is not None and _numbers(version) >= oldest:
        return Finding(section, package, OK, version)
    machine.lacking.setdefault(extra, []).append(package)
    state = GAP if extra == "runtime" else INFO
    if version is None:
        return Finding(section, package, state, "not installed", fix)
    newer = f"pip install --upgrade '{package}>={_text(oldest)}'"
    return Finding(section, package, GAP, f"{version}, too old: {_text(oldest)} or newer", newer)


def _resources() -> Iterable[Finding]:
    free, total = available_memory(), total_memory()
    if free is None or total is None:
        yield Finding("machine", "memory", INFO, "unknown")
    else:
        text = f"{readable_size(free)} available of {readable_size(total)}"
        yield Finding("machine", "memory", OK, text)
    try:
        here = Path.cwd()
        usage = shutil.disk_usage(here)
    except OSError as error:
        text = f"the working folder cannot be used: {error.strerror}"
        yield Finding("machine", "disk", GAP, text, "cd to a folder that is there")
        return
    yield Finding("machine", "disk", OK, f"{readable_size(usage.free)} free in {here}")


# --- GPU ----------------------------------------------------------------------------------------


def _read(path: str) -> str | None:
    try:
        text = (_ROOT / path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.replace("\0", "").strip()


def _jetson(machine: _Machine) -> Iterable[Finding]:
    model, release = _read("proc/device-tree/model"), _read("etc/nv_tegra_release")
    if release is None and (model is None or "jetson" not in model.lower()):
        return
    machine.jetson = True
    yield Finding("jetson", "model", OK, model or "unknown")
    if release is None:
        yield Finding("jetson", "L4T", INFO, "no /etc/nv_tegra_release: not NVIDIA's system image")
        return
    first = release.splitlines()[0]
    words = first.replace("#", " ").replace(",", " ").split()
    major = next((w for w in words if w[:1] == "R" and w[1:].isdigit()), "R?")
    minor = words[words.index("REVISION:") + 1] if "REVISION:" in words else "?"
    jetpack = {"R35": "JetPack 5", "R36": "JetPack 6", "R38": "JetPack 7", "R39": "JetPack 7"}
    text = f"{major}.{minor} ({jetpack.get(major, 'unknown JetPack')})"
    if major == "R35":
        fix = "flash JetPack 6.2 or newer: TensorRT 10.3 is the oldest that works"
        yield Finding("jetson", "L4T", GAP, text, fix)
    else:
        yield Finding("jetson", "L4T", OK, text)


def _gpu(machine: _Machine) -> Iterable[Finding]:
    kernel = _read("proc/driver/nvidia/version")
    driver, through = ask("cuda_driver"), ask("cuda_python")
    machine.cuda_python = through.values is not None
    found = driver.good or through.good
    if kernel is not None:
        yield Finding("gpu", "kernel driver", OK, _driver_release(kernel))
    if not found:
        machine.no_gpu = driver.error or through.error
        fix = "install NVIDIA's driver (https://www.nvidia.com/drivers)"
        if kernel is not None or machine.jetson:
            fix = "reboot, or run the container with --gpus all (Jetson: --runtime nvidia)"
        state = GAP if kernel is not None or machine.jetson else INFO
        yield Finding("gpu", "CUDA driver", state, f"none: {machine.no_gpu}", fix)
    else:
        yield Finding("gpu", "CUDA driver", OK, f"supports CUDA {found['cuda']}")
    for index, gpu in enumerate(found.get("gpus", ())):
        machine.sms.append(gpu["sm"])
        memory = f"{readable_size(gpu['memory'])}, " if gpu["memory"] else ""
        major, minor = gpu["sm"][2:-1], gpu["sm"][-1]
        text = f"{gpu['name']}, {memory}compute capability {major}.{minor} ({gpu['sm']})"
        yield Finding("gpu", f"cuda:{index}", OK, text)
    if found and not machine.sms:
        machine.no_gpu = "the driver sees no GPU"
        fix = "check CUDA_VISIBLE_DEVICES and `nvidia-smi -L`"
        yield Finding("gpu", "GPUs", GAP, machine.no_gpu, fix)
    version = _version("cuda-python") or _version("cuda-bindings")
    if machine.cuda_python:
        yield Finding("gpu", "cuda-python", OK, str(through.good["version"]))
    elif version is None:
        fix = "pip install 'cuda-python>=12.6.2'"
        state = GAP if machine.sms else INFO
        yield Finding("gpu", "cuda-python", state, "not installed", fix)
    elif machine.sms:
        fix = f"pip install 'cuda-python<={found['cuda']}.99'"
        yield Finding("gpu", "cuda-python", GAP, f"{version}: {through.error}", fix)
    else:
        yield Finding("gpu", "cuda-python", INFO, version)


def this_gpu() -> Device | None:
    """The first GPU of this machine, as `estimate` plans with it; None when there is none."""
    gpus = ask("cuda_driver").good.get("gpus", ())
    if not gpus:
        return None
    gpu, model = gpus[0], _read("proc/device-tree/model") or ""
    unified = "jetson" in model.lower() or bool(gpu["unified"])
    rtx = gpu["sm"] in tensorrt_rtx.TARGETS and importlib.util.find_spec("tensorrt") is None
    answer = ask("library", MODULES[TENSORRT]).good
    version = (*_numbers(str(answer.get("version", ""))), 0, 0)
    known = (version[0], version[1]) if version[0] else None
    return Device(
        THIS, f"this machine's {gpu['name']}", gpu["memory"], unified, gpu["sm"],
        TENSORRT_RTX if rtx else TENSORRT, None if rtx else known,
        "the driver",
    )  # fmt: skip


def _driver_release(text: str) -> str:
    """The release in /proc/driver/nvidia/version."""
    words = text.splitlines()[0].split()
    return next((word for word in words if word.count(".") >= 1 and word[0].isdigit()), words[-1])


# --- ONNX Runtime -------------------------------------------------------------------------------


def _onnxruntime(machine: _Machine) -> Iterable[Finding]:
    versions = {name: _version(name) for name in _WHEELS}
    installed = {name: version for name, version in versions.items() if version is not None}
    oldest = _text(MIN_VERSION)
    spec = importlib.util.find_spec(ONNXRUNTIME)
    if spec is None:
        machine.no_ort, machine.ort_fix = "not installed", _install_ort(machine)
        yield Finding("onnxruntime", "onnxruntime", GAP, "not installed", machine.ort_fix)
        return
    lies = _what_lies_there(Path(spec.origin).parent if spec.origin else None)
    listed = " and ".join(f"{name} {version}" for name, version in installed.items())
    answer = ask("onnxruntime")
    machine.ort = answer.good
    mixed = _mixed(installed, lies)
    if mixed:
        machine.ort_fix = _reinstall(machine)
        yield Finding(
            "onnxruntime", "onnxruntime", GAP,
            f"{listed or 'no wheel'} installed, one over the other: {mixed}", machine.ort_fix,
        )  # fmt: skip
    elif answer.values is not None:
        kind = "GPU build" if lies["gpu"] else "CPU build"
        yield Finding("onnxruntime", "onnxruntime", OK, f"{listed or lies['version']}, {kind}")
    if answer.values is None:
        machine.no_ort = f"does not load: {answer.error}"
        machine.ort_fix = _reinstall(machine)
        yield Finding("onnxruntime", "import", GAP, machine.no_ort, machine.ort_fix)
        return
    version = str(answer.good["version"])
    if _numbers(version)[:2] < MIN_VERSION:
        machine.no_ort = f"{version} is too old: {oldest} or newer"
        machine.ort_fix = _install_ort(machine, upgrade=True)
        yield Finding("onnxruntime", "version", GAP, machine.no_ort, machine.ort_fix)
        return
    if "CUDAExecutionProvider" in answer.good["providers"]:
        starts = "CUDAExecutionProvider" in answer.good["started"]
        text = "starts" if starts else "is in the build, and does not start here"
        yield Finding("onnxruntime", "CUDA provider", OK if starts else INFO, text)


def _what_lies_there(folder: Path | None) -> dict[str, Any]:
    """The build in the folder itself, whatever the installed wheels say.

    Returns:
        `package` and `version` as the files say (None when they do not), `gpu`: whether the CUDA
        provider's library is there.
    """
    lies: dict[str, Any] = {"package": None, "version": None, "gpu": False}
    if folder is None:
        return lies
    lies["gpu"] = (folder / "capi" / _CUDA_LIBRARY).is_file()
    try:
        text = (folder / "capi" / "build_and_package_info.py").read_text(encoding="utf-8")
    except OSError:
        return lies
    for line in text.splitlines():
        name, _, value = line.partition("=")
        key = {"package_name": "package", "__version__": "version"}.get(name.strip())
        if key:
            lies[key] = value.strip().strip("'\"")
    return lies


def _mixed(installed: dict[str, str], lies: dict[str, Any]) -> str:
    """Say how the files differ from what is installed; empty when they do not."""
    package, version = lies["package"], lies["version"]
    there = f"the files are those of {package} {version}"
    if len(installed) > 1:
        cuda = "with" if lies["gpu"] else "without"
        return f"{there}, {cuda} {_CUDA_LIBRARY}"
    for name, expected in installed.items():
        if package is not None and package != name:
            return there
        if version is not None and version != expected:
            return there
        if name == "onnxruntime-gpu" and not lies["gpu"]:
            return f"{_CUDA_LIBRARY} is missing"
    return ""


def _wanted_wheel(machine: _Machine) -> str:
    return "onnxruntime-gpu" if machine.sms and not machine.jetson else "onnxruntime"


def _reinstall(machine: _Machine) -> str:
    """Both wheels have to go, or uninstalling one takes files of the other."""
    wheel = f"'{_wanted_wheel(machine)}>={_text(MIN_VERSION)}'"
    return f"pip uninstall -y {' '.join(_WHEELS)} && pip install --no-cache-dir {wheel}"


def _install_ort(machine: _Machine, *, upgrade: bool = False) -> str:
    if _numbers(platform.python_version()) < (3, 11):
        return (
            f"use Python 3.11 or newer: onnxruntime {_text(MIN_VERSION)} has no wheel for "
            f"{platform.python_version()}; engines run with this one"
        )
    if upgrade and _version("onnxruntime-gpu"):
        return f"pip install --upgrade 'onnxruntime-gpu>={_text(MIN_VERSION)}'"
    if upgrade:
        return f"pip install --upgrade 'onnxruntime>={_text(MIN_VERSION)}'"
    extra = "gpu" if _wanted_wheel(machine) == "onnxruntime-gpu" else "cpu"
    return f"pip install 'stts-export[{extra}]'"


# --- TensorRT -----------------------------------------------------------------------------------

_NAMES = {TENSORRT: "TensorRT", TENSORRT_RTX: "TensorRT for RTX"}


def _install_library(backend: str, machine: _Machine) -> str:
    """The command for this machine, of those that `INSTALL` has for all."""
    if backend == TENSORRT_RTX:
        return INSTALL[backend]
    if machine.jetson:
        return (
            "sudo apt install python3-libnvinfer, and make the virtual environment with "
            "python3 -m venv --system-site-packages"
        )
    return "pip install 'stts-export[trt]' --extra-index-url https://pypi.nvidia.com"


def _libraries(machine: _Machine) -> Iterable[Finding]:
    for backend, module in MODULES.items():
        yield from _library(backend, module, machine)


def _library(backend: str, module: str, machine: _Machine) -> Iterable[Finding]:
    name = _NAMES[backend]
    answer = ask("library", module)
    if answer.values is None:
        problem = answer.error
        absent = f"No module named '{module}'" in problem
        machine.no_library[backend] = "not installed" if absent else f"does not load: {problem}"
        wanted = machine.jetson and backend == TENSORRT
        state = INFO if absent and not wanted else GAP
        yield Finding(
            "tensorrt", name, state, machine.no_library[backend], _install_library(backend, machine)
        )
        return
    version = str(answer.good["version"])
    if backend == TENSORRT:
        low, high = tensorrt.OLDEST, tensorrt.NEWEST_MAJOR
        if _numbers(version)[:2] < low or _numbers(version)[0] > high:
            problem = f"{version}: {_text(low)} to {high}.x is needed"
            machine.no_library[backend] = problem
            yield Finding("tensorrt", name, GAP, problem, _install_library(backend, machine))
            return
    machine.versions[backend] = version
    trouble = [
        f"its {what} does not start ({answer.good[what]})"
        for what in ("builder", "runtime")
        if answer.good[what]
    ]
    if trouble and machine.sms:
        machine.no_library[backend] = f"{version}: {'; '.join(trouble)}"
        fix = f"install a {name} for the driver's CUDA: {_install_library(backend, machine)}"
        yield Finding("tensorrt", name, GAP, machine.no_library[backend], fix)
        return
    text = f"{version}; {'; '.join(trouble)}, as there is no GPU" if trouble else version
    yield Finding("tensorrt", name, INFO if trouble else OK, text)


def _plugin(machine: _Machine, given: Path | None, bundle: Path | None) -> Iterable[Finding]:
    try:
        path = find_plugin(given, bundle)
    except SttsError as error:
        machine.no_plugin = f"{error.where}: {error.message}" if error.where else error.message
        wanted = TENSORRT in machine.versions and bool(machine.sms)
        missing = isinstance(error, MissingDependencyError)
        state = GAP if wanted or not missing else INFO
        looked = f" (looked in {error.allowed})" if missing and error.allowed else ""
        yield Finding("plugin", PLUGIN_FILE, state, f"{error.message}{looked}", error.fix)
        return
    architectures = _architectures(path)
    yield Finding("plugin", PLUGIN_FILE, OK, f"{path}, for {architectures or 'unknown GPUs'}")
    if TENSORRT not in machine.versions:
        return
    answer = ask("plugin", str(path))
    if answer.values is None:
        machine.no_plugin = f"TensorRT does not take it: {answer.error}"
        fix = f"make plugin, in a source checkout; or set {PLUGIN_VARIABLE} to another one"
        yield Finding("plugin", "registry", GAP, machine.no_plugin, fix)
    else:
        yield Finding("plugin", "registry", OK, f"loads in TensorRT {machine.versions[TENSORRT]}")


def _architectures(path: Path) -> str:
    """GPU architectures of the cubins in a library: the names that nvcc leaves in it."""
    content = path.read_bytes()
    found = set()
    for part in content.split(b"sm_")[1:]:
        digits = part[: len(part[:4]) - len(part[:4].lstrip(b"0123456789"))]
        if len(digits) in (2, 3):
            found.add(int(digits))
    return ", ".join(f"sm{number}" for number in sorted(found))


# --- Video --------------------------------------------------------------------------------------


def _video() -> Iterable[Finding]:
    answer = ask("hardware_decode")
    if answer.values is not None:
        yield Finding("video", "hardware decode", OK, f"on {answer.good['device']}")
    else:
        text = f"no ({answer.error}); video is decoded on the CPU"
        yield Finding("video", "hardware decode", INFO, text)


# --- What can be done ---------------------------------------------------------------------------


def _abilities(machine: _Machine) -> Iterable[Ability]:
    yield _can_export(machine)
    yield _can_run_ort(machine, "cpu")
    yield _can_run_ort(machine, "cuda")
    for backend in (TENSORRT, TENSORRT_RTX):
        yield _can_build(backend, machine)
        yield _can_run_engines(backend, machine)


def _lacks_runtime(machine: _Machine) -> str:
    return ", ".join(machine.lacking.get("runtime", ()))


def _can_export(machine: _Machine) -> Ability:
    what = "build graphs from a checkpoint"
    lacking = [*machine.lacking.get("runtime", ()), *machine.lacking.get("export", ())]
    if lacking:
        why = f"needs {', '.join(dict.fromkeys(lacking))}"
        return Ability(ONNXRUNTIME, what, False, why, "pip install 'stts-export[cpu,export]'")
    if machine.no_ort:
        return Ability(ONNXRUNTIME, what, False, f"onnxruntime: {machine.no_ort}", machine.ort_fix)
    return Ability(ONNXRUNTIME, what, True)


def _can_run_ort(machine: _Machine, device: str) -> Ability:
    name = f"{ONNXRUNTIME} ({device})"
    if _lacks_runtime(machine):
        why = f"needs {_lacks_runtime(machine)}"
        return Ability(name, "run", False, why, "pip install stts-export")
    if machine.no_ort:
        return Ability(name, "run", False, machine.no_ort, machine.ort_fix)
    if device == "cpu":
        return Ability(name, "run", True)
    if not machine.sms:
        return Ability(name, "run", False, f"no GPU: {machine.no_gpu}")
    if "CUDAExecutionProvider" in machine.ort.get("started", ()):
        return Ability(name, "run", True)
    if "CUDAExecutionProvider" in machine.ort.get("providers", ()):
        why = "its CUDA provider does not start: CUDA's libraries or cuDNN are missing"
        return Ability(name, "run", False, why, "pip install 'onnxruntime-gpu[cuda,cudnn]'")
    return Ability(name, "run", False, "the CPU build is installed", _reinstall(machine))


def _can_build(backend: str, machine: _Machine) -> Ability:
    what = "build engines"
    if backend in machine.no_library:
        why = machine.no_library[backend]
        return Ability(backend, what, False, why, _install_library(backend, machine))
    if backend == TENSORRT_RTX:
        return Ability(backend, what, True, f"for {', '.join(tensorrt_rtx.TARGETS)}")
    return _with_gpu(backend, what, machine)


def _can_run_engines(backend: str, machine: _Machine) -> Ability:
    if _lacks_runtime(machine):
        why = f"needs {_lacks_runtime(machine)}"
        return Ability(backend, "run", False, why, "pip install stts-export")
    if backend in machine.no_library:
        return Ability(
            backend, "run", False, machine.no_library[backend], _install_library(backend, machine)
        )
    return _with_gpu(backend, "run", machine)


def _with_gpu(backend: str, what: str, machine: _Machine) -> Ability:
    """What takes a GPU: and for TensorRT the plugin, if the model removes windows."""
    if not machine.sms:
        return Ability(backend, what, False, f"no GPU: {machine.no_gpu}")
    if not machine.cuda_python:
        why = "cuda-python is missing or does not start"
        return Ability(backend, what, False, why, "pip install 'cuda-python>=12.6.2'")
    if backend == TENSORRT_RTX and not set(machine.sms) & set(tensorrt_rtx.TARGETS):
        why = f"not for {machine.sms[0]}: it knows {', '.join(tensorrt_rtx.TARGETS)}"
        return Ability(backend, what, False, why, _install_library(TENSORRT, machine))
    if backend == TENSORRT and machine.no_plugin:
        why = f"models with a scorer need the plugin: {machine.no_plugin}"
        return Ability(backend, what, False, why, "make plugin")
    return Ability(backend, what, True, f"on {', '.join(dict.fromkeys(machine.sms))}")


def _verdicts(folder: Path, machine: _Machine, abilities: tuple[Ability, ...]) -> Iterable[Verdict]:
    """Say for every target of a bundle whether it runs here."""
    from stts_export.bundle import Bundle

    bundle = Bundle.open(folder)
    runs = {ability.backend: ability for ability in abilities if ability.action == "run"}
    sets = {engines.folder.name: engines for engines in bundle.engine_sets()}
    for target in bundle.manifest.targets:
        if target not in sets:
            cpu, cuda = runs[f"{ONNXRUNTIME} (cpu)"], runs[f"{ONNXRUNTIME} (cuda)"]
            devices = "cpu and cuda" if cuda.possible else "cpu"
            why = f"on {devices}" if cpu.possible else cpu.why
            yield Verdict(target, cpu.possible, why, cpu.fix)
            continue
        engines = sets[target]
        ability = runs[engines.backend]
        if not ability.possible:
            yield Verdict(target, False, ability.why, ability.fix)
            continue
        here = [
            folder_name(engines.backend, machine.versions[engines.backend], sm)
            for sm in machine.sms
        ]
        if target in here:
            yield Verdict(target, True, f"on cuda:{here.index(target)}")
            continue
        version = machine.versions[engines.backend]
        why = f"this machine has {engines.backend} {version} and {', '.join(machine.sms)}"
        fix = f"stts-export build {folder} -o NEW_BUNDLE --backend {engines.backend}"
        yield Verdict(target, False, why, fix)


# --- For people ---------------------------------------------------------------------------------

_MARKS = {OK: "ok", INFO: "-", GAP: "!!"}


def diagnosis_text(diagnosis: Diagnosis) -> str:
    """Format what `diagnose` returned for reading."""
    width = max(len(finding.name) for finding in diagnosis.findings)
    lines: list[str] = []
    section = ""
    for finding in diagnosis.findings:
        if finding.section != section:
            section = finding.section
            lines.append(section)
        lines.append(f"  {_MARKS[finding.state]:2} {finding.name:{width}}  {finding.found}")
        if finding.fix and finding.state == GAP:
            lines.append(f"     {'':{width}}  fix: {finding.fix}")
    lines.append("what can be done here")
    width = max(len(f"{a.backend}: {a.action}") for a in diagnosis.abilities)
    for ability in diagnosis.abilities:
        what, answer = f"{ability.backend}: {ability.action}", "yes" if ability.possible else "no"
        lines.append(f"  {what:{width}}  {answer:3}  {ability.why}".rstrip())
        if ability.fix and not ability.possible:
            lines.append(f"  {'':{width}}       fix: {ability.fix}")
    if diagnosis.bundle is not None:
        lines.append(diagnosis.bundle)
        for verdict in diagnosis.verdicts:
            answer = "runs" if verdict.runs else "does not run"
            lines.append(f"  {verdict.target}: {answer} here ({verdict.why})")
            if verdict.fix and not verdict.runs:
                lines.append(f"    fix: {verdict.fix}")
    return "\n".join(lines)
