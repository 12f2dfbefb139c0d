"""What `docs/precision.md` is made of: claims, tables and pictures from a small fixed result."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import bench_precision
from benchmarks.harness import precision_run
from benchmarks.harness.precision_ablation import int8_layers
from benchmarks.harness.precision_claims import claims
from benchmarks.harness.precision_exam import Seen, agreement
from benchmarks.harness.precision_guide import runs
from benchmarks.harness.precision_plan import RECIPES, Settings
from benchmarks.harness.precision_report import report
from benchmarks.harness.precision_results import Results
from benchmarks.harness.precision_run import Bench
from docs.update_precision import DOCUMENT
from stts_export.calibration.formats import check_formats
from stts_export.calibration.quant_report import (
    ANSWERS_CHANGED,
    CHECKS,
    COSINE,
    JACCARD,
    KL,
    NEAR_THRESHOLD,
    SQNR,
    AnswerPair,
    GateCheck,
    LayerError,
    QuantReport,
)
from stts_export.calibration.recipe import Recipe
from stts_export.calibration.rounding import rounded_model
from stts_export.checkpoint import model_from_checkpoint, open_checkpoint
from stts_export.cli import _parser
from stts_export.devices import DEVICES
from stts_export.errors import InputError

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo_checkpoint"
CLIPS, EACH, WINDOWS = 100, 2, 4000
RIGHT = 180
_LIMITS = {SQNR: 15, JACCARD: 0.97, NEAR_THRESHOLD: 0.02, COSINE: 0.99, KL: 0.02,
           ANSWERS_CHANGED: 0.05}  # fmt: skip


def gates(name: str, sqnr: float) -> dict[str, Any]:
    got = {SQNR: sqnr, JACCARD: 1.0, NEAR_THRESHOLD: 0.0, COSINE: 0.999, KL: 0.001,
           ANSWERS_CHANGED: 0.0}  # fmt: skip
    layers = tuple(
        LayerError(f"vision.blocks.{index}.attention.wq", "vision_upper", name, sqnr + index, 128)
        for index in range(6)
    )
    checks = tuple(GateCheck.compare(check, got[check], _LIMITS[check]) for check in CHECKS)
    return QuantReport(
        name, (name,), "fp16", 0.5, 12, 1000, 2000, "onnxruntime", layers, checks, 0.001, 3,
        (AnswerPair("a", "What?", "blue", "blue"),),
    ).to_dict()  # fmt: skip


def entry(
    name: str, megabytes: int, wrong: int = 0, flipped: int = 3, sqnr: float = 20.0
) -> dict[str, Any]:
    """A recipe that answers `wrong` more questions wrong than fp32, one of each clip."""
    recipe = Recipe.load(name)
    marks = ["1"] * RIGHT + ["0"] * (CLIPS * EACH - RIGHT)
    for clip in range(wrong):
        marks[clip * EACH] = "0"
    right = marks.count("1")
    row = {"kept_windows": WINDOWS, "total_windows": WINDOWS, "marks": "".join(marks),
           "right": right, "accuracy": right / len(marks), "interval": [0.8, 0.9]}  # fmt: skip
    return {
        "name": name,
        "recipe": recipe.to_dict(),
        "digest": recipe.digest(),
        "measured_in": "PyTorch" if name == "nvfp4" else "onnxruntime",
        "formats": {"int8": 40, "fp32": 2} if name == "int8" else {},
        "weights": {"vision_lower": megabytes * 10**6, "decoder": megabytes * 10**6},
        "layers": 60,
        "gates": None if recipe.gates is None else gates(name, sqnr),
        "rows": [{**row, "prune_ratio": ratio} for ratio in (0.0, 0.5)],
        "agreement": {
            "jaccard": 0.99, "flipped": flipped, "windows": WINDOWS, "score_error": 1e-3,
            "distance": 2e-3, "changed": {"0": wrong, "0.5": wrong},
        },
    }  # fmt: skip


def made_up(*entries: dict[str, Any], scorer: int = 400, quick: float = 0.8) -> dict[str, Any]:
    """What `bench_precision.py` writes."""
    computer = {"cpu": "a processor", "cores": 2, "load_average": [0.5], "onnxruntime": "1.32"}
    found = [entry("fp32", 10, flipped=0), *entries]

    def speed(name: str) -> dict[str, Any]:
        own = 1.0 if name == "fp32" else quick
        part = {"median": own, "low": own, "high": own}
        parts = dict.fromkeys(("encode", "prefill", "token"), part)
        return {"recipe": name, "seconds": parts, "relative": parts}

    return {
        "benchmark": "precision",
        "command": "python benchmarks/bench_precision.py here",
        "date": "2026-11-30",
        "machine": computer,
        "versions": {"torch": "2.13", "nvidia-modelopt": "0.47"},
        "settings": {"checkpoint": "here", "seed": 0, "split": "test", "prune_ratio": 0.5,
                     "tokens": 16},
        "exam": ["colour count"] * CLIPS,
        "chance": {},
        "recipes": found,
        "ablation": {
            "clips": CLIPS, "windows": WINDOWS,
            "rows": [
                {"part": part, "layers": 2, "flipped": flipped, "score_error": 0.01, "jaccard": 0.9}
                for part, flipped in (("the scorer", scorer), ("the blocks that it reads", 40))
            ],
        },
        "speed": {
            "machine": computer, "frames": [11, 14],
            "rows": [speed(one["name"]) for one in found if one["measured_in"] == "onnxruntime"],
        },
    }  # fmt: skip


GOOD = (entry("fp16", 5), entry("int8", 3, wrong=1), entry("nvfp4", 2, wrong=1, flipped=5))


def verdicts(*entries: dict[str, Any], **changed: Any) -> dict[str, str]:
    """Claim -> verdict and numbers."""
    lines = (
        re.fullmatch(r"\* \*\*([^*]+)\*\*: (.+?)\. (.+)", line)
        for line in claims(Results(made_up(*entries, **changed)))
    )
    return {line[2]: f"{line[1]}: {line[3]}" for line in lines if line}


def test_claims_hold_where_the_numbers_say_so():
    found = verdicts(*GOOD)
    assert len(found) == 6
    assert all(text.startswith("Holds") for text in found.values())
    assert "0 at ratio 0.5 (0 right ones lost, 0 won)" in found["`fp16` loses no right answer"]
    assert "-0.5 points (95 % -1.5 to +0.0)" in found["`int8` loses at most one point at 0.5"]


@pytest.mark.parametrize(
    ("entries", "changed", "claim", "verdict"),
    [
        ((entry("fp16", 5, wrong=1),), {}, "`fp16` loses no right answer",
         "Fails: Of 200 answers other texts are 1 at ratio 0.5 (1 right"),
        ((entry("int8", 3, wrong=20),), {}, "`int8` loses at most one point at 0.5",
         "Fails: -10.0 points"),
        ((entry("int8", 3, sqnr=9),), {},
         "every recipe passes its own gates on held-out clips", "Fails: `int8` misses sqnr: 9 dB"),
        ((GOOD[0], entry("int8", 3, flipped=4)), {},
         "what recipes quantise decides no window otherwise that `fp16` does not", "Fails: "),
        ((GOOD[0],), {"scorer": 3},
         "int8 in the scorer, or in the blocks that it reads, flips more windows than `fp16`",
         "Fails: "),
    ],
)  # fmt: skip
def test_claims_fail_where_the_numbers_say_so(
    entries: tuple[dict[str, Any], ...], changed: dict[str, Any], claim: str, verdict: str
):
    assert verdicts(*entries, **changed)[claim].startswith(verdict)


def test_the_document_shows_what_was_found():
    values = made_up(*GOOD)
    text = report(Results(values))
    rows = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| `int8`")}
    assert rows
    assert "| `int8` | 6.00 | 89.5 | 80.0 to 90.0 | -0.5 (-1.5 to +0.0) |" in text
    assert "| `fp32` | 20.00 | 90.0 | 80.0 to 90.0 |  |  | onnxruntime |" in text
    assert "| `nvfp4` | 5 (0.12 %) | 0.9900 | 1.0e-03 | 2.0e-03 | 1 | 1 | 0 | 1 |" in text
    assert "| `int8` | 20 / 15 | 1 / 0.97 |" in text
    assert "| `int8` | 3.00 | 3.00 | 6.00 | 0.30 | 2 fp32, 40 int8 |" in text
    assert "| the scorer | 2 | 400 (10.00 %) |" in text
    assert "Faster than fp32 in every part, by medians: `fp16`, `int8`." in text
    assert "\n* recipe `thor`\n" in text
    slow = report(Results(made_up(*GOOD, quick=1.5)))
    assert "No recipe is faster than fp32 in every part of a model" in slow


def test_the_report_that_is_shown_has_the_worst_layer_first():
    values = made_up(*GOOD)
    for one in values["recipes"]:
        if one["gates"] is not None:
            one["gates"] = {**one["gates"], "layers": one["gates"]["layers"][::-1]}
    text = report(Results(values))
    shown = re.findall(r"^    vision\.blocks\.(\d)\.", text, flags=re.MULTILINE)
    assert shown == ["0", "1", "2", "3"]
    assert "\n    ... 2 better ones\n" in text


def test_a_recipe_that_was_changed_since_is_named():
    assert "as it is now" not in report(Results(made_up(*GOOD)))
    values = made_up(GOOD[0], {**GOOD[1], "digest": "other"})
    assert "* recipe `int8` as it is now: it was changed since" in report(Results(values))


def test_a_document_without_int8_has_no_picture_of_its_layers(tmp_path: Path):
    results = tmp_path / "results.json"
    results.write_text(json.dumps(made_up(GOOD[0])))
    DOCUMENT.main(["--results", str(results), "--folder", str(tmp_path)], None)
    assert "precision_layers.png" not in (tmp_path / "precision.md").read_text()
    assert not (tmp_path / "precision_layers.png").exists()
    assert (tmp_path / "precision_accuracy.png").exists()


def test_other_results_are_refused():
    with pytest.raises(InputError, match=r"bench_precision\.py"):
        Results({"benchmark": "evidence"})
    values = made_up(entry("fp16", 5))
    values["recipes"][1]["rows"][0]["right"] += 1
    with pytest.raises(InputError, match="do not fit"):
        Results(values)


def test_check_fails_when_something_is_outdated(tmp_path: Path):
    results, folder = tmp_path / "results.json", tmp_path / "docs"
    results.write_text(json.dumps(made_up(*GOOD)))
    names = ["precision.md", "precision_accuracy.png", "precision_layers.png"]
    folder.mkdir()
    assert DOCUMENT.outdated(results, folder) == names
    DOCUMENT.main(["--results", str(results), "--folder", str(folder)], None)
    assert DOCUMENT.outdated(results, folder) == []
    with pytest.raises(SystemExit) as done:
        DOCUMENT.main(["--check", "--results", str(results), "--folder", str(folder)], None)
    assert done.value.code == 0
    results.write_text(json.dumps(made_up(*GOOD[:2])))
    with pytest.raises(SystemExit, match=r"precision\.md, .*: run python docs/update_precision"):
        DOCUMENT.main(["--check", "--results", str(results), "--folder", str(folder)], None)


def test_the_document_says_how_to_measure_when_nothing_is_there(tmp_path: Path):
    with pytest.raises(SystemExit, match=r"run python benchmarks/bench_precision\.py first"):
        DOCUMENT.main(["--results", str(tmp_path / "none.json")], None)


@pytest.mark.parametrize("recipe", ["fp8", "nvfp4", "int8", "bf16"])
@pytest.mark.parametrize("target", ["agx-orin", "thor", "rtx-4090", "a100-40gb"])
def test_devices_run_what_a_build_for_them_accepts(recipe: str, target: str):
    device = DEVICES[target]
    version = device.tensorrt and ".".join(map(str, device.tensorrt))
    accepted = True
    try:
        check_formats(Recipe.load(recipe), device.backend, device.sm, version)
    except InputError:
        accepted = False
    assert device.sm is not None
    sm = int(device.sm.removeprefix("sm"))
    assert runs(Recipe.load(recipe), device.backend, sm, device.tensorrt) == accepted


def test_commands_of_the_document_are_ours():
    """No bash blocks, which would be run: calibrating takes a minute. They are parsed."""
    text = report(Results(made_up(*GOOD)))
    commands = re.findall(r"^    (stts-export .+)$", text, flags=re.MULTILINE)
    assert {shlex.split(line)[1] for line in commands} == {"calibrate", "build", "quant-report"}
    for line in commands:
        _parser().parse_args(shlex.split(line)[1:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipes", "fp16,int8"], "fp32 is missing"),
        (["--recipes", "fp32,int8,int8"], "int8 is there twice"),
        (["--recipes", "fp32,imt8"], r"no recipe 'imt8', did you mean 'int8'|imt8"),
        (["--seed", "99999"], "seed is 99999"),
        (["--clips", "2", "--questions", "500"], "2 clips have"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    work, output = tmp_path / "work", tmp_path / "out.json"
    done = bench_precision.main([str(DEMO), *arguments, "--work", str(work), "-o", str(output)])
    assert done == 1
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.startswith("error: ")
    assert not work.exists()
    assert not output.exists()


@pytest.mark.parametrize("option", ["--questions", "--clips", "--timed-clips"])
def test_counts_are_positive(option: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        bench_precision.main([str(DEMO), option, "0", "-o", "out.json"])
    assert f"{option}: 1 or more" in capsys.readouterr().err


def test_the_recipes_of_the_default_are_shipped_and_loaded():
    assert [one.name for one in Settings("", RECIPES, Path()).load().values()] == list(RECIPES)


def test_a_checkpoint_without_scorer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = open_checkpoint(str(DEMO))
    vision = replace(source.config.vision, pruning=None)
    plain = replace(source, config=replace(source.config, vision=vision))
    monkeypatch.setattr(precision_run, "open_checkpoint", lambda name: plain)
    monkeypatch.setattr(precision_run, "check_tensors", lambda source: None)
    with pytest.raises(InputError, match="has no scorer"):
        Bench(Settings(str(DEMO), ("fp32",), tmp_path), print)


def test_what_is_finished_is_not_done_again(tmp_path: Path):
    bench = Bench(Settings(str(DEMO), ("fp32",), tmp_path), print)
    calls: list[int] = []

    def make() -> dict[str, Any]:
        calls.append(1)
        return {"made": len(calls)}

    file = tmp_path / "part.json"
    assert bench._once(file, {"seed": 0}, make) == {"made": 1}
    assert bench._once(file, {"seed": 0}, make) == {"made": 1}
    assert bench._once(file, {"seed": 1}, make) == {"made": 2}
    with pytest.raises(ZeroDivisionError):
        bench._once(file, {"seed": 2}, lambda: {"made": 1 // 0})
    assert bench._once(file, {"seed": 1}, make) == {"made": 2}


_masks = st.integers(1, 4).flatmap(
    lambda frames: st.tuples(
        *(st.lists(st.booleans(), min_size=3 * frames, max_size=3 * frames) for _ in range(2))
    )
)


@settings(deadline=None, max_examples=30)
@given(pair=_masks)
def test_agreement_counts_windows_and_answers(pair: tuple[list[bool], list[bool]]):
    keeps = [np.array(keep).reshape(-1, 3) for keep in pair]
    for keep in keeps:
        keep[0] = True
    rng = np.random.default_rng(0)
    scores = rng.random(keeps[0].shape, dtype=np.float32)
    one = Seen(scores, keeps[0], {"0": ["red", "2"], "0.5": ["red", "2"]})
    other = Seen(scores + np.float32(0.25), keeps[1], {"0": ["red", "2"], "0.5": ["red", "3"]})
    other = Seen.from_dict(json.loads(json.dumps(other.to_dict())))
    found = agreement([one], [other])
    assert found["flipped"] == int((keeps[0] ^ keeps[1]).sum())
    assert found["windows"] == keeps[0].size
    assert found["jaccard"] == (keeps[0] & keeps[1]).sum() / (keeps[0] | keeps[1]).sum()
    assert found["score_error"] == pytest.approx(0.25, abs=1e-6)
    assert found["changed"] == {"0": 0, "0.5": 1}


def test_agreement_of_several_clips_takes_means_and_maxima():
    keep = np.array([[True, True], [True, False]])
    scores = np.array([[0.5, 0.5], [0.75, 0.25]], np.float32)
    texts = {"0": ["a", "b"]}  # nothing is removed from so short a clip
    one = Seen(scores, keep, texts)
    flipped = Seen(scores[:, ::-1].copy(), keep[:, ::-1].copy(), {"0": ["a", "c"]})
    found = agreement([one, one], [one, flipped])
    assert found["jaccard"] == (1 + 2 / 4) / 2
    assert (found["flipped"], found["windows"]) == (2, 8)
    assert (found["score_error"], found["distance"]) == (0.5, 0.5)
    assert found["changed"] == {"0": 1, "0.5": 1}


def test_int8_of_the_ablation_has_a_scale_per_output_and_maps_maxima_to_127():
    model = model_from_checkpoint(open_checkpoint(str(DEMO)))
    name = "vision.scorer.w1"
    layers = int8_layers(model, [name], {f"{name}:in": 12.7})
    weight = model.get_submodule(name).weight
    assert isinstance(weight, torch.Tensor)
    assert layers[name].input_scale == pytest.approx(0.1)
    scales = layers[name].weight_scale
    assert scales.dtype == np.float32
    assert np.allclose(scales * 127, weight.detach().abs().amax(1).numpy())
    rounded = rounded_model(model, layers, "fp32")
    x = torch.full((1, weight.shape[1]), 12.7)
    with torch.no_grad():
        exact, got = (one.get_submodule(name)(x) for one in (model, rounded))
    assert 0 < float((exact - got).abs().max()) < float(exact.abs().max()) / 50


def test_a_result_is_written_when_all_parts_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The parts are put together, and the document can be made of them."""
    clip = Seen(np.ones((2, 4), np.float32), np.ones((2, 4), np.bool_), {"0": ["a"], "0.5": ["a"]})
    rows = [
        {"prune_ratio": ratio, "kept_windows": 8, "total_windows": 8, "marks": "11", "right": 2,
         "accuracy": 1.0, "interval": [0.4, 1.0]}
        for ratio in (0.0, 0.5)
    ]  # fmt: skip
    made = made_up(*GOOD)

    def measured(self: Bench, name: str, recipe: Recipe) -> dict[str, Any]:
        own = next(one for one in made["recipes"] if one["name"] == name)
        kept = {key: own[key] for key in ("recipe", "digest", "measured_in", "formats", "weights",
                                          "layers", "gates")}  # fmt: skip
        return {**kept, "evaluation": {"chance": {}, "rows": rows, "seen": [clip.to_dict()]}}

    monkeypatch.setattr(Bench, "prepare", lambda self: None)
    monkeypatch.setattr(Bench, "recipe", measured)
    monkeypatch.setattr(Bench, "ablation", lambda self: made["ablation"])
    monkeypatch.setattr(Bench, "speed", lambda self, recipes: {**made["speed"], "of": [*recipes]})
    output = tmp_path / "out.json"
    arguments = [str(DEMO), "--recipes", "fp32,fp16,int8,nvfp4", "--questions", "2",
                 "--clips", "1", "--work", str(tmp_path / "work"), "-o", str(output)]  # fmt: skip
    threads = torch.get_num_threads()
    assert bench_precision.main(arguments) == 0
    assert torch.get_num_threads() == threads
    written = json.loads(output.read_text())
    assert written["command"].startswith("python benchmarks/bench_precision.py ")
    assert written["speed"]["of"] == ["fp32", "fp16", "int8"]
    assert written["exam"][0].count(" ") == 1
    assert written["recipes"][2]["agreement"]["jaccard"] == 1
    assert (
        written["settings"]["package"]
        == precision_run.Bench(Settings(str(DEMO), ("fp32",), tmp_path), print).code
    )
    assert report(Results(written)).startswith("# Precision\n")
