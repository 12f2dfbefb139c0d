"""A checkpoint's chat template: known, possibly other, or certainly other."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import pytest

from stts_export import chat_template
from stts_export.chat_template import check_chat_template
from stts_export.errors import InputError
from tests.runtime.molmo2_processor import CHAT_TEMPLATE

TEXT_ONLY = "{% for m in messages %}<|im_start|>{{ m.role }}<|im_end|>{% endfor %}assistant"


@pytest.fixture
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hashlib.sha256(CHAT_TEMPLATE.encode()).hexdigest()
    monkeypatch.setattr(chat_template, "_KNOWN", frozenset({digest}))


def test_the_known_template_is_the_published_one():
    """Of `CHAT_TEMPLATE` in `olmo/hf_model/convert_molmo2_to_hf.py`: 3169 characters."""
    published = "ec66862fda57dc1aef90a21b2a0f64c18a280e2483206449bd251a73b8993101"
    assert {published} == chat_template._KNOWN


def _write(folder: Path, name: str, template: object) -> None:
    text = template if name.endswith(".jinja") else json.dumps({"chat_template": template})
    (folder / name).write_text(str(text))


@pytest.mark.usefixtures("_known")
@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("chat_template.jinja", CHAT_TEMPLATE),
        ("chat_template.jinja", f"{{{{ bos_token }}}}{CHAT_TEMPLATE}\n"),
        ("chat_template.jinja", f"{{{{- bos_token -}}}}{CHAT_TEMPLATE}"),
        ("chat_template.json", CHAT_TEMPLATE),
        ("tokenizer_config.json", CHAT_TEMPLATE),
        ("tokenizer_config.json", [{"name": "default", "template": CHAT_TEMPLATE}]),
        ("tokenizer_config.json", [{"name": "tools", "template": "other"}]),
        ("tokenizer_config.json", None),
        ("tokenizer_config.json", TEXT_ONLY),  # the text model's own
    ],
)
def test_known_templates_pass_quietly(tmp_path, caplog, name, template):
    _write(tmp_path, name, template)
    check_chat_template(tmp_path)
    assert not caplog.records


def test_a_folder_without_a_template_passes(tmp_path, caplog):
    check_chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    check_chat_template(tmp_path)
    assert not caplog.records


def test_another_template_of_the_same_form_is_named(tmp_path, caplog):
    _write(tmp_path, "chat_template.jinja", CHAT_TEMPLATE)
    with caplog.at_level(logging.WARNING):
        check_chat_template(tmp_path)
    assert "chat_template.jinja is not the chat template of Molmo2" in caplog.text


@pytest.mark.usefixtures("_known")
def test_the_processors_template_comes_before_the_tokenizers(tmp_path):
    _write(tmp_path, "chat_template.jinja", CHAT_TEMPLATE)
    _write(tmp_path, "tokenizer_config.json", "[INST] {{ messages }} [/INST]")
    check_chat_template(tmp_path)


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"]
)
def test_another_chat_form_is_refused(tmp_path, name):
    _write(tmp_path, name, "[INST] {{ messages }} [/INST]")
    with pytest.raises(InputError, match=r"does not write <\|im_start\|>") as error:
        check_chat_template(tmp_path)
    assert name in str(error.value)


def test_a_template_that_is_not_text(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"chat_template\.jinja: cannot be read as text"):
        check_chat_template(tmp_path)
