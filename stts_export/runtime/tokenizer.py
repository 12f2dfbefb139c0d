"""A checkpoint's tokenizer files, and text from the tokens of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from stts_export.errors import InputError
from stts_export.files import json_object

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read a folder's `tokenizer.json`, without the truncation and padding it may ask for.

    Raises:
        InputError: the file is missing or is not a tokenizer.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            "tokenizer.json is missing",
            where=str(folder),
            fix="copy the checkpoint's tokenizer files into the folder, "
            "or pass the prompt as token ids",
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"is not a tokenizer: {error}", where=str(path)) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def sequence_ends(folder: Path, tokenizer: Tokenizer) -> tuple[int, list[int]]:
    """Return the id that begins every sequence and the ids that end an answer.

    The tokenizer's own tokens come before `generation_config.json` for the beginning, after it for
    the end, as in transformers.

    Raises:
        InputError: neither file names a token that ends an answer, or one of them is malformed.
    """
    names = json_object(folder / "tokenizer_config.json")
    generation = json_object(folder / "generation_config.json")
    bos, eos = (_token_id(names.get(key), tokenizer) for key in ("bos_token", "eos_token"))
    stops: Any = generation.get("eos_token_id")
    if stops is None:
        stops = eos
    eos_ids: list[Any] = stops if isinstance(stops, list) else [stops]
    if not eos_ids or not all(isinstance(token, int) for token in eos_ids):
        raise InputError(
            f"the token that ends an answer is {stops!r}",
            where=str(folder),
            allowed="eos_token_id (an id or a list) in generation_config.json, "
            "or eos_token in tokenizer_config.json",
        )
    # Qwen3 has no token for the beginning; the released models take the one for the end.
    begins = (bos, eos, generation.get("bos_token_id"), eos_ids[0])
    return next(int(token) for token in begins if token is not None), eos_ids


def decode(tokenizer: Tokenizer, token_ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
    """Return the text of `token_ids`, without special tokens."""
    text: str = tokenizer.decode([int(token) for token in token_ids])
    return text


@dataclass
class TextStream:
    """Decodes an answer as its tokens arrive, and never shows half a character.

    The pieces returned by `push` and `finish` add up to the text of all tokens.
    """

    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        self._ids: list[int] = []
        self._shown = 0  # tokens whose text has been returned
        self._context = 0  # start of the last piece: some decoders treat a first token specially

    def push(self, token_id: int) -> str:
        """Add a token; return the text that is now certain, often empty."""
        self._ids.append(int(token_id))
        piece = self._pending()
        if not piece or piece.endswith(_REPLACEMENT):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return piece

    def finish(self) -> str:
        """Return what was held back, with a replacement character for an unfinished one."""
        piece = self._pending()
        self._context, self._shown = self._shown, len(self._ids)
        return piece

    def _pending(self) -> str:
        shown = decode(self.tokenizer, self._ids[self._context : self._shown])
        return decode(self.tokenizer, self._ids[self._context :])[len(shown) :]


def _token_id(value: object, tokenizer: Tokenizer) -> int | None:
    """Id of a token that `tokenizer_config.json` names by its text or as an object."""
    name = value.get("content") if isinstance(value, dict) else value
    return tokenizer.token_to_id(name) if isinstance(name, str) else None
