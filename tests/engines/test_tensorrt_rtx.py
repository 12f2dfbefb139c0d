"""Engines of the golden checkpoint, really built by TensorRT for RTX, with no GPU."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stts_export.build import BuildSpec, bundle_from_bundle
from stts_export.bundle import GRAPH_FOLDER, Bundle
from stts_export.calibration.layers import Format, Numerics, layers_by_group
from stts_export.calibration.recipe import LayerRule
from stts_export.cli import main
from stts_export.engines import engine_build, tensorrt_rtx
from stts_export.engines.engine_build import EngineSpec, engines_from_graphs
from stts_export.engines.worker import run_job
from stts_export.errors import InputError, MissingDependencyError
from stts_export.graphs.export import export_graph
from stts_export.inspect import describe
from stts_export.tensors import ACTIVATION, DECODER, Precision, Range
from tests.helpers import any_scales, random_model, small_config
from tests.standins.fixtures import install_cuda, uninstall

pytest.importorskip("tensorrt_rtx", reason="pip install 'stts-export[trt-rtx]'")

RTX = BuildSpec(backends=("tensorrt-rtx",), targets=("sm89",), max_frames=4, max_tokens=512)


def _fewer_graphs(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Build engines of these graphs alone from now on, to save time."""
    monkeypatch.setattr(tensorrt_rtx, "GRAPHS", names)


def test_engines_take_what_the_contract_says(rtx_bundle: Path):
    bundle = Bundle.open(rtx_bundle)
    bundle.check_hashes()
    activation = ACTIVATION[bundle.manifest.precision]
    vision, text = bundle.config.vision, bundle.config.text
    sets = {engines.target: engines for engines in bundle.engine_sets()}
    assert set(sets) == {"sm89", "sm120"}
    for engines in sets.values():
        assert set(engines.engines) == {
            "vision_lower", "vision_upper", "connector", "gather_windows", "decoder"
        }  # fmt: skip
        lower, upper = engines.engines["vision_lower"], engines.engines["vision_upper"]
        assert [(t.name, t.dtype, t.shape) for t in lower.inputs] == [
            ("frames", "uint8", (-1, 378, 378, 3)),
            ("fresh", "bool", (-1,)),
            ("prev_pooled", "float32", (1, 81, 64)),
        ]
        assert [(t.name, t.dtype) for t in lower.outputs] == [
            ("hidden", activation), ("scores", "float32"), ("last_pooled", "float32")
        ]  # fmt: skip
        assert lower.profiles[0]["fresh"] == Range((1,), (8,), (8,))
        assert upper.profiles[0]["segment"] == Range((1, 81), (8, 81), (8, 81))
        connector = engines.engines["connector"]
        assert [(t.name, t.dtype, t.shape) for t in connector.inputs] == [
            ("patches", activation, (-1, 2 * vision.hidden_size)),
            ("pooled_patches", "int32", (-1, 4)),
        ]
        assert connector.profiles[0]["patches"].max == (64 * 729, 2 * vision.hidden_size)
        gather = engines.engines["gather_windows"]
        assert gather.profiles[0]["hidden"].max == (16, 729, vision.hidden_size)
        decoder = engines.engines["decoder"]
        assert decoder.graph == "decoder-fixed"
        caches = [t for t in decoder.inputs if t.name.startswith("past_key_values")]
        cache = (1, text.num_kv_heads, 2048, text.head_dim)
        assert {(t.dtype, t.shape) for t in caches} == {(activation, cache)}
        assert len(caches) == 2 * text.num_layers
        (profile,) = decoder.profiles  # each would have weights of its own
        assert profile["input_ids"] == Range((1, 1), (1, 1024), (1, 2048))
        assert all(engines.path(name).stat().st_size > 10_000 for name in engines.engines)


@pytest.mark.parametrize(
    ("base", "format"), [("bf16", None), ("fp32", "int8"), ("fp16", "int8"), ("fp16", "fp8")]
)
def test_decoders_in_bf16_and_in_8_bits_are_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: Precision, format: Format | None
):
    """It fails where the last token is taken by a constant index: see `graphs.DecoderStep`."""
    model = random_model(small_config(**{"text_config.num_hidden_layers": 1}))
    layers = {}
    if format is not None:
        rule = LayerRule(("*",), format, "max")
        for name in layers_by_group(model.config)["decoder"]:
            shape = tuple(model.get_parameter(f"{name}.weight").shape)
            layers[name] = any_scales(shape, rule)
    export_graph(model, DECODER, Numerics(base, layers), tmp_path / GRAPH_FOLDER)
    _fewer_graphs(monkeypatch, DECODER)
    (target,) = tensorrt_rtx.targets(("sm89",))
    engines = engines_from_graphs(tmp_path, target, EngineSpec(model.config, base, 4, 128))
    assert engines.path(DECODER).stat().st_size > 10_000


def test_engines_come_first_among_the_targets(rtx_bundle: Path):
    assert Bundle.open(rtx_bundle).manifest.targets == (
        "tensorrt-rtx-1.7.1-sm89", "tensorrt-rtx-1.7.1-sm120", "onnxruntime"
    )  # fmt: skip


