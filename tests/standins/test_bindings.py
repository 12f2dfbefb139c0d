"""The stand-ins have the names and arguments of the real bindings, and behave like them."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.standins import api, extract_api
from tests.standins.conftest import ALL, installed, make
from tests.standins.cuda import make_cuda
from tests.standins.tensorrt import VERSIONS

WHEELS = os.environ.get("STTS_TENSORRT_WHEELS")
"""Folder with wheels of tensorrt-cu12-bindings and tensorrt-cu13-bindings, to read them again."""


def check_description(described: dict[str, Any]) -> None:
    committed = extract_api.FOLDER / extract_api.file_name(described)
    assert extract_api.dumps(described) == committed.read_text()


@pytest.mark.skipif(not WHEELS, reason="STTS_TENSORRT_WHEELS names no folder of wheels")
def test_api_files_are_what_the_wheels_say():
    tag = f"-cp{sys.version_info.major}{sys.version_info.minor}-"
    wheels = [
        w for w in sorted(Path(WHEELS or "").glob("tensorrt_cu*_bindings-*")) if tag in w.name
    ]
    names = set()
    for wheel in wheels:
        described = extract_api.describe_wheel(wheel)
        check_description(described)
        names.add(extract_api.file_name(described))
    assert names == {f"tensorrt-{version}.json" for version in VERSIONS}


@pytest.mark.skipif(not installed("tensorrt-rtx", "1.7.1"), reason="needs tensorrt-rtx 1.7.1")
def test_api_file_is_what_tensorrt_rtx_says():
    check_description(extract_api.describe_installed("tensorrt_rtx"))


@pytest.mark.skipif(not installed("cuda-bindings", "13.4.4"), reason="needs cuda-bindings 13.4.4")
def test_api_file_is_what_cuda_python_says():
    check_description(extract_api.describe_installed("cuda.bindings.runtime"))


@pytest.mark.skipif(not installed("cuda-bindings", "13."), reason="needs cuda-bindings 13")
def test_cuda_answers_without_a_driver_as_the_real_one_does():
    real = importlib.import_module("cuda.bindings.runtime")
    if real.cudaDriverGetVersion()[1]:
        pytest.skip("this machine has a driver")
    ours = make_cuda(driver=0)
    for name, arguments in (
        ("cudaDriverGetVersion", ()), ("cudaGetDeviceCount", ()), ("cudaMalloc", (16,)),
        ("cudaStreamCreate", ()), ("cudaMemGetInfo", ()), ("cudaMallocHost", (16,)),
        ("cudaDeviceSynchronize", ()),
    ):  # fmt: skip
        expected = getattr(real, name)(*arguments)
        got = getattr(ours, name)(*arguments)
        assert (expected[0].name, expected[1:]) == (got[0].name, got[1:]), name
    with pytest.raises(TypeError):
        real.cudaMalloc()
    with pytest.raises(TypeError):
        ours.cudaMalloc()


@pytest.mark.parametrize(
    ("owner", "name", "versions"),
    [
        ("ICudaEngine", "get_aliased_input_tensor", {"10.16", "11.4", "rtx"}),
        ("ICudaEngine", "device_memory_size", {"10.3", "10.16"}),
        ("ICudaEngine", "device_memory_size_v2", set(ALL)),
        ("Builder", "platform_has_fast_fp16", {"10.3", "10.16"}),
        ("IBuilderConfig", "int8_calibrator", {"10.3", "10.16"}),
        ("IBuilderConfig", "set_compute_capability", {"rtx"}),
        ("IPluginRegistry", "get_plugin_creator", {"10.3", "10.16"}),
        ("ITensor", "set_dynamic_range", {"10.3", "10.16"}),
        ("IExecutionContext", "execute_v2", set(ALL)),
        ("IExecutionContext", "execute_async_v2", set()),
    ],
)
def test_versions_differ(owner: str, name: str, versions: set[str]):
    have = {version for version in ALL if hasattr(getattr(make(version), owner), name)}
    assert have == versions


def test_flags_differ():
    bits = {v: int(make(v).NetworkDefinitionCreationFlag.STRONGLY_TYPED) for v in ALL}
    assert bits == {"10.3": 1, "10.16": 1, "11.4": 0, "rtx": 0}
    assert not hasattr(make("11.4").BuilderFlag, "FP16")
    assert make("10.3").BuilderFlag.FP16.value == 0
    assert not hasattr(make("10.3"), "IAttentionOutputLayer")
    assert not hasattr(make("10.3").MemoryPoolType, "NOPE")


def test_every_class_refuses_what_it_does_not_have(trt: Any):
    classes = [value for value in vars(trt).values() if isinstance(value, type)]
    assert len(classes) > 60
    for kind in classes:
        assert not hasattr(kind, "no_such_name"), kind
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = trt.no_such_name
    logger = trt.Logger()
    with pytest.raises(AttributeError, match="no_such_name"):
        logger.no_such_name = 1


EXPRESSIONS = """
    1 << int(t.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    1 << t.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    t.BuilderFlag.TF32 | t.BuilderFlag.DEBUG
    t.DataType.HALF == 1
    t.DataType.HALF == t.float16
    t.DataType.HALF is t.float16
    t.DataType.HALF in (t.float32, t.float16)
    t.DataType.HALF.name, t.DataType.HALF.value, int(t.DataType.HALF)
    str(t.DataType.HALF), repr(t.DataType.HALF)
    t.DataType(1)
    t.DataType('HALF')
    t.DataType.NOPE
    t.DataType.HALF.itemsize
    isinstance(t.DataType.HALF, int)
    sorted(t.DataType.__members__)
    {t.DataType.HALF: 1}[t.float16]
    t.nptype(t.float16)
    t.nptype(t.bfloat16)
    t.volume((2, 3))
    t.Logger.ERROR, t.Logger.Severity.ERROR, t.ILogger.ERROR
    t.Logger.ERROR == t.ILogger.Severity.ERROR
    t.Logger(t.Logger.ERROR).min_severity
    t.Logger(min_severity=t.Logger.ERROR).min_severity
    t.Logger(severity=t.Logger.ERROR)
    t.Logger(1)
    t.Logger().foo
    t.Logger.__bases__[0].__name__
    t.ILogger().log(t.Logger.ERROR, 'x')
    t.Builder()
    t.Builder(None)
    t.Builder('logger')
    t.OnnxParser()
    t.IBuilderConfig()
    t.ICudaEngine()
    t.IExecutionContext(1)
    t.Dims([1, 2])
    t.Dims((1, 2)), len(t.Dims((1, 2))), tuple(t.Dims((1, 2)))
    t.Dims([1, 2]) == (1, 2), t.Dims([1, 2]) == [1, 2], t.Dims([1, 2]) == (1, 3)
    t.Dims([1, 2]) == t.Dims([1, 2])
    t.Dims([1, 2]) == 'x'
    [1, 2] == t.Dims([1, 2])
    t.Dims([1, 2])[0], t.Dims([1, 2])[1:]
    t.Dims([1, 2])[5]
    t.Dims([1.0])
    t.Dims(['a'])
    t.Dims() + (1,)
    list(t.Dims([3])), len(t.Dims()), repr(t.Dims([1, 2]))
    hash(t.Dims([1]))
    t.Dims.MAX_DIMS
    t.get_plugin_registry().get_creator('a')
    t.get_plugin_registry().get_creator('a', '1', 3)
    t.get_plugin_registry().get_creator('a', '1', namespace='')
    t.get_plugin_registry().load_library()
    t.get_plugin_registry().load_library(__import__('pathlib').Path('/x'))
    builder(t).create_network(flags=0).num_inputs
    builder(t).create_network(1.5)
    builder(t).create_network(strongly_typed=True)
    profile(t).set_shape('x', (1,), (1,))
    profile(t).set_shape('x', 1, 1, 1)
    profile(t).set_shape('x', (-1,), (1,), (1,))
    profile(t).set_shape('x', (1,), (1,), (1.5,))
    profile(t).set_shape_input('x', (1,), (1,), 2)
    profile(t).get_shape('x')
    bool(profile(t))
    builder(t).create_builder_config().add_optimization_profile(None)
    builder(t).create_builder_config().num_optimization_profiles
    builder(t).create_builder_config().progress_monitor
    builder(t).create_builder_config().builder_optimization_level
    builder(t).create_builder_config().set_memory_pool_limit(0, 1)
    builder(t).create_builder_config().set_flag('TF32')
    builder(t).create_builder_config().get_flag(t.BuilderFlag.TF32)
"""


def builder(trt: Any) -> Any:
    return trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR))


def profile(trt: Any) -> Any:
    return builder(trt).create_optimization_profile()


def outcome(module: Any, expression: str) -> str:
    try:
        value = eval(expression, {"t": module, "builder": builder, "profile": profile})
    except Exception as error:
        return type(error).__name__
    return repr(value)


@pytest.mark.skipif(not installed("tensorrt-rtx", "1.7"), reason="needs tensorrt-rtx 1.7")
def test_expressions_come_out_as_in_the_real_bindings():
    real = importlib.import_module("tensorrt_rtx")
    ours = make("rtx")
    expressions = [line.strip() for line in EXPRESSIONS.strip().splitlines()]
    different = {
        text: (outcome(real, text), outcome(ours, text))
        for text in expressions
        if outcome(real, text) != outcome(ours, text)
    }
    assert different == {}


def test_a_derived_class_must_call_init(trt: Any):
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            pass

    with pytest.raises(TypeError, match=r"__init__\(\) must be called when overriding __init__"):
        Monitor()


def test_calls_are_recorded(trt: Any):
    builder = trt.Builder(trt.Logger())
    builder.create_network(flags=1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    (arguments,) = trt.standin.called("Builder.create_network")
    assert list(arguments) == ["flags"]
    assert trt.standin.called("Builder")
    assert trt.calls is trt.standin.calls


def test_what_only_the_stand_in_lacks_says_so(trt: Any):
    config = trt.Builder(trt.Logger()).create_builder_config()
    with pytest.raises(NotImplementedError, match="but not in the stand-in"):
        config.set_tactic_sources(0)
    with pytest.raises(NotImplementedError, match="but not in the stand-in"):
        _ = config.default_device_type


def test_no_signature_has_an_unknown_type():
    """Or a call would fail for the wrong reason."""
    for version in ALL:
        module = make(version)
        types = module.standin.builder.types
        for name in ("Builder", "IBuilderConfig", "ICudaEngine", "IExecutionContext", "Runtime",
                     "OnnxParser", "IOptimizationProfile", "IPluginRegistry"):  # fmt: skip
            for method, entry in module.standin.builder.api["classes"][name]["methods"].items():
                for overload in entry if entry != "python" else []:
                    for argument in api.Signature.parse(*overload).arguments:
                        if argument.type.split("::")[-1] not in UNUSED_TYPES:
                            types.fits(object(), argument.type)
                            assert method


UNUSED_TYPES: set[str] = set()
