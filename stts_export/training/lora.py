"""Low-rank adapters on the decoder, by peft, and the plain model that they make when merged.

A projection W (out, in) becomes W + alpha / rank * B A, with B (out, rank) that begins at zero and
A (rank, in) (LoRA, arXiv 2106.09685, section 4.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stts_export.errors import MissingDependencyError
from stts_export.model.vlm import SttsModel
from stts_export.training.config import LoraSettings
from stts_export.training.parallel import whole_tensor

TARGETS = ("att_proj", "attn_out", "ff_proj", "ff_out")
"""Linear layers of a decoder block that get adapters."""

_ADAPTER = "default"
_BASE = ".base_layer"


@dataclass(frozen=True)
class WholeParameter:
    """A parameter as the plain model has it."""

    name: str
    """In `SttsModel`."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]
    """Returns it on the CPU, merged, and gathered if it is sharded: then all processes call it."""


def add_lora(model: SttsModel, settings: LoraSettings) -> None:
    """Add adapters to every decoder block, in place; the model's results stay as they are.

    Draws the adapters' A from torch's generator.

    Raises:
        MissingDependencyError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MissingDependencyError(
            f"needs a package that is not installed: {error}",
            where="start.train: lora",
            fix="pip install 'stts-export[lora]'",
        ) from None
    adapters = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(TARGETS),
    )
    inject_adapter_in_model(adapters, model.language, _ADAPTER)


def is_adapter(name: str) -> bool:
    """Whether a parameter is part of an adapter, by its name."""
    return ".lora_A." in name or ".lora_B." in name


def whole_parameters(model: SttsModel) -> list[WholeParameter]:
    """List the parameters of the plain model, in its own order; none is loaded.

    A head that is tied to the embedding is listed like any other.

    Args:
        model: with adapters or without, sharded or not.
    """
    found = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if is_adapter(name):
            continue
        load = partial(whole_tensor, parameter)
        owner, _, leaf = name.rpartition(".")
        if owner.endswith(_BASE):
            owner = owner.removesuffix(_BASE)
            load = partial(_merged, model.get_submodule(owner))
            name = f"{owner}.{leaf}"
        found.append(WholeParameter(name, tuple(parameter.shape), parameter.dtype, load))
    return found


def merged_parameters(model: SttsModel) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value (on the CPU, without a gradient) of the plain model's parameters."""
    for parameter in whole_parameters(model):
        yield parameter.name, parameter.load()


def _merged(layer: Any) -> Tensor:
    """Weight (out, in) of an adapted linear layer with its adapter in it."""
    base: nn.Linear = layer.base_layer
    a, b = (whole_tensor(part[_ADAPTER].weight) for part in (layer.lora_A, layer.lora_B))
    return whole_tensor(base.weight) + layer.scaling[_ADAPTER] * (b @ a)
