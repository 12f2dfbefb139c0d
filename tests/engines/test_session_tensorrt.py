"""Sessions on engines: the same answers as ONNX Runtime's, and what goes wrong on other machines.

TensorRT and CUDA are stand-ins that run engines through ONNX Runtime on memory they guard.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stts_export import Session
from stts_export.build import BuildSpec, bundle_from_checkpoint
from stts_export.bundle import Bundle
from stts_export.engines.cuda import Memory, Stream
from stts_export.engines.runner import EngineError
from stts_export.errors import InputError, MissingDependencyError, SttsError
from stts_export.repro import Call, Difference, Recorder, write_repro
from stts_export.runtime import planner
from stts_export.tolerances import difference
from stts_export.verify import verify
from tests.engines.machines import RTX, Machine, build_engines, machine_of
from tests.engines.test_cuda import DlpackArray, Foreign
from tests.helpers import prompt_ids, random_checkpoint, random_frames
from tests.standins.fixtures import uninstall

MAX_FRAMES = 20


@pytest.fixture(scope="module")
def source(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = BuildSpec(precision="fp32", max_frames=MAX_FRAMES, max_tokens=400)
    folder = tmp_path_factory.mktemp("short") / "bundle"
    return bundle_from_checkpoint(small_checkpoint, folder, spec)


@pytest.fixture
def bundle(version: str, built: Callable[[str], Path]) -> Path:
    return built(version)


def _same(got: Any, expected: Any) -> None:
    np.testing.assert_array_equal(got.keep, expected.keep)
    assert difference(got.scores, expected.scores, "max") < 1e-5
    assert got.features.dtype == expected.features.dtype
    assert difference(got.features, expected.features, "max_rel") < 1e-5
    assert (got.prune_ratio, got.note) == (expected.prune_ratio, expected.note)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("refill", ["reference", "off"])
def test_clips_and_answers_equal_those_of_onnx_runtime(
    session: Session, reference: Session, ratio: float, refill: Any
):
    frames, prompt = random_frames(11, seed=3), prompt_ids(session.config, 11)
    clip = session.encode(frames, ratio, refill=refill)
    expected = reference.encode(frames, ratio, refill=refill)
    _same(clip, expected)
    answer = session.generate(clip, prompt, 5)
    assert answer.token_ids == reference.generate(expected, prompt, 5).token_ids
    assert answer.kept_windows == 66 - planner.n_prune(6, 11, ratio)
    logits = session.next_token_logits(clip, prompt)
    assert difference(logits, reference.next_token_logits(expected, prompt), "max_rel") < 1e-5
    assert set(answer.timings) == {
        "resize", "vision_lower", "select", "vision_upper", "prefill", "decode"
    }  # fmt: skip


@pytest.mark.parametrize("frames", [1, 2, 7, 8, 9, 16, 17, MAX_FRAMES])
def test_clips_of_any_length(session: Session, reference: Session, frames: int):
    """Chunks of 8 end before, at and after the end of the clip; so do chunks of bins."""
    clip = random_frames(frames, seed=frames)
    steps: list[tuple[str, int, int]] = []
    got = session.encode(clip, 0.5, on_progress=lambda *step: steps.append(step))
    _same(got, reference.encode(clip, 0.5))
    assert [step for step in steps if step[0] == "vision_lower"][-1][1:] == (frames, frames)
    uppers = [step for step in steps if step[0] == "vision_upper"]
    assert uppers[-1][1] == uppers[-1][2]


def test_masks_of_the_caller(session: Session, reference: Session):
    frames = random_frames(10, seed=5)
    keep = np.random.default_rng(0).random((10, 6)) < 0.4
    keep[3] = False
    keep[4] = True
    _same(session.encode(frames, keep=keep), reference.encode(frames, keep=keep))
    everything = np.ones((10, 6), bool)
    _same(session.encode(frames, keep=everything), reference.encode(frames, keep=everything))


def test_who_selects(session: Session, machine: Machine):
    calls: list[Call] = []
    session.runners = {n: Recorder(n, r, calls) for n, r in session.runners.items()}
    for settings, asked in (
        ({"prune_ratio": 0.5}, "select_pack"),
        ({"prune_ratio": 0.5, "refill": "off"}, "gather_windows"),
        ({"keep": np.eye(4, 6, dtype=bool)}, "gather_windows"),
    ):
        calls.clear()
        session.encode(random_frames(4), **settings)
        if machine.backend == "tensorrt-rtx":
            asked = "gather_windows"
        graphs = {call.graph for call in calls}
        assert graphs == {"vision_lower", asked, "vision_upper"}


def test_hidden_states_never_come_to_the_host(session: Session, machine: Machine):
    frames = random_frames(16)
    session.encode(frames, 0.5)
    before = len(machine.cuda.called("cudaMemcpyAsync"))
    session.encode(frames, 0.5)
    copies = machine.cuda.called("cudaMemcpyAsync")[before:]
    vision = session.config.vision
    per_frame = vision.windows * vision.patches_per_window * vision.hidden_size * 4
    to_host = [c["count"] for c in copies if int(c["kind"]) == 2]
    assert sum(to_host) < 16 * per_frame / 2
    assert max(to_host) < per_frame * 8


def test_nothing_is_allocated_once_a_clip_was_seen(session: Session, machine: Machine):
    frames, prompt = random_frames(9), prompt_ids(session.config, 9)

    def ask() -> None:
        session.generate(session.encode(frames, 0.5), prompt, 3)

    for _ in range(3):
        ask()
    counts = [len(machine.cuda.called(name)) for name in ("cudaMalloc", "cudaMallocHost")]
    ask()
    assert counts == [len(machine.cuda.called(name)) for name in ("cudaMalloc", "cudaMallocHost")]


def test_the_cache_is_updated_in_place_where_it_can_be(version: str, session: Session):
    runner = session.runners["decoder"]
    assert runner.updates_in_place == (version != "10.3")
    assert runner.cache_capacity == (None if version == "10.3" else 400)


def test_a_call_on_device_arrays_can_be_captured(session: Session):
    """As for CUDA graphs: nothing is waited for, copied from the host or allocated."""
    runner = session.runners["vision_upper"]
    config, engines = session.config, session._engines
    assert engines is not None
    G, D = config.vision.patches_per_window, config.vision.hidden_size
    bins, segment = runner.zeros((2, 6 * G, D), np.float32), runner.zeros((2, 6), np.int32)
    features = runner.zeros((2, 6, config.text.hidden_size), np.float32)
    tapped = runner.zeros((2, 6 * G, D * len(config.vision.taps)), np.float32)
    inputs = {"bins": bins, "segment": segment}
    outputs = {"packed_features": features, "tapped": tapped}
    assert runner(inputs, outputs) == {}
    of_zeros = features.to_host()
    with engines.stream.capture() as graph:
        runner(inputs, outputs)
    values = np.random.default_rng(0).standard_normal(bins.shape).astype(np.float32)
    bins.copy_from_host(values)
    np.testing.assert_array_equal(features.to_host(), of_zeros)
    graph.launch(engines.stream)
    expected = runner({"bins": values, "segment": np.zeros((2, 6), np.int32)})["packed_features"]
    np.testing.assert_array_equal(features.to_host(), expected)
    assert not np.array_equal(expected, of_zeros)
    graph.close()


def test_arrays_that_tensorrt_does_not_take_where_they_lie(
    built: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
):
    """Several of one size at once: each needs a copy of its own until the engine has run."""
    machine = machine_of(monkeypatch, "10.3")
    with machine.open(built("10.3")) as session:
        runner, config = session.runners["decoder"], session.config
        text, rng = config.text, np.random.default_rng(2)
        call = {
            "input_ids": np.array([[5]]),
            "features": np.zeros((1, text.hidden_size), np.float32),
            "visual_group": np.full((1, 1), -1, np.int32),
            "position_ids": np.array([[4]]),
            "cache_position": np.array([4]),
        }
        shape = (1, text.num_kv_heads, 5, text.head_dim)
        caches = {
            name: rng.standard_normal(shape).astype(np.float32)
            for name in runner._inputs  # type: ignore[attr-defined]
            if name not in call
        }
        expected = runner({**call, **caches})
        inputs, outputs = dict[str, Any](call), {}
        for name, values in caches.items():
            inputs[name] = runner.zeros((2, *shape[1:]), np.float32)[1:]
            inputs[name].copy_from_host(values)
        for name in expected:
            if name != "logits":
                outputs[name] = runner.zeros((2, *shape[1:]), np.float32)[1:]
                assert outputs[name].pointer % 256
        got = runner(inputs, outputs)
        np.testing.assert_array_equal(got["logits"], expected["logits"])
        for name, array in outputs.items():
            np.testing.assert_array_equal(array.to_host(), expected[name])
    machine.cuda.assert_clean()


def test_half_precision(small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spec = BuildSpec(precision="fp16", max_frames=9, max_tokens=200)
    half = bundle_from_checkpoint(small_checkpoint, tmp_path / "half", spec)
    bundle = build_engines(half, tmp_path / "engines", "11.4")
    machine = machine_of(monkeypatch, "11.4")
    frames, prompt = random_frames(9), prompt_ids(Bundle.open(half).config, 9)
    with Session.open(half, threads=1) as reference, machine.open(bundle) as session:
        got, expected = session.encode(frames, 0.5), reference.encode(frames, 0.5)
        assert got.features.dtype == np.float16
        np.testing.assert_array_equal(got.keep, expected.keep)
        assert difference(got.features, expected.features, "l2") < 2e-3
        answer = session.generate(got, prompt, 3)
        assert answer.token_ids == reference.generate(expected, prompt, 3).token_ids
    machine.cuda.assert_clean()


def test_closing_frees_all_memory_at_once(machine: Machine, bundle: Path):
    with machine.open(bundle) as session:
        clip = session.encode(random_frames(5), 0.5)
        session.generate(clip, prompt_ids(session.config, 5), 3)
        assert machine.cuda.live_bytes > 0
    machine.cuda.assert_clean()
    session.close()
    with pytest.raises(InputError, match="the session is closed"):
        session.encode(random_frames(5), 0.5)


def test_a_session_that_is_dropped_frees_all_memory(machine: Machine, bundle: Path):
    session = machine.open(bundle)
    session.encode(random_frames(2), 0.5)
    del session
    machine.cuda.assert_clean()


def test_frames_that_lie_on_the_device(session: Session, machine: Machine, reference: Session):
    frames = random_frames(9, seed=8)
    expected = reference.encode(frames, 0.5)
    theirs = Memory(Stream())
    array = theirs.empty(frames.shape, np.uint8)
    array.copy_from_host(frames)
    stream = session._engines.stream  # type: ignore[union-attr]
    lent = dataclasses.replace(array, stream=stream)
    for given in (array, Foreign(array), DlpackArray(lent)):
        _same(session.encode(given, 0.5), expected)
    before = len(machine.cuda.called("cudaMemcpyAsync"))
    session.encode(array, 0.5)
    copies = machine.cuda.called("cudaMemcpyAsync")[before:]
    to_device = [c["count"] for c in copies if int(c["kind"]) == 1]
    assert max(to_device) < frames[0].nbytes
    theirs.close()


def test_frames_on_the_device_must_have_the_models_size(session: Session):
    theirs = Memory(Stream())
    try:
        with pytest.raises(InputError, match="80 x 126 pixels in the memory") as error:
            session.encode(theirs.zeros((2, 80, 126, 3), np.uint8), 0.5)
        assert "84 x 126" in str(error.value)
        with pytest.raises(InputError, match="got float32 of shape"):
            session.encode(theirs.zeros((2, 84, 126, 3), np.float32), 0.5)
        frame = Foreign(theirs.zeros((84, 126, 3), np.uint8))
        with pytest.raises(InputError, match="a list of frames in the memory") as error:
            session.encode([frame, frame], 0.5)
        assert "one array of T frames" in str(error.value)
    finally:
        theirs.close()


def test_a_call_outside_the_profiles_says_what_would_fit(session: Session):
    runner = session.runners["gather_windows"]
    vision = session.config.vision
    shape = (MAX_FRAMES + 1, vision.windows * vision.patches_per_window, vision.hidden_size)
    hidden = runner.zeros(shape, np.float32)
    with pytest.raises(InputError, match=r"hidden has shape \(21, ") as error:
        runner({"hidden": hidden, "gather_window": np.zeros((1, 6), np.int32)})
    assert "to (20, " in str(error.value)
    assert "--max-frames" in str(error.value)


def test_inputs_of_another_kind_are_bugs(session: Session):
    runner = session.runners["gather_windows"]
    with pytest.raises(ValueError, match="inputs"):
        runner({})
    hidden = runner.zeros((2, 54, 24), np.float32)
    with pytest.raises(ValueError, match=r"gather_window is int64 \(1, 6\), not int32"):
        runner({"hidden": hidden, "gather_window": np.zeros((1, 6), np.int64)})
    with pytest.raises(ValueError, match=r"bins is \(1, 54, 24\), not \(2, 54, 24\)"):
        runner({"hidden": hidden, "gather_window": np.zeros((1, 6), np.int32)}, {"bins": hidden})


def test_what_tensorrt_says_is_in_the_message(session: Session, machine: Machine):
    machine.trt.standin.fail_execute = "Cask convolution execution"
    with pytest.raises(EngineError, match=r"vision_lower.*cannot be run: .*Cask convolution"):
        session.encode(random_frames(3), 0.5)
    machine.trt.standin.fail_execute = "CUDA out of memory"
    with pytest.raises(InputError, match="too little memory") as error:
        session.encode(random_frames(3), 0.5)
    assert "--max-frames" in str(error.value)
    machine.trt.standin.fail_execute = None
    assert session.encode(random_frames(3), 0.5).kept_windows == 9


def test_a_context_that_does_not_start(machine: Machine, bundle: Path):
    machine.trt.standin.fail_execute = "CUDA out of memory"
    with pytest.raises(InputError, match=r"does not start with profile 0, .*too little memory"):
        machine.open(bundle)
    machine.trt.standin.fail_execute = "illegal memory access"
    with pytest.raises(EngineError, match=r"profile 0: .*illegal memory access"):
        machine.open(bundle)
    machine.cuda.assert_clean()


def test_too_little_memory_for_a_clip(session: Session, machine: Machine, reference: Session):
    machine.cuda.total_memory = machine.cuda.live_bytes + 100_000
    with pytest.raises(InputError, match=r"do not fit: .* are free, this session holds"):
        session.encode(random_frames(MAX_FRAMES), 0.5)
    machine.cuda.total_memory = 1 << 30
    frames = random_frames(MAX_FRAMES)
    _same(session.encode(frames, 0.5), reference.encode(frames, 0.5))


def test_too_little_memory_for_the_engines(machine: Machine, bundle: Path):
    machine.cuda.total_memory = 100_000
    with pytest.raises(InputError, match=r"cannot be loaded.*OutOfMemory"):
        machine.open(bundle)
    machine.cuda.assert_clean()


def test_another_gpu_is_refused_with_both_named(
    version: str, bundle: Path, monkeypatch: pytest.MonkeyPatch
):
    other = machine_of(monkeypatch, version, compute_capability=(12, 0))
    with pytest.raises(InputError, match=r"has no engines for tensorrt\S* \S+ on sm120") as error:
        other.open(bundle)
    text = str(error.value)
    assert ("sm89" if version == RTX else "sm87") in text
    assert f"stts-export build {bundle} -o NEW_BUNDLE --backend {other.backend}" in text


def test_another_tensorrt_is_refused_with_both_named(
    built: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
):
    other = machine_of(monkeypatch, "10.16")
    with pytest.raises(InputError, match=r"has no engines for tensorrt 10\.16\.\S+ on") as error:
        other.open(built("10.3"))
    assert "tensorrt-10.3.0-sm87" in str(error.value)


def test_an_engine_that_does_not_load(machine: Machine, bundle: Path, tmp_path: Path):
    copy = Path(shutil.copytree(bundle, tmp_path / "b"))
    (file,) = copy.glob("engines/*/vision_upper.engine")
    file.write_bytes(b"x" * file.stat().st_size)
    with pytest.raises(InputError, match=r"vision_upper\.engine: cannot be loaded: ") as error:
        machine.open(copy)
    assert "stts-export build" in str(error.value)
    machine.cuda.assert_clean()


def test_an_engine_that_is_not_the_listed_one(machine: Machine, bundle: Path, tmp_path: Path):
    copy = Path(shutil.copytree(bundle, tmp_path / "b"))
    (listed,) = copy.glob("engines/*/engines.json")
    values = json.loads(listed.read_text())
    engines = values["engines"]
    engines["vision_lower"]["file"] = engines["vision_upper"]["file"]
    listed.write_text(json.dumps(values))
    manifest = json.loads((copy / "manifest.json").read_text())
    name = listed.relative_to(copy).as_posix()
    manifest["files"][name]["size"] = listed.stat().st_size
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"what engines\.json lists"):
        machine.open(copy)
    machine.cuda.assert_clean()


def test_a_machine_without_a_driver(version: str, bundle: Path, monkeypatch: pytest.MonkeyPatch):
    machine = machine_of(monkeypatch, version, driver=0)
    with pytest.raises(MissingDependencyError, match="no usable NVIDIA GPU") as error:
        machine.open(bundle)
    assert error.value.exit_code == 4


def test_a_machine_without_tensorrt(
    machine: Machine, bundle: Path, monkeypatch: pytest.MonkeyPatch
):
    uninstall(monkeypatch, "tensorrt", "tensorrt_rtx")
    with pytest.raises(MissingDependencyError, match=f"{machine.backend}: is not installed") as e:
        machine.open(bundle)
    assert "pip install" in str(e.value)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"device": "cpu"}, "device 'cpu'"),
        ({"device": "cuda:x"}, "device 'cuda:x'"),
        ({"device": "cuda:"}, "device 'cuda:'"),
        ({"threads": 1}, "1 threads"),
    ],
)
def test_settings_that_engines_do_not_have(
    machine: Machine, bundle: Path, settings: Any, text: str
):
    with pytest.raises(InputError, match=text) as error:
        machine.open(bundle, **settings)
    assert machine.backend in str(error.value)


def test_the_second_gpu(version: str, bundle: Path, monkeypatch: pytest.MonkeyPatch):
    machine = machine_of(monkeypatch, version, devices=2)
    with machine.open(bundle, device="cuda:1") as session:
        session.encode(random_frames(2), 0.5)
    assert {int(call["device"]) for call in machine.cuda.called("cudaSetDevice")} == {1}
    with pytest.raises(MissingDependencyError, match="cuda:2 of 2"):
        machine.open(bundle, device="cuda:2")


def test_a_plugin_that_is_missing(
    built: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    machine = machine_of(monkeypatch, "10.3")
    with pytest.raises(InputError, match=r"none\.so: is no file"):
        machine.open(built("10.3"), plugin=tmp_path / "none.so")
    machine.cuda.assert_clean()
    rtx = machine_of(monkeypatch, RTX)
    with pytest.raises(InputError, match="plugins of tensorrt only"):
        rtx.open(built(RTX), plugin=tmp_path / "none.so")


@pytest.mark.parametrize("lacks", ["tensorrt", "engines", "nothing"])
def test_what_fails_by_default_can_be_run_on_the_cpu(
    version: str, bundle: Path, monkeypatch: pytest.MonkeyPatch, lacks: str
):
    knobs = {"compute_capability": (12, 0)} if lacks == "engines" else {}
    machine = machine_of(monkeypatch, version, **knobs)
    if lacks == "tensorrt":
        uninstall(monkeypatch, "tensorrt", "tensorrt_rtx")
    threads = 1 if lacks == "nothing" else None
    with pytest.raises(SttsError) as default:
        Session.open(bundle, threads=threads)
    assert str(default.value).count("use --backend onnxruntime") == 1
    with pytest.raises(SttsError) as named:
        machine.open(bundle, threads=threads)
    assert "onnxruntime" not in str(named.value)
    opened = Bundle.open(bundle)
    manifest = dataclasses.replace(opened.manifest, targets=opened.manifest.targets[:1])
    monkeypatch.setattr(Bundle, "open", lambda _: dataclasses.replace(opened, manifest=manifest))
    with pytest.raises(SttsError) as alone:
        Session.open(bundle, threads=threads)
    assert "onnxruntime" not in str(alone.value)


def test_the_first_target_is_the_default(machine: Machine, bundle: Path, source: Path):
    first = Bundle.open(bundle).manifest.targets[0]
    with Session.open(bundle) as session:
        assert session.backend == ("onnxruntime" if first == "onnxruntime" else machine.backend)
    with pytest.raises(InputError, match=f"not built for back end '{machine.backend}'") as error:
        machine.open(source)
    assert f"--backend {machine.backend}" in str(error.value)


def test_a_model_without_a_scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spec = BuildSpec(precision="fp32", max_frames=6, max_tokens=200)
    checkpoint = random_checkpoint(tmp_path / "c", scorer=False)
    plain = bundle_from_checkpoint(checkpoint, tmp_path / "plain", spec)
    bundle = build_engines(plain, tmp_path / "engines", "10.3")
    machine = machine_of(monkeypatch, "10.3")
    frames, keep = random_frames(5), np.random.default_rng(1).random((5, 6)) < 0.5
    with Session.open(plain, threads=1) as reference, machine.open(bundle) as session:
        assert set(session.runners) == {"vision_lower", "vision_upper", "connector", "decoder"}
        for settings in ({}, {"keep": keep}, {"keep": keep, "refill": "off"}):
            got = session.encode(frames, **settings)
            expected = reference.encode(frames, **settings)
            np.testing.assert_array_equal(got.keep, expected.keep)
            assert difference(got.features, expected.features, "max_rel") < 1e-5
    machine.cuda.assert_clean()


def test_verify_on_engines(machine: Machine, bundle: Path, small_checkpoint: Path):
    report = verify(bundle, small_checkpoint, backend=machine.backend)
    assert report.passed
    assert report.backend == machine.backend
    names = {check.name for check in report.checks}
    on_device = {"windows unlike the planner's", "packed_features of gather_windows"}
    assert names & on_device == (on_device if machine.backend == "tensorrt" else set())
    machine.cuda.assert_clean()


def test_what_reproduces_a_difference_names_the_engine(
    machine: Machine, bundle: Path, tmp_path: Path
):
    """A prompt is in the decoder's second profile; a prompt of one token is in the first."""
    opened = Bundle.open(bundle)
    calls: list[Call] = []
    with machine.open(bundle) as session:
        session.runners["decoder"] = Recorder("decoder", session.runners["decoder"], calls)
        clip = session.encode(random_frames(2), 0.5)
        session.next_token_logits(clip, prompt_ids(session.config, 2))
    (call,) = calls
    short = {
        name: value[..., :1] if name in ("input_ids", "visual_group", "position_ids") else value
        for name, value in call.inputs.items()
    }
    short["features"] = short["features"][:1]
    is_rtx = machine.backend == "tensorrt-rtx"
    for number, inputs in enumerate((short, call.inputs)):
        logits = {"logits": call.outputs["logits"]}
        entry = Difference(Call("decoder", inputs, logits), logits, 2.0)
        (folder,) = write_repro(tmp_path / str(number), opened, machine.backend, [entry])
        script = (folder / "reproduce.sh").read_text()
        engine = f'polygraphy run "$BUNDLE/engines/{opened.engine_sets()[0].folder.name}/decoder'
        # Engines of RTX have one profile for tokens and prompts.
        profile = 0 if is_rtx else number
        options = f"--model-type engine --trt --optimization-profile {profile} --data-loader-script"
        assert f'{engine}.engine" {options} inputs.py' in script
        assert 'polygraphy run "$BUNDLE/onnx/decoder/model.onnx" --onnxrt' in script
    assert ("export POLYGRAPHY_USE_TENSORRT_RTX=1" in script) == is_rtx
