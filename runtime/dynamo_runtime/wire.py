"""Protobuf's wire format, as far as ONNX files need it: they can be cut and joined without being parsed whole."""

import mmap
from collections.abc import Iterable, Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types

# Field numbers of the ONNX schema; all of these are length-delimited.
MODEL_GRAPH, GRAPH_NODE, GRAPH_INITIALIZER, GRAPH_INPUT, GRAPH_OUTPUT = 7, 1, 5, 11, 12
NODE_INPUT, NODE_OUTPUT, VALUE_NAME, TENSOR_RAW_DATA = 1, 2, 1, 9

# Which messages hold which others by which field, as far as there are tensors in them.
_HOLDS = {
    "model": {MODEL_GRAPH: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", GRAPH_INITIALIZER: "tensor", 15: "sparse tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse tensor", 23: "sparse tensor"},
    "sparse tensor": {1: "tensor", 2: "tensor"},
    "tensor": {13: "external data"},
}
_LOCATION = b"location"

Data = bytes | mmap.mmap


def varint(number: int) -> bytes:
    """Return a number as the format writes it."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def tag(number: int) -> bytes:
    """Return what stands in front of a length-delimited field."""
    return varint(number << 3 | BYTES)


def field(number: int, content: bytes) -> bytes:
    """Return a length-delimited field of a message."""
    return tag(number) + varint(len(content)) + content


def fields(data: Data, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield every field of a message: its number, where it starts, where its content begins and where that ends.

    Raises:
        ValueError: It is not a message.
    """
    at = start
    while at < end:
        number, begin = _read_varint(data, at)
        kind = number & 7
        if kind == VARINT:
            stop = _read_varint(data, begin)[1]
        elif kind == BYTES:
            length, begin = _read_varint(data, begin)
            stop = begin + length
        elif kind in (FIXED32, FIXED64):
            stop = begin + (4 if kind == FIXED32 else 8)
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        if stop > end:
            raise ValueError(f"the field at byte {at} ends behind its message")
        yield number >> 3, at, begin, stop
        at = stop


def _read_varint(data: Data, at: int) -> tuple[int, int]:
    """Return the number that begins there, and where it ends."""
    number = shift = 0
    while True:
        if shift > 63 or at >= len(data):
            raise ValueError(f"no number ends before byte {at}")
        byte = data[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return number, at


def external_files(data: Data) -> set[str]:
    """Return every file that an ONNX model says some of its weights are in, as it names them.

    Raises:
        ValueError: It is not such a model.
    """
    found = set()
    inside = [("model", 0, len(data))]
    while inside:
        kind, start, end = inside.pop()
        if kind == "external data":
            entry = {number: data[begin:stop] for number, _, begin, stop in fields(data, start, end)}
            if entry.get(1) == _LOCATION:
                found.add(entry.get(2, b"").decode("utf-8"))
            continue
        holds = _HOLDS[kind]
        inside += [
            (holds[number], begin, stop) for number, _, begin, stop in fields(data, start, end) if number in holds
        ]
    return found


def without_ends(model: bytes, names: Iterable[str]) -> bytes:
    """Return an ONNX model without some of its inputs and outputs, nor the nodes that depend on such an input.

    Args:
        model: The file's content; its nodes stand in the order in which they are run, as the format demands.
        names: Of the inputs and outputs.
    """
    dropped = {name.encode() for name in names}
    parts = []
    for number, at, begin, stop in fields(model, 0, len(model)):
        if number != MODEL_GRAPH:
            parts.append(model[at:stop])
            continue
        graph = []
        gone = set(dropped)  # values that there are none of any more
        for kind, start, content, end in fields(model, begin, stop):
            if kind == GRAPH_NODE:
                if any(value in gone for value in _strings(model, content, end, NODE_INPUT)):
                    gone |= _strings(model, content, end, NODE_OUTPUT)
                    continue
            elif kind in (GRAPH_INPUT, GRAPH_OUTPUT) and _strings(model, content, end, VALUE_NAME) & dropped:
                continue
            graph.append(model[start:end])
        parts.append(field(MODEL_GRAPH, b"".join(graph)))
    return b"".join(parts)


def _strings(model: bytes, start: int, end: int, wanted: int) -> set[bytes]:
    """Return what stands in a field of a message."""
    return {model[begin:stop] for number, _, begin, stop in fields(model, start, end) if number == wanted}
