from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stts_export.errors import InputError
from stts_export.model.vision import VisionTower
from stts_export.runtime.planner import n_prune, pack
from stts_export.runtime.prompt import VideoTokens
from stts_export.training.examples import Example, ImageInput, WindowContents
from stts_export.training.objective import (
    Counts,
    Outcome,
    Trainee,
    encode,
    mixed_precision,
    similarity_loss,
)
from stts_export.training.parallel import checkpoint_activations
from stts_export.training.selectors import SELECTORS, merge, select_features, select_windows
from stts_export.training.synthetic import labelled_frames
from tests.training.conftest import Core, make_core

EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
"""In float64, where rounding cannot hide a difference."""
NEARLY: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
"""In float32."""
LOSSES = ("answer", "similarity", "label")


def _spec_loss(
    hidden: Tensor, scores: Tensor, first: Sequence[int], pruned: Sequence[int]
) -> Tensor:
    """Spec 2.10 written out: Gram matrix of all windows, entries (f - 1, j, f, j); a sum.

    Frames `first` begin a clip and are not compared; `pruned` are all frames of pruned clips.
    """
    frames, windows = scores.shape
    flat = hidden.reshape(frames * windows, -1)
    flat = flat / flat.norm(dim=1, keepdim=True)
    gram = (flat @ flat.T).reshape(frames, windows, frames, windows)
    total = hidden.new_zeros(())
    for f in pruned:
        for j in range(windows):
            if f not in first:
                total = total + (scores[f, j] - (1 - gram[f - 1, j, f, j])) ** 2
    return total


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
)
def test_similarity_loss_is_the_formula_of_the_spec(lengths: list[tuple[int, bool]], seed: int):
    """Over clips of these lengths, of which some are pruned; gradients too."""
    generator = torch.Generator().manual_seed(seed)
    frames = sum(length for length, _ in lengths)
    hidden = torch.randn(frames, 4 * 9, 5, generator=generator, requires_grad=True)
    scores = torch.rand(frames, 4, generator=generator, requires_grad=True)
    first, pruned, start = [], [], 0
    for length, is_pruned in lengths:
        first.append(start)
        pruned += list(range(start, start + length)) if is_pruned else []
        start += length
    counted = torch.zeros(frames, dtype=torch.bool)
    counted[[f for f in pruned if f not in first]] = True

    ours, spec = similarity_loss(hidden, scores, counted), _spec_loss(hidden, scores, first, pruned)
    torch.testing.assert_close(ours, spec)
    if spec.requires_grad:
        expected = torch.autograd.grad(spec, (hidden, scores))
        for one, other in zip(torch.autograd.grad(ours, (hidden, scores)), expected, strict=True):
            torch.testing.assert_close(one, other)


def test_similarity_loss_of_a_silent_window_is_finite():
    hidden = torch.zeros(2, 9, 3, requires_grad=True)
    loss = similarity_loss(hidden, torch.zeros(2, 1), torch.tensor([False, True]))
    loss.backward()
    assert loss.item() == 1  # not similar to anything
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()


def test_similarity_loss_computes_only_the_pairs_that_are_used():
    hidden, scores = torch.randn(6, 9 * 9, 4), torch.rand(6, 9)
    counted = torch.tensor([False, True, False, False, True, True])
    with patch.object(F, "cosine_similarity", wraps=F.cosine_similarity) as cosine:
        similarity_loss(hidden, scores, counted)
    assert [call.args[0].shape for call in cosine.call_args_list] == [(3, 9, 36)]


