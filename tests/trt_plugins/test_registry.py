"""The shipped .so in TensorRT's own registries: no GPU and no TensorRT builder is needed for that.

`make` puts the tensorrt-dispatch wheels into .venv/tensorrt/<version>; STTS_TENSORRT_DISPATCH names
another folder of such folders.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.trt_plugins.conftest import ROOT, run, tool_environment

DRIVER = Path(__file__).with_name("registry_driver.py")
WANTED = ("10.16", "11.4")


def dispatch_folders() -> Path:
    return Path(os.environ.get("STTS_TENSORRT_DISPATCH", ROOT / ".venv" / "tensorrt"))


@pytest.fixture(scope="module", params=WANTED)
def registry(request: pytest.FixtureRequest) -> Path:
    """Folder of one TensorRT version's dispatch wheels."""
    found = sorted(dispatch_folders().glob(f"{request.param}*"))
    if not found:
        pytest.skip(f"no tensorrt-dispatch {request.param} in {dispatch_folders()}: make tensorrt")
    return found[-1]


def drive(registry: Path, verb: str, *arguments: str | Path) -> tuple[Any, str]:
    """What the driver answered, and stderr; the process must end well."""
    done = subprocess.run(
        [sys.executable, DRIVER, verb, *map(str, arguments)],
        env=tool_environment(PYTHONPATH=str(registry)),
        check=False, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout}{done.stderr}"
    return json.loads(done.stdout), done.stderr


def test_registry_lists_the_plugin(registry: Path, plugin: Path) -> None:
    answer, _ = drive(registry, "describe", plugin)
    assert answer.pop("tensorrt").startswith(WANTED)
    assert answer == {
        "key": ["SttsSelectPack", "1", "stts"],
        "fields": [["refill", "INT32"]],
        "others": [False, False],
    }


@pytest.mark.parametrize("fields", ["none", "refill=0", "refill=1"])
def test_plugin_is_created_in_both_phases(registry: Path, plugin: Path, fields: str) -> None:
    answer, said = drive(registry, "created", plugin, fields)
    assert answer == [True, True]
    assert not said


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("refill=2", "'refill' is 2; it must be 0 or 1"),
        ("refill=-1", "'refill' is -1; it must be 0 or 1"),
        ("two", "'refill'"),
        ("float", "'refill'"),
        ("unknown", "unknown attribute 'refil'"),
    ],
)
def test_bad_attributes_are_refused_with_a_message(
    registry: Path, plugin: Path, fields: str, message: str
) -> None:
    answer, said = drive(registry, "created", plugin, fields)
    assert answer == [False, False]
    assert said.count("SttsSelectPack: ") == 2  # once per phase
    assert message in said


def build_probe(folder: Path, source: str) -> Path:
    library = folder / "probe.so"
    sources = ROOT / "trt_plugins"
    status, said = run(
        "c++", "-std=c++17", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror",
        "-DSTTS_OWN_TENSORRT_INTERFACE", f"-I{sources}", f"-I{sources}/tests/emulation",
        "-o", library, Path(__file__).with_name(source), "-ldl",
    )  # fmt: skip
    assert status == 0, said
    return library


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_probe(tmp_path_factory.mktemp("probe"), "probe.cpp")


def test_attributes_survive_serialisation(registry: Path, plugin: Path, probe: Path) -> None:
    answer, said = drive(registry, "serialized", plugin, probe)
    assert answer == 0, said


def test_version_of_the_registrys_finder_is_found(registry: Path, tmp_path: Path) -> None:
    answer, _ = drive(registry, "finder", build_probe(tmp_path, "finder_probe.cpp"))
    # The dispatch registries have no logger.
    assert answer == [True, int(registry.name.split(".")[0]), False]


def test_loading_twice_is_refused_and_harmless(registry: Path, plugin: Path) -> None:
    answer, _ = drive(registry, "twice", plugin)
    assert answer == [True, False, True]


def test_other_files_are_refused_and_harmless(registry: Path, plugin: Path, tmp_path: Path) -> None:
    text = tmp_path / "libtext.so"
    text.write_text("not a library\n", encoding="utf-8")
    other_machine = tmp_path / "libother.so"
    image = bytearray(plugin.read_bytes())
    image[18] = 0x3E if platform.machine() == "aarch64" else 0xB7  # e_machine
    other_machine.write_bytes(image)
    empty = tmp_path / "libempty.so"
    status, said = run("cc", "-shared", "-x", "c", "/dev/null", "-o", empty)
    assert status == 0, said
    answer, _ = drive(
        registry, "foreign", plugin, text, other_machine, empty, tmp_path / "missing.so"
    )
    assert answer == [False, False, False, False, True]


def test_unloading_while_a_plugin_lives_and_loading_again(registry: Path, plugin: Path) -> None:
    answer, _ = drive(registry, "unload", plugin)
    assert answer == [True, False, True]
