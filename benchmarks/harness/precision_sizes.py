"""Bytes of the weights in a bundle's graphs, scales included."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stts_export.bundle import GRAPH_FOLDER
from stts_export.tensors import graph_file


def weights_in(bundle: Path) -> dict[str, int]:
    """Return the bytes of each graph's constants, without what aligns them in their file.

    Args:
        bundle: its folder; variants of a graph share its weights and are not counted.
    """
    import onnx

    found = {}
    for folder in sorted((bundle / GRAPH_FOLDER).iterdir()):
        model = onnx.load(bundle / GRAPH_FOLDER / graph_file(folder.name), load_external_data=False)
        total = sum(_nbytes(tensor) for tensor in model.graph.initializer)
        if any(tensor.external_data for tensor in model.graph.initializer):
            found[folder.name] = total
    return found


def _nbytes(tensor: object) -> int:
    from onnx import TensorProto, numpy_helper

    assert isinstance(tensor, TensorProto)
    if tensor.external_data:
        return int({entry.key: entry.value for entry in tensor.external_data}["length"])
    if tensor.raw_data:
        return len(tensor.raw_data)
    return int(np.asarray(numpy_helper.to_array(tensor)).nbytes)
