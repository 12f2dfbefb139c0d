"""Datasets of the `datasets` library; other files of entries are in `test_records`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from stts_export.errors import InputError, MissingDependencyError
from stts_export.training.examples import Question
from stts_export.training.records import Record, read_records

COLUMNS: dict[str, list[Any]] = {
    "video": ["a.mp4", None],
    "question": ["Which?", "Why?"],
    "answer": ["red", "so"],
    "choices": [["red", "blue"], None],
    "id": [1, 2],
}


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    return pytest.importorskip("datasets")


@pytest.fixture
def saved(datasets: Any, tmp_path: Path) -> Path:
    datasets.Dataset.from_dict(COLUMNS).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "a.mp4").touch()
    return tmp_path / "saved"


def refused(path: Path | str, *parts: str, **options: Any) -> None:
    with pytest.raises(InputError) as caught:
        read_records(path, **options)
    for part in parts:
        assert part in str(caught.value)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match="pip install datasets") as caught:
        read_records("some/name", "hf")
    assert str(caught.value).startswith("some/name: the datasets library cannot be imported")


def test_a_saved_dataset(saved: Path):
    expected = [
        Record(
            saved / "a.mp4",
            None,
            (Question("", "Which?", "red", ("red", "blue")),),
            f"{saved}:row 1",
        ),
        Record(None, None, (Question("", "Why?", "so"),), f"{saved}:row 2"),
    ]
    assert read_records(saved) == read_records(str(saved), "hf") == expected
    refused(saved, "1 of 1 files is missing", media=saved.parent)
    refused(saved, "split is 'train'", "it has no splits", split="train")


def test_splits(datasets: Any, tmp_path: Path):
    one = datasets.Dataset.from_dict({"question": ["q"], "answer": ["a"]})
    two = datasets.Dataset.from_dict({"question": ["q", "r"], "answer": ["a", "b"]})
    folder = tmp_path / "both"
    datasets.DatasetDict({"train": two, "dev": one}).save_to_disk(folder)
    assert len(read_records(folder, split="train")) == 2
    assert len(read_records(folder, split="dev")) == 1
    refused(folder, "the split is not named", "train, dev")
    refused(folder, "split is 'deva' (did you mean 'dev'?)", split="deva")
    single = tmp_path / "single"
    datasets.DatasetDict({"train": two}).save_to_disk(single)
    assert len(read_records(single)) == 2


def test_a_folder_of_data_files(datasets: Any, tmp_path: Path):
    folder = tmp_path / "files"
    folder.mkdir()
    datasets.Dataset.from_dict(COLUMNS).to_parquet(folder / "train.parquet")
    (folder / "a.mp4").touch()
    for split in (None, "train"):
        records = read_records(folder, "hf", split=split)
        assert [record.video for record in records] == [folder / "a.mp4", None]
    refused(folder, "cannot be read as a dataset", layout="hf", split="nothing")


def test_columns_at_fault(datasets: Any, tmp_path: Path):
    columns = {"question": ["q", ""], "answer": ["a", "b"]}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "empty")
    refused(tmp_path / "empty", f"{tmp_path / 'empty'}:row 2: the question is empty")
    columns = {"question": ["q"], "answer": ["a"], "vidoe": ["x"]}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "unknown")
    refused(tmp_path / "unknown", "row 1: unknown key 'vidoe' (did you mean 'video'?)")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "answer": datasets.Value("string"),
        }
    )
    pixels = {"image": [None], "question": ["q"], "answer": ["a"]}
    datasets.Dataset.from_dict(pixels, features=features).save_to_disk(tmp_path / "pixels")
    refused(tmp_path / "pixels", "the column image has the type Image", "paths of files")


def test_what_is_no_dataset(saved: Path):
    next(saved.glob("*.arrow")).unlink()
    refused(saved, "cannot be read as a dataset")
    refused("no/such-name-at-all", "cannot be read as a dataset", layout="hf")
