from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from stts_export.errors import InputError
from stts_export.training.config import OptimSettings, Rates, StartSettings, TrainConfig
from stts_export.training.start import Start, start_from, trainable_groups
from stts_export.training.state import load_state, save_state
from tests.training.small_runs import ALONE, SmallTrainee, full_disk, small_folder, small_run

CONFIG = small_run(optim=OptimSettings(rates=Rates(1e-3, 1e-3, 0.0, 1e-3)))
EXTRA = {"step": 2, "config": {"seed": 0, "taps": [3, 2]}, "dev": {}}
Damage = Callable[[Path], Any]


class _Run:
    """A small model in training; the heads for labels are never asked."""

    def __init__(self, config: TrainConfig = CONFIG) -> None:
        self.start: Start = start_from(config)
        torch.manual_seed(0)
        self.trainee = SmallTrainee(self.start.model)
        groups = trainable_groups(self.start.model, self.trainee.labels, config)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)

    def steps(self, first: int, last: int) -> list[float]:
        return [self._step(number) for number in range(first, last)]

    def _step(self, number: int) -> float:
        self.optimizer.zero_grad()
        loss = self.trainee([number])
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def save(self, run: Path, step: int, **options: Any) -> Path:
        extra = {**EXTRA, "step": step}
        return save_state(run, step, self.trainee, self.optimizer, extra, ALONE, **options)

    def load(self, run: Path) -> dict[str, Any] | None:
        return load_state(run, self.trainee, self.optimizer, ALONE)

    def weights(self) -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in self.trainee.named_parameters()}


