"""The constants of a frozen TensorFlow graph, read from its protobuf bytes without TensorFlow.

Field numbers are those of TensorFlow's graph.proto, node_def.proto, attr_value.proto, tensor.proto, tensor_shape.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

VARINT, FIXED64, LENGTH_DELIMITED, FIXED32 = 0, 1, 2, 5  # protobuf's wire types that are in use

GRAPH_NODE = 1
NODE_NAME, NODE_OP, NODE_ATTR = 1, 2, 5
ENTRY_KEY, ENTRY_VALUE = 1, 2  # a protobuf map is a list of such entries
ATTR_TENSOR = 8
TENSOR_DTYPE, TENSOR_SHAPE, TENSOR_CONTENT, TENSOR_FLOATS = 1, 2, 4, 5
SHAPE_DIM, DIM_SIZE = 2, 1

DT_FLOAT = 1
MAX_VARINT_BYTES = 10


def read_float_constants(path: str | Path) -> dict[str, np.ndarray]:
    """The float32 tensors of all `Const` nodes of a GraphDef file, by node name.

    Raises:
        ValueError: if the bytes are no GraphDef, or a tensor's data do not fill its shape.
    """
    data = memoryview(Path(path).read_bytes())
    try:
        nodes = [_read_constant(node) for number, node in _fields(data) if number == GRAPH_NODE]
    except (IndexError, struct.error, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"{path} is no TensorFlow GraphDef, or was cut short ({error})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return dict(node for node in nodes if node is not None)


def _read_constant(node: memoryview) -> tuple[str, np.ndarray] | None:
    """Name and value of a NodeDef, None if it is no float constant."""
    fields = list(_fields(node))
    if _last(fields, NODE_OP, b"") != b"Const":
        return None
    name = bytes(_last(fields, NODE_NAME, b"")).decode()
    for number, entry in fields:
        if number == NODE_ATTR:
            attr = list(_fields(entry))
            if _last(attr, ENTRY_KEY, b"") == b"value":
                tensor = _last(list(_fields(_last(attr, ENTRY_VALUE, b""))), ATTR_TENSOR, b"")
                value = _read_tensor(name, list(_fields(tensor)))
                return None if value is None else (name, value)
    return None


def _read_tensor(name: str, fields: list) -> np.ndarray | None:
    """Value of a TensorProto, None if it is not float32."""
    if _last(fields, TENSOR_DTYPE, 0) != DT_FLOAT:
        return None
    dims = [list(_fields(dim)) for number, dim in _fields(_last(fields, TENSOR_SHAPE, b"")) if number == SHAPE_DIM]
    shape = tuple(_last(dim, DIM_SIZE, 0) for dim in dims)
    size = int(np.prod(shape, dtype=np.int64))
    values = np.frombuffer(_last(fields, TENSOR_CONTENT, b""), "<f4")
    if not values.size:  # small tensors are a repeated field: packed, or one fixed32 each
        values = np.frombuffer(b"".join(part for number, part in fields if number == TENSOR_FLOATS), "<f4")
        if values.size == 1:  # one value stands for a constant tensor
            values = np.repeat(values, size)
    if values.size != size:
        raise ValueError(f"constant {name} has {values.size} values for its shape {list(shape)}: the file is damaged")
    return values.reshape(shape).astype(np.float32)


def _fields(message: memoryview | bytes) -> Iterator[tuple[int, memoryview | int]]:
    """(number, value) of each field: int for varints, the raw bytes for everything else."""
    message, position = memoryview(message), 0
    while position < len(message):
        tag, position = _varint(message, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == VARINT:
            value, position = _varint(message, position)
            yield number, value
            continue
        if wire_type == LENGTH_DELIMITED:
            length, position = _varint(message, position)
        elif wire_type in (FIXED32, FIXED64):
            length = 4 if wire_type == FIXED32 else 8
        else:
            raise IndexError(f"wire type {wire_type} at byte {position}")
        if number == 0 or position + length > len(message):
            raise IndexError(f"field {number} of {length} bytes at byte {position} of {len(message)}")
        yield number, message[position : position + length]
        position += length


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """Unsigned base-128 number at `position`, and the position behind it."""
    value = 0
    for index in range(MAX_VARINT_BYTES):
        byte = message[position + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position + index + 1
    raise IndexError(f"no number at byte {position}")


def _last(fields: list, number: int, default):
    """Value of a field that is not repeated: the last one counts, as in protobuf."""
    return next((value for key, value in reversed(fields) if key == number), default)
