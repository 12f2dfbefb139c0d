"""What bundles may be asked to take: limits that `build` sets and `estimate` plans with."""

from __future__ import annotations

from dataclasses import replace

from stts_export.bundle import Limits
from stts_export.config import ModelConfig
from stts_export.errors import InputError
from stts_export.runtime.planner import n_prune

DEFAULT_MAX_FRAMES = 64
"""Longest clip where neither the user nor the checkpoint says so."""
MAX_ENGINE_FRAMES = 4096
"""Longest clip of the plugin."""
FRAME_TOKENS, TEXT_TOKENS = 12, 1024
"""Room for a frame's timestamp and marks, and for question and answer together."""


def needed_tokens(config: ModelConfig, max_frames: int, min_prune_ratio: float) -> int:
    """Tokens of the longest clip with its marks, a question and an answer."""
    kept = kept_windows(config, max_frames, min_prune_ratio)
    return kept + max_frames * FRAME_TOKENS + TEXT_TOKENS


def kept_windows(config: ModelConfig, max_frames: int, min_prune_ratio: float) -> int:
    """Windows that stay of the longest clip at the lowest ratio."""
    total = max_frames * config.vision.windows
    if config.vision.pruning is None:
        return total
    return total - n_prune(config.vision.windows, max_frames, min_prune_ratio)


def check_tokens(config: ModelConfig, max_tokens: int | None, where: str) -> None:
    """Refuse sequences that the model has no positions for.

    Raises:
        InputError: `max_tokens` is above the model's.
    """
    longest = config.text.max_position_embeddings
    if max_tokens is not None and max_tokens > longest:
        raise InputError(
            f"max_tokens is {max_tokens}",
            where=where,
            allowed=f"up to {longest}, the checkpoint's max_position_embeddings",
        )


def check_engine_frames(max_frames: int, where: str) -> None:
    """Refuse clips that engines cannot take.

    Raises:
        InputError: `max_frames` is above `MAX_ENGINE_FRAMES`.
    """
    if max_frames > MAX_ENGINE_FRAMES:
        raise InputError(
            f"max_frames is {max_frames}",
            where=where,
            allowed=f"up to {MAX_ENGINE_FRAMES} in engines",
            fix=f"pass --max-frames, such as --max-frames {DEFAULT_MAX_FRAMES}",
        )


def narrowed(
    own: Limits,
    where: str,
    *,
    max_frames: int | None,
    max_tokens: int | None,
    min_prune_ratio: float | None,
) -> Limits:
    """Limits of what is made from a bundle: its own, or narrower.

    Args:
        own: the bundle's.
        where: its folder, for messages.
        max_frames: the bundle's when None; so are the others.
        max_tokens: longest sequence.
        min_prune_ratio: lowest ratio.

    Raises:
        InputError: one is wider than the bundle's.
    """
    for name, asked, most in (
        ("max_frames", max_frames, own.max_frames),
        ("max_tokens", max_tokens, own.max_tokens),
    ):
        if asked is not None and asked > most:
            raise InputError(
                f"{name} is {asked}",
                where=where,
                allowed=f"up to {most}, the bundle's limit",
                fix="leave it out, or build a new bundle from the checkpoint",
            )
    if min_prune_ratio is not None and min_prune_ratio < own.min_prune_ratio:
        raise InputError(
            f"min_prune_ratio is {min_prune_ratio:g}",
            where=where,
            allowed=f"{own.min_prune_ratio:g} or more, the bundle's limit",
            fix="leave it out, or build a new bundle from the checkpoint",
        )
    return replace(
        own,
        max_frames=own.max_frames if max_frames is None else max_frames,
        max_tokens=own.max_tokens if max_tokens is None else max_tokens,
        min_prune_ratio=own.min_prune_ratio if min_prune_ratio is None else min_prune_ratio,
    )
