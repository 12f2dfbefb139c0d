"""ONNX Runtime: the graphs themselves are what runs, on the CPU or with its CUDA provider."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from stts_export.engines.library import ONNXRUNTIME
from stts_export.errors import InputError, MissingDependencyError
from stts_export.files import readable_size
from stts_export.machine import available_memory
from stts_export.tensors import DATA_FILE, Precision

log = logging.getLogger(__name__)

NAME = ONNXRUNTIME
DEVICES = ("cpu", "cuda")

MIN_VERSION = (1, 31)
"""Older ones compute Attention, RotaryEmbedding or TensorScatter wrongly, or not at all."""

_INSTALL = "pip install 'stts-export[cpu]', or 'stts-export[gpu]' for CUDA"
COPIES, ROOM = 2, 0.8
"""Size of copies (fp16 weights become fp32), and how much of the free memory they may take."""
_COPYING = ["FuseFp16InitializerToFp32NodeTransformer"]
"""Optimisations that copy weights."""
_ORT_FATAL_ONLY = 4  # errors reach the caller as exceptions


class Runner:
    """A loaded graph; call it with named arrays.

    Args:
        session: an `onnxruntime.InferenceSession`.
    """

    updates_in_place = True
    """TensorScatter writes into its input where both have the same memory."""
    cache_capacity: int | None = None

    def __init__(self, session: Any) -> None:
        self._session = session
        self._outputs = [value.name for value in session.get_outputs()]

    def __call__(
        self,
        inputs: Mapping[str, NDArray[Any]],
        in_place: Mapping[str, NDArray[Any]] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Run the graph.

        Args:
            inputs: C-contiguous arrays by name, of the contract's types.
            in_place: outputs to write into these arrays; one may also be an input, which is then
                updated where it lies (the KV cache).

        Returns:
            The other outputs by name, newly allocated.
        """
        if in_place is None:
            return dict(zip(self._outputs, self._session.run(None, dict(inputs)), strict=True))
        binding = self._session.io_binding()
        for name, array in inputs.items():
            _bind(binding.bind_input, name, array)
        for name, array in in_place.items():
            _bind(binding.bind_output, name, array)
        rest = [name for name in self._outputs if name not in in_place]
        for name in rest:
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        bound = [*in_place, *rest]  # get_outputs answers in the order of binding
        values = dict(zip(bound, binding.get_outputs(), strict=True))
        return {name: values[name].numpy() for name in rest}

    @staticmethod
    def zeros(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Array of zeros."""
        return np.zeros(shape, dtype)

    @staticmethod
    def to_host(array: NDArray[Any]) -> NDArray[Any]:
        """Return the array itself: it lies on the host."""
        return array

    @staticmethod
    def copy(target: NDArray[Any], source: NDArray[Any]) -> None:
        """Copy an array."""
        target[...] = source


def converts_weights(precision: Precision, formats: Collection[str]) -> bool:
    """Whether weights in some of these formats are converted to the graph's type on every call.

    ONNX Runtime multiplies int8 with int8 in fp32 graphs, and 4-bit integers in all; the rest it
    converts.
    """
    return "fp8" in formats or ("int8" in formats and precision != "fp32")


def _leaves_no_room(file: Path) -> bool:
    """Whether copies of a graph's weights would take what the machine has; says so."""
    data, free = file.with_name(DATA_FILE), available_memory()
    if free is None or not data.exists() or COPIES * data.stat().st_size <= ROOM * free:
        return False
    log.warning(
        "%s: %s of memory available, too little for copies of %s of weights: they stay in their "
        "file and are converted on every call, which is slow",
        file, readable_size(free), readable_size(data.stat().st_size),
    )  # fmt: skip
    return True


def _bind(bind: Any, name: str, array: NDArray[Any]) -> None:
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} is not contiguous")
    bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def open_graph(
    file: Path,
    *,
    device: str | None = None,
    threads: int | None = None,
    lean: bool | None = None,
    converts: bool = False,
) -> Runner:
    """Load an ONNX file.

    Args:
        file: `model.onnx` with its external data beside it.
        device: "cpu" (default) or "cuda".
        threads: threads within an operator; all cores when None.
        lean: leave the weights in their file, where the system can drop them, and convert those of
            an operator when it runs; otherwise copies are made ahead, which is faster. None: only
            where the machine has not the memory for copies.
        converts: whether it has weights in 8 bits that are converted on every call, as
            `converts_weights` says: one after the other is then, and none is kept.

    Raises:
        MissingDependencyError: onnxruntime, or the CUDA provider, is not there.
        InputError: the device has no such name, or the file is not a graph ONNX Runtime can load.
    """
    if device not in (None, *DEVICES):
        raise InputError(f"device {device!r}", where=NAME, allowed=" or ".join(DEVICES))
    if threads is not None and threads < 1:
        raise InputError(f"{threads} threads", where=NAME, allowed="1 or more")
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingDependencyError(
            f"is not installed ({error})", where=NAME, fix=_INSTALL
        ) from None
    if tuple(int(part) for part in ort.__version__.split(".")[:2]) < MIN_VERSION:
        raise MissingDependencyError(
            f"{ort.__version__} is too old: it gives wrong results for these graphs",
            where=NAME,
            allowed=f"{'.'.join(map(str, MIN_VERSION))} or newer",
            fix=_INSTALL,
        )
    options = ort.SessionOptions()
    options.log_severity_level = _ORT_FATAL_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    if lean is None:
        lean = device != "cuda" and _leaves_no_room(file)
    if lean:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if lean or converts:
        options.enable_cpu_mem_arena = False  # it keeps what it ever held
        # Otherwise all conversions of weights come first, and their results wait.
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    provider = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
    try:
        session = ort.InferenceSession(
            file, options, providers=[provider], disabled_optimizers=_COPYING if lean else None
        )
    except Exception as error:  # its exception classes are private to the wheel
        raise InputError(
            f"ONNX Runtime {ort.__version__} cannot load it: {error}",
            where=str(file),
            fix="rebuild the bundle with `stts-export build`",
        ) from error
    # The GPU wheel lists CUDA without a GPU and then falls back without a word.
    if provider not in session.get_providers():
        raise MissingDependencyError(
            f"CUDA was asked for, but only {session.get_providers()} started",
            where=NAME,
            fix="install a CUDA driver and pip install 'stts-export[gpu]', or use device='cpu'",
        )
    return Runner(session)
