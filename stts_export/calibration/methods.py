"""Scales of layers, found by nvidia-modelopt from the statistics of the pruned model.

One layer at a time: its weight and a sample of its inputs are all that is in memory, so that a
model need not fit.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stts_export.calibration.layers import (
    LARGEST,
    NVFP4_BLOCK,
    NVFP4_SCALE_LARGEST,
    LayerQuantization,
    input_groups,
)
from stts_export.calibration.recipe import LayerRule, block_of, check_nvfp4
from stts_export.calibration.statistics import InputStatistics, ModelStatistics
from stts_export.checkpoint.streamed import Source
from stts_export.config import ModelConfig
from stts_export.errors import InputError, MissingDependencyError

_INSTALL = "pip install 'stts-export[quantize]'"
_SMALLEST = 1e-12


def layers_from_statistics(
    config: ModelConfig,
    weights: Mapping[str, Source],
    plan: Mapping[str, LayerRule],
    statistics: ModelStatistics,
    on_layer: Callable[[int, int], None] | None = None,
) -> dict[str, LayerQuantization]:
    """Find the scales of every layer that a plan quantises.

    Layers that read the same tensor are one layer for the methods: they share its scales.

    Args:
        config: the model.
        weights: parameters by name, see `checkpoint.streamed.sources`.
        plan: rule by layer, see `Recipe.plan`.
        statistics: of the pruned model.
        on_layer: called with (groups of layers that are done, of how many).

    Raises:
        InputError: a layer's inputs were all 0 or never seen, or its width has no block.
        MissingDependencyError: modelopt is not installed.
    """
    groups = [
        names for names in input_groups(config) if names[0] in plan and plan[names[0]].quantised
    ]
    found: dict[str, LayerQuantization] = {}
    for done, names in enumerate(groups):
        if on_layer:
            on_layer(done, len(groups))
        seen = statistics.inputs.get(names[0])
        if seen is None or seen.count == 0 or not seen.amax.any():
            raise InputError(
                f"the inputs of {names[0]} were never anything but 0",
                where="calibration",
                fix="calibrate on clips that the model sees something in",
            )
        parts = [weights[f"{name}.weight"] for name in names]
        matrices = [part.check(part.load()).float() for part in parts]
        shared = _found(names[0], torch.cat(matrices), seen, plan[names[0]])
        start = 0
        for name, matrix in zip(names, matrices, strict=True):
            rows = slice(start, start + len(matrix))
            found[name] = LayerQuantization(
                shared.format,
                shared.weight_scale[rows],
                shared.input_scale,
                shared.smooth,
                shared.block,
            )
            start = rows.stop
    if on_layer:
        on_layer(len(groups), len(groups))
    return found


def _found(name: str, weight: Tensor, seen: InputStatistics, rule: LayerRule) -> LayerQuantization:
    """Ask modelopt about one layer, (out, in)."""
    size = block_of(weight.shape[1], rule.block, name) if rule.format == "int4" else None
    if rule.format == "nvfp4":
        return _nvfp4(name, weight, seen)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    rows = torch.from_numpy(seen.rows)
    if rule.format != "int4":
        # The sample may lack the largest inputs, which decide about scales.
        rows = torch.cat([rows, torch.from_numpy(seen.amax)[None]])
    quantised = _quantised(layer, _settings(rule, size), rows)
    smooth = getattr(quantised.input_quantizer, "pre_quant_scale", None)
    weight_amax = quantised.weight_quantizer.amax.detach().float().clamp(min=_SMALLEST)
    largest = LARGEST[rule.format]
    shape = (weight.shape[0], -1) if size else (weight.shape[0],)
    weight_scale = (weight_amax / largest).expand(*weight_amax.shape).reshape(-1)
    return LayerQuantization(
        rule.format,
        _array(weight_scale.reshape(shape)),
        None if size else float(quantised.input_quantizer.amax.max()) / largest,
        None if smooth is None else _array(smooth.reshape(-1)),
        size,
    )


def _nvfp4(name: str, weight: Tensor, seen: InputStatistics) -> LayerQuantization:
    """Scales of blocks follow from the weight, those of inputs from the data at run time."""
    check_nvfp4(weight.shape[1], name)
    scales = weight.unflatten(1, (-1, NVFP4_BLOCK)).abs().amax(-1) / LARGEST["nvfp4"]
    whole = float(seen.amax.max()) / (LARGEST["nvfp4"] * NVFP4_SCALE_LARGEST)
    return LayerQuantization("nvfp4", _array(scales.clamp(min=_SMALLEST)), whole, None, NVFP4_BLOCK)


def _settings(rule: LayerRule, block: int | None) -> dict[str, Any]:
    """Put a rule in the words of modelopt."""
    inputs: dict[str, Any] = {"enable": False}
    if rule.format == "int4":
        weights: dict[str, Any] = {"num_bits": 4, "block_sizes": {-1: block, "type": "static"}}
    else:
        bits: Any = 8 if rule.format == "int8" else (4, 3)
        weights, inputs = {"num_bits": bits, "axis": 0}, {"cfg": {"num_bits": bits, "axis": None}}
    algorithm: Any = "max"
    if rule.method == "smoothquant":
        algorithm = {"method": "smoothquant", "alpha": rule.alpha}
    elif rule.method == "awq":
        algorithm = {"method": "awq_lite", "alpha_step": 0.1}
    return {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": weights},
            {"quantizer_name": "*input_quantizer", **inputs},
        ],
        "algorithm": algorithm,
    }


def _quantised(layer: nn.Linear, settings: dict[str, Any], rows: Tensor) -> Any:
    """The layer with modelopt's quantisers, calibrated on rows (R, in)."""
    try:
        # It warns about what it could use and does not need here, and prints what it does.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import modelopt.torch.quantization as mtq
    except ImportError as error:
        raise MissingDependencyError(
            f"finding scales needs a package that is not installed: {error}",
            where="calibrate",
            fix=_INSTALL,
        ) from None
    logging.getLogger("modelopt").setLevel(logging.ERROR)
    model = nn.Sequential(layer)
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        torch.no_grad(),
    ):
        warnings.simplefilter("ignore")
        mtq.quantize(model, settings, lambda quantised: quantised(rows))
    return model[0]


def _array(tensor: Tensor) -> NDArray[np.float32]:
    return np.ascontiguousarray(tensor.detach().numpy(), np.float32)
