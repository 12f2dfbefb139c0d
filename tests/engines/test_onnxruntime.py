"""The ONNX Runtime back end: loading, running in place, and what it says when it cannot."""

from __future__ import annotations

import builtins
from pathlib import Path

import numpy as np
import pytest

from stts_export.bundle import Bundle
from stts_export.engines import onnxruntime
from stts_export.errors import InputError, MissingDependencyError
from stts_export.runtime.decoder import KVCache
from stts_export.tensors import DECODER, present_names


def _decoder_inputs(
    bundle: Bundle, runner: onnxruntime.Runner
) -> tuple[dict[str, np.ndarray], KVCache]:
    cache = KVCache(runner, bundle.config, "fp32", 5)
    return {
        "input_ids": np.array([[1, 2, 3]]),
        "features": np.zeros((1, bundle.config.text.hidden_size), np.float32),
        "visual_group": np.full((1, 3), -1, np.int32),
        "position_ids": np.arange(3)[None],
        "cache_position": np.array([0]),
    }, cache


def test_outputs_in_place_equal_new_ones(small_bundle: Path):
    bundle = Bundle.open(small_bundle)
    runner = onnxruntime.open_graph(bundle.graph(DECODER), threads=1)
    inputs, cache = _decoder_inputs(bundle, runner)
    expected = runner({**inputs, **cache.past})
    assert not any(array.any() for array in cache.past.values())
    got = runner({**inputs, **cache.past}, cache.present)
    assert list(got) == ["logits"]
    np.testing.assert_array_equal(got["logits"], expected["logits"])
    for layer in range(bundle.config.text.num_layers):
        for name in present_names(layer):
            np.testing.assert_array_equal(cache.present[name], expected[name])
            assert cache.present[name][:, :, :3].any()
            assert not cache.present[name][:, :, 3:].any()


def test_arrays_with_gaps_are_refused(small_bundle: Path):
    bundle = Bundle.open(small_bundle)
    runner = onnxruntime.open_graph(bundle.graph(DECODER), threads=1)
    inputs, cache = _decoder_inputs(bundle, runner)
    inputs["input_ids"] = np.array([[1, 2, 3, 4, 5, 6]])[:, ::2]
    with pytest.raises(ValueError, match="input_ids is not contiguous"):
        runner({**inputs, **cache.past}, cache.present)


def test_a_file_that_is_no_graph(tmp_path: Path):
    file = tmp_path / "model.onnx"
    file.write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot load it"):
        onnxruntime.open_graph(file)


def test_an_unknown_device(small_bundle: Path):
    with pytest.raises(InputError, match="cpu or cuda"):
        onnxruntime.open_graph(Bundle.open(small_bundle).graph(DECODER), device="tpu")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_cuda_is_never_replaced_by_the_cpu(small_bundle: Path):
    import onnxruntime as ort

    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(MissingDependencyError, match="CUDA was asked for"):
        onnxruntime.open_graph(Bundle.open(small_bundle).graph(DECODER), device="cuda")


def test_a_missing_package_says_how_to_install_it(
    small_bundle: Path, monkeypatch: pytest.MonkeyPatch
):
    real = builtins.__import__

    def without_onnxruntime(name, *arguments, **keywords):
        if name == "onnxruntime":
            raise ImportError("No module named 'onnxruntime'")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_onnxruntime)
    with pytest.raises(MissingDependencyError, match=r"stts-export\[cpu\]") as error:
        onnxruntime.open_graph(Bundle.open(small_bundle).graph(DECODER))
    assert error.value.exit_code == 4


def test_versions_that_give_wrong_results_are_refused(
    small_bundle: Path, monkeypatch: pytest.MonkeyPatch
):
    import onnxruntime as ort

    monkeypatch.setattr(ort, "__version__", "1.24.3")
    with pytest.raises(MissingDependencyError, match=r"1\.24\.3 is too old"):
        onnxruntime.open_graph(Bundle.open(small_bundle).graph(DECODER))
