"""A model that trains in milliseconds, and a loss of it, for tests of starts and processes."""

from __future__ import annotations

import resource
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stts_export.checkpoint import save_checkpoint
from stts_export.model.vlm import SttsModel
from stts_export.training.config import ModelShape, TrainConfig, model_json
from stts_export.training.parallel import Parallel
from stts_export.training.tokenizer import build_tokenizer, save_tokenizer_files
from tests.helpers import prompt_ids, random_frames, random_model

SHAPE = ModelShape(
    image_size=36, patch_size=4, vision_width=16, vision_heads=2, vision_mlp=24, vision_blocks=4,
    prune_at=0, taps=(3, 2), connector_mlp=24, text_width=16, text_heads=2, text_kv_heads=1,
    text_mlp=24, text_layers=2,
)  # fmt: skip
FRAMES = 3
WINDOWS = 9
ALONE = Parallel("cpu", environment={})


def small_values(changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """config.json; its topk is 0.4."""
    _, vocab_size = build_tokenizer()
    values = model_json(SHAPE, vocab_size, max_frames=FRAMES, ratio=0.4)
    for key, value in (changes or {}).items():
        section, _, name = key.rpartition(".")
        (values[section] if section else values)[name] = value
    return values


def small_folder(
    folder: Path, *, scorer: bool = True, changes: Mapping[str, Any] | None = None
) -> Path:
    """A checkpoint with random weights and a tokenizer."""
    save_checkpoint(random_model(small_values(changes), scorer=scorer), folder)
    save_tokenizer_files(build_tokenizer()[0], folder, FRAMES)
    return folder


def small_run(**settings: Any) -> TrainConfig:
    if not settings.get("start"):
        settings["model"] = SHAPE
    return TrainConfig(output="unused", **settings)


@contextmanager
def full_disk(limit: int | None) -> Iterator[None]:
    """Files cannot grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit or before[0], before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class SmallTrainee(nn.Module):
    """Summed losses of clips that pass through every part of a model."""

    def __init__(self, model: SttsModel) -> None:
        super().__init__()
        self.model = model
        self.labels = nn.Linear(model.config.text.hidden_size, 3)

    def forward(self, clips: Sequence[int]) -> Tensor:
        """Map numbers of clips to a scalar."""
        return torch.stack([self._loss(clip) for clip in clips]).sum()

    def _loss(self, clip: int) -> Tensor:
        model = self.model
        frames = torch.from_numpy(random_frames(FRAMES, (36, 36), seed=clip))
        encoded = model.encode(frames, 0.5)
        edges = torch.tensor([[0, 1, 2], [3, 4, -1]])
        image = model.encode_images(frames[:1], edges)
        ids = torch.tensor(prompt_ids(model.config, FRAMES, seed=clip))
        patches = ids == model.config.tokens.im_patch
        ids = ids[~patches.clone().masked_scatter(patches, encoded.keep.flatten())]
        logits = model.language(ids[None], encoded.features, model.visual_groups(ids[None]))
        loss = F.cross_entropy(logits[0, -4:-1], ids[-3:], reduction="sum")
        shown = self.labels(torch.cat([encoded.features, image]))
        assert encoded.scores is not None
        return loss + shown.square().mean() + encoded.scores.square().mean()
