"""Write down what a version of TensorRT's Python bindings offers, without TensorRT.

    python -m tests.standins.extract_api -o tests/standins/api WHEEL.whl... \\
        --installed tensorrt_rtx --installed cuda.bindings.runtime

The bindings of a wheel are a pybind11 module that asks for libnvinfer and its companions. Empty
libraries with the same sonames and symbols, compiled here with `cc`, let it import; nothing of it
is ever called. Classes, arguments and enums are then read from the module itself: names and enum
values are certain, argument lists are as pybind11 prints them in the docstrings.

A wheel must be of the running Python's version (`cp311` for 3.11).
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

# Layers are left out, except those that a parsed network may be searched for.
LAYERS = {"ILayer", "IIdentityLayer", "ICastLayer", "IPluginV3Layer", "ISoftMaxLayer"}
LAYER_PATTERN = re.compile(r"^I(Attention|KVCache|RotaryEmbedding)\w*$")
LEFT_OUT = re.compile(
    r"^(IPluginV2\w*|IAlgorithm\w*|IInt8\w*|\w*Refitter|IGpuAsyncAllocator|ILoop\w*|ITripLimit\w*"
    r"|IIfConditional\w*|IRecurrence\w*|IMoE\w*|DynamicPluginTensorDesc|Permutation)$"
)
FOLDER = Path(__file__).parent / "api"

STUB_SYMBOL = re.compile(r"\b(create\w+_INTERNAL|get\w*PluginRegistry|getNvOnnx\w+|initLib\w+)$")
SIGNATURE = re.compile(r"^(?:\d+\. )?(?P<name>\w*)\((?P<args>.*)\) -> (?P<result>.+)$")


def split_arguments(text: str) -> list[str]:
    """Split at the commas that are outside brackets, quotes and enum representations."""
    parts, depth, quoted, part = [], 0, False, ""
    for char in text:
        if char == "'":
            quoted = not quoted
        elif not quoted and char in "[(<{":
            depth += 1
        elif not quoted and char in "])>}":
            depth -= 1
        if char == "," and depth == 0 and not quoted:
            parts.append(part.strip())
            part = ""
        else:
            part += char
    return [*parts, part.strip()] if part.strip() else parts


def signatures(doc: str | None, name: str, prefix: str) -> list[list[str]]:
    """Overloads of a pybind11 docstring.

    Returns:
        Per overload its arguments ("name: type = default", without `self`) and "-> type".
    """
    found = []
    for line in (doc or "").splitlines():
        match = SIGNATURE.match(line)
        if match and match["name"] in (name, ""):
            arguments = split_arguments(match["args"].replace(prefix, ""))
            if arguments[:1] == ["*args"]:
                continue
            if arguments and arguments[0].startswith("self"):
                arguments = arguments[1:]
            found.append([*arguments, "-> " + match["result"].replace(prefix, "")])
    return found


def describe_property(value: property, prefix: str) -> str:
    """Return "r", "w" or "rw", and the type where pybind11 gives it."""
    access = ("r" if value.fget else "") + ("w" if value.fset else "")
    docs = (value.fget.__doc__ or "") if value.fget else ""
    kind = docs.strip().splitlines()[0].rpartition("-> ")[2] if "->" in docs else "object"
    if not value.fget and value.fset:
        last = signatures(value.fset.__doc__, "", prefix)[0][-2]
        kind = last.partition(": ")[2]
    return f"{access} {kind.replace(prefix, '')}"


def describe_enum(value: type) -> dict[str, int]:
    members = value.__members__  # type: ignore[attr-defined]
    return {name: int(member) for name, member in members.items()}


def is_enum(value: type) -> bool:
    return hasattr(value, "__members__")


def describe_class(value: type, prefix: str) -> dict[str, Any]:
    bases = [b.__name__ for b in value.__bases__ if b.__name__ not in ("pybind11_object", "object")]
    entry: dict[str, Any] = {"bases": bases} if bases else {}
    if "__dict__" in vars(value):
        entry["dynamic"] = True
    methods: dict[str, Any] = {}
    values: dict[str, Any] = {}
    statics, properties, enums = {}, {}, {}
    for name, item in sorted(vars(value).items()):
        if name.startswith("_pybind11_") or name == "__del__":
            continue
        if type(item).__name__ == "pybind11_static_property":
            values[name] = int(getattr(value, name))
        elif isinstance(item, property):
            properties[name] = describe_property(item, prefix)
        elif isinstance(item, type):
            if is_enum(item):
                enums[name] = describe_enum(item)
        elif isinstance(item, staticmethod):
            statics[name] = signatures(item.__func__.__doc__, name, prefix)
        elif inspect.isfunction(item):
            methods[name] = "python"
        elif callable(item) and not name.startswith("__"):
            methods[name] = signatures(item.__doc__, name, prefix)
        elif callable(item) and (overloads := signatures(item.__doc__, name, prefix)):
            methods[name] = overloads
        elif is_enum(type(item)):
            values[name] = f"{type(item).__name__}.{item.name}"
        elif isinstance(item, int):
            values[name] = item
    parts = {
        "methods": methods, "statics": statics, "properties": properties, "enums": enums,
        "values": values,
    }  # fmt: skip
    return entry | {name: part for name, part in parts.items() if part}


def is_wanted(name: str) -> bool:
    if name in LAYERS or LAYER_PATTERN.match(name):
        return True
    return not (name.endswith("Layer") or LEFT_OUT.match(name))


def describe_module(module: ModuleType, native: str) -> dict[str, Any]:
    """Describe everything wanted of an imported `tensorrt` or `tensorrt_rtx`."""
    prefix = f"{native}."
    classes, enums, aliases = {}, {}, {}
    functions: dict[str, Any] = {}
    for name, value in sorted(vars(module).items()):
        if isinstance(value, type):
            if not value.__module__.startswith(native.partition(".")[0]):
                continue
            if value.__name__ != name:
                aliases[name] = value.__qualname__
            elif is_enum(value):
                enums[name] = describe_enum(value)
            elif is_wanted(name):
                classes[name] = describe_class(value, prefix)
        elif is_enum(type(value)):
            aliases[name] = f"{type(value).__qualname__}.{value.name}"
        elif inspect.isfunction(value):
            functions[name] = "python"
        elif callable(value):
            functions[name] = signatures(value.__doc__, name, prefix)
    for leaked in ("attr", "value"):  # loop variables of the package's __init__
        aliases.pop(leaked, None)
    version = module.__version__
    return {
        "version": version, "functions": functions, "aliases": aliases, "enums": enums,
        "classes": classes,
    }  # fmt: skip


def stub_libraries(bindings: Path, folder: Path) -> None:
    """Compile an empty library for each one of TensorRT's that the bindings ask for."""
    dynamic = subprocess.run(
        ["readelf", "-d", bindings], check=True, capture_output=True, text=True
    ).stdout
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", bindings], check=True, capture_output=True, text=True
    ).stdout.split()
    wanted = [name for name in symbols if STUB_SYMBOL.match(name)]
    source = folder / "stub.c"
    source.write_text("".join(f"void* {name}(void) {{ return 0; }}\n" for name in wanted))
    for library in re.findall(r"\[(libnv[\w.]+)\]", dynamic):
        subprocess.run(
            ["cc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", folder / library, source],
            check=True,
        )


