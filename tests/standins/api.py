"""Python classes with exactly the names and arguments that a version of the bindings has.

`build_module` makes a module from `api/*.json`. Its classes are shells: a call is bound to one of
the overloads as pybind11 would (or is the TypeError pybind11 raises), is recorded, and goes on to
an implementation, a plain class of this package with methods of the same names. What the real
bindings lack, the shell lacks; what only the stand-in lacks is a NotImplementedError.
"""

from __future__ import annotations

import functools
import json
import operator
import re
import sys
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "api"


@functools.cache
def load_api(name: str) -> dict[str, Any]:
    """Contents of `api/<name>.json`, as `tensorrt-10.3`."""
    api: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return api


@dataclass(frozen=True)
class Argument:
    """One argument of a signature; a positional-only one is `arg0`, `arg1`... to pybind11."""

    name: str
    type: str
    default: str | None

    @property
    def is_positional(self) -> bool:
        return re.fullmatch(r"arg\d+", self.name) is not None


@dataclass(frozen=True)
class Signature:
    """One overload."""

    arguments: tuple[Argument, ...]
    returns: str

    @classmethod
    @functools.cache
    def parse(cls, *entry: str) -> Signature:
        """Read an overload of the API file."""
        *texts, returns = entry
        arguments = []
        for text in texts:
            name, _, rest = text.partition(": ")
            kind, equals, default = rest.partition(" = ")
            arguments.append(Argument(name, kind, default if equals else None))
        return cls(tuple(arguments), returns.removeprefix("-> "))

    def bind(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], types_: Types
    ) -> dict[str, Any] | None:
        """Values by name in the order of the signature; None where they do not fit."""
        if len(args) > len(self.arguments):
            return None
        values = dict(zip((a.name for a in self.arguments), args, strict=False))
        for name, value in kwargs.items():
            known = next((a for a in self.arguments if a.name == name), None)
            if known is None or known.is_positional or name in values:
                return None
            values[name] = value
        bound = {}
        for argument in self.arguments:
            if argument.name in values:
                value = values[argument.name]
                is_default_none = value is None and argument.default == "None"
                if not is_default_none and not types_.fits(value, argument.type):
                    return None
                bound[argument.name] = values[argument.name]
            elif argument.default is None:
                return None
        return bound

    def __str__(self) -> str:
        texts = [
            f"{a.name}: {a.type}" + (f" = {a.default}" if a.default is not None else "")
            for a in self.arguments
        ]
        return f"({', '.join(['self', *texts])}) -> {self.returns}"


class Enum:
    """A pybind11 enum: equal only to its own kind, no arithmetic, `int()` and `.value`."""

    __members__: dict[str, Any]

    def __init__(self, value: int) -> None:
        if type(value) is not int:
            raise TypeError(f"__init__(): incompatible constructor arguments: {value!r}")
        self._value = value

    @property
    def value(self) -> int:
        return self._value

    @property
    def name(self) -> str:
        for name, member in self.__members__.items():
            if member._value == self._value:
                return name
        return "???"

    def __int__(self) -> int:
        return self._value

    def __index__(self) -> int:
        return self._value

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self.name}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__}.{self.name}: {self._value}>"


def make_enum(name: str, members: Mapping[str, int], module: str) -> type[Enum]:
    """Class with the members as attributes."""
    kind: type[Enum] = type(name, (Enum,), {"__module__": module})
    kind.__members__ = {member: kind(value) for member, value in members.items()}
    for member, item in kind.__members__.items():
        setattr(kind, member, item)
    return kind


