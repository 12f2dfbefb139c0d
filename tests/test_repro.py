"""`verify --keep-repro`: polygraphy itself sees what verify saw."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stts_export.bundle import Bundle
from stts_export.cli import main
from stts_export.engines import onnxruntime
from stts_export.errors import InputError, MissingDependencyError
from stts_export.repro import Call, Difference, check_folder, write_repro
from stts_export.runtime import decoder
from stts_export.verify import verify
from tests.helpers import random_checkpoint
from tests.standins.fixtures import uninstall


def _reproduce(folder: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["sh", str(folder / "reproduce.sh")],
        capture_output=True, text=True, check=False, timeout=300, cwd="/",
        env={**os.environ, "PATH": path},
    )  # fmt: skip


def test_differences_are_reproduced_graph_by_graph(tmp_path: Path, small_bundle: Path):
    other = random_checkpoint(tmp_path / "other", seed=1)
    report = verify(small_bundle, other, keep_repro=tmp_path / "repro")
    assert not report.passed
    folders = [Path(folder) for folder in report.repro]
    assert {f.name for f in folders} == {
        "vision_lower", "vision_upper-frames", "vision_upper", "decoder"
    }  # fmt: skip
    assert {f.name for f in (tmp_path / "repro").iterdir()} == {f.name for f in folders}
    assert "past_key_values" not in (tmp_path / "repro/decoder/inputs.json").read_text()
    for folder in folders:
        done = _reproduce(folder)
        assert done.returncode == 1, done.stderr
        assert "Accuracy Summary | onnxrt-runner" in done.stdout
        assert "pytorch-fp32 | Passed: 0/1" in done.stdout


def test_the_graph_itself_passes_where_the_difference_is_elsewhere(
    tmp_path: Path, small_bundle: Path, small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    nothing = decoder.Continuation([], "stop", 0.0, 0.0)
    monkeypatch.setattr(decoder, "generate", lambda *_, **__: nothing)
    report = verify(small_bundle, small_checkpoint, keep_repro=tmp_path / "repro")
    assert not report.passed
    (folder,) = map(Path, report.repro)
    assert "times its limit" in (folder / "reproduce.sh").read_text()
    done = _reproduce(folder)
    assert done.returncode == 0, done.stdout
    assert "pytorch-fp32 | Passed: 1/1" in done.stdout


def test_nothing_is_written_when_all_agrees(
    tmp_path: Path, small_bundle: Path, small_checkpoint: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "repro"
    arguments = ["--against", str(small_checkpoint), "--keep-repro", str(folder)]
    assert main(["verify", str(small_bundle), *arguments, "--backend", "onnxruntime"]) == 0
    assert f"nothing differs, so {folder} was not written" in capsys.readouterr().out
    assert not folder.exists()


@pytest.mark.parametrize(("factor", "status"), [(1.5, 1), (0.5, 0)])
def test_tolerances_of_polygraphy_are_ours(
    tmp_path: Path, golden_bundle: Path, factor: float, status: int
):
    """Expected values moved by a multiple of the limit, in the measure of the table."""
    from stts_export.tolerances import TOLERANCES

    bundle = Bundle.open(golden_bundle)
    config = bundle.config.vision
    rng = np.random.default_rng(0)
    inputs = {
        "frames": rng.integers(0, 256, (1, *config.image_size, 3), dtype=np.uint8),
        "fresh": np.ones(1, bool),
        "prev_pooled": np.zeros((1, config.windows, config.hidden_size), np.float32),
    }
    outputs = onnxruntime.open_graph(bundle.graph("vision_lower"), threads=1)(inputs)
    for name in outputs:
        tolerance = TOLERANCES[name, bundle.manifest.precision]
        value = outputs[name].astype(np.float32)
        moved = value.copy()
        scale = {
            "max": 1.0,
            "max_rel": float(np.abs(value).max()),
            "l2": float(np.linalg.norm(value.astype(np.float64))),
        }[tolerance.measure]
        index = np.unravel_index(np.abs(value).argmin(), value.shape)
        moved[index] += np.float32(factor * tolerance.limit * scale)
        expected = {**{n: a.astype(np.float32) for n, a in outputs.items()}, name: moved}
        entry = Difference(Call("vision_lower", inputs, outputs), expected, factor)
        (folder,) = write_repro(tmp_path / name, bundle, "onnxruntime", [entry])
        done = _reproduce(folder)
        assert done.returncode == status, (name, done.stdout)


def test_folders_in_use_are_refused_before_any_work(tmp_path: Path, small_bundle: Path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(InputError, match="is there already"):
        verify(small_bundle, tmp_path / "none", keep_repro=tmp_path)
    with pytest.raises(InputError, match="is there already"):
        check_folder(tmp_path / "mine")
    (tmp_path / "empty").mkdir()
    check_folder(tmp_path / "empty")


def test_without_polygraphy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    uninstall(monkeypatch, "polygraphy")
    with pytest.raises(MissingDependencyError, match="needs polygraphy") as error:
        check_folder(tmp_path / "new")
    assert "pip install 'polygraphy>=0.53" in str(error.value)


def test_a_folder_that_cannot_be_written_leaves_nothing(tmp_path: Path, small_bundle: Path):
    value = {"logits": np.zeros((1, 3), np.float32)}
    entry = Difference(Call("decoder", value, value), value, 2.0)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_repro(tmp_path / "file" / "repro", Bundle.open(small_bundle), "onnxruntime", [entry])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_lies_beside_the_folder_stays(tmp_path: Path, small_bundle: Path):
    mine = tmp_path / "repro.partial" / "mine"
    mine.parent.mkdir()
    mine.write_text("")
    value = {"logits": np.zeros((1, 3), np.float32)}
    entry = Difference(Call("decoder", value, value), value, 2.0)
    write_repro(tmp_path / "repro", Bundle.open(small_bundle), "onnxruntime", [entry])
    assert mine.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"repro", "repro.partial"}
