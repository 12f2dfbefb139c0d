"""What fp16 cannot hold is found before anything is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stts_export.calibration.layers import layer_names, modules_with
from stts_export.calibration.overflow import (
    AT_RISK,
    LARGEST_FP16,
    check_interface,
    known_ranges,
    layers_at_risk,
    ranges_of,
)
from stts_export.calibration.statistics import InputStatistics, ModelStatistics
from stts_export.checkpoint import open_checkpoint, streamed_model
from stts_export.config import ModelConfig
from stts_export.errors import InputError
from stts_export.model.vlm import SttsModel
from tests.helpers import random_checkpoint, random_frames, random_model, small_config

CLIPS = [random_frames(3), random_frames(2, seed=1)]
RATIO = 0.5
PART = "vision.blocks.3.feed_forward"
TAPPED = "vision.connector.pooling.wk:in"
CONFIG = ModelConfig.from_dict(small_config(), has_scorer=True)  # blocks 0..2 are below the removal
WRITERS = {
    "vision.blocks.3.ffn_norm:in": "vision.blocks.3.attention.wo",
    "vision.blocks.4.attention_norm:in": "vision.blocks.3.feed_forward.w2",
    "vision.blocks.4.ffn_norm:in": "vision.blocks.4.attention.wo",
    TAPPED: "vision.blocks.4.feed_forward.w2",
}


def _changed(changes: dict[str, float], *, scorer: bool = True) -> SttsModel:
    """Random weights, some of them multiplied."""
    model = random_model(scorer=scorer)
    with torch.no_grad():
        for name, factor in changes.items():
            model.get_parameter(name).mul_(factor)
    return model


def test_ranges_are_those_of_the_pruned_model():
    model = random_model()
    ranges = ranges_of(model, CLIPS, RATIO)
    with torch.no_grad():
        clips = [model.encode(torch.from_numpy(clip), RATIO) for clip in CLIPS]
        plain = [model.vision.before_scoring(torch.from_numpy(clip)) for clip in CLIPS]
        block: torch.nn.Module = model.vision.blocks[2]
        normed = [block.get_submodule("attention_norm")(x) for x in plain]
        keys = [block.get_submodule("attention.wk")(x) for x in normed]
        bins = [
            clip.hidden.unflatten(1, (model.config.vision.windows, -1))
            .flatten(0, 1)[clip.plan.gather_window]
            for clip in clips
            if clip.plan is not None
        ]  # fmt: skip

    def largest(values: list[torch.Tensor]) -> float:
        return max(float(value.abs().max()) for value in values)

    assert len(bins) == len(CLIPS)
    assert ranges["hidden"] == largest([clip.hidden for clip in clips])
    assert ranges["vision.blocks.2.attention_norm:in"] == largest(plain)
    assert ranges["vision.blocks.2.attention.wq:in"] == largest(normed)
    assert ranges["vision.blocks.2.attention.wk"] == largest(keys)
    assert ranges["vision.blocks.3.attention_norm:in"] == largest(bins)
    expected = {name for name in layer_names(model.config) if name.startswith("vision.")}
    assert expected < set(ranges)
    assert "vision.scorer.w3" in ranges
    assert not any(module._forward_hooks for module in model.modules())


def test_weights_may_be_on_disk(tmp_path: Path):
    folder = random_checkpoint(tmp_path / "c")
    assert ranges_of(streamed_model(open_checkpoint(folder)), CLIPS, RATIO) == pytest.approx(
        ranges_of(random_model(), CLIPS, RATIO)
    )


def test_a_safe_model_has_nothing_at_risk():
    for model in (random_model(), random_model(scorer=False)):
        ranges = ranges_of(model, CLIPS, RATIO)
        assert layers_at_risk(ranges, model.config) == {}
        check_interface(ranges, model.config)


def test_exactly_the_part_that_overflows_is_at_risk():
    model = _changed({f"{PART}.w1.weight": 2.0**15, f"{PART}.w2.weight": 2.0**-15})
    ranges = ranges_of(model, CLIPS, RATIO)
    at_risk = layers_at_risk(ranges, model.config)
    assert at_risk == {
        f"{PART}.w1": ranges[f"{PART}.w1"],
        f"{PART}.w2": ranges[f"{PART}.w2:in"],
    }
    assert min(at_risk.values()) > LARGEST_FP16
    check_interface(ranges, model.config)


@pytest.mark.parametrize(
    ("change", "scorer", "names"),
    [
        ("vision.blocks.1.feed_forward.w2.weight", True, ["hidden", "tapped", "packed_features"]),
        ("vision.blocks.4.feed_forward.w2.weight", False, ["tapped", "packed_features"]),
        ("vision.connector.w2.weight", True, ["packed_features"]),
    ],
)
def test_what_graphs_hand_on_in_fp16_must_fit(change: str, scorer: bool, names: list[str]):
    model = _changed({change: 1e6}, scorer=scorer)
    ranges = ranges_of(model, CLIPS, RATIO if scorer else 0.0)
    with pytest.raises(InputError, match="fix: build with --precision bf16 or fp32") as refused:
        check_interface(ranges, model.config)
    assert [
        name for name in ("hidden", "tapped", "packed_features") if name in str(refused.value)
    ] == names


def test_hidden_counts_windows_that_another_ratio_would_keep():
    ranges = ranges_of(random_model(), CLIPS, RATIO)
    survivors = "vision.blocks.3.attention_norm:in"
    check_interface({**ranges, "hidden": LARGEST_FP16}, CONFIG)
    for key in ("hidden", survivors):
        with pytest.raises(InputError, match=r"hidden reaches 6\.6e"):
            check_interface({**ranges, key: 66_000.0}, CONFIG)


def test_numbers_that_are_none_are_refused():
    model = _changed({f"{PART}.w1.bias": float("nan")})
    with pytest.raises(InputError, match=rf"{PART}\.w1 has NaN"):
        ranges_of(model, CLIPS, RATIO)
    assert not any(module._forward_hooks for module in model.modules())


RANGES = st.floats(0, 2 * LARGEST_FP16, width=32)


@given(st.dictionaries(st.sampled_from(list(WRITERS)), RANGES))
def test_the_stream_is_kept_by_the_first_layer_that_makes_it_too_large(ranges: dict[str, float]):
    beyond = [key for key in WRITERS if ranges.get(key, 0) > AT_RISK]
    expected = {WRITERS[key]: ranges[key] for key in beyond[:1]}
    assert layers_at_risk(ranges, CONFIG) == expected | (
        {"vision.connector.pooling.wk": ranges[TAPPED]} if TAPPED in beyond else {}
    )


@given(st.dictionaries(st.sampled_from(layer_names(CONFIG)), RANGES, max_size=6), RANGES)
def test_every_layer_beyond_the_limit_is_at_risk(ranges: dict[str, float], limit: float):
    beyond = {name: largest for name, largest in ranges.items() if largest > limit}
    taken = {f"{name}:in": largest for name, largest in ranges.items()}
    assert layers_at_risk(ranges, CONFIG, limit).items() >= beyond.items()
    assert layers_at_risk(taken, CONFIG, limit).items() >= beyond.items()


def test_a_stream_that_is_fp32_already_needs_no_other_layer():
    first = {
        "vision.blocks.3.attention.wv": AT_RISK + 1,
        "vision.blocks.4.ffn_norm:in": AT_RISK + 2,
    }
    assert set(layers_at_risk(first, CONFIG)) == {"vision.blocks.3.attention.wv"}
    later = {"vision.blocks.4.feed_forward.w1": AT_RISK + 1, "vision.blocks.4.ffn_norm:in": AT_RISK}
    assert set(layers_at_risk(later, CONFIG)) == {"vision.blocks.4.feed_forward.w1"}
    both = {**later, "vision.blocks.3.ffn_norm:in": AT_RISK + 2}
    assert set(layers_at_risk(both, CONFIG)) == {
        "vision.blocks.4.feed_forward.w1", "vision.blocks.3.attention.wo",
    }  # fmt: skip


def test_below_the_removal_the_stream_may_be_as_large_as_it_likes():
    below = {f"vision.blocks.{index}.{norm}:in": 1e9 for index in range(3)
             for norm in ("attention_norm", "ffn_norm")}  # fmt: skip
    scorer = {"vision.scorer.w1": 1e9, "vision.embedding.projection": 1e9}  # always fp32
    assert layers_at_risk({**below, **scorer}, CONFIG) == {}


def test_the_stream_of_the_decoder():
    for key, layer in (
        ("language.blocks.0.ff_norm:in", "language.blocks.0.attn_out"),
        ("language.blocks.1.attn_norm:in", "language.blocks.0.ff_out"),
        ("language.norm:in", "language.blocks.1.ff_out"),
    ):
        assert layers_at_risk({key: 1e5}, CONFIG) == {layer: 1e5}
    kept = {"language.blocks.0.ff_proj": 1e5, "language.norm:in": 1e5}
    assert modules_with("language.blocks.0.ff_proj") == modules_with("language.blocks.0.ff_out")
    assert set(layers_at_risk(kept, CONFIG)) == {"language.blocks.0.ff_proj"}


def test_calibration_knows_the_decoder_and_its_cache():
    amax = np.array([3, 2e4], np.float32)
    taken = InputStatistics(amax, amax, 2, amax[None])
    cached = np.full((4, 16), 7, np.float32)
    vision = ranges_of(random_model(), CLIPS, RATIO)
    statistics = ModelStatistics(
        {"language.blocks.0.ff_out": taken},
        {**vision, "language.blocks.1.att_proj": 3e4},
        {0: cached, 1: cached},
        {0: cached, 1: 1e4 * cached},
        1,
        (1, 2),
    )
    ranges = known_ranges(statistics)
    assert layers_at_risk(ranges, CONFIG) == {
        "language.blocks.0.ff_out": 2e4, "language.blocks.1.att_proj": 3e4,
    }  # fmt: skip
    with pytest.raises(InputError, match=r"present\.1\.value reaches 7e\+04: graphs"):
        check_interface(ranges, CONFIG)
    assert set(layers_at_risk(statistics.ranges, CONFIG)) == {"language.blocks.1.att_proj"}
