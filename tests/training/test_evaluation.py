"""Accuracy by ratio and selector: what is counted, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stts_export.errors import InputError
from stts_export.runtime.planner import n_prune
from stts_export.runtime.visuals import Encoded, EncodedClip
from stts_export.runtime.writing import png_bytes
from stts_export.training import exam as exam_module
from stts_export.training.answerers import Answerer, open_answerer
from stts_export.training.evaluation import ALL_WINDOWS, evaluate, table, wilson
from stts_export.training.exam import Exam, file_exam, prompt_of, synthetic_exam
from stts_export.training.selectors import SELECTORS
from tests.helpers import picture, write_video
from tests.test_lean_import import _run

RATIOS = (0.0, 0.5, 0.8)


class Oracle:
    """Sees as a model does, and answers right while enough windows are kept.

    Args:
        model: that sees.
        exam: whose answers it knows.
    """

    def __init__(self, model: Answerer, exam: Exam) -> None:
        self._model = model
        self._known = {
            tuple(map(prompt_of, item.questions)): [question.answer for question in item.questions]
            for item in exam.items
        }
        self.asked: list[tuple[float, int]] = []
        """Kept share and number of questions, call by call."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def answers(
        self, encoded: Encoded | None, prompts: Sequence[str], limits: Sequence[int]
    ) -> list[str]:
        share = 1.0
        if isinstance(encoded, EncodedClip):
            share = encoded.kept_windows / encoded.total_windows
        self.asked.append((share, len(prompts)))
        assert min(limits) > 1
        known = self._known[tuple(prompts)]
        return [f" {answer.upper()}. " if share > 0.3 else "nothing" for answer in known]


@pytest.fixture(scope="module")
def model(text_bundle: Path) -> Iterator[Answerer]:
    with open_answerer(text_bundle.with_name("text_checkpoint"), threads=1) as answerer:
        yield answerer


def test_every_setting_is_asked_everything(model: Answerer):
    exam = synthetic_exam(9, 4, level=0)
    results = evaluate(Oracle(model, exam), exam, ratios=RATIOS)
    settings = [(row["prune_ratio"], row["selector"]) for row in results["rows"]]
    assert settings == [(0.0, ALL_WINDOWS), *((r, s) for r in RATIOS[1:] for s in SELECTORS)]
    assert results["questions"]["all"] == sum(map(len, (i.questions for i in exam.items))) == 9
    assert sum(results["questions"].values()) == 18
    assert results["clips"] == 4
    known = {key: results[key] for key in ("data", "split", "level", "seed", "max_frames", "dtype")}
    assert known == {
        "data": "synthetic", "split": "test", "level": 0, "seed": 0, "max_frames": 8,
        "dtype": "float32",
    }  # fmt: skip
    for row in results["rows"]:
        right = row["prune_ratio"] < 0.7
        assert row["marks"] == "01"[right] * 9
        assert row["right"]["all"] == 9 * right
        assert row["accuracy"]["all"] == right
        assert row["interval"]["all"] == list(wilson(9 * right, 9))
    kept: dict[float, set[int]] = {row["prune_ratio"]: set() for row in results["rows"]}
    for row in results["rows"]:
        kept[row["prune_ratio"]].add(row["kept_windows"])
    assert all(len(counts) == 1 for counts in kept.values())
    json.dumps(results)


def test_kept_windows_are_summed_over_clips(model: Answerer, tmp_path: Path):
    path = _questions(tmp_path, {"video": ["a.mp4", "b.mp4"], "image": ["c.png"]})
    exam = file_exam(path)
    oracle = Oracle(model, exam)
    results = evaluate(oracle, exam, ratios=RATIOS, selectors=["random"])
    for row in results["rows"]:
        removed = n_prune(16, 3, row["prune_ratio"]) * 2
        assert (row["total_windows"], row["kept_windows"]) == (96, 96 - removed)
    # Three settings of each video; nothing can be removed from the image, or without any.
    assert len(oracle.asked) == 3 * 2 + 1 + 1
    assert [row["marks"] for row in results["rows"]] == ["1111", "1111", "0011"]
    assert results["split"] is None
    assert results["chance"] == {}


