"""The dry run of full size runs end to end on a tiny shape; times are never checked."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from benchmarks import full_size
from benchmarks.harness.random_checkpoint import checkpoint_bytes, config_json
from stts_export.config import ModelConfig


@pytest.mark.parametrize(("shape", "parameters"), [("4b", 4.88e9), ("8b", 8.66e9)])
def test_shapes_are_those_of_the_released_models(shape: str, parameters: float):
    values = config_json(shape)
    config = ModelConfig.from_dict(values, has_scorer=True)
    assert (config.vision.num_layers, config.vision.taps) == (25, (24, 18))
    assert config.text.vocab_size == 151936
    assert checkpoint_bytes(values) / 2 == pytest.approx(parameters, rel=0.01)


def test_a_tiny_run_measures_every_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "results.json"
    folder = tmp_path / "work"
    arguments = ["--shape", "tiny", "--folder", str(folder), "--json", str(file)]
    assert full_size.main(arguments) == 0
    assert list(folder.iterdir()) == []
    results = json.loads(file.read_text(encoding="utf-8"))
    build = results["steps"]["build"]
    assert 0 < build["peak_anonymous"] <= build["peak_resident"] <= build["ru_maxrss"] * 1.01
    assert [stage["stage"].partition(":")[0] for stage in build["stages"]][:3] == [
        "start", "check the ranges of activations", "vision_lower",
    ]  # fmt: skip
    assert results["answer"]["new_tokens"] == results["answer_with_room"]["new_tokens"] == 4
    assert results["answer"]["room"] == 8 * 10**9
    low, high = results["answer"]["scores_from_to"]
    assert 0 < low < high < 1
    assert "vision_lower" in capsys.readouterr().out


def test_too_little_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12 - 10**9, 10**9))
    assert full_size.main(["--folder", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert "checkpoint 9" in message
    assert "another disk with --folder" in message
    assert list(tmp_path.iterdir()) == []
