from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch

from stts_export.checkpoint import model_from_checkpoint, open_checkpoint
from stts_export.errors import MissingDependencyError
from stts_export.model.vlm import SttsModel
from stts_export.training.config import LoraSettings, StartSettings
from stts_export.training.lora import TARGETS, add_lora, is_adapter, merged_parameters
from stts_export.training.start import Start, save_model, start_from, trainable_groups
from tests.training.small_runs import ALONE, SmallTrainee, small_folder, small_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a scorer; read only."""
    return small_folder(tmp_path_factory.mktemp("lora") / "given")


def _start(folder: Path, seed: int = 0, **settings: Any) -> Start:
    start = StartSettings(
        checkpoint=str(folder), train="lora", lora=LoraSettings(rank=3, **settings)
    )
    return start_from(small_run(start=start, seed=seed))


def _plain(folder: Path) -> SttsModel:
    return model_from_checkpoint(open_checkpoint(folder))


def _logits(model: SttsModel) -> torch.Tensor:
    ids = torch.arange(20)[None]
    with torch.no_grad():
        return model.language(ids, torch.zeros(1, 16), torch.full_like(ids, -1))


def _learn(start: Start, steps: int = 3) -> SmallTrainee:
    trainee = SmallTrainee(start.model)
    parameters = [p for p in start.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        trainee([0]).backward()
        optimizer.step()
    return trainee


def test_adapters_change_nothing_at_first(folder: Path):
    assert torch.equal(_logits(_start(folder).model), _logits(_plain(folder)))
    merged = dict(merged_parameters(_start(folder).model))
    for name, parameter in _plain(folder).named_parameters():
        assert torch.equal(merged.pop(name), parameter)
    assert not merged


def test_only_adapters_and_the_scorer_learn(folder: Path):
    start = _start(folder)
    before = _plain(folder)
    _learn(start)
    with_gradient = {n for n, p in start.model.named_parameters() if p.grad is not None}
    adapters = {
        f"language.blocks.{block}.{target}.lora_{part}.default.weight"
        for block in range(2)
        for target in TARGETS
        for part in "AB"
    }
    assert {name for name in with_gradient if is_adapter(name)} == adapters
    assert all(name.startswith("vision.scorer.") for name in with_gradient - adapters)
    assert len(with_gradient - adapters) > 4
    merged = dict(merged_parameters(start.model))
    changed = {n for n, p in before.named_parameters() if not torch.equal(merged[n], p)}
    assert {name for name in changed if name.startswith("language")} == {
        f"language.blocks.{block}.{target}.weight" for block in range(2) for target in TARGETS
    }


def test_groups_hold_the_adapters_alone(folder: Path):
    config = small_run(start=StartSettings(checkpoint=str(folder), train="lora"))
    start = start_from(config)
    groups = {
        group["name"]: group["params"] for group in trainable_groups(start.model, None, config)
    }
    adapters = [p for n, p in start.model.named_parameters() if is_adapter(n)]
    assert set(groups) == {"language", "scorer"}
    assert list(map(id, groups["language"])) == list(map(id, adapters))


def test_the_merged_model_computes_what_the_adapted_one_did(folder: Path, tmp_path: Path):
    start = _start(folder, alpha=5.0)
    _learn(start)
    save_model(start.model, start, tmp_path / "step3", {}, ALONE)
    saved = _plain(tmp_path / "step3")
    start.model.eval()
    assert not torch.allclose(_logits(saved), _logits(_plain(folder)), atol=1e-2)
    torch.testing.assert_close(_logits(saved), _logits(start.model), atol=1e-5, rtol=1e-5)


def test_adapters_depend_on_the_seed_alone(folder: Path):
    def drawn(seed: int) -> torch.Tensor:
        return next(p for n, p in _start(folder, seed).model.named_parameters() if "lora_A" in n)

    torch.manual_seed(3)
    one = drawn(1)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))
    torch.manual_seed(4)
    assert torch.equal(one, drawn(1))
    assert not torch.equal(one, drawn(2))


def test_dropout_is_on_in_training_only(folder: Path):
    model = _start(folder, dropout=0.5).model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    assert not torch.equal(_logits(model), _logits(model))
    model.eval()
    assert torch.equal(_logits(model), _logits(model))


def test_peft_is_asked_for_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def without_peft(name: str, *rest: Any) -> Any:
        if name == "peft":
            raise ImportError("No module named 'peft'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    with pytest.raises(MissingDependencyError, match=r"stts-export\[lora\]"):
        add_lora(_plain(folder), LoraSettings())
