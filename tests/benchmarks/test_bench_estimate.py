"""The comparison of estimates runs end to end; how near they are is not a test's business."""

import json

from benchmarks import bench_estimate


def test_a_quick_run_compares_files_build_and_session(tmp_path, capsys):
    file = tmp_path / "results.json"
    assert bench_estimate.main(["--quick", "--scratch", str(tmp_path), "--json", str(file)]) == 0
    (case,) = json.loads(file.read_text())["cases"]
    kinds = {row["kind"] for row in case["rows"]}
    assert kinds == {"file", "build", "session"}
    assert all(row["predicted"] > 0 and row["measured"] > 0 for row in case["rows"])
    assert "tiny: fp32" in capsys.readouterr().out
