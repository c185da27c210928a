"""Which files an ONNX graph points to and what it calls itself, without handing it to a native parser.

A walk over the protobuf wire format (https://protobuf.dev/programming-guides/encoding) along the few fields that can
lead to a tensor's external data. A graph that is malformed here is refused before anything else looks at it.
"""

from collections.abc import Iterator
from typing import Any

# message -> field number -> message it holds (onnx.proto3)
_FIELDS: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "Sparse", 23: "Sparse"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}
_GRAPH_OF_MODEL, _NAME_OF_GRAPH = 7, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def external_locations(model: bytes) -> set[str]:
    """The `location` of every tensor stored outside the graph. Raises ValueError if the bytes are not a model."""
    return {entry["value"] for entry in _entries(memoryview(model), "Model", 0) if entry.get("key") == "location"}


def graph_name(model: bytes) -> str:
    """The name of a model's graph, empty if it has none. Raises ValueError if the bytes are not a model."""
    graph = _last(memoryview(model), _GRAPH_OF_MODEL)
    return bytes(_last(graph, _NAME_OF_GRAPH)).decode()


def _last(data: memoryview, field: int) -> memoryview:
    found = [value for number, value in _walk(data) if number == field and isinstance(value, memoryview)]
    return found[-1] if found else memoryview(b"")


def _entries(data: memoryview, message: str, depth: int) -> Iterator[dict[str, str]]:
    if depth > 64:
        raise ValueError("nested too deeply")
    if message == "Entry":
        fields = {number: value for number, value in _walk(data) if isinstance(value, memoryview)}
        yield {name: bytes(fields.get(number, b"")).decode() for number, name in ((1, "key"), (2, "value"))}
        return
    inside = _FIELDS[message]
    for number, value in _walk(data):
        if number in inside and isinstance(value, memoryview):
            yield from _entries(value, inside[number], depth + 1)


def _walk(data: memoryview) -> Iterator[tuple[int, Any]]:
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        kind = key & 7
        if not 8 <= key < 2**32:  # parsers cut longer keys short, and would read another field than we did
            raise ValueError(f"field key {key} out of range")
        value: Any = None
        if kind == _VARINT:
            value, position = _varint(data, position)
        elif kind in (_FIXED64, _FIXED32):
            position += 8 if kind == _FIXED64 else 4
        elif kind == _BYTES:
            length, position = _varint(data, position)
            value = data[position : position + length]
            position += length
        else:
            raise ValueError(f"unknown wire type {kind}")
        if position > len(data):
            raise ValueError("cut short")
        yield key >> 3, value


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise ValueError("cut short or malformed number")
        byte = data[position]
        result |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if not byte & 128:
            return result, position