def test_similarity_of_a_batch_is_that_of_the_spec(core: Core, mixed: list[Example]):
    """With the right frames compared: pruned clips, neither their first frames nor across clips."""
    with torch.no_grad():
        encoded = encode(core.model.vision, mixed)
        expected = torch.zeros(())
        for example, scores in zip(mixed, encoded.scores, strict=True):
            if example.clip is not None and example.prune_ratio:
                hidden = core.model.vision.before_scoring(torch.from_numpy(example.clip.frames))
                assert scores is not None
                expected += _spec_loss(hidden, scores, [0], range(len(scores)))
    torch.testing.assert_close(encoded.similarity, expected)
    counts = Counts.of(mixed, core.trainee().sequences)
    assert counts.pairs == 9 * (3 + 5 + 4)
    kept = 9 * (4 + 6 + 3 + 5) - sum(n_prune(9, t, r) for t, r in ((4, 0.5), (6, 0.8), (5, 0.3)))
    assert counts.kept == kept == sum(int(keep.sum()) for keep in encoded.keeps)


@contextmanager
def exactly(core: Core) -> Iterator[Core]:
    """Everything in float64, also what the model computes in float32 whatever its type."""
    with patch.object(torch.Tensor, "float", torch.Tensor.double):
        yield Core(deepcopy(core.model).double(), core.prompts)


@pytest.fixture
def in_float64(core: Core) -> Iterator[Core]:
    with exactly(core) as exact:
        yield exact


@pytest.mark.parametrize(
    ("of", "refill"), [("answer", True), ("answer", False), ("similarity", True)]
)
def test_gradients_are_finite_differences(in_float64: Core, of: str, refill: bool):
    """Of the scorer, through the log-bias or the similarity loss, and of what lies below it."""
    trainee = in_float64.trainee(refill=refill)
    examples = [in_float64.clip(1, 4, 0.5), in_float64.clip(2, 3, 0.6)]
    model = in_float64.model
    assert model.vision.scorer is not None
    parameters = dict(model.vision.scorer.named_parameters(prefix="scorer"))
    below = ("embedding.projection.weight", "blocks.0.attention.wv.weight")
    parameters |= {name: model.vision.get_parameter(name) for name in below}

    def loss() -> Tensor:
        out = trainee(examples)
        keeps.append(np.concatenate(out.encoded.keeps))
        return getattr(out, "answer" if of == "answer" else "similarity")

    keeps: list[np.ndarray] = []
    gradients = torch.autograd.grad(loss(), list(parameters.values()), allow_unused=True)
    generator = torch.Generator().manual_seed(0)
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        step = 1e-5 * direction / direction.norm()
        with torch.no_grad():
            ahead = parameter.add_(step) is not None and loss().item()
            behind = parameter.sub_(2 * step) is not None and loss().item()
            parameter.add_(step)
        assert gradient is not None
        slope = (gradient * step).sum().item()
        # A key's bias shifts all logits of a query alike: its gradient is zero but for rounding.
        assert (abs(slope) > 1e-12) == (name != "scorer.pooler.wk.bias"), name
        assert (ahead - behind) / 2 == pytest.approx(slope, rel=1e-4, abs=1e-11), name
    assert all(np.array_equal(keeps[0], other) for other in keeps)  # the choice is held fixed


def test_scores_decide_the_choice_and_get_no_gradient_from_it(core: Core):
    """Straight through nothing: where no bias is added the answer teaches the scorer nothing."""
    trainee = core.trainee()
    with patch.object(
        VisionTower,
        "after_scoring",
        lambda tower, x, scores, fresh: tower.blocks[tower.config.split_at - 1](x),
    ):
        out = trainee([core.clip(1, 4, 0.5)])
    scorer = core.model.vision.scorer
    assert scorer is not None
    gradients = torch.autograd.grad(out.answer, list(scorer.parameters()), allow_unused=True)
    assert all(gradient is None or not gradient.any() for gradient in gradients)


def _whole(example: Example) -> Tensor:
    assert example.clip is not None
    return torch.from_numpy(example.clip.frames)


