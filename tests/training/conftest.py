"""A model with spread scores, and examples of every kind, for the tests of the training core."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
import yaml

from stts_export.checkpoint import save_checkpoint
from stts_export.model.vlm import SttsModel
from stts_export.runtime.images import image_crops
from stts_export.runtime.prompt import ImageTokens, PromptBuilder
from stts_export.runtime.writing import png_bytes
from stts_export.tensors import IMAGE_POOL
from stts_export.training.clips import make_clip
from stts_export.training.examples import Example, ImageInput, Question
from stts_export.training.objective import Trainee, WindowLabels
from stts_export.training.sequences import SequenceBuilder
from stts_export.training.synthetic import clip_example
from stts_export.training.tokenizer import build_tokenizer, save_tokenizer_files
from tests.helpers import picture, random_model, write_video
from tests.training.small_runs import FRAMES, SHAPE, small_values


@dataclass(frozen=True)
class Core:
    """A small model and what makes its prompts; read only."""

    model: SttsModel
    prompts: PromptBuilder

    def trainee(self, *, labels: bool = False, sequence_length: int = 0, **options: bool | str):
        torch.manual_seed(1)
        heads = WindowLabels(SHAPE.text_width, 9, 8) if labels else None
        if heads is not None:
            heads.to(self.model.language.norm.weight.dtype)
        sequences = SequenceBuilder(self.prompts, sequence_length)
        return Trainee(self.model, heads, sequences, **options)  # type: ignore[arg-type]

    def clip(self, seed: int, frames: int = 4, ratio: float = 0.0, questions: int = 2) -> Example:
        clip = make_clip(seed, level=1)
        asked = clip.questions[:questions]
        return clip_example(clip, asked, self.model.config.vision, frames, ratio)


def make_core(folder: Path, **changes: object) -> Core:
    """Random weights; `changes` as in `small_values`."""
    save_tokenizer_files(build_tokenizer()[0], folder, FRAMES)
    scorer = bool(changes.pop("scorer", True))
    model = random_model(small_values(changes), scorer=scorer).train()
    with torch.no_grad():
        model.vision.connector.w2.weight.mul_(0.02)  # features as large as embeddings
    core = Core(model, PromptBuilder.from_folder(folder, model.config))
    _say_yes(core)
    return core


def _say_yes(core: Core) -> None:
    """Make "yes" the model's answer to some questions, so that its accuracy is neither 0 nor 1."""
    head = core.model.language.lm_head
    asked = Example(None, (Question("", "0?", "yes"),))
    with torch.no_grad(), patch.object(head, "forward", wraps=head.forward) as forward:
        targets = core.trainee()([asked]).packed.targets
        before = forward.call_args.args[0]
        length = 1.5 * head.weight.norm(dim=1).mean()
        head.weight[targets] = F.normalize(before, dim=1) * length


@pytest.fixture(scope="package")
def core(tmp_path_factory: pytest.TempPathFactory) -> Core:
    return make_core(tmp_path_factory.mktemp("core"))


@pytest.fixture(scope="package")
def checkpoint(core: Core, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a folder; read only."""
    folder = tmp_path_factory.mktemp("start") / "checkpoint"
    save_checkpoint(core.model, folder)
    save_tokenizer_files(build_tokenizer()[0], folder, FRAMES)
    return folder


@pytest.fixture(scope="package")
def text_example() -> Example:
    questions = (Question("chat", "What comes last?", "the end"), Question("", "Why?", "so"))
    return Example(None, questions, name="text")


@pytest.fixture(scope="package")
def image_example() -> Example:
    """Five of its tokens lie at an edge, and stand for fewer patches than the others."""
    cut = image_crops(picture((50, 80)), (36, 36), 4, max_crops=2, overlap_margins=(2, 2),
                      pool=IMAGE_POOL)  # fmt: skip
    visual = ImageInput(cut.crops, cut.pooled_patches, ImageTokens(cut.grid))
    assert (cut.pooled_patches < 0).any()
    return Example(visual, (Question("image", "What is it?", "blue"),), name="image")


@pytest.fixture(scope="package")
def mixed(core: Core, text_example: Example, image_example: Example) -> list[Example]:
    """Clips with and without removal, an image and text, in an order that mixes them."""
    return [
        core.clip(1, 4, 0.5),
        text_example,
        core.clip(2, 6, 0.8, questions=1),
        image_example,
        core.clip(3, 3),
        core.clip(4, 5, 0.3),
    ]


@pytest.fixture
def small_clips(core: Core) -> Callable[[float], list[Example]]:
    """Clips of different lengths, at one ratio."""

    def make(ratio: float) -> list[Example]:
        made = [core.clip(seed, frames) for seed, frames in ((5, 4), (6, 7), (7, 2), (8, 1))]
        return [replace(example, prune_ratio=ratio) for example in made]

    return make


@pytest.fixture(scope="package")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`all.jsonl` about three videos of 2 s, an image and nothing; `yes.jsonl`; read only."""
    folder = tmp_path_factory.mktemp("dataset")
    for number in range(3):
        write_video(folder / f"{number}.mp4", frames=16, seed=number)
    (folder / "p.png").write_bytes(png_bytes(picture((50, 80))))
    choices = ["red", "blue", "green"]
    entries: list[dict[str, object]] = [
        {"video": f"{number}.mp4", "question": "Which colour?", "answer": colour, "type": "colour",
         "choices": choices}
        for number, colour in enumerate(choices)
    ]  # fmt: skip
    entries += [
        {"image": "p.png", "question": "What is it?", "answer": "a square", "type": "shape"},
        {"question": "Are you there?", "answer": "yes"},
    ]
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    (folder / "all.jsonl").write_text(lines, encoding="utf-8")
    entries = [{"question": f"{n}?", "answer": "yes", "type": "number"} for n in range(8)]
    entries += [
        {"video": f"{n}.mp4", "question": "And?", "answer": "yes", "type": "clip"} for n in range(3)
    ]
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    (folder / "yes.jsonl").write_text(lines, encoding="utf-8")
    return folder


def run_values(**changes: Any) -> dict[str, Any]:
    """A run of seven steps, as YAML has it; `changes` of a section change what they name."""
    values: dict[str, Any] = {
        "output": "unused", "seed": 3, "threads": 1, "log_every": 3, "save_every": 4,
        "keep_checkpoints": 2,
        "data": {"sources": [{"max_questions": 2}], "batch_size": 4, "micro_batch": 4,
                 "max_frames": 4},
        "dev": {"every": 3, "clips": 3},
        "pruning": {"full_share": 0.2},
        "labels": {"steps": 2, "frames": 4, "coefficient": 0.5},
        "optim": {"steps": 7, "warmup_steps": 2, "bfloat16": False,
                  "rates": dict.fromkeys(("language", "vision", "connector", "scorer"), 1.0e-2)},
    }  # fmt: skip
    if "start" not in changes:
        values["model"] = {**asdict(SHAPE), "taps": list(SHAPE.taps)}
    for name, value in changes.items():
        is_section = isinstance(value, dict) and name in values
        values[name] = {**values[name], **value} if is_section else value
    return values


def write_run(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path
