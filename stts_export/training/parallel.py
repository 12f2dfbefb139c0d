"""The processes of a run: one alone, or as many as torchrun starts, each with a copy or a shard.

The mean of gradients over processes is what DDP and FSDP leave in `grad`: a loss that is divided
by counts over all processes has to be multiplied by their number.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from stts_export.errors import InputError, MissingDependencyError, SttsError
from stts_export.model.vlm import SttsModel

Result = TypeVar("Result")
Kind = Literal["ddp", "fsdp"]

_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")


class Parallel:
    """This process among those of the run; a context manager around all of its work.

    Args:
        device: "cpu", "cuda", or "auto" for a GPU where there is one.
        environment: where torchrun's variables are; that of the process when None.

    Raises:
        InputError: torchrun's variables are incomplete or no numbers, or it started more processes
            on this machine than there are GPUs.
        MissingDependencyError: "cuda", and torch sees no GPU.
    """

    rank: int
    """Number of this process, from 0."""
    world: int
    """How many processes there are."""
    device: torch.device

    def __init__(
        self, device: str = "auto", *, environment: Mapping[str, str] | None = None
    ) -> None:
        self.rank, self.world, local = _place(os.environ if environment is None else environment)
        self.device = _device(device, local)
        self._copied: DistributedDataParallel | None = None
        self._sharded: nn.Module | None = None

    def __enter__(self) -> Parallel:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world > 1:
            # Counts and messages go between the CPUs, whatever the model runs on.
            on_gpu = self.device.type == "cuda"
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._copied is not None:
            # They hold the group too. As the last ones they would wait for its threads to end and
            # keep the interpreter's lock, for which those wait.
            del self._copied.logger, self._copied.reducer
        if self.world > 1:
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this process writes the logs and the checkpoints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world > 1:
            dist.barrier()

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sum every value over the processes, in float64; all pass the same names."""
        if self.world == 1:
            return {name: float(value) for name, value in values.items()}
        names = sorted(values)
        vector = torch.tensor([values[name] for name in names], dtype=torch.float64)
        dist.all_reduce(vector)
        total = dict(zip(names, vector.tolist(), strict=True))
        return {name: total[name] for name in values}

    def broadcast_object(self, value: Result) -> Result:
        """Return what the main process passed; it must be possible to pickle it."""
        if self.world == 1:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, src=0)
        return holder[0]

    def on_main(self, action: Callable[[], Result]) -> Result:
        """Run something in the main process alone; all get its result.

        Raises:
            SttsError: it raised one; all raise it.
        """
        result: Any = None
        error: SttsError | None = None
        if self.is_main:
            try:
                result = action()
            except SttsError as raised:
                error = raised
        result, error = self.broadcast_object((result, error))
        if error is not None:
            raise error
        return result

    def gather(self, value: Result) -> list[Result]:
        """Return what each process passed, by rank; it must be possible to pickle it."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def raise_together(self, error: SttsError | None) -> None:
        """Raise in all processes if one of them has an error."""
        errors = [error]
        if self.world > 1:
            errors = [None] * self.world
            dist.all_gather_object(errors, error)
        for found in errors:
            if found is not None:
                raise found

    def wrap(self, module: nn.Module, kind: Kind, *, unused: bool = True) -> nn.Module:
        """Move a trainee to the device, copied to every process or sharded over them.

        Sharded parameters are new objects: give the optimizer those of the result. Under "fsdp"
        all processes must run the same layers equally often in a pass, and leave a gradient on the
        same parameters: each layer is gathered and reduced by all together.

        Args:
            module: its `model` is a `SttsModel`; calling it runs the whole pass, and every output
                with a gradient takes part in the loss. Parameters that are frozen stay so.
            kind: "ddp" or "fsdp"; of no effect in a process alone.
            unused: whether a pass may leave parameters out; under "ddp" it is a little faster, and
                fails, where none may.

        Returns:
            The module itself, or a `DistributedDataParallel` around it (see `unwrapped`).
        """
        if self.world == 1:
            return module.to(self.device)
        if kind == "fsdp":
            _shard(module, self.device, self.world)
            self._sharded = module
            return module
        module.to(self.device)
        self._copied = DistributedDataParallel(
            module,
            device_ids=None if self.device.index is None else [self.device.index],
            find_unused_parameters=unused,
        )
        return self._copied

    def no_sync(self, accumulating: bool) -> AbstractContextManager[None]:
        """Keep gradients to oneself in a pass that another one of the same step follows.

        Copies then exchange them once a step. Shards always do it at once: to wait would take the
        memory of the whole model's gradients.
        """
        if accumulating and self._copied is not None:
            later: AbstractContextManager[None] = self._copied.no_sync()
            return later
        return nullcontext()

    def reshard(self) -> None:
        """Let go of what was gathered: a pass without a backward one leaves some of it whole.

        Comes before parameters are looked at by name.
        """
        for part in () if self._sharded is None else self._sharded.modules():
            if isinstance(part, FSDPModule):
                part.reshard()


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module that `Parallel.wrap` was given."""
    inner: nn.Module = module.module if isinstance(module, DistributedDataParallel) else module
    return inner


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU, gathered from all processes if it is sharded.

    Then all of them must call this. It has no gradient, and may share its memory.
    """
    detached = tensor.detach()
    return (detached.full_tensor() if isinstance(detached, DTensor) else detached).cpu()


def clip_(parameters: Iterable[nn.Parameter], norm: float) -> float:
    """Scale gradients in place so that their common L2 norm is at most `norm`.

    Returns:
        The norm before; infinite or NaN where a gradient is.
    """
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    total = nn.utils.get_total_norm(
        [parameter.grad for parameter in with_gradient if parameter.grad is not None]
    )
    if isinstance(total, DTensor):
        total = total.full_tensor()
    nn.utils.clip_grads_with_norm_(with_gradient, norm, total)
    return total.item()


def checkpoint_activations(
    model: SttsModel,
    again: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Make every block of the vision tower and the decoder keep its inputs only.

    The rest is computed again in the backward pass, with the same results. Comes before
    `Parallel.wrap`.

    Args:
        model: changed in place; names of parameters stay.
        again: makes the context in which a block runs again. Autocast is restored without it.
    """
    for block in (*model.vision.blocks, *model.language.blocks):
        block.forward = functools.partial(
            checkpoint,
            block.forward,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), again()),
        )


