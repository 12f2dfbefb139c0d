"""A checkpoint's chat template, compared with the prompts that are built here.

Templates are programs; none is run. One is recognised by its text, and others by the marks of the
chat form that every Molmo2 prompt has.
"""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path

from stts_export.errors import InputError
from stts_export.files import json_object

_log = logging.getLogger(__name__)

_MARKS = ("<|im_start|>", "<|im_end|>", "assistant")
_VISUALS = ("<|image|>", "<|video|>")
# Some revisions write the first token themselves; the processor adds it where they do not.
_FIRST_TOKEN = re.compile(r"^\{\{-?\s*bos_token\s*-?\}\}")
# SHA-256 of the template that `convert_molmo2_to_hf.py` writes. Its prompts of one turn are those
# here; it writes a space before an answered turn of the assistant, which training does not.
_KNOWN = frozenset({"ec66862fda57dc1aef90a21b2a0f64c18a280e2483206449bd251a73b8993101"})


def check_chat_template(folder: Path) -> None:
    """Refuse a folder whose template builds another kind of prompt; warn when that is not known.

    A template without pictures is the text tokenizer's own, which Molmo2's prompts do not follow.

    Args:
        folder: a checkpoint folder; one without a template passes.

    Raises:
        InputError: the template lacks the marks of the model's chat form, or cannot be read.
    """
    found = _template(folder)
    if found is None:
        return
    path, text = found
    missing = [mark for mark in _MARKS if mark not in text]
    if missing:
        raise InputError(
            f"the chat template does not write {missing[0]}",
            where=str(path),
            allowed="Molmo2's chat form: <|im_start|>user ... <|im_end|> <|im_start|>assistant",
            fix="remove the template if the model was trained with that form, which prompts "
            "have here whatever the template says; another form is not implemented",
        )
    known = hashlib.sha256(_FIRST_TOKEN.sub("", text.strip()).encode()).hexdigest() in _KNOWN
    if not known and any(token in text for token in _VISUALS):
        _log.warning(
            "%s is not the chat template of Molmo2 that this version knows: prompts are built in "
            "the form that Molmo2 was trained with, which may differ; pass token ids to be sure",
            path,
        )


def _template(folder: Path) -> tuple[Path, str] | None:
    """Return the template that transformers would take, and its file."""
    path = folder / "chat_template.jinja"
    try:
        return path, path.read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read as text: {error}", where=str(path)) from None
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = json_object(folder / name).get("chat_template")
        if isinstance(template, list):  # several, by name
            named = {entry.get("name"): entry for entry in template if isinstance(entry, dict)}
            template = named.get("default", {}).get("template")
        if isinstance(template, str):
            return folder / name, template
    return None
