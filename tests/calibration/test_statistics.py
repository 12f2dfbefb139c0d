"""Statistics are those of the rows that a deployed model sees, and are never collected twice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from stts_export.calibration import statistics
from stts_export.calibration.clips import CalibrationClip, open_clip_set
from stts_export.calibration.layers import input_groups
from stts_export.calibration.statistics import (
    NEW_TOKENS,
    ROWS,
    InputStatistics,
    ModelStatistics,
    collect,
    evenly_spaced,
    merge,
)
from stts_export.checkpoint import open_checkpoint, streamed_model
from stts_export.errors import InputError
from stts_export.model.language import attention_mask
from stts_export.model.vlm import EncodedClip
from stts_export.runtime.demux import UnreliableTimesError
from stts_export.runtime.prompt import VideoTokens, kept_positions
from stts_export.runtime.writing import png_bytes
from stts_export.training.checkpoint_answerer import CheckpointAnswerer, open_checkpoint_answerer
from tests.helpers import picture

DEMO = Path(__file__).parents[2] / "examples" / "demo_checkpoint"
RATIO = 0.35
"""Some frames keep so much that they get the rest back as context, others do not."""
UPPER = "vision.blocks.3.attention.wq"
"""Of the first block above the removal."""


@pytest.fixture(scope="module")
def answerer() -> Iterator[CheckpointAnswerer]:
    with open_checkpoint_answerer(DEMO, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> tuple[CalibrationClip, ...]:
    folder = tmp_path_factory.mktemp("clips")
    path = folder / "set.yaml"
    path.write_text(
        "{schema: 1, name: x, generate: {seed: 0, calibration: 3, held_out: 0, level: 0}}"
    )
    return open_clip_set(
        path, folder, needs_calibration=3, needs_held_out=0, image_size=120
    ).calibration


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("statistics")


@pytest.fixture(scope="module")
def collected(
    answerer: CheckpointAnswerer, clips: tuple[CalibrationClip, ...], cache: Path
) -> ModelStatistics:
    return collect(answerer.model, answerer, clips, RATIO, cache, key="demo")


@pytest.fixture
def read(answerer: CheckpointAnswerer, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the videos that are read."""
    names: list[str] = []
    before = answerer.read

    def count(file: Path) -> Any:
        names.append(file.name)
        return before(file)

    monkeypatch.setattr(answerer, "read", count)
    return names


def arrays(found: ModelStatistics) -> dict[str, Any]:
    """All that statistics hold, by name."""
    values: dict[str, Any] = {"clips": found.clips, "windows": found.windows, **found.ranges}
    for name, one in found.inputs.items():
        parts = {"amax": one.amax, "mean": one.mean_abs, "rows": one.rows, "count": one.count}
        values |= {f"{part} {name}": value for part, value in parts.items()}
    values |= {f"keys {layer}": array for layer, array in found.keys.items()}
    return values | {f"values {layer}": array for layer, array in found.values.items()}


def same(one: ModelStatistics, other: ModelStatistics) -> bool:
    """Whether two are equal bit for bit."""
    ours, theirs = arrays(one), arrays(other)
    return list(ours) == list(theirs) and all(
        np.asarray(ours[name]).dtype == np.asarray(theirs[name]).dtype
        and np.array_equal(ours[name], theirs[name])
        for name in ours
    )


