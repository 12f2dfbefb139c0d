"""Pickles read as plain records: nothing in them is ever called or imported."""

from __future__ import annotations

import io
import pickle
import pickletools
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stts_export.errors import InputError

Known = Mapping[tuple[str, str], Any]
"""(module, name) as a pickle has it -> what stands for it."""
RECORD = object()
"""Stands for a class whose objects become records with the same attributes."""
DICT = object()
"""Stands for a class of dictionaries."""
SHAPE = object()
"""Stands for a class of shapes, which become tuples of integers."""
IGNORED = object()
"""Stands for a class or function whose results are of no use here."""

MAX_BYTES = 2**26
"""Of a pickle; that of a model of 8 billion parameters on 100 GPUs has a third of it."""
_MAX_OPCODES = 2**24
# Python hashes a tuple by hashing what is in it, each time and without a limit of its own.
_MAX_TUPLE = 1000
"""Values in a tuple, with those of the tuples in it."""
_MAX_ATTRIBUTES = 32
_MAX_DIMENSIONS = 64

# What writers of plain data use, from protocol 2 on.
_OPCODES = frozenset(
    """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT
    SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8
    EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS EMPTY_SET ADDITEMS FROZENSET
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 GLOBAL STACK_GLOBAL REDUCE BUILD NEWOBJ NEWOBJ_EX
    BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET BINPERSID
    """.split()
)
_TUPLES = frozenset({"EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"})
_PUTS = frozenset({"BINPUT", "LONG_BINPUT"})
_GETS = frozenset({"BINGET", "LONG_BINGET"})
_MARK = -1

_SHORT = reprlib.Repr()
_SHORT.maxother = _SHORT.maxstring = 200


def shown(value: object) -> str:
    """Return a short text of something that a pickle held, however large and deep it is."""
    return _SHORT.repr(value)


def records_from_pickle(
    data: bytes,
    known: Known,
    file: Path,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """Read a pickle that may name only known classes and functions.

    Args:
        data: the pickle.
        known: everything that it may name.
        file: for messages.
        persistent: what an id that points out of the pickle stands for.

    Raises:
        InputError: it names something else, is no pickle, or is none of plain data.
    """
    unpickler = _Unpickler(data, known, persistent)
    try:
        _check(data)
        return unpickler.load()
    except Exception as error:  # a damaged pickle can raise anything
        if unpickler.foreign is not None:
            raise InputError(
                f"holds an object of {unpickler.foreign}, which is not read",
                where=str(file),
                allowed="tensors and plain containers: nothing in a checkpoint is ever run",
                fix="save the state dict alone, with tensors only",
            ) from None
        raise InputError(
            f"cannot be read: {shown(error)}",
            where=str(file),
            fix="the file is truncated or damaged: copy it again",
        ) from None


def _check(data: bytes) -> None:
    """Refuse what would take more memory or stack than its size explains, before it is read."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"a pickle of {len(data)} bytes, more than {MAX_BYTES}")
    sizes: list[int] = []  # of the values on the stack: 0, or what is in a tuple
    memo: dict[int, int] = {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        name = opcode.name
        place = argument if isinstance(argument, int) else len(memo)
        if name not in _OPCODES:
            raise ValueError(f"{name} in a pickle of plain data")
        if count >= _MAX_OPCODES:
            raise ValueError(f"a pickle of more than {_MAX_OPCODES} steps")
        if name == "MARK":
            sizes.append(_MARK)
        elif name in _PUTS or name == "MEMOIZE":
            if place > count:  # the index of an array that is made as long
                raise ValueError(f"place {place} after {count} steps")
            if sizes[-1] == _MARK:
                raise ValueError(f"{name} takes a mark")
            memo[place] = sizes[-1]
        elif name in _GETS:
            sizes.append(memo[place])
        elif opcode.stack_before or opcode.stack_after:
            taken = _taken(opcode, sizes)
            inside = 1 + sum(taken) + len(taken) if name in _TUPLES else max(taken, default=0)
            if inside > _MAX_TUPLE:
                raise ValueError(f"tuples of more than {_MAX_TUPLE} values")
            sizes += [inside] * len(opcode.stack_after)


def _taken(opcode: pickletools.OpcodeInfo, sizes: list[int]) -> list[int]:
    """Take from the stack what an opcode takes."""
    before = list(opcode.stack_before)
    taken: list[int] = []
    if pickletools.markobject in before:
        while (size := sizes.pop()) != _MARK:
            taken.append(size)
        before = before[: before.index(pickletools.markobject)]
    taken += [sizes.pop() for _ in before]
    if _MARK in taken:
        raise ValueError(f"{opcode.name} takes a mark")
    return taken


class _Unpickler(pickle.Unpickler):
    """Knows only stand-ins, made anew for every pickle: none can change them for the next."""

    def __init__(self, data: bytes, known: Known, persistent: Callable[[Any], Any] | None) -> None:
        super().__init__(io.BytesIO(data))
        self._known = {key: _stand_in(key[1], value) for key, value in known.items()}
        self._persistent = persistent
        self.foreign: str | None = None

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            self.foreign = f"{module}.{name}"
            raise pickle.UnpicklingError(self.foreign)
        return self._known[module, name]

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent is None:
            raise pickle.UnpicklingError(f"points to {shown(pid)}")
        return self._persistent(pid)


class _Record:
    """Takes attributes and nothing else."""

    def __setstate__(self, state: dict[str, object]) -> None:
        if not isinstance(state, dict) or len(state) > _MAX_ATTRIBUTES:
            raise TypeError(f"{shown(state)} are no attributes")
        if any(not isinstance(name, str) or name.startswith("__") for name in state):
            raise TypeError(f"{shown(list(state))} are no names of attributes")
        self.__dict__.update(state)


class _Dict(dict[Any, Any]):
    """Filled item by item: a pickle cannot copy another one into it."""

    def __init__(self) -> None:
        super().__init__()


def _shape(values: Any = ()) -> tuple[int, ...]:
    if not isinstance(values, list | tuple) or len(values) > _MAX_DIMENSIONS:
        raise TypeError(f"{shown(values)} is no shape")
    if any(type(size) is not int for size in values):
        raise TypeError(f"{shown(values)} is no shape")
    return tuple(values)


def _ignored(*_: object) -> None:
    """Make nothing."""


def _stand_in(name: str, value: Any) -> Any:
    classes = {RECORD: _Record, DICT: _Dict}
    functions = {SHAPE: _shape, IGNORED: _ignored}
    if isinstance(value, type):
        return type(name, (value,), {})
    if value in classes:
        return type(name, (classes[value],), {})
    function = functions.get(value, value)
    if not callable(function):
        return value

    def call(*arguments: Any) -> Any:  # a pickle can set attributes of what it names
        return function(*arguments)

    return call
