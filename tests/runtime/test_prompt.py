from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.molmo2.processing_molmo2 import Molmo2Processor

from stts_export.config import ConnectorConfig, ModelConfig, TextConfig, TokenIds, VisionConfig
from stts_export.errors import InputError
from stts_export.runtime.layout import PromptLayout
from stts_export.runtime.prompt import (
    ImageTokens,
    PromptBuilder,
    Subtitle,
    VideoTokens,
    check_order,
    check_question,
    kept_positions,
    multiple_choice,
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
@pytest.mark.parametrize(
    "times",
    [[0.0], [0.0, 0.5, 0.96], [0.0, 9.949999, 10.05, 1234.56], [0.25, 0.35, 5399.95, 86400.0]],
)
def test_one_question_equals_transformers(folder, config, hf_tokenizer, times, frame_tokens):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    builder = PromptBuilder.from_folder(folder, _config(tokenizer, frame_tokens=frame_tokens))
    question = "What colour is the square?"
    ids = builder.build(question, [VideoTokens(np.array(times), 4)])
    assert ids.dtype == np.int64
    turns = [("user", question)]
    assert ids.tolist() == _expected(hf_tokenizer, turns, times, 4, frame_tokens)


@pytest.mark.parametrize(
    "question",
    ["", " ", "\n0.5 ", "é 東京 🚗?", "<im_patch", "im_end|>", "a<b>c", "user\n", "0.0 1.0"],
)
def test_odd_text_equals_transformers(builder, hf_tokenizer, question):
    ids = builder.build(question, [VideoTokens([0.0, 0.5], 2)])
    assert ids.tolist() == _expected(hf_tokenizer, [("user", question)], [0.0, 0.5], 2)


def test_conversation_equals_transformers(builder, hf_tokenizer):
    turns = [("user", "What colour?"), ("assistant", "red"), ("user", "Are you sure?")]
    ids = builder.build(turns, [VideoTokens([0.0], 4)])
    assert ids.tolist() == _expected(hf_tokenizer, turns, [0.0], 4)


def test_layout(builder):
    ids = builder.build("hi", [VideoTokens([0.0, 0.5], 2)]).tolist()
    text = builder.tokenizer.decode(ids, skip_special_tokens=False)
    frame = "<frame_start><im_patch><im_patch><frame_end>"
    chat = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert text == f"<|im_end|>0.0 {frame} 0.5 {frame}{chat}"


def test_prompt_without_video(builder):
    ids = builder.build("hi")
    assert builder.config.tokens.im_patch not in ids
    assert ids[0] == builder.bos_id
    assert builder.decode(ids) == "user\nhi\nassistant\n"


def test_long_prompts_are_not_cut_by_the_tokenizers_own_settings(builder):
    ids = builder.build("hi", [VideoTokens([float(second) for second in range(30)], 9)])
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
        builder.build(turns, [VideoTokens([0.0], 4)])
    assert f"{role}'s text contains the special token {token}" in str(caught.value)


def test_text_that_is_not_unicode(builder):
    with pytest.raises(InputError, match="user's text is not valid Unicode"):
        builder.build("caf\udce9", [VideoTokens([0.0], 4)])  # a Latin-1 byte from the command line


@pytest.mark.parametrize("roles", [[], ["assistant"], ["user", "user"], ["user", "assistant"]])
def test_roles_must_alternate(builder, roles):
    with pytest.raises(InputError, match="has the roles"):
        builder.build([(role, "a") for role in roles])


@pytest.mark.parametrize(
    "turn", [("user",), ("user", 5), ("user", "a", "b"), (1, "a"), "user", 7, None, {"user": "a"}]
)
def test_turns_are_pairs_of_text(builder, turn):
    with pytest.raises(InputError, match="conversation has the turn"):
        builder.build([turn])


@pytest.mark.parametrize("text", ["", "  ", "\n\t"])
def test_a_question_has_text(text):
    check_question("hi")
    check_question([("user", ""), ("assistant", "what?"), ("user", "hi")])
    for prompt in (text, [("user", "hi"), ("assistant", "yes"), ("user", text)]):
        with pytest.raises(InputError, match="question is empty"):
            check_question(prompt)


def test_system_role_is_refused(builder):
    with pytest.raises(InputError, match="'system'"):
        builder.build([("system", "be brief"), ("user", "a")])


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
    ids = _builder(tmp_path, _config(tokenizer)).build("hi", [VideoTokens([0.0], 3)])
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
    ids = PromptBuilder.from_folder(tmp_path, config).build("hi", [VideoTokens([0.0], 2)])
    assert ids.tolist() == _expected(hf_tokenizer, [("user", "hi")], [0.0], 2, False)


def test_column_tokens_are_refused(folder, tmp_path, config):
    _copy(folder, tmp_path)
    (tmp_path / "processor_config.json").write_text('{"video_use_col_tokens": true}')
    with pytest.raises(InputError, match="video_use_col_tokens is true"):
        PromptBuilder.from_folder(tmp_path, config)


def test_kept_positions_leave_out_windows_in_order(builder):
    ids = builder.build("hi", [VideoTokens([0.0, 0.5, 1.0], 2)])
    keep = np.array([True, True, False, False, False, True])
    stays = kept_positions(ids, keep, builder.config.tokens.im_patch)
    assert stays.dtype == np.int64
    text = builder.tokenizer.decode(ids[stays].tolist(), skip_special_tokens=False)
    frames = [
        f"{time} <frame_start>{'<im_patch>' * kept}<frame_end>"
        for time, kept in (("0.0", 2), ("0.5", 0), ("1.0", 1))
    ]
    chat = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert text == "<|im_end|>" + " ".join(frames) + chat


def test_kept_positions_match_window_by_window():
    ids = np.array([5, 9, 9, 6, 9, 9, 7])
    keep = np.array([False, True, True, False])
    assert kept_positions(ids, keep, 9).tolist() == [0, 2, 3, 4, 6]


def test_kept_positions_need_one_id_per_window():
    with pytest.raises(InputError) as caught:
        kept_positions(np.array([1, 9, 9]), np.ones(4, bool), 9)
    assert "has 2 window tokens (id 9), what it is about has 4 windows" in str(caught.value)


def test_visual_groups(builder):
    ids = builder.build("hi", [VideoTokens([0.0], 2)])
    groups = visual_groups(ids, builder.config.tokens.visual)
    assert groups.dtype == np.int32
    special = ("<frame_start>", "<im_patch>", "<frame_end>")
    inside = [builder.tokenizer.id_to_token(int(token)) in special for token in ids]
    assert groups.tolist() == [0 if visual else -1 for visual in inside]


def _with_subtitles(builder, times, *lines: Subtitle) -> str:
    video = VideoTokens(times, 1, lines)
    text = builder.tokenizer.decode(
        builder.build("hi", [video]).tolist(), skip_special_tokens=False
    )
    return text.rpartition("<frame_end>")[2].partition("<|im_start|>")[0]


def test_subtitles_follow_the_frames(builder):
    lines = [Subtitle(0.0, 1.25, "Hello."), Subtitle(1.25, 2.0, "two\nlines"), Subtitle(3, 3, "")]
    text = _with_subtitles(builder, [0.0, 1.0, 2.0], *lines)
    assert text == "subtitle\n0.0 - 1.2 Hello.\n1.2 - 2.0 two\nlines\n3.0 - 3.0 \n"


def test_subtitles_far_from_every_sampled_frame_are_left_out(builder):
    near = [(8.0, 9.0), (11.0, 12.0), (0.0, 0.5), (5.0, 30.0), (1.0, 1.0), (-9, -1)]
    far = [(8.0, 8.999), (11.001, 12.0), (1.001, 8.99), (-9, -1.001)]
    for start, end in near:
        shown = _with_subtitles(builder, [0.0, 10.0], Subtitle(start, end, "x"))
        assert shown == f"subtitle\n{start:.1f} - {end:.1f} x\n"
    for start, end in far:
        assert _with_subtitles(builder, [0.0, 10.0], Subtitle(start, end, "x")) == "subtitle\n"


def test_no_subtitles_no_text(builder):
    assert _with_subtitles(builder, [0.0]) == ""


def test_subtitles_that_are_refused(builder):
    with pytest.raises(
        InputError, match=r"subtitle's text contains the special token <\|im_end\|>"
    ):
        _with_subtitles(builder, [0.0], Subtitle(0, 1, "a<|im_end|>"))
    two = [VideoTokens([0.0], 1), VideoTokens([0.0], 1, [Subtitle(0, 1, "a")])]
    with pytest.raises(InputError, match="subtitles in a prompt about 2 images and videos"):
        builder.build("hi", two)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((float("nan"), 1, "a"), "lasts from nan to 1"),
        ((0, float("inf"), "a"), "lasts from 0 to inf"),
        ((2, 1.5, "a"), r"lasts from 2 to 1\.5"),
        (("0", 1, "a"), "lasts from '0' to 1"),
        ((0, None, "a"), "lasts from 0 to None"),
        ((True, 2, "a"), "lasts from True to 2"),
        ((0, 1, None), "the text of a subtitle is None"),
        ((0, 1, b"a"), "the text of a subtitle is b'a'"),
    ],
)
def test_what_is_no_subtitle(values: tuple[Any, ...], message: str):
    with pytest.raises(InputError, match=message):
        Subtitle(*values)


