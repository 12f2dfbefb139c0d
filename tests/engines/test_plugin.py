"""The plugin library: where it is looked for, and what is refused."""

from __future__ import annotations

import ctypes.util
from pathlib import Path
from types import ModuleType

import pytest

from stts_export.engines import plugin
from stts_export.engines.plugin import PLUGIN_VARIABLE, find_plugin, load_plugin
from stts_export.errors import InputError, MissingDependencyError
from tests.standins.fixtures import install_cuda, install_tensorrt, plugin_library


@pytest.fixture(autouse=True)
def _nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PLUGIN_VARIABLE, raising=False)
    monkeypatch.setattr(plugin, "_BUILD_TREE", tmp_path / "tree" / "libstts_plugins.so")


@pytest.fixture(params=["10.3", "11.4"])
def trt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return install_tensorrt(monkeypatch, request.param, install_cuda(monkeypatch))


def _library(folder: Path, **options) -> Path:
    folder.mkdir(parents=True)
    return plugin_library(folder, **options)


def test_the_first_of_four_places_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tree = _library(tmp_path / "tree")
    assert find_plugin(bundle=tmp_path / "bundle") == tree
    kept = _library(tmp_path / "bundle" / "plugins")
    assert find_plugin(bundle=tmp_path / "bundle") == kept
    named = _library(tmp_path / "named")
    monkeypatch.setenv(PLUGIN_VARIABLE, str(named))
    assert find_plugin(bundle=tmp_path / "bundle") == named
    given = _library(tmp_path / "given")
    assert find_plugin(given, tmp_path / "bundle") == given


def test_a_relative_path_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    given = _library(tmp_path / "given")
    monkeypatch.chdir(given.parent)
    assert find_plugin(Path(given.name)) == given


def test_what_was_named_is_never_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _library(tmp_path / "tree")
    missing = tmp_path / "none.so"
    with pytest.raises(InputError, match=r"none\.so: is no file \(named by --plugin\)"):
        find_plugin(missing)
    monkeypatch.setenv(PLUGIN_VARIABLE, str(missing))
    with pytest.raises(InputError, match=r"is no file \(named by STTS_PLUGIN_PATH\)"):
        find_plugin()


def test_none_at_all_says_how_to_build_one(tmp_path: Path):
    with pytest.raises(MissingDependencyError, match="cmake --preset release") as error:
        find_plugin(bundle=tmp_path)
    assert str(tmp_path / "plugins") in str(error.value)


def test_another_version_is_named(tmp_path: Path):
    library = _library(tmp_path / "old", version="0.0.9")
    with pytest.raises(InputError, match=r"is of version 0\.0\.9\n  allowed: version 0"):
        find_plugin(library)


def test_a_foreign_library_is_refused():
    # libm is already in this process, by the name that the loader knows it under
    foreign = next(
        Path(line.split()[-1])
        for line in Path("/proc/self/maps").read_text().splitlines()
        if Path(line.split()[-1]).name == (ctypes.util.find_library("m") or "")
    )
    with pytest.raises(InputError, match="is not the plugin library of stts-export"):
        find_plugin(foreign)


def test_a_file_that_is_no_library_is_refused(tmp_path: Path):
    file = tmp_path / "plugin.so"
    file.write_text("no ELF file, but long enough to be read as one" * 3)
    with pytest.raises(InputError, match="cannot be loaded"):
        find_plugin(file)


@pytest.mark.parametrize("kept", [0.2, 0.9, 0.999])
def test_a_library_that_was_not_copied_to_its_end(tmp_path: Path, kept: float):
    """The loader would map what is not there, and the process would die of it."""
    whole = _library(tmp_path / "whole").read_bytes()
    cut = tmp_path / "cut.so"
    cut.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(InputError, match=r"cut\.so: is cut short"):
        find_plugin(cut)


def test_loading_makes_the_plugin_known_once(trt: ModuleType, tmp_path: Path):
    library = _library(tmp_path / "given")
    load_plugin(trt, library)
    load_plugin(trt, library)
    assert len(trt.standin.called("IPluginRegistry.load_library")) == 1
    assert trt.get_plugin_registry().get_creator("SttsSelectPack", "1", "stts") is not None


def test_a_library_that_tensorrt_refuses(trt: ModuleType, tmp_path: Path):
    library = _library(tmp_path / "given", exports=False)
    with pytest.raises(InputError, match=f"brings no plugin .* to TensorRT {trt.__version__}"):
        load_plugin(trt, library)


def test_what_is_named_is_checked_when_one_is_loaded_already(trt: ModuleType, tmp_path: Path):
    load_plugin(trt, _library(tmp_path / "first"))
    with pytest.raises(InputError, match=r"none\.so: is no file"):
        load_plugin(trt, tmp_path / "none.so")


def test_one_that_comes_too_late_is_named(
    trt: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    first, second = _library(tmp_path / "first"), _library(tmp_path / "second")
    load_plugin(trt, first)
    (tmp_path / "link.so").symlink_to(first)
    for same in (first, tmp_path / "link.so", None):
        load_plugin(trt, same)
    assert not caplog.messages
    load_plugin(trt, second)
    assert caplog.messages == [f"{second} is not loaded: {first} stays until this process ends"]
