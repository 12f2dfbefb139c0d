"""What a stream needs of a bundle: checked before anything starts, and laid out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stts_export.errors import InputError
from stts_export.live.controller import Controller, ElasticRatio, FixedRatio
from stts_export.live.segments import SegmentCache, longest_sequence
from stts_export.live.settings import HIGHEST_RATIO, LOWEST_RATIO, Plan, StreamSettings
from stts_export.runtime import planner
from stts_export.runtime.arguments import as_integer, as_ratio
from stts_export.runtime.logits import check_sampling
from stts_export.runtime.prompt import PromptBuilder, check_question
from stts_export.tensors import DECODER

if TYPE_CHECKING:
    from stts_export.runtime.session import Session

OTHER_QUESTION = 256
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
    if given and (steps.latency is None or asked is not None):
        raise InputError(
            f"{' and '.join(given)} beside {'a fixed ratio' if asked is not None else 'no budget'}",
            where=given[0],
            allowed="with a latency budget and no fixed ratio",
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


def laid_out_cache(
    session: Session,
    prompts: PromptBuilder,
    settings: StreamSettings,
    steps: Plan,
    lowest: float,
) -> SegmentCache:
    """Make the cache for the longest window.

    Raises:
        InputError: the bundle takes no sequences as long as that.
    """
    windows = session.config.vision.windows
    # Questions may cut segments anywhere; the shorter they are, the more windows rounding keeps.
    each = windows - planner.n_prune(windows, 1, lowest)
    longest = longest_sequence(prompts, [1] * steps.window, windows, [each] * steps.window)
    question = len(prompts.conversation_part(settings.prompt)) + settings.max_new_tokens
    limit = session.bundle.manifest.limits.max_tokens
    if longest + question > limit:
        raise InputError(
            f"a window of {steps.window} frames with a question and its answer may have "
            f"{longest + question} tokens",
            where="window",
            allowed=f"{limit} tokens, the bundle's max_tokens",
            fix="a shorter window, fewer frames a second, a higher prune ratio, fewer new tokens, "
            f"or build with --max-tokens {longest + question}",
        )
    capacity = min(limit, longest + question + OTHER_QUESTION)
    return SegmentCache(
        session.runners[DECODER],
        session.bundle,
        prompts,
        capacity=capacity,
        reserve=capacity - longest,
    )
