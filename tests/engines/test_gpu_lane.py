"""The checks of the GPU lane (tests/gpu) can be passed, and can fail: on the stand-ins."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from stts_export import Session
from stts_export.build import BuildSpec, bundle_from_bundle
from tests.gpu.checks import check_graph_capture, check_results
from tests.gpu.kit import PRUNE_RATIOS, Expected, record
from tests.standins.fixtures import install_cuda, install_tensorrt, plugin_library


@pytest.fixture(scope="module")
def expected(golden_bundle: Path) -> Expected:
    return record(golden_bundle)


@pytest.fixture(scope="module", params=["10.3", "11.4"])
def session(
    request: pytest.FixtureRequest, golden_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Session]:
    folder = tmp_path_factory.mktemp("lane")
    with pytest.MonkeyPatch.context() as patch:
        install_tensorrt(patch, request.param, install_cuda(patch))
        spec = BuildSpec(backends=("tensorrt",), plugin=plugin_library(folder))
        built = bundle_from_bundle(golden_bundle, folder / "bundle", spec)
        with Session.open(built, backend="tensorrt") as session:
            yield session


@pytest.mark.parametrize("ratio", PRUNE_RATIOS)
def test_results(session: Session, expected: Expected, ratio: float):
    check_results(session, expected, ratio)


def test_graph_capture(session: Session):
    check_graph_capture(session)


@pytest.mark.parametrize("name", ["features", "logits"])
def test_other_results_fail(session: Session, expected: Expected, name: str):
    wrong = {**expected, f"0.5/{name}": expected[f"0.5/{name}"] + np.float32(0.5)}
    with pytest.raises(AssertionError, match=name):
        check_results(session, wrong, 0.5)
