from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)
from tensorboard.summary.writer import event_file_writer  # type: ignore[import-untyped]

from stts_export.errors import InputError
from stts_export.runtime.writing import png_bytes
from stts_export.training import logs
from stts_export.training.logs import LOG_FILE, RunLog, progress_line, read_log

VALUES = {
    "loss": 1.2345,
    "answer_loss": 1.1,
    "similarity_loss": 0.0123,
    "label_loss": 0.456,
    "accuracy": 0.561,
    "score_low": 0.0121,
    "score_high": 0.934,
    "score_spread": 0.213,
    "kept_low": 0.2,
    "kept_high": 0.8,
    "tokens_per_second": 12345.0,
    "clips_per_second": 23.4,
    "rate": 1e-3,
    "gradient_norm": 0.9,
    "scorer_gradient_norm": 17.0,
    "broken": 0,
    "level": 2,
}


def _on_a_terminal(monkeypatch: pytest.MonkeyPatch, columns: int = 400) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))


@pytest.fixture(autouse=True)
def _event_files_sort_by_age(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of one second and one process end in a number, and 10 would sort before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(100))


@pytest.fixture
def no_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.startswith("torch.utils.tensorboard"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)


def _strict_lines(run: Path) -> list[dict]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = (run / LOG_FILE).read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def _curve(run: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def _recorded(run: Path, steps: range, done: int = 0, loss: float = 1.0) -> None:
    with RunLog(run, 100, done=done) as log:
        for step in steps:
            log.record(step, step * 2.0, "train", {"loss": loss + step})


def test_records_lines_and_curves(tmp_path):
    run = tmp_path / "new" / "run"
    with RunLog(run, 8) as log:
        assert not run.exists()
        log.record(2, 1.23456, "train", {"loss": 1.5, "level": 1})
        log.record(4, 2.5, "train", {"loss": np.float32(1.25), "level": 1})
        log.record(4, 3.0, "dev", {"accuracy": 0.75})
    assert _strict_lines(run) == [
        {"step": 2, "seconds": 1.235, "kind": "train", "loss": 1.5, "level": 1},
        {"step": 4, "seconds": 2.5, "kind": "train", "loss": 1.25, "level": 1},
        {"step": 4, "seconds": 3.0, "kind": "dev", "accuracy": 0.75},
    ]
    assert read_log(run) == _strict_lines(run)
    assert _curve(run, "train/loss") == [(2, 1.5), (4, 1.25)]
    assert _curve(run, "dev/accuracy") == [(4, 0.75)]


def test_curves_are_on_disk_after_each_record(tmp_path):
    log = RunLog(tmp_path, 8)
    for step in (1, 2, 3):
        log.record(step, 1.0, "train", {"loss": 1.5})
        assert _curve(tmp_path, "train/loss")[-1] == (step, 1.5)
    log.close()


@given(
    st.dictionaries(
        st.text(min_size=1).filter(lambda name: name not in ("step", "seconds", "kind")),
        st.floats() | st.integers(-(2**60), 2**60),
        max_size=5,
    )
)
def test_every_line_is_json_and_comes_back(values):
    entry = {name: logs._json_number(value) for name, value in values.items()}
    read = logs._log_entry(logs._json_line({"step": 1, **entry}).encode())
    assert read is not None
    for name, value in values.items():
        assert read[name] == (value if math.isfinite(value) else None)


def test_what_is_not_finite_is_null_in_the_log(tmp_path):
    with RunLog(tmp_path, 8) as log:
        log.record(1, 0.0, "train", {"loss": math.nan, "gradient_norm": math.inf, "accuracy": 0.5})
    (line,) = _strict_lines(tmp_path)
    assert (line["loss"], line["gradient_norm"], line["accuracy"]) == (None, None, 0.5)
    ((_, value),) = _curve(tmp_path, "train/loss")
    assert math.isnan(value)


@pytest.mark.parametrize("name", ["step", "seconds", "kind"])
def test_a_value_does_not_take_the_place_of_another(tmp_path, name):
    with RunLog(tmp_path, 8) as log:
        log.record(1, 2.0, "dev", {name: 0.5, "count": 0.25})
    line = {"step": 1, "seconds": 2.0, "kind": "dev", f"dev/{name}": 0.5, "count": 0.25}
    assert _strict_lines(tmp_path) == [line]
    assert _curve(tmp_path, f"dev/{name}") == [(1, 0.5)]


def test_a_resumed_run_has_each_step_once(tmp_path):
    _recorded(tmp_path, range(1, 8))
    _recorded(tmp_path, range(5, 10), done=4, loss=100.0)
    expected = [(step, step + (1.0 if step <= 4 else 100.0)) for step in range(1, 10)]
    assert [(line["step"], line["loss"]) for line in _strict_lines(tmp_path)] == expected
    assert _curve(tmp_path, "train/loss") == expected
    _recorded(tmp_path, range(10, 12), done=9)
    assert [line["step"] for line in _strict_lines(tmp_path)] == list(range(1, 12))
    assert [step for step, _ in _curve(tmp_path, "train/loss")] == list(range(1, 12))


def test_records_after_close_are_added(tmp_path):
    _recorded(tmp_path, range(1, 4))
    log = RunLog(tmp_path, 8, done=2)
    for step in (3, 4):
        log.record(step, 0.0, "train", {"loss": 0.0})
        log.close()
    assert [line["step"] for line in _strict_lines(tmp_path)] == [1, 2, 3, 4]
    assert [step for step, _ in _curve(tmp_path, "train/loss")] == [1, 2, 3, 4]


def test_nothing_is_cut_before_the_first_record(tmp_path):
    _recorded(tmp_path, range(1, 8))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with RunLog(tmp_path, 100, done=3, quiet=True) as log:
        log.progress(3, VALUES)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


def test_a_cut_that_fails_leaves_the_log_as_it_was(tmp_path, monkeypatch):
    _recorded(tmp_path, range(1, 8))
    before = (tmp_path / LOG_FILE).read_bytes()

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with RunLog(tmp_path, 100, done=3) as log:
        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(InputError, match=r"(?s)No space left on device.*--resume"):
            log.record(4, 0.0, "train", {"loss": 1.0})
    assert (tmp_path / LOG_FILE).read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("torn", [b'{"step": 4, "secon', b"\0\0\0", b"\xff\xfe", b'{"st'])
def test_a_torn_last_line_goes(tmp_path, torn):
    _recorded(tmp_path, range(1, 4))
    with (tmp_path / LOG_FILE).open("ab") as log:
        log.write(torn)
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2, 3]
    _recorded(tmp_path, range(4, 6), done=3)
    assert [line["step"] for line in _strict_lines(tmp_path)] == [1, 2, 3, 4, 5]


