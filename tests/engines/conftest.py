"""Sessions on engines; a module that uses them says from which bundle, by a fixture `source`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stts_export import Session
from tests.engines.machines import VERSIONS, Machine, build_engines, machine_of


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Bundle with engines of a version, built once."""
    folder = tmp_path_factory.mktemp("engines")

    def get(version: str) -> Path:
        bundle = folder / version
        return bundle if bundle.exists() else build_engines(source, bundle, version)

    return get


@pytest.fixture(scope="module")
def reference(source: Path) -> Iterator[Session]:
    with Session.open(source, threads=1) as session:
        yield session


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def machine(version: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    machine = machine_of(monkeypatch, version)
    yield machine
    machine.cuda.assert_no_violation()


@pytest.fixture
def session(version: str, machine: Machine, built: Callable[[str], Path]) -> Iterator[Session]:
    """A session on the engines of one version."""
    with machine.open(built(version)) as session:
        yield session
