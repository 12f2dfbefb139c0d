"""The table of machines."""

from __future__ import annotations

import dataclasses

import pytest

from stts_export.devices import DEVICES, GB, find_device
from stts_export.engines import tensorrt, tensorrt_rtx
from stts_export.engines.library import TENSORRT, TENSORRT_RTX
from stts_export.errors import InputError


@pytest.mark.parametrize("name", DEVICES)
def test_every_device_says_what_runs_there_and_where_that_is_from(name: str):
    device = DEVICES[name]
    assert device.name == name
    assert device.source
    assert device.sm is not None
    assert device.memory % GB == 0
    assert 0 < device.headroom < device.memory / 2
    assert device.usable + device.headroom == device.memory
    if device.backend == TENSORRT_RTX:
        assert device.sm in tensorrt_rtx.TARGETS
    if device.tensorrt is not None:  # the module's software brings one that works
        assert device.backend == TENSORRT
        assert device.tensorrt >= tensorrt.OLDEST


def test_what_is_measured_takes_the_place_of_the_allowance():
    device = dataclasses.replace(DEVICES["thor"], reserve=3 * GB)
    assert device.usable == 125 * GB


def test_an_unknown_device_is_refused_with_the_nearest():
    with pytest.raises(InputError, match=r"did you mean 'orin-nx-16gb'") as error:
        find_device("orin-nx-16")
    assert "h200" in str(error.value)
