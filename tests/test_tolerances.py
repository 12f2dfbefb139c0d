"""How differences are measured."""

from __future__ import annotations

import numpy as np
import pytest

from stts_export.tensors import PRECISIONS
from stts_export.tolerances import TOLERANCES, Measure, difference, quantised_row

MEASURES: tuple[Measure, ...] = ("max", "max_rel", "l2")


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_no_number_is_near_to_one_that_is_none(measure: Measure, bad: float):
    assert difference([1.0, bad], [1.0, 2.0], measure) == np.inf
    assert difference([1.0, 2.0], [1.0, bad], measure) == np.inf


def test_measures():
    got, reference = [3.0, 0.0], [3.0, -4.0]
    assert difference(got, reference, "max") == 4
    assert difference(got, reference, "max_rel") == 1
    assert difference(got, reference, "l2") == pytest.approx(4 / 5)
    with pytest.raises(ValueError, match="shapes differ"):
        difference([1.0], [1.0, 2.0], "max")


def test_every_output_has_a_limit_with_a_reason_at_every_precision():
    names = {name for name, _ in TOLERANCES}
    rows = (*PRECISIONS, *map(quantised_row, PRECISIONS))
    assert set(TOLERANCES) == {(name, row) for name in names for row in rows}
    assert all(row.limit > 0 and row.reason for row in TOLERANCES.values())
