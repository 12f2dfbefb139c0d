"""What the build gives and refuses: the shipped .so is built and read, wrong settings are tried."""

from __future__ import annotations

import os
import re
import shutil
import stat
import sys
from collections.abc import Iterable
from importlib.metadata import requires
from pathlib import Path

import pytest

from stts_export import __version__
from stts_export.limits import MAX_ENGINE_FRAMES
from tests.trt_plugins.conftest import ROOT, run

CHECK = ROOT / "cmake" / "check_library.py"
ARCHITECTURES = {80, 86, 87, 89, 90, 100, 110, 120}
EXPORTS = {"getCreators", "setLoggerFinder", "sttsPluginsVersion"}
HEADERS = [Path(part) for part in os.environ.get("STTS_TENSORRT_HEADERS", "").split(":") if part]
QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
CUDA_TARGET_ROOT = os.environ.get("STTS_CUDA_TARGET_ROOT", str(ROOT / "build" / "cuda-aarch64"))
needs_cross_compiler = pytest.mark.skipif(
    not shutil.which("aarch64-linux-gnu-g++"),
    reason="no aarch64-linux-gnu-g++ (Debian: apt install g++-aarch64-linux-gnu)",
)


def check_library(library: Path, *options: str) -> tuple[int, str]:
    return run(sys.executable, CHECK, *options, library)


def listed(text: str, what: str) -> set[int]:
    match = re.search(rf"{what}([0-9, ]+)", text)
    assert match, text
    return {int(number) for number in match.group(1).split(",")}


def real_nvcc(build: Path) -> str:
    match = re.search(
        r"^CMAKE_CUDA_COMPILER:\w+=(.*)$", (build / "CMakeCache.txt").read_text(), re.MULTILINE
    )
    assert match
    return match.group(1)


def script(path: Path, lines: Iterable[str]) -> Path:
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]), encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def tensorrt_headers(folder: Path, version: str) -> Path:
    (folder / "include").mkdir(parents=True)
    parts = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
    lines = [f"#define NV_TENSORRT_{name} {number} //!< {name}." for name, number in parts]
    (folder / "include" / "NvInferVersion.h").write_text("\n".join(lines), encoding="utf-8")
    for name in ("NvInfer.h", "NvInferRuntime.h"):
        (folder / "include" / name).write_text("", encoding="utf-8")
    return folder


# --- the library


def test_exports_are_what_tensorrt_and_python_call_and_nothing_else(plugin: Path) -> None:
    status, symbols = run("nm", "--dynamic", "--defined-only", plugin)
    assert status == 0, symbols
    assert {line.split()[-1] for line in symbols.splitlines()} == EXPORTS


def test_needs_no_library_of_tensorrt_or_cuda(plugin: Path) -> None:
    status, dynamic = run("readelf", "--dynamic", plugin)
    assert status == 0, dynamic
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    assert "libstdc++.so.6" in needed  # shared: two C++ libraries in one process must agree
    assert not [name for name in needed if re.search(r"nvinfer|cuda|cudart", name)]
    assert not re.search(r"RPATH|RUNPATH|TEXTREL", dynamic)


def test_has_code_for_every_architecture(plugin: Path, plugin_build: Path) -> None:
    status, said = check_library(plugin)
    assert status == 0, said
    left_out = re.search(r"left out: ([^(]*)\(", (plugin_build / "configure.log").read_text())
    unknown = re.findall("[0-9]+", left_out.group(1)) if left_out else []
    expected = ARCHITECTURES - {int(number) for number in unknown}
    assert listed(said, "cubins sm_") == expected
    assert listed(said, "PTX compute_") == {max(expected)}


def test_version_is_the_packages(plugin: Path) -> None:
    # In a process of its own: this one must not keep the library.
    code = (
        "import ctypes, sys; f = ctypes.CDLL(sys.argv[1]).sttsPluginsVersion; "
        "f.restype = ctypes.c_char_p; print(f().decode())"
    )
    assert run(sys.executable, "-c", code, plugin) == (0, f"{__version__}\n")


