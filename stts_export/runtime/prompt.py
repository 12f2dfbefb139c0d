"""Prompts as the model was trained on them, and the text that comes back.

A prompt is `BOS`, the images, the videos (one group of visual tokens per frame with its time
printed before it), then the conversation in the model's chat form. Sequences are built as before
pruning, one `<im_patch>` per window; `kept_positions` leaves out those of removed windows.
"""

from __future__ import annotations

import math
import string
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from stts_export.config import ModelConfig, TokenIds
from stts_export.errors import InputError
from stts_export.runtime.layout import IM_PATCH, PromptLayout, prompt_layout
from stts_export.runtime.tokenizer import decode, load_tokenizer, sequence_ends

_CHAT_START, _CHAT_END = "<|im_start|>", "<|im_end|>"

Conversation = str | Sequence[tuple[str, str] | Mapping[str, str]]
"""One question, or turns: user, assistant, ..., user; each (role, text) or a dict of these two as
"role" and "content"."""
_SUBTITLE_REACH = 1.0
"""Seconds between a subtitle and the nearest frame beyond which it is left out."""


@dataclass(frozen=True)
class Subtitle:
    """A line of text on screen or spoken, seconds after the first frame.

    Raises:
        InputError: a time is no finite number, the end comes before the start, or the text is no
            string.
    """

    start: float
    end: float
    text: str

    def __post_init__(self) -> None:
        if not (_is_time(self.start) and _is_time(self.end) and self.start <= self.end):
            raise InputError(
                f"a subtitle lasts from {self.start!r} to {self.end!r}",
                where="subtitles",
                allowed="seconds, the end not before the start",
            )
        if not isinstance(self.text, str):
            raise InputError(
                f"the text of a subtitle is {self.text!r}", where="subtitles", allowed="a string"
            )


@dataclass(frozen=True)
class VideoTokens:
    """What a prompt says about a video."""

    timestamps: Sequence[float] | NDArray[np.float64]
    """(T,) seconds of the sampled frames."""
    windows: int
    """W, windows of a frame."""
    subtitles: Sequence[Subtitle] = ()
    """In the order in which they are to stand in the prompt; those far from any sampled frame
    are left out, as in training."""


@dataclass(frozen=True)
class ImageTokens:
    """What a prompt says about an image."""

    grid: tuple[int, int, int, int]
    """Rows and columns of its tokens: of the whole image at low resolution, then of its crops
    together (the processor's `image_grids`)."""


Visual = VideoTokens | ImageTokens


