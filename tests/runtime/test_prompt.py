from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.molmo2.processing_molmo2 import Molmo2Processor

from stts_export.config import ConnectorConfig, ModelConfig, TextConfig, TokenIds, VisionConfig
from stts_export.errors import InputError
from stts_export.runtime.prompt import (
    PromptBuilder,
    check_question,
    keep_tokens,
    visual_groups,
)
from stts_export.runtime.tokenizer import eos_ids_of

CHAT_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VISUAL_TOKENS = {
    "im_start": "<im_start>",
    "im_end": "<im_end>",
    "im_patch": "<im_patch>",
    "im_col": "<im_col>",
    "low_res_im_start": "<low_res_im_start>",
    "im_low": "<im_low>",
    "frame_start": "<frame_start>",
    "frame_end": "<frame_end>",
}
# Spec 1.5, for transformers' own template engine: a turn of the user after the first closes the
# assistant's.
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}"
    "{% if not loop.first %}<|im_end|>\n{% endif %}"
    "<|im_start|>user\n{{ m['content'] }}<|im_end|>\n"
    "{% else %}<|im_start|>assistant\n{{ m['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _tokenizer(special: list[str]) -> Tokenizer:
    """Byte-level BPE as Qwen's, with merges that cross spaces, digits and newlines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = ["user\nWhat colour is the square?\n", "assistant\nred 0.5 1.0 10.5 12.0 \n"] * 4
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(special)
    return tokenizer


def _config(tokenizer: Tokenizer, *, frame_tokens: bool = True, **ids: int) -> ModelConfig:
    tokens = {key: tokenizer.token_to_id(name) or 0 for key, name in VISUAL_TOKENS.items()}
    return ModelConfig(
        vision=VisionConfig((42, 42), 7, 32, 64, 2, 16, 6, (5,)),
        connector=ConnectorConfig(32, 2, 16, 64),
        text=TextConfig(32, 64, 1, 2, 1, 16, 400, 16, 1e4, 1024),
        tokens=TokenIds(**(tokens | ids)),
        use_frame_special_tokens=frame_tokens,
        extra={"use_frame_special_tokens": frame_tokens},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer = _tokenizer(CHAT_TOKENS + list(VISUAL_TOKENS.values()))
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(path / "tokenizer.json"))
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(names))
    stop = tokenizer.token_to_id("<|im_end|>")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop]}))
    return path


@pytest.fixture(scope="module")
def config(folder) -> ModelConfig:
    return _config(Tokenizer.from_file(str(folder / "tokenizer.json")))


@pytest.fixture(scope="module")
def builder(folder, config) -> PromptBuilder:
    return PromptBuilder.from_folder(folder, config)


@pytest.fixture(scope="module")
def hf_tokenizer(folder) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def _expected(hf_tokenizer, turns, timestamps, windows, frame_tokens=True) -> list[int]:
    messages = [{"role": role, "content": text} for role, text in turns]
    chat = hf_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    processor = Molmo2Processor.__new__(Molmo2Processor)
    processor.use_frame_special_tokens = frame_tokens
    processor.video_use_col_tokens = False
    grid = torch.tensor([len(timestamps), 1, windows])
    video = processor.get_video_string(grid, timestamps)
    return hf_tokenizer("<|im_end|>" + video + chat).input_ids


@pytest.mark.parametrize("frame_tokens", [True, False])
@pytest.mark.parametrize("times", [[0.0], [0.0, 0.5, 0.96], [0.0, 9.949999, 10.05, 1234.56]])
def test_one_question_equals_transformers(folder, config, hf_tokenizer, times, frame_tokens):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    builder = PromptBuilder.from_folder(folder, _config(tokenizer, frame_tokens=frame_tokens))
    question = "What colour is the square?"
    ids = builder.build(question, np.array(times), windows=4)
    assert ids.dtype == np.int64
    turns = [("user", question)]
    assert ids.tolist() == _expected(hf_tokenizer, turns, times, 4, frame_tokens)


@pytest.mark.parametrize(
    "question",
    ["", " ", "\n0.5 ", "é 東京 🚗?", "<im_patch", "im_end|>", "a<b>c", "user\n", "0.0 1.0"],
)
def test_odd_text_equals_transformers(builder, hf_tokenizer, question):
    ids = builder.build(question, [0.0, 0.5], windows=2)
    assert ids.tolist() == _expected(hf_tokenizer, [("user", question)], [0.0, 0.5], 2)


def test_conversation_equals_transformers(builder, hf_tokenizer):
    turns = [("user", "What colour?"), ("assistant", "red"), ("user", "Are you sure?")]
    ids = builder.build(turns, [0.0], windows=4)
    assert ids.tolist() == _expected(hf_tokenizer, turns, [0.0], 4)


def test_layout(builder):
    ids = builder.build("hi", [0.0, 0.5], windows=2).tolist()
    text = builder.tokenizer.decode(ids, skip_special_tokens=False)
    frame = "<frame_start><im_patch><im_patch><frame_end>"
    chat = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert text == f"<|im_end|>0.0 {frame} 0.5 {frame}{chat}"


def test_prompt_without_video(builder):
    ids = builder.build("hi", None, windows=9)
    assert builder.config.tokens.im_patch not in ids
    assert ids[0] == builder.bos_id
    assert builder.decode(ids) == "user\nhi\nassistant\n"


def test_long_prompts_are_not_cut_by_the_tokenizers_own_settings(builder):
    ids = builder.build("hi", [float(second) for second in range(30)], windows=9)
    assert (ids == builder.config.tokens.im_patch).sum() == 270


def test_sequence_ends(folder, builder, tmp_path, config):
    stop = builder.tokenizer.token_to_id("<|im_end|>")
    assert builder.bos_id == stop
    assert builder.eos_token_ids == {stop}
    _copy(folder, tmp_path)
    names = {"bos_token": {"content": "<|endoftext|>"}, "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    (tmp_path / "generation_config.json").unlink()
    other = PromptBuilder.from_folder(tmp_path, config)
    assert other.bos_id == other.tokenizer.token_to_id("<|endoftext|>")
    assert other.eos_token_ids == {stop}
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "generation_config.json").write_text('{"bos_token_id": 7, "eos_token_id": 8}')
    third = PromptBuilder.from_folder(tmp_path, config)
    assert third.bos_id == 7
    assert third.eos_token_ids == {8}


@pytest.mark.parametrize(
    "token", ["<im_patch>", "<frame_end>", "<|im_end|>", "<im_low>", "<|endoftext|>"]
)
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_text_cannot_inject_special_tokens(builder, role, token):
    turns = [("user", "a"), ("assistant", "b"), ("user", "c")]
    turns = [(r, f"x{token}y" if r == role else text) for r, text in turns]
    with pytest.raises(InputError) as caught:
        builder.build(turns, [0.0], windows=4)
    assert f"{role}'s text contains the special token {token}" in str(caught.value)


def test_text_that_is_not_unicode(builder):
    with pytest.raises(InputError, match="user's text is not valid Unicode"):
        builder.build("caf\udce9", [0.0], windows=4)  # a Latin-1 byte from the command line


@pytest.mark.parametrize("roles", [[], ["assistant"], ["user", "user"], ["user", "assistant"]])
def test_roles_must_alternate(builder, roles):
    with pytest.raises(InputError, match="has the roles"):
        builder.build([(role, "a") for role in roles], None, windows=4)


@pytest.mark.parametrize(
    "turn", [("user",), ("user", 5), ("user", "a", "b"), (1, "a"), "user", 7, None, {"user": "a"}]
)
def test_turns_are_pairs_of_text(builder, turn):
    with pytest.raises(InputError, match="conversation has the turn"):
        builder.build([turn], None, windows=4)


@pytest.mark.parametrize("text", ["", "  ", "\n\t"])
def test_a_question_has_text(text):
    check_question("hi")
    check_question([("user", ""), ("assistant", "what?"), ("user", "hi")])
    for prompt in (text, [("user", "hi"), ("assistant", "yes"), ("user", text)]):
        with pytest.raises(InputError, match="question is empty"):
            check_question(prompt)


def test_system_role_is_refused(builder):
    with pytest.raises(InputError, match="'system'"):
        builder.build([("system", "be brief"), ("user", "a")], None, windows=4)


def _copy(folder: Path, target: Path) -> None:
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())


def test_folder_without_tokenizer(tmp_path, config):
    with pytest.raises(InputError, match=r"tokenizer\.json is missing"):
        PromptBuilder.from_folder(tmp_path, config)


@pytest.mark.parametrize("content", ["", "{", '{"version": "1.0"}', "\0\1"])
def test_broken_tokenizer(tmp_path, config, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=r"tokenizer\.json: is not a tokenizer"):
        PromptBuilder.from_folder(tmp_path, config)


def test_missing_visual_token(tmp_path):
    tokenizer = _tokenizer([*CHAT_TOKENS, "<frame_start>", "<frame_end>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError) as caught:
        _builder(tmp_path, _config(tokenizer, im_patch=399))
    message = "no such token for <im_patch>, config.json says 399"
    assert message in str(caught.value)


def test_missing_chat_token(tmp_path):
    tokenizer = _tokenizer(["<|im_end|>", *VISUAL_TOKENS.values()])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match=r"does not have <\|im_start\|> as one token"):
        _builder(tmp_path, _config(tokenizer))


def test_unused_visual_token_may_be_missing(tmp_path):
    used = ["<im_patch>", "<frame_start>", "<frame_end>"]
    tokenizer = _tokenizer(CHAT_TOKENS + used)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ids = _builder(tmp_path, _config(tokenizer)).build("hi", [0.0], windows=3)
    assert (ids == tokenizer.token_to_id("<im_patch>")).sum() == 3


def _builder(folder: Path, config: ModelConfig) -> PromptBuilder:
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    return PromptBuilder.from_folder(folder, config)


def test_contradicting_id(folder, config):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    got = tokenizer.token_to_id("<im_low>") or 0
    with pytest.raises(InputError) as caught:
        PromptBuilder.from_folder(folder, _config(tokenizer, im_low=got + 9))
    assert f"id {got} for <im_low>, config.json says {got + 9}" in str(caught.value)


def test_visual_token_that_is_not_an_added_token(tmp_path):
    plain = Tokenizer(models.WordLevel({"<im_patch>": 0, "[UNK]": 1}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.CharDelimiterSplit("_")
    plain.add_special_tokens([*CHAT_TOKENS, "<frame_start>", "<frame_end>"])
    plain.pre_tokenizer = pre_tokenizers.CharDelimiterSplit("m")
    plain.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="not as an added token for <im_patch>"):
        _builder(tmp_path, _config(plain))


def test_no_token_ends_an_answer(folder, tmp_path, config):
    _copy(folder, tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": []}')
    with pytest.raises(InputError, match="token that ends an answer"):
        PromptBuilder.from_folder(tmp_path, config)


@pytest.mark.parametrize("value", [True, "8", 8.0, -1, 416, [True], [8, None], {"id": 8}])
@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id"])
def test_wrong_ids_in_the_generation_config(folder, tmp_path, config, key, value):
    _copy(folder, tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 8, key: value}))
    with pytest.raises(InputError, match=rf"generation_config\.json: {key} is"):
        PromptBuilder.from_folder(tmp_path, config)


def test_ends_of_a_folder_without_a_tokenizer(tmp_path):
    assert eos_ids_of(tmp_path, 10) == frozenset()
    path = tmp_path / "generation_config.json"
    for text, ids in (("{}", set()), ('{"eos_token_id": 3}', {3}), ('{"eos_token_id": [3]}', {3})):
        path.write_text(text)
        assert eos_ids_of(tmp_path, 10) == ids
    for text in ('{"eos_token_id": 10}', '{"eos_token_id": [true]}', "3"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"generation_config\.json"):
            eos_ids_of(tmp_path, 10)


def test_a_tokenizer_larger_than_the_embedding(folder, tmp_path, config):
    _copy(folder, tmp_path)
    small = dataclasses.replace(config.text, vocab_size=100, additional_vocab_size=0)
    with pytest.raises(InputError, match=r"tokenizer_config\.json: id of the eos_token"):
        PromptBuilder.from_folder(tmp_path, dataclasses.replace(config, text=small))


@pytest.mark.parametrize("content", ["{", "[]"])
def test_broken_side_file(folder, tmp_path, config, content):
    _copy(folder, tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(InputError, match=r"generation_config\.json"):
        PromptBuilder.from_folder(tmp_path, config)


@pytest.mark.parametrize("key", ["video_use_col_tokens", "use_frame_special_tokens"])
@pytest.mark.parametrize("value", [1, 0, "false", []])
def test_processor_flags_are_booleans(folder, tmp_path, config, key, value):
    _copy(folder, tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({key: value}))
    with pytest.raises(InputError, match=rf"processor_config\.json: {key} is"):
        PromptBuilder.from_folder(tmp_path, config)


def test_processor_that_contradicts_config(folder, tmp_path, config):
    _copy(folder, tmp_path)
    (tmp_path / "processor_config.json").write_text('{"use_frame_special_tokens": false}')
    with pytest.raises(InputError, match=r"is False, config\.json says True"):
        PromptBuilder.from_folder(tmp_path, config)


def test_processor_decides_when_config_is_silent(folder, tmp_path, hf_tokenizer):
    _copy(folder, tmp_path)
    (tmp_path / "processor_config.json").write_text('{"use_frame_special_tokens": false}')
    config = _config(Tokenizer.from_file(str(folder / "tokenizer.json")))
    config.extra.clear()
    ids = PromptBuilder.from_folder(tmp_path, config).build("hi", [0.0], windows=2)
    assert ids.tolist() == _expected(hf_tokenizer, [("user", "hi")], [0.0], 2, False)


def test_column_tokens_are_refused(folder, tmp_path, config):
    _copy(folder, tmp_path)
    (tmp_path / "processor_config.json").write_text('{"video_use_col_tokens": true}')
    with pytest.raises(InputError, match="video_use_col_tokens is true"):
        PromptBuilder.from_folder(tmp_path, config)


def test_keep_tokens_removes_windows_in_order(builder):
    ids = builder.build("hi", [0.0, 0.5, 1.0], windows=2)
    keep = np.array([[True, True], [False, False], [False, True]])
    text = builder.tokenizer.decode(
        keep_tokens(ids, keep, builder.config.tokens.im_patch).tolist(), skip_special_tokens=False
    )
    frames = [
        f"{time} <frame_start>{'<im_patch>' * kept}<frame_end>"
        for time, kept in (("0.0", 2), ("0.5", 0), ("1.0", 1))
    ]
    chat = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert text == "<|im_end|>" + " ".join(frames) + chat


def test_keep_tokens_matches_window_by_window():
    ids = np.array([5, 9, 9, 6, 9, 9, 7])
    keep = np.array([[False, True], [True, False]])
    assert keep_tokens(ids, keep, 9).tolist() == [5, 9, 6, 9, 7]


def test_keep_tokens_needs_one_id_per_window():
    with pytest.raises(InputError) as caught:
        keep_tokens(np.array([1, 9, 9]), np.ones((2, 2), bool), 9)
    assert "has 2 window tokens (id 9), the clip has 4 windows (2 frames of 2)" in str(caught.value)


def test_visual_groups(builder):
    ids = builder.build("hi", [0.0], windows=2)
    groups = visual_groups(ids, builder.config.tokens.visual)
    assert groups.dtype == np.int32
    special = ("<frame_start>", "<im_patch>", "<frame_end>")
    inside = [builder.tokenizer.id_to_token(int(token)) in special for token in ids]
    assert groups.tolist() == [0 if visual else -1 for visual in inside]
