"""Images of several crops: the PyTorch model beside transformers' Molmo2 and its processor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from stts_export.checkpoint import model_from_checkpoint, open_checkpoint
from stts_export.config import ModelConfig
from stts_export.model.vision import Connector
from stts_export.model.vlm import SttsModel
from stts_export.runtime.images import image_crops
from stts_export.tolerances import TOLERANCES, difference
from tests.helpers import GOLDEN, image_ids, picture, random_checkpoint, small_config

LANDSCAPE, PORTRAIT, TINY, WIDE = (300, 517), (641, 230), (1, 3), (90, 1001)


def square_config(patches: int, **changes: Any) -> dict[str, Any]:
    """A small model whose frames have that many patches a side."""
    return small_config(
        **{
            "vit_config.image_default_input_size": [14 * patches, 14 * patches],
            "vit_config.image_num_pos": patches * patches,
            **changes,
        }
    )


def processed(images: Sequence[NDArray[np.uint8]], config: ModelConfig) -> dict[str, Any]:
    """What transformers' own image processor makes of images.

    It needs torchvision, which is not installed, for two things alone: the bilinear resize of
    floats, which is torch's, and the normalisation.
    """
    from transformers.models.molmo2.image_processing_molmo2 import Molmo2ImageProcessor

    class Processor(Molmo2ImageProcessor):  # type: ignore[misc]
        def resize(self, image: torch.Tensor, size: Any, **_: Any) -> torch.Tensor:
            return F.interpolate(image, (size.height, size.width), mode="bilinear")

        def rescale_and_normalize(self, images: torch.Tensor, *_: Any) -> torch.Tensor:
            return (images.float() / 255 - 0.5) / 0.5

    height, width = config.vision.image_size
    processor = Processor(
        size={"height": height, "width": width}, patch_size=config.vision.patch_size
    )
    pictures = [torch.from_numpy(image).permute(2, 0, 1) for image in images]
    settings = {"do_convert_rgb": False, "input_data_format": "channels_first"}
    return dict(processor(pictures, return_tensors="pt", **settings))


def theirs(folder: Path) -> Any:
    """transformers' Molmo2 with a checkpoint's weights."""
    from transformers import Molmo2ForConditionalGeneration

    return Molmo2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def theirs_logits(
    model: Any, config: ModelConfig, images: Sequence[NDArray[np.uint8]]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Ids of a prompt about images, and transformers' logits (L, V) of it."""
    inputs = processed(images, config)
    ids = image_ids(config, inputs["image_grids"].tolist())
    visual = np.isin(ids, config.tokens.visual)
    with torch.no_grad():
        logits = model(
            input_ids=torch.from_numpy(ids)[None],
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            mm_token_type_ids=torch.from_numpy(visual)[None].long(),
            **inputs,
        ).logits[0]
    return ids, logits.numpy()


@pytest.fixture(scope="module", params=["golden", "15x15", "12x12", "no scorer", "3 taps"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "golden":
        return GOLDEN
    values = {
        "15x15": square_config(15),
        "12x12": square_config(12),
        "no scorer": square_config(15),
        "3 taps": square_config(15, **{"adapter_config.vit_layers": [3, 4, 3]}),
    }[request.param]
    folder = tmp_path_factory.mktemp("images") / "checkpoint"
    return random_checkpoint(folder, values, scorer=request.param != "no scorer")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> SttsModel:
    return model_from_checkpoint(open_checkpoint(checkpoint))


@pytest.fixture(scope="module")
def original(checkpoint: Path) -> Any:
    return theirs(checkpoint)


def encoded(model: SttsModel, images: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
    vision = model.config.vision
    features = []
    for image in images:
        cut = image_crops(image, vision.image_size, vision.patch_size)
        crops, pooled = torch.from_numpy(cut.crops), torch.from_numpy(cut.pooled_patches)
        features.append(model.encode_images(crops, pooled))
    return torch.cat(features)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "sizes",
    [[LANDSCAPE], [PORTRAIT], [TINY], [(37, 41)], [LANDSCAPE, WIDE], [TINY, PORTRAIT, (99, 98)]],
    ids=str,
)
def test_logits_equal_those_of_transformers(
    model: SttsModel, original: Any, sizes: list[tuple[int, int]]
):
    images = [picture(size, seed) for seed, size in enumerate(sizes)]
    ids, expected = theirs_logits(original, model.config, images)
    with torch.no_grad():
        features = encoded(model, images)
        batch = torch.from_numpy(ids)[None]
        logits = model.language(batch, features, model.visual_groups(batch))[0]
    limit = TOLERANCES["logits", "fp32"]
    assert difference(logits.numpy(), expected, limit.measure) <= limit.limit


@pytest.mark.parametrize("masks", [True, False])
def test_missing_patches_are_masked_or_count_as_zeros(masks: bool):
    """As the reference's `apply_connector`, written out token by token."""
    values = small_config(**{"adapter_config.pooling_attention_mask": masks})
    config = ModelConfig.from_dict(values, has_scorer=True)
    torch.manual_seed(0)
    connector = Connector(config.connector, 48, 32).eval()
    patches = torch.randn(10, 48)
    pooled = torch.tensor([[1, -1, 3, 9], [-1, -1, -1, 0], [4, 5, 6, 7]], dtype=torch.int32)
    with torch.no_grad():
        got = connector.pool(patches, pooled)
        for token, index in enumerate(pooled.tolist()):
            there = [row for row in index if row >= 0]
            given = patches[there]
            if not masks:
                given = torch.cat([given, torch.zeros(4 - len(there), 48)])
            torch.testing.assert_close(got[token], connector(given[None])[0])


def test_a_full_window_needs_no_mask():
    config = ModelConfig.from_dict(small_config(), has_scorer=True)
    torch.manual_seed(1)
    connector = Connector(config.connector, 48, 32).eval()
    windows = torch.randn(5, 9, 48)
    index = torch.arange(45, dtype=torch.int32).reshape(5, 9)
    with torch.no_grad():
        torch.testing.assert_close(connector.pool(windows.flatten(0, 1), index), connector(windows))


def test_whether_missing_patches_are_masked_is_read():
    def read(**changes: Any) -> bool:
        values = small_config(**changes)
        return ModelConfig.from_dict(values, has_scorer=True).connector.pooling_attention_mask

    assert read()
    assert not read(**{"adapter_config.pooling_attention_mask": False})
    values = small_config()
    del values["adapter_config"]["pooling_attention_mask"]  # the original's default
    assert not ModelConfig.from_dict(values, has_scorer=True).connector.pooling_attention_mask
