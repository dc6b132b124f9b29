"""Reads an ONNX file without its weights, which are read from the file one at a time when somebody asks for them.

The counterpart of `write`: what is skipped there to keep weights out of one big protobuf is skipped here.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from dynamo_runtime.bundle import Bundle
from dynamo_runtime.errors import shown
from dynamo_runtime.files import lies_in
from dynamo_runtime.manifest import PassBytes
from dynamo_runtime.wire import GRAPH_INITIALIZER, MODEL_GRAPH, TENSOR_RAW_DATA, external_files, field, fields

from .errors import WriteError
from .initializers import BIG_BYTES
from .reads import read_bytes
from .write import Place


def read_model(path: Path) -> ir.Model:
    """Read a graph; arrays of big weights are read anew each time they are used, and never kept.

    Args:
        path: The `.onnx` file, which must stay where it is.

    Raises:
        WriteError: It is not an ONNX file, or has weights in a file that does not lie beside it.
    """
    skeleton = _skeleton(path)
    try:
        model = ir.from_proto(skeleton)
    except Exception as error:  # onnx_ir raises whatever it stumbles over
        raise WriteError(f"{path} is not a readable ONNX file: {error}") from error
    ir.external_data.set_base_dir(model.graph, path.parent)  # of those that are not replaced here
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = _lazy(value.const_value, path.parent)
    return model


def pass_bytes(bundle: Bundle) -> PassBytes:
    """Return bytes of weights that a pass reads: in the base's graph, and in that of what predicts further tokens.

    Raises:
        WriteError: See `read_model`.
    """
    drafter = bundle.drafter
    heads = 0 if drafter is None else read_bytes(read_model(bundle.folder / drafter.graph))
    return PassBytes(read_bytes(read_model(bundle.graph_path)), heads)


def places(path: Path) -> dict[str, Place]:
    """Return where the big weights of a graph stand, by name.

    Args:
        path: The `.onnx` file.

    Raises:
        WriteError: See `read_model`.
    """
    found = {}
    for tensor in _skeleton(path).graph.initializer:
        entry = {each.key: each.value for each in tensor.external_data}
        if entry:
            found[tensor.name] = Place(entry["location"], int(entry.get("offset", 0)), int(entry["length"]))
    return found


def _skeleton(path: Path) -> onnx.ModelProto:
    """Return a graph whose big weights say where they lie, in the file itself or beside it.

    Raises:
        WriteError: See `read_model`.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            elsewhere = [name for name in external_files(data) if not lies_in(path.parent, name)]
            if elsewhere:
                raise WriteError(
                    f"{path} has weights in {shown(elsewhere[0])}, which is no file in the folder of the graph"
                )
            skeleton = b"".join(
                data[start:end] if number != MODEL_GRAPH else field(MODEL_GRAPH, _graph(data, begin, end, path.name))
                for number, start, begin, end in fields(data, 0, len(data))
            )
            return onnx.ModelProto.FromString(skeleton)
        except WriteError:
            raise
        except Exception as error:  # protobuf raises whatever it stumbles over
            raise WriteError(f"{path} is not a readable ONNX file: {error}") from error


def _graph(data: mmap.mmap, start: int, end: int, name: str) -> bytes:
    """Return a graph whose big weights say where in the file they lie."""
    parts = []
    for number, at, begin, stop in fields(data, start, end):
        if number == GRAPH_INITIALIZER and stop - begin > BIG_BYTES:
            parts.append(field(GRAPH_INITIALIZER, _tensor(data, begin, stop, name)))
        else:
            parts.append(data[at:stop])
    return b"".join(parts)


def _tensor(data: mmap.mmap, start: int, end: int, name: str) -> bytes:
    """Return a weight whose raw bytes are replaced by their place."""
    rest, place = [], None
    for number, at, begin, stop in fields(data, start, end):
        if number == TENSOR_RAW_DATA:
            place = begin, stop - begin
        else:
            rest.append(data[at:stop])
    tensor = onnx.TensorProto.FromString(b"".join(rest))
    if place is not None:
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", name), ("offset", place[0]), ("length", place[1])):
            tensor.external_data.add(key=key, value=str(value))
    return tensor.SerializeToString()


def _lazy(tensor: ir.ExternalTensor, folder: Path) -> ir.TensorProtocol:
    """Return the same weight, read from its file at every use; a small one is read now."""
    path, dtype, shape, name = folder / tensor.location, tensor.dtype.numpy(), tensor.shape.numpy(), tensor.name
    offset = tensor.offset or 0
    if min(offset, *shape, 0) < 0 or offset + tensor.nbytes > path.stat().st_size:
        raise WriteError(f"{path} ends before the weight {shown(name)} does")

    def read() -> ir.Tensor:
        count = int(np.prod(shape))
        return ir.Tensor(np.fromfile(path, dtype, count, offset=offset).reshape(shape), name=name)

    if tensor.nbytes <= BIG_BYTES:
        return read()
    return ir.LazyTensor(read, dtype=tensor.dtype, shape=tensor.shape, name=name)
