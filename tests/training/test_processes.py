"""Runs of several processes, and what ends processes: each test starts real ones."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stts_export.checkpoint import model_from_checkpoint, open_checkpoint
from stts_export.training.config import TrainConfig
from stts_export.training.decoding import BrokenClip
from stts_export.training.examples import Example
from stts_export.training.logs import read_log
from stts_export.training.loop import Trainer, train
from stts_export.training.mixture import step_positions
from tests.training.conftest import run_values, write_run
from tests.training.small_runs import ALONE

KINDS = ("ddp", "fsdp")
STEPS = 5
RATES = dict.fromkeys(("language", "vision", "connector", "scorer"), 1.0e-3)
# Two processes, two micro-batches each; the third source makes steps in which one has only text.
BATCH = 8

PROGRAM = """
    import os, signal
    from stts_export.cli import main
    from stts_export.training.loop import Trainer

    before = Trainer.train_step

    def train_step(self, feed):
        shown = before(self, feed)
        if [self.run.name, self.step, self.parallel.rank] == {at}:
            os.kill(os.{whom}(), signal.{name})
        return shown

    def code(arguments):
        try:
            return main(["train", *arguments])
        except SystemExit as ended:
            return ended.code

    if __name__ == "__main__":  # workers import this file
        signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the tests run in
        Trainer.train_step = train_step
        codes = []
        for port, arguments in {runs}:
            os.environ["MASTER_PORT"] = str(port)
            codes.append(code(arguments))
        print(codes)