def test_names_of_what_is_not_finite_leave_an_older_log(tmp_path):
    (tmp_path / LOG_FILE).write_text('{"step": 1, "loss": NaN}\n', encoding="utf-8")
    _recorded(tmp_path, range(2, 3), done=1)
    assert [line["loss"] for line in _strict_lines(tmp_path)] == [None, 3.0]


def test_a_last_line_that_lacks_its_end_only_stays(tmp_path):
    _recorded(tmp_path, range(1, 4))
    file = tmp_path / LOG_FILE
    file.write_bytes(file.read_bytes().rstrip(b"\n"))
    _recorded(tmp_path, range(4, 5), done=3)
    assert [line["step"] for line in _strict_lines(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("line", ["[1]", "nonsense", "", '{"loss": 1.0}', '{"step": "1"}', "NaN"])
def test_refuses_a_log_that_is_none(tmp_path, line):
    good = '{"step": 1}\n'
    (tmp_path / LOG_FILE).write_text(f"{good}{line}\n{good}", encoding="utf-8")
    with pytest.raises(InputError, match=r"log\.jsonl: line 2 is no line of a training log"):
        RunLog(tmp_path, 8)


def test_refuses_a_log_that_cannot_be_read(tmp_path):
    (tmp_path / LOG_FILE).mkdir()
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        RunLog(tmp_path, 8)


def test_says_which_folder_cannot_be_written(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(InputError, match="run"):
        RunLog(tmp_path / "run", 8).record(1, 0.0, "train", {})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tensorboard").write_text("a file")
    with pytest.raises(InputError, match=r"tensorboard: cannot be written to"):
        RunLog(tmp_path / "other", 8).record(1, 0.0, "train", {})


def test_without_tensorboard_it_says_so_once_and_writes_the_log(tmp_path, no_tensorboard, capsys):
    with RunLog(tmp_path, 8, quiet=True) as log:
        assert capsys.readouterr().err == ""  # other processes have a log as well
        log.record(1, 0.0, "train", {"loss": 1.0})
        log.record(2, 0.0, "train", {"loss": 1.0})
        log.picture(2, tmp_path / "absent.png")
    told = capsys.readouterr().err
    assert told.count("TensorBoard gets no curves") == 1
    assert "pip install 'stts-export[tensorboard]'" in told
    assert len(_strict_lines(tmp_path)) == 2
    assert os.listdir(tmp_path) == [LOG_FILE]


def test_pictures_are_in_tensorboard(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    (tmp_path / "x.png").write_bytes(png_bytes(image))
    with RunLog(tmp_path, 8) as log:
        log.picture(3, tmp_path / "x.png")
        with pytest.raises(InputError, match=r"absent\.png"):
            log.picture(3, tmp_path / "absent.png")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Images("kept windows")
    assert (event.step, event.width, event.height) == (3, 30, 20)
    (tmp_path / "back.png").write_bytes(event.encoded_image_string)
    with av.open(str(tmp_path / "back.png")) as file:
        back = next(file.decode(video=0)).to_ndarray(format="rgb24")
    np.testing.assert_array_equal(back, image)


def test_a_progress_line_has_everything_in_160_columns():
    line = progress_line(1234, 6250, VALUES, 0.8)
    assert line == (
        "step 1234/6250 1h06m left  loss 1.23 (answer 1.1 sim 0.0123 label 0.456)  acc 0.56"
        "  scores 0.012..0.934 std 0.213  kept 0.20..0.80  12,345 tok/s 23.4 clips/s"
    )
    assert progress_line(1, 6250, VALUES | {"broken": 3}).endswith("23.4 clips/s  3 broken")


def test_values_that_are_absent_are_left_out():
    assert progress_line(1, 9, {}) == "step 1/9"
    assert progress_line(1, 9, {"score_low": 0.1, "kept_high": 1.0}) == "step 1/9"
    assert progress_line(1, 9, {"loss": math.nan}, 2.0) == "step 1/9 16s left  loss nan"
    assert progress_line(1, 9, {"label_loss": 0.5}, math.inf) == "step 1/9 ? left  (label 0.5)"


@given(
    st.dictionaries(st.sampled_from(sorted({*VALUES} - {"broken"})), st.floats(1e-3, 1)),
    st.floats(1e-3, 1e6),
    st.integers(1, 99_999),
    st.floats(0, 5),
)
def test_a_progress_line_stays_short(values, rate, step, pace):
    values |= {"tokens_per_second": rate, "clips_per_second": rate / 1000}
    assert len(progress_line(step, 99_999, values, pace)) <= 165


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (3599, "59m59s"),
        (3600, "1h00m"),
        (9e5, "250h00m"),
    ],
)
def test_time_that_is_left(seconds, shown):
    assert progress_line(0, 1, {}, seconds) == f"step 0/1 {shown} left"


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    with RunLog(tmp_path, 9) as log:
        log.progress(1, {"loss": 2.0})
        log.say("level 1 begins")
        log.progress(2, {"loss": 1.0}, 1.0)
    assert capsys.readouterr().err == (
        "step 1/9  loss 2\nlevel 1 begins\nstep 2/9 7s left  loss 1\n"
    )


def test_one_line_that_changes_on_a_terminal(tmp_path, capsys, monkeypatch):
    _on_a_terminal(monkeypatch)
    with RunLog(tmp_path, 9) as log:
        log.say("start")
        log.progress(1, {"loss": 2.0})
        log.say("level 1 begins")
        log.progress(2, {"loss": 1.0})
    clear = "\r\x1b[K"
    assert capsys.readouterr().err == (
        f"start\n{clear}step 1/9  loss 2{clear}level 1 begins\nstep 1/9  loss 2"
        f"{clear}step 2/9  loss 1\n"
    )


def test_the_line_does_not_wrap(tmp_path, capsys, monkeypatch):
    _on_a_terminal(monkeypatch, columns=40)
    with RunLog(tmp_path, 6250) as log:
        log.progress(1234, VALUES, 0.8)
    shown = capsys.readouterr().err.removeprefix("\r\x1b[K").removesuffix("\n")
    assert shown == progress_line(1234, 6250, VALUES, 0.8)[:39]


def test_quiet_runs_say_nothing(tmp_path, capsys, monkeypatch):
    _on_a_terminal(monkeypatch)
    with RunLog(tmp_path, 9, quiet=True) as log:
        log.progress(1, VALUES)
        log.say("level 1 begins")
        log.record(1, 1.0, "train", VALUES)
    assert capsys.readouterr().err == ""
    assert len(read_log(tmp_path)) == 1
