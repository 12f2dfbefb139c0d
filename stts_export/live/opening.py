"""What a stream needs of a bundle: checked before anything starts, and laid out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stts_export.errors import InputError
from stts_export.live.controller import Controller, ElasticRatio, FixedRatio
from stts_export.live.frames import FrameStore
from stts_export.live.seeing import longest_open
from stts_export.live.segments import SegmentCache, longest_sequence
from stts_export.live.settings import HIGHEST_RATIO, LOWEST_RATIO, Plan, StreamSettings
from stts_export.runtime import planner
from stts_export.runtime.arguments import as_integer, as_ratio
from stts_export.runtime.logits import check_sampling
from stts_export.runtime.prompt import Conversation, PromptBuilder, check_question
from stts_export.tensors import DECODER, LOWER_CHUNK, VISION_LOWER

if TYPE_CHECKING:
    from stts_export.runtime.session import Session

PENDING_PIECES = 2
"""Segments that wait to be encoded."""
_OTHER_QUESTION = 256
"""Tokens by which a question that is asked later may be longer than the first one."""


def checked_prompts(session: Session, settings: StreamSettings) -> PromptBuilder:
    """Check the question, and return what makes tokens of it.

    Raises:
        InputError: the bundle has no tokenizer, or a setting of the answer is out of range.
    """
    if session.prompts is None:
        raise InputError(
            "a stream needs text, but the checkpoint came without a tokenizer",
            where=str(session.bundle.folder),
            fix="add tokenizer.json to the checkpoint folder and build again",
        )
    check_question(settings.prompt)
    session.prompts.build(settings.prompt)
    session.answer_text(settings.stop)
    check_sampling(settings.sampling)
    as_integer(settings.max_new_tokens, "max_new_tokens")
    return session.prompts


def controller_of(
    session: Session, settings: StreamSettings, steps: Plan
) -> tuple[Controller, float]:
    """Return what chooses ratios, and the lowest that it may choose.

    Raises:
        InputError: a ratio is out of range, or a limit has nothing to limit.
    """
    asked, pruning = settings.prune_ratio, session.config.vision.pruning
    bounds = ("min_prune_ratio", "max_prune_ratio")
    given = [name for name in bounds if getattr(settings, name) is not None]
    if given and steps.latency is None:
        raise InputError(
            f"{' and '.join(given)} without a latency budget",
            where=given[0],
            allowed="with latency, and no fixed prune_ratio",
        )
    if asked is not None or steps.latency is None or pruning is None:
        ratio, _, _ = session.removal(steps.window, None if asked is None else as_ratio(asked))
        reason = "as asked" if asked is not None else "as trained"
        if pruning is None:
            reason = "the checkpoint has no scorer"
        return FixedRatio(ratio, reason), ratio
    allowed = session.bundle.manifest.limits.min_prune_ratio
    lowest = max(LOWEST_RATIO, allowed)
    if settings.min_prune_ratio is not None:
        lowest = as_ratio(settings.min_prune_ratio)
    highest = HIGHEST_RATIO
    if settings.mode == "incremental":
        # A segment's first frame stays whole: beyond this little would be left of the others.
        highest = max(lowest, min(highest, 1 - 2 / steps.segment))
    if settings.max_prune_ratio is not None:
        highest = as_ratio(settings.max_prune_ratio)
    if not max(0.0, allowed) <= lowest <= highest < 1 or lowest == 0:
        raise InputError(
            f"ratios from {lowest:g} to {highest:g}",
            where="min_prune_ratio",
            allowed=f"above 0{f', {allowed:g} or more' if allowed else ''}, below 1, in this order",
        )
    for ratio in (lowest, highest):
        planner.n_prune(session.config.vision.windows, 1, ratio)
    start = pruning.trained_prune_ratio
    return ElasticRatio(steps.latency, lowest, highest, start), lowest


def laid_out_store(
    session: Session,
    settings: StreamSettings,
    steps: Plan,
    lowest: float,
    controller: Controller,
) -> FrameStore:
    """Make the memory for frames that have been through `vision_lower`.

    That is what may be open, as much for a question that waits, what is run at a time, and in
    incremental mode the segments that wait.
    """
    config = session.config.vision
    is_exact = settings.mode == "exact"
    longest = steps.window if is_exact else min(steps.window, longest_open(steps))
    pieces = 0 if is_exact else (PENDING_PIECES + 1) * steps.segment
    prunes = config.pruning is not None and (
        isinstance(controller, ElasticRatio) or planner.n_prune(config.windows, longest, lowest) > 0
    )
    return FrameStore(
        session.runners[VISION_LOWER],
        config,
        session.bundle.manifest.precision,
        slots=2 * longest + pieces + LOWER_CHUNK,
        longest=longest,
        plain=not prunes,
    )


def laid_out_cache(
    session: Session,
    prompts: PromptBuilder,
    settings: StreamSettings,
    steps: Plan,
    lowest: float,
) -> SegmentCache:
    """Make the cache for the longest window.

    Raises:
        InputError: the bundle takes no sequences as long as that, or its cache is int8.
    """
    if session.bundle.manifest.kv_cache == "int8":
        raise InputError(
            "incremental mode moves cached keys to new positions, but in this bundle they are "
            "int8: each move would round them again, and some would leave the range of their scale",
            where="mode",
            allowed="exact",
            fix="--mode exact, or a bundle of a recipe without kv_cache: int8",
        )
    windows = session.config.vision.windows
    # Gaps may cut segments anywhere; the shorter they are, the more windows rounding keeps.
    each = windows - planner.n_prune(windows, 1, lowest)
    frames = steps.window + 1  # the end of a source is sampled off the grid
    longest = longest_sequence(prompts, frames, windows, each)
    question = len(prompts.conversation_part(settings.prompt)) + settings.max_new_tokens
    text, limit = session.config.text, session.bundle.manifest.limits.max_tokens
    positions = longest
    if session.bundle.manifest.positions == "gapped":  # removed tokens have positions too
        positions = longest_sequence(prompts, frames, windows, windows)
    if longest + question > limit:
        raise _too_long(
            steps, f"{longest + question} tokens", f"{limit} tokens, the bundle's max_tokens",
            f", or build with --max-tokens {longest + question}",
        )  # fmt: skip
    if positions + question > text.max_position_embeddings:
        raise _too_long(
            steps, f"{positions + question} positions",
            f"{text.max_position_embeddings}, the checkpoint's max_position_embeddings",
        )  # fmt: skip
    room = limit - longest, text.max_position_embeddings - positions
    reserve = min(question + _OTHER_QUESTION, *room)
    return SegmentCache(
        session.runners[DECODER],
        session.bundle,
        prompts,
        capacity=longest + reserve,
        reserve=reserve,
    )


def _too_long(steps: Plan, needed: str, allowed: str, other_way: str = "") -> InputError:
    return InputError(
        f"a window of {steps.window} frames with a question and its answer may have {needed}",
        where="window",
        allowed=allowed,
        fix="a shorter window or prompt, fewer frames a second, a higher prune ratio, or fewer new "
        f"tokens{other_way}",
    )


def check_question_fits(
    session: Session,
    settings: StreamSettings,
    steps: Plan,
    lowest: float,
    cache: SegmentCache | None,
    prompt: Conversation,
) -> None:
    """Refuse a question that would not fit behind the longest window.

    Args:
        session: the stream's.
        settings: of the stream.
        steps: its settings in samples.
        lowest: ratio of its windows.
        cache: of the stream; None in exact mode.
        prompt: the question.

    Raises:
        InputError: it is no text, or too long.
    """
    check_question(prompt)
    assert session.prompts is not None
    if cache is None:
        times = np.arange(steps.window) / steps.fps
        session.check_window(times, lowest, prompt, settings.max_new_tokens)
        return
    tokens = len(session.prompts.conversation_part(prompt)) + settings.max_new_tokens
    if tokens > cache.reserve:
        raise InputError(
            f"a question and its answer of {tokens} tokens",
            where="prompt",
            allowed=f"{cache.reserve} tokens, for which the cache has room behind the window",
            fix="open the stream with its longest question as the prompt, or a shorter window",
        )
