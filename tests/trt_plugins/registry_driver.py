"""One thing done in a real TensorRT registry, in a process of its own: its answer as JSON.

Run by test_registry.py with one folder of tensorrt-dispatch wheels on PYTHONPATH:
`python registry_driver.py VERB libstts_plugins.so [more]`.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorrt_dispatch_bindings as trt  # type: ignore[import-not-found]

KEY = ("SttsSelectPack", "1", "stts")
FIELDS: dict[str, list[tuple[str, np.ndarray, Any]]] = {
    "none": [],
    "refill=0": [("refill", np.array([0], np.int32), trt.PluginFieldType.INT32)],
    "refill=1": [("refill", np.array([1], np.int32), trt.PluginFieldType.INT32)],
    "refill=2": [("refill", np.array([2], np.int32), trt.PluginFieldType.INT32)],
    "refill=-1": [("refill", np.array([-1], np.int32), trt.PluginFieldType.INT32)],
    "two": [("refill", np.array([1, 1], np.int32), trt.PluginFieldType.INT32)],
    "float": [("refill", np.array([1], np.float32), trt.PluginFieldType.FLOAT32)],
    "unknown": [("refil", np.array([1], np.int32), trt.PluginFieldType.INT32)],
}
PHASES = (trt.TensorRTPhase.BUILD, trt.TensorRTPhase.RUNTIME)


def load(library: str) -> Any:
    """Handle of a library that the registry took, else None."""
    try:
        return trt.get_plugin_registry().load_library(library)
    except (RuntimeError, TypeError):
        return None


def creator() -> Any:
    """Our creator, or None."""
    return trt.get_plugin_registry().get_creator(*KEY)


def create(fields: str, phase: Any) -> Any:
    """A plugin, or None when the creator refuses."""
    collection = trt.PluginFieldCollection([trt.PluginField(*field) for field in FIELDS[fields]])
    return creator().create_plugin("layer", collection, phase)


def describe(library: str) -> dict[str, Any]:
    """What the registry knows of the plugin."""
    assert load(library) is not None
    found = creator()
    return {
        "tensorrt": trt.__version__,
        "key": [found.name, found.plugin_version, found.plugin_namespace],
        "fields": [[field.name, field.type.name] for field in found.field_names],
        "others": [
            trt.get_plugin_registry().get_creator(*other) is not None
            for other in (("SttsSelectPack", "2", "stts"), ("SttsSelectPack", "1", ""))
        ],
    }


def created(library: str, fields: str) -> list[bool]:
    """Whether a plugin comes, per phase."""
    assert load(library) is not None
    return [create(fields, phase) is not None for phase in PHASES]


def serialized(library: str, probe: str) -> int:
    """Exit status of probe.cpp."""
    assert load(library) is not None
    result: int = ctypes.CDLL(probe).probe(library.encode())
    return result


def finder(probe: str) -> list[Any]:
    """Of finder_probe.cpp: given a finder, major version behind it, whether messages arrive."""
    assert load(probe) is not None
    answers = ctypes.CDLL(probe)
    answers.hasFinder.restype = answers.reachesLogger.restype = ctypes.c_bool
    return [answers.hasFinder(), answers.finderMajor(), answers.reachesLogger()]


def twice(library: str) -> list[bool]:
    """Loaded, loaded again, still usable."""
    return [load(library) is not None, load(library) is not None, all(created_again())]


def created_again() -> list[bool]:
    """A plugin per phase from the creator that is registered."""
    return [create("refill=1", phase) is not None for phase in PHASES]


def foreign(library: str, *others: str) -> list[bool]:
    """Whether each other file was taken, and ours after them."""
    return [*(load(other) is not None for other in others), load(library) is not None]


def unload(library: str) -> list[bool]:
    """Registered; not after unloading, with a plugin still alive; again after loading again."""
    registry = trt.get_plugin_registry()
    handle = load(library)
    plugin = create("refill=1", trt.TensorRTPhase.BUILD)
    registered = [creator() is not None]
    registry.deregister_library(handle)
    registered.append(creator() is not None)
    del plugin
    gc.collect()
    assert load(library) is not None
    return [*registered, all(created_again())]


VERBS: dict[str, Callable[..., Any]] = {
    verb.__name__: verb for verb in (describe, created, serialized, finder, twice, foreign, unload)
}

if __name__ == "__main__":
    print(json.dumps(VERBS[sys.argv[1]](*sys.argv[2:])))