class ByHand:
    """A clip's way through the model, frame by frame and without a cache."""

    def __init__(self, answerer: CheckpointAnswerer, clip: CalibrationClip, refill: bool) -> None:
        self.model = answerer.model
        video = answerer.read(clip.video)
        self.frames = torch.from_numpy(video.frames)
        with torch.inference_mode():
            self.seen: EncodedClip = self.model.encode(self.frames, RATIO, refill=refill)
        whole = answerer.prompts.build(
            clip.prompt, [VideoTokens(video.timestamps, answerer.config.vision.windows)]
        )
        kept = kept_positions(
            whole, self.seen.keep.numpy().ravel(), answerer.config.tokens.im_patch
        )
        self.prompt = torch.from_numpy(whole[kept])
        answer = self.model.greedy(self.prompt, self.seen.features, NEW_TOKENS)
        ends = [
            index for index, token in enumerate(answer) if token in answerer.prompts.eos_token_ids
        ]
        # The last new token, or the one that ends the answer, is not read.
        self.read = answer[: ends[0] if ends else NEW_TOKENS - 1]
        self.steps = len(self.read) + 1

    @property
    def context(self) -> int:
        """Windows that the upper part sees: kept ones, and what a frame gets back."""
        assert self.seen.plan is not None
        return int((self.seen.plan.segment >= 0).sum())

    @torch.inference_mode()
    def upper_inputs(self) -> Tensor:
        """(R, D) normed inputs of the first upper block, kept windows only."""
        vision = self.model.vision
        windows = self.seen.hidden.unflatten(1, (vision.config.windows, -1))
        norm = self.model.get_submodule("vision.blocks.3.attention_norm")
        return norm(windows[self.seen.keep]).flatten(0, 1)

    @torch.inference_mode()
    def cached(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (1, kv_heads, L, d) of every layer, of the prompt and the answer."""
        ids = torch.cat([self.prompt, torch.tensor(self.read, dtype=torch.int64)])[None]
        written = []

        def write(_: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            written.append((keys, values))
            return keys, values

        language, groups = self.model.language, self.model.visual_groups(ids)
        order = torch.arange(ids.shape[1])[None]
        bidirectional = self.model.config.bidirectional_visual
        mask = attention_mask(order, groups, order, groups, bidirectional)
        language.transform(language.embed(ids, self.seen.features), order, mask, write)
        return written


def close(got: Any, expected: Any) -> bool:
    """Whether two differ by no more than rounding of fp32."""
    return bool(np.allclose(got, expected, rtol=1e-4, atol=1e-5))


@pytest.mark.parametrize("refill", [True, False])
def test_counts_are_of_the_rows_that_a_deployed_model_has(
    answerer: CheckpointAnswerer,
    clips: tuple[CalibrationClip, ...],
    collected: ModelStatistics,
    tmp_path: Path,
    refill: bool,
):
    if not refill:
        other = CheckpointAnswerer(
            answerer.model, answerer.prompts, answerer.max_frames, refill=False
        )
        collected = collect(other.model, other, clips, RATIO, tmp_path, key="demo")
    by_hand = [ByHand(answerer, clip, refill) for clip in clips]
    config, counts = answerer.config, {name: one.count for name, one in collected.inputs.items()}
    patches, windows = config.vision.patches_per_window, config.vision.windows
    kept = sum(int(one.seen.keep.sum()) for one in by_hand)
    total = sum(len(one.frames) for one in by_hand) * windows
    slots = sum(one.context for one in by_hand)
    assert kept < slots < total if refill else kept == slots < total
    tokens = sum(len(one.prompt) + len(one.read) for one in by_hand)
    expected = {
        "vision.blocks.0": total * patches,
        "vision.blocks.2": total * patches,
        "vision.blocks.3": slots * patches,
        "vision.blocks.5": slots * patches,
        "vision.connector.pooling.wq": slots,
        "vision.connector.pooling.wk": slots * patches,
        "vision.connector.w1": slots,
        "language.blocks": tokens,
        "language.lm_head": sum(one.steps for one in by_hand),
    }
    for name, count in expected.items():
        own = {value for key, value in counts.items() if key.startswith(name)}
        assert own == {count}, name
    assert set(counts) == {group[0] for group in input_groups(config)}
    assert collected.windows == (kept, total)
    assert collected.clips == 3


def test_magnitudes_are_those_of_the_model(
    answerer: CheckpointAnswerer, clips: tuple[CalibrationClip, ...], tmp_path: Path
):
    one = CheckpointAnswerer(answerer.model, answerer.prompts, answerer.max_frames, refill=False)
    collected = collect(one.model, one, clips[:1], RATIO, tmp_path, key="demo")
    by_hand, vision = ByHand(answerer, clips[0], refill=False), answerer.model.vision
    with torch.inference_mode():
        embedded = vision.embedding(by_hand.frames)
        norm = answerer.model.get_submodule("vision.blocks.0.attention_norm")
        lowest = norm(embedded).flatten(0, 1)
    upper = by_hand.upper_inputs()
    for name, rows in (("vision.blocks.0.attention.wq", lowest), (UPPER, upper)):
        found = collected.inputs[name]
        assert close(found.amax, rows.abs().amax(0))
        assert close(found.mean_abs, rows.abs().mean(0))
        assert found.rows.shape == (min(ROWS, len(rows)), rows.shape[1])
    # Every sampled row is one of those that were seen.
    nearest = torch.cdist(torch.from_numpy(collected.inputs[UPPER].rows.copy()), upper).amin(1)
    assert float(nearest.max()) < 1e-2
    assert close(collected.ranges["vision.blocks.0.attention_norm:in"], embedded.abs().max())
    with torch.inference_mode():
        pixels = embedded - vision.embedding.positional[vision.embedding.window_major]
    assert close(collected.ranges["vision.embedding.projection"], pixels.abs().max())
    for layer, (keys, values) in enumerate(by_hand.cached()):
        assert close(collected.keys[layer], keys.abs().amax((0, 2)))
        assert close(collected.values[layer], values.abs().amax((0, 2)))
    assert len(collected.keys) == len(collected.values) == answerer.config.text.num_layers


def test_protected_layers_and_all_norms_have_ranges(
    answerer: CheckpointAnswerer, collected: ModelStatistics
):
    modules = dict(answerer.model.named_modules())
    linear = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    norms = {f"{name}:in" for name, module in modules.items() if "Norm" in type(module).__name__}
    assert {"vision.scorer.w3", "vision.embedding.projection", "language.lm_head"} <= linear
    assert "language.norm:in" in norms
    assert set(collected.ranges) == linear | norms
    assert all(np.isfinite(largest) and largest > 0 for largest in collected.ranges.values())


def test_an_interrupted_run_goes_on_and_ends_the_same(
    answerer: CheckpointAnswerer,
    clips: tuple[CalibrationClip, ...],
    collected: ModelStatistics,
    tmp_path: Path,
    read: list[str],
):
    def stop(done: int, total: int) -> None:
        assert total == 3
        if done == 2:
            raise KeyboardInterrupt

    model, names = answerer.model, [clip.video.name for clip in clips]
    with pytest.raises(KeyboardInterrupt):
        collect(model, answerer, clips, RATIO, tmp_path, key="demo", on_progress=stop)
    assert read == names[:2]
    again = collect(model, answerer, clips, RATIO, tmp_path, key="demo")
    assert read == names
    assert same(again, collected)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "another clip's", "an array"])
def test_what_is_damaged_or_foreign_is_collected_again(
    answerer: CheckpointAnswerer,
    clips: tuple[CalibrationClip, ...],
    collected: ModelStatistics,
    cache: Path,
    tmp_path: Path,
    read: list[str],
    damage: str,
):
    for file in cache.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    first, second, _ = sorted(tmp_path.iterdir())
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 0xFF
    new = {
        "cut": bytes(content[: len(content) // 2]),
        "flipped": bytes(content),
        "empty": b"",
        "another clip's": second.read_bytes(),
    }
    if damage in new:
        first.write_bytes(new[damage])
    else:
        with first.open("wb") as opened:
            np.save(opened, np.ones(3))
    assert same(collect(answerer.model, answerer, clips, RATIO, tmp_path, key="demo"), collected)
    assert len(read) == 1


def test_statistics_of_anything_else_are_not_used(
    answerer: CheckpointAnswerer,
    clips: tuple[CalibrationClip, ...],
    tmp_path: Path,
    read: list[str],
):
    only = clips[:1]
    collect(answerer.model, answerer, only, RATIO, tmp_path, key="demo")
    asked = (replace(only[0], prompt="Why?"),)
    for number, (ratio, own, key) in enumerate(
        [(0.25, only, "demo"), (RATIO, asked, "demo"), (RATIO, only, "other")], start=2
    ):
        found = collect(answerer.model, answerer, own, ratio, tmp_path, key=key)
        assert len(read) == number
        assert found.clips == 1
    collect(answerer.model, answerer, only, RATIO, tmp_path, key="demo")
    assert len(read) == 4


def test_a_streamed_model_gives_the_same(
    answerer: CheckpointAnswerer,
    clips: tuple[CalibrationClip, ...],
    tmp_path: Path,
):
    loaded = collect(answerer.model, answerer, clips[:1], RATIO, tmp_path, key="loaded")
    model = streamed_model(open_checkpoint(DEMO))
    streamed = CheckpointAnswerer(model, answerer.prompts, answerer.max_frames)
    assert same(collect(model, streamed, clips[:1], RATIO, tmp_path, key="streamed"), loaded)


def test_nothing_watches_afterwards(
    answerer: CheckpointAnswerer, clips: tuple[CalibrationClip, ...], tmp_path: Path
):
    broken = replace(clips[0], video=tmp_path / "broken.mp4")
    broken.video.write_bytes(b"no video")
    for clip in (clips[0], broken):
        try:
            collect(answerer.model, answerer, [clip], RATIO, tmp_path, key="x")
        except InputError:
            assert clip is broken
        assert answerer.cache_observer is None
        assert not any(
            module._forward_hooks or module._forward_pre_hooks
            for module in answerer.model.modules()
        )


def test_a_video_that_cannot_be_used_is_named_and_leaves_nothing(
    answerer: CheckpointAnswerer, clips: tuple[CalibrationClip, ...], tmp_path: Path
):
    contents = {
        "text.mp4": (b"no video at all", "is not a video"),
        "cut.mp4": (clips[0].video.read_bytes()[:2000], "cut off"),
        "picture.mp4": (png_bytes(picture((50, 80))), "is an image"),
    }
    for name, (content, message) in contents.items():
        file = tmp_path / name
        file.write_bytes(content)
        clip = replace(clips[0], video=file, sha256=name)
        with pytest.raises(InputError, match=message) as caught:
            collect(answerer.model, answerer, [clip], RATIO, tmp_path / "cache", key="x")
        assert str(caught.value).startswith(str(file))
        assert caught.value.fix
        assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [av.InvalidDataError(1, "bad"), OSError("bad"), UnreliableTimesError("bad")],
)
def test_what_a_decoder_reports_is_said(
    answerer: CheckpointAnswerer,
    clips: tuple[CalibrationClip, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
):
    def fail(file: Path) -> None:
        raise error

    monkeypatch.setattr(answerer, "read", fail)
    with pytest.raises(InputError, match=r"cannot be decoded: .*bad") as caught:
        collect(answerer.model, answerer, clips, RATIO, tmp_path, key="x")
    assert caught.value.where == str(clips[0].video)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("layer", "seen_by"),
    [
        ("vision.scorer.w2", "the output of vision.scorer.w2"),
        ("vision.blocks.1.feed_forward.w1", "the output of vision.blocks.1.feed_forward.w1"),
        ("language.blocks.2.attn_norm", "the input of language.blocks.2.att_proj"),
    ],
)
def test_what_is_not_finite_is_named(
    answerer: CheckpointAnswerer,
    clips: tuple[CalibrationClip, ...],
    tmp_path: Path,
    layer: str,
    seen_by: str,
):
    weight = answerer.model.get_parameter(f"{layer}.weight").data
    before = weight.clone()
    try:
        weight.view(-1)[0] = np.inf
        with pytest.raises(InputError, match=f"{seen_by} has NaN or infinite values") as caught:
            collect(answerer.model, answerer, clips[:1], RATIO, tmp_path, key="x")
    finally:
        weight.copy_(before)
    assert f"clip {clips[0].name}" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_arguments_are_checked_first(
    answerer: CheckpointAnswerer,
    clips: tuple[CalibrationClip, ...],
    tmp_path: Path,
    read: list[str],
):
    with pytest.raises(InputError, match="prune ratio 1"):
        collect(answerer.model, answerer, clips, 1.0, tmp_path, key="x")
    with pytest.raises(ValueError, match="another model"):
        collect(streamed_model(open_checkpoint(DEMO)), answerer, clips, 0.5, tmp_path, key="x")
    assert read == []


def test_statistics_go_into_a_file_and_back(collected: ModelStatistics, tmp_path: Path):
    file = tmp_path / "statistics.npz"
    collected.to_file(file)
    assert same(ModelStatistics.from_file(file), collected)
    assert list(tmp_path.iterdir()) == [file]
    with np.load(file, allow_pickle=False) as stored:
        assert all(stored[name].dtype != object for name in stored.files)
    for other, content in (("missing", None), ("text", b"statistics")):
        if content is not None:
            (tmp_path / other).write_bytes(content)
        with pytest.raises(InputError, match="cannot be read as statistics of a model"):
            ModelStatistics.from_file(tmp_path / other)


def test_another_schema_is_refused(
    collected: ModelStatistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    collected.to_file(tmp_path / "x.npz")
    monkeypatch.setattr(statistics, "SCHEMA", statistics.SCHEMA + 1)
    with pytest.raises(InputError, match="its schema is 1, not 2"):
        ModelStatistics.from_file(tmp_path / "x.npz")


def test_every_clip_has_its_share_of_the_rows(
    clips: tuple[CalibrationClip, ...], collected: ModelStatistics, cache: Path
):
    share = ROWS // 3
    files = [cache / f"{statistics._made_from(c, RATIO, 'demo', share)}.npz" for c in clips]
    parts = [ModelStatistics.from_file(file) for file in files]
    for name, one in collected.inputs.items():
        own = [part.inputs[name] for part in parts]
        assert [len(each.rows) for each in own] == [min(share, each.count) for each in own]
        assert np.array_equal(one.rows, np.concatenate([each.rows for each in own]))
        assert one.count == sum(each.count for each in own)


@settings(deadline=None)
@given(st.integers(0, 2000), st.integers(1, 300))
def test_evenly_spaced(count: int, most: int):
    found = evenly_spaced(count, most)
    assert len(found) == min(count, most)
    steps = np.diff(found)
    if len(found):
        assert 0 <= found[0] <= found[-1] < count
    if len(steps):
        assert 1 <= steps.min() <= steps.max() <= steps.min() + 1
        assert abs(found[0] - (count - 1 - found[-1])) <= 1


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 20))
def test_sampled_rows_are_spread_over_all_calls(lengths: list[int], share: int):
    one, start = statistics._Input(share), 0
    candidates: list[int] = []
    for length in lengths:
        one.add(torch.arange(start, start + length, dtype=torch.float32)[:, None] + 1)
        candidates += (start + evenly_spaced(length, share)).tolist()
        start += length
    found = one.statistics()
    assert found.count == start
    assert found.amax.tolist() == [start]
    assert np.isclose(found.mean_abs[0], (start + 1) / 2)
    places = [candidates.index(int(row) - 1) for row in found.rows[:, 0]]
    assert len(places) == min(share, len(candidates))
    assert places == sorted(set(places))
    # No stretch of candidates that is three times their mean distance is left out.
    edges = np.diff([-1, *places, len(candidates)])
    assert edges.max() <= 3 * len(candidates) / share + 1


def part(rng: np.random.Generator, count: int) -> ModelStatistics:
    def some(*shape: int) -> NDArray[np.float32]:
        return rng.random(shape, dtype=np.float32)

    inputs = {name: InputStatistics(some(3), some(3), count, some(count, 3)) for name in "ab"}
    cached = ({0: some(2, 4)}, {0: some(2, 4)})
    return ModelStatistics(inputs, {"a": float(some()), "a:in": 1.0}, *cached, 1, (count, 9))


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=6), st.randoms(use_true_random=False))
def test_merging_depends_on_the_order_in_the_sampled_rows_only(counts: list[int], random: Any):
    rng = np.random.default_rng(random.randrange(2**32))
    parts = [part(rng, count) for count in counts]
    shuffled = random.sample(parts, len(parts))
    ours, theirs = arrays(merge(parts)), arrays(merge(shuffled))
    in_steps = arrays(merge([merge(parts[:1]), merge(parts[1:])]))
    for name, value in ours.items():
        if name.startswith("rows"):
            assert len(value) == min(ROWS, sum(counts))
            if sum(counts) <= ROWS:
                assert np.array_equal(value, in_steps[name])
            continue
        assert np.array_equal(value, theirs[name]), name
        assert np.allclose(value, in_steps[name], rtol=1e-6), name
        assert name.startswith("mean") or np.array_equal(value, in_steps[name]), name
    means = np.stack([one.inputs["a"].mean_abs for one in parts])
    assert np.allclose(ours["mean a"], np.average(means, axis=0, weights=counts))
    assert ours["count a"] == sum(counts)