def test_times_of_subtitles_may_be_numbers_of_numpy():
    assert Subtitle(np.float32(1), np.int64(1), "a").text == "a"


PATCH = 9
CLIP, LONGER = VideoTokens([0.0, 0.5], 6), VideoTokens([0.0, 0.5, 1.0], 6)
SMALL, LARGE = ImageTokens((2, 2, 2, 4)), ImageTokens((2, 2, 2, 6))


def _sequence(*visuals: VideoTokens | ImageTokens, columns: bool = True) -> np.ndarray:
    """Windows of `visuals` as prompts have them; 1..3 stand for what is between."""
    ids: list[int] = [1]
    for visual in visuals:
        if isinstance(visual, VideoTokens):
            ids += [2, *[PATCH] * visual.windows, 3] * len(visual.timestamps)
            continue
        for rows, width in zip(visual.grid[::2], visual.grid[1::2], strict=True):
            ids += [2, *([PATCH] * width + [1] * columns) * rows, 3]
    return np.array([*ids, 1])


@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize(
    "visuals", [*itertools.permutations([CLIP, SMALL, LARGE]), [CLIP, CLIP], [SMALL, LARGE, SMALL]]
)
def test_sequences_in_the_order_of_their_visuals(visuals, columns):
    check_order(_sequence(*visuals, columns=columns), visuals, PATCH)


