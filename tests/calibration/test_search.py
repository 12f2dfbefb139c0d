"""The search ends at the smallest candidate of all paths that passes, and measures none twice."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stts_export.calibration import search, statistics
from stts_export.calibration.calibrate import calibration_from_checkpoint
from stts_export.calibration.gates import measure
from stts_export.calibration.layers import (
    CONNECTOR,
    DECODER,
    HEAD,
    SCORING,
    VISION,
    Format,
    LayerQuantization,
    input_groups,
    layers_by_group,
)
from stts_export.calibration.quant_report import (
    KL,
    SQNR,
    GateCheck,
    LayerError,
    QuantReport,
)
from stts_export.calibration.recipe import LayerRule, Recipe, block_of
from stts_export.calibration.search import (
    DEFAULT_GATES,
    Found,
    Step,
    find_place,
    recipe_for_target,
    runnable_formats,
    search_clips,
    starts,
    weight_bytes,
)
from stts_export.checkpoint import Checkpoint, open_checkpoint
from stts_export.checkpoint.streamed import sources
from stts_export.config import ModelConfig
from stts_export.errors import InputError
from stts_export.sizes import weights
from stts_export.tensors import DATA_ALIGNMENT
from stts_export.training.checkpoint_answerer import CheckpointAnswerer, open_checkpoint_answerer
from tests.training.small_runs import small_folder

DEMO = Path(__file__).parents[2] / "examples" / "demo_checkpoint"
SOURCE = open_checkpoint(DEMO)
CONFIG = SOURCE.config
GROUPS = layers_by_group(CONFIG)
SEARCHED = GROUPS[VISION] + GROUPS[CONNECTOR] + GROUPS[DECODER]
GOOD, BAD = 30.0, 5.0
"""dB, beside a limit of 12."""

RUNNABLE = functools.cache(runnable_formats)
Judge = Callable[[Mapping[str, str]], Mapping[str, float]]
"""From formats by layer to SQNR by layer."""


@pytest.fixture(scope="module")
def answerer() -> Iterator[CheckpointAnswerer]:
    with open_checkpoint_answerer(DEMO, threads=1) as opened:
        yield opened


class Fakes:
    """Stand-ins for everything that takes time; remembers what they were asked for."""

    def __init__(self, judge: Judge, kl: float = 0.0) -> None:
        self._judge, self._kl = judge, kl
        self.measured: list[dict[str, str]] = []
        self.calibrated: list[tuple[str, str]] = []

    def search(self, answerer: CheckpointAnswerer, target: str, **changes: Any) -> Found:
        clips = SimpleNamespace(calibration=tuple(range(8)))
        fakes: dict[str, Any] = {
            "runnable_formats": RUNNABLE,
            "clips_of": lambda *_: clips,
            "statistics_of": lambda *_, **__: None,
            "layers_from_statistics": self._layers,
            "rounded_model": lambda model, layers, _: dict(layers),
            "answerer_of": lambda _, model, __: model,
            "measure": self._measure,
        }
        source = changes.pop("source", SOURCE)
        with patch.multiple(search, **fakes | changes):
            return recipe_for_target(source, target, Path("unused"), answerer=answerer)

    def _layers(self, config: Any, weights: Any, plan: Any, *_: Any, **__: Any) -> Any:
        self.calibrated += [(name, rule.format) for name, rule in plan.items()]
        return {
            name: LayerQuantization(rule.format, np.zeros(1, np.float32))
            for name, rule in plan.items()
        }

    def _measure(self, _: Any, candidate: Any, clips: Any, **given: Any) -> QuantReport:
        assert clips == (4, 5, 6, 7)
        layers = given["layers"]
        assert layers == {name: how.format for name, how in candidate.items()}
        self.measured.append(dict(layers))
        found = self._judge(layers)
        errors = (LayerError(name, "", layers[name], found[name], 1) for name in layers)
        ranked = tuple(sorted(errors, key=lambda one: one.sqnr))
        checks = [GateCheck.compare(KL, self._kl, given["gates"].max_kl)]
        if ranked:
            checks.append(GateCheck.compare(SQNR, ranked[0].sqnr, given["gates"].min_sqnr))
        return QuantReport(
            given["recipe_name"], (), given["base"], given["ratio"], 4, 1, 2, "", ranked,
            tuple(checks), 0.0, 0, (),
        )  # fmt: skip


def good(layers: Mapping[str, str]) -> dict[str, float]:
    return dict.fromkeys(layers, GOOD)


def bad_at(*bad: tuple[str, Format]) -> Judge:
    """Layers that are bad in a format."""
    return lambda layers: {one: BAD if (one, how) in bad else GOOD for one, how in layers.items()}


def formats_of(found: Found, config: ModelConfig = CONFIG) -> dict[str, str]:
    return {name: rule.format for name, rule in found.recipe.plan(config).items()}


@pytest.mark.parametrize(
    ("target", "backend", "formats"),
    [
        ("cpu", "onnxruntime", {"int8", "int4"}),  # fp8 would be converted on every call
        ("agx-orin", "tensorrt", {"int8", "int4"}),
        ("orin", "tensorrt", {"int8", "int4"}),
        ("thor", "tensorrt", {"fp8", "int8", "int4", "nvfp4"}),
        ("h200", "tensorrt", {"fp8", "int8", "int4"}),
        ("rtx", "tensorrt-rtx", {"fp8", "int8", "int4"}),
        ("rtx-5090", "tensorrt-rtx", {"fp8", "int8", "int4", "nvfp4"}),
    ],
)
def test_formats_of_targets(target: str, backend: str, formats: set[str]):
    place = find_place(target)
    assert place.backend == backend
    assert set(runnable_formats(place)) == formats


def test_an_unknown_target_is_refused_at_once(tmp_path: Path):
    with pytest.raises(InputError, match="did you mean 'agx-orin'") as caught:
        recipe_for_target(SOURCE, "agx-oron", tmp_path / "work")
    assert "cpu, orin, thor, h200, rtx" in str(caught.value)
    assert not (tmp_path / "work").exists()


def test_starts_have_no_decoder_wider_than_the_tower():
    assert set(starts(("fp8", "int8", "int4", "nvfp4"))) == {
        ("int4", "int4"), ("nvfp4", "nvfp4"), ("fp8", "fp8"), ("int8", "int8"),
        ("fp8", "int4"), ("int8", "int4"), ("fp8", "nvfp4"), ("int8", "nvfp4"),
    }  # fmt: skip


def test_clips_of_the_search():
    assert [len(search_clips(range(count))) for count in (3, 8, 24)] == [3, 4, 8]  # type: ignore
    assert search_clips(range(24))[-1] == 23  # type: ignore


def test_the_smallest_start_is_taken_when_it_passes(answerer: CheckpointAnswerer):
    fakes = Fakes(good)
    found = fakes.search(answerer, "thor")
    assert formats_of(found) == dict.fromkeys(SEARCHED, "int4")
    assert set(found.layers) == set(SEARCHED)
    (step,) = found.steps
    assert (step.passed, step.moved, step.missed) == (True, (), "")
    assert step.quantised == len(SEARCHED)
    assert not {*GROUPS[SCORING], *GROUPS[HEAD]} & set(found.layers)
    assert found.recipe.name == "auto-thor"
    assert found.recipe.base == "fp16"
    assert found.recipe.gates == DEFAULT_GATES
    assert Recipe.from_dict(found.recipe.to_dict(), "x") == found.recipe


def test_sensitive_layers_move_with_what_reads_their_input(answerer: CheckpointAnswerer):
    key, last = "vision.blocks.3.attention.wk", "language.blocks.4.ff_out"
    fakes = Fakes(bad_at((key, "int4"), (key, "int8"), (last, "int4"), (last, "int8")))
    found = fakes.search(answerer, "orin", starts=lambda _: (("int8", "int4"),))
    first, second = found.steps
    assert (first.passed, second.passed) == (False, True)
    assert first.missed == "sqnr: 5 dB, at least 12 dB"
    # A tenth of the groups goes at once, the worst of them first.
    groups = input_groups(CONFIG)
    moved = [names for names in groups if set(names) & set(second.moved)]
    assert set(second.moved) == set(sum(moved, ()))
    assert len(moved) == len([names for names in groups if names[0] in SEARCHED]) // 10
    assert {key, last} <= set(second.moved)
    expected = {name: "int4" if name in GROUPS[DECODER] else "int8" for name in SEARCHED}
    assert formats_of(found) == {
        name: format for name, format in expected.items() if name not in second.moved
    }
    assert second.quantised == len(found.layers) == len(SEARCHED) - len(second.moved)
    assert second.bytes > first.bytes


def test_methods_are_those_of_the_shipped_recipes(answerer: CheckpointAnswerer):
    found = Fakes(good).search(answerer, "cpu", starts=lambda _: (("int8", "int8"),))
    plan, shipped = found.recipe.plan(CONFIG), Recipe.load("int8").plan(CONFIG)
    assert {name: replace(rule, match=("*",)) for name, rule in plan.items()} == {
        name: replace(rule, match=("*",)) for name, rule in shipped.items()
    }


@settings(max_examples=15, deadline=None)
@given(
    st.sets(
        st.tuples(st.sampled_from(SEARCHED), st.sampled_from(("fp8", "int8", "int4", "nvfp4"))),
        max_size=30,
    ),
    st.sampled_from(("cpu", "agx-orin", "thor")),
)
def test_no_path_ends_in_a_smaller_model(
    answerer: CheckpointAnswerer, bad: set[tuple[str, Format]], target: str
):
    judge = bad_at(*bad)
    fakes = Fakes(judge)
    found = fakes.search(answerer, target)
    formats = formats_of(found)
    assert min([*judge(formats).values(), GOOD]) == GOOD
    assert [step.passed for step in found.steps] == [False] * (len(found.steps) - 1) + [True]
    sizes = [step.bytes for step in found.steps]
    assert sizes == sorted(sizes)
    assert formats == {name: how.format for name, how in found.layers.items()}
    assert formats == fakes.measured[-1]
    ends = [
        Fakes(judge).search(answerer, target, starts=lambda _, pair=pair: (pair,)).steps[-1].bytes
        for pair in starts(RUNNABLE(find_place(target)))
    ]
    assert sizes[-1] == min(ends)
    # Nothing costs time twice.
    assert len(fakes.calibrated) == len(set(fakes.calibrated))
    assert len(fakes.measured) == len({tuple(one.items()) for one in fakes.measured})


def test_half_precision_throughout_is_the_last_to_be_tried(answerer: CheckpointAnswerer):
    fakes = Fakes(lambda layers: dict.fromkeys(layers, -math.inf))
    found = fakes.search(answerer, "orin")
    assert found.layers == {}
    assert found.recipe.layers == ()
    assert found.recipe.gates == DEFAULT_GATES
    assert found.steps[-1].quantised == 0
    assert fakes.measured.index({}) == len(fakes.measured) - 1


def test_when_nothing_passes_the_nearest_miss_is_shown(answerer: CheckpointAnswerer):
    fakes = Fakes(lambda layers: dict.fromkeys(layers, 1 + 0.1 * len(layers)), kl=0.08)
    with pytest.raises(InputError) as caught:
        fakes.search(answerer, "orin")
    error = caught.value
    assert "not even fp16 throughout" in error.message
    # 1.6 times the limit; the layers in the starts are farther off their own, 12 / 6.1.
    assert "0 layers" in error.message
    assert "misses kl: 0.08 nats, at most 0.05 nats" in error.message
    assert error.where == "auto-orin"
    assert fakes.measured.count({}) == 1


def test_layers_whose_width_has_no_blocks_stay_as_they_are(
    answerer: CheckpointAnswerer, tmp_path: Path
):
    source: Checkpoint = open_checkpoint(small_folder(tmp_path / "small"))
    with open_checkpoint_answerer(tmp_path / "small", threads=1) as small:
        found = Fakes(good).search(small, "orin", source=source)
        shapes = {name: value.shape for name, value in sources(small.model).items()}
    groups = layers_by_group(source.config)
    layers = groups[VISION] + groups[CONNECTOR] + groups[DECODER]
    narrow = {name for name in layers if shapes[f"{name}.weight"][1] % 16}
    assert narrow
    assert set(layers) - set(found.layers) == narrow
    assert all(block_of(shapes[f"{name}.weight"][1], 128) >= 16 for name in found.layers)


def test_the_ratio_is_no_lower_than_the_bundle_s(
    answerer: CheckpointAnswerer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(search, "clips_of", lambda *_: SimpleNamespace(calibration=()))
    ratios = []
    for lowest in (0.0, 0.8):
        with patch.object(search, "_Search") as made:
            recipe_for_target(SOURCE, "cpu", tmp_path, answerer=answerer, min_prune_ratio=lowest)
        ratios += [given for given in made.call_args.args if isinstance(given, float)]
    assert ratios == [0.5, 0.8]


def test_bytes_are_those_of_all_graphs():
    """Without the gaps before large tensors."""
    rules = {name: LayerRule(("*",), "int8", "max") for name in GROUPS[DECODER]}
    for tied in (False, True):
        for plan in (rules, {}):
            held = weights(CONFIG, tied=tied, rules=plan)
            gaps = sum(of.nbytes("fp16") for of in held.values()) - weight_bytes(
                CONFIG, plan, "fp16", tied=tied
            )
            assert 0 <= gaps < DATA_ALIGNMENT * sum(len(of.tensors) for of in held.values())


def test_lines():
    step = Step("int8", "int4", ("a", "b"), 49, 3_000_000, False, "kl: 1 nats, at most 0.1 nats")
    assert step.line() == (
        "vision int8, decoder int4: 49 layers, 2 moved to fp16, 3.0 MB of weights, "
        "misses kl: 1 nats, at most 0.1 nats"
    )
    passed = replace(step, moved=(), passed=True, missed="")
    assert passed.line().endswith("int4: 49 layers, 3.0 MB of weights, passes")


def test_a_search_and_the_calibration_after_it(answerer: CheckpointAnswerer, tmp_path: Path):
    """Nothing is faked: some layers have to move, and the build finds what was measured."""
    described = tmp_path / "set.yaml"
    described.write_text(
        "{schema: 1, name: x, generate: {seed: 0, calibration: 8, held_out: 8, level: 0}}"
    )
    work = tmp_path / "work"
    seen: list[Step] = []
    asked: set[str] = set()

    def listen(reference: Any, candidate: Any, clips: Any, **given: Any) -> QuantReport:
        asked.update(clip.name for clip in clips)
        return measure(reference, candidate, clips, **given)

    with patch.object(search, "measure", listen):
        found = recipe_for_target(
            SOURCE, "orin", work, clips=described, answerer=answerer, on_step=seen.append,
            gates=replace(DEFAULT_GATES, min_sqnr=17),
        )  # fmt: skip
    assert asked == {f"train clip {seed}" for seed in (4, 5, 6, 7)}  # none is held out
    assert tuple(seen) == found.steps
    assert len(found.steps) > 1
    assert found.steps[-1].passed
    assert 0 < len(found.layers) < len(SEARCHED)
    assert list(found.recipe.plan(CONFIG)) == list(found.layers)
    # Of the decoder's last layers alone, to save time.
    last = tuple(name for name in found.layers if name.startswith("language.blocks.4."))
    rule = found.recipe.plan(CONFIG)[last[0]]
    recipe = replace(found.recipe, layers=(replace(rule, match=last),))
    # The held-out clips are decoded, to know that they can be; no clip is run again.
    with patch.object(statistics, "_clip_statistics", side_effect=AssertionError("is run again")):
        made = calibration_from_checkpoint(SOURCE, recipe, work, clips=described, answerer=answerer)
    assert tuple(made.layers) == last
    for name, how in made.layers.items():
        assert how.format == found.layers[name].format
        assert how.input_scale == found.layers[name].input_scale
        assert np.array_equal(how.weight_scale, found.layers[name].weight_scale)