def _questions(folder: Path, visuals: dict[str, list[str]], *, text: bool = True) -> Path:
    """Questions of type q about videos of 3 frames and about images, and one about nothing."""
    entries: list[dict[str, str]] = []
    for kind, names in visuals.items():
        for name in names:
            if kind == "video":
                write_video(folder / name)
            else:
                (folder / name).write_bytes(png_bytes(picture((60, 50))))
            question = f"What is in {name}?"
            entries.append({kind: name, "question": question, "answer": "red", "type": "q"})
    if text:
        entries.append({"question": "Text?", "answer": "yes", "type": "q"})
    path = folder / "q.jsonl"
    path.write_text("\n".join(map(json.dumps, entries)), encoding="utf-8")
    return path


def test_a_clip_too_short_for_removal_is_asked_once(model: Answerer, tmp_path: Path):
    exam = file_exam(_questions(tmp_path, {"video": ["a.mp4"]}, text=False))
    oracle = Oracle(model, exam)
    results = evaluate(oracle, exam, ratios=[0.001, 0.002], selectors=["stts", "tome", "evs"])
    assert oracle.asked == [(1.0, 1)]
    assert all(row["marks"] == "1" for row in results["rows"])


@pytest.mark.parametrize("selector", ["random", "uniform-frames"])
def test_the_model_is_given_what_the_selector_keeps(
    model: Answerer, monkeypatch: pytest.MonkeyPatch, selector: str
):
    exam = synthetic_exam(2, 1, level=0)
    seen: list[np.ndarray] = []

    def remember(encoded: Encoded, *_: object) -> list[str]:
        seen.append(encoded.keep)
        return ["", ""]

    monkeypatch.setattr(model, "answers", remember)
    evaluate(model, exam, ratios=[0.8, 0.5], selectors=[selector])
    evaluate(model, exam, ratios=[0.8], selectors=[selector])
    assert np.array_equal(seen[0], seen[2])
    assert seen[0][0].all() if selector == "random" else seen[0].any()
    if selector == "random":
        assert not (seen[0] & ~seen[1]).any()  # kept at 0.8 is kept at 0.5


def test_checkpoint_and_bundle_are_right_equally_often(text_bundle: Path, model: Answerer):
    exam = synthetic_exam(8, 3, level=1, split="dev")
    with open_answerer(text_bundle, threads=1) as answerer:
        theirs = evaluate(answerer, exam, ratios=RATIOS)
    ours = evaluate(model, exam, ratios=RATIOS)
    assert ours["rows"] == theirs["rows"]
    assert theirs["backend"] == "onnxruntime"
    assert theirs["precision"] == "fp32"


def test_broken_clips_are_left_out_and_named(model: Answerer, tmp_path: Path):
    path = _questions(tmp_path, {"video": ["a.mp4", "b.mp4"]})
    (tmp_path / "a.mp4").write_bytes(b"")
    exam = file_exam(path)
    with pytest.raises(InputError, match=r"1 of 3 clips cannot be read: .*a\.mp4") as raised:
        evaluate(Oracle(model, exam), exam, ratios=[0.0])
    assert raised.value.where == str(path)
    results = evaluate(Oracle(model, exam), exam, ratios=[0.0], max_broken=1)
    assert results["clips"] == 2
    assert results["questions"] == {"q": 2, "all": 2}
    assert results["max_broken"] == 1
    assert [one["name"] for one in results["broken"]] == [exam.items[0].name]
    assert results["rows"][0]["marks"] == "11"
    assert f"broken: {exam.items[0].name}: {tmp_path / 'a.mp4'}" in table(results)


def test_a_video_in_place_of_an_image_is_broken(model: Answerer, tmp_path: Path):
    path = _questions(tmp_path, {"image": ["a.png"]})
    write_video(tmp_path / "x.mp4")
    (tmp_path / "x.mp4").rename(tmp_path / "a.png")
    exam = file_exam(path)
    with pytest.raises(InputError, match="is a video"):
        evaluate(Oracle(model, exam), exam, ratios=[0.0])


