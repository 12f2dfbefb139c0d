"""The graphs without weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from stts_export.calibration.layers import Numerics
from stts_export.engines import onnxruntime
from stts_export.errors import VerificationError
from stts_export.graphs.check import check_graph
from stts_export.graphs.export import export_graph
from stts_export.model.vlm import SttsModel
from stts_export.runtime import planner
from stts_export.tensors import GATHER_WINDOWS, SELECT_PACK, Precision, graph_specs
from tests.helpers import ON_CPU, random_model


@pytest.fixture(scope="module")
def model() -> SttsModel:
    return random_model()


@pytest.mark.parametrize("precision", ON_CPU)
def test_select_pack_is_one_node_of_the_plugin(
    model: SttsModel, tmp_path: Path, precision: Precision
):
    file = export_graph(model, SELECT_PACK, Numerics(precision), tmp_path)
    written = onnx.load(file)
    spec = graph_specs(model.config, precision)[SELECT_PACK]
    (node,) = written.graph.node
    assert (node.op_type, node.domain) == ("SttsSelectPack", "stts")
    assert list(node.input) == [tensor.name for tensor in spec.inputs]
    assert list(node.output) == [tensor.name for tensor in spec.outputs]
    attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
    assert attributes == {
        "refill": 1,
        "plugin_version": b"1",
        "plugin_namespace": b"stts",
        "tensorrt_plugin_shape_input_indices": [2],
    }
    assert node.input[2] == "kept_count"
    assert {entry.domain: entry.version for entry in written.opset_import} == {"": 20, "stts": 1}
    assert written.ir_version == 10
    assert not written.graph.initializer
    assert [path.name for path in file.parent.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("precision", ON_CPU)
def test_gather_windows_gathers_the_planner_s_plan(
    model: SttsModel, tmp_path: Path, precision: Precision
):
    file = export_graph(model, GATHER_WINDOWS, Numerics(precision), tmp_path)
    vision = model.config.vision
    frames, W, G = 6, vision.windows, vision.patches_per_window
    dtype = {"fp32": np.float32, "fp16": np.float16}[precision]
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((frames, W * G, vision.hidden_size)).astype(dtype)
    keep = planner.select(rng.random((frames, W), dtype=np.float32), frames * W // 2)
    plan = planner.pack(keep)
    got = onnxruntime.open_graph(file)(
        {"hidden": hidden, "gather_window": np.asarray(plan.gather_window, np.int32)}
    )["bins"]
    windows = hidden.reshape(frames * W, G, vision.hidden_size)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, windows[plan.gather_window].reshape(got.shape))
    assert got.shape == (len(plan.gather_window), W * G, vision.hidden_size)
    written = onnx.load(file)
    assert [node.op_type for node in written.graph.node] == ["Reshape", "Gather", "Reshape"]
    assert [path.name for path in file.parent.iterdir()] == ["model.onnx"]


def test_other_windows_than_the_plan_s_are_an_error(model: SttsModel, tmp_path: Path):
    file = export_graph(model, GATHER_WINDOWS, Numerics("fp32"), tmp_path)
    written = ir.load(file)
    gather = next(node for node in written.graph if node.op_type == "Gather")
    plan = gather.inputs[1]
    zeros = ir.node("Sub", [plan, plan])
    written.graph.insert_before(gather, [zeros])
    gather.replace_input_with(1, zeros.outputs[0])
    ir.save(written, file)
    spec = graph_specs(model.config, "fp32")[GATHER_WINDOWS]
    with pytest.raises(VerificationError, match="other windows than the plan says"):
        check_graph(spec, Numerics("fp32"), file, model)


def test_a_plugin_node_with_its_tensors_in_another_order_is_an_error(
    model: SttsModel, tmp_path: Path
):
    file = export_graph(model, SELECT_PACK, Numerics("fp32"), tmp_path)
    written = onnx.load(file)
    outputs = written.graph.node[0].output
    outputs[2], outputs[3] = outputs[3], outputs[2]
    onnx.save(written, file)
    spec = graph_specs(model.config, "fp32")[SELECT_PACK]
    with pytest.raises(VerificationError, match="kept_window', 'kept_slot"):
        check_graph(spec, Numerics("fp32"), file, model)
