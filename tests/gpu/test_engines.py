"""Engines built and run on this GPU against what ONNX Runtime computed."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from stts_export import Session
from stts_export.build import BuildSpec, bundle_from_bundle
from stts_export.engines import cuda
from stts_export.engines.library import MODULES, TENSORRT, TENSORRT_RTX
from stts_export.engines.tensorrt_rtx import TARGETS
from stts_export.tensors import Precision
from tests.gpu.checks import check_graph_capture, check_results
from tests.gpu.kit import PRUNE_RATIOS, Expected
from tests.helpers import ON_CPU


@pytest.fixture(scope="module", params=list(MODULES))
def backend(request: pytest.FixtureRequest, _gpu: None) -> str:
    name: str = request.param
    if find_spec(MODULES[name]) is None:
        pytest.skip(f"needs the Python package {MODULES[name]}")
    if find_spec("cuda") is None:
        pytest.skip("needs cuda-python")
    target = "sm{}{}".format(*cuda.compute_capability())
    if name == TENSORRT_RTX and target not in TARGETS:
        pytest.skip(f"TensorRT for RTX does not build for {target}")
    return name


@pytest.fixture(scope="module", params=ON_CPU)
def built(
    request: pytest.FixtureRequest,
    backend: str,
    kit: Path,
    plugin: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Expected]:
    """Bundle with engines for this GPU, and what to expect of it."""
    precision: Precision = request.param
    bundle = tmp_path_factory.mktemp("built") / f"{backend}-{precision}"
    used = plugin if backend == TENSORRT else None
    spec = BuildSpec(backends=(backend,), plugin=used)
    bundle_from_bundle(kit / f"golden-{precision}", bundle, spec)
    with np.load(kit / f"golden-{precision}.npz") as stored:
        return bundle, dict(stored)


@pytest.fixture(scope="module")
def session(built: tuple[Path, Expected], backend: str) -> Iterator[Session]:
    with Session.open(built[0], backend=backend) as session:
        yield session


@pytest.mark.parametrize("ratio", PRUNE_RATIOS)
def test_engines_equal_onnxruntime(session: Session, built: tuple[Path, Expected], ratio: float):
    check_results(session, built[1], ratio)


def test_cuda_graphs_replay_what_a_call_computes(session: Session):
    check_graph_capture(session)
