"""Writes an ONNX file weight by weight, so that no more than one weight is ever held twice, but for those in branches.

`onnx.save` wants the whole model as one protobuf in memory and then as one string of bytes: three times the weights
together with the torch model. The format needs neither: a message's fields may come in any order, so the small part
of the graph is serialised first and the initializers are appended one at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
from tqdm import tqdm

from dynamo_runtime.wire import GRAPH_INITIALIZER, MODEL_GRAPH, TENSOR_RAW_DATA, tag, varint

from .initializers import BIG_BYTES

EMBED_LIMIT_BYTES = 1_500_000_000  # a protobuf file ends at 2 GiB
CHUNK_BYTES = 1 << 20  # compared at once
ALIGNMENT_BYTES = 4096  # of external weights, so that they can be mapped into memory


class Place(NamedTuple):
    """Where a weight's bytes stand: the name of a file in the graph's folder, the first byte, and how many."""

    file: str
    offset: int
    length: int


def weight_bytes(model: ir.Model) -> int:
    """Return bytes of all initializers."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def write_model(
    model: ir.Model, path: Path, external: bool = False, elsewhere: Mapping[str, Place] | None = None
) -> list[Path]:
    """Write the model.

    Args:
        model: The graph; its lazy weights are computed here, one after the other.
        path: The `.onnx` file, which must not exist.
        external: Put the weights into `path` + ".data" even if they would fit.
        elsewhere: Where weights of another graph in the same folder stand, by name; one that is the same there is not
            written again.

    Returns:
        The files written.
    """
    graph = model.graph
    big = {
        name: value.const_value
        for name, value in graph.initializers.items()
        if value.const_value is not None and value.const_value.nbytes > BIG_BYTES
    }
    values = {name: graph.initializers.pop(name) for name in big}
    try:
        proto = ir.to_proto(model)
    finally:
        for value in values.values():
            graph.register_initializer(value)
    for name, place in (elsewhere or {}).items():
        if name in big and _stands(big[name], path.parent, place):
            proto.graph.initializer.append(_reference(name, big.pop(name), place))
    bar = tqdm(big.items(), desc="weights", unit="tensor", leave=False, disable=None)
    data = path.with_name(path.name + ".data")
    if external or sum(tensor.nbytes for tensor in big.values()) > EMBED_LIMIT_BYTES:
        _write_external(proto, bar, path, data)
        return [path, data]
    _write_embedded(proto, bar, path)
    return [path]


def _header(name: str, tensor: ir.TensorProtocol) -> onnx.TensorProto:
    dims = [int(dim) for dim in tensor.shape]  # type: ignore[arg-type]
    return onnx.TensorProto(name=name, data_type=int(tensor.dtype), dims=dims)


def _reference(name: str, tensor: ir.TensorProtocol, place: Place) -> onnx.TensorProto:
    """Return a weight that says where it stands."""
    entry = _header(name, tensor)
    entry.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", place.file), ("offset", place.offset), ("length", place.length)):
        entry.external_data.add(key=key, value=str(value))
    return entry


def _stands(tensor: ir.TensorProtocol, folder: Path, place: Place) -> bool:
    """Tell whether a weight's bytes stand in a place; two graphs may well call different weights by one name."""
    if place.length != tensor.nbytes:
        return False
    ours = _array(tensor).reshape(-1).view(np.uint8).data
    with (folder / place.file).open("rb") as file:
        file.seek(place.offset)
        parts = (ours[at : at + CHUNK_BYTES] for at in range(0, len(ours), CHUNK_BYTES))
        return all(file.read(len(part)) == part for part in parts)


def _array(tensor: ir.TensorProtocol) -> np.ndarray:
    array = np.ascontiguousarray(tensor.numpy())
    return array if array.dtype.byteorder in "=<|" else array.astype(array.dtype.newbyteorder("<"))


def _write_external(
    proto: onnx.ModelProto, weights: Iterable[tuple[str, ir.TensorProtocol]], path: Path, data: Path
) -> None:
    with data.open("xb") as file:
        for name, tensor in weights:
            file.write(bytes(-file.tell() % ALIGNMENT_BYTES))
            proto.graph.initializer.append(_reference(name, tensor, Place(data.name, file.tell(), tensor.nbytes)))
            file.write(_array(tensor).data)
    with path.open("xb") as file:
        file.write(proto.SerializeToString())


def _write_embedded(proto: onnx.ModelProto, weights: Iterable[tuple[str, ir.TensorProtocol]], path: Path) -> None:
    small_graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    pieces = list(weights) if not isinstance(weights, tqdm) else list(weights.iterable)
    prefixes = [_initializer_prefix(name, tensor) for name, tensor in pieces]
    size = len(small_graph) + sum(
        len(prefix) + tensor.nbytes for prefix, (_, tensor) in zip(prefixes, pieces, strict=True)
    )
    with path.open("xb") as file:
        file.write(proto.SerializeToString() + tag(MODEL_GRAPH) + varint(size) + small_graph)
        for prefix, (name, tensor) in zip(prefixes, weights, strict=True):
            array = _array(tensor)
            assert array.nbytes == tensor.nbytes, name
            file.write(prefix)
            _write_array(file, array)


def _initializer_prefix(name: str, tensor: ir.TensorProtocol) -> bytes:
    """Return everything of one initializer up to its raw bytes."""
    header = _header(name, tensor).SerializeToString() + tag(TENSOR_RAW_DATA) + varint(tensor.nbytes)
    return tag(GRAPH_INITIALIZER) + varint(len(header) + tensor.nbytes) + header


def _write_array(file: BinaryIO, array: np.ndarray) -> None:
    file.write(array.reshape(-1).view(np.uint8).data)
