from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from stts_export.errors import InputError
from stts_export.runtime.planner import n_prune
from stts_export.runtime.prompt import ImageTokens, VideoTokens
from stts_export.training import sequences as module
from stts_export.training.examples import Example, ImageInput, Question
from stts_export.training.sequences import Packed, SequenceBuilder, removed_windows
from tests.training.conftest import Core

NOTHING = np.ones((0, 9), dtype=np.bool_)


def _keeps(examples: list[Example], seed: int = 0) -> list[NDArray[np.bool_]]:
    """Any choice of the right size."""
    rng = np.random.default_rng(seed)
    keeps = []
    for example in examples:
        if example.clip is None:
            keeps.append(NOTHING)
            continue
        keep = np.ones(9 * len(example.clip.frames), dtype=np.bool_)
        keep[rng.permutation(keep.size)[: removed_windows(example, 9)]] = False
        keeps.append(keep.reshape(-1, 9))
    return keeps


def _separate_prompts(
    core: Core, example: Example, keep: NDArray[np.bool_]
) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer of each question, as the runtime makes them."""
    visuals: list[VideoTokens | ImageTokens] = []
    if isinstance(example.visual, ImageInput):
        visuals, keep = (
            [example.visual.tokens],
            np.ones((1, len(example.visual.pooled_patches)), bool),
        )
    elif example.clip is not None:
        visuals = [VideoTokens(example.clip.timestamps, 9)]
    found = []
    for question in example.questions:
        whole = core.prompts.build(question.text, visuals)
        stays = whole != core.model.config.tokens.im_patch
        stays[~stays] = keep.flatten()
        answer = core.prompts.tokenizer.encode(question.answer, add_special_tokens=False).ids
        found.append((whole[stays].tolist(), [*answer, min(core.prompts.eos_token_ids)]))
    return found


def _seen_from(packed: Packed, query: int) -> list[tuple[int, int]]:
    """(position, id) of all that a place in the rows may attend to, in their order."""
    width = packed.ids.shape[1]
    row, column = divmod(query, width)
    seen = packed.mask[row, 0, column].nonzero().flatten()
    pairs = zip(packed.positions[row, seen].tolist(), packed.ids[row, seen].tolist(), strict=True)
    return list(pairs)


@pytest.mark.parametrize("sequence_length", [0, 150, 10_000])
def test_to_each_question_a_sequence_is_the_prompt_with_it_alone(core, mixed, sequence_length: int):
    builder, keeps = SequenceBuilder(core.prompts, sequence_length), _keeps(mixed)
    packed = builder.build(mixed, keeps)
    number = 0
    for example, keep in zip(mixed, keeps, strict=True):
        for prompt, answer in _separate_prompts(core, example, keep):
            rows = (packed.question == number).nonzero().flatten()
            assert packed.targets[rows].tolist() == answer
            for place, row in enumerate(rows):
                seen = _seen_from(packed, int(packed.predict_at[row]))
                assert seen == list(enumerate([*prompt, *answer[:place]]))
            number += 1
    assert number == len(packed.types) == 10
    assert int(packed.question.max()) == 9
    assert builder.answer_tokens(mixed) == len(packed.targets)


def test_visual_tokens_see_those_of_their_own_example(core: Core, mixed: list[Example]):
    packed = SequenceBuilder(core.prompts, 10_000).build(mixed, _keeps(mixed))
    visual = torch.isin(packed.ids[0], torch.tensor(core.model.config.tokens.visual))
    starts = [0, *np.cumsum([SequenceBuilder(core.prompts).length(one) for one in mixed])]
    owner = np.searchsorted(starts, np.arange(packed.ids.shape[1]), side="right")
    same = torch.from_numpy(owner[:, None] == owner[None, :])
    expected = visual[:, None] & visual[None, :] & same
    assert torch.equal(packed.mask[0, 0] & visual[:, None] & visual[None, :], expected)
    assert not (packed.mask[0, 0] & ~same).any()


def test_a_model_whose_visual_tokens_are_causal(core: Core, mixed: list[Example]):
    builder = SequenceBuilder(core.prompts)
    builder.config = replace(builder.config, bidirectional_visual=False)
    assert not builder.build(mixed, _keeps(mixed)).mask.triu(1).any()


def test_patches_are_where_features_go(core: Core, mixed: list[Example]):
    keeps = _keeps(mixed)
    packed = SequenceBuilder(core.prompts, 300).build(mixed, keeps)
    ids = packed.ids.flatten()[packed.patch_at]
    assert (ids == core.model.config.tokens.im_patch).all()
    assert len(ids) == (packed.ids == core.model.config.tokens.im_patch).sum()
    image = next(one.visual for one in mixed if isinstance(one.visual, ImageInput))
    assert len(ids) == sum(keep.sum() for keep in keeps) + len(image.pooled_patches)
    assert packed.ids.shape[0] > 1


@settings(max_examples=30, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(["text", "image", "short", "long"]), min_size=1, max_size=6),
    sequence_length=st.sampled_from([0, 60, 130, 300]),
    ratio=st.sampled_from([0.0, 0.4, 0.9]),
)
def test_rows_hold_what_they_say(
    core: Core, text_example: Example, image_example: Example, kinds, sequence_length: int, ratio
):  # fmt: skip
    made = {
        "text": text_example,
        "image": image_example,
        "short": core.clip(1, 2, ratio),
        "long": core.clip(2, 7, ratio, questions=1),
    }
    examples = [made[kind] for kind in kinds]
    builder = SequenceBuilder(core.prompts, sequence_length)
    packed = builder.build(examples, _keeps(examples))
    lengths = [builder.length(example) for example in examples]
    assert packed.tokens == sum(lengths)
    assert packed.ids.shape[1] <= max(sequence_length, *lengths, 0)
    if not sequence_length:
        assert len(packed.ids) == len(examples)
    # So that no row of a softmax is empty, also in the padding.
    diagonal = packed.mask[:, 0].diagonal(dim1=1, dim2=2)
    assert diagonal.all()
    assert len(set(packed.predict_at.tolist())) == len(packed.predict_at)
    assert len(set(packed.patch_at.tolist())) == len(packed.patch_at)


def test_first_fit_fills_earlier_rows(core: Core, text_example: Example):
    clip = core.clip(2, 7, questions=1)
    builder = SequenceBuilder(core.prompts)
    limit = builder.length(clip) + builder.length(text_example)
    examples = [clip, clip, text_example, text_example]
    packed = SequenceBuilder(core.prompts, limit).build(examples, _keeps(examples))
    assert packed.ids.shape == (2, limit)
    alone = SequenceBuilder(core.prompts, 10).build(examples, _keeps(examples))
    assert len(alone.ids) == 4  # too long for any row: one each


def test_lengths_follow_the_ratio(core: Core):
    builder = SequenceBuilder(core.prompts)
    clip = core.clip(2, 7)
    full = builder.length(clip)
    for ratio in (0.3, 0.5, 0.8):
        example = replace(clip, prune_ratio=ratio)
        assert removed_windows(example, 9) == n_prune(9, 7, ratio)
        assert full - builder.length(example) == n_prune(9, 7, ratio)
    assert removed_windows(Example(None, clip.questions, prune_ratio=0.5), 9) == 0


def test_what_was_made_before_changes_nothing(core, mixed, monkeypatch: pytest.MonkeyPatch):
    fresh = SequenceBuilder(core.prompts).build(mixed, _keeps(mixed))
    monkeypatch.setattr(module, "_REMEMBERED", 3)
    builder = SequenceBuilder(core.prompts)
    for _ in range(2):
        again = builder.build(mixed, _keeps(mixed))
        assert torch.equal(fresh.ids, again.ids)
        assert torch.equal(fresh.targets, again.targets)
    assert len(builder._made) <= 3


@pytest.mark.parametrize("text", ["<im_patch>", "a <|im_end|> b"])
@pytest.mark.parametrize("side", ["question", "answer"])
def test_special_tokens_in_texts_are_refused(core: Core, text: str, side: str):
    asked = Question("", *((text, "a") if side == "question" else ("q", text)))
    with pytest.raises(InputError, match="contains the special token"):
        SequenceBuilder(core.prompts).length(Example(None, (asked,)))
