"""Fixing free axes of a written file, byte by byte."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from stts_export.graphs.axes import with_fixed_axes
from stts_export.tensors import (
    DECODER,
    DECOMPOSED,
    GATHER_WINDOWS,
    VISION_LOWER,
    VISION_UPPER,
    graph_file,
    variant,
)


def _dimensions(model: onnx.ModelProto):
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        yield from value.type.tensor_type.shape.dim


def _decoder(bundle: Path) -> bytes:
    return (bundle / "onnx" / graph_file(DECODER)).read_bytes()


@pytest.mark.parametrize("size", [1, 127, 128, 40_000])
def test_only_the_named_axis_changes(golden_bundle: Path, size: int):
    source = _decoder(golden_bundle)
    expected = onnx.load_from_string(source)
    changed = 0
    for dim in _dimensions(expected):
        if dim.dim_param == "capacity":
            dim.dim_value = size
            changed += 1
    assert changed > 12  # inputs, outputs and values between
    assert onnx.load_from_string(with_fixed_axes(source, {"capacity": size})) == expected


def test_several_axes(golden_bundle: Path):
    fixed = onnx.load_from_string(
        with_fixed_axes(_decoder(golden_bundle), {"capacity": 64, "tokens": 1, "rows": 2})
    )
    names = {dim.dim_param for dim in _dimensions(fixed)}
    assert not names & {"capacity", "tokens", "rows"}
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in fixed.graph.input
    }
    assert shapes["input_ids"] == [1, 1]
    assert shapes["past_key_values.0.key"][2] == 64


def test_an_axis_that_is_not_there_is_an_error(golden_bundle: Path):
    with pytest.raises(ValueError, match="no axis bins"):
        with_fixed_axes(_decoder(golden_bundle), {"bins": 4, "capacity": 4})


def test_a_damaged_file_is_an_error(golden_bundle: Path):
    source = _decoder(golden_bundle)
    for damaged in (source[: len(source) // 2], b"", b"\xff" * 50, b"not an onnx file"):
        with pytest.raises(ValueError, match=r"not an ONNX file|no axis"):
            with_fixed_axes(damaged, {"capacity": 4})


_PARSE = """
import sys
import tensorrt_rtx as trt
from stts_export.graphs.axes import with_fixed_axes
logger = trt.Logger(trt.Logger.ERROR)
for file in sys.argv[1:]:
    model = open(file, "rb").read()
    if file.endswith("decoder/model.onnx"):
        model = with_fixed_axes(model, {"capacity": 256})
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model, file):
        sys.exit(f"{file}: {[parser.get_error(i).desc() for i in range(parser.num_errors)]}")
    print(network.num_layers)
"""


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed"
)
def test_tensorrt_rtx_parses_every_graph_but_the_plugin_s(golden_bundle: Path):
    graphs = (VISION_LOWER, VISION_UPPER, DECODER)
    names = (*graphs, *(variant(name, DECOMPOSED) for name in graphs), GATHER_WINDOWS)
    files = [str(golden_bundle / "onnx" / graph_file(name)) for name in names]
    done = subprocess.run(  # a parser that dislikes a graph may end its process
        [sys.executable, "-c", _PARSE, *files], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == len(files)
