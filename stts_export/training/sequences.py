"""From examples to the token sequences of a training step.

An example is its visual, then blocks with one question each. Every block sees the visual and
itself and continues the visual's positions: to each block the sequence looks exactly like the
prompt with this question alone. Several examples may share a row and do not see each other.
Axes: N rows, L tokens of a row, Q questions, A answer tokens of all questions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stts_export.runtime.planner import n_prune
from stts_export.runtime.prompt import PromptBuilder, VideoTokens, kept_positions
from stts_export.runtime.prompt import Visual as VisualTokens
from stts_export.training.examples import Example, VideoInput
from stts_export.training.tokenizer import CHAT_END

_PADDING = -1
_REMEMBERED = 10_000  # pieces of sequences: synthetic questions repeat, real ones do not


@dataclass(frozen=True)
class Packed:
    """Token sequences of a micro-batch."""

    ids: Tensor
    """(N, L) i64."""
    positions: Tensor
    """(N, L) i64, of the rotary embedding."""
    mask: Tensor
    """(N, 1, L, L) bool, True = may attend."""
    patch_at: Tensor
    """(M,) i64 into N*L: the `<im_patch>` tokens, example after example."""
    predict_at: Tensor
    """(A,) i64 into N*L: where each answer token is predicted."""
    targets: Tensor
    """(A,) i64: answers, each with the token that ends it."""
    question: Tensor
    """(A,) i64: the question that an answer token belongs to."""
    types: tuple[str, ...]
    """(Q,) types of the questions."""
    tokens: int
    """Without padding."""


@dataclass(frozen=True)
class _Laid:
    """One example, as long as it will be."""

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    block: NDArray[np.int64]
    """0 for the visual, then 1, 2, ... for the questions."""
    answers: list[tuple[int, NDArray[np.int64]]]
    """Of each question: where its first token is predicted, and its tokens."""


class SequenceBuilder:
    """Builds the training form of prompts.

    Args:
        prompts: makes the prompts that the runtime makes.
        sequence_length: examples share rows of at most so many tokens; 0 gives each its own row.
    """

    def __init__(self, prompts: PromptBuilder, sequence_length: int = 0) -> None:
        self.prompts = prompts
        self.config = prompts.config
        self.sequence_length = sequence_length
        self._visual_ids = np.array(self.config.tokens.visual)
        # Of the tokens that may end an answer, the one that ends a turn of the chat.
        chat_end = prompts.tokenizer.token_to_id(CHAT_END)
        ends = prompts.eos_token_ids
        self._end: int = chat_end if chat_end in ends else min(ends)
        self._made: dict[object, NDArray[np.int64]] = {}

    def length(self, example: Example) -> int:
        """Tokens of an example after removal, which depend on the ratio and not on the choice.

        Raises:
            InputError: a question or an answer contains a special token.
        """
        prefix = len(self._prefix(example)) - removed_windows(example, self.config.vision.windows)
        return prefix + sum(
            len(self._ask(question.text)) + len(self._answer(question.answer)) - 1
            for question in example.questions
        )

    def answer_tokens(self, examples: Sequence[Example]) -> int:
        """Answer tokens of examples, with the ends."""
        return sum(len(self._answer(q.answer)) for example in examples for q in example.questions)

    def build(self, examples: Sequence[Example], keeps: Sequence[NDArray[np.bool_]]) -> Packed:
        """Lay out examples in rows.

        Args:
            examples: of a micro-batch.
            keeps: (T, W) of each clip; of anything else, empty.
        """
        laid = [self._lay_out(*pair) for pair in zip(examples, keeps, strict=True)]
        rows = self._rows([len(one.ids) for one in laid])
        width = max(stop for _, _, stop in rows)
        height = 1 + max(row for row, _, _ in rows)
        ids = np.full((height, width), self._end, dtype=np.int64)
        positions = np.zeros((height, width), dtype=np.int64)
        # Padding forms an example of its own, so that no row of the mask is empty.
        owner = np.full((height, width), _PADDING, dtype=np.int64)
        block = np.zeros((height, width), dtype=np.int64)
        patch_at, predict_at, targets, question = [], [], [], []
        asked = 0
        for number, (one, (row, start, stop)) in enumerate(zip(laid, rows, strict=True)):
            ids[row, start:stop] = one.ids
            positions[row, start:stop] = one.positions
            owner[row, start:stop] = number
            block[row, start:stop] = one.block
            first = row * width + start
            patch_at.append(first + np.flatnonzero(one.ids == self.config.tokens.im_patch))
            for at, tokens in one.answers:
                predict_at.append(first + at + np.arange(len(tokens)))
                targets.append(tokens)
                question.append(np.full(len(tokens), asked))
                asked += 1
        return Packed(
            torch.from_numpy(ids),
            torch.from_numpy(positions),
            self._mask(ids, owner, block),
            torch.from_numpy(np.concatenate(patch_at)),
            torch.from_numpy(np.concatenate(predict_at)),
            torch.from_numpy(np.concatenate(targets)),
            torch.from_numpy(np.concatenate(question)),
            tuple(q.type for example in examples for q in example.questions),
            sum(len(one.ids) for one in laid),
        )

    def _rows(self, lengths: Sequence[int]) -> list[tuple[int, int, int]]:
        """First-fit: (row, start, stop) of each example."""
        if not self.sequence_length:
            return [(row, 0, length) for row, length in enumerate(lengths)]
        used: list[int] = []
        places = []
        for length in lengths:
            fits = (row for row, taken in enumerate(used) if taken + length <= self.sequence_length)
            row = next(fits, len(used))
            if row == len(used):
                used.append(0)
            places.append((row, used[row], used[row] + length))
            used[row] += length
        return places

    def _lay_out(self, example: Example, keep: NDArray[np.bool_]) -> _Laid:
        prefix = self._prefix(example)
        if example.clip is not None:
            im_patch = self.config.tokens.im_patch
            prefix = prefix[kept_positions(prefix, keep.reshape(-1), im_patch)]
        parts, numbers, positions = [prefix], [0], [np.arange(len(prefix))]
        answers = []
        start = len(prefix)
        for number, question in enumerate(example.questions, start=1):
            asked, answer = self._ask(question.text), self._answer(question.answer)
            parts += [asked, answer[:-1]]
            size = len(asked) + len(answer) - 1
            numbers.append(number)
            positions.append(len(prefix) + np.arange(size))
            answers.append((start + len(asked) - 1, answer))
            start += size
        sizes = [len(position) for position in positions]
        return _Laid(
            np.concatenate(parts),
            np.concatenate(positions),
            np.repeat(numbers, sizes).astype(np.int64),
            answers,
        )

    def _mask(
        self, ids: NDArray[np.int64], owner: NDArray[np.int64], block: NDArray[np.int64]
    ) -> Tensor:
        """Causal within a block and towards the visual; visual tokens as the model says."""
        whose, part = torch.from_numpy(owner), torch.from_numpy(block)
        length = ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        sees = (part[:, None, :] == 0) | (part[:, :, None] == part[:, None, :])
        mask = causal & sees
        if self.config.bidirectional_visual:
            visual = torch.from_numpy(np.isin(ids, self._visual_ids) & (block == 0))
            mask = mask | (visual[:, :, None] & visual[:, None, :])
        return (mask & (whose[:, :, None] == whose[:, None, :]))[:, None]

    def _prefix(self, example: Example) -> NDArray[np.int64]:
        """Tokens before the conversation, as before removal."""
        visuals: list[VisualTokens] = []
        key: object = None
        if isinstance(example.visual, VideoInput):
            key = example.visual.timestamps
            visuals = [VideoTokens(example.visual.timestamps, self.config.vision.windows)]
        elif example.visual is not None:
            key = example.visual.tokens
            visuals = [example.visual.tokens]
        return self._once(("visual", key), lambda: self._before_conversation(visuals))

    def _before_conversation(self, visuals: Sequence[VisualTokens]) -> NDArray[np.int64]:
        whole = self.prompts.build("?", visuals)
        return whole[: -len(self.prompts.conversation_part("?"))]

    def _ask(self, text: str) -> NDArray[np.int64]:
        return self._once(("question", text), lambda: self.prompts.conversation_part(text))

    def _answer(self, text: str) -> NDArray[np.int64]:
        return self._once(("answer", text), lambda: self._checked_answer(text))

    def _checked_answer(self, text: str) -> NDArray[np.int64]:
        # Refuses special tokens, as it does in questions.
        self.prompts.conversation_part([("user", "?"), ("assistant", text), ("user", "?")])
        tokens = self.prompts.tokenizer.encode(text, add_special_tokens=False).ids
        return np.array([*tokens, self._end], dtype=np.int64)

    def _once(self, key: object, make: Callable[[], NDArray[np.int64]]) -> NDArray[np.int64]:
        if key not in self._made:
            if len(self._made) >= _REMEMBERED:
                self._made.clear()
            self._made[key] = make()
        return self._made[key]


def removed_windows(example: Example, windows: int) -> int:
    """Windows that are removed from an example's clip."""
    if example.clip is None:
        return 0
    return n_prune(windows, len(example.clip.frames), example.prune_ratio)
