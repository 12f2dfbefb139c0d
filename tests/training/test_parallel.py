from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from stts_export.checkpoint import model_from_checkpoint, open_checkpoint
from stts_export.errors import InputError, MissingDependencyError
from stts_export.training.parallel import Parallel, checkpoint_activations, clip_, unwrapped
from stts_export.training.start import start_from
from tests.training.processes import CONFIG, KINDS, Small
from tests.training.small_runs import ALONE, SmallTrainee

PLACE = {
    "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1",
}  # fmt: skip


def _free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder that three processes wrote, and what each of them found."""
    folder = tmp_path_factory.mktemp("processes")
    ports = [_free_port(), _free_port()]
    command = [sys.executable, "-m", "tests.training.processes", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    said = [folder / f"errors{rank}" for rank in range(3)]
    started = []
    try:
        for rank in range(3):
            with said[rank].open("w") as errors:
                arguments = [*command, str(rank), *ports]
                started.append(subprocess.Popen(arguments, env=environment, stderr=errors))
        codes = [process.wait(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert codes == [0, 0, 0], "\n".join(file.read_text() for file in said)
    found = [json.loads((folder / f"found{rank}.json").read_text()) for rank in range(3)]
    return folder, found


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """The same training in one process."""
    small = Small(ALONE, "ddp")
    small.backward(0)
    gradients = small.gradients()
    losses = small.steps([0, 1])
    weights = {n: p.detach().clone() for n, p in small.start.model.named_parameters()}
    losses += small.steps([2, 3])
    return {"gradients": gradients, "losses": losses, "norms": small.norms, "weights": weights}


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_have_the_gradients_of_one(kind, processes, alone):
    folder, _ = processes
    gradients = torch.load(folder / kind / "gradients.pt", weights_only=True)
    assert set(gradients) == set(alone["gradients"])
    assert {name.split(".")[1] for name in gradients} == {"vision", "language", "weight", "bias"}
    assert not any("connector" in name for name in gradients)  # frozen
    for name, gradient in alone["gradients"].items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_like_one(kind, processes, alone):
    _, found = processes
    assert found[0][kind]["losses"] == found[1][kind]["losses"]
    assert found[0][kind]["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert found[0][kind]["norms"] == pytest.approx(alone["norms"], rel=1e-3)
    assert alone["losses"][0] != pytest.approx(alone["losses"][1], rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_write_the_model_of_one(kind, processes, alone):
    folder, _ = processes
    saved = model_from_checkpoint(open_checkpoint(folder / kind / "step2"))
    for name, parameter in saved.named_parameters():
        torch.testing.assert_close(parameter, alone["weights"][name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_goes_on_from_the_state_of_two(kind, processes):
    folder, found = processes
    small = Small(ALONE, "ddp")
    assert small.load(folder / kind) == {"step": 2}
    assert small.steps([2, 3]) == pytest.approx(found[0][kind]["losses"][2:], rel=1e-4)


def test_three_processes_go_on_from_the_state_of_two(processes):
    _, found = processes
    for own in found:
        extra, losses = own["resumed"]
        assert extra == {"step": 2}
        assert losses == pytest.approx(found[0]["fsdp"]["losses"][2:], rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_all_processes_hear_that_one_cannot_write(kind, processes):
    folder, found = processes
    for own in found[:2]:
        state, model = own[kind]["errors"]
        assert "No space left on device" in state
        assert f"{folder / kind / 'state' / 'step4'}" in state
        assert f"{folder / kind / 'state' / 'step2'} is whole" in state
        assert "File too large" in model
        assert f"{folder / kind / 'step2'} is whole" in model
    names = {child.name for child in (folder / kind).iterdir()}
    assert names == {"gradients.pt", "state", "step2"}
    assert [child.name for child in (folder / kind / "state").iterdir()] == ["step2"]


def test_what_processes_tell_each_other(processes):
    _, found = processes
    for rank, own in enumerate(found):
        together = own["together"]
        assert together["place"] == [rank, 3, rank == 0, "cpu"]
        assert together["sum"] == {"b": 3, "a": 3 * (2**50 + 0.5)}
        assert together["told"] == {"rank": 0}
        assert together["main"] == found[0]["together"]["main"]
        assert together["errors"] == ["somewhere: is wrong\n  fix: nothing", "late"]


def test_a_process_alone_needs_no_group():
    with Parallel("cpu", environment={}) as parallel:
        assert (parallel.rank, parallel.world, parallel.is_main) == (0, 1, True)
        assert parallel.sum({"a": 1, "b": 0.5}) == {"a": 1.0, "b": 0.5}
        assert parallel.broadcast_object("x") == "x"
        assert parallel.on_main(lambda: 3) == 3
        module = nn.Linear(1, 1)
        for kind in KINDS:
            assert parallel.wrap(module, kind) is module
        assert unwrapped(module) is module
        parallel.barrier()
        assert not torch.distributed.is_initialized()
        with pytest.raises(InputError, match="mine"):
            parallel.raise_together(InputError("mine"))
        with pytest.raises(ZeroDivisionError):
            parallel.on_main(lambda: 1 // 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASTER_PORT": None}, "MASTER_PORT is not set, but RANK is"),
        ({"RANK": None, "LOCAL_RANK": None}, "RANK, LOCAL_RANK is not set, but WORLD_SIZE is"),
        ({"RANK": "two"}, "RANK is 'two'"),
        ({"RANK": "2"}, "RANK is 2"),
    ],
)
def test_an_environment_that_torchrun_would_not_set(changes, message):
    values = {**PLACE, **changes}
    environment = {name: value for name, value in values.items() if value is not None}
    with pytest.raises(InputError, match=message):
        Parallel("cpu", environment=environment)


def test_devices_that_are_not_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Parallel("auto", environment={}).device == torch.device("cpu")
    with pytest.raises(MissingDependencyError, match="sees no GPU"):
        Parallel("cuda", environment={})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert Parallel("auto", environment={}).device == torch.device("cuda", 0)
    assert Parallel("cpu", environment=PLACE).device == torch.device("cpu")
    with pytest.raises(InputError, match=r"process 2 on a machine with 1 GPU.*\n.*per-node 1"):
        Parallel("auto", environment=PLACE)


@pytest.mark.parametrize("norm", [0.5, 1e6])
def test_clipping_scales_all_alike(norm: float):
    one, other = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2))
    one.grad, other.grad = torch.tensor([3.0, 0, 0]), torch.tensor([[0.0, 4], [0, 0]])
    parameters = [one, other, nn.Parameter(torch.zeros(1))]
    assert clip_(parameters, norm) == 5.0
    scale = min(1.0, norm / 5)
    torch.testing.assert_close(one.grad, torch.tensor([3.0 * scale, 0, 0]))
    torch.testing.assert_close(other.grad[0, 1], torch.tensor(4.0 * scale))
    assert clip_([], norm) == 0.0
    one.grad[0] = torch.nan
    assert clip_([one], norm) != clip_([one], norm)


class _Doubled(TorchFunctionMode):
    """Changes what attention computes."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        return 2 * result if func is F.scaled_dot_product_attention else result


@contextmanager
def _mode() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16), _Doubled():
        yield


def test_checkpointed_activations_change_no_gradient():
    results = []
    for checkpointed in (False, True):
        model = start_from(CONFIG).model
        torch.manual_seed(0)
        trainee = SmallTrainee(model)
        if checkpointed:
            checkpoint_activations(model, _mode)
        saved: list[torch.Tensor] = []
        pack = partial(_counted, saved)
        with _mode(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = trainee([0, 1])
        loss.backward()
        gradients = {n: p.grad for n, p in trainee.named_parameters() if p.grad is not None}
        results.append((loss.detach(), gradients, len(saved)))
    (loss, gradients, kept), (same_loss, same_gradients, fewer) = results
    assert torch.equal(loss, same_loss)
    assert set(gradients) == set(same_gradients)
    assert all(torch.equal(gradients[name], same_gradients[name]) for name in gradients)
    assert fewer < kept / 2


def _counted(saved: list[torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
    saved.append(tensor)
    return tensor
