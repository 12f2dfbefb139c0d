"""`engines.json`: what was written is read, and what is damaged is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stts_export.engines.engine_set import EngineInfo, EngineSet, folder_name
from stts_export.errors import InputError
from stts_export.tensors import Range, TensorSpec


@pytest.fixture
def engines(tmp_path: Path) -> EngineSet:
    info = EngineInfo(
        "select_pack.engine",
        "select_pack",
        (
            TensorSpec("hidden", "float16", (-1, 54, 24)),
            TensorSpec("kept_count", "int64", (1,), is_shape=True),
        ),
        (TensorSpec("bins", "float16", (-1, 54, 24)),),
        ({"hidden": Range((1, 54, 24), (8, 54, 24), (8, 54, 24)),
          "kept_count": Range((1,), (4,), (48,))},),
        "trtexec --onnx=onnx/select_pack/model.onnx",
    )  # fmt: skip
    folder = tmp_path / "tensorrt-10.3.0-sm87"
    return EngineSet(folder, "tensorrt", "10.3.0.26", "sm87", {"select_pack": info})


def test_what_is_written_is_read(engines: EngineSet):
    engines.write()
    assert EngineSet.read(engines.folder) == engines
    assert engines.path("select_pack") == engines.folder / "select_pack.engine"


def test_what_was_not_read_back_stays_so(engines: EngineSet):
    info = replace(engines.engines["select_pack"], read_back=False)
    other = replace(engines, engines={"select_pack": info})
    other.write()
    assert EngineSet.read(engines.folder) == other


def test_folders_are_named_by_the_first_three_numbers():
    assert folder_name("tensorrt-rtx", "1.7.1.116", "sm89") == "tensorrt-rtx-1.7.1-sm89"


def test_a_folder_without_a_list_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"engines\.json: is missing"):
        EngineSet.read(tmp_path)


def _engine(values: dict[str, Any]) -> dict[str, Any]:
    return values["engines"]["select_pack"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda values: values.pop("backend"),
        lambda values: values.update(version=10),
        lambda values: values.update(engines=[]),
        lambda values: _engine(values).pop("graph"),
        lambda values: _engine(values).pop("read_back"),
        lambda values: _engine(values).update(file="../../other/x.engine"),
        lambda values: _engine(values).update(inputs=3),
        lambda values: _engine(values)["inputs"][0].update(shape=["a"]),
        lambda values: _engine(values)["inputs"][0].update(shape=[True]),
        lambda values: _engine(values)["profiles"][0]["hidden"].pop("opt"),
        lambda values: _engine(values)["profiles"][0]["hidden"].update(opt=[1]),
    ],
)
def test_a_damaged_list_is_refused(engines: EngineSet, damage):
    engines.write()
    file = engines.folder / "engines.json"
    values = json.loads(file.read_text())
    damage(values)
    file.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"engines\.json: cannot be read"):
        EngineSet.read(engines.folder)


def test_engines_of_another_target_are_refused(engines: EngineSet):
    engines.write()
    renamed = engines.folder.rename(engines.folder.with_name("tensorrt-10.3.0-sm90"))
    with pytest.raises(InputError, match=r"describes tensorrt-10\.3\.0-sm87"):
        EngineSet.read(renamed)
