from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stts_export.errors import InputError, SttsError
from stts_export.runtime.prompt import ImageTokens
from stts_export.training import failures
from stts_export.training.examples import (
    Example,
    ImageInput,
    Question,
    VideoInput,
    WindowContents,
)
from stts_export.training.failures import load_failure, non_finite, save_failure
from tests.helpers import random_frames

RNG = np.random.default_rng(0)
VIDEO = Example(
    VideoInput(random_frames(3, (12, 18)), (0.0, 1 / 3, 0.7)),
    (
        Question("colour", "Which colour?\n", "räd\ud800", ("räd\ud800", "blue")),
        Question("", "How many?", "2"),
    ),
    prune_ratio=0.1 + 0.2,
    contents=WindowContents(*RNG.integers(0, 5, (3, 3, 4))),
    name="clip 7",
)
IMAGE = Example(
    ImageInput(
        random_frames(2, (12, 18), seed=1),
        RNG.integers(-1, 24, (10, 9)).astype(np.int32),
        ImageTokens((1, 2, 2, 4)),
    ),
    (Question("count", "How many?", "3"),),
)
TEXT = Example(None, (Question("", "What is 1 + 1?", "2", ("2", "3")),), name="text")
BATCH = [VIDEO, IMAGE, TEXT, dataclasses.replace(VIDEO, contents=None, name="")]


def _assert_same(left: object, right: object) -> None:
    """Equal, with equal types and dtypes, through nested dataclasses and tuples."""
    assert type(left) is type(right)
    if isinstance(left, np.ndarray):
        assert isinstance(right, np.ndarray)
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)
    elif dataclasses.is_dataclass(left):
        for entry in dataclasses.fields(left):
            _assert_same(getattr(left, entry.name), getattr(right, entry.name))
    elif isinstance(left, tuple):
        assert isinstance(right, tuple)
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            _assert_same(one, other)
    else:
        assert left == right


def test_a_batch_comes_back_as_it_was(tmp_path):
    folder = save_failure(tmp_path / "run", 12, BATCH, {"loss": math.nan})
    assert folder == tmp_path / "run" / "failures" / "step12"
    back = load_failure(folder)
    assert len(back) == len(BATCH)
    for ours, theirs in zip(back, BATCH, strict=True):
        _assert_same(ours, theirs)


@given(
    times=st.lists(st.floats(0, 1e6), min_size=1, max_size=4),
    ratio=st.floats(0, 1, exclude_max=True),
    texts=st.lists(st.text(), min_size=3, max_size=3),
    choices=st.lists(st.text(), max_size=3),
)
def test_any_example_comes_back(tmp_path_factory, times, ratio, texts, choices):
    question = Question(texts[0], texts[1], texts[2], tuple(choices))
    video = VideoInput(random_frames(len(times), (2, 3)), tuple(times))
    example = Example(video, (question,), ratio)
    folder = save_failure(tmp_path_factory.mktemp("run"), 0, [example], {})
    _assert_same(load_failure(folder)[0], example)


def test_it_can_be_read_by_eye_and_holds_no_pickles(tmp_path):
    losses = {"answer_loss": np.float32(math.nan), "similarity_loss": math.inf, "label_loss": 0.5}
    folder = save_failure(tmp_path, 12, BATCH, losses)
    text = (folder / "failure.json").read_text(encoding="utf-8")
    values = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert values["losses"] == {"answer_loss": "nan", "similarity_loss": "inf", "label_loss": 0.5}
    assert values["step"] == 12
    assert [entry["visual"] for entry in values["examples"]] == ["video", "image", None, "video"]
    assert values["examples"][0]["questions"][1]["text"] == "How many?"
    with np.load(folder / "example0.npz", allow_pickle=False) as arrays:
        assert arrays["frames"].shape == (3, 12, 18, 3)
        assert all(arrays[name].dtype != object for name in arrays.files)


def test_processes_do_not_share_a_folder_and_a_new_failure_replaces_an_old_one(tmp_path):
    save_failure(tmp_path, 12, BATCH, {})
    folder = save_failure(tmp_path, 12, [TEXT], {})
    other = save_failure(tmp_path, 12, [IMAGE], {}, process=3)
    assert other.name == "step12-process3"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["step12", other.name]
    assert sorted(path.name for path in folder.iterdir()) == ["example0.npz", "failure.json"]
    _assert_same(load_failure(folder)[0], TEXT)
    _assert_same(load_failure(other)[0], IMAGE)