# --- cmake/check_library.py


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cubins", "75,80"], "no cubin for sm_75; it has 80, 86"),
        (["--ptx", "80"], "no PTX for compute_80; it has"),
        (["--exports", "getCreators"], "not allowed setLoggerFinder, sttsPluginsVersion"),
        (["--exports", "getCreators,setLoggerFinder,sttsPluginsVersion,x"], "missing x;"),
        (["--max", "GLIBC=2.2"], "at most 2.2 is allowed"),
    ],
)
def test_check_says_what_is_wrong(plugin: Path, options: list[str], message: str) -> None:
    status, said = check_library(plugin, *options)
    assert (status, len(said.splitlines())) == (1, 1)
    assert message in said


def test_check_finds_a_changed_architecture_and_deletes_the_library(
    plugin: Path, tmp_path: Path
) -> None:
    image = bytearray(plugin.read_bytes())
    # An entry of a fatbin: kind 2, ..., architecture at byte 28.
    entries = [match.start() for match in re.finditer(rb"\x02\x00\x01\x01", bytes(image))]
    changed = [at for at in entries if image[at + 28 : at + 32] == bytes([87, 0, 0, 0])]
    assert changed
    for at in changed:
        image[at + 28] = 88
    copy = tmp_path / "libstts_plugins.so"
    copy.write_bytes(image)
    status, said = check_library(copy, "--cubins", "80,87", "--delete-on-failure")
    assert status == 1
    assert "no cubin for sm_87; it has 80, 86, 88" in said
    assert not copy.exists()


def test_check_finds_a_dependency_on_cuda(tmp_path: Path) -> None:
    for name, needs in (("libcudart.so.13", []), ("libstts_plugins.so", ["-Wl,--no-as-needed"])):
        source = tmp_path / "empty.c"
        source.write_text("int stts_nothing;\n", encoding="utf-8")
        libraries = [tmp_path / "libcudart.so.13"] if needs else [f"-Wl,-soname,{name}"]
        status, said = run("cc", "-shared", "-o", tmp_path / name, source, *needs, *libraries)
        assert status == 0, said
    status, said = check_library(tmp_path / "libstts_plugins.so")
    assert status == 1
    assert "needs libcudart.so.13, which must be linked statically" in said


@pytest.mark.parametrize("keep", [0, 10, 70, 5000, -100])
def test_check_refuses_damaged_files(plugin: Path, tmp_path: Path, keep: int) -> None:
    copy = tmp_path / "cut.so"
    copy.write_bytes(plugin.read_bytes()[:keep])
    status, said = check_library(copy)
    assert (status, len(said.splitlines())) == (1, 1)
    assert re.search("not a 64-bit little-endian ELF file|damaged ELF file", said)


# --- the build


def test_build_stops_when_the_compiler_leaves_an_architecture_out(
    plugin_build: Path, tmp_path: Path
) -> None:
    nvcc = script(
        tmp_path / "nvcc",
        [
            "for word; do",
            "    shift",
            '    case "$word" in *compute_90*) ;; *) set -- "$@" "$word" ;; esac',
            "done",
            f'exec "{real_nvcc(plugin_build)}" "$@"',
        ],
    )
    build = tmp_path / "build"
    options = ["-DCMAKE_CUDA_ARCHITECTURES=80-real;90-real", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    status, said = run("cmake", "--preset", "release", "-B", build, *options)
    assert status == 0, said
    status, said = run("cmake", "--build", build)
    assert status != 0
    assert "no cubin for sm_90; it has 80" in said
    assert not (build / "libstts_plugins.so").exists()


def test_nvcc_12_6_gives_what_it_can_and_says_what_is_left_out(
    plugin_build: Path, tmp_path: Path
) -> None:
    real = real_nvcc(plugin_build)
    nvcc = script(
        tmp_path / "nvcc",
        [
            'case "$*" in',
            "--version) echo 'nvcc: NVIDIA (R) Cuda compiler driver'",
            "    echo 'Cuda compilation tools, release 12.6, V12.6.85' ;;",
            "--list-gpu-code) for i in 50 60 70 75 80 86 87 89 90; do echo sm_$i; done ;;",
            f'*) exec "{real}" "$@" ;;',
            "esac",
        ],
    )
    status, said = run(
        "cmake", "--preset", "release", "-B", tmp_path / "build", f"-DCMAKE_CUDA_COMPILER={nvcc}"
    )
    assert status == 0, said
    assert "left out: sm_100, sm_110, sm_120 (nvcc 12.6 does not know" in said
    chosen = re.search("CMAKE_CUDA_ARCHITECTURES +(.*)\n", said)
    assert chosen
    assert chosen.group(1) == "80-real;86-real;87-real;89-real;90-real;90-virtual"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("echo 'Cuda compilation tools, release 12.4, V12.4.1'", "is version 12.4; 12.6 or newer"),
        ("echo clang version 19", "is no nvcc"),
        ("echo broken >&2; exit 3", "failed (3)"),
    ],
)
def test_unusable_nvcc_is_refused(tmp_path: Path, answer: str, message: str) -> None:
    nvcc = script(tmp_path / "nvcc", [answer])
    status, said = run(
        "cmake", "--preset", "release", "-B", tmp_path / "build", f"-DCMAKE_CUDA_COMPILER={nvcc}"
    )
    assert status != 0
    assert message in " ".join(said.split())


