"""`build` and `calibrate` with a recipe: from checkpoint and clips to a judged bundle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from stts_export import Session, build
from stts_export.build import BuildSpec, bundle_from_bundle, bundle_from_checkpoint
from stts_export.bundle import POSITIONS, Bundle, Limits
from stts_export.calibration import building, calibrate
from stts_export.calibration.building import Precision
from stts_export.calibration.calibrate import Calibration, calibration_from_checkpoint
from stts_export.calibration.clips import ClipSet
from stts_export.calibration.quant_report import GATES_FILE
from stts_export.calibration.recipe import LayerRule, Recipe
from stts_export.calibration.search import Found
from stts_export.checkpoint import open_checkpoint
from stts_export.cli import main
from stts_export.engines import tensorrt_rtx
from stts_export.errors import InputError, VerificationError
from stts_export.tensors import DECODER
from stts_export.training.clips import make_clip
from stts_export.training.rendering import write_mp4
from stts_export.verify import verify

_RECIPE = """\
schema: 1
name: small-int8
description: for tests
base: fp32
layers:
  - {match: [vision, decoder], format: int8, method: smoothquant}
calibration: {clips: 2, held_out: 1}
gates: {min_sqnr: 12, min_jaccard: 0.9, min_cosine: 0.98, max_kl: 0.1, max_answers_changed: 1}
"""
_BAD = "vision.blocks.2.feed_forward.w2"


@pytest.fixture(scope="module")
def inputs(shared_folder: Path, text_bundle: Path) -> Path:
    """Folder with a recipe, a folder of three clips, and a calibration; read only."""
    folder = shared_folder / "calibrated"
    with FileLock(str(folder) + ".lock"):
        if not folder.exists():
            unfinished = folder.with_name("calibrated.unfinished")
            (unfinished / "clips").mkdir(parents=True)
            (unfinished / "recipe.yaml").write_text(_RECIPE, encoding="utf-8")
            for seed in range(3):
                write_mp4(make_clip(seed, level=0), unfinished / "clips" / f"{seed}.mp4", size=48)
            calibration_from_checkpoint(
                _checkpoint(text_bundle),
                Recipe.load(unfinished / "recipe.yaml"),
                unfinished / "calibration",
                clips=unfinished / "clips",
            )
            unfinished.rename(folder)
    return folder


def _checkpoint(text_bundle: Path):
    return open_checkpoint(text_bundle.with_name("text_checkpoint"))


def _spec(inputs: Path, **changes: object) -> BuildSpec:
    spec = BuildSpec(
        precision=str(inputs / "recipe.yaml"), calibration=inputs / "calibration",
        clips=inputs / "clips",
    )  # fmt: skip
    return replace(spec, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def quantised(shared_folder: Path, inputs: Path, text_bundle: Path) -> Path:
    bundle = shared_folder / "quantised"
    with FileLock(str(bundle) + ".lock"):
        if not bundle.exists():
            bundle_from_checkpoint(_checkpoint(text_bundle).folder, bundle, _spec(inputs))
    return bundle


def test_a_bundle_says_how_it_was_quantised_and_judged(quantised: Path, text_bundle: Path):
    opened = Bundle.open(quantised)
    opened.check_hashes()
    manifest = opened.manifest
    assert (manifest.precision, manifest.precision_name) == ("fp32", "small-int8")
    assert set(manifest.formats.values()) == {"int8"}
    assert not [name for name in manifest.formats if name.startswith("vision.blocks.0.")]
    assert manifest.judged is not None
    assert manifest.judged.passed
    assert not (quantised / "calibration").exists()
    assert {"reports/quantization.json", "reports/quantization.png"} <= set(manifest.files)
    data = "onnx/decoder/model.onnx.data"
    assert manifest.files[data]["size"] < 0.85 * (text_bundle / data).stat().st_size


def test_the_windows_are_those_of_fp32(quantised: Path, text_bundle: Path):
    report = verify(quantised, _checkpoint(text_bundle).folder)
    assert report.passed, [check for check in report.checks if not check.passed]
    frames = np.random.default_rng(5).integers(0, 256, (6, 48, 48, 3), dtype=np.uint8)
    kept = []
    for bundle in (quantised, text_bundle):
        with Session.open(bundle) as session:
            kept.append(session.encode(frames, 0.5).keep)
    assert np.array_equal(kept[0], kept[1])


def test_quant_report_shows_it(quantised: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["quant-report", str(quantised)]) == 0
    text = capsys.readouterr().out
    assert "small-int8" in text
    assert "vision.blocks." in text
    assert main(["quant-report", str(quantised), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == "small-int8"


@pytest.fixture
def bad_scale(inputs: Path, tmp_path: Path) -> Path:
    """A calibration of which one scale is fifty times too small: inputs saturate."""
    made = Calibration.from_folder(inputs / "calibration")
    layer = made.layers[_BAD]
    assert layer.input_scale is not None
    layers = {**made.layers, _BAD: replace(layer, input_scale=layer.input_scale / 50)}
    (tmp_path / "calibration").mkdir()
    replace(made, layers=layers).to_folder(tmp_path / "calibration")
    return tmp_path / "calibration"


def test_a_bad_scale_is_caught_and_written_by_force_only(
    bad_scale: Path, inputs: Path, text_bundle: Path, tmp_path: Path
):
    checkpoint, output = _checkpoint(text_bundle).folder, tmp_path / "bundle"
    spec = _spec(inputs, calibration=bad_scale)
    with pytest.raises(VerificationError, match=rf"misses the gates.*{_BAD}") as error:
        bundle_from_checkpoint(checkpoint, output, spec)
    assert "--force" in str(error.value)
    assert not output.exists()
    # A bundle is not replaced by one that misses its gates.
    shutil.copytree(text_bundle, output)
    with pytest.raises(VerificationError, match="misses the gates") as error:
        bundle_from_checkpoint(checkpoint, output, spec, force=True)
    assert f"remove {output}" in str(error.value)
    assert Bundle.open(output).manifest.precision_name == "fp32"
    shutil.rmtree(output)
    stages: list[str] = []
    bundle_from_checkpoint(
        checkpoint, output, spec, force=True, on_stage=lambda stage, *_: stages.append(stage)
    )
    assert stages == ["judge on held-out clips"]  # all else was there
    judged = Bundle.open(output).manifest.judged
    assert judged is not None
    assert not judged.passed
    assert "sqnr" in judged.missed
    assert main(["quant-report", str(output)]) == 3


def test_a_calibration_belongs_to_a_checkpoint_a_recipe_and_clips(
    inputs: Path, small_checkpoint: Path, text_bundle: Path, tmp_path: Path
):
    output = tmp_path / "bundle"
    with pytest.raises(InputError, match="of another checkpoint"):
        bundle_from_checkpoint(small_checkpoint, output, _spec(inputs))
    checkpoint = _checkpoint(text_bundle).folder
    with pytest.raises(InputError, match="saw clips of up to 8 frames"):
        bundle_from_checkpoint(checkpoint, output, _spec(inputs, max_frames=4))
    with pytest.raises(InputError, match=r"at prune ratio 0\.5"):
        bundle_from_checkpoint(checkpoint, output, _spec(inputs, min_prune_ratio=0.8))
    with pytest.raises(InputError, match="is for recipe small-int8"):
        bundle_from_checkpoint(checkpoint, output, _spec(inputs, precision="int8"))
    with pytest.raises(InputError, match="is of no use"):
        bundle_from_checkpoint(checkpoint, output, _spec(inputs, precision="fp16"))
    assert not list(tmp_path.iterdir())


def test_what_was_judged_goes_only_with_what_it_was_judged_on(
    quantised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("tensorrt_rtx", reason="pip install 'stts-export[trt-rtx]'")
    monkeypatch.setattr(tensorrt_rtx, "GRAPHS", (DECODER,))
    spec = BuildSpec(
        backends=("tensorrt-rtx",), targets=("sm89",), max_tokens=64, precision="small-int8"
    )
    for positions in POSITIONS:
        is_judged = positions == "compact"
        built = bundle_from_bundle(
            quantised, tmp_path / positions, replace(spec, positions=positions)
        )
        manifest = json.loads((built / "manifest.json").read_text(encoding="utf-8"))
        assert (manifest["judged"] is not None) == is_judged
        assert (built / GATES_FILE).exists() == is_judged


def test_what_is_quantised_is_not_quantised_again(
    quantised: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    spec = BuildSpec(precision="int8", backends=("tensorrt-rtx",), targets=("sm89",))
    with pytest.raises(InputError, match="quantised already, to small-int8"):
        bundle_from_bundle(quantised, tmp_path / "bundle", spec)
    arguments = ["calibrate", str(quantised), "--recipe", "int8", "-o", str(tmp_path / "c")]
    assert main(arguments) == 1
    assert "formats already" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_formats_that_a_target_cannot_run(text_bundle: Path, tmp_path: Path):
    checkpoint = _checkpoint(text_bundle).folder
    for precision in ("bf16", "nvfp4"):
        spec = BuildSpec(precision=precision, backends=("onnxruntime",))
        with pytest.raises(InputError, match=rf"{precision}.*onnxruntime has no kernels"):
            bundle_from_checkpoint(checkpoint, tmp_path / "b", spec)
    spec = BuildSpec(precision="fp8", backends=("tensorrt-rtx",), targets=("sm86",))
    with pytest.raises(InputError, match="fp8, which needs sm89"):
        bundle_from_checkpoint(checkpoint, tmp_path / "b", spec)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("spec", [BuildSpec(precision="int8"), BuildSpec(auto="cpu")])
def test_clips_that_are_not_there_or_too_few_leave_nothing(
    text_bundle: Path, inputs: Path, tmp_path: Path, spec: BuildSpec
):
    checkpoint = _checkpoint(text_bundle).folder
    spec = replace(spec, clips=tmp_path / "typo")
    with pytest.raises(InputError, match=r"typo: there is no such file"):
        bundle_from_checkpoint(checkpoint, tmp_path / "bundle", spec)
    with pytest.raises(InputError, match="at least 8"):
        bundle_from_checkpoint(
            checkpoint, tmp_path / "bundle", replace(spec, clips=inputs / "clips")
        )
    assert not list(tmp_path.iterdir())


def test_layers_that_stay_fp32_are_named(
    text_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    """Those that would overflow, with how far they reach, and what is fp32 with them."""
    rules = (LayerRule(("language.blocks.0.attn_out",), "fp32"),)
    recipe = Recipe("mine", "", "fp16", layers=rules)
    overflows = "vision.blocks.2.feed_forward.w1"
    ranges_of = Precision._ranges
    monkeypatch.setattr(Precision, "_ranges", lambda self: {**ranges_of(self), overflows: 1e5})
    limits = Limits(max_frames=4, max_tokens=100, min_prune_ratio=0.0)
    precision = Precision(_checkpoint(text_bundle), recipe, None, None, limits)
    found = precision.numerics(tmp_path, lambda stage: None, None)
    named = {
        "language.blocks.0.attn_out", "language.blocks.0.att_proj", overflows,
        "vision.blocks.2.feed_forward.w2",
    }  # fmt: skip
    assert found.fp32_layers == named
    assert f"{overflows} stays fp32: values reach 1e+05" in caplog.text
    assert "as well: vision.blocks.2.feed_forward.w2, language.blocks.0.att_proj" in caplog.text


@pytest.mark.parametrize(("precision", "is_slow"), [("int8", True), ("cpu", False)])
def test_who_builds_for_a_cpu_what_is_slow_there_is_told(
    text_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    precision: str,
    is_slow: bool,
):
    class StoppedError(Exception):
        pass

    def stop(*_: object) -> None:
        raise StoppedError

    monkeypatch.setattr(build, "_run", stop)
    checkpoint = _checkpoint(text_bundle).folder
    with pytest.raises(StoppedError):
        bundle_from_checkpoint(checkpoint, tmp_path / "b", BuildSpec(precision=precision))
    assert ("for a CPU take --precision cpu" in caplog.text) == is_slow


def test_what_a_search_collected_stays_until_the_bundle_is_written(
    text_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def searched(source: object, target: str, work: Path, **_: object) -> Found:
        work.mkdir(exist_ok=True)
        (work / "statistics").mkdir(exist_ok=True)
        return Found(Recipe.plain("fp32"), {}, ())

    def fail(*_: object) -> None:
        raise VerificationError("no")

    no_clips = ClipSet("none", (), ())
    monkeypatch.setattr(building, "clips_of", lambda *_: no_clips)
    monkeypatch.setattr(building, "recipe_for_target", searched)
    checkpoint, output = _checkpoint(text_bundle).folder, tmp_path / "bundle"
    monkeypatch.setattr(build, "_run", fail)
    with pytest.raises(VerificationError):
        bundle_from_checkpoint(checkpoint, output, BuildSpec(auto="cpu"))
    assert (tmp_path / "bundle.search" / "statistics").is_dir()
    monkeypatch.setattr(build, "_run", lambda *_: None)
    bundle_from_checkpoint(checkpoint, output, BuildSpec(auto="cpu"))
    assert not list(tmp_path.iterdir())


def test_one_broken_clip_to_calibrate_on_leaves_nothing(
    text_bundle: Path, inputs: Path, tmp_path: Path
):
    clips = tmp_path / "clips"
    shutil.copytree(inputs / "clips", clips)
    (clips / "1.mp4").write_bytes(b"no video")  # every third is held out
    with pytest.raises(InputError, match=r"1\.mp4: is not a video"):
        calibration_from_checkpoint(
            _checkpoint(text_bundle),
            Recipe.load(inputs / "recipe.yaml"),
            tmp_path / "calibration",
            clips=clips,
        )
    assert not (tmp_path / "calibration").exists()


def test_a_search_leaves_a_folder_of_others_alone(text_bundle: Path, tmp_path: Path):
    """It would be removed when the search is done."""
    work = tmp_path / "bundle.search"
    work.mkdir()
    (work / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match=r"bundle\.search: holds notes\.txt"):
        bundle_from_checkpoint(
            text_bundle.with_name("text_checkpoint"), tmp_path / "bundle", BuildSpec(auto="cpu")
        )
    assert [path.name for path in tmp_path.iterdir()] == ["bundle.search"]
    assert [path.name for path in work.iterdir()] == ["notes.txt"]


def test_calibrate_refuses_before_it_writes(
    inputs: Path, text_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    checkpoint = str(_checkpoint(text_bundle).folder)
    output = tmp_path / "calibration"
    clips = tmp_path / "clips"
    clips.mkdir()
    (clips / "one.mp4").write_bytes(b"no video")

    def refused(*arguments: str) -> str:
        assert main(["calibrate", checkpoint, "-o", str(output), *arguments]) == 1
        return capsys.readouterr().err

    recipe = inputs / "recipe.yaml"
    assert "did you mean 'int8'" in refused("--recipe", "int9")
    assert "no layer whose format needs scales" in refused("--recipe", "fp16")
    assert "at least" in refused("--recipe", str(recipe), "--clips", str(clips))
    assert not output.exists()
    other = tmp_path / "other.yaml"
    other.write_text(_RECIPE.replace("[vision, decoder]", "[visions]"), encoding="utf-8")
    assert "did you mean 'vision'" in refused("--recipe", str(other))
    assert not output.exists()
    for name in ("two.mp4", "three.mp4"):
        (clips / name).write_bytes(name.encode())
    assert ".mp4: is not a video" in refused("--recipe", str(recipe), "--clips", str(clips))
    assert not output.exists()
    nowhere = tmp_path / "one.mp4" / "calibration"
    nowhere.parent.write_text("a file")
    assert main(["calibrate", checkpoint, "--recipe", str(recipe), "-o", str(nowhere)]) == 1
    assert f"{nowhere}/clips: cannot be written: Not a directory" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert main(["calibrate", checkpoint, "--recipe", str(recipe), "-o", str(tmp_path / "mine")])
    assert "notes.txt, which no calibration writes" in capsys.readouterr().err


def test_a_checkpoint_that_memory_does_not_hold_has_the_same_scales(
    inputs: Path, text_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def whole(source: object) -> None:
        raise AssertionError("all weights were loaded")

    monkeypatch.setattr(calibrate, "available_memory", lambda: 1)
    monkeypatch.setattr(calibrate, "model_from_checkpoint", whole)
    made = calibration_from_checkpoint(
        _checkpoint(text_bundle),
        Recipe.load(inputs / "recipe.yaml"),
        tmp_path / "calibration",
        clips=inputs / "clips",
    )
    expected = Calibration.from_folder(inputs / "calibration")
    assert set(made.layers) == set(expected.layers)
    for name, layer in made.layers.items():
        np.testing.assert_allclose(
            layer.weight_scale, expected.layers[name].weight_scale, rtol=1e-5
        )
        assert layer.input_scale == pytest.approx(expected.layers[name].input_scale, rel=1e-5)


def test_statistics_serve_another_recipe(
    inputs: Path, text_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "calibration"
    shutil.copytree(inputs / "calibration", folder)
    recipe = tmp_path / "recipe.yaml"
    text = _RECIPE.replace("int8, method: smoothquant", "fp8").replace("base: fp32", "base: fp16")
    recipe.write_text(text, encoding="utf-8")

    def read(*arguments: object) -> Iterator[None]:
        raise AssertionError("a clip was run again")

    monkeypatch.setattr("stts_export.calibration.statistics._clip_statistics", read)
    made = calibration_from_checkpoint(
        _checkpoint(text_bundle), Recipe.load(recipe), folder, clips=inputs / "clips"
    )
    assert {layer.format for layer in made.layers.values()} == {"fp8"}
    assert Calibration.from_folder(folder).recipe == made.recipe
