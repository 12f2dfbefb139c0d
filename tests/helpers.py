"""Tiny checkpoints and golden cases that several tests share."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from stts_export.calibration.layers import LayerQuantization
from stts_export.calibration.recipe import LayerRule, block_of
from stts_export.checkpoint import save_checkpoint
from stts_export.config import ModelConfig
from stts_export.model.vlm import SttsModel
from stts_export.tensors import Precision

ON_CPU: tuple[Precision, ...] = ("fp32", "fp16")
"""Precisions that ONNX Runtime has kernels for."""
GOLDEN = Path(__file__).parent / "data" / "molmo2_stts_tiny"


@dataclass(frozen=True)
class GoldenCase:
    """A clip and what the reference code computed from it."""

    name: str
    prune_ratio: float
    frames: NDArray[np.uint8]
    expected: dict[str, NDArray[Any]]


GOLDEN_CASES = sorted(path.name.split(".")[0] for path in GOLDEN.glob("video*.frames.npz"))


def golden_case(name: str) -> GoldenCase:
    percent = int(name.rsplit("prune", 1)[1])
    return GoldenCase(
        name,
        percent / 100,
        np.load(GOLDEN / f"{name}.frames.npz")["frames"],
        load_file(GOLDEN / f"{name}.outputs.safetensors"),
    )


def small_config(**changes: Any) -> dict[str, Any]:
    """A Molmo2 config.json of a model that runs in milliseconds.

    Args:
        changes: keys of the top level, or "section.key".
    """
    values: dict[str, Any] = json.loads((GOLDEN / "config.json").read_text(encoding="utf-8"))
    values = copy.deepcopy(values)
    settings = {
        "vit_config.image_default_input_size": [84, 126],
        "vit_config.image_num_pos": 54,
        "vit_config.hidden_size": 24,
        "vit_config.intermediate_size": 40,
        "vit_config.num_hidden_layers": 5,
        "vit_config.num_attention_heads": 2,
        "vit_config.num_key_value_heads": 2,
        "vit_config.head_dim": 12,
        "vit_config.prune_at": 1,
        "adapter_config.vit_layers": [-1, -2],
        "adapter_config.hidden_size": 24,
        "adapter_config.num_attention_heads": 2,
        "adapter_config.num_key_value_heads": 2,
        "adapter_config.head_dim": 12,
        "adapter_config.intermediate_size": 32,
        "adapter_config.text_hidden_size": 32,
        "text_config.hidden_size": 32,
        "text_config.num_hidden_layers": 2,
        "text_config.intermediate_size": 48,
        "text_config.head_dim": 16,
        **changes,
    }
    for path, value in settings.items():
        *sections, key = path.split(".")
        target = values
        for section in sections:
            target = target[section]
        target[key] = value
    return values


def random_model(
    values: dict[str, Any] | None = None, *, scorer: bool = True, seed: int = 0
) -> SttsModel:
    """Random weights; scores spread over (0, 1)."""
    config = ModelConfig.from_dict(values or small_config(), has_scorer=scorer)
    torch.manual_seed(seed)
    model = SttsModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
            elif parameter.ndim == 1:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            else:
                scale = 1.5 / parameter.shape[-1] ** 0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        if model.vision.scorer:
            model.vision.scorer.w3.weight.mul_(0.2)
    return model


def random_checkpoint(
    folder: Path, values: dict[str, Any] | None = None, *, scorer: bool = True, seed: int = 0
) -> Path:
    save_checkpoint(random_model(values, scorer=scorer, seed=seed), folder)
    return folder


def random_frames(
    count: int, size: tuple[int, int] = (84, 126), seed: int = 0
) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, *size, 3), dtype=np.uint8)


def prompt_ids(config: ModelConfig, frames: int, seed: int = 0) -> list[int]:
    """A complete sequence as before pruning."""
    rng = np.random.default_rng(seed)
    tokens = config.tokens
    ids: list[int] = []
    for _ in range(frames):
        ids += [
            int(rng.integers(config.text.vocab_size)),
            tokens.frame_start,
            *[tokens.im_patch] * config.vision.windows,
            tokens.frame_end,
        ]
    return ids + [int(token) for token in rng.integers(config.text.vocab_size, size=6)]


def write_video(path: Path, frames: int = 8, seed: int = 0) -> Path:
    """Random pictures of 64 x 96, 8 a second: 8 of them give 3 samples, 4 give 2."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for image in random_frames(frames, (64, 96), seed):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


def picture(size: tuple[int, int], seed: int = 0) -> NDArray[np.uint8]:
    """An image with shapes and noise."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 60, (*size, 3))
    ramp = np.add.outer(np.arange(size[0]) * 2, np.arange(size[1]))[..., None] % (150 + 9 * seed)
    return (noise + ramp * np.array([1.0, 0.7, 1.2]) % 196).astype(np.uint8)


def image_ids(
    config: ModelConfig, grids: Sequence[Sequence[int]], seed: int = 0
) -> NDArray[np.int64]:
    """A complete sequence about images, as before pruning; grids as in `ImageTokens`."""
    tokens, rng = config.tokens, np.random.default_rng(seed)
    ids = [int(rng.integers(config.text.vocab_size))]
    for low_rows, low_columns, rows, columns in grids:
        low = [tokens.im_patch] * low_columns + [tokens.im_col]
        high = [tokens.im_patch] * columns + [tokens.im_col]
        ids += [tokens.low_res_im_start, *low * low_rows, tokens.im_end]
        ids += [tokens.im_start, *high * rows, tokens.im_end]
    text = rng.integers(config.text.vocab_size, size=6)
    return np.array([*ids, *text.tolist()], dtype=np.int64)


def any_scales(shape: tuple[int, ...], rule: LayerRule) -> LayerQuantization:
    """Any scales of the right shapes."""
    outputs, inputs = shape
    smooth = np.ones(inputs, np.float32) if rule.method in ("smoothquant", "awq") else None
    if rule.format in ("int4", "nvfp4"):
        block = block_of(inputs, rule.block) if rule.format == "int4" else 16
        scale = np.full((outputs, inputs // block), 0.02, np.float32)
        whole = 1e-3 if rule.format == "nvfp4" else None
        return LayerQuantization(rule.format, scale, whole, smooth, block)
    return LayerQuantization(rule.format, np.full(outputs, 2e-3, np.float32), 0.05, smooth)
