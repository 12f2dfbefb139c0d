"""A checkpoint's tokenizer files, and text from the tokens of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from stts_export.errors import InputError
from stts_export.files import json_object


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


def sequence_ends(folder: Path, tokenizer: Tokenizer, limit: int) -> tuple[int, list[int]]:
    """Return the id that begins every sequence and the ids that end an answer.

    The tokenizer's own tokens come before `generation_config.json` for the beginning, after it for
    the end, as in transformers.

    Args:
        folder: holds `tokenizer_config.json` and `generation_config.json`.
        tokenizer: the tokenizer of that folder.
        limit: tokens that the model has embeddings for.

    Raises:
        InputError: neither file names a token that ends an answer, or one of them is malformed.
    """
    path = folder / "tokenizer_config.json"
    names = json_object(path)
    bos, eos = (
        [_checked_id(f"id of the {key}", token, limit, path)]
        if (token := _token_id(names.get(key), tokenizer)) is not None
        else []
        for key in ("bos_token", "eos_token")
    )
    eos_ids = _generation_ids(folder, "eos_token_id", limit) or eos
    if not eos_ids:
        raise InputError(
            "names no token that ends an answer",
            where=str(folder),
            allowed="eos_token_id (an id or a list) in generation_config.json, "
            "or eos_token in tokenizer_config.json",
        )
    # Qwen3 has no token for the beginning; the released models take the one for the end.
    begins = bos or eos or _generation_ids(folder, "bos_token_id", limit) or eos_ids
    return begins[0], eos_ids


def eos_ids_of(folder: Path, limit: int) -> frozenset[int]:
    """Return the tokens that end an answer by `generation_config.json`; none when it names none.

    Args:
        folder: a bundle's `config/`, or a checkpoint.
        limit: tokens that the model has embeddings for.

    Raises:
        InputError: the file is malformed.
    """
    return frozenset(_generation_ids(folder, "eos_token_id", limit))


def _generation_ids(folder: Path, key: str, limit: int) -> list[int]:
    """Ids that `generation_config.json` has under a key, one or a list; empty when absent."""
    path = folder / "generation_config.json"
    value = json_object(path).get(key)
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    return [_checked_id(key, token, limit, path) for token in values]


def _checked_id(key: str, value: Any, limit: int, path: Path) -> int:
    if type(value) is not int or not 0 <= value < limit:
        raise InputError(
            f"{key} is {value!r}", where=str(path), allowed=f"token ids, 0..{limit - 1}"
        )
    return value


def decode(tokenizer: Tokenizer, token_ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
    """Return the text of `token_ids`, without special tokens."""
    text: str = tokenizer.decode([int(token) for token in token_ids])
    return text


def _token_id(value: object, tokenizer: Tokenizer) -> int | None:
    """Id of a token that `tokenizer_config.json` names by its text or as an object."""
    name = value.get("content") if isinstance(value, dict) else value
    return tokenizer.token_to_id(name) if isinstance(name, str) else None
