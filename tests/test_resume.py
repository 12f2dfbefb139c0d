"""A build that is killed goes on with the graph it was killed in; and what a build reports."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from stts_export.build import graphs_from_checkpoint
from stts_export.bundle import GRAPH_FOLDER, Bundle
from stts_export.calibration.layers import Numerics
from stts_export.checkpoint import open_checkpoint
from stts_export.graphs import export
from stts_export.tensors import DATA_FILE, graph_file


def test_a_build_killed_in_the_second_graph_keeps_the_first(tmp_path: Path, small_checkpoint: Path):
    output = tmp_path / "bundle"
    graphs = tmp_path / "bundle.partial" / GRAPH_FOLDER
    command = [
        sys.executable, "-m", "stts_export.cli", "build", str(small_checkpoint), "-o", str(output),
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as child:
        while not (graphs / "unfinished" / "vision_upper").exists():
            assert child.poll() is None, "the build ended before it could be killed"
            time.sleep(0.01)
        child.kill()
    done = graphs / "vision_lower" / DATA_FILE
    written = done.stat()
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "] vision_lower:" not in again.stderr
    assert "[2/6] vision_upper:" in again.stderr
    kept = output / GRAPH_FOLDER / "vision_lower" / DATA_FILE
    assert (kept.stat().st_mtime_ns, kept.stat().st_ino) == (written.st_mtime_ns, written.st_ino)
    Bundle.open(output).check_hashes()


def test_progress_is_by_tensor_and_names_the_graph(
    tmp_path: Path, small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    def exported(model, name, precision, folder, on_tensor):
        (folder / graph_file(name)).parent.mkdir(parents=True, exist_ok=True)
        on_tensor(1, 2)

    monkeypatch.setattr(export, "export_graph", exported)
    reports: list[tuple[str, int, int]] = []
    source = open_checkpoint(small_checkpoint)
    (tmp_path / GRAPH_FOLDER).mkdir()
    graphs_from_checkpoint(
        source, tmp_path, Numerics("fp32"), on_progress=lambda *report: reports.append(report)
    )
    assert reports[0] == ("weights of vision_lower", 1, 2)
    assert ("weights of decoder", 1, 2) in reports