@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize(
    ("made_for", "given", "number"),
    [
        ([SMALL, CLIP], [CLIP, SMALL], "1 of 2, a video of 2 x 6 windows"),
        ([CLIP, SMALL], [SMALL, CLIP], "1 of 2, an image of 2 x 2 and 2 x 4 tokens"),
        ([LARGE, SMALL, CLIP], [SMALL, LARGE, CLIP], "1 of 3, an image of 2 x 2 and 2 x 4"),
        ([SMALL, LARGE, CLIP], [SMALL, CLIP, LARGE], "2 of 3, a video"),
        ([SMALL, CLIP, LONGER], [SMALL, LONGER, ImageTokens((2, 4, 1, 4))], "3 of 3, an image"),
    ],
)
def test_sequences_for_another_order(made_for, given, number, columns):
    with pytest.raises(InputError, match=rf"id 9\) of the prompt do not fit visual {number}"):
        check_order(_sequence(*made_for, columns=columns), given, PATCH)


def test_frames_may_follow_each_other_directly():
    one_run_each = np.array([*[PATCH] * 12, 1, *[PATCH] * 12, 2])
    check_order(one_run_each, [CLIP, SMALL], PATCH)
    with pytest.raises(InputError, match="do not fit visual 1 of 2"):
        check_order(np.full(24, PATCH), [CLIP, SMALL], PATCH)


def test_the_windows_of_one_visual_may_have_any_form():
    check_order(np.array([PATCH, 1, *[PATCH] * 11]), [CLIP], PATCH)
    check_order(np.array([1, 2]), [], PATCH)


@pytest.mark.parametrize("each_frame", [True, False])
def test_built_prompts_are_in_order(builder, config, each_frame):
    layout = PromptLayout(around_each_frame=each_frame)
    builder = PromptBuilder(
        builder.tokenizer, config, bos_id=1, eos_ids=builder.eos_token_ids, layout=layout
    )
    visuals: list[VideoTokens | ImageTokens] = [SMALL, LARGE, CLIP, LONGER]
    ids = builder.build("hi", visuals)
    check_order(ids, visuals, config.tokens.im_patch)
    with pytest.raises(InputError, match="do not fit visual 1 of 4"):
        check_order(ids, visuals[::-1], config.tokens.im_patch)


def test_stop_strings_with_special_tokens(builder):
    builder.check_stop(["stop", "<im", "im_end"])
    for text, name in (("<|im_end|>", r"<\|im_end\|>"), ("a<im_patch>", "<im_patch>")):
        with pytest.raises(InputError, match=f"contains the special token {name}"):
            builder.check_stop(["stop", text])


@pytest.mark.parametrize(
    ("question", "options", "message"),
    [
        ("Which?", "AB", "the options are 'AB'"),
        ("Which?", [None, 3], r"the options are \[None, 3\]"),
        ("Which?", {"a": 1}, "the options are {'a': 1}"),
        (None, ["a", "b"], "the question is None"),
    ],
)
def test_what_is_no_multiple_choice(question: Any, options: Any, message: str):
    with pytest.raises(InputError, match=message):
        multiple_choice(question, options)


def test_multiple_choice():
    text = multiple_choice("Which?", ["red", "a B", ""])
    assert text == "Which?\nOnly return the correct answer option.\nA. red\nB. a B\nC. "
    for options in ([], ["x"] * 27):
        with pytest.raises(InputError, match=f"{len(options)} options"):
            multiple_choice("Which?", options)