def test_unknown_architecture_names_are_refused(tmp_path: Path) -> None:
    status, said = run(
        "cmake", "--preset", "release", "-B", tmp_path, "-DCMAKE_CUDA_ARCHITECTURES=80;sm_90"
    )
    assert status != 0
    assert "'sm_90' is no architecture number" in " ".join(said.split())


@pytest.mark.parametrize(
    ("version", "options", "message"),
    [
        ("", [], "no NvInfer.h in it or in its include/"),
        ("10.2.0", [], "is TensorRT 10.2.0; 10.3 or newer is needed"),
        ("8.6.1", ["-DSTTS_REQUIRE_TENSORRT_HEADERS=ON"], "is TensorRT 8.6.1; 10.3 or newer"),
    ],
)
def test_wrong_tensorrt_root_is_refused(
    tmp_path: Path, version: str, options: list[str], message: str
) -> None:
    root = tensorrt_headers(tmp_path / "tensorrt", version) if version else tmp_path
    status, said = run(
        "cmake", "--preset", "tests", "-B", tmp_path / "build", f"-DTENSORRT_ROOT={root}", *options
    )
    assert status != 0
    assert message in " ".join(said.split())


@pytest.mark.parametrize("version", ["10.3.0", "10.16.1", "11.1.0"])
def test_tensorrt_root_is_taken_and_named(tmp_path: Path, version: str) -> None:
    root = tensorrt_headers(tmp_path / "tensorrt", version)
    status, said = run(
        "cmake", "--preset", "tests", "-B", tmp_path / "build", f"-DTENSORRT_ROOT={root}"
    )
    assert status == 0, said
    assert re.search(rf"TensorRT headers +{root}/include/NvInfer.h \({version}\)", said)


def test_missing_tensorrt_headers_are_said_or_refused(tmp_path: Path) -> None:
    if any(Path("/usr").glob("include/**/NvInfer.h")):
        pytest.skip("this machine has NvInfer.h")
    command = ["cmake", "--preset", "tests", "-B", str(tmp_path)]
    status, said = run(*command)
    assert status == 0, said
    assert re.search(r"TensorRT headers +own declarations .*: NvInfer.h not found", said)
    status, said = run(*command, "-DSTTS_REQUIRE_TENSORRT_HEADERS=ON")
    assert status != 0
    assert "Fix: -DTENSORRT_ROOT=FOLDER" in said


@pytest.mark.skipif(not HEADERS, reason="STTS_TENSORRT_HEADERS names no include folders")
@pytest.mark.parametrize("include", HEADERS, ids=str)
def test_builds_against_nvidias_headers(tmp_path: Path, include: Path) -> None:
    options = [f"-DTENSORRT_ROOT={include}", "-DCMAKE_CUDA_ARCHITECTURES=80"]
    for preset in ("release", "tests"):
        build = tmp_path / preset
        status, said = run("cmake", "--preset", preset, "-B", build, *options)
        assert status == 0, said
        assert f"{include}/NvInfer.h (1" in said
        status, said = run("cmake", "--build", build)
        assert status == 0, said
    status, said = run("ctest", "--test-dir", tmp_path / "tests", "--output-on-failure")
    assert status == 0, said


