"""The report of a quantised bundle: as JSON and back, as text, as a picture, and by the verb."""

from __future__ import annotations

import json
import math
import shutil
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stts_export.calibration.quant_report import (
    ANSWERS_CHANGED,
    CHECKS,
    COSINE,
    GATES_FILE,
    JACCARD,
    KL,
    NEAR_THRESHOLD,
    SQNR,
    AnswerPair,
    GateCheck,
    LayerError,
    QuantReport,
)
from stts_export.cli import quant_report
from stts_export.errors import InputError, MissingDependencyError
from stts_export.files import write_json

LAYERS = tuple(
    LayerError(f"vision.blocks.{index}.attention.wq", "vision_upper", "int8", 10.0 + index, 256)
    for index in range(24)
)
REPORT = QuantReport(
    recipe="int8", precision=("int8",), base="fp16", prune_ratio=0.5, clips=2, kept_windows=60,
    total_windows=120, measured_in="onnxruntime", layers=LAYERS,
    checks=(
        GateCheck.compare(SQNR, 10.0, 15.0, "worst: vision.blocks.0.attention.wq, int8"),
        GateCheck.compare(JACCARD, 0.98, 0.97, "worst: a, 0.96"),
        GateCheck.compare(COSINE, 0.995, 0.99),
        GateCheck.compare(ANSWERS_CHANGED, 0.5, 0.5, "1 of 2: b"),
    ),
    score_error=0.01, flipped=3,
    answers=(AnswerPair("a", "What?", "blue", "blue"), AnswerPair("b", "Why?", "so", "no")),
)  # fmt: skip
PASSED = replace(REPORT, checks=REPORT.checks[1:])

_numbers = st.floats(width=32)
_texts = st.text(max_size=4)
_counts = st.integers(0, 2**40)
_layers = st.builds(
    LayerError, _texts, _texts, _texts, st.floats(allow_nan=False), _counts
)  # what `SquareSums.decibels` returns is never NaN
_checks = st.builds(GateCheck, st.sampled_from(CHECKS), _numbers, _numbers, st.booleans(), _texts)
_answers = st.builds(AnswerPair, _texts, _texts, _texts, st.none() | _texts)


@given(
    st.builds(
        QuantReport, _texts, st.lists(_texts, max_size=2).map(tuple), _texts, st.floats(0, 1),
        _counts, _counts, _counts, _texts, st.lists(_layers, max_size=2).map(tuple),
        st.lists(_checks, max_size=3).map(tuple), _numbers, _counts,
        st.lists(_answers, max_size=2).map(tuple),
    )
)  # fmt: skip
def test_json_and_back(report: QuantReport):
    text = json.dumps(report.to_dict(), allow_nan=False)
    again = QuantReport.from_dict(json.loads(text), "x")
    assert str(again) == str(report)  # NaN is unlike itself, but written alike
    assert again.passed == report.passed
    assert again.lines(verbose=True) == report.lines(verbose=True)


def test_equal_outputs_are_null():
    equal = replace(REPORT, layers=(replace(LAYERS[0], sqnr=math.inf),))
    assert equal.to_dict()["layers"][0]["sqnr"] is None


def _without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda values: values.pop(key)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without("flipped"), "lacks 'flipped'"),
        (lambda values: values.update(clips="2"), 'clips is "2"'),
        (lambda values: values.update(clips=True), "clips is true"),
        (lambda values: values.update(score_error="big"), 'score_error is "big"'),
        (lambda values: values.update(layers={}), "layers is {}"),
        (lambda values: values["layers"][0].pop("sqnr"), "lacks 'sqnr'"),
        (lambda values: values.update(checks=["sqnr"]), "no quantisation report"),
        (lambda values: values["checks"][0].update(name="speed"), "no check 'speed'"),
        (lambda values: values["answers"][0].update(quantised=3), "text is 3"),
    ],
)
def test_what_is_no_report_is_refused(damage: Callable[[dict[str, Any]], Any], message: str):
    values = json.loads(json.dumps(REPORT.to_dict()))
    damage(values)
    with pytest.raises(InputError, match=message) as caught:
        QuantReport.from_dict(values, "x.json")
    assert caught.value.where == "x.json"


