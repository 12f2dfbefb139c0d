from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stts_export.training.config import TrainConfig
from stts_export.training.loop import Trainer

TINY = """
output: unused
seed: 3
log_every: 2
dev_every: 4
dev_clips: 4
keep_checkpoints: 2
model:
  image_size: 48
  patch_size: 4
  vision_width: 32
  vision_heads: 2
  vision_mlp: 48
  vision_blocks: 4
  prune_at: 0
  taps: [3, 2]
  connector_mlp: 48
  text_width: 32
  text_heads: 2
  text_kv_heads: 1
  text_mlp: 48
  text_layers: 2
data:
  clips_per_step: 4
  questions_per_clip: 4
  label_frames: 8
optim:
  steps: 12
  label_steps: 2
  warmup_steps: 2
"""


@pytest.fixture
def tiny_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY, encoding="utf-8")
    return path


@pytest.fixture
def trainer(tiny_yaml: Path, tmp_path: Path) -> Trainer:
    torch.set_num_threads(1)
    return Trainer(TrainConfig.from_file(tiny_yaml), tmp_path / "run")