def test_presets_hold_no_path_of_a_machine() -> None:
    text = (ROOT / "CMakePresets.json").read_text(encoding="utf-8")
    assert not re.search(r'"[^"]*(/usr|/opt|/home|/work|/root)', text)


# --- the cross build


@needs_cross_compiler
def test_cross_build_without_the_targets_cuda_says_what_to_give(tmp_path: Path) -> None:
    status, said = run("cmake", "--preset", "aarch64", "-B", tmp_path)
    if status == 0:
        pytest.skip("this machine's CUDA has the target's folder")
    assert "Fix: -DSTTS_CUDA_TARGET_ROOT=FOLDER" in " ".join(said.split())


@needs_cross_compiler
@pytest.mark.skipif(
    not Path(CUDA_TARGET_ROOT, "lib", "libcudart_static.a").exists(),
    reason=f"no CUDA runtime for aarch64 in {CUDA_TARGET_ROOT} (make plugin-aarch64 fetches it)",
)
def test_cross_build_loads_on_ubuntu_22_04(tmp_path: Path) -> None:
    options = [f"-DSTTS_CUDA_TARGET_ROOT={CUDA_TARGET_ROOT}", "-DCMAKE_CUDA_ARCHITECTURES=87"]
    status, said = run("cmake", "--preset", "aarch64", "-B", tmp_path, *options)
    assert status == 0, said
    status, said = run("cmake", "--build", tmp_path)
    assert status == 0, said
    library = tmp_path / "libstts_plugins.so"
    assert library.read_bytes()[18:20] == b"\xb7\x00"  # e_machine: AArch64
    status, said = check_library(library, "--cubins", "87", "--max", "GLIBC=2.35")
    assert status == 0, said
    if QEMU:
        assert asked_under_qemu(library) == (0, __version__)


def asked_under_qemu(library: Path) -> tuple[int, str]:
    """What the library's sttsPluginsVersion says to an aarch64 program."""
    source, program = library.with_name("ask.cpp"), library.with_name("ask")
    source.write_text(
        "#include <dlfcn.h>\n#include <cstdio>\n"
        "int main(int, char** words) {\n"
        "    void* library = dlopen(words[1], RTLD_NOW);\n"
        "    if (library == nullptr) return std::puts(dlerror());\n"
        '    void* version = dlsym(library, "sttsPluginsVersion");\n'
        "    std::fputs(reinterpret_cast<const char* (*)()>(version)(), stdout);\n"
        "}\n",
        encoding="utf-8",
    )
    status, said = run("aarch64-linux-gnu-g++", "-o", program, source, "-ldl")
    assert status == 0, said
    assert QEMU
    return run(QEMU, "-L", "/usr/aarch64-linux-gnu", program, library)


@needs_cross_compiler
@pytest.mark.skipif(not QEMU, reason="no qemu-aarch64 (Debian: apt install qemu-user)")
def test_host_tests_pass_on_aarch64(tmp_path: Path) -> None:
    for command in (
        ["cmake", "--preset", "aarch64-tests", "-B", str(tmp_path)],
        ["cmake", "--build", str(tmp_path)],
        ["ctest", "--test-dir", str(tmp_path), "--output-on-failure", "--no-tests=error"],
    ):
        status, said = run(*command)
        assert status == 0, said


def test_plain_install_needs_no_cuda() -> None:
    plain = [line for line in requires("stts-export") or [] if "extra ==" not in line]
    assert plain
    assert not [line for line in plain if re.search("nvidia|cuda|cmake|tensorrt", line)]


def test_builds_refuse_clips_that_the_plugin_would_refuse():
    header = (ROOT / "trt_plugins" / "select_pack" / "select_pack_kernel.h").read_text()
    (most,) = re.findall(r"kMaxFrames = (\d+);", header)
    assert int(most) == MAX_ENGINE_FRAMES
