"""Floating-point operations of the graphs: what a perfect implementation cannot go below.

Counted are matrix products, as the graphs compute them; a multiply-add is two operations. Norms,
activations, softmax and copies are left out: on a CPU they take less than a tenth of the time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from stts_export.config import ModelConfig, VisionConfig


@dataclass(frozen=True)
class Cost:
    """Operations by kind."""

    linear: int = 0
    """Products with weights: grow with the number of tokens."""
    attention: int = 0
    """Products within attention: grow with the square of a sequence."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.linear + other.linear, self.attention + other.attention)

    @property
    def total(self) -> int:
        """All operations."""
        return self.linear + self.attention


def lower(config: ModelConfig, frames: int) -> Cost:
    """`vision_lower`: patch embedding, the blocks below removal, and the scorer.

    Args:
        config: the model.
        frames: frames of the clip.
    """
    vision = config.vision
    patches = vision.windows * vision.patches_per_window
    embedding = _linear(patches, 3 * vision.patch_size**2, vision.hidden_size)
    frame = Cost(embedding) + _blocks(vision, vision.split_at, patches)
    if vision.pruning is not None:
        frame += _scorer(vision)
    return Cost(frames * frame.linear, frames * frame.attention)


def upper(config: ModelConfig, slots: Iterable[int]) -> Cost:
    """`vision_upper`: the blocks above removal and the connector.

    Args:
        config: the model.
        slots: for each row of the batch the window slots that attend to each other. In the layout
            without a mask these are the windows of a frame; with bins every row has all W slots,
            because free slots and masked pairs are computed like others.
    """
    vision = config.vision
    blocks = vision.num_layers - vision.split_at
    cost = Cost()
    for count in slots:
        cost += _blocks(vision, blocks, count * vision.patches_per_window)
        cost += _connector(config, count)
    return cost


def prefill(config: ModelConfig, tokens: int, capacity: int) -> Cost:
    """`decoder` on a whole prompt.

    Args:
        config: the model.
        tokens: tokens of the prompt.
        capacity: rows of the KV cache; attention computes all of them and masks.
    """
    text = config.text
    inner, kv_inner = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    layer = _linear(tokens, text.hidden_size, 2 * inner + 2 * kv_inner)
    layer += _linear(tokens, text.hidden_size, 3 * text.intermediate_size)
    head = _linear(1, text.hidden_size, text.vocab_size)
    return Cost(text.num_layers * layer + head, text.num_layers * 4 * tokens * capacity * inner)


def _linear(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def _blocks(vision: VisionConfig, count: int, tokens: int) -> Cost:
    """`count` blocks on one sequence."""
    inner = vision.num_heads * vision.head_dim
    linear = _linear(tokens, vision.hidden_size, 4 * inner + 2 * vision.intermediate_size)
    return Cost(count * linear, count * 4 * tokens**2 * inner)


def _pool(windows: int, group: int, in_width: int, inner: int, width: int) -> Cost:
    """Attention pooling of windows: one query, `group` keys each."""
    linear = _linear(windows, in_width, inner)  # query
    linear += 2 * _linear(windows * group, in_width, inner)  # keys, values
    linear += _linear(windows, inner, width)  # output
    return Cost(linear, windows * 4 * group * inner)


def _scorer(vision: VisionConfig) -> Cost:
    """The scorer on one frame."""
    width, hidden = vision.hidden_size, vision.intermediate_size
    inner = vision.num_heads * vision.head_dim
    mlp = _linear(vision.windows, 2 * width, hidden) + _linear(vision.windows, hidden, hidden)
    mlp += _linear(vision.windows, hidden, 1)
    return Cost(mlp) + _pool(vision.windows, vision.patches_per_window, width, inner, width)


def _connector(config: ModelConfig, windows: int) -> Cost:
    vision, connector = config.vision, config.connector
    taps = len(vision.taps) * vision.hidden_size
    inner = connector.num_heads * connector.head_dim
    projection = 2 * _linear(windows, connector.hidden_size, connector.intermediate_size)
    projection += _linear(windows, connector.intermediate_size, config.text.hidden_size)
    pooling = _pool(windows, vision.patches_per_window, taps, inner, connector.hidden_size)
    return Cost(projection) + pooling
