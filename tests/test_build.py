"""Building: resuming, refusing, and never leaving half a bundle under the final name."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import stts_export.build as building
from stts_export import Session
from stts_export.build import BuildSpec, bundle_from_bundle, bundle_from_checkpoint
from stts_export.bundle import GRAPH_FOLDER, WITHOUT_WEIGHTS, Bundle, sha256
from stts_export.engines import engine_build
from stts_export.engines.engine_build import engine_specs
from stts_export.engines.engine_set import EngineInfo, EngineSet
from stts_export.engines.network import Built, EngineJob
from stts_export.errors import InputError, MissingDependencyError, VerificationError
from stts_export.files import write_json
from stts_export.graphs import export
from stts_export.tensors import DATA_FILE, graph_file, graph_specs
from tests.helpers import prompt_ids, random_checkpoint, random_frames


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the graphs that are exported from now on."""
    done: list[str] = []
    real = export.export_graph

    def recording(model, graph, *rest):
        done.append(graph)
        return real(model, graph, *rest)

    monkeypatch.setattr(export, "export_graph", recording)
    return done


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds write stand-ins for graphs from now on."""
    monkeypatch.setattr(building, "graphs_from_checkpoint", _stand_ins)


def _stand_ins(source, folder, numerics, *_):
    for name in graph_specs(source.config, numerics.precision):
        file = folder / GRAPH_FOLDER / graph_file(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"graph")
        if name not in WITHOUT_WEIGHTS:
            file.with_name(DATA_FILE).write_bytes(b"weights")


def _during_the_build(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    def graphs(source, folder, numerics, *_):
        _stand_ins(source, folder, numerics)
        action()

    monkeypatch.setattr(building, "graphs_from_checkpoint", graphs)


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _failing(monkeypatch: pytest.MonkeyPatch, graph: str, error: Exception) -> Callable[[], None]:
    real = export.export_graph

    def failing(model, name, *rest):
        if name == graph:
            raise error
        return real(model, name, *rest)

    monkeypatch.setattr(export, "export_graph", failing)
    return lambda: monkeypatch.setattr(export, "export_graph", real)


def test_an_interrupted_build_goes_on_where_it_stopped(
    tmp_path: Path, small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, recorded: list[str]
):
    output = tmp_path / "bundle"
    restore = _failing(monkeypatch, "decoder", KeyboardInterrupt())  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        bundle_from_checkpoint(small_checkpoint, output)
    restore()
    assert not output.exists()
    lower = ["vision_lower", "vision_lower-decomposed"]
    upper = ["vision_upper", "vision_upper-decomposed", "vision_upper-frames"]
    connector = ["connector", "connector-decomposed"]
    assert recorded == lower + upper + connector
    recorded.clear()
    stages: list[tuple[str, int, int]] = []
    bundle_from_checkpoint(small_checkpoint, output, on_stage=lambda *stage: stages.append(stage))
    assert recorded == [
        "decoder", "decoder-decomposed", "decoder-split", "select_pack", "gather_windows"
    ]  # fmt: skip
    assert stages == [
        (f"{graph}: export and compare with PyTorch", number, 6)
        for number, graph in ((4, "decoder"), (5, "select_pack"), (6, "gather_windows"))
    ]
    Bundle.open(output).check_hashes()
    assert _names(tmp_path) == {"bundle"}
    assert _names(output) == {"manifest.json", "config", "onnx"}


def test_another_spec_does_not_resume(
    tmp_path: Path, small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, recorded: list[str]
):
    output = tmp_path / "bundle"
    restore = _failing(
        monkeypatch, "vision_upper", OSError(errno.ENOSPC, "No space left on device")
    )
    with pytest.raises(InputError):
        bundle_from_checkpoint(small_checkpoint, output)
    restore()
    recorded.clear()
    bundle_from_checkpoint(small_checkpoint, output, BuildSpec(precision="fp16"))
    assert recorded[0] == "vision_lower"
    assert Bundle.open(output).manifest.precision == "fp16"


def test_another_checkpoint_of_the_same_sizes_and_times_does_not_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: list[str]
):
    output, folder = tmp_path / "bundle", random_checkpoint(tmp_path / "c")
    for path in folder.iterdir():
        os.utime(path, (10**9, 10**9))
    restore = _failing(monkeypatch, "decoder", KeyboardInterrupt())  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        bundle_from_checkpoint(folder, output)
    restore()
    recorded.clear()
    random_checkpoint(folder, seed=1)
    for path in folder.iterdir():
        os.utime(path, (10**9, 10**9))
    bundle_from_checkpoint(folder, output)
    assert recorded[0] == "vision_lower"


def test_another_exporter_does_not_resume(
    tmp_path: Path, small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, recorded: list[str]
):
    output = tmp_path / "bundle"
    restore = _failing(monkeypatch, "vision_upper", KeyboardInterrupt())  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        bundle_from_checkpoint(small_checkpoint, output)
    restore()
    recorded.clear()
    monkeypatch.setattr("onnxscript.__version__", "99")
    bundle_from_checkpoint(small_checkpoint, output)
    assert recorded[0] == "vision_lower"


@pytest.mark.parametrize("when", ["before the last graph", "after it"])
def test_a_checkpoint_that_is_replaced_during_the_build_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
):
    folder = random_checkpoint(tmp_path / "c")

    def replace_weights() -> None:
        random_checkpoint(folder, seed=1)
        if when != "after it":
            raise VerificationError("report this export")

    _during_the_build(monkeypatch, replace_weights)
    with pytest.raises(InputError, match=r"was changed while it was read: .*model\.safetensors"):
        bundle_from_checkpoint(folder, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_full_disk_is_one_message_and_no_bundle(
    tmp_path: Path, small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    output = tmp_path / "bundle"
    _failing(monkeypatch, "decoder", OSError(errno.ENOSPC, "No space left on device", "x.data"))
    with pytest.raises(InputError, match="No space left") as error:
        bundle_from_checkpoint(small_checkpoint, output)
    assert "keeps what is done" in str(error.value)
    assert not output.exists()


def test_too_little_space_is_found_before_the_work(
    tmp_path: Path, small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, recorded: list[str]
):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"0\.0 MB free"):
        bundle_from_checkpoint(small_checkpoint, tmp_path / "bundle")
    assert recorded == []
    assert _names(tmp_path) == set()


@pytest.mark.usefixtures("quick")
def test_an_existing_bundle_is_replaced_only_by_force(tmp_path: Path, small_bundle: Path):
    output = Path(shutil.copytree(small_bundle, tmp_path / "bundle"))
    folder = random_checkpoint(tmp_path / "checkpoint", seed=5)
    before = Bundle.open(output).manifest
    with pytest.raises(InputError, match="--force"):
        bundle_from_checkpoint(folder, output)
    assert Bundle.open(output).manifest == before
    bundle_from_checkpoint(folder, output, force=True)
    assert Bundle.open(output).manifest.files != before.files
    assert _names(tmp_path) == {"bundle", "checkpoint"}


@pytest.mark.parametrize("manifest", [None, "", '{"name": "my web site", "icons": []}'])
@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_bundle_is_never_removed(
    tmp_path: Path, small_checkpoint: Path, manifest: str | None, force: bool
):
    output = tmp_path / "thesis"
    output.mkdir()
    (output / "chapter1.tex").write_text("...")
    if manifest is not None:
        (output / "manifest.json").write_text(manifest)
    with pytest.raises(InputError, match="not a bundle") as error:
        bundle_from_checkpoint(small_checkpoint, output, force=force)
    assert "--force" not in str(error.value)
    assert (output / "chapter1.tex").exists()


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_a_partial_that_is_not_ours_is_never_removed(
    tmp_path: Path, small_checkpoint: Path, kind: str
):
    mine = tmp_path / "elsewhere"
    mine.mkdir()
    (mine / "build.json").write_text("{}")
    partial = tmp_path / "thesis.partial"
    if kind == "folder":
        partial.mkdir()
        (partial / "chapter1.tex").write_text("...")
    elif kind == "file":
        partial.write_text("...")
    else:
        partial.symlink_to(mine)
    with pytest.raises(InputError, match=r"thesis\.partial: exists and is not an unfinished build"):
        bundle_from_checkpoint(small_checkpoint, tmp_path / "thesis")
    assert partial.exists()
    assert kind != "folder" or (partial / "chapter1.tex").exists()
    assert _names(mine) == {"build.json"}


@pytest.mark.usefixtures("quick")
def test_an_empty_working_folder_is_used(tmp_path: Path, small_checkpoint: Path):
    (tmp_path / "bundle.partial").mkdir()
    bundle_from_checkpoint(small_checkpoint, tmp_path / "bundle")
    assert _names(tmp_path) == {"bundle"}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("checkpoint", "output"),
    [("m.partial", "m"), ("m", "m"), ("m/step5", "m"), ("m", "m/bundle"), ("m.partial/a", "m")],
)
@pytest.mark.parametrize("force", [False, True])
def test_the_checkpoint_is_never_written_to(
    tmp_path: Path, small_checkpoint: Path, checkpoint: str, output: str, force: bool
):
    folder = Path(shutil.copytree(small_checkpoint, tmp_path / checkpoint))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(InputError, match="overlaps the checkpoint"):
        bundle_from_checkpoint(folder, tmp_path / output, force=force)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.usefixtures("quick")
def test_weights_that_are_links_into_the_output_are_kept(
    tmp_path: Path, small_checkpoint: Path, small_bundle: Path
):
    output = Path(shutil.copytree(small_bundle, tmp_path / "bundle"))
    folder = Path(shutil.copytree(small_checkpoint, tmp_path / "checkpoint"))
    (folder / "model.safetensors").rename(output / "weights")
    (folder / "model.safetensors").symlink_to(output / "weights")
    with pytest.raises(InputError, match="overlaps the checkpoint"):
        bundle_from_checkpoint(folder, output, force=True)
    assert (output / "weights").exists()


@pytest.mark.parametrize("force", [False, True])
def test_an_output_that_appears_during_the_build_is_kept(
    tmp_path: Path, small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, force: bool
):
    output = tmp_path / "bundle"

    def appear() -> None:
        output.mkdir()
        (output / "chapter1.tex").write_text("...")

    _during_the_build(monkeypatch, appear)
    with pytest.raises(InputError, match="not a bundle"):
        bundle_from_checkpoint(small_checkpoint, output, force=force)
    assert (output / "chapter1.tex").exists()


def test_the_old_bundle_stays_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, small_checkpoint: Path, small_bundle: Path, monkeypatch: pytest.MonkeyPatch
):
    output = Path(shutil.copytree(small_bundle, tmp_path / "bundle"))
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "bundle.partial":
            raise OSError(errno.EIO, "Input/output error", str(target))
        return rename(self, target)

    _during_the_build(monkeypatch, lambda: monkeypatch.setattr(Path, "rename", failing))
    with pytest.raises(InputError, match="Input/output error"):
        bundle_from_checkpoint(small_checkpoint, output, force=True)
    Bundle.open(output).check_hashes()
    assert _names(tmp_path) == {"bundle", "bundle.partial"}
    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(building, "graphs_from_checkpoint", _stand_ins)
    bundle_from_checkpoint(small_checkpoint, output, force=True)
    assert _names(tmp_path) == {"bundle"}


def test_two_builds_of_one_bundle(
    tmp_path: Path, small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    output = tmp_path / "bundle"
    refused = []

    def second() -> None:
        monkeypatch.setattr(building, "graphs_from_checkpoint", _stand_ins)
        with pytest.raises(InputError, match="another build") as error:
            bundle_from_checkpoint(small_checkpoint, output, BuildSpec(precision="fp16"))
        refused.append(error)

    _during_the_build(monkeypatch, second)
    bundle_from_checkpoint(small_checkpoint, output)
    assert refused
    assert Bundle.open(output).manifest.precision == "fp32"
    assert _names(tmp_path) == {"bundle"}


@pytest.mark.usefixtures("quick")
def test_the_lock_of_a_dead_build_does_not_matter(tmp_path: Path, small_checkpoint: Path):
    partial = tmp_path / "bundle.partial"
    partial.mkdir()
    with (partial / "build.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
    bundle_from_checkpoint(small_checkpoint, tmp_path / "bundle")
    assert _names(tmp_path) == {"bundle"}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("output", "message"),
    [
        (".", "not the name of a new folder"),
        ("..", "not the name of a new folder"),
        ("/", "not the name of a new folder"),
        ("file", "not a bundle"),
        ("file/b", "file: is not a folder"),
        ("file/b/c", "file: is not a folder"),
        ("link", "is a symbolic link"),
        ("dangling", "is a symbolic link"),
        ("dangling/b", "dangling: is not a folder"),
        ("x" * 250, "too long"),
        ("x" * 300, "too long"),
        ("caf\udce9", "not UTF-8"),
    ],
)
def test_odd_outputs(
    tmp_path: Path,
    small_checkpoint: Path,
    small_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    output: str,
    message: str,
    force: bool,
):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("...")
    Path("link").symlink_to(small_bundle)
    Path("dangling").symlink_to("nowhere")
    with pytest.raises(InputError, match=message):
        bundle_from_checkpoint(small_checkpoint, Path(output), force=force)
    assert _names(tmp_path) == {"file", "link", "dangling"}
    Bundle.open(small_bundle)


@pytest.mark.usefixtures("quick")
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path, small_checkpoint: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="cannot be written: Permission denied"):
        bundle_from_checkpoint(small_checkpoint, tmp_path / "bundle")
    tmp_path.chmod(0o700)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("LICENSE", "cannot be read"),
        ("/elsewhere/tokenizer.json", "cannot be read"),
        (None, "cannot be written"),
    ],
)
def test_reading_and_writing_errors_are_told_apart(
    tmp_path: Path,
    small_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str | None,
    message: str,
):
    name = str(small_checkpoint / file) if file else None

    def fail() -> None:
        raise PermissionError(errno.EACCES, "Permission denied", name)

    _during_the_build(monkeypatch, fail)
    with pytest.raises(InputError, match=f"{message}: Permission denied") as error:
        bundle_from_checkpoint(small_checkpoint, tmp_path / "bundle")
    assert "free space" not in str(error.value)


@pytest.mark.usefixtures("quick")
def test_more_space_is_not_asked_for_where_nothing_can_be_written(small_checkpoint: Path):
    with pytest.raises(InputError, match="cannot be written") as error:
        bundle_from_checkpoint(small_checkpoint, Path("/proc/x"))
    assert error.value.fix == "choose another folder"


def test_a_bundle_is_not_a_checkpoint(tmp_path: Path, small_bundle: Path):
    with pytest.raises(InputError, match="is a bundle already"):
        bundle_from_checkpoint(small_bundle, tmp_path / "bundle")


def _without_a_tensor(folder: Path) -> str:
    tensors = load_file(folder / "model.safetensors")
    name = max(tensors)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return re.escape(name)


def _with_a_wrong_shape(folder: Path) -> str:
    tensors = load_file(folder / "model.safetensors")
    name = max(tensors)
    tensors[name] = tensors[name][:1]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return f"{re.escape(name)} has shape"


def _cut_short(folder: Path) -> str:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return r"model\.safetensors: cannot be read"


def _with_bad_num_frames(folder: Path) -> str:
    (folder / "video_preprocessor_config.json").write_text('{"num_frames": 0}')
    return r"video_preprocessor_config\.json: num_frames is 0"


def _with_a_bad_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.json").write_text("{}")
    return r"tokenizer\.json"


def _removed(folder: Path) -> str:
    shutil.rmtree(folder)
    return "no such folder"


@pytest.mark.parametrize(
    "damage",
    [
        _removed,
        _without_a_tensor,
        _with_a_wrong_shape,
        _cut_short,
        _with_bad_num_frames,
        _with_a_bad_tokenizer,
    ],
)
def test_a_bad_checkpoint_leaves_nothing_behind(
    tmp_path: Path, small_checkpoint: Path, damage: Callable[[Path], str]
):
    folder = Path(shutil.copytree(small_checkpoint, tmp_path / "checkpoint"))
    message = damage(folder)
    with pytest.raises(InputError, match=message):
        bundle_from_checkpoint(folder, tmp_path / "out" / "bundle")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "values",
    [{"backends": ("openvino",)}, {"backends": ()}, {"max_frames": 0}],
)
def test_specs_refuse_nonsense(values):
    with pytest.raises(InputError, match="allowed"):
        BuildSpec(**values)


def test_a_recipe_that_is_not_there_is_told_before_a_checkpoint_is_looked_for(tmp_path: Path):
    with pytest.raises(InputError, match=r"no recipe 'int3'.*did you mean"):
        bundle_from_checkpoint("nobody/nothing", tmp_path / "bundle", BuildSpec(precision="int3"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnxscript", "onnx_ir", "ml_dtypes", "onnxruntime"])
def test_a_missing_exporter_says_how_to_install_it(
    tmp_path: Path, small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, package: str
):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=r"stts-export\[cpu,export\]"):
        bundle_from_checkpoint(small_checkpoint, tmp_path / "bundle")
    assert _names(tmp_path) == set()


@pytest.mark.usefixtures("quick")
def test_sampling_limits_come_from_the_checkpoint_unless_given(
    tmp_path: Path, small_checkpoint: Path
):
    folder = Path(shutil.copytree(small_checkpoint, tmp_path / "checkpoint"))
    (folder / "video_preprocessor_config.json").write_text(
        json.dumps({"num_frames": 384, "max_fps": 4})
    )
    limits = Bundle.open(bundle_from_checkpoint(folder, tmp_path / "a")).manifest.limits
    assert (limits.max_frames, limits.max_fps) == (384, 4.0)
    bundle = bundle_from_checkpoint(folder, tmp_path / "b", BuildSpec(max_frames=7))
    assert Bundle.open(bundle).manifest.limits.max_frames == 7


@pytest.mark.parametrize("values", [{"bad": object()}, {"fine": 1}])
def test_json_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, object]
):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises((OSError, TypeError)):
        write_json(tmp_path / "report.json", values)
    assert _names(tmp_path) == set()


def test_a_checkpoint_without_a_scorer_runs_unpruned(tmp_path: Path):
    folder = random_checkpoint(tmp_path / "plain", scorer=False)
    bundle_from_checkpoint(folder, tmp_path / "bundle")
    with Session.open(tmp_path / "bundle", threads=1) as session:
        clip = session.encode(random_frames(3))
        assert clip.scores is None
        assert clip.kept_windows == clip.total_windows == 18
        assert clip.note is not None
        assert "no scorer" in clip.note
        session.generate(clip, prompt_ids(session.config, 3), 2)
        with pytest.raises(InputError, match="no scorer"):
            session.encode(random_frames(3), 0.5)


RTX = ("tensorrt-rtx",)


def _quick_engine(job: EngineJob, on_fraction: object = None) -> Built:
    """Write a stand-in for an engine."""
    job.engine.write_bytes(b"engine")
    return Built((), (), job.profiles)


@pytest.fixture
def quick_engines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Engines are stand-ins, and their names listed here, from now on."""
    built: list[str] = []

    def quick(job: EngineJob, on_fraction: object = None) -> Built:
        built.append(job.engine.stem)
        return _quick_engine(job)

    monkeypatch.setattr(engine_build, "run_job", quick)
    return built