def test_inspect_lists_engines(rtx_bundle: Path, capsys):
    assert main(["inspect", str(rtx_bundle)]) == 0
    text = capsys.readouterr().out
    assert "vision_upper engine, tensorrt-rtx 1.7.1.116 for sm120 (" in text
    assert "profile bins 1x729x64..8x729x64, segment 1x81..8x81" in text
    assert text.count("as the network was, not read back from the engine") == 10
    assert main(["inspect", str(rtx_bundle), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)["engines"]["tensorrt-rtx-1.7.1-sm89"]
    assert (values["backend"], values["target"]) == ("tensorrt-rtx", "sm89")
    engine = values["engines"]["decoder"]
    assert (
        engine["bytes"]
        == (rtx_bundle / "engines/tensorrt-rtx-1.7.1-sm89/decoder.engine").stat().st_size
    )
    assert engine["profiles"][0]["input_ids"] == {"min": [1, 1], "opt": [1, 1024], "max": [1, 2048]}


@pytest.mark.parametrize("damage", ["missing", "unlisted", "incomplete"])
def test_a_bundle_with_damaged_engines_is_refused(rtx_bundle: Path, tmp_path: Path, damage: str):
    bundle = Path(shutil.copytree(rtx_bundle, tmp_path / "bundle"))
    engines = bundle / "engines/tensorrt-rtx-1.7.1-sm89"
    manifest = json.loads((bundle / "manifest.json").read_text())
    if damage == "missing":
        (engines / "decoder.engine").unlink()
    elif damage == "unlisted":
        del manifest["files"]["engines/tensorrt-rtx-1.7.1-sm89/decoder.engine"]
    else:
        values = json.loads((engines / "engines.json").read_text())
        del values["engines"]["decoder"]
        (engines / "engines.json").write_text(json.dumps(values))
        size = (engines / "engines.json").stat().st_size
        manifest["files"]["engines/tensorrt-rtx-1.7.1-sm89/engines.json"]["size"] = size
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    message = {
        "missing": "decoder.engine: is missing", "unlisted": "files lacks .*decoder.engine",
        "incomplete": "has engines for vision_lower",
    }[damage]  # fmt: skip
    with pytest.raises(InputError, match=message):
        describe(bundle)


@pytest.mark.parametrize("target", ["sm75", "sm87", "sm90", "sm100", "sm110", "8.9", ""])
def test_targets_that_it_does_not_build_for(target: str):
    with pytest.raises(InputError, match="allowed: sm80, sm86, sm89, sm120, sm121") as error:
        tensorrt_rtx.targets((target,))
    assert error.value.where == "tensorrt-rtx"
    assert "run another build, on the device, with --backend tensorrt" in str(error.value)


def test_without_a_target_the_gpu_of_the_machine_is_taken(monkeypatch: pytest.MonkeyPatch):
    install_cuda(monkeypatch, compute_capability=(8, 9))
    (target,) = tensorrt_rtx.targets(())
    assert (target.name, target.compute_capabilities) == ("sm89", ("SM89",))
    install_cuda(monkeypatch, compute_capability=(9, 0))
    with pytest.raises(InputError, match="target 'sm90'"):
        tensorrt_rtx.targets(())
    install_cuda(monkeypatch, driver=0)
    with pytest.raises(InputError, match="pass --target"):
        tensorrt_rtx.targets(())


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    uninstall(monkeypatch, "tensorrt_rtx")
    with pytest.raises(MissingDependencyError, match=r"stts-export\[trt-rtx\]"):
        tensorrt_rtx.targets(("sm89",))


def test_too_little_memory_is_one_error_and_no_engine(
    small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    _fewer_graphs(monkeypatch, "vision_lower", "decoder")
    arguments = ["build", str(small_bundle), "-o", str(tmp_path / "out"), "--target", "sm89"]
    assert main([*arguments, "--backend", "tensorrt-rtx", "--memory-limit", "1K"]) == 1
    printed = capsys.readouterr().err
    assert printed.count("error:") == 1
    assert "no tactics to implement the operation within workspace limit" in printed
    assert "allow more with --memory-limit" in printed
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.engine*"))


def test_an_interrupted_build_keeps_finished_engines(
    small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _fewer_graphs(monkeypatch, "gather_windows", "decoder")
    built: list[str] = []

    def interrupted(job, on_fraction):
        if job.engine.stem == "decoder" and "decoder" not in built:
            built.append("decoder")
            raise KeyboardInterrupt
        built.append(job.engine.stem)
        return run_job(job, on_fraction)

    monkeypatch.setattr(engine_build, "run_job", interrupted)
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        bundle_from_bundle(small_bundle, output, RTX)
    assert not output.exists()
    stages: list[tuple[str, int, int]] = []
    monkeypatch.setattr("stts_export.bundle._check_engines", lambda *_: None)  # two are missing
    bundle_from_bundle(small_bundle, output, RTX, on_stage=lambda *stage: stages.append(stage))
    assert built == ["gather_windows", "decoder", "decoder"]
    assert stages == [("copy the graphs", 1, 3), ("build decoder for tensorrt-rtx sm89", 3, 3)]
    (engines,) = Bundle.open(output).engine_sets()
    assert set(engines.engines) == {"gather_windows", "decoder"}
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert not list(output.rglob("*.partial"))


_WITHOUT = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime",
                                      "transformers", "safetensors"}:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
from stts_export.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_bundle_becomes_another_without_torch_or_onnx(small_bundle: Path, tmp_path: Path):
    output = tmp_path / "second"
    command = ["build", str(small_bundle), "-o", str(output), "--backend", "tensorrt-rtx"]
    limits = ["--target", "sm120", "--max-frames", "4", "--max-tokens", "256"]
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT, *command, *limits], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "[6/6] build decoder for tensorrt-rtx sm120" in done.stderr
    first, second = Bundle.open(small_bundle), Bundle.open(output)
    second.check_hashes()
    assert second.manifest.targets == ("tensorrt-rtx-1.7.1-sm120", "onnxruntime")
    assert (second.manifest.limits.max_frames, second.manifest.limits.max_tokens) == (4, 256)
    assert first.manifest.files.items() <= second.manifest.files.items()
    assert second.manifest.tool_versions["tensorrt-rtx"].startswith("1.7.")
    data = "onnx/decoder/model.onnx.data"
    assert not (output / data).samefile(small_bundle / data)
