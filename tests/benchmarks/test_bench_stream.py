"""The benchmark of live streams runs end to end; times are never checked."""

from __future__ import annotations

import itertools
import json
import statistics
import threading
from pathlib import Path

import onnxruntime as ort
import pytest
from PIL import Image

from benchmarks import bench_stream
from benchmarks.harness import stream_measure
from benchmarks.harness.stream_feeds import Camera
from benchmarks.harness.stream_measure import PHASES
from docs import update_tables
from stts_export.live.settings import MODES
from tests.helpers import random_frames
from tests.live.helpers import Silent

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Results of a quick run, its files, and what it printed."""
    folder = tmp_path_factory.mktemp("stream")
    output, picture = folder / "bench.json", folder / "bench.png"
    arguments = ["--quick", "--cache", str(folder), "--threads", "1"]
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(words)))
        files = ["--json", str(output), "--picture", str(picture)]
        assert bench_stream.main([*arguments, *files]) == 0
    return output, picture, printed[-1]


@pytest.fixture(scope="module")
def results(quick):
    return json.loads(quick[0].read_text(encoding="utf-8"))


def test_a_quick_run_says_what_it_ran_on(results, quick):
    assert results["command"].startswith("python benchmarks/bench_stream.py --quick")
    assert results["machine"]["onnxruntime"] == ort.__version__
    assert results["settings"]["threads"] == 1
    assert results["quick"]
    assert quick[2] == bench_stream.render(results)


def test_windows_are_full_and_medians_are_of_the_samples(results):
    rows, settings = results["windows"], results["settings"]
    cases = list(itertools.product(settings["windows"], MODES))
    assert [(row["frames"], row["mode"]) for row in rows] == cases
    for row in rows:
        least = row["frames"]
        if row["mode"] == "incremental":  # a segment leaves the window as a whole
            least -= settings["every"] - 1
        assert all(least <= frames <= row["frames"] for frames in row["answer_frames"])
        assert row["kept_windows"] < row["total_windows"]
        assert row["dropped"] == 0
        for key in ("first_token", "latency"):
            samples = row[key]["samples"]
            assert len(samples) == settings["repeats"]
            assert row[key]["median"] == statistics.median(samples)
            assert 0 < row[key]["low"] == min(samples)
        pairs = zip(row["first_token"]["samples"], row["latency"]["samples"], strict=True)
        assert all(first <= whole for first, whole in pairs)


def test_growth_is_taken_within_a_repeat(results):
    samples = {
        (row["frames"], row["mode"]): row["first_token"]["samples"] for row in results["windows"]
    }
    grown = results["growth"]
    for mode in MODES:
        pairs = zip(samples[4, mode], samples[2, mode], strict=True)
        assert grown["longest_over_shortest"][mode]["samples"] == [a / b for a, b in pairs]
    for frames in (2, 4):
        pairs = zip(samples[frames, "exact"], samples[frames, "incremental"], strict=True)
        quotients = grown["exact_over_incremental"][str(frames)]["samples"]
        assert quotients == [a / b for a, b in pairs]


def test_streams_are_counted_one_by_one(results):
    rows, settings = results["streams"], results["settings"]
    cases = list(itertools.product(settings["streams"], MODES))
    assert [(row["streams"], row["mode"]) for row in rows] == cases
    for row in rows:
        assert row["offered_per_second"] == row["streams"] * settings["rate"]
        assert len(row["encoded_of_each"]) == settings["stream_rounds"]
        for each in row["encoded_of_each"]:
            assert len(each) == row["streams"]
        fairness = [min(each) / max(each) for each in row["encoded_of_each"]]
        assert row["fairness"]["samples"] == fairness
        assert 0 <= row["dropped_share"]["median"] <= 1


def test_questions_of_the_trace_are_counted_by_phase(results):
    trace, questions = results["controller"], results["settings"]["phase_questions"]
    answers = trace["answers"]
    assert [a["time"] for a in answers] == sorted(a["time"] for a in answers)
    for phase in PHASES:
        row = trace["phases"][phase]
        mine = [answer for answer in answers if answer["phase"] == phase]
        assert len(mine) == row["answers"]
        assert sum(a["latency"] <= trace["budget"] for a in mine) == row["within_budget"]
        asked = row["answers"] + row["skipped_questions"]
        assert row["share_within_budget"] == row["within_budget"] / max(1, asked)
    skipped = sum(row["skipped_questions"] for row in trace["phases"].values())
    assert 0 < len(answers) + skipped <= len(PHASES) * questions
    ratios = [answer["prune_ratio"] for answer in answers]
    assert trace["ratio_changes"] == sum(a != b for a, b in itertools.pairwise(ratios))
    assert all(answer["reason"] for answer in answers)
    begun, ended = trace["load_between"]
    assert 0 < begun < ended


def test_the_picture_has_three_parts(quick):
    with Image.open(quick[1]) as picture:
        assert picture.format == "PNG"
        assert picture.width > 2 * picture.height


def test_an_earlier_run_is_shown_and_drawn(quick, tmp_path, capsys):
    output, _, printed = quick
    again = tmp_path / "again.png"
    assert bench_stream.main(["--show", str(output), "--picture", str(again)]) == 0
    assert capsys.readouterr().out == printed + "\n"
    assert again.stat().st_size > 0


def test_the_readme_s_table_is_computed_from_a_run(quick, monkeypatch):
    monkeypatch.setattr(update_tables, "STREAM", quick[0])
    table = update_tables.stream_table().splitlines()
    assert table[0].startswith("| window | exact | incremental")
    assert [line.split(" frames")[0] for line in table[2:4]] == ["| 2", "| 4"]
    assert all(line.count("|") == 5 for line in table[:4])


def test_shares_count_skipped_questions_as_late():
    answers = [
        {"phase": "during", "latency": 0.1, "prune_ratio": 0.3, "skipped_before": 0},
        {"phase": "during", "latency": 0.3, "prune_ratio": 0.5, "skipped_before": 2},
        {"phase": "after", "latency": 0.1, "prune_ratio": 0.5, "skipped_before": 0},
    ]
    row = stream_measure._describe_phase(answers, "during", 0.2)
    assert row["share_within_budget"] == 0.25
    assert row["ratio_changes"] == 1


def test_a_camera_goes_on_until_it_is_told_to_stop():
    clip = random_frames(2, (48, 48))
    stop, arrivals = threading.Event(), []
    for arrival in Camera("camera", clip, 1000.0).arrivals(stop, Silent()):
        arrivals.append(arrival)
        if len(arrivals) == 5:
            stop.set()
    assert [arrival.pts for arrival in arrivals] == [number / 1000 for number in range(5)]
    assert [arrival.is_first for arrival in arrivals] == [True, *[False] * 4]
    assert (arrivals[3].rgb() == clip[1]).all()


@pytest.mark.parametrize(
    "arguments",
    [["--windows", "3"], ["--windows", "66"], ["--streams", "0"], ["--rate", "65"],
     ["--rate", "2.5"], ["--repeats", "0"], ["--threads", "0"], ["--load", "0"]],
)  # fmt: skip
def test_bad_arguments_are_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        bench_stream.main(arguments)
    assert caught.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.skipif(
    not (BENCHMARKS / "results" / "bench_stream_cpu.json").exists(), reason="no run is stored yet"
)
def test_readme_shows_the_stored_run(capsys):
    bench_stream.main(["--show", str(BENCHMARKS / "results" / "bench_stream_cpu.json")])
    shown = capsys.readouterr().out
    assert shown in (BENCHMARKS / "README.md").read_text(encoding="utf-8")
