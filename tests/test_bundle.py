"""Opening bundles: schema, sizes, hashes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from stts_export.bundle import Bundle, Limits
from stts_export.errors import InputError, VerificationError


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
    assert "version 1" in str(error.value)


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


@pytest.mark.parametrize(
    "change",
    [
        {"precison": "fp32"},
        {"precision": "fp64"},
        {"limits": {"max_frames": 0, "max_tokens": 1, "min_prune_ratio": 0}},
        {"limits": {"frames": 3}},
    ],
)
def test_wrong_keys_and_values_are_refused(bundle: Path, change: dict[str, Any]):
    _edit(bundle, **change)
    with pytest.raises(InputError):
        Bundle.open(bundle)


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