class PromptBuilder:
    """Builds token sequences with a checkpoint's own tokenizer.

    Args:
        tokenizer: the tokenizer, without truncation and padding.
        config: the model the sequences are for.
        bos_id: first token of every sequence.
        eos_ids: tokens that end an answer.
        layout: special tokens around visual ones; those of `config` when None.
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
        layout: PromptLayout | None = None,
        where: str = "tokenizer.json",
    ) -> None:
        self.layout = layout or PromptLayout(frame_tokens=config.use_frame_special_tokens)
        _check_tokens(tokenizer, config.tokens, {IM_PATCH, *self.layout.frame_names()}, where)
        self.tokenizer = tokenizer
        self.config = config
        self.bos_id = bos_id
        self.eos_token_ids = frozenset(eos_ids)
        """Tokens that end an answer."""
        self._where = where
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
        layout = prompt_layout(folder, config)
        limit = config.text.vocab_size + config.text.additional_vocab_size
        bos_id, eos_ids = sequence_ends(folder, tokenizer, limit)
        return PromptBuilder(
            tokenizer,
            config,
            bos_id=bos_id,
            eos_ids=eos_ids,
            layout=layout,
            where=str(folder / "tokenizer.json"),
        )

    def build(self, prompt: Conversation, visuals: Sequence[Visual] = ()) -> NDArray[np.int64]:
        """Return the complete sequence as before pruning.

        Args:
            prompt: one question, or (role, text) turns that alternate and end with the user's.
            visuals: what the prompt is about, in the model's order: images, then videos.

        Returns:
            (L,) int64 token ids with one `<im_patch>` per window and token of an image, in the
            order of `visuals`.

        Raises:
            InputError: a turn is not a pair of texts, the turns do not alternate, a text contains
                a special token, a subtitle goes with several visuals, or an image comes after a
                video.
        """
        text = self._visual_text(visuals) + self._conversation_text(prompt)
        return np.array([self.bos_id, *self._encode(text)], dtype=np.int64)

    def video_part(self, video: VideoTokens, *, follows: bool) -> NDArray[np.int64]:
        """Return the tokens of a piece of a video, for sequences that grow piece by piece.

        `bos_id`, the pieces in order and `conversation_part` make up what `build` gives for the
        whole video, where frame tokens stand around each frame; else each piece has its own pair.

        Args:
            video: frames of the piece; no subtitles.
            follows: another piece comes before it.
        """
        text = self.layout.video_text(list(video.timestamps), video.windows)
        gap = " " if follows and self.layout.around_each_frame else ""
        return np.array(self._encode(gap + text), dtype=np.int64)

    def conversation_part(self, prompt: Conversation) -> NDArray[np.int64]:
        """Return the tokens of a conversation, as they come after what it is about.

        Raises:
            InputError: as in `build`.
        """
        return np.array(self._encode(self._conversation_text(prompt)), dtype=np.int64)

    def decode(self, token_ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        """Return the text of `token_ids`, without special tokens."""
        return decode(self.tokenizer, token_ids)

    def check_stop(self, stops: Sequence[str]) -> None:
        """Refuse texts that are to end an answer but cannot be in one.

        Raises:
            InputError: one contains a special token, which answers are given without.
        """
        for text in stops:
            special = self._special_in(text)
            if special is not None:
                raise InputError(
                    f"stop is {text!r}, which contains the special token {special}",
                    where="stop",
                    allowed="text that an answer can contain: it has no special tokens",
                    fix="leave it out: a token that ends answers of this model ends them anyway",
                )

    def _conversation_text(self, prompt: Conversation) -> str:
        turns = _turns(prompt)
        self._check_turns(turns)
        return _chat_text(turns)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _visual_text(self, visuals: Sequence[Visual]) -> str:
        images = [visual for visual in visuals if isinstance(visual, ImageTokens)]
        videos = [visual for visual in visuals if isinstance(visual, VideoTokens)]
        if any(isinstance(visual, VideoTokens) for visual in visuals[: len(images)]):
            raise InputError(
                "an image comes after a video",
                where="prompt",
                allowed="images first, then videos: the order that the model was trained with",
            )
        if images:
            _require(self.tokenizer, self.layout.image_names(), self._where)
        text = ""
        for number, image in enumerate(images, start=1):
            name = f"Image {number}" if len(images) > 1 else ""
            text += name + self.layout.image_text(image.grid)
        for video in videos:
            text += self.layout.video_text(list(video.timestamps), video.windows)
            text += self._subtitle_text(video, len(visuals))
        return text

    def _subtitle_text(self, video: VideoTokens, visuals: int) -> str:
        if not video.subtitles:
            return ""
        if visuals > 1:
            raise InputError(
                f"subtitles in a prompt about {visuals} images and videos",
                where="prompt",
                allowed="subtitles of a single video, as the model was trained",
            )
        times = np.asarray(video.timestamps, dtype=np.float64)
        text = "subtitle\n"
        for line in video.subtitles:
            self._check_text("subtitle", line.text)
            far = (line.end < times - _SUBTITLE_REACH) | (times + _SUBTITLE_REACH < line.start)
            if not far.all():
                text += f"{line.start:.1f} - {line.end:.1f} {line.text}\n"
        return text

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
        special = self._special_in(text)
        if special is not None:
            raise InputError(
                f"the {role}'s text contains the special token {special}",
                where="prompt",
                allowed="plain text",
                fix="write the token another way, give the turns of a conversation as (role, "
                "text) pairs, or pass the whole prompt as token ids",
            )

    def _special_in(self, text: str) -> str | None:
        """Return the first special token that a text is encoded to, or None."""
        tokens = (self._special.get(token) for token in self._encode(text))
        return next((name for name in tokens if name is not None), None)


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
    if not isinstance(prompt, Iterable):
        raise InputError(f"the prompt is {prompt!r}", where="prompt", allowed="text, or turns")
    turns: list[tuple[str, str]] = []
    for turn in cast(Iterable[object], prompt):
        match turn:
            case [str(role), str(text)]:
                turns.append((role, text))
            case {"role": str(role), "content": str(text), **others} if not others:
                turns.append((role, text))
            case _:
                raise InputError(
                    f"the conversation has the turn {turn!r}",
                    where="prompt",
                    allowed="(role, text), or a dict of 'role' and 'content', all of them strings",
                )
    return turns


def kept_positions(
    ids: NDArray[np.integer[Any]], keep: NDArray[np.bool_], im_patch_id: int
) -> NDArray[np.int64]:
    """Find the tokens that stay when those of removed windows go.

    Args:
        ids: (L,) the sequence as before pruning, one `im_patch_id` per window.
        keep: (N,) True for the windows that stay, over all visuals in the order of the sequence;
            the tokens of images count as windows.
        im_patch_id: the id that stands for a window.

    Returns:
        (L - removed,) int64 indices into `ids`, ascending. Everything that is not a window stays,
        also around an empty frame.

    Raises:
        InputError: the sequence does not have one `im_patch_id` per window.
    """
    is_window = ids == im_patch_id
    found = int(is_window.sum())
    if found != keep.size:
        raise InputError(
            f"the prompt has {found} window tokens (id {im_patch_id}), what it is about has "
            f"{keep.size} windows",
            where="prompt",
            allowed="one window token per window, as before pruning",
        )
    stays = np.ones(ids.shape, dtype=np.bool_)
    stays[is_window] = keep.reshape(-1)
    return np.flatnonzero(stays)


def check_order(ids: NDArray[np.integer[Any]], visuals: Sequence[Visual], im_patch_id: int) -> None:
    """Refuse a sequence that was made for several visuals in another order.

    Each visual has its share of the window tokens, in order. Where something stands between two of
    them, a frame of a video, a row of an image or the whole visual has to end; and a visual's last
    token has to be followed by something else. Rows and frames may follow each other directly.
    Visuals of the same kind and size cannot be told apart. A single visual may have any form.

    Args:
        ids: (L,) the sequence as before pruning, one `im_patch_id` per window; `kept_positions`
            checks how many there are.
        visuals: what the prompt is about.
        im_patch_id: the id that stands for a window.

    Raises:
        InputError: a visual does not fit its part of the sequence.
    """
    if len(visuals) <= 1:
        return
    places = np.flatnonzero(ids == im_patch_id)
    # How many window tokens there are up to the end of each run.
    breaks = np.flatnonzero(np.diff(places, append=len(ids) + 1) > 1) + 1
    start = 0
    for number, visual in enumerate(visuals, start=1):
        ends = start + np.cumsum(_piece_sizes(visual))
        own = breaks[(breaks > start) & (breaks <= ends[-1])]
        if len(own) == 0 or own[-1] != ends[-1] or not np.isin(own, ends).all():
            raise InputError(
                f"the window tokens (id {im_patch_id}) of the prompt do not fit visual {number} of "
                f"{len(visuals)}, {_described(visual)}",
                where="prompt",
                allowed="the videos and images in the order that the token ids are for",
            )
        start = int(ends[-1])


def _piece_sizes(visual: Visual) -> list[int]:
    """Window tokens of every frame of a video, every row of an image."""
    if isinstance(visual, VideoTokens):
        return [visual.windows] * len(visual.timestamps)
    rows, columns, high_rows, high_columns = visual.grid
    return [columns] * rows + [high_columns] * high_rows


def _described(visual: Visual) -> str:
    if isinstance(visual, VideoTokens):
        return f"a video of {len(visual.timestamps)} x {visual.windows} windows"
    rows, columns, high_rows, high_columns = visual.grid
    return f"an image of {rows} x {columns} and {high_rows} x {high_columns} tokens"


def visual_groups(ids: NDArray[np.integer[Any]], visual_ids: Collection[int]) -> NDArray[np.int32]:
    """Say which tokens see each other in both directions.

    All visual tokens of a sequence do, also those of different images and videos: the model's mask
    asks only whether a token is visual.

    Args:
        ids: (L,) a sequence.
        visual_ids: the ids of visual tokens.

    Returns:
        (L,) int32: 0 for visual tokens, -1 for text.
    """
    return np.where(np.isin(ids, list(visual_ids)), 0, -1).astype(np.int32)


def multiple_choice(question: str, options: Sequence[str]) -> str:
    """Return a multiple-choice question as the model's evaluations word it.

    Args:
        question: the question alone.
        options: the answers to choose from, without letters.

    Raises:
        InputError: the options are no list of strings, there are none, or more than the alphabet
            has letters; or the question is no string.
    """
    letters = string.ascii_uppercase
    if not isinstance(question, str):
        raise InputError(
            f"the question is {question!r}", where="multiple_choice", allowed="a string"
        )
    if not isinstance(options, (list, tuple)) or not all(isinstance(o, str) for o in options):
        raise InputError(
            f"the options are {options!r}", where="multiple_choice", allowed="a list of strings"
        )
    if not 1 <= len(options) <= len(letters):
        raise InputError(
            f"{len(options)} options", where="multiple_choice", allowed=f"1..{len(letters)}"
        )
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip(letters, options, strict=False))
    return f"{question}\nOnly return the correct answer option.\n{listed}"


def _is_time(value: object) -> bool:
    numbers = (int, float, np.integer, np.floating)
    return isinstance(value, numbers) and type(value) is not bool and math.isfinite(value)


def _visual_names(tokens: TokenIds) -> dict[str, int]:
    return {
        IM_PATCH: tokens.im_patch,
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


def _require(tokenizer: Tokenizer, names: set[str], where: str) -> None:
    """Refuse a tokenizer that lacks one of `names`."""
    missing = sorted(name for name in names if tokenizer.token_to_id(name) is None)
    if missing:
        raise InputError(
            f"the tokenizer has no token {missing[0]}, which images need",
            where=where,
            fix="use the tokenizer files that belong to the checkpoint",
        )
