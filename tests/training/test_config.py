from __future__ import annotations

from pathlib import Path

import pytest

from stts_export.config import ModelConfig
from stts_export.errors import InputError
from stts_export.training.config import TrainConfig, model_json

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def _read(tmp_path: Path, text: str) -> TrainConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return TrainConfig.from_file(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_are_valid(path: Path):
    config = TrainConfig.from_file(path)
    values = model_json(config.model, 400, config.data.max_frames, 0.5)
    assert ModelConfig.from_dict(values, has_scorer=True).vision.pruning is not None


def test_defaults_fill_what_is_not_said(tmp_path):
    assert _read(tmp_path, "output: runs/x") == TrainConfig(output="runs/x")


def test_every_value_survives_the_way_through_plain_data(tmp_path):
    config = _read(tmp_path, "output: x\nmodel:\n  taps: [4, 5]\noptim:\n  steps: 700\n")
    assert config.model.taps == (4, 5)
    assert config.to_dict()["optim"]["steps"] == 700


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1", "output is missing"),
        ("output: x\nsed: 1", "unknown key 'sed' \\(did you mean 'seed'\\?\\)"),
        ("output: x\noptim:\n  step: 1", "unknown key 'step' \\(did you mean 'steps'\\?\\)"),
        ("output: x\nseed: one", "seed: is 'one'"),
        ("output: x\nseed: true", "seed: is True"),
        ("output: x\noptim:\n  learning_rate: 1e-3", "write 1.0e-3"),
        ("output: x\noptim:\n  learning_rate: .nan", "learning_rate: is nan"),
        ("output: x\nmodel: 3", "model: is 3"),
        ("output: x\nmodel:\n  image_size: 100", "a multiple of 30"),
        ("output: x\nmodel:\n  taps: [5, 2]", "blocks above prune_at \\+ 1 = 2"),
        ("output: x\nmodel:\n  taps: 5", "a list of integers"),
        ("output: x\nmodel:\n  vision_heads: 5", "a divisor of 96"),
        ("output: x\npruning:\n  max_ratio: 1.0", "0 < min_ratio < max_ratio < 1"),
        ("output: x\noptim:\n  steps: 10", "below steps = 10"),
        ("output: x\ndata:\n  clips_per_step: 0", "data.clips_per_step is 0"),
        ("- 1", "a mapping"),
        ("output: [", "cannot be read as YAML"),
    ],
)
def test_mistakes_are_named(tmp_path, text: str, message: str):
    with pytest.raises(InputError, match=message):
        _read(tmp_path, text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        TrainConfig.from_file(tmp_path / "none.yaml")
