"""Token ids, against transformers' Molmo2 processor."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from stts_export.config import ConnectorConfig, ModelConfig, TextConfig, TokenIds, VisionConfig
from stts_export.errors import InputError
from stts_export.runtime.prompt import ImageTokens, PromptBuilder, VideoTokens, visual_groups
from stts_export.training.tokenizer import build_tokenizer, save_tokenizer_files
from tests.runtime.molmo2_processor import TextProcessor, hf_tokenizer

QUESTION = [("user", "What colour is the square?")]
TURNS = [
    *QUESTION,
    ("assistant", "red"),
    ("user", "Are you sure?\n"),
    ("assistant", ""),
    ("user", "x"),
]
NAMES = (
    "im_start", "im_end", "im_patch", "im_col", "low_res_im_start", "im_low", "frame_start",
    "frame_end",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer_files(build_tokenizer()[0], path, 8)
    (path / "processor_config.json").unlink()
    return path


@pytest.fixture(scope="module")
def hf(folder: Path) -> PreTrainedTokenizerFast:
    return hf_tokenizer(folder)


def _builder(
    folder: Path, hf: PreTrainedTokenizerFast, tmp_path: Path, **switches
) -> PromptBuilder:
    """Return a builder of prompts that follows these switches of `processor_config.json`."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "processor_config.json").write_text(json.dumps(switches))
    ids = {name: hf.convert_tokens_to_ids(f"<{name}>") for name in NAMES}
    config = ModelConfig(
        vision=VisionConfig((42, 42), 7, 32, 64, 2, 16, 6, (5,)),
        connector=ConnectorConfig(32, 2, 16, 64),
        text=TextConfig(32, 64, 1, 2, 1, 16, 700, 16, 1e4, 1024),
        tokens=TokenIds(**ids),
        use_frame_special_tokens=True,
    )
    return PromptBuilder.from_folder(tmp_path, config)


def _visuals(images, videos) -> list[ImageTokens | VideoTokens]:
    return [
        *map(ImageTokens, images),
        *(VideoTokens([time / 2 for time in times], grid[0] * grid[1]) for times, grid in videos),
    ]


@pytest.fixture(scope="module")
def builders(folder, hf, tmp_path_factory) -> dict[bool, PromptBuilder]:
    return {
        tokens: _builder(
            folder, hf, tmp_path_factory.mktemp("prompts"), use_frame_special_tokens=tokens
        )
        for tokens in (True, False)
    }