@pytest.fixture
def no_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines are listed, and stand-ins for files, from now on."""

    def quick(folder, target, spec, on_stage=None, on_fraction=None):
        engines = EngineSet(
            folder / "engines" / target.folder, target.backend, target.version, target.name,
            {
                name: EngineInfo(f"{name}.engine", graph.name, graph.inputs[:0], (), (), "")
                for name, graph in engine_specs(target, spec).items()
            },
        )  # fmt: skip
        engines.folder.mkdir(parents=True, exist_ok=True)
        for name in engines.engines:
            engines.path(name).write_bytes(b"engine")
        engines.write()
        return engines

    monkeypatch.setattr(building, "engines_from_graphs", quick)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"precision": "fp16"}, "precision fp16, but the bundle's graphs are fp32"),
        ({"max_frames": 65}, "max_frames is 65\n  allowed: up to 64"),
        ({"max_tokens": 8193}, "max_tokens is 8193\n  allowed: up to 8192"),
        ({"targets": ("sm87",)}, "target 'sm87'"),
        ({"backends": ("onnxruntime",), "targets": ()}, "nothing to build"),
    ],
)
def test_what_a_bundle_does_not_have_is_refused(
    tmp_path: Path, small_bundle: Path, spec: dict[str, Any], message: str
):
    wanted = BuildSpec(**{"backends": RTX, "targets": ("sm89",), **spec})
    with pytest.raises(InputError, match=message):
        bundle_from_bundle(small_bundle, tmp_path / "out", wanted)
    assert _names(tmp_path) == set()


@pytest.mark.usefixtures("no_engines")
def test_limits_of_a_bundle_may_be_narrowed_and_not_widened(tmp_path: Path, small_bundle: Path):
    spec = BuildSpec(backends=RTX, targets=("sm89",), max_frames=9, min_prune_ratio=0.3)
    first = bundle_from_bundle(small_bundle, tmp_path / "first", spec)
    limits = Bundle.open(first).manifest.limits
    assert (limits.max_frames, limits.max_tokens, limits.min_prune_ratio) == (9, 1170, 0.3)
    with pytest.raises(InputError, match=r"min_prune_ratio is 0\.1\n  allowed: 0\.3 or more"):
        bundle_from_bundle(first, tmp_path / "second", replace(spec, min_prune_ratio=0.1))


@pytest.mark.usefixtures("no_engines")
def test_the_first_back_end_that_is_asked_for_comes_first(tmp_path: Path, small_bundle: Path):
    spec = BuildSpec(backends=("onnxruntime", *RTX), targets=("sm120", "sm89"))
    output = bundle_from_bundle(small_bundle, tmp_path / "out", spec)
    names = [name.rpartition("-")[2] for name in Bundle.open(output).manifest.targets]
    assert names == ["onnxruntime", "sm120", "sm89"]


def test_a_file_that_was_changed_is_not_passed_on(
    tmp_path: Path, small_bundle: Path, quick_engines: list[str]
):
    source = Path(shutil.copytree(small_bundle, tmp_path / "source"))
    weights = source / "onnx/decoder/model.onnx.data"
    good = weights.read_bytes()
    content = bytearray(good)
    content[5000] ^= 1
    weights.write_bytes(content)
    spec = BuildSpec(backends=RTX, targets=("sm89",))
    with pytest.raises(VerificationError, match=r"decoder/model\.onnx\.data: was changed"):
        bundle_from_bundle(source, tmp_path / "out", spec)
    assert not (tmp_path / "out").exists()
    assert quick_engines == []
    weights.write_bytes(good)
    Bundle.open(bundle_from_bundle(source, tmp_path / "out", spec)).check_hashes()
    assert _names(tmp_path) == {"source", "out"}


def test_a_copy_that_is_changed_meanwhile_is_not_published(
    tmp_path: Path, small_bundle: Path, monkeypatch: pytest.MonkeyPatch
):
    def change(job: EngineJob, _: object = None) -> Built:
        job.onnx.write_bytes(b"other")
        return _quick_engine(job)

    monkeypatch.setattr(engine_build, "run_job", change)
    spec = BuildSpec(backends=RTX, targets=("sm89",))
    with pytest.raises(VerificationError, match=r"out\.partial/onnx.*changed while the engines"):
        bundle_from_bundle(small_bundle, tmp_path / "out", spec)
    assert not (tmp_path / "out").exists()


def test_a_source_with_other_limits_does_not_resume(
    tmp_path: Path, small_bundle: Path, quick_engines: list[str], monkeypatch: pytest.MonkeyPatch
):
    """Its graphs are the same, so only the limits tell."""
    spec = BuildSpec(backends=RTX, targets=("sm89",))
    source, output = tmp_path / "source", tmp_path / "out"
    bundle_from_bundle(small_bundle, source, replace(spec, max_frames=16, max_tokens=300))

    def full(job: EngineJob, _: object = None) -> Built:
        if job.engine.stem == "decoder":
            raise OSError(errno.ENOSPC, "No space left on device", str(job.engine))
        return _quick_engine(job)

    with monkeypatch.context() as patch:
        patch.setattr(engine_build, "run_job", full)
        with pytest.raises(InputError, match="No space left"):
            bundle_from_bundle(source, output, spec)
    narrow = replace(spec, max_frames=4, max_tokens=200)
    bundle_from_bundle(small_bundle, source, narrow, force=True)
    quick_engines.clear()
    bundle_from_bundle(source, output, spec)
    assert quick_engines == [
        "vision_lower", "vision_upper", "connector", "gather_windows", "decoder"
    ]  # fmt: skip
    bundle = Bundle.open(output)
    (engines,) = bundle.engine_sets()
    assert bundle.manifest.limits.max_frames == 4
    assert engines.engines["vision_lower"].profiles[0]["fresh"].max == (4,)


@pytest.mark.parametrize("name", ["onnx/../../evil.txt", "config/manifest.json"])
@pytest.mark.usefixtures("no_engines")
def test_odd_names_in_the_manifest_of_a_source(tmp_path: Path, small_bundle: Path, name: str):
    source = Path(shutil.copytree(small_bundle, tmp_path / "in" / "source"))
    (source / name).write_text("{}")
    manifest = json.loads((source / "manifest.json").read_text())
    digest = sha256(source / name)
    manifest["files"][name] = {"size": 2, "sha256": digest}
    (source / "manifest.json").write_text(json.dumps(manifest))
    output = tmp_path / "to" / "out"
    spec = BuildSpec(backends=RTX, targets=("sm89",))
    if ".." in name:
        with pytest.raises(InputError, match="paths below the bundle"):
            bundle_from_bundle(source, output, spec)
        assert not list(tmp_path.glob("to/**/evil.txt"))
    else:
        bundle = Bundle.open(bundle_from_bundle(source, output, spec))
        assert bundle.manifest.files[name]["sha256"] == digest


@pytest.mark.usefixtures("quick", "no_engines")
@pytest.mark.parametrize(
    ("values", "tokens"),
    [
        ({}, 64 * 6 + 64 * 12 + 1024),
        ({"max_frames": 10, "min_prune_ratio": 0.5}, 30 + 120 + 1024),
        ({"max_frames": 1000}, 8192),  # the model's longest
        ({"max_tokens": 5000}, 5000),
        ({"backends": ("onnxruntime",), "targets": ()}, 8192),
    ],
)
def test_engines_hold_no_longer_sequence_than_a_clip_needs(
    tmp_path: Path, small_checkpoint: Path, values: dict[str, Any], tokens: int
):
    spec = BuildSpec(**{"backends": RTX, "targets": ("sm89",), **values})
    bundle = Bundle.open(bundle_from_checkpoint(small_checkpoint, tmp_path / "out", spec))
    assert bundle.manifest.limits.max_tokens == tokens


@pytest.mark.usefixtures("quick", "no_engines")
def test_clips_that_engines_cannot_take_are_refused_first(tmp_path: Path, small_checkpoint: Path):
    spec = BuildSpec(backends=RTX, targets=("sm89",), max_frames=4097)
    with pytest.raises(InputError, match="max_frames is 4097\n  allowed: up to 4096"):
        bundle_from_checkpoint(small_checkpoint, tmp_path / "out", spec)
    assert _names(tmp_path) == set()
    bundle_from_checkpoint(small_checkpoint, tmp_path / "out", replace(spec, max_frames=4096))


@pytest.mark.usefixtures("quick", "no_engines")
def test_images_that_engines_cannot_take_are_refused_first(tmp_path: Path, small_checkpoint: Path):
    checkpoint = Path(shutil.copytree(small_checkpoint, tmp_path / "c"))
    settings = checkpoint / "preprocessor_config.json"
    settings.write_text('{"max_crops": 64}')
    spec = BuildSpec(backends=RTX, targets=("sm89",))
    with pytest.raises(InputError, match="max_crops of images is 64\n  allowed: up to 63 in eng"):
        bundle_from_checkpoint(checkpoint, tmp_path / "out", spec)
    assert _names(tmp_path) == {"c"}
    bundle = bundle_from_checkpoint(checkpoint, tmp_path / "cpu", BuildSpec())
    with pytest.raises(InputError, match="max_crops of images is 64"):
        bundle_from_bundle(bundle, tmp_path / "out", spec)
    settings.write_text('{"max_crops": 63}')
    bundle_from_checkpoint(checkpoint, tmp_path / "out", spec)


@pytest.mark.parametrize("output", ["m", "m/inside"])
@pytest.mark.parametrize("force", [False, True])
def test_the_bundle_that_is_read_is_never_written_to(
    tmp_path: Path, small_bundle: Path, output: str, force: bool
):
    source = Path(shutil.copytree(small_bundle, tmp_path / "m"))
    spec = BuildSpec(backends=RTX, targets=("sm89",))
    with pytest.raises(InputError, match="overlaps the bundle"):
        bundle_from_bundle(source, tmp_path / output, spec, force=force)
    Bundle.open(source).check_hashes()


def test_space_for_engines_is_counted(
    tmp_path: Path, small_bundle: Path, monkeypatch: pytest.MonkeyPatch
):
    size = sum(path.stat().st_size for path in small_bundle.rglob("*") if path.is_file())
    usage = shutil.disk_usage(tmp_path)._replace(free=2 * size)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    spec = BuildSpec(backends=RTX, targets=("sm89", "sm120"))
    with pytest.raises(InputError, match="MB free"):
        bundle_from_bundle(small_bundle, tmp_path / "out", spec)
    assert _names(tmp_path) == set()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"targets": ("sm89",)}, "target sm89 is of no use to onnxruntime"),
        ({"memory_limit": 5}, "add --backend tensorrt or tensorrt-rtx"),
        ({"plugin": Path("x.so"), "backends": RTX}, "plugin x.so is of no use to tensorrt-rtx"),
        ({"memory_limit": 0, "backends": RTX}, "memory_limit is 0"),
        ({"memory_limit": 2**63, "backends": RTX}, f"allowed: up to {2**63 - 1}"),
        ({"max_tokens": 0}, "max_tokens is 0"),
    ],
)
def test_options_that_nothing_would_use_are_refused(values: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        BuildSpec(**values)


def test_a_sequence_longer_than_the_model_is_refused(tmp_path: Path, small_checkpoint: Path):
    with pytest.raises(InputError, match="max_position_embeddings"):
        bundle_from_checkpoint(small_checkpoint, tmp_path / "b", BuildSpec(max_tokens=8193))


@pytest.mark.usefixtures("quick", "no_engines")
def test_positions_are_a_bundle_s_own_unless_others_are_asked_for(
    tmp_path: Path, small_checkpoint: Path
):
    def positions(bundle: Path) -> str:
        return Bundle.open(bundle).manifest.positions

    gapped = BuildSpec(positions="gapped")
    source = bundle_from_checkpoint(small_checkpoint, tmp_path / "gapped", gapped)
    assert positions(source) == "gapped"
    assert positions(bundle_from_checkpoint(small_checkpoint, tmp_path / "b")) == "compact"
    spec = BuildSpec(backends=RTX, targets=("sm89",))
    assert positions(bundle_from_bundle(source, tmp_path / "same", spec)) == "gapped"
    other = replace(spec, positions="compact")
    assert positions(bundle_from_bundle(source, tmp_path / "other", other)) == "compact"