@pytest.mark.parametrize("refill", [True, False])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.8, 0.95])
def test_a_batch_encodes_each_clip_as_the_model_does_alone(
    in_float64: Core, small_clips: Callable[[float], list[Example]], image_example: Example,
    text_example: Example, ratio: float, refill: bool,
):  # fmt: skip
    core, clips = in_float64, small_clips(ratio)
    examples = [clips[0], image_example, clips[1], text_example, *clips[2:]]
    with torch.no_grad():
        batch = encode(core.model.vision, examples, refill=refill)
        start = 0
        for example, keep, scores in zip(examples, batch.keeps, batch.scores, strict=True):
            if isinstance(example.visual, ImageInput):
                expected = core.model.encode_images(
                    torch.from_numpy(example.visual.crops),
                    torch.from_numpy(example.visual.pooled_patches),
                )
            elif example.clip is not None:
                alone = core.model.encode(_whole(example), ratio, refill=refill)
                np.testing.assert_array_equal(alone.keep.numpy(), keep)
                torch.testing.assert_close(scores, alone.scores, **EXACT)
                expected = alone.features
            else:
                assert scores is None
                assert keep.shape == (0, 9)
                continue
            stop = start + len(expected)
            torch.testing.assert_close(batch.features[start:stop], expected, **EXACT)
            start = stop
    assert start == len(batch.features)


@pytest.mark.parametrize("refill", [True, False])
@pytest.mark.parametrize("selector", [name for name in SELECTORS if name != "stts"])
def test_other_selectors_are_the_model_with_their_choice(
    in_float64: Core, small_clips: Callable[[float], list[Example]], selector: str, refill: bool
):
    core, clips = in_float64, small_clips(0.6)
    vision = core.model.vision
    with torch.no_grad():
        batch = encode(vision, clips, selector=selector, refill=refill, seed=(3,))
        start = 0
        for example, keep in zip(clips, batch.keeps, strict=True):
            frames = _whole(example)
            shape = (len(frames), 9)
            count = n_prune(9, len(frames), 0.6)
            assert (~keep).sum() == count
            if selector == "evs":
                full = core.model.encode(frames, 0.0).features
                chosen = select_features(full.numpy(), shape, count)
                expected = full[torch.from_numpy(chosen.keep.flatten())]
            elif selector == "tome":
                hidden = core.model.encode(frames, 0.6).hidden.unflatten(1, (9, -1)).flatten(0, 1)
                chosen = select_windows(selector, shape, count, hidden=hidden.mean(1).numpy())
                merged = torch.from_numpy(merge(hidden.numpy(), chosen))
                plan = pack(chosen.keep, refill=refill)
                bins = merged[torch.from_numpy(plan.gather_window)].flatten(1, 2)
                slots = vision.upper(bins, torch.from_numpy(plan.segment)).flatten(0, 1)
                expected = slots[torch.from_numpy(plan.kept_slot)]
            else:
                mask = torch.from_numpy(keep)
                expected = core.model.encode(frames, 0.6, keep=mask, refill=refill).features
                alone = encode(vision, [example], selector=selector, refill=refill, seed=(3,))
                np.testing.assert_array_equal(alone.keeps[0], keep)
            # The NumPy reference of merging averages in float32.
            if selector in ("evs", "tome"):
                np.testing.assert_array_equal(chosen.keep, keep)
            stop = start + len(expected)
            torch.testing.assert_close(
                batch.features[start:stop], expected, **(NEARLY if selector == "tome" else EXACT)
            )
            start = stop
    assert start == len(batch.features)


def test_random_windows_differ_between_seeds(core: Core):
    example = core.clip(1, 6, 0.5)
    first, same, other = (
        encode(core.model.vision, [example], selector="random", seed=(seed,)).keeps[0]
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)


def test_random_windows_differ_between_clips(core: Core):
    clips = [core.clip(1, 6, 0.5), core.clip(2, 6, 0.5)]
    one, other = encode(core.model.vision, clips, selector="random").keeps
    assert not np.array_equal(one, other)