def describe_wheel(wheel: Path) -> dict[str, Any]:
    """Describe the bindings of a wheel (`tensorrt_cu*_bindings-*.whl`)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        stub_libraries(folder / "tensorrt_bindings/tensorrt.so", folder)
        environment = os.environ | {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(folder)}
        # A process of its own: only the loader's start reads the library path.
        done = subprocess.run(
            [sys.executable, __file__, "--child", "tensorrt_bindings", "tensorrt"],
            check=True, capture_output=True, text=True, env=environment,
        )  # fmt: skip
    return {"source": wheel.name, **json.loads(done.stdout)}


CUDA_ENUMS = (
    "cudaError_t cudaMemcpyKind cudaDeviceAttr cudaStreamCaptureMode cudaStreamCaptureStatus"
    " cudaMemoryType cudaGraphInstantiateResult cudaGraphExecUpdateResult cudaLimit"
).split()
CUDA_STRUCTS = "cudaDeviceProp cudaPointerAttributes".split()
CUDA_HANDLES = "cudaStream_t cudaEvent_t cudaGraph_t cudaGraphExec_t cudaMemPool_t".split()


def describe_cuda() -> dict[str, Any]:
    """Describe the installed `cuda.bindings.runtime`, which imports without a driver."""
    runtime = importlib.import_module("cuda.bindings.runtime")
    bindings = importlib.import_module("cuda.bindings")
    members = {name: value for name, value in vars(runtime).items() if name.startswith("cuda")}
    return {
        "source": f"cuda-bindings {bindings.__version__}, installed",
        "version": bindings.__version__,
        "functions": {
            name: [
                f"{argument.name}: {argument.annotation}"
                if argument.annotation is not argument.empty
                else argument.name
                for argument in inspect.signature(value).parameters.values()
            ]
            for name, value in sorted(members.items())
            if type(value).__name__ == "cython_function_or_method"
        },
        "values": {n: v for n, v in sorted(members.items()) if type(v) is int},
        "enums": {name: describe_enum(getattr(runtime, name)) for name in CUDA_ENUMS},
        "structs": {
            name: [field for field in dir(getattr(runtime, name)) if not field.startswith("_")]
            for name in CUDA_STRUCTS
        },
        "handles": dict.fromkeys(CUDA_HANDLES, "handle"),
    }


def describe_installed(package: str) -> dict[str, Any]:
    """Describe an installed package that imports by itself (`tensorrt_rtx`)."""
    if package == "cuda.bindings.runtime":
        return describe_cuda()
    done = subprocess.run(
        [sys.executable, __file__, "--child", f"{package}_bindings", package],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    api = json.loads(done.stdout)
    return {"source": f"{package} {api['version']}, installed", **api}


def dumps(api: dict[str, Any]) -> str:
    """JSON with one class, enum or function per line, so that versions compare by line."""
    lines = []
    for key, value in api.items():
        if isinstance(value, dict):
            entries = ",\n".join(
                f"  {json.dumps(name)}: {json.dumps(item, separators=(',', ':'))}"
                for name, item in value.items()
            )
            lines.append(f" {json.dumps(key)}: {{\n{entries}\n }}")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def file_name(api: dict[str, Any]) -> str:
    """E.g. `tensorrt-10.3.json`, `tensorrt_rtx-1.7.json`."""
    package = re.match(r"tensorrt_rtx|tensorrt|cuda", api["source"])[0]  # type: ignore[index]
    return f"{package}-{'.'.join(api['version'].split('.')[:2])}.json"


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        package, native = sys.argv[2:]
        module = importlib.import_module(package)
        if package == "tensorrt_rtx_bindings":
            module = importlib.import_module("tensorrt_rtx")
        print(json.dumps(describe_module(module, f"{package}.{native}")))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheels", nargs="*", type=Path)
    parser.add_argument("--installed", action="append", default=[])
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    described = [describe_wheel(wheel) for wheel in options.wheels]
    described += [describe_installed(package) for package in options.installed]
    for api in described:
        (options.output / file_name(api)).write_text(dumps(api))


if __name__ == "__main__":
    main()