def _full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Path, **arrays: np.ndarray) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    folder = save_failure(tmp_path, 12, [TEXT], {})
    _full_disk(monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        save_failure(tmp_path, 12, BATCH, {})
    assert [path.name for path in folder.parent.iterdir()] == ["step12"]
    _assert_same(load_failure(folder)[0], TEXT)


def test_the_error_says_what_is_not_finite_and_where_the_batch_is(tmp_path):
    losses = {"loss": math.nan, "answer_loss": 0.5, "similarity_loss": -math.inf}
    error = non_finite(tmp_path, 12, BATCH, losses)
    folder = tmp_path / "failures" / "step12"
    assert isinstance(error, SttsError)
    assert error.exit_code == 1
    assert f"loss is nan, similarity_loss is -inf after step 12; the batch is in {folder}\n" in str(
        error
    )
    assert "answer_loss" not in str(error)
    assert "load_failure" in str(error)
    assert "--resume" in str(error)
    assert len(load_failure(folder)) == len(BATCH)


def test_the_error_names_another_process(tmp_path):
    error = non_finite(tmp_path, 12, [TEXT], {"loss": 1.0}, process=1)
    assert "a loss of another process is not finite after step 12" in str(error)
    assert "step12-process1" in str(error)


def test_without_examples_there_is_nothing_to_save(tmp_path):
    error = non_finite(tmp_path, 12, [], {"loss": math.nan})
    assert "loss is nan after step 12\n" in str(error)
    assert "load_failure" not in str(error)
    assert not list(tmp_path.iterdir())


def test_the_error_is_still_the_loss_when_the_batch_cannot_be_saved(tmp_path, monkeypatch):
    _full_disk(monkeypatch)
    error = non_finite(tmp_path, 12, BATCH, {"loss": math.nan})
    assert "loss is nan after step 12; the batch could not be saved" in str(error)
    assert "No space left on device" in str(error)


def test_refuses_a_folder_without_a_batch(tmp_path):
    with pytest.raises(InputError, match=r"(?s)holds no saved batch.*RUN/failures/stepN"):
        load_failure(tmp_path)
    with pytest.raises(InputError, match="holds no saved batch"):
        load_failure(tmp_path / "absent")


def _change(folder: Path, change) -> None:
    file = folder / "failure.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    change(values)
    file.write_text(json.dumps(values), encoding="utf-8")


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.pop("examples"),
        lambda values: values.update(examples=3),
        lambda values: values.update(examples=[3]),
        lambda values: values["examples"][0].pop("name"),
        lambda values: values["examples"][0].update(questions=[{"text": "?"}]),
        lambda values: values["examples"][0].update(questions=None),
        lambda values: values["examples"][2].update(visual="video"),
        lambda values: values["examples"][1].update(image_grid=[1, 2]),
        lambda values: values["examples"][1].update(has_contents=True),
        lambda values: values["examples"].append(values["examples"][0]),
    ],
)
def test_refuses_a_description_that_does_not_fit(tmp_path, change):
    folder = save_failure(tmp_path, 12, BATCH, {})
    _change(folder, change)
    with pytest.raises(InputError, match="step12: cannot be read"):
        load_failure(folder)


@pytest.mark.parametrize("cut", [0, 10, 0.5, -1])
def test_refuses_damaged_arrays(tmp_path, cut):
    folder = save_failure(tmp_path, 12, BATCH, {})
    file = folder / "example0.npz"
    content = file.read_bytes()
    file.write_bytes(content[: int(cut * len(content)) if isinstance(cut, float) else cut])
    with pytest.raises(InputError, match="step12: cannot be read"):
        load_failure(folder)


def test_never_unpickles(tmp_path):
    class Trap:
        def __reduce__(self):
            return pytest.fail, ("unpickled",)

    folder = save_failure(tmp_path, 12, [VIDEO], {})
    arrays = failures._arrays(VIDEO)
    arrays["frames"] = np.array([Trap()], dtype=object)
    np.savez(folder / "example0.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="Object arrays cannot be loaded"):
        load_failure(folder)