class Types:
    """Whether a value may be passed as a type that a docstring names."""

    SEQUENCE = re.compile(r"^(?:List|Sequence|collections\.abc\.Sequence|list)\[(.+)\]$")
    UNCHECKED = frozenset({"object", "function", "handle", "numpy.ndarray"})

    def __init__(self) -> None:
        self.kinds: dict[str, type] = {}

    def fits(self, value: Any, kind: str) -> bool:
        kind = kind.rpartition("::")[2]
        if kind == "bool":
            return isinstance(value, bool) or type(value).__name__ == "bool_"
        if kind in ("int", "typing.SupportsInt"):
            return self._is_int(value)
        if kind in ("float", "typing.SupportsFloat"):
            return isinstance(value, (int, float)) or hasattr(value, "__float__")
        if kind == "str":
            return isinstance(value, (str, bytes))
        if kind in ("buffer", "typing_extensions.Buffer"):
            return is_buffer(value)
        if kind in ("capsule", "typing_extensions.CapsuleType"):
            return type(value).__name__ == "PyCapsule" or isinstance(value, Capsule)
        if kind in ("tuple", "list", "slice"):
            return type(value).__name__ == kind
        if kind == "Dims":
            return isinstance(value, self.kinds["Dims"]) or self._is_int_sequence(value)
        if match := self.SEQUENCE.match(kind):
            return not isinstance(value, (str, bytes)) and (
                isinstance(value, Sequence) and all(self.fits(item, match[1]) for item in value)
            )
        if kind in self.kinds:
            # pybind11 takes None for every pointer, but not for an enum
            expected = self.kinds[kind]
            return isinstance(value, expected) or (value is None and not issubclass(expected, Enum))
        if kind in self.UNCHECKED:
            return True
        raise NotImplementedError(f"the stand-in does not know the type {kind}")

    @staticmethod
    def _is_int(value: Any) -> bool:
        # pybind11 converts through __index__, refuses floats; enums of its own have __index__
        if isinstance(value, float):
            return False
        try:
            operator.index(value)
        except TypeError:
            return False
        return True

    def _is_int_sequence(self, value: Any) -> bool:
        if isinstance(value, (str, bytes)):
            return False
        return hasattr(value, "__getitem__") and all(self._is_int(item) for item in value)


class Capsule:
    """A handle that Python code can only pass on."""


class DimsValue(tuple[int, ...]):
    """A shape as TensorRT returns it: no tuple, but equal to one."""

    API = "Dims"
    __slots__ = ()

    def __new__(cls, shape: Any = ()) -> DimsValue:
        return super().__new__(cls, (int(axis) for axis in shape))

    def __eq__(self, other: object) -> bool:
        return tuple(self) == tuple(other) if isinstance(other, (list, tuple)) else False

    __hash__ = None  # type: ignore[assignment]

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __repr__(self) -> str:
        return f"({', '.join(map(str, self))}{',' if len(self) == 1 else ''})"

    __str__ = __repr__

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self)[index]
        if not -len(self) <= index < len(self):
            raise IndexError("Out of bounds")
        return tuple.__getitem__(self, index)


class WeakShell:
    """Remembers its shell weakly, so that dropping the shell destroys the object at once."""

    _reference: Any = None

    @property
    def _shell(self) -> Any:
        return self._reference() if self._reference is not None else None

    @_shell.setter
    def _shell(self, shell: Any) -> None:
        self._reference = weakref.ref(shell)


def is_buffer(value: Any) -> bool:
    """Whether the buffer protocol is there (before Python 3.12 only `memoryview` can tell)."""
    try:
        memoryview(value).release()
    except TypeError:
        return False
    return True


@dataclass(frozen=True)
class Call:
    """A recorded call: `Builder.create_network`, its bound arguments."""

    name: str
    arguments: dict[str, Any]