"""


def _program(
    folder: Path,
    runs: Sequence[Sequence[str]],
    *,
    at: tuple[str, int, int] = ("none", 0, 0),
    name: str = "SIGINT",
    whom: str = "getpid",
) -> Path:
    """Runs one after the other; in a run, after a step, a process sends a signal."""
    with_ports = [(_free_port(), list(arguments)) for arguments in runs]
    text = textwrap.dedent(PROGRAM).format(at=list(at), name=name, whom=whom, runs=with_ports)
    (folder / "program.py").write_text(text)
    return folder / "program.py"


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _environment(rank: int, world: int) -> dict[str, str]:
    """What torchrun sets."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": _free_port()}
    return {
        **os.environ, **{name: str(value) for name, value in place.items()},
        "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }  # fmt: skip


def _ended(
    command: Sequence[object], environments: Sequence[Mapping[str, str]]
) -> list[tuple[int, str, str]]:
    """Start processes together; returns exit code, stdout and stderr of each."""
    started = [
        subprocess.Popen(
            [sys.executable, *map(str, command)], env=dict(environment), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for environment in environments
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=150) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(started, said, strict=True)]


def _two(program: Path) -> list[tuple[int, str, str]]:
    return _ended([program], [_environment(rank, 2) for rank in range(2)])


@pytest.fixture(scope="module")
def mix(
    checkpoint: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A run of videos, images and texts, in micro-batches, from a checkpoint.

    Some of the videos are broken, and come to both processes.
    """
    folder = tmp_path_factory.mktemp("mix")
    lines = ""
    for number in range(5):
        (folder / f"{number}.mp4").write_bytes((dataset / "2.mp4").read_bytes()[:900])
        asked = {"video": f"{number}.mp4", "question": "q", "answer": "a"}
        lines += json.dumps(asked) + "\n"
    (folder / "broken.jsonl").write_text(lines)
    texts = "".join(f'{{"question": "{number}?", "answer": "yes"}}\n' for number in range(7))
    (folder / "texts.jsonl").write_text(texts)
    return run_values(
        start={"checkpoint": str(checkpoint)},
        labels={"steps": 0, "coefficient": 0.0},
        data={
            "sources": [
                {"kind": "file", "path": str(dataset / "all.jsonl")},
                {"kind": "file", "path": str(folder / "texts.jsonl"), "weight": 0.8},
                {"kind": "file", "path": str(folder / "broken.jsonl"), "weight": 0.4},
                {"max_questions": 2},
            ],
            "batch_size": BATCH, "micro_batch": 2, "max_broken": 5,
        },
        dev={"path": str(dataset / "yes.jsonl"), "clips": 11, "every": 2},
        optim={"steps": STEPS, "rates": RATES},
        log_every=1, save_every=3, keep_checkpoints=9,
    )  # fmt: skip


COMPARED = {
    "loss", "answer_loss", "similarity_loss", "label_loss", "accuracy", "gradient_norm",
    "scorer_gradient_norm", "rate", "broken",
}  # fmt: skip
"""Of the log; the rest is of the main process's share, or of the machine's pace."""


@pytest.fixture(scope="module")
def labelled(checkpoint: Path) -> dict[str, Any]:
    """A run with labels, in which a process has no dev clip."""
    return run_values(
        start={"checkpoint": str(checkpoint)},
        data={"batch_size": 2, "micro_batch": 1}, dev={"clips": 1, "every": 3},
        labels={"steps": 2, "frames": 3},
        optim={"steps": 4, "rates": RATES}, log_every=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(
    mix: dict[str, Any], labelled: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The runs in one process."""
    folder = tmp_path_factory.mktemp("alone")
    train(write_run(folder / "mix.yaml", mix), folder / "mix")
    train(write_run(folder / "labelled.yaml", labelled), folder / "labelled")
    return folder


@pytest.fixture(scope="module")
def together(
    mix: dict[str, Any], labelled: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same runs in two processes, copied and sharded."""
    folder = tmp_path_factory.mktemp("together")
    runs = []
    for kind in KINDS:
        for name, values in (("mix", mix), ("labelled", labelled)):
            config = write_run(folder / f"{name}-{kind}.yaml", {**values, "parallel": kind})
            runs.append([str(config), "-o", str(folder / f"{name}-{kind}")])
    # The signal comes to one of them; both stop after the same step.
    config = write_run(folder / "stopped.yaml", {**mix, "save_every": 100})
    runs.append([str(config), "-o", str(folder / "stopped")])
    for code, printed, said in _two(_program(folder, runs, at=("stopped", 1, 1), name="SIGTERM")):
        assert code == 0, said
        assert printed.endswith("[0, 0, 0, 0, 143]\n")
        assert "Traceback" not in said
        assert said.count("Warning") <= 1  # of copies that leave the decoder out at first
    return folder


def _weights(folder: Path) -> dict[str, Tensor]:
    return dict(model_from_checkpoint(open_checkpoint(folder)).named_parameters())


def _assert_same_runs(ours: Path, theirs: Path) -> None:
    """To rounding."""
    mine, other = read_log(ours), read_log(theirs)
    assert [(e["kind"], e["step"]) for e in mine] == [(e["kind"], e["step"]) for e in other]
    for one, another in zip(mine, other, strict=True):
        if one["kind"] == "dev":
            assert {**one, "seconds": 0} == {**another, "seconds": 0}
            continue
        assert set(one) & COMPARED == set(another) & COMPARED
        for name in set(one) & COMPARED:
            assert one[name] == pytest.approx(
                another[name], rel=1e-3 if "norm" in name else 1e-4
            ), name
    last = max(entry["step"] for entry in mine)
    after, expected = _weights(ours / f"step{last}"), _weights(theirs / f"step{last}")
    assert set(after) == set(expected)
    for name, weight in expected.items():
        torch.testing.assert_close(after[name], weight, rtol=1e-4, atol=5e-5, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mix", "labelled"])
def test_two_processes_equal_one(alone: Path, together: Path, kind: str, name: str):
    _assert_same_runs(together / f"{name}-{kind}", alone / name)


def test_the_mix_has_what_processes_may_differ_in(alone: Path, mix: dict[str, Any], tmp_path: Path):
    """What the comparison is worth: kinds of examples, shares of text alone, a broken clip."""
    config = TrainConfig.from_file(write_run(tmp_path / "run.yaml", mix))
    trainer = Trainer(config, tmp_path / "run", ALONE)
    shares = []
    for step in range(STEPS):
        for rank in range(2):
            positions = step_positions(step, BATCH, rank, 2)
            shares.append([_kind(trainer._make, position) for position in positions])
    assert {kind for share in shares for kind in share} == {"video", "image", "text", "broken"}
    parts = [set(share[start : start + 2]) for share in shares for start in (0, 2)]
    assert {"text"} in parts
    assert {"image", "text"} in parts
    brought = [number % 2 for number, share in enumerate(shares) if "broken" in share]
    assert set(brought) == {0, 1}
    entries = [entry for entry in read_log(alone / "mix") if entry["kind"] == "train"]
    counts = [entry["broken"] for entry in entries]
    assert counts[0] < counts[-1]
    dev = [entry for entry in read_log(alone / "mix") if entry["kind"] == "dev"]
    assert all(0 < entry["accuracy"] < 1 for entry in dev)


def _kind(make: Callable[[int], Example], position: int) -> str:
    try:
        example = make(position)
    except BrokenClip:
        return "broken"
    if example.visual is None:
        return "text"
    return "image" if example.clip is None else "video"


def test_a_signal_to_one_process_stops_all_after_the_same_step(
    alone: Path, together: Path, mix: dict[str, Any]
):
    run = together / "stopped"
    assert [path.name for path in (run / "state").iterdir()] == ["step2"]
    train(write_run(together / "resumed.yaml", {**mix, "save_every": 100}), run, resume=True)
    _assert_same_runs(run, alone / "mix")


def test_torchrun_that_is_told_to_end_lets_all_processes_save(
    alone: Path, mix: dict[str, Any], tmp_path: Path
):
    """As on a cluster. It tells its processes and theirs; one process goes on from there."""
    run = tmp_path / "run"
    values = {**mix, "data": {**mix["data"], "workers": 1}, "parallel": "fsdp", "save_every": 100}
    config = write_run(tmp_path / "run.yaml", values)
    program = _program(
        tmp_path, [[str(config), "-o", str(run)]], at=("run", 2, 1), name="SIGTERM", whom="getppid"
    )
    text = program.read_text().replace('os.environ["MASTER_PORT"] = str(port)', "pass")
    program.write_text(text)
    environment = {k: v for k, v in _environment(0, 1).items() if k not in ("RANK", "WORLD_SIZE",
                   "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR")}  # fmt: skip
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, program]
    ((_, printed, said),) = _ended(torchrun, [environment])
    assert printed == "[143]\n" * 2
    states = [path.name for path in (run / "state").iterdir()]
    assert len(states) == 1
    step = int(states[0].removeprefix("step"))
    assert 3 <= step < STEPS
    assert said.count(f"stopped after step {step}; go on with --resume") == 1
    open_checkpoint(run / states[0])
    train(config, run, resume=True)
    _assert_same_runs(run, alone / "mix")


def test_a_killed_process_leaves_a_run_that_goes_on_bit_by_bit(
    alone: Path, mix: dict[str, Any], tmp_path: Path
):
    run = tmp_path / "run"
    config = write_run(tmp_path / "run.yaml", mix)
    arguments = [str(config), "-o", str(run)]
    program = _program(tmp_path, [arguments], at=("run", 4, 0), name="SIGKILL")
    environment = {k: v for k, v in _environment(0, 1).items() if "RANK" not in k}
    del environment["WORLD_SIZE"]
    ((code, _, _),) = _ended([program], [environment])
    assert code == -signal.SIGKILL
    assert [path.name for path in (run / "state").iterdir()] == ["step3"]
    resumed = ["-m", "stts_export.training", *arguments, "--resume"]
    ((code, printed, said),) = _ended(resumed, [environment])
    assert (code, printed) == (0, f"{run}\n"), said
    ours, theirs = read_log(run), read_log(alone / "mix")
    for one, other in zip(ours, theirs, strict=True):
        assert one.get("loss") == other.get("loss")
    left, right = _weights(run / f"step{STEPS}"), _weights(alone / "mix" / f"step{STEPS}")
    assert all(torch.equal(left[name], right[name]) for name in right)
