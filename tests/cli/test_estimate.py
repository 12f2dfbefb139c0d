"""`estimate` and `doctor` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stts_export import doctor
from stts_export.cli import main
from stts_export.doctor import Ability, Diagnosis, Finding
from tests.helpers import GOLDEN


def test_a_checkpoint_that_fits(capsys: pytest.CaptureFixture[str]):
    assert main(["estimate", str(GOLDEN), "--target", "orin-nx-16gb", "--max-frames", "8"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("tensorrt, decomposed graphs on Jetson Orin NX 16GB, fp32, up to 8")
    assert "KV cache" in printed
    assert "fits: " in printed


def test_what_does_not_fit_exits_with_1_after_the_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("stts_export.estimate_report.available_memory", lambda: 100_000_000)
    arguments = ["estimate", str(GOLDEN), "--backend", "onnxruntime", "--max-frames", "64"]
    assert main([*arguments, "--json"]) == 1
    printed = capsys.readouterr()
    values = json.loads(printed.out)
    assert values["fits"] is False
    assert values["nearest"][0]["change"] in printed.err
    assert printed.err.startswith("error: this machine: a session needs ")


def test_an_unknown_target_exits_with_1(capsys: pytest.CaptureFixture[str]):
    assert main(["estimate", str(GOLDEN), "--target", "h20"]) == 1
    assert "did you mean 'h200'" in capsys.readouterr().err


@pytest.mark.parametrize("possible", [True, False])
def test_doctor_exits_with_4_when_nothing_runs(
    possible: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    asked: list[Path | None] = []

    def diagnose(bundle: Path | None, *, plugin: Path | None) -> Diagnosis:
        asked.extend((bundle, plugin))
        ability = Ability("onnxruntime (cpu)", "run", possible, "", "pip install it")
        return Diagnosis((Finding("python", "Python", "ok", "3.11"),), (ability,))

    monkeypatch.setattr(doctor, "diagnose", diagnose)
    assert main(["doctor", "--plugin", "x.so"]) == (0 if possible else 4)
    assert asked == [None, Path("x.so")]
    printed = capsys.readouterr().out
    assert ("fix: pip install it" in printed) is not possible
    assert main(["doctor", "--json"]) == (0 if possible else 4)
    assert json.loads(capsys.readouterr().out)["can_run"] is possible
