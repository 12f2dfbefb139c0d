from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stts_export.build import bundle_from_checkpoint
from stts_export.checkpoint import model_from_checkpoint, open_checkpoint
from stts_export.cli import main
from stts_export.errors import InputError, TrainingError
from stts_export.runtime.prompt import PromptBuilder, VideoTokens, kept_positions
from stts_export.runtime.session import Session
from stts_export.runtime.video import read_video
from stts_export.training import loop
from stts_export.training.config import (
    OptimSettings,
    TrainConfig,
)
from stts_export.training.examples import Example
from stts_export.training.failures import load_failure
from stts_export.training.logs import LOG_FILE, read_log
from stts_export.training.loop import Trainer, rate_factor, train
from stts_export.training.selectors import SELECTORS
from tests.training.conftest import run_values, write_run
from tests.training.small_runs import ALONE, WINDOWS, full_disk

# torch warns where there are fewer cores than workers.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

LOSSES = ("loss", "answer_loss", "similarity_loss", "label_loss")
TIMES = ("seconds", "tokens_per_second", "clips_per_second")


def _config(folder: Path, **changes: Any) -> Path:
    return write_run(folder / "run.yaml", run_values(**changes))


def _trainer(folder: Path, **changes: Any) -> Trainer:
    return Trainer(TrainConfig.from_file(_config(folder, **changes)), folder / "run", ALONE)


def _steps(trainer: Trainer, count: int) -> list[dict[str, float]]:
    with trainer._feed() as feed:
        return [trainer.train_step(feed) for _ in range(count)]


def _curve(run: Path) -> list[dict[str, Any]]:
    """The log without what depends on the machine's pace."""
    return [{k: v for k, v in entry.items() if k not in TIMES} for entry in read_log(run)]


def _weights(folder: Path) -> dict[str, Tensor]:
    return dict(model_from_checkpoint(open_checkpoint(folder)).named_parameters())


def _assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = _weights(one), _weights(other)
    assert set(ours) == set(theirs)
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


class Killed(BaseException):
    """The process ends here, without any cleaning up of ours."""


