"""Dataclasses from the plain values of YAML and JSON, with errors that name the place and line.

Every key must be known and stand once, and every value must have its field's type: a recipe with a
slip would otherwise be followed in part.
"""

from __future__ import annotations

import dataclasses
import re
import reprlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

from stts_export.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from yaml import Node

ValuePath: TypeAlias = tuple[str | int, ...]
"""Keys and indices that lead to a value."""

_KINDS = {int: "an integer", float: "a number", str: "a text"}
# YAML 1.1 also reads 010 as 8, 1_0 as 10 and 1:30 as 90.
_PLAIN_NUMBER = re.compile(r"[-+]?(0|[1-9][0-9]*)?(\.[0-9]*)?([eE][-+]?[0-9]+)?")


@dataclass(frozen=True)
class Source:
    """Where values come from, for messages."""

    name: str
    lines: Mapping[ValuePath, int] = field(default_factory=dict)
    """1-based; empty where values do not come from a text."""

    def place(self, path: ValuePath) -> str:
        """Name a value, with its line or that of what it belongs into."""
        text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
        parts = (path[:length] for length in range(len(path), 0, -1))
        line = next((self.lines[part] for part in parts if part in self.lines), None)
        head = self.name if line is None else f"{self.name}:{line}"
        return f"{head}: {text.lstrip('.')}" if path else head


def read_yaml(file: Path) -> tuple[object, Source]:
    """Return the values of a YAML file.

    Raises:
        InputError: it cannot be read, a key stands twice, or a number is not a plain decimal one.
        ImportError: PyYAML is not installed.
    """
    import yaml

    try:
        text = file.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        lines: dict[ValuePath, int] = {}
        source = Source(str(file), lines)
        if node is not None:
            _walk(node, (), source, lines, set())
        return yaml.safe_load(text), source
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(
            f"cannot be read as YAML: {error.problem or error.context}", where=f"{file}{line}"
        ) from None
    except (
        OSError, ValueError, yaml.YAMLError, RecursionError,
        AttributeError, LookupError, TypeError,  # of values that are none of their tag's
    ) as error:  # fmt: skip
        raise InputError(f"cannot be read as YAML: {error}", where=str(file)) from None


def read_section(kind: type, values: object, source: Source, path: ValuePath = ()) -> Any:
    """Build a dataclass from a mapping.

    Args:
        kind: the dataclass. Its fields may be texts, numbers, Literals of texts, dataclasses,
            tuples of one of these, or one of these or None. Its own InputErrors name the field.
        values: the mapping.
        source: for messages.
        path: of the mapping.

    Raises:
        InputError: a key is unknown or missing, or a value has another type or is not allowed.
    """
    if not isinstance(values, Mapping):
        raise _refused(values, source, path, "a mapping of keys to values")
    hints = get_type_hints(kind)
    arguments = {}
    for key, value in values.items():
        if key not in hints:
            raise InputError(
                f"unknown key{did_you_mean(str(key), hints)}",
                where=source.place((*path, str(key))),
                allowed=", ".join(hints),
            )
        arguments[key] = read_value(hints[key], value, source, (*path, key))
    for entry in dataclasses.fields(kind):
        needed = entry.default is entry.default_factory is dataclasses.MISSING
        if needed and entry.name not in arguments:
            raise InputError("is missing", where=source.place((*path, entry.name)))
    try:
        return kind(**arguments)
    except InputError as error:
        place = source.place((*path, error.where) if error.where else path)
        raise InputError(error.message, where=place, allowed=error.allowed, fix=error.fix) from None


def read_value(hint: Any, value: object, source: Source, path: ValuePath) -> Any:
    """Return a value as its field's type; see `read_section`."""
    if get_origin(hint) is tuple:
        return _items(get_args(hint)[0], value, source, path)
    if type(None) in get_args(hint):
        return None if value is None else read_value(get_args(hint)[0], value, source, path)
    if dataclasses.is_dataclass(hint):
        return read_section(hint, value, source, path)  # type: ignore[arg-type]
    kind: type = str if get_origin(hint) is Literal else hint
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        with suppress(OverflowError):
            value = float(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _refused(value, source, path, _KINDS[kind])
    return value


def _items(hint: Any, value: object, source: Source, path: ValuePath) -> tuple[Any, ...]:
    """Read a list; a single text stands for a list of it."""
    if hint is str and isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        allowed = "a text, or a list of texts" if hint is str else "a list"
        raise _refused(value, source, path, allowed)
    return tuple(read_value(hint, item, source, (*path, index)) for index, item in enumerate(value))


def _refused(value: object, source: Source, path: ValuePath, allowed: str) -> InputError:
    fix = None
    if isinstance(value, bool) and "text" in allowed:
        fix = "YAML reads yes, no, on and off as true and false: put a text in quotes"
    elif isinstance(value, int | float) and "text" in allowed:
        fix = "put a text that looks like a number in quotes"
    elif isinstance(value, str) and allowed == _KINDS[float]:
        fix = "write 1.0e-3 for 1e-3: YAML reads the latter as text"
    return InputError(
        f"is {reprlib.repr(value)}", where=source.place(path), allowed=allowed, fix=fix
    )


def _walk(
    node: Node, path: ValuePath, source: Source, lines: dict[ValuePath, int], seen: set[int]
) -> None:
    """Fill in the lines; a node with several aliases is walked once, so cycles end."""
    import yaml

    if id(node) in seen:
        return
    seen.add(id(node))
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, (*path, index), source, lines, seen)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            spot = (*path, str(key.value))
            repeated = spot in lines
            lines[spot] = key.start_mark.line + 1
            if repeated:
                raise InputError(
                    "stands twice, and the first would have no effect", where=source.place(spot)
                )
            _walk(value, spot, source, lines, seen)
    elif node.tag.endswith((":int", ":float")) and not _PLAIN_NUMBER.fullmatch(node.value):
        raise InputError(
            f"is {node.value}",
            where=source.place(path),
            allowed="a decimal number, or a text in quotes",
        )
