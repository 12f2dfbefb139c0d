"""The plugin's benchmark runs end to end, on emulated kernels; times are never checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bench_plugin
from tests.standins.fixtures import install_cuda
from tests.trt_plugins.cpu_build import build_device_program


def test_a_run_and_its_table(
    small_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    install_cuda(monkeypatch)
    program = build_device_program(tmp_path)
    out = tmp_path / "results" / "out.json"
    arguments = [
        "--program",
        str(program),
        "--frames",
        "2",
        "4",
        "--repeats",
        "1",
        "--json",
        str(out),
    ]
    more = ["--bundle", str(small_bundle), "--backend", "onnxruntime", "--tower-repeats", "1"]
    assert bench_plugin.main([*arguments, *more]) == 0
    table = capsys.readouterr().out
    results = json.loads(out.read_text())
    assert [row["frames"] for row in results["kernels"]] == [2, 4]
    assert [row["frames"] for row in results["tower"]] == [2, 4]
    assert results["outcomes"]["bandwidth_of_copy_at_128_frames"]["got"] is None
    assert bench_plugin.main(["--show", str(out)]) == 0
    assert capsys.readouterr().out == table


def test_outcomes_put_what_was_reached_beside_the_targets():
    results = {
        "settings": {"tower_window_bytes": bench_plugin.WINDOW_BYTES},
        "kernels": [{"frames": 128, "bandwidth_of_copy": 0.9, "plan_ms": 0.5}],
        "tower": [{"frames": 128, "pruned_ms": 100.0}],
    }
    outcomes = bench_plugin.outcomes(results)
    assert outcomes["bandwidth_of_copy_at_128_frames"] == {"target": 0.8, "got": 0.9}
    assert outcomes["share_of_tower_at_128_frames"] == {"target": 0.01, "got": 0.005}
    results["settings"] = {"tower_window_bytes": 1728}  # of another tower
    assert bench_plugin.outcomes(results)["share_of_tower_at_128_frames"]["got"] is None


def test_without_the_program_or_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert bench_plugin.main(["--program", str(tmp_path / "none")]) == 1
    assert "cmake --preset gpu" in capsys.readouterr().err
    install_cuda(monkeypatch, devices=0)
    program = build_device_program(tmp_path)
    assert bench_plugin.main(["--program", str(program), "--frames", "2"]) == 4
    assert "no usable NVIDIA GPU" in capsys.readouterr().err