@contextmanager
def _killed(monkeypatch: pytest.MonkeyPatch, at: Callable[[Trainer], bool]) -> Iterator[None]:
    """End a run at the beginning of the step for which `at` is true."""
    before = Trainer.train_step

    def train_step(self: Trainer, feed: Any) -> dict[str, float]:
        if at(self):
            raise Killed
        return before(self, feed)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", train_step)
        with pytest.raises(Killed):
            yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from scratch that nothing interrupted; read only."""
    folder = tmp_path_factory.mktemp("whole")
    return train(_config(folder, picture_every=4), folder / "run")


# What a run does


def test_steps_lower_the_losses(tmp_path: Path):
    shown = _steps(_trainer(tmp_path, labels={"steps": 6}, optim={"steps": 16}), 16)
    assert shown[5]["loss"] < 0.95 * shown[0]["loss"]
    assert shown[15]["answer_loss"] < 0.8 * shown[6]["answer_loss"]


def test_clips_of_one_frame_have_no_scores_to_log(tmp_path: Path):
    trainer = _trainer(tmp_path, data={"max_frames": 1})
    (shown,) = _steps(trainer, 1)
    assert not {name for name in shown if name.startswith("score_")}
    assert np.isfinite(shown["loss"])


def test_the_loss_is_the_sum_of_its_weighted_parts(tmp_path: Path):
    trainer = _trainer(tmp_path, pruning={"similarity_coefficient": 3.0}, labels={"steps": 0})
    (shown,) = _steps(trainer, 1)
    expected = shown["answer_loss"] + 3 * shown["similarity_loss"] + 0.5 * shown["label_loss"]
    assert shown["loss"] == pytest.approx(expected)
    assert min(shown[name] for name in LOSSES) > 0


def test_losses_are_means_over_what_they_count(tmp_path: Path):
    """Per answer token, per compared window, per kept window."""
    trainer = _trainer(tmp_path, labels={"steps": 0})
    with trainer._feed() as feed:
        examples = [one for one in next(feed) if isinstance(one, Example)]
    with torch.no_grad():
        out = trainer.trainee(examples)
    answers = trainer.trainee.sequences.answer_tokens(examples)
    kept = sum(int(keep.sum()) for keep in out.encoded.keeps)
    pairs = sum(
        WINDOWS * (len(example.clip.frames) - 1)
        for example, keep in zip(examples, out.encoded.keeps, strict=True)
        if example.clip and not keep.all()
    )
    (shown,) = _steps(trainer, 1)
    assert shown["answer_loss"] == pytest.approx(out.answer.item() / answers)
    assert shown["similarity_loss"] == pytest.approx(out.similarity.item() / pairs)
    assert shown["label_loss"] == pytest.approx(out.label.item() / kept)
    assert shown["tokens"] == out.packed.tokens
    assert shown["clips"] == 4


def test_a_large_gradient_of_the_scorer_does_not_silence_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trainer = _trainer(tmp_path, labels={"steps": 0})
    scorer = trainer.start.model.vision.scorer
    assert scorer is not None
    before = trainer._answer_questions

    def with_large_gradients(made: Any) -> dict[str, float]:
        shown = before(made)
        for parameter in trainer.start.model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-6)
        assert trainer.trainee.labels is not None
        trainer.trainee.labels.zero_grad()
        for parameter in scorer.parameters():
            parameter.grad = torch.full_like(parameter, 1e6)
        return shown

    monkeypatch.setattr(trainer, "_answer_questions", with_large_gradients)
    (shown,) = _steps(trainer, 1)
    clipped = [parameter.grad for parameter in scorer.parameters() if parameter.grad is not None]
    assert torch.nn.utils.get_total_norm(clipped).item() == pytest.approx(1.0, rel=1e-3)
    untouched = trainer.start.model.language.lm_head.weight
    torch.testing.assert_close(untouched.grad, torch.full_like(untouched, 1e-6))
    assert shown["scorer_gradient_norm"] > 1e6
    assert shown["gradient_norm"] < 1


def test_the_rate_rises_and_falls_along_a_cosine():
    config = TrainConfig("x", optim=OptimSettings(steps=110, warmup_steps=10, final_share=0.1))
    factors = [rate_factor(config, step) for step in range(110)]
    assert factors[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert factors[10] == 1
    assert factors[60] == pytest.approx(0.55)
    assert factors[109] == pytest.approx(0.1, abs=1e-3)
    assert (np.diff(factors[10:]) < 0).all()


def test_every_part_learns_at_its_own_rate(tmp_path: Path):
    rates = {"language": 1.0e-2, "vision": 0.0, "connector": 1.0e-4, "scorer": 0.0}
    trainer = _trainer(tmp_path, labels={"steps": 0}, optim={"rates": rates, "warmup_steps": 1})
    before = deepcopy(dict(trainer.start.model.named_parameters()))
    _steps(trainer, 1)
    moved: dict[str, float] = {}
    for name, parameter in trainer.start.model.named_parameters():
        part = ".".join(name.split(".")[:2])
        change = (parameter - before[name]).abs().max().item()
        moved[part] = max(moved.get(part, 0), change)
    # Adam's first step is as long as the rate.
    assert moved["vision.connector"] == pytest.approx(1e-4, rel=0.01)
    assert moved["language.blocks"] == pytest.approx(1e-2, rel=0.01)
    assert moved["vision.blocks"] == moved["vision.scorer"] == moved["vision.embedding"] == 0


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_accumulation_equals_one_batch(
    tmp_path: Path, dataset: Path, checkpoint: Path, micro_batch: int
):
    """Of synthetic clips, videos, an image and texts."""
    runs = []
    for size in (4, micro_batch):
        changes = _mixed(dataset, data={"micro_batch": size}, start={"checkpoint": str(checkpoint)})
        trainer = _trainer(tmp_path, **changes)
        runs.append((_steps(trainer, 4), trainer.evaluate(), trainer.start.model))
    (ours, dev, model), (theirs, other_dev, other) = runs
    for one, another in zip(ours, theirs, strict=True):
        for name in ("loss", "accuracy", "tokens", "gradient_norm", "scorer_gradient_norm"):
            assert one[name] == pytest.approx(another[name], rel=1e-4), name
    assert dev == other_dev
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)


def _mixed(dataset: Path, **changes: Any) -> dict[str, Any]:
    """Changes that make a run of several sources."""
    file = {"kind": "file", "path": str(dataset / "all.jsonl"), "weight": 3.0}
    data = {"sources": [{"kind": "synthetic", "max_questions": 2}, file]}
    return {
        "labels": {"steps": 0, "coefficient": 0.0},
        **changes,
        "data": {**data, **changes.get("data", {})},
    }


def test_activation_checkpointing_in_bfloat16_changes_nothing(tmp_path: Path):
    losses = []
    for checkpointed in (False, True):
        optim = {"bfloat16": True, "activation_checkpointing": checkpointed}
        shown = _steps(_trainer(tmp_path, optim=optim), 4)
        losses.append([entry["loss"] for entry in shown])
    assert losses[0] == losses[1]


def test_shared_rows_equal_rows_apart(tmp_path: Path, dataset: Path):
    losses = []
    for length in (0, 400):
        shown = _steps(_trainer(tmp_path, **_mixed(dataset, data={"sequence_length": length})), 3)
        losses.append([entry["loss"] for entry in shown])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("selector", SELECTORS)
def test_every_selector_can_be_trained_with(tmp_path: Path, selector: str):
    trainer = _trainer(tmp_path, pruning={"selector": selector}, labels={"steps": 0})
    shown = _steps(trainer, 2)
    assert all(math.isfinite(value) for entry in shown for value in entry.values())
    assert (shown[0]["similarity_loss"] > 0) == (selector != "evs")


def test_random_windows_are_drawn_anew_in_every_step(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
):
    """And always the same where accuracy is measured."""
    lines = (dataset / "all.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "one.jsonl").write_text(lines[0])
    file = {"path": str(tmp_path / "one.jsonl"), "media": str(dataset)}
    trainer = _trainer(
        tmp_path, labels={"steps": 0, "coefficient": 0.0}, dev={**file, "clips": 1},
        data={"sources": [{"kind": "file", **file}], "batch_size": 1, "micro_batch": 1},
        pruning={"selector": "random", "full_share": 0.0, "min_ratio": 0.5, "max_ratio": 0.5},
    )  # fmt: skip
    before, keeps = trainer.trainee.answer_questions, []

    def noted(*arguments: Any) -> Any:
        out = before(*arguments)
        keeps.append(out.encoded.keeps[0])
        return out

    monkeypatch.setattr(trainer.trainee, "answer_questions", noted)
    _steps(trainer, 4)
    assert len({keep.tobytes() for keep in keeps}) > 1
    keeps.clear()
    trainer.evaluate()
    _steps(trainer, 1)
    trainer.evaluate()
    np.testing.assert_array_equal(keeps[0], keeps[2])


def test_logs_and_checkpoints_of_a_run(whole: Path):
    names = {path.name for path in whole.iterdir()}
    assert names == {"log.jsonl", "pictures", "state", "step4", "step7", "tensorboard"}
    assert [path.name for path in (whole / "state").iterdir()] == ["step7"]
    assert {int(path.stem[4:]) for path in (whole / "pictures").iterdir()} == {2, 4, 7}
    for name in ("step4", "step7"):
        checkpoint = open_checkpoint(whole / name)
        assert checkpoint.has_scorer
        PromptBuilder.from_folder(whole / name, checkpoint.config)
    training = json.loads((whole / "step7" / "training.json").read_text(encoding="utf-8"))
    assert (training["steps"], training["seed"], training["examples"]) == (7, 3, 20)
    assert training["config"]["optim"]["steps"] == 7
    assert training["parameters"] == sum(w.numel() for w in _weights(whole / "step7").values())
    dev = _curve(whole)[-1]
    assert dev["kind"] == "dev"
    assert set(dev) - {"kind", "step"} == set(training["dev_accuracy"]) - {"prune_ratio"}
    assert training["dev_accuracy"]["prune_ratio"] == 0.5


def test_the_log_says_what_happened(whole: Path):
    entries = read_log(whole)
    steps = [(entry["kind"], entry["step"]) for entry in entries]
    # The label steps end with a line of their own; nothing is asked of a model that cannot see.
    assert steps == [
        ("train", 2), ("train", 3), ("dev", 3), ("train", 6), ("dev", 6), ("train", 7), ("dev", 7),
    ]  # fmt: skip
    assert set(entries[0]) >= {"loss", "accuracy", "gradient_norm", "rate"}
    assert not any(name in entries[0] for name in LOSSES[1:])
    answered = [entry for entry in entries[1:] if entry["kind"] == "train"]
    wanted = {
        *LOSSES, "accuracy", "score_low", "score_high", "score_spread", "kept_low", "kept_high",
        "tokens_per_second", "clips_per_second", "gradient_norm", "scorer_gradient_norm", "rate",
        "broken",
    }  # fmt: skip
    assert all(set(entry) >= wanted for entry in answered)
    assert all(entry["seconds"] > 0 for entry in entries)
    assert all(0 <= entry["kept_low"] < entry["kept_high"] <= 1 for entry in answered)


# Dev accuracy


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_dev_accuracy_is_that_of_answers_one_by_one(
    tmp_path: Path, checkpoint: Path, dataset: Path, micro_batch: int
):
    dev = {"path": str(dataset / "yes.jsonl"), "clips": 11}
    start = {"checkpoint": str(checkpoint)}
    trainer = _trainer(tmp_path, start=start, dev=dev, data={"micro_batch": micro_batch})
    found = trainer.evaluate()
    assert trainer.trainee.training
    right: dict[str, list[bool]] = {"clip": [], "number": []}
    with torch.no_grad():
        for example in trainer.dev_set.examples:
            right[example.questions[0].type] += trainer.trainee([example]).correct.tolist()
    assert [len(own) for own in right.values()] == [3, 8]
    every = [correct for own in right.values() for correct in own]
    expected = {kind: np.mean(own) for kind, own in right.items()}
    assert found == pytest.approx({"accuracy": np.mean(every), **expected})
    assert 0 < found["accuracy"] < 1
    assert trainer.dev == found


def test_questions_without_labels_can_measure_a_run_with_them(tmp_path: Path, dataset: Path):
    trainer = _trainer(tmp_path, dev={"path": str(dataset / "all.jsonl"), "clips": 5})
    assert len(trainer.dev_set.examples) == 5
    assert set(trainer.evaluate()) == {"accuracy", "colour", "shape", "untyped"}


def test_dev_questions_that_cannot_be_asked_are_refused_at_once(tmp_path: Path):
    (tmp_path / "dev.jsonl").write_text('{"question": "<im_patch>?", "answer": "a"}\n')
    with pytest.raises(InputError, match="special token") as raised:
        _trainer(tmp_path, dev={"path": str(tmp_path / "dev.jsonl")})
    assert "dev.jsonl" in (raised.value.where or "")


# Interruptions


@pytest.mark.parametrize("killed_at", [3, 4, 5, 6])
def test_a_killed_run_goes_on_as_if_nothing_had_been(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
):
    """Checkpoints are at steps 2, 4 and 7, log lines at 2, 3, 6 and 7."""
    config = _config(tmp_path, picture_every=4)
    with _killed(monkeypatch, lambda trainer: trainer.step == killed_at):
        train(config, tmp_path / "run")
    train(config, tmp_path / "run", resume=True)
    assert _curve(tmp_path / "run") == _curve(whole)
    _assert_same_weights(tmp_path / "run" / "step7", whole / "step7")


@pytest.mark.parametrize("interrupted", ["save_model", "save_state", "remove_older"])
def test_a_run_killed_while_it_saves_goes_on(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: str
):
    config = _config(tmp_path, picture_every=4)
    before = getattr(loop, interrupted)

    def killed(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == 2:
            raise Killed
        return before(*arguments, **options)

    calls: list[None] = []
    with monkeypatch.context() as patched:
        patched.setattr(loop, interrupted, killed)
        with pytest.raises(Killed):
            train(config, tmp_path / "run")
    train(config, tmp_path / "run", resume=True)
    assert _curve(tmp_path / "run") == _curve(whole)
    _assert_same_weights(tmp_path / "run" / "step7", whole / "step7")
    assert {path.name for path in tmp_path.joinpath("run").glob("step*")} == {"step4", "step7"}


def test_a_run_killed_before_its_first_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = _config(tmp_path, save_every=100, log_every=1)
    with _killed(monkeypatch, lambda trainer: trainer.step == 1):
        train(config, tmp_path / "run")
    assert (tmp_path / "run" / LOG_FILE).exists()
    with pytest.raises(InputError, match="fix: remove it, and start without --resume"):
        train(config, tmp_path / "run", resume=True)
    with pytest.raises(InputError, match="remove it: it holds no run to resume"):
        train(config, tmp_path / "run")


def test_dropout_of_adapters_is_resumed_exactly(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    lora = {"checkpoint": str(checkpoint), "train": "lora", "lora": {"rank": 2, "dropout": 0.5}}
    config = _config(tmp_path, start=lora, labels={"steps": 0})
    train(config, tmp_path / "whole")
    with _killed(monkeypatch, lambda trainer: trainer.step == 5):
        train(config, tmp_path / "run")
    train(config, tmp_path / "run", resume=True)
    assert _curve(tmp_path / "run") == _curve(tmp_path / "whole")
    _assert_same_weights(tmp_path / "run" / "step7", tmp_path / "whole" / "step7")

    trainer = Trainer(TrainConfig.from_file(config), tmp_path / "other", ALONE)
    _steps(trainer, 2)
    with trainer._feed() as feed:
        examples = [one for one in next(feed) if isinstance(one, Example)]
    one, other = (trainer.trainee(examples).answer.item() for _ in range(2))
    assert one != other  # there is dropout
    # There is none when accuracy is measured.
    with trainer._evaluating():
        one, other = (trainer.trainee(examples).answer.item() for _ in range(2))
    assert one == other


def _signalled(monkeypatch: pytest.MonkeyPatch, signals: Mapping[int, list[int]]) -> None:
    """Signals that come in the middle of a step, before the losses are summed over processes."""
    before = Trainer._answer_questions

    def answer_questions(self: Trainer, made: Any) -> dict[str, float]:
        for number in signals.get(self.step, []):
            os.kill(os.getpid(), number)
        return before(self, made)

    monkeypatch.setattr(Trainer, "_answer_questions", answer_questions)


@pytest.fixture
def usual_handlers() -> Iterator[None]:
    """Those of a program in a terminal, whatever the tests run in."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.usefixtures("usual_handlers")
