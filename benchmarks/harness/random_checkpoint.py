"""Random checkpoints in the sizes of the released models, written shard by shard."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

from stts_export.config import ModelConfig
from stts_export.training.config import ModelShape, model_json

SHAPES = ("4b", "8b", "tiny")
_SEED = 20260318
_SHARD_BYTES = 2**30
_BYTES = 2  # of a stored number: fp16
# Of the scorer's last layer: with weights of variance 1 / width and no bias, logits of a clip at
# full size have this mean and deviation. They are moved to the middle and spread.
_LOGIT_MEAN, _LOGIT_DEVIATION = 2.18, 0.298
_LOGIT_SPREAD = 1.5


def config_json(shape: str) -> dict[str, Any]:
    """Return the `config.json` of a model with scorer; sizes as in spec 1.1, 1.2 and 1.7."""
    if shape == "tiny":
        small = ModelShape(
            image_size=126, patch_size=14, vision_width=32, vision_heads=2, vision_mlp=64,
            vision_blocks=7, prune_at=3, taps=(6, 5), connector_mlp=64, text_width=64,
            text_heads=4, text_kv_heads=2, text_mlp=96, text_layers=2,
        )  # fmt: skip
        return _with_unused_blocks(model_json(small, vocab_size=512, max_frames=16, ratio=0.5))
    width, mlp = {"4b": (2560, 9728), "8b": (4096, 12288)}[shape]
    full = ModelShape(
        image_size=378, patch_size=14, vision_width=1152, vision_heads=16, vision_mlp=4304,
        vision_blocks=25, prune_at=3, taps=(24, 18), connector_mlp=mlp, text_width=width,
        text_heads=32, text_kv_heads=8, text_mlp=mlp, text_layers=36,
    )  # fmt: skip
    values = model_json(full, vocab_size=151936, max_frames=384, ratio=0.5)
    values["text_config"].update(
        head_dim=128,
        rope_theta=5e6 if shape == "4b" else 1e6,
        max_position_embeddings=36864,
    )
    return _with_unused_blocks(values)


def _with_unused_blocks(values: dict[str, Any]) -> dict[str, Any]:
    """Configure two blocks more than are stored, as released folders do (27 and 25)."""
    values["vit_config"]["num_hidden_layers"] += 2
    layers = values["adapter_config"]["vit_layers"]
    values["adapter_config"]["vit_layers"] = [layer - 2 for layer in layers]
    return values


def tied(shape: str) -> bool:
    """Whether the head is a copy of the embedding."""
    return shape != "8b"


def checkpoint_bytes(values: dict[str, Any]) -> int:
    """Size of the tensors on disk."""
    return _BYTES * sum(math.prod(size) for _, size in _tensors(values))


def write_checkpoint(folder: Path, values: dict[str, Any], *, tied: bool) -> None:
    """Write random fp16 weights with an index, a shard at a time.

    Weights have the size that keeps a layer's output as large as its input, so that activations
    stay finite in fp16 and scores spread over (0, 1).

    Args:
        folder: created.
        values: the `config.json`.
        tied: write the embedding once more as the head, as released folders of tied models have it.
    """
    import torch
    from safetensors.torch import save_file

    from stts_export.checkpoint.names import LM_HEAD, TOKEN_EMBEDDING

    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    shards = list(_shards(values))
    embedding: torch.Tensor | None = None
    for number, shard in enumerate(shards, 1):
        tensors = {}
        for name, size in shard:
            if name == LM_HEAD and tied and embedding is not None:
                tensors[name] = embedding.clone()
                continue
            tensors[name] = _random(name, size)
            if name == TOKEN_EMBEDDING:
                embedding = tensors[name]
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": checkpoint_bytes(values)}, "weight_map": weight_map}
    texts = {"model.safetensors.index.json": index, "config.json": values}
    for name, content in texts.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _tensors(values: dict[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes, in the model's order; the head comes right after the embedding."""
    import torch

    from stts_export.checkpoint.names import LM_HEAD, TOKEN_EMBEDDING, checkpoint_name
    from stts_export.model.vlm import SttsModel

    with torch.device("meta"):
        model = SttsModel(ModelConfig.from_dict(values, has_scorer=True))
    shapes = {checkpoint_name(n): tuple(p.shape) for n, p in model.named_parameters()}
    first = [TOKEN_EMBEDDING, LM_HEAD]
    return [(name, shapes[name]) for name in (*first, *(n for n in shapes if n not in first))]


def _shards(values: dict[str, Any]) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    shard: list[tuple[str, tuple[int, ...]]] = []
    held = 0
    for name, size in _tensors(values):
        nbytes = _BYTES * math.prod(size)
        if shard and held + nbytes > _SHARD_BYTES:
            yield shard
            shard, held = [], 0
        shard.append((name, size))
        held += nbytes
    yield shard


def _random(name: str, size: tuple[int, ...]) -> Any:
    """Values of a tensor, the same in every shape that has it in this size."""
    import torch

    generator = torch.Generator().manual_seed(_SEED + crc32(name.encode()))
    spread = _LOGIT_SPREAD / _LOGIT_DEVIATION
    if name.endswith("mlp.w3.bias"):
        return torch.full(size, -_LOGIT_MEAN * spread).half()
    values = torch.randn(size, generator=generator)
    if "norm" in name or name.endswith("ln_f.weight"):
        values = 1 + 0.02 * values
    elif len(size) == 1:
        values *= 0.02
    elif name.endswith("positional_embedding"):
        values *= 0.1
    elif name.endswith("mlp.w3.weight"):
        values *= spread * size[-1] ** -0.5
    else:
        values *= size[-1] ** -0.5
    return values.half()