def test_a_connector_that_does_not_mask_sees_the_windows_of_images_alone(
    tmp_path, image_example: Example
):
    """Its mean is over all patches of a window, so images and clips cannot be padded alike."""
    made = make_core(tmp_path, **{"adapter_config.pooling_attention_mask": False})
    with torch.no_grad(), exactly(made) as core:
        clip = core.clip(1, 3, 0.5)
        batch = encode(core.model.vision, [clip, image_example])
        visual = image_example.visual
        assert isinstance(visual, ImageInput)
        image = core.model.encode_images(
            torch.from_numpy(visual.crops), torch.from_numpy(visual.pooled_patches)
        )
        expected = torch.cat([core.model.encode(_whole(clip), 0.5).features, image])
    torch.testing.assert_close(batch.features, expected, **EXACT)


def test_without_a_scorer_nothing_is_chosen_by_scores(tmp_path):
    core = make_core(tmp_path, scorer=False)
    trainee, example = core.trainee(), core.clip(1, 4)
    out = trainee([example])
    torch.testing.assert_close(
        out.encoded.features, core.model.encode(_whole(example), 0.0).features, rtol=1e-4, atol=1e-4
    )
    assert out.similarity == 0
    out.answer.backward()
    with pytest.raises(InputError, match="no scorer"):
        trainee([replace(example, prune_ratio=0.5)])


def _run(trainee: Trainee, batches: Sequence[Sequence[Example]]) -> tuple[dict[str, float], Any]:
    """Losses over batches, and gradients of their sum by name of the parameter."""
    trainee.zero_grad(set_to_none=True)
    losses = dict.fromkeys(LOSSES, 0.0)
    correct = []
    for batch in batches:
        out: Outcome = trainee(batch)
        terms = {name: getattr(out, name) for name in LOSSES}
        (terms["answer"] + 0.5 * terms["similarity"] + 0.1 * terms["label"]).backward()
        losses = {name: losses[name] + term.item() for name, term in terms.items()}
        correct += out.correct.tolist()
    named = trainee.named_parameters()
    gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}
    return {**losses, "correct": sum(correct), "asked": len(correct)}, gradients


def _assert_same(ours: tuple[dict[str, float], Any], theirs: tuple[dict[str, float], Any]) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-9)
    assert set(ours[1]) == set(theirs[1])
    for name, gradient in theirs[1].items():
        close = 1e-9 * gradient.abs().max().item() + 1e-12
        torch.testing.assert_close(ours[1][name], gradient, rtol=1e-7, atol=close, msg=name)


def _every_parameter_learns(gradients: dict[str, Tensor]) -> None:
    silent = {name for name, gradient in gradients.items() if not gradient.abs().sum() > 0}
    assert not {name for name in silent if not name.endswith("wk.bias")}


@pytest.fixture(scope="module")
def apart(core: Core, mixed: list[Example]) -> tuple[dict[str, float], Any]:
    """What the examples give one at a time."""
    with exactly(core) as exact:
        found = _run(exact.trainee(), [[example] for example in mixed])
    _every_parameter_learns(found[1])
    assert found[0]["asked"] == 10
    return found


def test_a_batch_equals_one_example_at_a_time(in_float64: Core, mixed: list[Example], apart):
    _assert_same(_run(in_float64.trainee(), [mixed]), apart)
    _assert_same(_run(in_float64.trainee(), [mixed[:2], mixed[2:]]), apart)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_examples_that_share_rows_do_not_see_each_other(
    in_float64: Core, mixed: list[Example], apart, rows: int
):
    lengths = [in_float64.trainee().sequences.length(example) for example in mixed]
    limit = {1: sum(lengths), 2: sum(lengths) - min(lengths), 4: sum(sorted(lengths)[-2:])}[rows]
    packed = in_float64.trainee(sequence_length=limit)
    out = packed(mixed)
    assert out.packed.ids.shape[0] <= rows
    assert out.packed.ids.shape[1] <= limit
    assert out.packed.tokens == sum(lengths)
    _assert_same(_run(packed, [mixed]), apart)


