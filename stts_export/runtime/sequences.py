"""Prompts as the token sequences of a bundle: built, checked, and without removed windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stts_export.bundle import Bundle
from stts_export.errors import InputError
from stts_export.runtime.arguments import as_array, is_text
from stts_export.runtime.prompt import (
    Conversation,
    ImageTokens,
    PromptBuilder,
    Subtitle,
    VideoTokens,
    check_order,
    check_question,
    kept_positions,
)
from stts_export.runtime.visuals import (
    ClipRequest,
    Encoded,
    EncodedClip,
    EncodedImage,
    Request,
    with_subtitles,
)

TokenSequence = Sequence[int] | NDArray[np.integer[Any]]


class Sequences:
    """Token sequences for one bundle.

    Args:
        bundle: whose limits and positions count.
        prompts: makes token sequences of texts; None without a tokenizer.
    """

    def __init__(self, bundle: Bundle, prompts: PromptBuilder | None) -> None:
        self._bundle = bundle
        self._prompts = prompts
        self._im_patch = bundle.config.tokens.im_patch
        text = bundle.config.text
        self.vocabulary = text.vocab_size + text.additional_vocab_size
        """Token ids are below it."""

    def complete(
        self,
        prompt: Conversation | TokenSequence,
        visuals: Sequence[VideoTokens | ImageTokens],
        subtitles: Sequence[Subtitle],
    ) -> NDArray[np.int64]:
        """Return the complete sequence as before pruning.

        Args:
            prompt: as for `Session.generate`.
            visuals: what it is about.
            subtitles: of the one video that it is about.

        Raises:
            InputError: it is no prompt, or does not fit the model.
        """
        if is_text(prompt):
            if self._prompts is None:
                raise InputError(
                    "the prompt is text, but the checkpoint came without a tokenizer",
                    where=str(self._bundle.folder),
                    allowed="token ids, the complete sequence as before pruning",
                    fix="add tokenizer.json to the checkpoint folder and build again",
                )
            text: Conversation = prompt  # type: ignore[assignment]
            check_question(text)
            return self._prompts.build(text, with_subtitles(visuals, subtitles))
        if subtitles:
            raise InputError(
                "subtitles beside token ids", where="prompt", allowed="subtitles beside text"
            )
        ids = as_array(prompt, "prompt")
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or len(ids) == 0:
            raise InputError(
                f"token ids of shape {ids.shape} and type {ids.dtype}",
                where="prompt",
                allowed="a flat sequence of integers, not empty",
            )
        if ids.min() < 0 or ids.max() >= self.vocabulary:
            raise InputError(
                f"token ids from {ids.min()} to {ids.max()}",
                where="prompt",
                allowed=f"0..{self.vocabulary - 1}",
            )
        return ids.astype(np.int64)

    def check(
        self,
        requests: Sequence[Request],
        prompt: Conversation | TokenSequence,
        max_new_tokens: int,
        subtitles: Sequence[Subtitle],
    ) -> None:
        """Check the prompt's length and its window tokens before anything is encoded.

        Args:
            requests: what it is about.
            prompt: as for `Session.generate`.
            max_new_tokens: that the answer may have.
            subtitles: of the one video that it is about.

        Raises:
            InputError: the prompt does not fit what it is about, or the bundle.
        """
        ids = self.complete(prompt, [request.tokens for request in requests], subtitles)
        total = removed = 0
        for request in requests:
            if isinstance(request, (EncodedClip, EncodedImage)):
                total += request.keep.size
                removed += request.keep.size - len(request.features)
            else:
                total += request.total
                removed += request.count
        kept_positions(ids, np.ones(total, dtype=np.bool_), self._im_patch)
        check_order(ids, [request.tokens for request in requests], self._im_patch)
        has_video = any(isinstance(request, (EncodedClip, ClipRequest)) for request in requests)
        prompt_tokens, kept = len(ids) - removed, total - removed
        self._check_length(prompt_tokens, max_new_tokens, kept, len(ids), has_video)

    def compact(
        self,
        prompt: Conversation | TokenSequence,
        encoded: Sequence[Encoded],
        max_new_tokens: int,
        subtitles: Sequence[Subtitle],
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the prompt without the tokens of removed windows, and rotary positions of it.

        Args:
            prompt: as for `Session.generate`.
            encoded: what it is about.
            max_new_tokens: that the answer may have.
            subtitles: of the one video that it is about.

        Returns:
            (L,) token ids and (L,) positions.

        Raises:
            InputError: the prompt does not fit what it is about, or the bundle.
        """
        ids = self.complete(prompt, [visual.tokens for visual in encoded], subtitles)
        stays = [np.zeros(0, dtype=np.bool_), *(visual.keep.reshape(-1) for visual in encoded)]
        kept = kept_positions(ids, np.concatenate(stays), self._im_patch)
        check_order(ids, [visual.tokens for visual in encoded], self._im_patch)
        windows = sum(len(visual.features) for visual in encoded)
        has_video = any(isinstance(visual, EncodedClip) for visual in encoded)
        self._check_length(len(kept), max_new_tokens, windows, len(ids), has_video)
        is_gapped = self._bundle.manifest.positions == "gapped"
        return ids[kept], kept if is_gapped else np.arange(len(kept))

    def _check_length(
        self, prompt: int, max_new_tokens: int, kept: int, complete: int, has_video: bool
    ) -> None:
        """Check a prompt by its tokens, the windows among them, and the tokens before removal."""
        limit, needed = self._bundle.manifest.limits.max_tokens, prompt + max_new_tokens
        positions = self._bundle.config.text.max_position_embeddings
        if needed > limit:
            ways = ["raise the prune ratio", "sample fewer frames"] if has_video else []
            ways.append("shorten the prompt")
            if prompt < limit:
                ways.append("ask for fewer new tokens")
            if needed <= positions:
                ways.append(f"build with --max-tokens {needed}")
            new = f" and {max_new_tokens} new ones are {needed}" if max_new_tokens else ""
            raise InputError(
                f"{prompt} prompt tokens ({kept} of them windows){new}",
                where="prompt",
                allowed=f"{limit} tokens",
                fix=", or ".join([", ".join(ways[:-1]), ways[-1]] if ways[1:] else ways),
            )
        if self._bundle.manifest.positions == "gapped" and complete + max_new_tokens > positions:
            raise InputError(
                f"{complete} prompt tokens before removal and {max_new_tokens} new ones are "
                f"{complete + max_new_tokens} positions",
                where="prompt",
                allowed=f"{positions}, the checkpoint's max_position_embeddings: the bundle's "
                "positions are gapped, so removed tokens count",
                fix="sample fewer frames, or shorten the prompt"
                if has_video
                else "shorten the prompt",
            )
