"""Rounding in PyTorch against NumPy types, and against what modelopt makes of the same numbers."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stts_export.calibration.layers import LARGEST, Format, LayerQuantization
from stts_export.calibration.rounding import (
    quantise,
    quantised_weight,
    rounded_input,
    rounded_model,
    rounded_scale,
    weight_scales,
)
from stts_export.tensors import Precision
from tests.helpers import random_model

_FLOATS = st.floats(-1000, 1000, width=32)
_TYPES = {"fp8": ml_dtypes.float8_e4m3fn, "nvfp4": ml_dtypes.float4_e2m1fn}


def _layer(weight: torch.Tensor, target: Format, **changes: Any) -> LayerQuantization:
    block = {"int4": 8, "nvfp4": 16}.get(str(target))
    amax = weight.unflatten(1, (-1, block)).abs().amax(-1) if block else weight.abs().amax(1)
    values: dict[str, Any] = {
        "format": target,
        "weight_scale": (amax / LARGEST[target]).numpy(),
        "input_scale": None if target == "int4" else 0.02,
        "block": block,
        **changes,
    }
    return LayerQuantization(**values)


@given(st.lists(_FLOATS, min_size=1, max_size=30), st.floats(0.01, 10))
def test_integers_round_half_to_even_and_saturate(values: list[float], scale: float):
    x = np.array(values, np.float32)
    got = quantise(torch.from_numpy(x), torch.tensor(scale), "int8").numpy()
    assert np.array_equal(got, np.clip(np.rint(x / np.float32(scale)), -128, 127))
    halves = quantise(torch.tensor([0.5, 1.5, 2.5, -0.5, 9.0, -9.0]), torch.tensor(1.0), "int4")
    assert halves.tolist() == [0, 2, 2, 0, 7, -8]


@pytest.mark.parametrize("target", ["fp8", "nvfp4"])
@given(values=st.lists(_FLOATS, min_size=1, max_size=30))
def test_floats_round_as_their_types_do(target: Format, values: list[float]):
    bound = LARGEST[target]
    x = np.clip(np.array(values, np.float32), -bound, bound)
    got = quantise(torch.from_numpy(np.array(values, np.float32)), torch.tensor(1.0), target)
    assert np.array_equal(got.numpy(), x.astype(_TYPES[target]).astype(np.float32))


def test_ties_of_4_bit_floats_go_to_the_even_mantissa():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    expected = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert quantise(ties, torch.tensor(1.0), "nvfp4").tolist() == expected
    assert quantise(-ties, torch.tensor(1.0), "nvfp4").tolist() == [-value for value in expected]


def test_scales_are_normal_numbers_of_the_graph():
    tiny = rounded_scale(torch.tensor([0.0, 1e-9, 0.1]), "fp16")
    assert tiny.tolist() == [2**-14, 2**-14, float(np.float16(0.1))]
    assert rounded_scale(torch.tensor(0.1), "bf16") == float(np.array(0.1, ml_dtypes.bfloat16))


@pytest.mark.parametrize("target", ["int8", "fp8", "int4", "nvfp4"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_values_times_scales_are_near_the_weight(target: Format, precision: Precision):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 32, generator=generator)
    smooth = (0.5 + torch.rand(32, generator=generator)).numpy()
    how = _layer(weight / torch.from_numpy(smooth), target, smooth=smooth)
    values = quantised_weight(weight, how, precision)
    scales = weight_scales(how, precision)
    restored = values * scales.repeat_interleave(32 // scales.shape[1], dim=1)
    off = (restored * torch.from_numpy(smooth) - weight).norm() / weight.norm()
    assert off < {"int8": 0.01, "fp8": 0.04, "int4": 0.1, "nvfp4": 0.15}[target]
    parts = [
        quantised_weight(weight[:, part], how, precision, part)
        for part in (slice(0, 16), slice(16, 32))
    ]
    assert torch.equal(torch.cat(parts, dim=1), values)


@settings(max_examples=20)
@given(st.integers(0, 2**31))
def test_inputs_are_rounded_in_the_type_of_the_graph(seed: int):
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(seed))
    how = _layer(torch.randn(4, 32), "int8")
    scale = float(np.float16(0.02))
    half = x.numpy().astype(np.float16).astype(np.float32)
    expected = np.clip(np.rint(half / np.float32(scale)), -128, 127) * np.float32(scale)
    assert np.array_equal(rounded_input(x, how, "fp16").numpy(), expected)


def test_blocks_of_inputs_have_scales_of_their_own():
    x = torch.cat([torch.full((1, 16), 6.0), torch.full((1, 16), 0.006)], dim=1)
    how = _layer(torch.randn(4, 32), "nvfp4", input_scale=6.0 / (6 * 448))
    got = rounded_input(x, how, "fp32")
    assert torch.allclose(got, x, rtol=0.07)


@pytest.mark.filterwarnings("ignore:transformers:UserWarning")
def test_nvfp4_is_what_modelopt_makes_of_it():
    pytest.importorskip("modelopt")
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    how = _layer(weight, "nvfp4")
    theirs, *_ = NVFP4QTensor.quantize(weight, 16)
    packed = theirs._quantized_data.numpy()
    codes = np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(8, 64)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert np.array_equal(quantised_weight(weight, how, "fp32").numpy(), values)


def test_a_rounded_model_shares_all_that_it_does_not_round():
    model = random_model()
    name = "vision.blocks.3.feed_forward.w1"
    weight = model.get_parameter(f"{name}.weight")
    rounded = rounded_model(model, {name: _layer(weight.detach(), "int8")}, "fp32")
    other = "vision.blocks.3.feed_forward.w2.weight"
    assert rounded.get_parameter(other) is model.get_parameter(other)
    x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(2))
    plain, quantised = model.get_submodule(name)(x), rounded.get_submodule(name)(x)
    assert 0 < (quantised - plain).norm() / plain.norm() < 0.05
    assert torch.equal(model.get_submodule(name)(x), plain)