def _shard(root: nn.Module, device: torch.device, world: int) -> None:
    """Shard every block by itself, so that few of them are whole at a time, and then the rest."""
    model = root.get_submodule("model")
    assert isinstance(model, SttsModel)
    mesh = init_device_mesh(device.type, (world,))
    # The scorer returns one, which nothing changes in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    for block in model.vision.blocks:
        fully_shard(block, mesh=mesh)
    # Small, and called twice where a batch has clips and images: they stay whole in between.
    for part in (model.vision.scorer, model.vision.connector):
        if part is not None:
            fully_shard(part, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(model.vision.connector, "pool")
    for block in model.language.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(root, mesh=mesh)


def _place(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """Rank, number of processes, and rank on this machine."""
    if not any(name in environment for name in _PLACE):
        return 0, 1, 0
    missing = [name for name in (*_PLACE, *_ADDRESS) if name not in environment]
    if missing:
        raise InputError(
            f"{', '.join(missing)} is not set, but {_first(environment)} is",
            where="environment",
            fix="start several processes with torchrun, or one without any of these variables",
        )
    numbers = []
    for name in _PLACE:
        text = environment[name]
        if not text.isdecimal():
            raise InputError(f"{name} is {text!r}", where="environment", allowed="a number")
        numbers.append(int(text))
    rank, world, local = numbers
    if not 0 <= rank < world:
        raise InputError(
            f"RANK is {rank}", where="environment", allowed=f"below WORLD_SIZE = {world}"
        )
    return rank, world, local


def _first(environment: Mapping[str, str]) -> str:
    return next(name for name in _PLACE if name in environment)


def _device(name: str, local: int) -> torch.device:
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not found):
        return torch.device("cpu")
    if not found:
        raise MissingDependencyError(
            "torch sees no GPU",
            where="device: cuda",
            fix="install a torch with CUDA, or train with device: cpu",
        )
    if local >= found:
        raise InputError(
            f"this is process {local + 1} on a machine with {found} GPU(s)",
            where="torchrun",
            fix=f"start it with --nproc-per-node {found}, or train with device: cpu",
        )
    return torch.device("cuda", local)
