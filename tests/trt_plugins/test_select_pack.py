"""The plugin's algorithm, kernels and host code on the CPU, against the host planner."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from tests.trt_plugins.clips import Clip, awkward_clips, clip_of_counts, differences, random_clip
from tests.trt_plugins.cpu_build import LIBRARY, SOURCES, UNITS, build_cpu_library
from tests.trt_plugins.cpu_plugin import GUARD_DAMAGED, CpuPlugin, PluginError

ROOT = Path(__file__).parents[2]
NO_DEVICE = 100
LAUNCH_FAILURE = 719
NO_PLUGIN = -1
BUILD_REFUSED = -2
KERNELS = SOURCES / "select_pack"
PLAN, BLOCK, GATHER, KERNEL = "plan.cuh", "block.cuh", "gather.cuh", "select_pack_kernel.cu"


@pytest.fixture(scope="session")
def library(shared_folder: Path) -> Path:
    """The library of a CMake build that STTS_PLUGIN_TESTS_BUILD names, or one made here."""
    if "STTS_PLUGIN_TESTS_BUILD" in os.environ:
        return Path(os.environ["STTS_PLUGIN_TESTS_BUILD"]) / LIBRARY
    folder = shared_folder / "cpu_plugin"
    with FileLock(str(folder) + ".lock"):
        if not folder.exists():
            partial = folder.with_suffix(".partial")
            partial.mkdir(exist_ok=True)
            build_cpu_library(partial)
            partial.rename(folder)
    return folder / LIBRARY


@pytest.fixture
def cpu(library: Path) -> CpuPlugin:
    plugin = CpuPlugin(library)
    plugin.schedule(0)
    return plugin


def check(cpu: CpuPlugin, clip: Clip, threads: int | None = None) -> None:
    packed = cpu.plan(clip.scores, clip.kept, refill=clip.refill, threads=threads)
    assert not differences(packed, clip), str(clip)


# --- the algorithm


@pytest.mark.parametrize("seed", range(4))
def test_algorithm_equals_the_planner(cpu: CpuPlugin, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(1000):
        check(cpu, random_clip(rng))


def test_algorithm_equals_the_planner_on_large_clips(cpu: CpuPlugin) -> None:
    rng = np.random.default_rng(9)
    for _ in range(60):
        check(cpu, random_clip(rng, max_frames=512, max_windows=400))
    check(cpu, Clip(rng.random((512, 81), np.float32), 512 * 81 // 2, True))


def test_algorithm_equals_the_planner_on_every_count_of_frames(cpu: CpuPlugin) -> None:
    rng = np.random.default_rng(10)
    for frames in range(1, 513):
        scores = rng.random((frames, 9), np.float32)
        check(cpu, Clip(scores, int(rng.integers(1, scores.size + 1)), bool(frames % 2)))


@pytest.mark.parametrize("threads", [None, 32, 1024])
def test_awkward_clips(cpu: CpuPlugin, threads: int | None) -> None:
    for clip in awkward_clips():
        check(cpu, clip, threads)


def test_every_small_packing(cpu: CpuPlugin) -> None:
    for counts in np.ndindex(4, 4, 4, 4, 4):
        if sum(counts) > 0:
            check(cpu, clip_of_counts(list(counts), 3, refill=sum(counts) % 2 == 0))


def test_nothing_is_removed_when_all_are_kept(cpu: CpuPlugin) -> None:
    scores = np.full((3, 5), np.nan, np.float32)
    packed = cpu.plan(scores, 15)
    assert packed.kept_window.tolist() == list(range(15))
    assert packed.segment.tolist() == [[0] * 5, [1] * 5, [2] * 5]


# --- the kernel in an emulated block


@pytest.mark.parametrize("threads", [32, 64, 96, 256, 512, 1024])
def test_kernel_equals_the_planner(cpu: CpuPlugin, threads: int) -> None:
    rng = np.random.default_rng(threads)
    for schedule in range(25):
        cpu.schedule(schedule)
        check(cpu, random_clip(rng, 30, 100), threads)


def test_kernel_plans_a_whole_clip(cpu: CpuPlugin) -> None:
    scores = np.random.default_rng(3).random((300, 81), np.float32)
    check(cpu, Clip(scores, scores.size // 2, True), 1024)


def test_block_of_half_a_warp_is_refused(cpu: CpuPlugin) -> None:
    with pytest.raises(PluginError) as error:
        cpu.plan(np.zeros((2, 2), np.float32), 2, threads=16)
    assert error.value.status == 9  # cudaErrorInvalidConfiguration


@pytest.mark.parametrize("missing_bytes", [1, 4, 64])
def test_write_outside_of_the_workspace_is_found(cpu: CpuPlugin, missing_bytes: int) -> None:
    scores = np.zeros((4, 16), np.float32)
    check(cpu, Clip(scores, 64, True), 32)
    with pytest.raises(PluginError) as error:
        cpu.plan(scores, 64, threads=32, missing_bytes=missing_bytes)
    assert error.value.status == GUARD_DAMAGED


# --- the whole plugin


def hidden_of(rng: np.random.Generator, clip: Clip, patches: int, width: int, dtype: str):
    frames, windows = clip.scores.shape
    shape = (frames, windows * patches, width)
    if dtype == "bfloat16":
        return rng.integers(0, 2**16, shape, dtype=np.uint16)
    return rng.normal(size=shape).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("patches", "width"), [(9, 16), (1, 1), (3, 5), (9, 2), (2, 6), (4, 150)])
def test_plugin_moves_the_planned_windows(
    cpu: CpuPlugin, dtype: str, patches: int, width: int
) -> None:
    rng = np.random.default_rng(patches * width)
    for _ in range(4):
        clip = random_clip(rng, 12, 20)
        hidden = hidden_of(rng, clip, patches, width, dtype)
        launches = cpu.launches
        packed = cpu.select_pack(
            clip.scores, hidden, clip.kept, refill=clip.refill, hidden_type=dtype
        )
        assert cpu.launches == launches + 2
        assert not differences(packed, clip, hidden), str(clip)


@pytest.mark.parametrize("bins_shift", [0, 1, 2, 4])
@pytest.mark.parametrize("hidden_shift", [0, 1, 2, 4])
def test_plugin_moves_windows_between_any_addresses(
    cpu: CpuPlugin, hidden_shift: int, bins_shift: int
) -> None:
    rng = np.random.default_rng(12)
    clip = random_clip(rng, 12, 20)
    hidden = hidden_of(rng, clip, 2, 8, "float16")
    packed = cpu.select_pack(
        clip.scores, hidden, clip.kept, refill=clip.refill,
        hidden_shift=hidden_shift, bins_shift=bins_shift,
    )  # fmt: skip
    assert not differences(packed, clip, hidden), str(clip)


def test_result_does_not_depend_on_the_order_of_threads(cpu: CpuPlugin) -> None:
    rng = np.random.default_rng(8)
    clip = random_clip(rng, 20, 30)
    hidden = hidden_of(rng, clip, 2, 8, "float16")
    for schedule in range(10):
        cpu.schedule(schedule)
        packed = cpu.select_pack(clip.scores, hidden, clip.kept, refill=clip.refill)
        assert not differences(packed, clip, hidden)


@pytest.mark.parametrize(
    ("others", "error", "message"),
    [
        (0, NO_DEVICE, "no CUDA-capable device is detected"),
        (1, LAUNCH_FAILURE, "unspecified launch failure"),
    ],
)
def test_failed_launches_reach_the_caller(
    cpu: CpuPlugin, capfd: pytest.CaptureFixture[str], others: int, error: int, message: str
) -> None:
    scores, hidden = np.zeros((2, 4), np.float32), np.zeros((2, 8, 3), np.float32)
    cpu.fail_launch(others, error)
    with pytest.raises(PluginError) as caught:
        cpu.select_pack(scores, hidden, 4)
    assert caught.value.status == error
    assert capfd.readouterr().err == f"SttsSelectPack enqueue: {message}\n"
    assert len(cpu.select_pack(scores, hidden, 4).segment) == 1


@pytest.mark.parametrize(
    ("shape", "kept", "refill", "status", "message"),
    [
        ((2, 4), 4, 2, NO_PLUGIN, "attribute 'refill' is 2; it must be 0 or 1"),
        ((4097, 1), 4, 1, BUILD_REFUSED, "the number of frames is 4097; it must be in 1..4096"),
        ((1, 4097), 4, 1, BUILD_REFUSED, "the number of windows is 4097; it must be in 1..4096"),
        ((2, 4), 0, 1, 1, "the number of kept windows is 0; it must be in 1..8"),
        ((2, 4), 9, 1, 1, "the number of kept windows is 9; it must be in 1..8"),
    ],
)
def test_bad_clips_are_refused(
    cpu: CpuPlugin, capfd: pytest.CaptureFixture[str], shape: tuple[int, int], kept: int,
    refill: int, status: int, message: str,
) -> None:  # fmt: skip
    scores, hidden = np.zeros(shape, np.float32), np.zeros((*shape, 2), np.float16)
    with pytest.raises(PluginError) as caught:
        cpu.select_pack(scores, hidden, kept, refill=refill)
    assert caught.value.status == status
    assert message in capfd.readouterr().err


# --- the tests themselves


CHANGES = {
    "ties": (PLAN, "ties_before >= threshold", "ties_before > threshold"),
    "first-frame": (PLAN, "window < input.windows ?", "window < 0 ?"),
    "nan": (PLAN, "kInfinity) return 0xFFFFFFFFU", "kInfinity) return 0U"),
    "minus-zero": (PLAN, "if (bits == kSign) return kSign;", ""),
    "rank": (PLAN, "total - input.kept - 1;", "total - input.kept;"),
    "frame-order": (PLAN, "other < frame)", "other > frame)"),
    "room": (PLAN, "work.used[bin]) / size", "work.used[bin] + 1) / size"),
    "refill": (PLAN, "return input.refill &&", "return false &&"),
    "scan": (PLAN, "larger + (scan", "larger + 1 + (scan"),
    "gather": (GATHER, "if (at < words_per_window) __", "if (at < 2) __"),
    # accesses that are wider than an address allows
    "address-of-hidden": (KERNEL, "isAligned(tensors.hidden, sizeof(Word))", "true"),
    "address-of-bins": (KERNEL, "isAligned(tensors.bins, sizeof(Word))", "true"),
    # writes one value too much, behind an output
    "behind-bins": (
        GATHER,
        "const int32_t step =",
        "if (threadIdx.x == 0) target[words_per_window] = Word{};\n    const int32_t step =",
    ),
    "behind-segment": (
        PLAN,
        "output.segment[slot] = kFree;",
        "output.segment[slot] = output.segment[slots] = kFree;",
    ),
    "behind-kept_slot": (PLAN, "i < input.kept; i +=", "i <= input.kept; i +="),
    "behind-kept_window": (
        PLAN,
        "first_kept[input.frames] = input.kept;",
        "first_kept[input.frames] = input.kept, kept_window[input.kept] = 0;",
    ),
    "behind-bin_count": (
        PLAN,
        "*output.bin_count = bins;",
        "output.bin_count[0] = output.bin_count[1] = bins;",
    ),
}


@pytest.mark.parametrize(("file", "text", "change"), CHANGES.values(), ids=CHANGES)
def test_changed_kernels_are_found(tmp_path: Path, file: str, text: str, change: str) -> None:
    original = (KERNELS / file).read_text(encoding="utf-8")
    assert original.count(text) == 1
    assert compare(build_changed(tmp_path, file, original.replace(text, change))) != 0


@pytest.mark.parametrize(
    ("file", "number"), [*((PLAN, number) for number in range(6)), (BLOCK, 0), (BLOCK, 1)]
)
def test_every_missing_barrier_is_found(tmp_path: Path, file: str, number: int) -> None:
    parts = (KERNELS / file).read_text(encoding="utf-8").split("sync();")
    assert len(parts) - 1 == {PLAN: 6, BLOCK: 2}[file]
    changed = "sync();".join(parts[: number + 1]) + "size();" + "sync();".join(parts[number + 1 :])
    assert compare(build_changed(tmp_path, file, changed)) != 0


def build_changed(folder: Path, file: str, text: str) -> Path:
    sources = folder / "trt_plugins"
    shutil.copytree(SOURCES, sources)
    (sources / KERNELS.name / file).write_text(text, encoding="utf-8")
    return build_cpu_library(folder, sources)


def test_unchanged_kernels_pass_the_same_comparison(library: Path) -> None:
    assert compare(library) == 0


def compare(library: Path) -> int:
    command = [sys.executable, "-m", "tests.trt_plugins.compare_library", str(library)]
    return subprocess.run(command, cwd=ROOT, check=False, timeout=60).returncode


def test_cmake_builds_the_library_of_the_same_sources() -> None:
    folder = SOURCES / "tests"
    lists = (folder / "CMakeLists.txt").read_text(encoding="utf-8")
    sources = []
    for target in ("stts_emulator OBJECT", "${target} OBJECT", "stts_emulated_plugin SHARED"):
        (listed,) = re.findall(rf"add_library\({re.escape(target)}([^)]*)\)", lists)
        sources += [(folder / name).resolve() for name in re.findall(r"[\w./]+\.cpp", listed)]
    assert sorted(sources) == sorted((SOURCES / unit).resolve() for unit in UNITS)


def test_readme_gives_the_size_of_the_workspace() -> None:
    # The formula is select_pack_plugin_test's.
    readme = (SOURCES / "README.md").read_text(encoding="utf-8")
    said = re.search(r"([\d,]+) bytes at (\d+) frames of (\d+) windows", " ".join(readme.split()))
    assert said
    size, frames, windows = (int(number.replace(",", "")) for number in said.groups())
    assert size == 4 * (6 * frames + 1 + frames * windows)


def test_missing_compiler_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeError, match=r"apt-get install g\+\+"):
        build_cpu_library(tmp_path)