def test_questions_on_a_shared_prefix_get_the_loss_of_separate_prompts(
    in_float64: Core, mixed: list[Example]
):
    """Of the runtime's own prompts, through the model's own forward."""
    model, prompts = in_float64.model, in_float64.prompts
    tokens = model.config.tokens
    with torch.no_grad():
        out = in_float64.trainee(sequence_length=200)(mixed)
        total, right = torch.zeros(()), []
        for example in mixed:
            visuals: list[Any] = []
            features, keep = torch.zeros(1, 16), np.ones(0, dtype=np.bool_)
            if isinstance(example.visual, ImageInput):
                crops, pooled = example.visual.crops, example.visual.pooled_patches
                features = model.encode_images(torch.from_numpy(crops), torch.from_numpy(pooled))
                visuals, keep = [example.visual.tokens], np.ones(len(pooled), dtype=np.bool_)
            elif example.clip is not None:
                encoded = model.encode(_whole(example), example.prune_ratio)
                features, keep = encoded.features, encoded.keep.numpy().flatten()
                visuals = [VideoTokens(example.clip.timestamps, 9)]
            for question in example.questions:
                whole = prompts.build(question.text, visuals)
                stays = whole != tokens.im_patch
                stays[~stays] = keep
                answer = prompts.tokenizer.encode(question.answer, add_special_tokens=False).ids
                answer += [min(prompts.eos_token_ids)]
                ids = torch.tensor([*whole[stays].tolist(), *answer])[None]
                logits = model.language(ids, features, model.visual_groups(ids))
                logits = logits[0, -len(answer) - 1 : -1]
                targets = torch.tensor(answer)
                total = total + F.cross_entropy(logits, targets, reduction="sum")
                right.append(bool((logits.argmax(-1) == targets).all()))
    torch.testing.assert_close(out.answer, total, check_dtype=False, **EXACT)
    assert out.correct.tolist() == right
    assert out.packed.types == tuple(q.type for example in mixed for q in example.questions)


def test_an_answer_is_right_when_all_of_its_tokens_are(core: Core, text_example: Example):
    """A model whose head always says the end is right about the end only."""
    end = min(core.prompts.eos_token_ids)
    questions = [replace(text_example.questions[0], answer=word) for word in ("", "the end", "")]
    other = Core(deepcopy(core.model), core.prompts)
    with torch.no_grad():
        other.model.language.lm_head.weight.zero_()
        other.model.language.norm.weight.zero_()
    trainee = other.trainee()
    with patch.object(other.model.language.lm_head, "forward", lambda x: _always(end, x)):
        out = trainee([replace(text_example, questions=tuple(questions))])
    assert out.correct.tolist() == [True, False, True]


def _always(token: int, x: Tensor) -> Tensor:
    logits = x.new_zeros(len(x), 447)
    logits[:, token] = 1
    return logits


def test_labels_of_windows_are_the_same_in_a_batch(in_float64: Core):
    clips = [in_float64.clip(1, 4, 0.5), in_float64.clip(2, 6, 0.8), in_float64.clip(3, 3)]
    one_by_one = _run(in_float64.trainee(labels=True), [[clip] for clip in clips])
    assert one_by_one[0]["label"] > 1
    _every_parameter_learns(one_by_one[1])
    _assert_same(_run(in_float64.trainee(labels=True), [clips]), one_by_one)


def test_labels_are_those_of_the_kept_windows(core: Core):
    """In the order of the features."""
    rng = np.random.default_rng(0)
    contents = WindowContents(*(rng.integers(0, 4, (6, 9)) for _ in range(3)))
    clip = replace(core.clip(3, 6, 0.5), contents=contents)
    trainee = core.trainee(labels=True)
    heads = trainee.labels
    assert heads is not None
    with (
        patch.object(heads, "appearance", wraps=heads.appearance) as appearance,
        patch.object(heads, "change", wraps=heads.change) as change,
    ):
        out = trainee([core.clip(2, 2), clip])
    keep = out.encoded.keeps[1]
    times, places = np.nonzero(keep)
    features, *named = (values[-len(times) :] for values in appearance.call_args.args)
    torch.testing.assert_close(features, out.encoded.features[-len(times) :])
    expected = [contents.colour[keep], contents.shape[keep], places]
    _, *changes = (values[-len(times) :] for values in change.call_args.args)
    expected += [times, np.where(contents.colour[keep] > 0, contents.motion[keep], -1)]
    for ours, theirs in zip([*named, *changes], expected, strict=True):
        assert ours.tolist() == theirs.tolist()


