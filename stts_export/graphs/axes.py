"""Give free axes of a written graph a size, without the onnx package (engines are built from it).

TensorRT 10.15 and newer, and TensorRT for RTX, take the TensorScatter of `decoder` only with a
fixed `capacity`: `parser.parse(with_fixed_axes(file.read_bytes(), {"capacity": 4096}), str(file))`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

# Field numbers of onnx.proto, from ModelProto down to TensorShapeProto.Dimension.
_GRAPH, _VALUE_INFO = (7,), (11, 12, 13)  # inputs, outputs, values between
_TYPE, _TENSOR_TYPE, _SHAPE, _DIM = (2,), (1,), (2,), (1,)
_PATH = (_GRAPH, _VALUE_INFO, _TYPE, _TENSOR_TYPE, _SHAPE, _DIM)
_DIM_VALUE, _DIM_PARAM = 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def with_fixed_axes(model: bytes, sizes: Mapping[str, int]) -> bytes:
    """Replace named axes of all inputs, outputs and values by sizes.

    Args:
        model: an ONNX file; its external data is not touched.
        sizes: axis name -> size, 1 or more.

    Returns:
        The file with these axes fixed.

    Raises:
        ValueError: not an ONNX file, or none of its axes has one of the names.
    """
    found: set[str] = set()
    fixed = _rewrite(memoryview(model), _PATH, sizes, found)
    missing = sorted(set(sizes) - found)
    if missing:
        raise ValueError(f"the graph has no axis {', '.join(missing)}")
    return fixed


def _rewrite(
    message: memoryview,
    path: tuple[tuple[int, ...], ...],
    sizes: Mapping[str, int],
    found: set[str],
) -> bytes:
    """Copy a message with the dimensions below `path` changed."""
    parts: list[bytes | memoryview] = []
    for number, wire, whole, content in _fields(message):
        if not path and number == _DIM_PARAM and bytes(content).decode() in sizes:
            name = bytes(content).decode()
            found.add(name)
            parts.append(_varint(_DIM_VALUE << 3 | _VARINT) + _varint(sizes[name]))
        elif path and number in path[0] and wire == _BYTES:
            inner = _rewrite(content, path[1:], sizes, found)
            parts += [_varint(number << 3 | _BYTES), _varint(len(inner)), inner]
        else:
            parts.append(whole)
    return b"".join(parts)


def _fields(message: memoryview) -> Iterator[tuple[int, int, memoryview, memoryview]]:
    """Number, wire type, the whole field and its content, of every field of a message."""
    at = 0
    while at < len(message):
        key, start = _read_varint(message, at)
        wire = key & 7
        if wire == _VARINT:
            _, stop = _read_varint(message, start)
        elif wire == _BYTES:
            length, start = _read_varint(message, start)
            stop = start + length
        elif wire in (_FIXED64, _FIXED32):
            stop = start + (8 if wire == _FIXED64 else 4)
        else:
            raise ValueError("is not an ONNX file")
        if stop > len(message):
            raise ValueError("is not an ONNX file")
        yield key >> 3, wire, message[at:stop], message[start:stop]
        at = stop


def _read_varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message) and shift < 64:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("is not an ONNX file")


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])
