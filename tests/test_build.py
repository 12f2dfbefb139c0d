"""Building: resuming, refusing, and never leaving half a bundle under the final name."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import stts_export.build as building
from stts_export import Session
from stts_export.build import BuildSpec, bundle_from_checkpoint
from stts_export.bundle import Bundle
from stts_export.errors import InputError, MissingDependencyError
from stts_export.graphs import export
from tests.helpers import prompt_ids, random_checkpoint, random_frames


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the graphs that are exported from now on."""
    done: list[str] = []
    real = export.export_graph

    def recording(model, graph, precision, folder):
        done.append(graph)
        return real(model, graph, precision, folder)

    monkeypatch.setattr(export, "export_graph", recording)
    return done


def _failing(monkeypatch: pytest.MonkeyPatch, graph: str, error: Exception) -> Callable[[], None]:
    real = export.export_graph

    def failing(model, name, precision, folder):
        if name == graph:
            raise error
        return real(model, name, precision, folder)

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
    assert recorded == ["vision_lower", "vision_upper", "vision_upper-frames"]
    recorded.clear()
    bundle_from_checkpoint(small_checkpoint, output)
    assert recorded == ["decoder"]
    Bundle.open(output).check_hashes()
    assert not (tmp_path / "bundle.partial").exists()


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


def test_an_existing_bundle_is_replaced_only_by_force(tmp_path: Path, small_bundle: Path):
    output = Path(shutil.copytree(small_bundle, tmp_path / "bundle"))
    folder = random_checkpoint(tmp_path / "checkpoint", seed=5)
    before = Bundle.open(output).manifest
    with pytest.raises(InputError, match="--force"):
        bundle_from_checkpoint(folder, output)
    assert Bundle.open(output).manifest == before
    bundle_from_checkpoint(folder, output, force=True)
    assert Bundle.open(output).manifest.files != before.files


def test_force_never_removes_what_is_no_bundle(tmp_path: Path, small_checkpoint: Path):
    output = tmp_path / "thesis"
    output.mkdir()
    (output / "chapter1.tex").write_text("...")
    with pytest.raises(InputError, match="not a bundle"):
        bundle_from_checkpoint(small_checkpoint, output, force=True)
    assert (output / "chapter1.tex").exists()


def test_a_bundle_is_not_a_checkpoint(tmp_path: Path, small_bundle: Path):
    with pytest.raises(InputError, match="is a bundle already"):
        bundle_from_checkpoint(small_bundle, tmp_path / "bundle")


def test_a_bad_checkpoint_leaves_nothing_behind(tmp_path: Path):
    with pytest.raises(InputError):
        bundle_from_checkpoint(tmp_path / "nowhere", tmp_path / "out" / "bundle")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "values",
    [{"precision": "int3"}, {"backends": ("openvino",)}, {"max_frames": 0}],
)
def test_specs_refuse_nonsense(values):
    with pytest.raises(InputError, match="allowed"):
        BuildSpec(**values)


def test_a_missing_exporter_says_how_to_install_it(
    tmp_path: Path, small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(MissingDependencyError, match=r"stts-export\[cpu,export\]"):
        bundle_from_checkpoint(small_checkpoint, tmp_path / "bundle")


def test_max_frames_comes_from_the_checkpoint_unless_given(
    tmp_path: Path, small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = Path(shutil.copytree(small_checkpoint, tmp_path / "checkpoint"))
    (folder / "video_preprocessor_config.json").write_text(json.dumps({"num_frames": 384}))
    monkeypatch.setattr(building, "graphs_from_checkpoint", lambda *_: None)
    bundle = bundle_from_checkpoint(folder, tmp_path / "a")
    assert Bundle.open(bundle).manifest.limits.max_frames == 384
    bundle = bundle_from_checkpoint(folder, tmp_path / "b", BuildSpec(max_frames=7))
    assert Bundle.open(bundle).manifest.limits.max_frames == 7


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