def test_checks_have_a_side():
    for name, good, bad in (
        (SQNR, 16, 14), (JACCARD, 0.99, 0.9), (COSINE, 0.99, 0.9),
        (NEAR_THRESHOLD, 0.01, 0.2), (KL, 0.01, 0.2), (ANSWERS_CHANGED, 0.0, 0.2),
    ):  # fmt: skip
        limit = {SQNR: 15.0, JACCARD: 0.97, COSINE: 0.97}.get(name, 0.1)
        assert GateCheck.compare(name, good, limit).used < 1
        assert GateCheck.compare(name, bad, limit).used > 1
        assert GateCheck.compare(name, good, limit).passed
        assert GateCheck.compare(name, limit, limit).passed
        assert not GateCheck.compare(name, bad, limit).passed
        assert not GateCheck.compare(name, math.nan, limit).passed
        assert GateCheck.compare(name, bad, limit).line().startswith(f"FAIL {name}: ")
    assert GateCheck.compare(ANSWERS_CHANGED, 0.0, 0.0).used == 0
    assert GateCheck.compare(ANSWERS_CHANGED, 0.1, 0.0).used == math.inf
    assert GateCheck.compare(SQNR, math.inf, 15.0).used == 0


def test_the_table_names_the_worst_layers():
    lines = REPORT.lines()
    assert "int8 on fp16, 2 held-out clips, 60 of 120 windows kept" in lines[0]
    rows = [line.split() for line in lines if line.startswith("vision.")]
    assert rows[0] == ["vision.blocks.0.attention.wq", "vision_upper", "int8", "10.0", "256"]
    assert len(rows) == 20
    assert "... 4 better ones" in lines
    assert "FAIL sqnr: 10 dB, at least 15 dB (worst: vision.blocks.0.attention.wq, int8)" in lines
    assert "ok   answers changed: 0.5, at most 0.5 (1 of 2: b)" in lines
    assert [check.name for check in REPORT.missed()] == [SQNR]
    assert "so" not in " ".join(lines)
    verbose = REPORT.lines(verbose=True)
    assert sum(line.startswith("vision.") for line in verbose) == 24
    assert "  quantised: 'no'" in verbose
    assert "a: What?" not in verbose  # that answer is the same


def test_a_picture_is_drawn(tmp_path: Path):
    """Also of numbers that have no length, and of nothing."""
    odd = GateCheck.compare(KL, math.inf, 0.0), GateCheck.compare(COSINE, math.nan, 1.0)
    layers = [replace(LAYERS[0], sqnr=sqnr) for sqnr in (-math.inf, -3.0, math.inf)]
    report = replace(REPORT, layers=(*layers, *LAYERS), checks=(*REPORT.checks, *odd))
    for number, drawn in enumerate((report, replace(report, layers=(), checks=()))):
        file = tmp_path / "reports" / f"{number}.png"
        drawn.write_picture(file)
        assert file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert len(list((tmp_path / "reports").iterdir())) == 2


def test_without_matplotlib_the_fix_is_named(tmp_path: Path):
    with (
        patch.dict(sys.modules, {"matplotlib.figure": None}),
        pytest.raises(MissingDependencyError, match=r"stts-export\[quantize\]"),
    ):
        REPORT.write_picture(tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def _run(*words: str) -> int:
    parser = ArgumentParser()
    parser.add_argument("-v", "--verbose", action="store_true")  # as for every verb
    quant_report.options(parser)
    return quant_report.run(parser.parse_args(words))


@pytest.fixture
def bundle(text_bundle: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    shutil.copytree(text_bundle, folder)
    return folder


def test_the_verb_prints_and_draws(bundle: Path, tmp_path: Path, capsys):
    write_json(bundle / GATES_FILE, PASSED.to_dict())
    picture = tmp_path / "x.png"
    assert _run(str(bundle), "-o", str(picture)) == 0
    assert capsys.readouterr().out.splitlines() == PASSED.lines()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert _run(str(bundle), "--verbose") == 0
    assert capsys.readouterr().out.splitlines() == PASSED.lines(verbose=True)
    write_json(bundle / GATES_FILE, REPORT.to_dict())
    assert _run(str(bundle), "--json") == 3
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(REPORT.to_dict()))


def test_the_verb_refuses(bundle: Path, tmp_path: Path, capsys):
    with pytest.raises(InputError, match="is fp32 and has no") as caught:
        _run(str(bundle))
    assert "--precision int8" in str(caught.value.fix)
    (bundle / GATES_FILE).parent.mkdir(exist_ok=True)
    (bundle / GATES_FILE).write_text("[", encoding="utf-8")
    with pytest.raises(InputError, match=GATES_FILE):
        _run(str(bundle))
    with pytest.raises(InputError, match="bundle"):
        _run(str(tmp_path / "none"))
    write_json(bundle / GATES_FILE, REPORT.to_dict())
    for name in ("x.jpg", "none/x.png"):
        with pytest.raises(InputError, match=name):
            _run(str(bundle), "-o", str(tmp_path / name))
    assert capsys.readouterr().out == ""