def test_a_signal_ends_the_run_with_everything_saved(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, number: int, code: int
):
    config = _config(tmp_path, picture_every=4)
    run = tmp_path / "run"
    command = ["train", str(config), "-o", str(run)]
    with monkeypatch.context() as patched:
        _signalled(patched, {4: [number]})
        try:
            found: object = main(command)
        except SystemExit as ended:
            found = ended.code
    assert found == code
    said = capsys.readouterr().err
    assert "stopped after step 5; go on with --resume" in said
    assert "Traceback" not in said
    if number == signal.SIGTERM:  # the command line ignores further interrupts
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert [path.name for path in (run / "state").iterdir()] == ["step5"]
    open_checkpoint(run / "step5")

    assert main([*command, "--resume"]) == 0
    assert _curve(run) == _curve(whole)
    _assert_same_weights(run / "step7", whole / "step7")


@pytest.mark.usefixtures("usual_handlers")
def test_a_second_signal_ends_it_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _signalled(monkeypatch, {4: [signal.SIGINT, signal.SIGINT]})
    with pytest.raises(KeyboardInterrupt):
        train(_config(tmp_path), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "state").iterdir()] == ["step4"]


@pytest.mark.usefixtures("usual_handlers")
def test_signals_that_are_ignored_stay_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As in a job that a script started with `&`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _signalled(monkeypatch, {4: [signal.SIGINT]})
    train(_config(tmp_path), tmp_path / "run")
    assert (tmp_path / "run" / "step7").exists()


