"""What the stand-in writes into an engine file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

MAGIC = b"stts stand-in engine\0"


@dataclass(frozen=True)
class TensorInfo:
    """A network's input or output; free axes are names."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    is_shape: bool = False

    @property
    def runtime_shape(self) -> tuple[int, ...]:
        return tuple(axis if isinstance(axis, int) else -1 for axis in self.shape)


@dataclass(frozen=True)
class Plan:
    """Contents of an engine file."""

    package: str
    version: str
    targets: tuple[str, ...]
    name: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    profiles: tuple[dict[str, list[list[int]]], ...]
    aliases: dict[str, str]
    plugins: tuple[tuple[str, str, str], ...]
    model: bytes = b""

    def pack(self) -> bytes:
        values = asdict(self)
        values.pop("model")
        header = json.dumps(values).encode()
        body = len(header).to_bytes(8, "little") + header + self.model
        return MAGIC + hashlib.sha256(body).digest() + body

    @classmethod
    def unpack(cls, data: bytes) -> Plan:
        """Read what `pack` made.

        Raises:
            ValueError: it is something else, or damaged.
        """
        if not data.startswith(MAGIC):
            raise ValueError("Magic tag does not match")
        digest, body = data[len(MAGIC) : len(MAGIC) + 32], data[len(MAGIC) + 32 :]
        if hashlib.sha256(body).digest() != digest:
            raise ValueError("engine file is truncated or damaged")
        size = int.from_bytes(body[:8], "little")
        values = json.loads(body[8 : 8 + size])
        for key in ("inputs", "outputs"):
            values[key] = tuple(
                TensorInfo(t["name"], t["dtype"], tuple(t["shape"]), t["is_shape"])
                for t in values[key]
            )
        for key in ("targets", "profiles"):
            values[key] = tuple(values[key])
        values["plugins"] = tuple(tuple(plugin) for plugin in values["plugins"])
        return cls(**values, model=body[8 + size :])


def volume(shape: Any) -> int:
    """Product of the sides."""
    product = 1
    for side in shape:
        product *= side
    return product
