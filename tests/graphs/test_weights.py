"""Weights go from the checkpoint to a graph's data file one by one, each stored once."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.external_data_helper import ExternalDataInfo

from stts_export.calibration.layers import Numerics
from stts_export.checkpoint import open_checkpoint, save_checkpoint, streamed_model
from stts_export.errors import InputError
from stts_export.graphs.export import export_graph
from stts_export.graphs.weights import WeightTensor
from stts_export.model.vlm import SttsModel
from stts_export.tensors import DATA_FILE, DECODER, Precision
from tests.helpers import ON_CPU, random_model, small_config


def _external(file: Path) -> dict[str, tuple[int, int]]:
    """Name -> offset and length of the weights that a graph refers to."""
    found = {}
    for initializer in onnx.load(file, load_external_data=False).graph.initializer:
        if initializer.data_location == onnx.TensorProto.EXTERNAL:
            info = ExternalDataInfo(initializer)
            assert info.location == DATA_FILE
            found[initializer.name] = info.offset, info.length
    return found


def _stored(model: SttsModel, folder: Path, *, tied: bool) -> SttsModel:
    """A streamed model from a checkpoint on disk, its head like the embedding or not."""
    if tied:
        with torch.no_grad():
            model.language.lm_head.weight.copy_(model.language.embedding)
    save_checkpoint(model, folder)
    return streamed_model(open_checkpoint(folder))


@pytest.mark.parametrize("precision", ON_CPU)
def test_a_head_that_is_the_embedding_is_stored_once(tmp_path: Path, precision: Precision):
    table = "decoder.embedding decoder.new_embedding"
    sizes = []
    for tied in (True, False):
        folder = tmp_path / str(tied)
        model = _stored(random_model(), folder, tied=tied)
        file = export_graph(model, DECODER, Numerics(precision), folder / "onnx")
        refs = _external(file)
        assert table in refs
        assert ("decoder.lm_head.weight" not in refs) is tied
        sizes.append(file.with_name(DATA_FILE).stat().st_size)
    text = random_model().config.text
    head = text.vocab_size * text.hidden_size * (4 if precision == "fp32" else 2)
    assert head <= sizes[1] - sizes[0] < head + 2**16


def test_weights_are_those_of_the_checkpoint(tmp_path: Path):
    source = random_model()
    file = export_graph(
        _stored(source, tmp_path, tied=False), DECODER, Numerics("fp16"), tmp_path / "onnx"
    )
    refs = _external(file)
    data = file.with_name(DATA_FILE).read_bytes()

    def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
        offset, length = refs[name]
        return np.frombuffer(data[offset : offset + length], np.float16).reshape(shape)

    for name in ("att_proj", "ff_out"):
        weight = source.language.get_parameter(f"blocks.1.{name}.weight").detach().half()
        stored = values(f"decoder.blocks.1.{name}.weight.transposed", tuple(weight.T.shape))
        assert np.array_equal(stored, weight.T.numpy())
    with torch.no_grad():
        table = torch.cat([source.language.embedding, source.language.new_embedding]).half()
    stored = values("decoder.embedding decoder.new_embedding", tuple(table.shape))
    assert np.array_equal(stored, table.numpy())


def test_large_weights_begin_at_a_page(tmp_path: Path):
    model = random_model(small_config(**{"text_config.intermediate_size": 1024}))
    file = export_graph(model, DECODER, Numerics("fp32"), tmp_path)
    large = [offset for offset, length in _external(file).values() if length >= 2**16]
    assert len(large) >= 4
    assert not any(offset % 2**16 for offset in large)


def test_a_weight_beyond_fp16_is_named(tmp_path: Path):
    model = random_model()
    with torch.no_grad():
        model.language.get_parameter("blocks.0.ff_out.weight")[3, 5] = 1e5
    with pytest.raises(InputError, match=r"ff_out.*1e\+05") as error:
        export_graph(model, DECODER, Numerics("fp16"), tmp_path)
    assert "65504" in str(error.value)
    assert "--precision fp32" in str(error.value)


def test_every_tensor_is_reported(tmp_path: Path):
    reports: list[tuple[int, int]] = []
    file = export_graph(
        random_model(), DECODER, Numerics("fp32"), tmp_path, lambda *report: reports.append(report)
    )
    count = len(_external(file))
    assert reports == [(done, count) for done in range(count + 1)]


def test_large_weights_are_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = random_model()
    largest = 0
    real = WeightTensor.pieces

    def watched(tensor: WeightTensor):
        nonlocal largest
        for piece in real(tensor):
            largest = max(largest, math.prod(piece.shape) * (not tensor.transposed))
            yield piece

    monkeypatch.setattr(WeightTensor, "pieces", watched)
    monkeypatch.setattr("stts_export.graphs.weights.PIECE_BYTES", 4 * 32 * 100)  # 100 rows
    export_graph(model, DECODER, Numerics("fp16"), tmp_path)
    assert largest == 32 * 100
