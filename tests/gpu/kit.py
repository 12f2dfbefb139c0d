"""What the GPU lane compares with: golden bundles and ONNX Runtime's results on them.

A Jetson has neither torch nor a recent ONNX Runtime, so the kit is made where they are and copied:
`python -m tests.gpu.kit build/gpu_kit` (or `make gpu-kit`).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stts_export import Session, __version__
from stts_export.files import json_object, write_json
from stts_export.probe import moving_clip
from tests.helpers import ON_CPU

KIT_FILE = "kit.json"
CLIP_FRAMES = 12
PRUNE_RATIOS = (0.0, 0.3, 0.5, 0.8)
NEW_TOKENS = 8


Expected = dict[str, NDArray[Any]]
"""Results by "<prune ratio>/<name>"."""


def clip_frames(session: Session) -> NDArray[np.uint8]:
    """(CLIP_FRAMES, height, width, 3), the same on every machine."""
    return moving_clip(CLIP_FRAMES, session.config.vision.image_size)


def prompt_ids(session: Session) -> list[int]:
    """A complete sequence as before pruning for `clip_frames`."""
    tokens, windows = session.config.tokens, session.config.vision.windows
    ids: list[int] = []
    for frame in range(CLIP_FRAMES):
        ids += [frame, tokens.frame_start, *[tokens.im_patch] * windows, tokens.frame_end]
    return [*ids, 3, 1, 4, 1, 5]


def record(bundle: Path) -> Expected:
    """Run ONNX Runtime on a bundle."""
    expected: Expected = {}
    with Session.open(bundle, backend="onnxruntime") as session:
        prompt = prompt_ids(session)
        for ratio in PRUNE_RATIOS:
            clip = session.encode(clip_frames(session), ratio)
            assert clip.scores is not None
            expected[f"{ratio}/scores"] = clip.scores
            expected[f"{ratio}/keep"] = clip.keep
            expected[f"{ratio}/features"] = clip.features
            expected[f"{ratio}/logits"] = session.next_token_logits(clip, prompt)
            tokens = session.generate(clip, prompt, NEW_TOKENS).token_ids
            expected[f"{ratio}/tokens"] = np.array(tokens)
    return expected


def make_kit(folder: Path) -> None:
    """Build the golden checkpoint at every precision and record what ONNX Runtime computes."""
    from stts_export.build import BuildSpec, bundle_from_checkpoint
    from tests.helpers import GOLDEN

    folder.mkdir(parents=True, exist_ok=True)
    for precision in ON_CPU:
        bundle = folder / f"golden-{precision}"
        bundle_from_checkpoint(GOLDEN, bundle, BuildSpec(precision=precision), force=True)
        np.savez(folder / f"golden-{precision}.npz", allow_pickle=False, **record(bundle))
    write_json(folder / KIT_FILE, {"stts_export": __version__})


def kit_version(folder: Path) -> str | None:
    """The version of stts-export that made a kit; None where there is none."""
    file = folder / KIT_FILE
    return str(json_object(file).get("stts_export")) if file.is_file() else None


def main() -> None:
    """Make a kit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder to write")
    make_kit(parser.parse_args().folder)


if __name__ == "__main__":
    main()
