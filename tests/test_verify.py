"""`verify` passes what agrees and fails what does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stts_export.bundle import Bundle
from stts_export.cli import main
from stts_export.errors import InputError
from stts_export.verify import MAX_FLIPPED, verify
from tests.helpers import GOLDEN, random_checkpoint, small_config


def test_a_bundle_agrees_with_its_checkpoint(golden_bundle: Path):
    report = verify(golden_bundle, GOLDEN)
    assert report.passed
    names = {check.name for check in report.checks}
    assert {"scores", "windows flipped", "packed_features", "logits"} <= names
    limit = 0 if Bundle.open(golden_bundle).manifest.precision == "fp32" else MAX_FLIPPED
    assert all(c.limit == limit for c in report.checks if c.name == "windows flipped")


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