def _equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the states of steps 1 and 2; read only."""
    run = tmp_path_factory.mktemp("saved")
    small = _Run()
    for step in (1, 2):
        small.steps(step - 1, step)
        small.save(run, step, keep=2)
    return run


def _copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def test_a_run_goes_on_exactly(saved: Path):
    through = _Run()
    losses = through.steps(0, 5)
    resumed = _Run()
    resumed.steps(7, 9)  # whatever it did before
    for group in resumed.optimizer.param_groups:
        group["lr"] = 5.0
    assert resumed.load(saved) == EXTRA
    assert {group["lr"] for group in resumed.optimizer.param_groups} == {5.0}
    for group in resumed.optimizer.param_groups:
        group["lr"] = 1e-3
    assert resumed.steps(2, 5) == losses[2:]
    assert _equal(resumed.weights(), through.weights())


def test_nothing_to_resume_from(tmp_path: Path, saved: Path):
    small = _Run()
    before = small.weights()
    assert small.load(tmp_path / "nothing") is None
    unfinished = tmp_path / "run" / "state" / "step2.partial"
    shutil.copytree(saved / "state" / "step2", unfinished)
    assert small.load(tmp_path / "run") is None
    assert _equal(small.weights(), before)


def test_a_parameter_without_a_gradient_begins_as_it_would_have(tmp_path: Path):
    def run(resume: bool) -> dict[str, torch.Tensor]:
        small = _Run()
        small.trainee.labels.requires_grad_(False)
        small.steps(0, 2)  # no gradient: AdamW has no state of these yet
        small.trainee.labels.requires_grad_(True)
        if resume:
            small.save(tmp_path, 2)
            small = _Run()
            small.load(tmp_path)
        small.steps(2, 4)
        return small.weights()

    assert _equal(run(False), run(True))


def test_only_the_newest_states_stay(tmp_path: Path):
    small = _Run()
    for step in (9, 10, 11):
        assert small.save(tmp_path, step, keep=2) == tmp_path / "state" / f"step{step}"
    assert {child.name for child in (tmp_path / "state").iterdir()} == {"step10", "step11"}
    small.save(tmp_path, 12)
    assert {child.name for child in (tmp_path / "state").iterdir()} == {"step12"}
    assert small.load(tmp_path) == {**EXTRA, "step": 12}


def test_a_step_that_is_saved_again_is_replaced(tmp_path: Path):
    small = _Run()
    small.save(tmp_path, 2)
    small.steps(0, 1)
    small.save(tmp_path, 2)
    weights = small.weights()
    other = _Run()
    other.load(tmp_path)
    assert _equal(other.weights(), weights)
    assert [child.name for child in (tmp_path / "state").iterdir()] == ["step2"]


@pytest.mark.parametrize("stopped", [KeyboardInterrupt(), ValueError("a bug")])
def test_a_save_that_is_stopped_leaves_the_last_state(
    saved: Path, tmp_path: Path, stopped: BaseException
):
    run = _copy(saved, tmp_path)
    small = _Run()
    small.steps(0, 3)
    with patch("os.fsync", side_effect=stopped), pytest.raises(type(stopped)):
        small.save(run, 3)
    assert {child.name for child in (run / "state").iterdir()} == {"step1", "step2"}
    assert small.load(run) == EXTRA


def test_what_a_killed_run_left_is_passed_over_and_removed(saved: Path, tmp_path: Path):
    run = _copy(saved, tmp_path)
    left = run / "state" / "step3.partial"
    left.mkdir()
    (left / "__0_0.distcp").write_bytes(b"half")
    small = _Run()
    assert small.load(run) == EXTRA
    small.save(run, 4)
    assert [child.name for child in (run / "state").iterdir()] == ["step4"]


@pytest.mark.parametrize("limit", [3_000, 200_000])
def test_a_full_disk_leaves_the_last_state(saved: Path, tmp_path: Path, limit: int):
    run = _copy(saved, tmp_path)
    small = _Run()
    with full_disk(limit), pytest.raises(InputError, match="cannot be written: File too") as error:
        small.save(run, 3)
    step2 = run / "state" / "step2"
    assert str(run / "state" / "step3") in str(error.value)
    assert f"free some space and go on with --resume: {step2} is whole" in str(error.value)
    assert {child.name for child in (run / "state").iterdir()} == {"step1", "step2"}
    assert small.load(run) == EXTRA


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "state").write_text("a file")
    with pytest.raises(InputError, match="cannot be written") as error:
        _Run().save(tmp_path, 1)
    assert str(tmp_path / "state" / "step1") in str(error.value)


def _truncate(folder: Path) -> None:
    shard = next(folder.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1000])


def _foreign(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(print))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "is truncated"),
        (_foreign, "holds an object of builtins.print"),
        (lambda folder: (folder / ".metadata").unlink(), r"\.metadata: cannot be read"),
        (lambda folder: next(folder.glob("*.distcp")).unlink(), "1 of 1 shards are missing"),
        (lambda folder: (folder / "state.json").write_text("{"), "cannot be read as JSON"),
        (lambda folder: (folder / "state.json").write_text("{}"), "missing or incomplete"),
        (lambda folder: (folder / "state.json").unlink(), "missing or incomplete"),
    ],
)
def test_a_damaged_state_is_named(saved: Path, tmp_path: Path, damage: Damage, message: str):
    run = _copy(saved, tmp_path)
    newest = run / "state" / "step2"
    damage(newest)
    small = _Run()
    before = small.weights()
    with pytest.raises(InputError, match=message) as error:
        small.load(run)
    assert error.value.where == str(newest)
    assert error.value.fix == "remove this folder: the run then goes on from step1"
    assert _equal(small.weights(), before)
    shutil.rmtree(newest)
    assert small.load(run) == {**EXTRA, "step": 1}


def test_the_only_state_is_damaged(saved: Path, tmp_path: Path):
    run = _copy(saved, tmp_path)
    shutil.rmtree(run / "state" / "step1")
    _truncate(run / "state" / "step2")
    with pytest.raises(InputError, match=f"start.checkpoint: {run}"):
        _Run().load(run)


def test_values_that_torch_cannot_read(saved: Path, tmp_path: Path):
    run = _copy(saved, tmp_path)
    with (
        patch("torch.distributed.checkpoint.filesystem.torch.load", side_effect=ValueError("bad")),
        pytest.raises(InputError, match=r"is damaged: ValueError\('bad'\)"),
    ):
        _Run().load(run)


def test_a_state_of_another_model_is_refused(saved: Path):
    small = _Run(small_run(optim=OptimSettings(rates=Rates(1e-3, 0.0, 0.0, 1e-3))))
    with pytest.raises(InputError, match="another model, or one that trained other parts") as error:
        small.load(saved)
    assert "model.model.vision.blocks.0" in str(error.value)


def test_frozen_weights_must_be_what_they_were(saved: Path):
    small = _Run()
    with torch.no_grad():
        small.start.model.vision.connector.w1.weight[0, 0] += 1e-3
    with pytest.raises(InputError, match="not those it was begun with"):
        small.load(saved)


def test_adapters_alone_are_saved_and_resumed(tmp_path: Path):
    start = StartSettings(checkpoint=str(small_folder(tmp_path / "given")), train="lora")
    config = small_run(start=start)
    small = _Run(config)
    small.steps(0, 2)
    folder = small.save(tmp_path, 2)
    losses = small.steps(2, 4)
    resumed = _Run(config)
    resumed.load(tmp_path)
    assert resumed.steps(2, 4) == losses
    assert _equal(resumed.weights(), small.weights())
    data = pickle.loads((folder / ".metadata").read_bytes())  # our own, of this test
    learning = {n for n, p in small.trainee.named_parameters() if p.requires_grad}
    held = {name.split(".", 1)[1] for name in data.state_dict_metadata if name.startswith("model.")}
    assert held == learning