@pytest.mark.usefixtures("usual_handlers")
def test_a_signal_in_the_last_step_comes_too_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _signalled(monkeypatch, {6: [signal.SIGTERM]})
    train(_config(tmp_path), tmp_path / "run")
    assert (tmp_path / "run" / "step7").exists()


# Refusals


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    elsewhere = tmp_path / "temporary"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    config = _config(tmp_path, picture_every=1, log_every=1, save_every=1)
    assert main(["train", str(config), "-o", str(tmp_path / "run"), "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert not list(elsewhere.iterdir())
    assert re.search(r"one step: loss \d+\.\d+, .* s; nothing was written", said)
    assert "parameters" in said


def test_a_dry_run_tries_both_kinds_of_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    called = []
    for name in ("_name_windows", "_answer_questions"):
        before = getattr(Trainer, name)

        def noted(self: Trainer, made: Any, name: str = name, before: Any = before) -> Any:
            called.append(name)
            return before(self, made)

        monkeypatch.setattr(Trainer, name, noted)
    train(_config(tmp_path), tmp_path / "run", dry_run=True)
    assert called == ["_name_windows", "_answer_questions"]


def test_a_dry_run_of_a_run_that_exists_leaves_it_alone(whole: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "state" / "step7")
    before = {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*"))}
    train(_config(tmp_path, picture_every=4), run, dry_run=True)
    assert {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*"))} == before


def test_refuses_to_overwrite_or_to_resume_nothing(whole: Path, tmp_path: Path):
    config, run = _config(tmp_path), tmp_path / "run"
    with pytest.raises(InputError, match="holds no run to resume\n  fix: start without"):
        train(config, run, resume=True)
    with pytest.raises(InputError, match="is not empty\n  fix: pass --resume"):
        train(config, whole)
    run.touch()
    with pytest.raises(InputError, match="is not a folder"):
        train(config, run)


def test_a_folder_that_cannot_be_written_to_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").touch()
    monkeypatch.setattr(loop, "Trainer", None)
    with pytest.raises(InputError, match="cannot be written to: Not a directory"):
        train(_config(tmp_path), tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 4}, "seed"),
        ({"data": {"batch_size": 8}}, "data.batch_size"),
        ({"data": {"sources": [{"max_questions": 3}]}, "optim": {"betas": [0.8, 0.9]}},
         "data.sources, optim.betas"),
        ({"pruning": {"refill": False}}, "pruning.refill"),
        ({"model": {"text_layers": 1}}, "model.text_layers"),
    ],
)  # fmt: skip
def test_refuses_to_resume_with_another_configuration(
    whole: Path, tmp_path: Path, changes: dict[str, Any], named: str
):
    with pytest.raises(InputError, match=f"started with another {named}\n"):
        train(_config(tmp_path, picture_every=4, **changes), whole, resume=True)


def test_what_changes_no_step_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with _killed(monkeypatch, lambda trainer: trainer.step == 4):
        train(_config(tmp_path), tmp_path / "run")
    changes: dict[str, Any] = {
        "output": "y", "log_every": 1, "save_every": 3, "keep_checkpoints": 9, "picture_every": 1,
        "parallel": "fsdp", "data": {"micro_batch": 2, "max_broken": 3}, "dev": {"clips": 2},
        "optim": {"rates": {"language": 1.0e-3}},
    }  # fmt: skip
    train(_config(tmp_path, **changes), tmp_path / "run", resume=True)
    assert read_log(tmp_path / "run")[-1]["step"] == 7


def test_a_finished_run_is_left_as_it_is(whole: Path, tmp_path: Path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    train(_config(tmp_path, picture_every=4), tmp_path / "run", resume=True)
    assert _curve(tmp_path / "run") == _curve(whole)
    assert "all 7 steps are done already" in capsys.readouterr().err


def test_a_damaged_state_is_named(whole: Path, tmp_path: Path):
    shutil.copytree(whole, tmp_path / "run")
    state = tmp_path / "run" / "state" / "step7"
    (state / "state.json").write_text("{}")
    with pytest.raises(InputError, match="is damaged") as raised:
        train(_config(tmp_path, picture_every=4), tmp_path / "run", resume=True)
    assert raised.value.where == str(state)


# Bad data


def test_broken_clips_are_left_out_up_to_a_limit(tmp_path: Path, dataset: Path, caplog):
    broken = tmp_path / "data"
    shutil.copytree(dataset, broken)
    (broken / "1.mp4").write_bytes(b"")
    (broken / "2.mp4").write_bytes((broken / "2.mp4").read_bytes()[:900])
    file = {"kind": "file", "path": str(broken / "all.jsonl")}
    changes = _mixed(dataset, data={"sources": [file], "max_broken": 2})
    with caplog.at_level(logging.INFO):
        shown = _steps(_trainer(tmp_path, **changes), 6)
    assert shown[0]["broken"] <= shown[-1]["broken"] == 2
    assert min(entry["clips"] for entry in shown) < 4
    assert sum("1.mp4" in record.getMessage() for record in caplog.records) == 1  # told once
    assert all(math.isfinite(entry["loss"]) for entry in shown)

    changes["data"]["max_broken"] = 1
    with pytest.raises(InputError, match="2 videos or images cannot be used") as raised:
        _steps(_trainer(tmp_path, **changes), 6)
    assert "1.mp4" in str(raised.value)
    assert "2.mp4" in str(raised.value)


def test_what_is_broken_is_remembered_over_an_interruption(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
):
    broken = tmp_path / "data"
    shutil.copytree(dataset, broken)
    (broken / "1.mp4").write_bytes(b"")
    file = {"kind": "file", "path": str(broken / "all.jsonl")}
    config = _config(tmp_path, **_mixed(dataset, data={"sources": [file], "max_broken": 1}))
    train(config, tmp_path / "whole")
    with _killed(monkeypatch, lambda trainer: trainer.step == 5):
        train(config, tmp_path / "run")
    train(config, tmp_path / "run", resume=True)
    assert _curve(tmp_path / "run") == _curve(tmp_path / "whole")
    assert _curve(tmp_path / "run")[-2]["broken"] == 1


def test_a_step_of_which_nothing_is_left(tmp_path: Path):
    lines = '{"question": "<im_patch>?", "answer": "a"}\n{"question": "q", "answer": "<im_end>"}\n'
    (tmp_path / "odd.jsonl").write_text(lines)
    data = {"sources": [{"kind": "file", "path": str(tmp_path / "odd.jsonl")}], "max_broken": 2}
    changes = _mixed(tmp_path, data=data)
    shown = _steps(_trainer(tmp_path, **changes), 2)
    assert [entry["loss"] for entry in shown] == [0, 0]
    assert [entry["clips"] for entry in shown] == [0, 0]
    assert shown[1]["broken"] == 2


def test_what_does_not_fit_into_a_row_counts_as_broken(tmp_path: Path):
    data = {"sequence_length": 30}
    with pytest.raises(InputError, match="cannot be used") as raised:
        _steps(_trainer(tmp_path, data=data, labels={"steps": 0}), 1)
    assert re.search(r"synthetic clip \d+: \d+ tokens after removal, sequence_length is 30",
                     str(raised.value))  # fmt: skip


def test_workers_change_nothing(tmp_path: Path, dataset: Path):
    runs = []
    for workers in (0, 2):
        data = {"workers": workers, "max_broken": 1}
        runs.append(_steps(_trainer(tmp_path, **_mixed(dataset, data=data)), 3))
    assert runs[0] == runs[1]


# Numbers that are none


def _poison(monkeypatch: pytest.MonkeyPatch, step: int, how: str) -> None:
    before = Trainer.train_step

    def train_step(self: Trainer, feed: Any) -> dict[str, float]:
        if self.step == step:
            weight = self.start.model.vision.connector.w2.weight
            if how == "weight":
                with torch.no_grad():
                    weight[0, 0] = math.nan
            else:
                weight.register_hook(lambda gradient: gradient * math.nan)
        return before(self, feed)

    monkeypatch.setattr(Trainer, "train_step", train_step)


@pytest.mark.parametrize(("how", "step"), [("weight", 5), ("gradient", 5), ("weight", 1)])
def test_a_loss_that_is_no_number_stops_the_run(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, how: str, step: int
):
    config, run = _config(tmp_path, picture_every=4, save_every=1), tmp_path / "run"
    with monkeypatch.context() as patched:
        _poison(patched, step, how)
        assert main(["train", str(config), "-o", str(run)]) == 1
    said = capsys.readouterr().err
    assert said.count("error:") == 1
    # The label steps have one loss only; of the others the one that broke is named.
    culprit = {"gradient": "gradient of the rest"}.get(how, "answer_loss" if step > 1 else "loss")
    assert f"{run}: {culprit} is nan" in said
    assert f"is nan after step {step}; the batch is in {run / 'failures' / f'step{step}'}" in said
    assert "Traceback" not in said
    kept = load_failure(run / "failures" / f"step{step}")
    if step >= 2:
        trainer = Trainer(TrainConfig.from_file(config), tmp_path / "other", ALONE)
        trainer.step = step
        with trainer._feed() as feed:
            expected = [one for one in next(feed) if isinstance(one, Example)]
        assert [one.name for one in kept] == [one.name for one in expected]
        assert kept[0].clip is not None
        assert expected[0].clip is not None
        np.testing.assert_array_equal(kept[0].clip.frames, expected[0].clip.frames)
    else:
        assert [example.name for example in kept] == [f"single frame {i}" for i in range(4)]

    # What was saved before is whole, and the run goes on from there once the cause is gone.
    assert [path.name for path in (run / "state").iterdir()] == [f"step{step}"]
    assert all(torch.isfinite(weight).all() for weight in _weights(run / f"step{step}").values())
    train(config, run, resume=True)
    _assert_same_weights(run / "step7", whole / "step7")


def test_the_step_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trainer = _trainer(tmp_path, labels={"steps": 0})
    _poison(monkeypatch, 0, "gradient")
    before = deepcopy(trainer.start.model.state_dict())
    with pytest.raises(TrainingError, match="gradient of the rest is nan"):
        _steps(trainer, 1)
    after = trainer.start.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert trainer.step == 0


# A full disk


def test_a_full_disk_leaves_the_last_checkpoint(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    config, run = _config(tmp_path, picture_every=4), tmp_path / "run"
    with monkeypatch.context() as patched:
        save = Trainer.save

        def save_on_a_full_disk(self: Trainer) -> Path:
            with full_disk(30_000 if self.step > 4 else None):
                return save(self)

        patched.setattr(Trainer, "save", save_on_a_full_disk)
        assert main(["train", str(config), "-o", str(run)]) == 1
    said = capsys.readouterr().err
    assert said.count("error:") == 1
    assert f"{run / 'step7'}: cannot be written: File too large" in said
    assert "free some space and go on with --resume" in said
    assert "Traceback" not in said
    assert {path.name for path in run.glob("step*")} == {"step2", "step4"}
    _assert_same_weights(run / "step4", whole / "step4")
    train(config, run, resume=True)
    _assert_same_weights(run / "step7", whole / "step7")
    assert _curve(run) == _curve(whole)


# Where a run starts


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a run without a scorer; read only."""
    folder = tmp_path_factory.mktemp("plain")
    config = _config(
        folder, model={"scorer": False}, pruning={"full_share": 1.0}, dev={"prune_ratio": 0.0}
    )
    run = train(config, folder / "run")
    assert {e["similarity_loss"] for e in read_log(run) if "similarity_loss" in e} == {0}
    return run / "step7"


def _changed(run: Path, start: Path) -> set[str]:
    """Parts of the model that differ from the start, and the scorer if it has none."""
    before, after = _weights(start), _weights(run)
    names = set(after) - set(before)
    names |= {name for name in before if not torch.equal(before[name], after[name])}
    return {"scorer" if "scorer" in name else name.split(".")[0] for name in names}


@pytest.mark.parametrize(
    ("kind", "settings", "changed"),
    [
        ("plain", {"prune_at": 0}, {"scorer", "vision", "language"}),
        ("plain", {"prune_at": 0, "train": "scorer"}, {"scorer"}),
        ("checkpoint", {}, {"scorer", "vision", "language"}),
        ("checkpoint", {"train": "scorer"}, {"scorer"}),
        ("checkpoint", {"fresh_scorer": True, "train": "scorer"}, {"scorer"}),
        ("checkpoint", {"train": "lora", "lora": {"rank": 2}}, {"scorer", "language"}),
    ],
)
def test_start_points(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, settings: dict[str, Any],
    changed: set[str],
):  # fmt: skip
    folder: Path = request.getfixturevalue(kind)
    config = _config(
        tmp_path, start={"checkpoint": str(folder), **settings}, labels={"steps": 0},
        optim={"steps": 3}, save_every=2,
    )  # fmt: skip
    run = train(config, tmp_path / "run")
    checkpoint = open_checkpoint(run / "step3")
    assert checkpoint.has_scorer
    assert _changed(run / "step3", folder) == changed
    training = json.loads((run / "step3" / "training.json").read_text())
    assert training["start"]["from"] == folder.name
    assert training["start"]["train"] == settings.get("train", "all")
    assert training["parameters"] == sum(w.numel() for w in _weights(run / "step3").values())
    # What learned can be taken up again.
    assert json.loads((run / "state" / "step3" / "state.json").read_text())["step"] == 3
    shutil.rmtree(run / "step3")
    train(config, run, resume=True)


def test_a_trained_checkpoint_answers_as_a_bundle(whole: Path, tmp_path: Path, dataset: Path):
    """With the windows and tokens of the model in PyTorch."""
    bundle_from_checkpoint(whole / "step7", tmp_path / "bundle")
    opened = open_checkpoint(whole / "step7")
    model, config = model_from_checkpoint(opened), opened.config
    frames = read_video(dataset / "0.mp4", max_frames=4, size=config.vision.image_size)
    with Session.open(tmp_path / "bundle") as session:
        clip = session.encode(frames, prune_ratio=0.5)
        answer = session.generate(clip, "Which colour?", max_new_tokens=3)
    assert (answer.kept_windows, answer.total_windows) == (18, 36)
    prompts = PromptBuilder.from_folder(whole / "step7", config)
    video = VideoTokens(tuple(frames.timestamps.tolist()), WINDOWS)
    ids = prompts.build("Which colour?", [video])
    with torch.no_grad():
        encoded = model.encode(torch.from_numpy(frames.frames), 0.5)
        np.testing.assert_array_equal(clip.keep, encoded.keep.numpy())
        stays = kept_positions(ids, encoded.keep.numpy().flatten(), config.tokens.im_patch)
        expected = model.greedy(torch.from_numpy(ids[stays]), encoded.features, 3)
    ends = [n for n, token in enumerate(expected) if token in prompts.eos_token_ids]
    assert list(answer.token_ids) == expected[: ends[0] if ends else 3]


def test_processes_must_share_a_step_evenly(tmp_path: Path):
    config = TrainConfig.from_file(_config(tmp_path))
    with pytest.raises(InputError, match=r"data\.batch_size is 4 for 3 processes"):
        loop._share(config, 3)
    assert loop._share(config, 2) == 2
    few = replace(config, labels=replace(config.labels, frames=1))
    with pytest.raises(InputError, match=r"labels\.frames is 1 for 2 processes"):
        loop._share(few, 2)
