"""Opening bundles: schema, sizes, hashes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from stts_export.bundle import Bundle, Limits, is_bundle, list_files
from stts_export.errors import InputError, VerificationError
from stts_export.inspect import describe


@pytest.fixture
def bundle(tmp_path: Path, small_bundle: Path) -> Path:
    return Path(shutil.copytree(small_bundle, tmp_path / "bundle"))


def _edit(bundle: Path, **changes: Any) -> None:
    path = bundle / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_an_untouched_bundle_opens_and_its_hashes_fit(bundle: Path):
    opened = Bundle.open(bundle)
    opened.check_hashes()
    listed = {bundle / name for name in opened.manifest.files}
    found = {path for path in bundle.rglob("*") if path.is_file()}
    assert found - listed == {bundle / "manifest.json"}


def test_the_manifest_says_what_made_the_bundle(small_bundle: Path):
    manifest = Bundle.open(small_bundle).manifest
    assert manifest.precision == "fp32"
    assert manifest.targets == ("onnxruntime",)
    assert {"torch", "onnx"} <= set(manifest.tool_versions)
    assert manifest.licences["weights"] == "not stated by the checkpoint"


def test_another_schema_version_names_both(bundle: Path):
    _edit(bundle, schema_version=7)
    with pytest.raises(InputError, match="schema version 7") as error:
        Bundle.open(bundle)
    assert "version 4" in str(error.value)


def test_a_file_of_another_size_is_named(bundle: Path):
    with (bundle / "onnx/decoder/model.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(InputError, match=r"decoder/model\.onnx: has \d+ bytes"):
        Bundle.open(bundle)


def test_a_missing_file_is_named(bundle: Path):
    (bundle / "config/config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json: is missing"):
        Bundle.open(bundle)


def test_a_changed_file_of_the_same_size_is_found_by_its_hash(bundle: Path):
    file = bundle / "onnx/decoder/model.onnx.data"
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)
    with pytest.raises(VerificationError, match=r"decoder/model\.onnx\.data: was changed"):
        Bundle.open(bundle).check_hashes()


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"schema_version": 1}'])
def test_a_broken_manifest_is_refused(bundle: Path, content: str):
    (bundle / "manifest.json").write_text(content)
    with pytest.raises(InputError, match=r"manifest\.json"):
        Bundle.open(bundle)


_BAD_NAMES = ("/etc/passwd", "onnx/../../evil.txt", "..", "onnx//a", "onnx/./a", "./a", "/", "")


@pytest.mark.parametrize(
    "change",
    [
        {"precison": "fp32"},
        {"precision": "fp64"},
        {"limits": {"max_frames": 0, "max_tokens": 1, "min_prune_ratio": 0}},
        {"limits": {"frames": 3}},
        {"limits": []},
        {"limits": {"max_frames": "3", "max_tokens": 1}},
        {"limits": {"max_frames": True, "max_tokens": 1}},
        {"limits": {"max_frames": 3, "max_tokens": 1.5}},
        {"limits": {"max_frames": 3, "max_tokens": 9, "min_prune_ratio": None}},
        {"limits": {"max_frames": 3, "max_tokens": 9, "max_fps": 0}},
        {"limits": {"max_frames": 3, "max_tokens": 9, "max_fps": float("inf")}},
        {"schema_version": True},
        {"has_scorer": 1},
        {"precision": []},
        {"positions": "sparse"},
        {"positions": []},
        {"positions": None},
        {"graphs": []},
        {"graphs": "decoder"},
        {"graphs": [3]},
        {"graphs": ["decoder"]},
        {"graphs": ["vision_lower", "vision_upper", "vision_upper-frames", "connector", "decoder"]},
        {"targets": [None]},
        {"targets": ["../tensorrt-10.3.0-sm87"]},
        {"targets": ["tensorrt-10.3.0-sm87"]},
        {"targets": {"onnxruntime": 1}},
        {"source": 3},
        {"stts_export": None},
        {"tool_versions": []},
        {"licences": {"weights": 1}},
        {"files": {}},
        {"files": []},
        {"files": {"config/config.json": 3}},
        {"files": {"config/config.json": {"size": 3}}},
        {"files": {"config/config.json": {"size": "3", "sha256": ""}}},
        {"files": {"config/config.json": {"size": True, "sha256": ""}}},
        {"files": {"x" * 300: {"size": 1, "sha256": ""}}},
        {"files": {"a\0b": {"size": 1, "sha256": ""}}},
    ],
)
def test_wrong_keys_and_values_are_refused(bundle: Path, change: dict[str, Any]):
    _edit(bundle, **change)
    with pytest.raises(InputError):
        describe(bundle)


@pytest.mark.parametrize("name", _BAD_NAMES)
def test_files_outside_the_bundle_are_refused(bundle: Path, name: str):
    manifest = json.loads((bundle / "manifest.json").read_text())
    path = bundle / name
    size = path.stat().st_size if path.is_file() else 1
    _edit(bundle, files={**manifest["files"], name: {"size": size, "sha256": ""}})
    with pytest.raises(InputError, match="allowed: paths below the bundle"):
        Bundle.open(bundle)


def test_only_the_bundle_s_own_manifest_is_not_listed(tmp_path: Path):
    (tmp_path / "config").mkdir()
    for name in ("manifest.json", "build.json", "config/manifest.json", "config/build.json"):
        (tmp_path / name).write_text("{}")
    listed = list_files(tmp_path, ignore=("build.json",))
    assert set(listed) == {"config/manifest.json", "config/build.json"}


def test_a_bundle_of_before_max_fps_still_opens(bundle: Path):
    _edit(bundle, limits={"max_frames": 3, "max_tokens": 9, "min_prune_ratio": 0})
    assert Bundle.open(bundle).manifest.limits.max_fps == 2.0


def test_a_path_that_is_not_utf8_is_named(bundle: Path):
    odd = bundle.with_name("caf\udce9")
    with pytest.raises(InputError, match="not UTF-8") as error:
        Bundle.open(bundle.rename(odd))
    assert "rename" in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 1}', '{"name": "my site"}'])
def test_not_every_manifest_is_ours(tmp_path: Path, text: str):
    (tmp_path / "manifest.json").write_text(text)
    assert not is_bundle(tmp_path)


def test_bundles_of_any_version_are_ours(bundle: Path):
    assert is_bundle(bundle)
    _edit(bundle, schema_version=7, engines=[])
    assert is_bundle(bundle)


@pytest.mark.parametrize("kind", ["missing", "file", "empty"])
def test_paths_that_are_no_bundle(tmp_path: Path, kind: str):
    path = tmp_path / "x"
    if kind == "file":
        path.write_text("")
    elif kind == "empty":
        path.mkdir()
    with pytest.raises(InputError, match="is not a bundle"):
        Bundle.open(path)


def test_limits_refuse_nonsense():
    with pytest.raises(InputError, match="max_frames"):
        Limits(max_frames=0, max_tokens=10)
    with pytest.raises(InputError, match="min_prune_ratio"):
        Limits(max_frames=1, max_tokens=10, min_prune_ratio=1.0)
