"""Prompts as the model was trained on them, and the text that comes back.

A prompt is `BOS`, one group of visual tokens per frame with its time printed before it, then the
conversation in the model's chat form. Sequences are built as before pruning, one `<im_patch>` per
window; `keep_tokens` takes out those of removed windows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from stts_export.config import ModelConfig, TokenIds
from stts_export.errors import InputError
from stts_export.files import json_object
from stts_export.runtime.tokenizer import decode, load_tokenizer, sequence_ends

_IM_PATCH = "<im_patch>"
_CHAT_START, _CHAT_END = "<|im_start|>", "<|im_end|>"

Conversation = str | Sequence[tuple[str, str]]
"""One question, or (role, text) turns: user, assistant, ..., user."""
Timestamps = Sequence[float] | NDArray[np.float64]


class PromptBuilder:
    """Builds token sequences with a checkpoint's own tokenizer.

    Args:
        tokenizer: the tokenizer, without truncation and padding.
        config: the model the sequences are for.
        bos_id: first token of every sequence.
        eos_ids: tokens that end an answer.
        where: name for error messages.

    Raises:
        InputError: the tokenizer lacks a token that prompts need, or gives a special token another
            id than `config` does.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: ModelConfig,
        *,
        bos_id: int,
        eos_ids: Collection[int],
        where: str = "tokenizer.json",
    ) -> None:
        names = _frame_tokens(config)
        _check_tokens(tokenizer, config.tokens, {_IM_PATCH, *names}, where)
        self.tokenizer = tokenizer
        self.config = config
        self.bos_id = bos_id
        self.eos_token_ids = frozenset(eos_ids)
        """Tokens that end an answer."""
        self._frame_start, self._frame_end = names
        added = tokenizer.get_added_tokens_decoder()
        self._special = {token: entry.content for token, entry in added.items() if entry.special}
        for name, token in _visual_names(config.tokens).items():
            self._special[token] = name

    @staticmethod
    def from_folder(folder: Path, config: ModelConfig) -> PromptBuilder:
        """Read `tokenizer.json`, `tokenizer_config.json` and `generation_config.json`.

        Args:
            folder: a checkpoint folder or a bundle's `config/`.
            config: the model of that folder.

        Raises:
            InputError: there is no tokenizer, it cannot be read, it contradicts `config`, the
                folder's processor builds prompts in a way that is not implemented, or no token is
                named that begins a sequence or ends an answer.
        """
        tokenizer = load_tokenizer(folder)
        config = _follow_processor(folder, config)
        limit = config.text.vocab_size + config.text.additional_vocab_size
        bos_id, eos_ids = sequence_ends(folder, tokenizer, limit)
        return PromptBuilder(
            tokenizer, config, bos_id=bos_id, eos_ids=eos_ids, where=str(folder / "tokenizer.json")
        )

    def build(
        self, prompt: Conversation, timestamps: Timestamps | None, windows: int
    ) -> NDArray[np.int64]:
        """Return the complete sequence as before pruning.

        Args:
            prompt: one question, or (role, text) turns that alternate and end with the user's.
            timestamps: (T,) seconds of the sampled frames; None for a prompt without a video.
            windows: W, windows of a frame.

        Returns:
            (L,) int64 token ids with T * W times `<im_patch>`.

        Raises:
            InputError: a turn is not a pair of texts, the turns do not alternate, or a text
                contains a special token.
        """
        turns = _turns(prompt)
        self._check_turns(turns)
        text = self._video_text(timestamps, windows) + _chat_text(turns)
        return np.array([self.bos_id, *self._encode(text)], dtype=np.int64)

    def decode(self, token_ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        """Return the text of `token_ids`, without special tokens."""
        return decode(self.tokenizer, token_ids)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _video_text(self, timestamps: Timestamps | None, windows: int) -> str:
        if timestamps is None:
            return ""
        frame = self._frame_start + _IM_PATCH * windows + self._frame_end
        return " ".join(f"{seconds:.1f} {frame}" for seconds in timestamps)

    def _check_turns(self, turns: Sequence[tuple[str, str]]) -> None:
        roles = [role for role, _ in turns]
        if len(roles) % 2 == 0 or roles != (["user", "assistant"] * len(roles))[: len(roles)]:
            raise InputError(
                f"the conversation has the roles {roles}",
                where="prompt",
                allowed="user, assistant, ..., user",
            )
        for role, text in turns:
            self._check_text(role, text)

    def _check_text(self, role: str, text: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the {role}'s text is not valid Unicode: {error}",
                where="prompt",
                allowed="text in the terminal's encoding",
            ) from None
        special = [self._special[token] for token in self._encode(text) if token in self._special]
        if special:
            raise InputError(
                f"the {role}'s text contains the special token {special[0]}",
                where="prompt",
                allowed="plain text",
                fix="write the token another way, give the turns of a conversation as (role, "
                "text) pairs, or pass the whole prompt as token ids",
            )


def check_question(prompt: Conversation) -> None:
    """Refuse a conversation that ends without a question.

    Raises:
        InputError: the last turn is empty, or a turn is not a pair of texts.
    """
    turns = _turns(prompt)
    if turns and not turns[-1][1].strip():
        raise InputError("the question is empty", where="prompt", allowed="some text")


def _turns(prompt: Conversation) -> list[tuple[str, str]]:
    if isinstance(prompt, str):
        return [("user", prompt)]
    turns: list[tuple[str, str]] = []
    for turn in cast(Iterable[object], prompt):
        match turn:
            case [str(role), str(text)]:
                turns.append((role, text))
            case _:
                raise InputError(
                    f"the conversation has the turn {turn!r}",
                    where="prompt",
                    allowed="(role, text), both of them strings",
                )
    return turns


def keep_tokens(
    ids: NDArray[np.integer[Any]], keep: NDArray[np.bool_], im_patch_id: int
) -> NDArray[np.int64]:
    """Take the tokens of removed windows out of a sequence.

    Args:
        ids: (L,) the sequence as before pruning, one `im_patch_id` per window.
        keep: (T, W) True for the windows that stay.
        im_patch_id: the id that stands for a window.

    Returns:
        (L - removed,) int64. Everything that is not a window stays, also around an empty frame.

    Raises:
        InputError: the sequence does not have one `im_patch_id` per window.
    """
    is_window = ids == im_patch_id
    found = int(is_window.sum())
    if found != keep.size:
        raise InputError(
            f"the prompt has {found} window tokens (id {im_patch_id}), the clip has {keep.size} "
            f"windows ({keep.shape[0]} frames of {keep.shape[1]})",
            where="prompt",
            allowed="one window token per window, as before pruning",
        )
    stays = np.ones(ids.shape, dtype=np.bool_)
    stays[is_window] = keep.reshape(-1)
    return ids[stays].astype(np.int64)


def visual_groups(ids: NDArray[np.integer[Any]], visual_ids: Collection[int]) -> NDArray[np.int32]:
    """Say which tokens see each other in both directions.

    Args:
        ids: (L,) a sequence about one clip.
        visual_ids: the ids of visual tokens.

    Returns:
        (L,) int32: 0 for the clip's visual tokens, -1 for text.
    """
    return np.where(np.isin(ids, list(visual_ids)), 0, -1).astype(np.int32)


def _frame_tokens(config: ModelConfig) -> tuple[str, str]:
    if config.use_frame_special_tokens:
        return "<frame_start>", "<frame_end>"
    return "<im_start>", "<im_end>"


def _visual_names(tokens: TokenIds) -> dict[str, int]:
    return {
        _IM_PATCH: tokens.im_patch,
        "<im_start>": tokens.im_start,
        "<im_end>": tokens.im_end,
        "<im_col>": tokens.im_col,
        "<im_low>": tokens.im_low,
        "<low_res_im_start>": tokens.low_res_im_start,
        "<frame_start>": tokens.frame_start,
        "<frame_end>": tokens.frame_end,
    }


def _chat_text(turns: Sequence[tuple[str, str]]) -> str:
    text = ""
    for role, content in turns:
        # The user's turn is closed at once; the assistant's is closed by the next user's turn.
        opening = f"{_CHAT_END}\n" if text and role == "user" else ""
        closing = f"{_CHAT_END}\n" if role == "user" else ""
        text += f"{opening}{_CHAT_START}{role}\n{content}{closing}"
    return f"{text}{_CHAT_START}assistant\n"


def _check_tokens(tokenizer: Tokenizer, tokens: TokenIds, needed: set[str], where: str) -> None:
    for name in (_CHAT_START, _CHAT_END):
        if len(tokenizer.encode(name, add_special_tokens=False).ids) != 1:
            raise InputError(
                f"the tokenizer does not have {name} as one token",
                where=where,
                fix="use the tokenizer files that belong to the checkpoint",
            )
    for name, expected in _visual_names(tokens).items():
        got = tokenizer.token_to_id(name)
        if got is None and name not in needed:
            continue
        whole = tokenizer.encode(name, add_special_tokens=False).ids == [expected]
        if got != expected or not whole:
            found = "no such token" if got is None else f"id {got}"
            found += "" if whole or got != expected else ", not as an added token"
            raise InputError(
                f"the tokenizer has {found} for {name}, config.json says {expected}",
                where=where,
                fix="use the tokenizer files and the config.json of one checkpoint",
            )


def _follow_processor(folder: Path, config: ModelConfig) -> ModelConfig:
    """Take over the prompt settings of `processor_config.json`, or refuse them."""
    path = folder / "processor_config.json"
    values = json_object(path)
    for key in ("video_use_col_tokens", "use_frame_special_tokens"):
        if not isinstance(values.get(key), bool | None):
            raise InputError(f"{key} is {values[key]!r}", where=str(path), allowed="true or false")
    if values.get("video_use_col_tokens"):
        raise InputError("video_use_col_tokens is true", where=str(path), allowed="false")
    wanted = values.get("use_frame_special_tokens")
    if wanted in (None, config.use_frame_special_tokens):
        return config
    if "use_frame_special_tokens" in config.extra:
        raise InputError(
            f"use_frame_special_tokens is {wanted}, config.json says "
            f"{config.use_frame_special_tokens}",
            where=str(path),
            fix="set both files to what the model was trained with",
        )
    return dataclasses.replace(config, use_frame_special_tokens=wanted)