def test_what_has_no_labels_is_left_out_of_their_loss(in_float64: Core, mixed: list[Example]):
    """Text stands in for a share of a process that is empty, and files have no labels."""
    clips = [example for example in mixed if example.contents is not None]
    unlabelled = [replace(in_float64.clip(9, 3, 0.5), contents=None), *mixed]
    expected = _run(in_float64.trainee(labels=True), [clips])[0]["label"]
    assert _run(in_float64.trainee(labels=True), [unlabelled])[0]["label"] == pytest.approx(
        expected
    )
    found, gradients = _run(in_float64.trainee(labels=True), [mixed[1:2]])
    assert found["label"] == 0
    # All processes exchange the same gradients, whatever they have seen.
    assert {name for name in gradients if name.startswith("labels.")} == {
        f"labels.{name}.{kind}"
        for name in ("colour", "shape", "place", "time", "motion")
        for kind in ("weight", "bias")
    }


def test_text_alone_leaves_a_gradient_everywhere(core: Core, text_example: Example, apart):
    _, gradients = _run(core.trainee(), [[text_example]])
    assert set(gradients) == set(apart[1])
    assert not any(gradient.any() for name, gradient in gradients.items() if "vision" in name)
    assert gradients["model.language.lm_head.weight"].any()


@pytest.mark.parametrize("bfloat16", [False, True])
def test_activation_checkpointing_changes_nothing(core: Core, mixed, bfloat16: bool):
    plain = _run(core.trainee(bfloat16=bfloat16), [mixed])
    other = Core(deepcopy(core.model), core.prompts)
    checkpoint_activations(other.model, lambda: mixed_precision(bfloat16))
    again = _run(other.trainee(bfloat16=bfloat16), [mixed])
    assert plain[0] == again[0]
    for name, gradient in plain[1].items():
        assert torch.equal(gradient, again[1][name]), name


def test_bfloat16_is_near_float32_and_finite(core: Core, mixed: list[Example]):
    expected, _ = apart = _run(core.trainee(), [mixed])
    losses, gradients = _run(core.trainee(bfloat16=True), [mixed])
    assert set(gradients) == set(apart[1])
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    assert losses["answer"] == pytest.approx(expected["answer"], rel=0.05)
    assert losses["answer"] != expected["answer"]
    out = core.trainee(bfloat16=True)(mixed)
    kinds = {out.answer.dtype, out.similarity.dtype, out.encoded.features.dtype}
    assert kinds == {torch.float32}
    assert all(scores is None or scores.dtype == torch.float32 for scores in out.encoded.scores)


def test_in_bfloat16_attention_on_the_cpu_is_in_float32():
    q = torch.randn(1, 1, 3, 8)
    linear = nn.Linear(8, 8)
    with mixed_precision(True):
        assert linear(q).dtype == torch.bfloat16
        assert F.scaled_dot_product_attention(linear(q), q, q).dtype == torch.float32
    with mixed_precision(False):
        assert linear(q).dtype == torch.float32


def test_single_frames_are_named_without_the_decoder(core: Core):
    trainee = core.trainee(labels=True)
    batch = labelled_frames(core.model.config.vision, seed=1, step=0, count=5)
    loss, right = trainee(batch)
    assert right.dtype == torch.bool
    assert len(right) == (batch.shapes > 0).sum() > 0
    named = dict(trainee.named_parameters())
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    used = {name for name, grad in zip(named, gradients, strict=True) if grad is not None}
    assert {name.split(".")[1] for name in used} == {"vision", "colour", "shape", "place"}
    assert not any("scorer" in name for name in used)
