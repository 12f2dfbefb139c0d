"""A model that reads its weights as it runs computes what the loaded one does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stts_export.checkpoint import (
    model_from_checkpoint,
    open_checkpoint,
    save_checkpoint,
    streamed,
    streamed_model,
)
from stts_export.errors import InputError
from stts_export.model.vlm import SttsModel
from tests.helpers import random_frames, random_model


@pytest.fixture(scope="module", params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    save_checkpoint(random_model(), folder, request.param)
    return folder


def _results(model: SttsModel) -> tuple[Tensor, Tensor]:
    """Features of a clip, and logits of a sequence with ids of both embeddings."""
    text, tokens = model.config.text, model.config.tokens
    ids = torch.tensor([[3, tokens.frame_start, tokens.im_patch, tokens.frame_end, 5]])
    assert tokens.im_patch >= text.vocab_size
    with torch.no_grad():
        clip = model.encode(torch.from_numpy(random_frames(3)), 0.5)
        features = clip.features[:1]
        return clip.features, model.language(ids, features, model.visual_groups(ids))


def test_results_are_those_of_the_loaded_model(checkpoint: Path):
    opened = open_checkpoint(checkpoint)
    loaded, read = model_from_checkpoint(opened), streamed_model(opened)
    for expected, got in zip(_results(loaded), _results(read), strict=True):
        assert torch.equal(got, expected)


def test_matrices_are_not_held(checkpoint: Path):
    model = streamed_model(open_checkpoint(checkpoint))
    _results(model)
    held = {name for name, value in model.named_parameters() if not value.is_meta}
    matrices = {name for name, value in model.named_parameters() if value.ndim == 2}
    small = {"vision.embedding.positional", "language.new_embedding"}
    assert held & matrices == small


def test_large_matrices_are_cast_in_pieces(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    model = streamed_model(open_checkpoint(checkpoint))
    ids, features = torch.arange(7)[None], torch.zeros(1, model.config.text.hidden_size)
    groups = model.visual_groups(ids)
    with torch.no_grad():
        whole = model.language(ids, features, groups)
        monkeypatch.setattr(streamed, "_PIECE_BYTES", 32 * 4 * 7)  # 7 rows of the decoder's width
        pieces = model.language(ids, features, groups)
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["model.transformer.blocks.1.mlp.ff_out.weight", "model.transformer.ln_f.weight"]
)
def test_a_weight_that_is_no_number_is_refused(tmp_path: Path, name: str):
    save_checkpoint(random_model(), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors[name].flatten()[3] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"{name} has NaN"):
        _results(streamed_model(open_checkpoint(tmp_path)))
