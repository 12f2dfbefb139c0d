"""The state that a run resumes from: what it trains and its optimizer, sharded over processes.

`run/state/stepN/` holds tensors in the format of torch.distributed.checkpoint, which another number
of processes can read, and the rest as JSON. It is read from a run's own folder only; its index is a
pickle, which is checked to describe tensors and nothing else before torch reads it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from stts_export.checkpoint.distributed import sharded_tensors
from stts_export.checkpoint.stored import some
from stts_export.errors import InputError
from stts_export.files import json_object
from stts_export.training.folders import remove_older, step_folders, whole_folder
from stts_export.training.parallel import Parallel, unwrapped

STATE_FOLDER = "state"
_VALUES = "state.json"
_SUM_MODULUS = 2**40


def save_state(
    run: Path,
    step: int,
    trainee: nn.Module,
    optimizer: torch.optim.AdamW,
    extra: Mapping[str, Any],
    parallel: Parallel,
    keep: int = 1,
) -> Path:
    """Write what a run needs to go on; all processes call it.

    Frozen parameters are left out: a run that resumes has them from its start.

    Args:
        run: folder of the run, on a disk that all processes share.
        step: optimizer steps that are done.
        trainee: as `Parallel.wrap` returned it.
        optimizer: of its parameters.
        extra: anything else, as JSON can hold it.
        parallel: the processes.
        keep: newest states that stay on disk.

    Returns:
        `run/state/stepN`, complete.

    Raises:
        InputError: a process could not write; the last complete state is left as it was.
    """
    folder = run / STATE_FOLDER / f"step{step}"
    module = unwrapped(trainee)
    parallel.reshard()
    tensors = _tensors(module, optimizer)
    values = {"step": step, "frozen": _frozen_sum(module, parallel), "extra": dict(extra)}
    with whole_folder(folder, parallel) as partial:
        try:
            with _quiet():
                save(tensors, storage_writer=_Writer(partial), no_dist=parallel.world == 1)
        except CheckpointException as error:
            raise _cause(error) from error
        if parallel.is_main:
            (partial / _VALUES).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    remove_older(run / STATE_FOLDER, keep, parallel)
    return folder


def load_state(
    run: Path, trainee: nn.Module, optimizer: torch.optim.AdamW, parallel: Parallel
) -> dict[str, Any] | None:
    """Put the newest complete state of a run into its trainee and optimizer, in place.

    States that were not finished are passed over. All processes call it, as many as there are now.

    Args:
        run: folder of the run.
        trainee: as `Parallel.wrap` returned it; what is frozen must be as it was.
        optimizer: of its parameters; settings of its groups are left alone.
        parallel: the processes.

    Returns:
        What `save_state` was given as `extra`; None if the run has no state.

    Raises:
        InputError: the newest state is damaged or incomplete, or is of another model, of other
            trained parts, or of other frozen weights.
    """
    folders = parallel.on_main(lambda: step_folders(run / STATE_FOLDER))
    if not folders:
        return None
    folder = folders[-1]
    module = unwrapped(trainee)
    parallel.reshard()
    tensors = _tensors(module, optimizer)
    values = parallel.on_main(lambda: _checked(folders, tensors))
    if values["frozen"] != _frozen_sum(module, parallel):
        raise InputError(
            "the weights that the run does not train are not those it was begun with",
            where=str(folder),
            fix="put the checkpoint of start.checkpoint back as it was, or begin a new run",
        )
    try:
        with _quiet():
            load(
                tensors,
                storage_reader=FileSystemReader(folder),
                no_dist=parallel.world == 1,
            )
    except CheckpointException as error:
        raise _damaged(folders, repr(_cause(error))) from None
    extra: dict[str, Any] = values["extra"]
    return extra


class _Writer(FileSystemWriter):
    """Names the disk as the cause where torch's serialiser only says that its position is odd."""

    def write_data(
        self, plan: SavePlan, planner: SavePlanner
    ) -> torch.futures.Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the remark that a process alone is alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _tensors(module: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Everything that changes, by name: parameters, and the optimizer's tensors of each.

    A parameter that never had a gradient gets the optimizer's state of its first step, which is
    what it begins with anyway.
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    tensors = {
        f"model.{name}": parameter.detach()
        for parameter, name in names.items()
        if parameter.requires_grad
    }
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            own = optimizer.state[parameter]
            if not own:
                # As `torch.optim.AdamW` makes it.
                at = parameter.device if group["fused"] or group["capturable"] else "cpu"
                own["step"] = torch.zeros((), dtype=torch.float32, device=at)
                own["exp_avg"] = torch.zeros_like(parameter)
                own["exp_avg_sq"] = torch.zeros_like(parameter)
            for key, value in own.items():
                tensors[f"optimizer.{names[parameter]}.{key}"] = value
    return tensors


def _frozen_sum(module: nn.Module, parallel: Parallel) -> int:
    """Sum of the bits of all frozen weights: the same however they are sharded."""
    total = 0
    sharded = False
    for parameter in module.parameters():
        if parameter.requires_grad:
            continue
        own = parameter.detach()
        if isinstance(own, DTensor):
            own, sharded = own.to_local(), True
        total += int(own.contiguous().view(torch.int32).sum(dtype=torch.int64))
    total %= _SUM_MODULUS
    if sharded:
        total = int(parallel.sum({"total": total})["total"]) % _SUM_MODULUS
    return total


def _checked(folders: list[Path], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the JSON of the newest state, whose files hold all that is wanted."""
    folder = folders[-1]
    try:
        values = json_object(folder / _VALUES)
        found = sharded_tensors(folder, lambda name: True)
    except InputError as error:
        raise _damaged(folders, f"{error.where}: {error.message}") from None
    if not {"step", "frozen", "extra"} <= set(values):
        raise _damaged(folders, f"{folder / _VALUES} is missing or incomplete")
    wanted = {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}
    held = {name: (value.shape, value.dtype) for name, value in found.items()}
    other = sorted(name for name in {**wanted, **held} if wanted.get(name) != held.get(name))
    if other:
        raise InputError(
            f"is of another model, or one that trained other parts: {some(other)}",
            where=str(folder),
            fix="resume with the configuration it was started with, or begin a new run",
        )
    return values


def _damaged(folders: list[Path], problem: str) -> InputError:
    *older, folder = folders
    return InputError(
        f"is damaged: {problem}",
        where=str(folder),
        fix=f"remove this folder: the run then goes on from {older[-1].name}"
        if older
        else f"remove this folder, and begin a new run with start.checkpoint: {folder.parents[1]}",
    )


def _cause(error: CheckpointException) -> BaseException:
    """Return what stopped a process; the disk, if it stopped any."""
    causes = [cause for cause, _ in error.failures.values()]
    return next((cause for cause in causes if isinstance(cause, OSError)), causes[0])