def test_a_synthetic_clip_that_cannot_be_written_ends_it(
    model: Answerer, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exam_module, "write_mp4", full)
    with pytest.raises(InputError, match=r"1 of 200 clips cannot be read: .*No space left"):
        evaluate(model, synthetic_exam(200, 200), ratios=[0.0])


def test_nothing_but_broken_clips_is_an_error(model: Answerer, tmp_path: Path):
    path = _questions(tmp_path, {"video": ["a.mp4"]}, text=False)
    (tmp_path / "a.mp4").write_bytes(b"no video")
    exam = file_exam(path)
    with pytest.raises(InputError, match="1 of 1 clips cannot be read"):
        evaluate(Oracle(model, exam), exam, ratios=[0.0], max_broken=5)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"ratios": [1.0]}, "prune ratio 1.0"),
        ({"ratios": [-0.1]}, "prune ratio -0.1"),
        ({"ratios": [float("nan")]}, "prune ratio nan"),
        ({"ratios": []}, "no prune ratio"),
        ({"selectors": ["stts", "rnd"]}, "unknown selector 'rnd'"),
        ({"max_broken": -1}, "max_broken is -1"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(
    model: Answerer, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], text: str
):
    monkeypatch.setattr(model, "read", None)
    with pytest.raises(InputError, match=text):
        evaluate(model, synthetic_exam(1, 1), **arguments)


def test_equal_ratios_and_selectors_are_asked_once(model: Answerer):
    exam = synthetic_exam(1, 1, level=0)
    results = evaluate(
        Oracle(model, exam), exam, ratios=[0, 0.5, 0.5], selectors=["random", "random"]
    )
    assert len(results["rows"]) == 2


def test_a_model_without_scorer_cannot_choose(model: Answerer, monkeypatch: pytest.MonkeyPatch):
    config = model.config
    plain = replace(config, vision=replace(config.vision, pruning=None))
    monkeypatch.setattr(type(model), "config", plain)
    exam = synthetic_exam(1, 1)
    with pytest.raises(InputError, match="the model has no scorer"):
        evaluate(model, exam, ratios=[0.5], selectors=["random", "stts"])


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [
        (5, 10, 0.2366, 0.7634),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),
    ],
)
def test_intervals_are_wilson_s(right: int, total: int, low: float, high: float):
    """The last as in R. Newcombe, "Two-sided confidence intervals", 1998, table I."""
    assert wilson(right, total) == pytest.approx((low, high), abs=5e-5)


def test_table_shows_every_row_type_and_interval(model: Answerer):
    exam = synthetic_exam(12, 6, level=0)
    results = evaluate(Oracle(model, exam), exam, ratios=[0.0, 0.8], selectors=["uniform-frames"])
    lines = table(results).splitlines()
    assert lines[0].split()[:2] == ["ratio", "windows"]
    assert [name for name in exam.types if name in lines[0]] == list(exam.types)
    assert lines[1].split()[1:3] == ["all", "windows"]
    assert lines[1].endswith("1.000  0.758 .. 1.000")
    assert lines[2].split()[:2] == ["0.80", "uniform-frames"]
    assert lines[2].endswith("0.000  0.000 .. 0.242")
    assert lines[3].split()[0] == "chance"
    assert lines[4].split() == ["questions", *map(str, results["questions"].values())]
    row = results["rows"][1]
    assert f"  {row['kept_windows']}/{row['total_windows']}  " in lines[2]
    assert len({len(line) for line in lines[1:3]}) == 1


def test_a_bundle_is_evaluated_without_torch(text_bundle: Path):
    done = _run(f"""
    from stts_export.cli import main
    sys.exit(main(["eval", {str(text_bundle)!r}, "--questions", "1", "--threads", "1"]))
    """)
    assert done.returncode == 0, done.stderr
    assert "uniform-frames" in done.stdout