class _ShellType(type):
    """Does what pybind11's metaclass does: `__init__` must have run."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        shell = super().__call__(*args, **kwargs)
        if not isinstance(shell, Shell) or not hasattr(shell, "_implementation"):
            raise TypeError(f"{_root(cls)}.__init__() must be called when overriding __init__")
        return shell

    def __setattr__(cls, name: str, value: Any) -> None:
        super().__setattr__(name, value)


def _root(kind: type) -> str:
    for base in kind.__mro__:
        if "_api_name" in vars(base):
            return str(vars(base)["_api_name"])
    return kind.__name__


class Shell(metaclass=_ShellType):
    """What user code holds; `_implementation` does the work."""

    __slots__ = ("__weakref__", "_implementation")
    _implementation: Any


class ModuleBuilder:
    """Builds the classes of one version.

    Args:
        api: of `load_api`.
        name: of the module.
        implementations: by class name; a class that users derive from may lack one.
        record: called with every `Call`.
    """

    def __init__(
        self,
        api: Mapping[str, Any],
        name: str,
        implementations: Mapping[str, type],
        record: Callable[[Call], None],
    ) -> None:
        self.api = api
        self.name = name
        self.native = f"{name}_bindings.{name}"
        self.implementations = implementations
        self.record = record
        self.types = Types()
        self.module = types.ModuleType(name)

    def build(self) -> types.ModuleType:
        module = self.module
        for name, members in self.api["enums"].items():
            self._add(name, make_enum(name, members, self.native))
        remaining = dict(self.api["classes"])
        while remaining:
            for name, entry in list(remaining.items()):
                bases = [b for b in entry.get("bases", []) if b in self.api["classes"]]
                if all(base in self.types.kinds for base in bases):
                    self._add(name, self._shell(name, entry, bases))
                    del remaining[name]
        for name, entry in self.api["classes"].items():
            for value, text in entry.get("values", {}).items():
                setattr(getattr(module, name), value, self._value(name, text))
        for name, target in self.api["aliases"].items():
            owner, _, member = target.rpartition(".")
            if owner in self.types.kinds:
                kind = self.types.kinds[owner]
                setattr(module, name, kind(getattr(kind, member).value))  # equal, not the same
        module.__version__ = self.api["version"]  # type: ignore[attr-defined]
        return module

    def _value(self, owner: str, text: Any) -> Any:
        if not isinstance(text, str):
            return text
        kind, _, member = text.partition(".")
        found = getattr(getattr(self.module, owner), kind, None) or self.types.kinds.get(kind)
        return getattr(found, member, None)

    def _add(self, name: str, kind: type) -> None:
        self.types.kinds[name] = kind
        setattr(self.module, name, kind)

    def function(self, name: str, implementation: Callable[..., Any]) -> None:
        """Add a function of the module, with the arguments that the version has."""
        entry = self.api["functions"][name]
        overloads = [Signature.parse(*e) for e in entry] if entry != "python" else None

        def call(*args: Any, **kwargs: Any) -> Any:
            if overloads is None:
                return implementation(*args, **kwargs)
            bound = self._bind(name, overloads, args, kwargs, "function")
            self.record(Call(name, bound))
            return self.wrap(implementation(**{n: self.unwrap(v) for n, v in bound.items()}))

        call.__name__ = name
        setattr(self.module, name, call)

    def wrap(self, result: Any) -> Any:
        """Shell of an implementation's result; lists and tuples by element."""
        if isinstance(result, list):
            return [self.wrap(item) for item in result]
        if type(result) is tuple:
            return tuple(self.wrap(item) for item in result)
        api_name = getattr(type(result), "API", None)
        if api_name is None:
            return result
        shell = getattr(result, "_shell", None)
        if shell is None:
            shell = object.__new__(self.types.kinds[api_name])
            shell._implementation = result
            if api_name != "Dims":
                result._shell = shell
        return shell

    def unwrap(self, value: Any) -> Any:
        """Implementation of a shell; a class derived in Python stays what it is."""
        if isinstance(value, Shell) and value._implementation is not None:
            return value._implementation
        if isinstance(value, list):
            return [self.unwrap(item) for item in value]
        return value

    def _bind(
        self,
        name: str,
        overloads: Sequence[Signature],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        what: str,
    ) -> dict[str, Any]:
        for signature in overloads:
            bound = signature.bind(args, kwargs, self.types)
            if bound is not None:
                return bound
        supported = "\n".join(f"    {i + 1}. {s}" for i, s in enumerate(overloads))
        invoked = ", ".join([*map(repr, args), *(f"{k}={v!r}" for k, v in kwargs.items())])
        raise TypeError(
            f"{name}(): incompatible {what} arguments. The following argument types are"
            f" supported:\n{supported}\n\nInvoked with: {invoked}"
        )

    def _shell(self, name: str, entry: Mapping[str, Any], bases: Sequence[str]) -> type:
        implementation = self.implementations.get(name)
        namespace: dict[str, Any] = {
            "__slots__": ("__dict__",) if entry.get("dynamic") else (),
            "__module__": self.native,
            "_api_name": f"{self.native}.{name}",
            "__init__": self._constructor(name, entry, implementation),
        }
        for method, overloads in entry.get("methods", {}).items():
            if overloads != "python" and method != "__init__":
                namespace[method] = self._method(name, method, overloads, implementation)
        for static, overloads in entry.get("statics", {}).items():
            namespace[static] = staticmethod(self._static(name, static, overloads, implementation))
        for prop, text in entry.get("properties", {}).items():
            namespace[prop] = self._property(name, prop, text, implementation)
        for enum, members in entry.get("enums", {}).items():
            # the package's __init__ makes Logger.Severity the same as ILogger's
            shared = self.types.kinds.get(f"ILogger.{enum}") if name == "Logger" else None
            namespace[enum] = shared or make_enum(enum, members, self.native)
            self.types.kinds[f"{name}.{enum}"] = namespace[enum]
        if implementation is not None:
            for special in ("__iter__", "__repr__", "__len__", "__bytes__", "__hash__"):
                if special in vars(implementation) and special not in namespace:
                    namespace[special] = _forward(special)
        parents = tuple(self.types.kinds[base] for base in bases) or (Shell,)
        return _ShellType(name, parents, namespace)

    def _constructor(
        self, name: str, entry: Mapping[str, Any], implementation: type | None
    ) -> Callable[..., None]:
        overloads = [Signature.parse(*e) for e in entry.get("methods", {}).get("__init__", [])]

        def __init__(self_: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            if not overloads:
                raise TypeError(f"{self.native}.{name}: No constructor defined!")
            bound = self._bind("__init__", overloads, args, kwargs, "constructor")
            self.record(Call(name, bound))
            if implementation is None:
                self_._implementation = None
                return
            values = {n: self.unwrap(v) for n, v in bound.items()}
            self_._implementation = implementation(**values)
            if getattr(implementation, "API", None) != "Dims":
                self_._implementation._shell = self_

        return __init__

    def _method(
        self, owner: str, name: str, entry: Sequence[Sequence[str]], implementation: type | None
    ) -> Callable[..., Any]:
        overloads = [Signature.parse(*overload) for overload in entry]

        def method(self_: Any, *args: Any, **kwargs: Any) -> Any:
            bound = self._bind(name, overloads, args, kwargs, "function")
            if not name.startswith("__"):
                self.record(Call(f"{owner}.{name}", bound))
            if self_._implementation is None and implementation is None:
                print(f'Tried to call pure virtual function "{owner}::{name}"', file=sys.stderr)
                return None
            function = getattr(self_._implementation, name, None)
            if function is None:
                raise NotImplementedError(
                    f"{owner}.{name} exists in TensorRT but not in the stand-in"
                )
            positional = [self.unwrap(v) for n, v in bound.items() if re.match(r"arg\d", n)]
            named = {n: self.unwrap(v) for n, v in bound.items() if not re.match(r"arg\d", n)}
            return self.wrap(function(*positional, **named))

        method.__name__ = name
        return method

    def _static(
        self, owner: str, name: str, entry: Sequence[Sequence[str]], implementation: type | None
    ) -> Callable[..., Any]:
        overloads = [Signature.parse(*overload) for overload in entry]

        def static(*args: Any, **kwargs: Any) -> Any:
            bound = self._bind(name, overloads, args, kwargs, "function")
            self.record(Call(f"{owner}.{name}", bound))
            function = getattr(implementation, name, None)
            if function is None:
                raise NotImplementedError(
                    f"{owner}.{name} exists in TensorRT but not in the stand-in"
                )
            return self.wrap(function(*bound.values()))

        return static

    def _property(self, owner: str, name: str, text: str, implementation: type | None) -> property:
        access, _, kind = text.partition(" ")

        def get(self_: Any) -> Any:
            target = self_._implementation
            if target is None or not hasattr(target, name):
                raise NotImplementedError(
                    f"{owner}.{name} exists in TensorRT but not in the stand-in"
                )
            return self.wrap(getattr(target, name))

        def put(self_: Any, value: Any) -> None:
            if not self.types.fits(value, kind):
                raise TypeError(
                    f"(): incompatible function arguments. The following argument types are"
                    f" supported:\n    1. (arg0: {self.native}.{owner}, arg1: {kind}) -> None"
                    f"\n\nInvoked with: {value!r}"
                )
            self.record(Call(f"{owner}.{name} =", {name: value}))
            if not hasattr(self_._implementation, name):
                raise NotImplementedError(
                    f"{owner}.{name} exists in TensorRT but not in the stand-in"
                )
            setattr(self_._implementation, name, self.unwrap(value))

        return property(get if "r" in access else None, put if "w" in access else None)


def _forward(special: str) -> Callable[..., Any]:
    def call(self_: Any, *args: Any) -> Any:
        return getattr(self_._implementation, special)(*args)

    return call
