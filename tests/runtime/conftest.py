"""Sessions on bundles that several tests share, one per module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from stts_export import Session


@pytest.fixture(scope="module")
def session(small_bundle: Path) -> Iterator[Session]:
    """A session that takes token ids."""
    with Session.open(small_bundle, threads=1) as session:
        yield session


@pytest.fixture(scope="module")
def speaking(text_bundle: Path) -> Iterator[Session]:
    """A session that takes text."""
    with Session.open(text_bundle, threads=1) as session:
        yield session
