"""ONNX Runtime without copies of weights: the same results, chosen where memory is short."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from stts_export.bundle import Bundle
from stts_export.engines import onnxruntime
from stts_export.runtime.decoder import Runner
from stts_export.tensors import VISION_LOWER
from tests.helpers import GOLDEN_CASES, golden_case


@pytest.fixture
def lower(golden_bundle: Path) -> Path:
    return Bundle.open(golden_bundle).graph(VISION_LOWER)


def _hidden(runner: Runner, file: Path) -> np.ndarray:
    frames = golden_case(GOLDEN_CASES[0]).frames[:2]
    vision = Bundle.open(file.parents[2]).config.vision
    start = np.zeros((1, vision.windows, vision.hidden_size), np.float32)
    inputs = {"frames": frames, "fresh": np.arange(len(frames)) == 0, "prev_pooled": start}
    return runner(inputs)["hidden"].astype(np.float32)


def test_results_are_the_same(lower: Path):
    results = [_hidden(onnxruntime.open_graph(lower, lean=lean), lower) for lean in (False, True)]
    np.testing.assert_allclose(results[1], results[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("free", "lean"), [(None, False), (10**12, False), (10**5, True)])
def test_it_is_chosen_where_copies_would_not_fit(
    lower: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    free: int | None,
    lean: bool,
):
    monkeypatch.setattr(onnxruntime, "available_memory", lambda: free)
    with caplog.at_level(logging.WARNING):
        onnxruntime.open_graph(lower)
    assert ("converted on every call" in caplog.text) is lean
