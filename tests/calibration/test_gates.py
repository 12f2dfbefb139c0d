"""A model passes beside itself in ONNX Runtime; what is wrong with it is caught and named."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from stts_export import Session
from stts_export.calibration.distances import SquareSums, cosines, divergence, flips
from stts_export.calibration.gates import IN_PYTORCH, measure
from stts_export.calibration.layers import layer_names
from stts_export.calibration.observing import (
    ROWS,
    Observations,
    graph_of,
    observed,
    tap_layers,
    tapped,
)
from stts_export.calibration.quant_report import (
    ANSWERS_CHANGED,
    CHECKS,
    COSINE,
    JACCARD,
    KL,
    NEAR_THRESHOLD,
    SQNR,
    GateCheck,
    QuantReport,
)
from stts_export.calibration.recipe import Gates
from stts_export.errors import InputError, VerificationError
from stts_export.runtime import planner
from stts_export.runtime.prompt import PromptBuilder
from stts_export.runtime.writing import png_bytes
from stts_export.tolerances import TOLERANCES
from stts_export.training.answerers import BundleAnswerer
from stts_export.training.checkpoint_answerer import CheckpointAnswerer, open_checkpoint_answerer
from tests.helpers import picture, random_model, write_video
from tests.training.small_runs import FRAMES, small_values

GATES = Gates(min_sqnr=30, min_jaccard=0.99, min_cosine=0.999, max_kl=1e-3, max_answers_changed=0.0)
RATIO = 0.5
HEAD = "language.lm_head"


@dataclass(frozen=True)
class Held:
    video: Path
    prompt: str
    name: str


@pytest.fixture(scope="module")
def reference(text_bundle: Path) -> Iterator[CheckpointAnswerer]:
    checkpoint = text_bundle.with_name("text_checkpoint")
    with open_checkpoint_answerer(checkpoint, threads=1) as answerer:
        yield answerer


@pytest.fixture(scope="module")
def bundle(text_bundle: Path) -> Iterator[BundleAnswerer]:
    with Session.open(text_bundle, threads=1) as session:
        yield BundleAnswerer(session)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Held]:
    """One of two chunks of the lower part, one of two frames."""
    folder = tmp_path_factory.mktemp("clips")
    long, short = write_video(folder / "long.mp4", 12), write_video(folder / "short.mp4", 4, 1)
    return [Held(long, "What is it?", "long"), Held(short, "How many?", "short")]


@pytest.fixture(scope="module")
def formats(reference: CheckpointAnswerer) -> dict[str, str]:
    return dict.fromkeys(layer_names(reference.config), "int8")


def gates_of(
    reference: CheckpointAnswerer, candidate: BundleAnswerer | CheckpointAnswerer, clips, layers
) -> tuple[QuantReport, dict[str, GateCheck]]:
    report = measure(
        reference, candidate, clips, ratio=RATIO, layers=layers, gates=GATES,
        recipe_name="test", max_new_tokens=4, threads=1,
    )  # fmt: skip
    return report, {check.name: check for check in report.checks}


@contextmanager
def damaged(reference: CheckpointAnswerer, layer: str) -> Iterator[tuple[CheckpointAnswerer, Any]]:
    """Yield a copy of the model whose layer may be changed."""
    model = copy.deepcopy(reference.model)
    with torch.no_grad():
        yield (
            CheckpointAnswerer(model, reference.prompts, reference.max_frames),
            model.get_submodule(layer),
        )


def test_a_bundle_in_fp32_passes(
    reference: CheckpointAnswerer, bundle: BundleAnswerer, clips: list[Held], formats
):
    before = dict(bundle.session.runners)
    files = sorted(bundle.session.bundle.folder.rglob("*"))
    report, checks = gates_of(reference, bundle, clips, formats)
    assert report.passed, report.lines()
    assert tuple(checks) == CHECKS
    assert {layer.layer for layer in report.layers} == set(formats)
    assert report.layers[0].sqnr > 60
    assert [layer.sqnr for layer in report.layers] == sorted(layer.sqnr for layer in report.layers)
    assert {layer.graph for layer in report.layers} == {"vision_lower", "vision_upper", "decoder"}
    rows = {layer.layer: layer.rows for layer in report.layers}
    assert rows[HEAD] == 2  # one of each clip
    assert ROWS / 2 < rows["vision.blocks.0.attention.wq"] <= 2 * ROWS
    assert report.measured_in == "onnxruntime"
    assert 0 < report.kept_windows < report.total_windows
    assert 0 < report.score_error < 1e-5
    assert [pair.fp32 for pair in report.answers] == [pair.quantised for pair in report.answers]
    assert bundle.session.runners == before
    assert sorted(bundle.session.bundle.folder.rglob("*")) == files


@pytest.mark.parametrize(
    ("layer", "is_worst", "missed"),
    [
        ("vision.blocks.3.feed_forward.w2", True, {SQNR, COSINE, KL}),
        # The gate of a SwiGLU magnifies its error; the direction of features stays.
        ("vision.connector.pooling.wo", False, {SQNR}),
        ("language.blocks.1.ff_out", True, {SQNR, KL}),
    ],
)
def test_a_bad_scale_is_caught_and_its_layer_named(
    reference: CheckpointAnswerer,
    clips: list[Held],
    formats,
    layer: str,
    is_worst: bool,
    missed: set[str],
):
    with damaged(reference, layer) as (candidate, module):
        module.weight.mul_(1.5)
    report, checks = gates_of(reference, candidate, clips, formats)
    found = {one.layer: one.sqnr for one in report.layers}
    assert found[layer] == pytest.approx(20 * math.log10(2), abs=1.5)
    order = list(formats)
    assert {found[before] for before in order[: order.index(layer)]} == {math.inf}
    assert (report.layers[0].layer == layer) == is_worst
    assert f"worst: {report.layers[0].layer}, int8" in checks[SQNR].detail
    assert f"{layer} runs first" in checks[SQNR].detail
    assert checks[SQNR].got == report.layers[0].sqnr
    assert {check.name for check in report.missed()} - {ANSWERS_CHANGED} == missed
    assert report.measured_in == IN_PYTORCH


def test_what_changes_scores_changes_windows(
    reference: CheckpointAnswerer, clips: list[Held], formats
):
    layer = "vision.blocks.0.feed_forward.w2"
    with damaged(reference, layer) as (candidate, module):
        noise = torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(0))
        module.weight.add_(0.1 * noise)
    report, checks = gates_of(reference, candidate, clips, {layer: "int8"})
    assert report.flipped > 0
    assert report.score_error > 1e-3
    assert checks[JACCARD].got < 0.99
    assert not checks[JACCARD].passed
    # What a format may do to scores, not what this one did.
    assert checks[NEAR_THRESHOLD].limit == 2 * TOLERANCES["scores", "quantised, fp32"].limit
    assert checks[NEAR_THRESHOLD].passed == (
        0 < checks[NEAR_THRESHOLD].got <= checks[NEAR_THRESHOLD].limit
    )


def test_a_wrong_selection_is_no_rounding(reference: CheckpointAnswerer, clips: list[Held]):
    candidate = CheckpointAnswerer(
        copy.deepcopy(reference.model), reference.prompts, reference.max_frames
    )
    right = planner.select
    calls = iter(range(100))

    def select(scores: NDArray, count: int) -> NDArray:
        return right(-scores if next(calls) % 2 else scores, count)  # of the candidate

    with patch.object(planner, "select", select):
        _, checks = gates_of(reference, candidate, clips, {})
    assert SQNR not in checks
    assert checks[NEAR_THRESHOLD].got > checks[NEAR_THRESHOLD].limit
    assert checks[NEAR_THRESHOLD].limit == 2 * TOLERANCES["scores", "fp32"].limit
    assert not checks[NEAR_THRESHOLD].passed
    assert not checks[JACCARD].passed


@pytest.mark.parametrize("layer", ["vision.blocks.0.attention.wq", HEAD])
def test_what_is_not_finite_fails_without_an_error(
    reference: CheckpointAnswerer, clips: list[Held], formats, layer: str
):
    with damaged(reference, layer) as (candidate, module):
        module.weight[0] = math.nan
    report, checks = gates_of(reference, candidate, clips, formats)
    assert checks[SQNR].got == -math.inf
    assert checks[KL].got == math.inf
    assert [pair.quantised for pair in report.answers] == [None, None]
    assert checks[ANSWERS_CHANGED].got == 1
    in_tower = layer != HEAD
    assert math.isnan(checks[COSINE].got) == in_tower
    assert (report.score_error == math.inf) == in_tower
    assert checks[NEAR_THRESHOLD].passed != in_tower
    assert not report.passed
    assert QuantReport.from_dict(report.to_dict(), "x").missed()


def test_a_bundle_that_overflows_fails_without_an_error(
    reference: CheckpointAnswerer, bundle: BundleAnswerer, clips: list[Held]
):
    def overflow(inputs, in_place=None):
        outputs = decoder(inputs, in_place)
        return {**outputs, "logits": np.full_like(outputs["logits"], np.inf)}

    decoder = bundle.session.runners["decoder"]
    broken = Mock(wraps=decoder, side_effect=overflow, updates_in_place=True, cache_capacity=None)
    with patch.dict(bundle.session.runners, decoder=broken):
        report, checks = gates_of(reference, bundle, clips[1:], {})
    assert checks[KL].got == math.inf
    assert report.answers[0].quantised is None


def test_gapped_positions_are_compared_as_such(
    text_bundle: Path, reference: CheckpointAnswerer, clips: list[Held]
):
    """What an fp32 bundle says there is what fp32 is asked for, too."""
    with Session.open(text_bundle, threads=1) as session:
        session.bundle = replace(
            session.bundle, manifest=replace(session.bundle.manifest, positions="gapped")
        )
        gapped, checks = gates_of(reference, BundleAnswerer(session), clips[:1], {HEAD: "int8"})
    assert gapped.passed, gapped.lines()
    assert checks[KL].got < 1e-6
    compact, _ = gates_of(reference, reference, clips[:1], {})
    assert gapped.answers[0].fp32 != compact.answers[0].fp32


def test_without_a_scorer_windows_are_no_matter(text_bundle: Path, clips: list[Held]):
    model = random_model(small_values({}), scorer=False)
    prompts = PromptBuilder.from_folder(text_bundle.with_name("text_checkpoint"), model.config)
    one, other = (CheckpointAnswerer(copy.deepcopy(model), prompts, FRAMES) for _ in range(2))
    formats = dict.fromkeys(layer_names(model.config), "int8")
    report, checks = gates_of(one, other, clips, formats)
    assert list(checks) == [SQNR, COSINE, KL, ANSWERS_CHANGED]
    assert report.passed, report.lines()
    assert report.layers[0].sqnr == math.inf
    assert report.kept_windows == report.total_windows
    assert report.prune_ratio == report.score_error == 0


def test_what_cannot_be_compared_is_refused(
    reference: CheckpointAnswerer, clips: list[Held], tmp_path: Path
):
    other = CheckpointAnswerer(random_model(small_values({})), reference.prompts, FRAMES)
    image = tmp_path / "x.png"
    image.write_bytes(png_bytes(picture((50, 80))))
    for candidate, asked, layers, message in (
        (reference, [], {}, "no held-out clips"),
        (other, clips, {}, "different configurations"),
        (reference, clips, {"vision.blocks.0.attention.wx": "int8"}, "mean 'vision.blocks.0.atten"),
        (reference, [Held(image, "What?", "x")], {}, "is an image"),
    ):
        with pytest.raises(InputError, match=message):
            gates_of(reference, candidate, asked, layers)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=6), st.data())
def test_kept_rows_do_not_depend_on_how_many_come_at_a_time(sizes: list[int], data):
    rows = np.arange(sum(sizes), dtype=np.float32)[:, None]
    cuts = data.draw(st.lists(st.integers(0, len(rows)), max_size=5).map(sorted))
    kept = []
    for parts in (np.split(rows, np.cumsum(sizes)[:-1]), np.split(rows, cuts)):
        observations = Observations()
        for part in parts:
            observations.add("x", part)
        kept.append(observations.take()["x"])
        assert observations.take() == {}
    assert np.array_equal(kept[0], kept[1])
    assert len(kept[0]) <= ROWS
    assert len(kept[0]) > ROWS / 2 or len(kept[0]) == len(rows)
    assert len(np.unique(np.diff(kept[0][:, 0]))) <= 1  # evenly spaced


def test_layers_are_found_behind_quantisation(text_bundle: Path):
    """A weight is known by its name through DequantizeLinear, Cast and Transpose."""
    graph = ir.load(text_bundle / "onnx" / "vision_upper" / "model-frames.onnx").graph
    layer, weight = "vision.blocks.2.feed_forward.w1", "tower.blocks.2.feed_forward.w1.weight"
    old = graph.initializers[f"{weight}.transposed"]
    codes = ir.tensor([[0]], ir.DataType.INT8)
    stored = ir.Value(name=f"{weight}.transposed.int8", const_value=codes)
    scale = ir.Value(name="scale", const_value=ir.tensor([1.0]))
    for value in (stored, scale):
        graph.register_initializer(value)
    chain = [ir.node("DequantizeLinear", [stored, scale])]
    chain.append(ir.node("Cast", chain[-1].outputs, {"to": 1}))
    chain.append(ir.node("Transpose", chain[-1].outputs))
    graph.insert_before(graph[0], chain)
    (product,) = old.consumers()
    (bias,) = product.outputs[0].consumers()
    after_bias = bias.outputs[0].name
    old.replace_all_uses_with(chain[-1].outputs[0])
    taps = tap_layers(graph, [layer], "x")
    assert list(taps.values()) == [layer]
    flatten = next(node for node in graph if node.op_type == "Flatten")
    assert flatten.inputs[0] is not None
    assert flatten.inputs[0].name == after_bias
    with pytest.raises(VerificationError, match=r"vision\.blocks\.2\.feed_forward\.w3"):
        tap_layers(graph, [layer.replace("w1", "w3")], "x")


def test_other_back_ends_show_no_layers(bundle: BundleAnswerer):
    with (
        patch.object(bundle.session, "backend", "tensorrt"),
        pytest.raises(InputError, match="--backend onnxruntime"),
        tapped(bundle.session, [HEAD]),
    ):
        pass


def test_hooks_go_when_the_block_ends(reference: CheckpointAnswerer):
    head = reference.model.language.lm_head
    with observed(reference.model, [HEAD]) as rows:
        head(torch.ones(3, head.in_features))
    head(torch.ones(5, head.in_features))
    assert rows.take()[HEAD].shape == (3, head.out_features)


def test_graphs_of_layers(reference: CheckpointAnswerer):
    config = reference.config  # split_at = 2
    names = ["vision.blocks.1.attention.wq", "vision.blocks.2.attention.wq",
             "vision.connector.w1", HEAD]  # fmt: skip
    expected = ["vision_lower", "vision_upper", "vision_upper", "decoder"]
    assert [graph_of(name, config) for name in names] == expected


def _rows(*values: float) -> NDArray[np.float32]:
    return np.array([values], np.float32)


def test_decibels():
    sums = SquareSums()
    sums.add(_rows(3, 4), _rows(3, 4))
    assert sums.decibels() == math.inf
    sums.add(_rows(0, 5), _rows(0, 4.5))
    assert sums.decibels() == pytest.approx(10 * math.log10(50 / 0.25))
    assert sums.rows == 2
    with pytest.raises(ValueError, match="other calls"):
        sums.add(_rows(0), _rows(0, 0))
    silent = SquareSums()
    silent.add(_rows(0), _rows(1))
    assert silent.decibels() == -math.inf


def test_cosines_of_rows():
    rows = np.array([[1, 0], [1, 1], [0, 0], [0, 0], [1, 2]], np.float16)
    got = np.array([[0, 1], [2, 2], [0, 0], [1, 0], [np.nan, 1]], np.float16)
    assert cosines(rows, got) == pytest.approx([0, 1, 1, 0, math.nan], nan_ok=True)


def test_divergence_of_distributions():
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    expected = float((p * np.log(p / q)).sum())
    assert divergence(np.log(p) + 7, np.log(q)) == pytest.approx(expected)
    assert divergence(np.log(p), np.log(p)) == 0
    assert divergence(p, np.array([np.inf, 0, 0])) == math.inf


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.floats(0, 0.3))
def test_rounding_of_scores_flips_only_near_the_threshold(seed: int, count: int, noise: float):
    rng = np.random.default_rng(seed)
    scores = rng.random((4, 12), np.float32)
    got = scores + np.float32(noise) * rng.standard_normal(scores.shape, np.float32)
    keeps = [planner.select(each, count) for each in (scores, got)]
    error, distance = flips(scores, keeps[0], got, keeps[1])
    assert error == np.abs(scores.astype(float) - got).max()
    assert distance <= 2 * error
