from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from stts_export.checkpoint import model_from_checkpoint, open_checkpoint
from stts_export.errors import InputError
from stts_export.runtime.prompt import PromptBuilder
from stts_export.training.config import TrainConfig
from stts_export.training.loop import LOG_FILE, Trainer, learning_rate, train


def _losses(run: Path) -> dict[int, float]:
    lines = (run / LOG_FILE).read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}


def test_a_few_steps_lower_the_loss(trainer):
    losses = [trainer.train_step()["loss"] for _ in range(12)]
    labels, answers = losses[:2], losses[2:]
    assert labels[1] < labels[0]
    assert answers[-1] < 0.9 * answers[0]


def test_a_large_gradient_of_the_scorer_does_not_silence_the_rest(trainer):
    scorer = trainer.model.vision.scorer
    assert scorer is not None
    for parameter in [*trainer.model.parameters(), *trainer.labels.parameters()]:
        parameter.grad = torch.full_like(parameter, 1e-6)
    for parameter in scorer.parameters():
        parameter.grad = torch.full_like(parameter, 1e6)
    trainer._clip_gradients()
    norm = torch.nn.utils.get_total_norm([p.grad for p in scorer.parameters()])
    assert norm == pytest.approx(1.0, rel=1e-3)
    untouched = trainer.model.language.lm_head.weight
    torch.testing.assert_close(untouched.grad, torch.full_like(untouched, 1e-6))


def test_a_resumed_run_equals_an_uninterrupted_one(tiny_yaml, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(tiny_yaml, whole)

    config = TrainConfig.from_file(tiny_yaml)
    interrupted = Trainer(config, parts)
    for _ in range(4):
        interrupted.train_step()
    interrupted.evaluate()
    interrupted._advance_level()
    interrupted.save()
    train(tiny_yaml, parts, resume=True)

    expected = {step: loss for step, loss in _losses(whole).items() if step > 4}
    assert _losses(parts) == expected
    ours, theirs = (model_from_checkpoint(open_checkpoint(run)) for run in (whole, parts))
    for left, right in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(left, right)


def test_checkpoints_are_complete_folders_and_old_ones_go(tiny_yaml, tmp_path):
    run = train(tiny_yaml, tmp_path / "run")
    assert sorted(path.name for path in run.iterdir()) == [
        "log.jsonl",
        "step12",
        "step8",
        "train_state.pt",
    ]
    folder = run / "step12"
    checkpoint = open_checkpoint(folder)
    assert checkpoint.has_scorer
    PromptBuilder.from_folder(folder, checkpoint.config)
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    assert training["steps"] == 12
    assert training["seed"] == 3
    assert training["config"]["optim"]["steps"] == 12
    assert set(training["dev_accuracy"]) >= {"prune_ratio", "count"}


def test_a_dry_run_writes_nothing(tiny_yaml, tmp_path):
    run = train(tiny_yaml, tmp_path / "run", dry_run=True)
    assert not run.exists()


def test_refuses_to_overwrite_or_to_resume_nothing(tiny_yaml, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(InputError, match="holds no run to resume"):
        train(tiny_yaml, run, resume=True)
    run.mkdir()
    (run / "kept.txt").touch()
    with pytest.raises(InputError, match="is not empty"):
        train(tiny_yaml, run)


def test_refuses_to_resume_with_another_configuration(tiny_yaml, tmp_path, trainer):
    trainer.run = tmp_path / "run"
    trainer.save()
    tiny_yaml.write_text(tiny_yaml.read_text().replace("seed: 3", "seed: 4"), encoding="utf-8")
    with pytest.raises(InputError, match="another seed"):
        train(tiny_yaml, trainer.run, resume=True)
    (trainer.run / "train_state.pt").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="cannot be read"):
        train(tiny_yaml, trainer.run, resume=True)


def test_rate_rises_holds_and_falls():
    config = TrainConfig("x")
    rates = [learning_rate(config, step) for step in range(config.optim.steps)]
    assert rates[0] == pytest.approx(1e-5)
    assert rates[100] == rates[2000] == 1e-3
    assert rates[-1] < 2e-6