GRIDS = st.tuples(*[st.integers(1, 5)] * 4)
VIDEOS = st.tuples(
    st.lists(st.integers(0, 20_000), min_size=1, max_size=5).map(sorted),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
TEXTS = st.one_of(st.text(max_size=12), st.sampled_from(["", " ", "0.5 ", "\n", "subtitle\n", "é"]))
SPECIAL = "<|"  # a text that happens to hold a special token is refused, which has its own tests


@st.composite
def _turns(draw: st.DrawFn) -> list[tuple[str, str]]:
    count = 2 * draw(st.integers(0, 2)) + 1
    texts = [draw(TEXTS.filter(lambda text: SPECIAL not in text)) for _ in range(count)]
    return [(("user", "assistant")[number % 2], text) for number, text in enumerate(texts)]


@pytest.mark.parametrize("frame_tokens", [True, False])
@settings(deadline=None, max_examples=60)
@given(turns=_turns(), images=st.lists(GRIDS, max_size=3), video=st.none() | VIDEOS)
def test_equals_the_processor(builders, hf, frame_tokens, turns, images, video):
    videos = [] if video is None else [video]
    builder = builders[frame_tokens]
    processor = TextProcessor.of(hf, use_frame_special_tokens=frame_tokens)
    expected, types = processor.ids(turns, images, videos)
    ids = builder.build(turns, _visuals(images, videos))
    assert ids.dtype == np.int64
    assert ids.tolist() == expected
    # The mask of transformers lets all tokens of type 1 see each other, whatever they belong to.
    groups = visual_groups(ids, builder.config.tokens.visual)
    assert groups.tolist() == [0 if kind == 1 else -1 for kind in types]


@pytest.mark.parametrize(
    ("columns", "overview_columns", "start"),
    list(product([None, True, False], [None, True, False], [None, True, False])),
)
def test_switches_of_the_image_layout(folder, hf, tmp_path, columns, overview_columns, start):
    switches = {
        "image_use_col_tokens": columns,
        "use_single_crop_col_tokens": overview_columns,
        "use_single_crop_start_token": start,
    }
    builder = _builder(folder, hf, tmp_path, **switches)
    # Null in the file is what the class takes when the key is absent.
    given = {key: value for key, value in switches.items() if value is not None}
    grids = [(2, 3, 4, 5), (1, 1, 1, 1)]
    expected, _ = TextProcessor.of(hf, **given).ids(TURNS, grids)
    assert builder.build(TURNS, _visuals(grids, [])).tolist() == expected


def test_layout_of_an_image(folder, hf, tmp_path):
    builder = _builder(folder, hf, tmp_path, use_single_crop_col_tokens=False)
    text = hf.decode(builder.build("hi", [ImageTokens((1, 2, 2, 3))]))
    row = "<im_patch>" * 3 + "<im_col>"
    image = f"<low_res_im_start><im_patch><im_patch><im_end><im_start>{row}{row}<im_end>"
    assert text == f"<|im_end|>{image}<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_several_images_are_numbered_and_videos_follow(folder, hf, tmp_path):
    builder = _builder(folder, hf, tmp_path)
    images = [ImageTokens((1, 1, 1, 1))] * 2
    videos = [VideoTokens([0.0, 0.5], 1), VideoTokens([0.0], 1)]
    text = hf.decode(builder.build("hi", [*images, *videos]))
    image = "<low_res_im_start><im_patch><im_col><im_end><im_start><im_patch><im_col><im_end>"
    frame = "<frame_start><im_patch><frame_end>"
    visuals = f"Image 1{image}Image 2{image}0.0 {frame} 0.5 {frame}0.0 {frame}"
    chat = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert text == f"<|im_end|>{visuals}{chat}"


def test_an_image_after_a_video_is_refused(folder, hf, tmp_path):
    builder = _builder(folder, hf, tmp_path)
    with pytest.raises(InputError, match="an image comes after a video"):
        builder.build("hi", [VideoTokens([0.0], 1), ImageTokens((1, 1, 1, 1))])


def test_one_pair_of_tokens_around_all_frames(folder, hf, tmp_path):
    """A switch of the training code alone."""
    builder = _builder(folder, hf, tmp_path, per_frame_special_token=False)
    text = hf.decode(builder.build("hi", [VideoTokens([0.0, 0.5], 2)]))
    patches = "<im_patch>" * 2
    frames = f"<frame_start>0.0 {patches} 0.5 {patches}<frame_end>"
    assert text.startswith(f"<|im_end|>{frames}<|im_start|>user")


@pytest.mark.parametrize(
    ("switch", "value", "message"),
    [
        ("video_use_col_tokens", True, "video_use_col_tokens is true"),
        ("use_low_res_token_for_global_crops", True, "use_low_res_token_for_global_crops is true"),
        ("time_mode", "per-frame", "time_mode is 'per-frame'"),
        ("image_use_col_tokens", 1, "image_use_col_tokens is 1"),
        ("use_single_crop_start_token", "no", "use_single_crop_start_token is 'no'"),
        ("per_frame_special_token", 0, "per_frame_special_token is 0"),
    ],
)
def test_switches_that_are_refused(folder, hf, tmp_path, switch, value, message):
    with pytest.raises(InputError, match=message):
        _builder(folder, hf, tmp_path, **{switch: value})


def test_a_tokenizer_without_a_token_for_images_still_does_video(folder, hf, tmp_path):
    builder = _builder(folder, hf, tmp_path)
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace("<low_res_im_start>", "<other>"))
    builder = PromptBuilder.from_folder(tmp_path, builder.config)
    builder.build("hi", [VideoTokens([0.0], 1)])
    with pytest.raises(InputError, match="has no token <low_res_im_start>, which images need"):
        builder.build("hi", [ImageTokens((1, 1, 1, 1))])
