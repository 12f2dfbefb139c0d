"""transformers' Molmo2 processor for tests, without torchvision.

Its image and video processors need torchvision, which is not installed: stand-ins give it the grids
and frame numbers they would find. All its work on text is its own.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast
from transformers.models.molmo2.processing_molmo2 import Molmo2Processor

# Spec 1.5, for transformers' own template engine: images, videos, then the conversation; a turn of
# the user after the first closes the assistant's.
CHAT_TEMPLATE = (
    "{% set seen = namespace(images=0, videos=0) %}"
    "{% for m in messages %}{% if m['content'] is not string %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{% set seen.images = seen.images + 1 %}{% endif %}"
    "{% if c['type'] == 'video' %}{% set seen.videos = seen.videos + 1 %}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
    "{% for i in range(seen.images) %}"
    "{% if seen.images > 1 %}{{ 'Image ' ~ (i + 1) }}{% endif %}<|image|>"
    "{% endfor %}"
    "{% for i in range(seen.videos) %}<|video|>{% endfor %}"
    "{% for m in messages %}"
    "{% set text = namespace(all='') %}"
    "{% if m['content'] is string %}{% set text.all = m['content'] %}{% else %}"
    "{% for c in m['content'] %}"
    "{% if c['type'] == 'text' %}{% set text.all = text.all ~ c['text'] %}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if m['role'] == 'user' %}"
    "{% if not loop.first %}<|im_end|>\n{% endif %}"
    "<|im_start|>user\n{{ text.all }}<|im_end|>\n"
    "{% else %}<|im_start|>assistant\n{{ text.all }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def hf_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load a folder's tokenizer as transformers does for Molmo2."""
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


class TextProcessor(Molmo2Processor):  # type: ignore[misc]
    """The processor; images are given as their grids, videos as (times in half seconds, grid)."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, **switches: Any) -> TextProcessor:
        return cls(_Images(), _Videos(), tokenizer, CHAT_TEMPLATE, **switches)

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        return type(argument)

    def ids(
        self,
        turns: list[tuple[str, str]],
        images: list[tuple[int, int, int, int]] = [],  # noqa: B006
        videos: list[tuple[list[int], tuple[int, int]]] = [],  # noqa: B006
    ) -> tuple[list[int], list[int]]:
        """Return token ids, and 1 for visual tokens."""
        visuals: list[dict[str, str]] = [{"type": "image"} for _ in images]
        visuals += [{"type": "video"} for _ in videos]
        messages: list[dict[str, Any]] = [
            {"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns
        ]
        messages[0]["content"] = visuals + messages[0]["content"]
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        self.image_processor.grids = images
        self.video_processor.videos = videos
        pixels = np.zeros((4, 4, 3), np.uint8)
        out = self(
            text=text,
            images=[pixels] * len(images) or None,
            videos=[pixels[None]] * len(videos) or None,
            return_mm_token_type_ids=True,
        )
        return out["input_ids"][0], out["mm_token_type_ids"][0]


class _Images:
    grids: list[tuple[int, int, int, int]]

    def fetch_images(self, images: Any) -> Any:
        return images

    def __call__(self, images: Any, **settings: Any) -> dict[str, Any]:
        return {"image_grids": torch.tensor(self.grids)}


class _Videos:
    videos: list[tuple[list[int], tuple[int, int]]]

    def __call__(self, videos: Any, **settings: Any) -> dict[str, Any]:
        return {
            "video_grids": torch.tensor([(len(times), *grid) for times, grid in self.videos]),
            "video_metadata": [
                SimpleNamespace(frames_indices=times, fps=2.0) for times, _ in self.videos
            ],
        }
