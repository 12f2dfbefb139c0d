from __future__ import annotations

import json

import pytest
import torch

from stts_export.checkpoint import model_from_checkpoint, open_checkpoint
from stts_export.errors import InputError
from stts_export.runtime.prompt import PromptBuilder
from stts_export.training.release import release_checkpoint


def test_release_is_a_complete_checkpoint_of_half_the_size(trainer, tmp_path):
    step = trainer.save()
    release_checkpoint(step, tmp_path / "release")
    checkpoint = open_checkpoint(tmp_path / "release")
    PromptBuilder.from_folder(checkpoint.folder, checkpoint.config)
    assert json.loads((checkpoint.folder / "training.json").read_text())["seed"] == 3
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (step, checkpoint.folder)]
    assert sizes[1] < 0.6 * sizes[0]
    full, half = (model_from_checkpoint(open_checkpoint(f)) for f in (step, checkpoint.folder))
    for left, right in zip(full.parameters(), half.parameters(), strict=True):
        torch.testing.assert_close(left.half().float(), right)


def test_weights_too_large_for_float16_are_refused(trainer, tmp_path):
    with torch.no_grad():
        trainer.model.language.embedding[0, 0] = 1e6
    step = trainer.save()
    with pytest.raises(InputError, match=r"language\.embedding does not fit"):
        release_checkpoint(step, tmp_path / "release")
