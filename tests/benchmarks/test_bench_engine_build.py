"""The benchmark of engine builds runs end to end; times are never checked."""

import json

import pytest

from benchmarks import bench_engine_build

pytest.importorskip("tensorrt_rtx", reason="pip install 'stts-export[trt-rtx]'")


def test_a_quick_run_builds_both_engines(tmp_path, capsys):
    file = tmp_path / "results.json"
    arguments = ["--quick", "--cache", str(tmp_path / "cache"), "--json", str(file)]
    assert bench_engine_build.main(arguments) == 0
    results = json.loads(file.read_text())
    assert [row["graph"] for row in results["rows"]] == ["vision_lower", "vision_upper"]
    for row in results["rows"]:
        assert 0 < row["peak_gb"] < bench_engine_build.LIMITS["peak_gb"]
        assert row["engine_bytes"] > row["weights_bytes"] > 0
    assert "vision_upper" in capsys.readouterr().out
