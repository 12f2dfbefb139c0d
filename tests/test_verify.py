"""`verify` passes what agrees and fails what does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stts_export.bundle import Bundle
from stts_export.cli import main
from stts_export.engines import onnxruntime
from stts_export.errors import InputError
from stts_export.runtime import decoder
from stts_export.verify import MAX_FLIPPED, _MaskedUpper, verify
from tests.helpers import GOLDEN, random_checkpoint, small_config


def test_a_bundle_agrees_with_its_checkpoint(golden_bundle: Path):
    report = verify(golden_bundle, GOLDEN)
    assert report.passed
    names = {check.name for check in report.checks}
    assert {"scores", "windows flipped", "packed_features", "logits"} <= names
    limit = 0 if Bundle.open(golden_bundle).manifest.precision == "fp32" else MAX_FLIPPED
    assert all(c.limit == limit for c in report.checks if c.name == "windows flipped")


def _with_limits(bundle: Path, folder: Path, **limits: float) -> Path:
    copied = Path(shutil.copytree(bundle, folder))
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["limits"] |= limits
    (copied / "manifest.json").write_text(json.dumps(manifest))
    return copied


def test_a_lowest_ratio_is_where_the_comparison_begins(
    tmp_path: Path, small_bundle: Path, small_checkpoint: Path
):
    bundle = _with_limits(small_bundle, tmp_path / "b", min_prune_ratio=0.4)
    report = verify(bundle, small_checkpoint)
    assert report.passed
    assert {check.prune_ratio for check in report.checks} == {0.4, 0.5, 0.8}


def test_clips_that_do_not_fit_the_context_are_left_out(
    tmp_path: Path, small_bundle: Path, small_checkpoint: Path
):
    bundle = _with_limits(small_bundle, tmp_path / "b", max_tokens=60)
    report = verify(bundle, small_checkpoint)
    assert report.passed
    assert {c.prune_ratio for c in report.checks if c.clip.endswith("5 frames")} == {0.5, 0.8}
    with pytest.raises(InputError, match="no clip fits into 20 tokens"):
        verify(_with_limits(small_bundle, tmp_path / "c", max_tokens=20), small_checkpoint)


def test_a_decoder_that_stops_at_once_is_found(
    small_bundle: Path, small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    nothing = decoder.Continuation([], "stop", 0.0, 0.0)
    monkeypatch.setattr(decoder, "generate", lambda *_, **__: nothing)
    report = verify(small_bundle, small_checkpoint)
    assert {c.name for c in report.checks if not c.passed} == {"greedy tokens differ"}


@pytest.mark.parametrize("late", [False, True])
def test_logits_that_overflow_are_a_difference(
    tmp_path: Path,
    small_bundle: Path,
    small_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    late: bool,
):
    """With the prompt, or only with a later token."""
    real = onnxruntime.Runner.__call__

    def overflow(*arguments: Any) -> Any:
        outputs = real(*arguments)
        if "logits" in outputs and (arguments[1]["input_ids"].shape[1] == 1 or not late):
            outputs["logits"][0, 0] = np.inf
        return outputs

    monkeypatch.setattr(onnxruntime.Runner, "__call__", overflow)
    report = verify(small_bundle, small_checkpoint, keep_repro=tmp_path / "repro")
    failed = [check for check in report.checks if not check.passed]
    of_prompt = set() if late else {("logits", float("inf"))}
    assert {(c.name, c.got) for c in failed} == {*of_prompt, ("greedy tokens differ", 1.0)}
    assert late or report.repro == [str(tmp_path / "repro" / "decoder")]
    assert json.dumps(report.to_dict(), allow_nan=False)  # Infinity is no JSON
    assert main(["verify", str(small_bundle), "--against", str(small_checkpoint)]) == 3


def test_a_broken_masked_graph_is_found(
    tmp_path: Path, small_bundle: Path, small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    """Sessions on the CPU do not run it, so nothing else would notice."""
    real = _MaskedUpper.features
    monkeypatch.setattr(_MaskedUpper, "features", lambda *a: real(*a) * np.float32(1.01))
    report = verify(small_bundle, small_checkpoint)
    failed = {c.name for c in report.checks if not c.passed}
    assert failed == {"packed_features of vision_upper"}


def test_a_changed_file_ends_with_exit_code_3(
    tmp_path: Path, small_bundle: Path, small_checkpoint: Path, capsys
):
    bundle = Path(shutil.copytree(small_bundle, tmp_path / "b"))
    data = bundle / "onnx/decoder/model.onnx.data"
    content = bytearray(data.read_bytes())
    content[-5] ^= 1
    data.write_bytes(content)
    assert main(["verify", str(bundle), "--against", str(small_checkpoint)]) == 3
    assert "was changed after the build" in capsys.readouterr().err


def test_other_weights_are_found(tmp_path: Path, small_bundle: Path):
    other = random_checkpoint(tmp_path / "other", seed=1)
    report = verify(small_bundle, other)
    assert not report.passed
    failed = {check.name for check in report.checks if not check.passed}
    assert {"scores", "packed_features", "logits", "greedy tokens differ"} <= failed
    assert np.isfinite([check.got for check in report.checks]).all()


def test_another_architecture_is_refused(tmp_path: Path, small_bundle: Path):
    values = small_config(**{"vit_config.prune_at": 0})
    other = random_checkpoint(tmp_path / "other", values)
    with pytest.raises(InputError, match="another configuration"):
        verify(small_bundle, other)


def test_exit_codes(tmp_path: Path, small_bundle: Path, small_checkpoint: Path, capsys):
    assert main(["verify", str(small_bundle), "--against", str(small_checkpoint)]) == 0
    assert "agrees with" in capsys.readouterr().out
    other = random_checkpoint(tmp_path / "other", seed=1)
    assert main(["verify", str(small_bundle), "--against", str(other)]) == 3
    assert "DIFFERS" in capsys.readouterr().out
