"""A bundle with random weights and a tokenizer, for streams; built once and kept."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import stts_export
from stts_export.training.config import ModelShape, model_json

MAX_FRAMES = 64
"""Longest window of a bundle."""
MAX_FPS = 64.0
"""Far above what a model is trained with: a stream alone must be able to overload the machine."""
TRAINED_RATIO = 0.3
"""Where a stream with a latency budget begins."""
_SEED = 20260318
_MAX_TOKENS = 16384
# Standard deviation of the random scorer's logits: scores then spread over (0, 1).
_LOGIT_SPREAD = 1.5
_CALIBRATION_FRAMES = 12
_SMALL = ModelShape(
    image_size=378, patch_size=14, vision_width=128, vision_heads=2, vision_mlp=512,
    vision_blocks=7, prune_at=1, taps=(6, 4), connector_mlp=512, text_width=256,
    text_heads=4, text_kv_heads=2, text_mlp=768, text_layers=3,
)  # fmt: skip
_TINY = ModelShape(
    image_size=48, patch_size=4, vision_width=32, vision_heads=2, vision_mlp=48,
    vision_blocks=4, prune_at=0, taps=(3, 2), connector_mlp=48, text_width=32,
    text_heads=2, text_kv_heads=1, text_mlp=48, text_layers=2,
)  # fmt: skip


def stream_shape(*, quick: bool) -> ModelShape:
    """Sizes of the model: a tower 128 wide on a 27x27 grid and a decoder 256 wide.

    Args:
        quick: 32 wide on a 12x12 grid instead, for smoke tests.
    """
    return _TINY if quick else _SMALL


def stream_bundle(cache: Path, *, quick: bool) -> Path:
    """Build the bundle, or find that of an earlier run.

    Args:
        cache: a folder is made in it for each shape and state of the building code.
        quick: see `stream_shape`.
    """
    shape = stream_shape(quick=quick)
    folder = cache / f"stream-{_fingerprint(shape)}"
    if not folder.is_dir():
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _build(shape, partial)
        os.replace(partial / "bundle", folder)
        shutil.rmtree(partial)
    return folder


def _fingerprint(shape: ModelShape) -> str:
    package = Path(stts_export.__file__).parent
    sources = [Path(__file__), *(package / f"{name}.py" for name in ("build", "bundle", "tensors"))]
    for part in ("model", "graphs", "checkpoint"):
        sources += sorted((package / part).glob("*.py"))
    sources += [package / "training" / name for name in ("config.py", "tokenizer.py")]
    digest = hashlib.sha256(repr((shape, MAX_FRAMES, MAX_FPS, TRAINED_RATIO)).encode())
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _build(shape: ModelShape, folder: Path) -> None:
    from stts_export.build import bundle_from_checkpoint
    from stts_export.checkpoint import save_checkpoint
    from stts_export.training.tokenizer import build_tokenizer, save_tokenizer_files

    tokenizer, vocab_size = build_tokenizer()
    values = model_json(shape, vocab_size, MAX_FRAMES, TRAINED_RATIO)
    values["text_config"]["max_position_embeddings"] = _MAX_TOKENS
    checkpoint = folder / "checkpoint"
    save_checkpoint(_random_model(values), checkpoint)
    save_tokenizer_files(tokenizer, checkpoint, MAX_FRAMES)
    video = checkpoint / "video_preprocessor_config.json"
    sampling = json.loads(video.read_text(encoding="utf-8"))
    video.write_text(json.dumps({**sampling, "max_fps": MAX_FPS}) + "\n", encoding="utf-8")
    bundle_from_checkpoint(checkpoint, folder / "bundle")


def _random_model(values: dict[str, Any]) -> Any:
    """Default weights; the scorer's logits are spread as a trained one's are."""
    import torch

    from benchmarks.harness.clips import moving_clip
    from stts_export.config import ModelConfig
    from stts_export.model.vlm import SttsModel

    torch.manual_seed(_SEED)
    config = ModelConfig.from_dict(values, has_scorer=True)
    model = SttsModel(config).eval()
    vision = model.vision
    clip = torch.from_numpy(moving_clip(_CALIBRATION_FRAMES, config.vision.image_size))
    assert vision.scorer is not None
    with torch.no_grad():
        vision.embedding.positional.normal_(std=0.1)
        fresh = torch.arange(len(clip)) == 0
        start = torch.zeros(1, config.vision.windows, config.vision.hidden_size)
        scores, _ = vision.score(vision.before_scoring(clip), fresh, start)
        logits = torch.logit(scores[1:].double())
        scale = _LOGIT_SPREAD / logits.std()
        vision.scorer.w3.weight *= scale
        vision.scorer.w3.bias.copy_((vision.scorer.w3.bias - logits.mean()) * scale)
    return model
