"""Scales that modelopt finds: what they must be, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stts_export.calibration.calibrate import Calibration
from stts_export.calibration.layers import LARGEST, LayerQuantization, input_groups
from stts_export.calibration.methods import layers_from_statistics
from stts_export.calibration.recipe import LayerRule, Method, Recipe
from stts_export.calibration.rounding import quantised_weight, rounded_input, weight_scales
from stts_export.calibration.statistics import InputStatistics, ModelStatistics
from stts_export.checkpoint.streamed import sources
from stts_export.errors import InputError
from stts_export.model.vlm import SttsModel
from tests.helpers import random_model, small_config

_QKV = tuple(f"vision.blocks.3.attention.{part}" for part in ("wq", "wk", "wv"))
_UP = "language.blocks.0.ff_proj"


@pytest.fixture(scope="module")
def model() -> SttsModel:
    return random_model(small_config(**{"vit_config.hidden_size": 32}))


def _statistics(model: SttsModel) -> ModelStatistics:
    """Inputs of which one channel is forty times as large as the others."""
    generator = torch.Generator().manual_seed(1)
    inputs = {}
    for names in input_groups(model.config):
        layer = model.get_submodule(names[0])
        assert isinstance(layer, torch.nn.Linear)
        rows = torch.randn(64, layer.in_features, generator=generator)
        rows[:, 3] *= 40
        amax = rows.abs().amax(0) * 1.25  # the largest inputs are not in the sample
        inputs[names[0]] = InputStatistics(
            amax.numpy(), rows.abs().mean(0).numpy(), 64, rows.numpy()
        )
    return ModelStatistics(inputs, {}, {}, {}, 1, (1, 2))


def _found(
    model: SttsModel, names: tuple[str, ...], **rule: object
) -> dict[str, LayerQuantization]:
    plan = dict.fromkeys(names, LayerRule(names, **rule))  # type: ignore[arg-type]
    return layers_from_statistics(model.config, sources(model), plan, _statistics(model))


def _error(model: SttsModel, name: str, how: LayerQuantization) -> float:
    """Relative L2 error of a layer's output on the sampled rows."""
    first = next(names[0] for names in input_groups(model.config) if name in names)
    rows = torch.from_numpy(_statistics(model).inputs[first].rows)
    weight = model.get_parameter(f"{name}.weight").detach()
    values, scales = quantised_weight(weight, how, "fp32"), weight_scales(how, "fp32")
    rounded = values * scales.repeat_interleave(values.shape[1] // scales.shape[1], dim=1)
    exact = rows @ weight.T
    got = rounded_input(rows, how, "fp32") @ rounded.T
    return float((got - exact).norm() / exact.norm())


def test_scales_hold_the_largest_magnitudes(model: SttsModel):
    for target in ("int8", "fp8"):
        how = _found(model, (_UP,), format=target)[_UP]
        weight = model.get_parameter(f"{_UP}.weight").detach()
        largest = float(_statistics(model).inputs[_UP].amax.max())
        assert how.input_scale == pytest.approx(largest / LARGEST[target], rel=1e-5)
        assert how.weight_scale == pytest.approx(
            (weight.abs().amax(1) / LARGEST[target]).numpy(), rel=1e-5
        )


def test_layers_side_by_side_share_the_scales_of_their_input(model: SttsModel):
    found = _found(model, _QKV, format="int8", method="smoothquant")
    first = found[_QKV[0]]
    assert first.smooth is not None
    for name in _QKV[1:]:
        assert found[name].input_scale == first.input_scale
        assert np.array_equal(found[name].smooth, first.smooth)  # type: ignore[arg-type]
        assert not np.array_equal(found[name].weight_scale, first.weight_scale)


@pytest.mark.parametrize(
    ("target", "method", "plain"), [("int8", "smoothquant", "max"), ("int4", "awq", "max")]
)
def test_smoothing_helps_where_a_channel_is_large(
    model: SttsModel, target: str, method: Method, plain: Method
):
    block = {"block": 16} if target == "int4" else {}
    errors = [
        _error(model, _UP, _found(model, (_UP,), format=target, method=one, **block)[_UP])
        for one in (method, plain)
    ]
    assert errors[0] < 0.9 * errors[1]


def test_blocks_are_no_larger_than_they_may_be(model: SttsModel):
    down = "language.blocks.0.ff_out"  # 48 inputs
    how = _found(model, (down,), format="int4", block=128)[down]
    assert how.block == 16
    assert how.weight_scale.shape == (32, 3)
    assert how.input_scale is None
    how = _found(model, (down,), format="nvfp4")[down]
    assert (how.block, how.weight_scale.shape) == (16, (32, 3))


def test_inputs_that_were_never_seen_are_refused(model: SttsModel):
    statistics = _statistics(model)
    statistics.inputs[_UP].amax[:] = 0
    plan = {_UP: LayerRule((_UP,), "int8")}
    with pytest.raises(InputError, match=r"language\.blocks\.0\.ff_proj were never anything but 0"):
        layers_from_statistics(model.config, sources(model), plan, statistics)


def test_calibration_folders_that_are_none(tmp_path):
    with pytest.raises(InputError, match=r"has no calibration\.json"):
        Calibration.from_folder(tmp_path)
    (tmp_path / "calibration.json").write_text('{"schema": 7}')
    with pytest.raises(InputError, match="schema is 7"):
        Calibration.from_folder(tmp_path)
    (tmp_path / "calibration.json").write_text('{"schema": 1}')
    with pytest.raises(InputError, match="cannot be read"):
        Calibration.from_folder(tmp_path)


def test_damaged_scales_are_refused(tmp_path):
    how = LayerQuantization("int8", np.ones(3, np.float32), 0.1)
    made = Calibration(Recipe.load("int8"), {"a": how}, None, "c", None, "d", 0.5, 8, {}, 1, 2)
    made.to_folder(tmp_path)
    assert Calibration.from_folder(tmp_path).layers["a"].input_scale == 0.1
    scales = (tmp_path / "scales.npz").read_bytes()
    for damaged in (scales[:-20], scales[:60] + b"x" + scales[61:], b""):
        (tmp_path / "scales.npz").write_bytes(damaged)
        with pytest.raises(InputError, match="cannot be read"):
            Calibration.from_folder(tmp_path)
