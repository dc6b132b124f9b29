"""Weights and nodes of an ONNX graph."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

BIG_BYTES = 4096  # constants above this are weights: never folded or copied by an optimizer


def lazily(
    name: str,
    sources: list[ir.Value],
    compute: Callable[..., np.ndarray],
    shape: tuple[int, ...],
    dtype: ir.DataType | None = None,
) -> ir.Value:
    """Makes an initializer that is computed from others when the file is written, and not before.

    Args:
        name: Its name.
        sources: Initializers whose arrays `compute` takes.
        compute: From the arrays of `sources` to the new array.
        shape: Shape of the result.
        dtype: Its type; None for that of the first source.
    """
    tensors = [source.const_value for source in sources]
    assert all(tensor is not None for tensor in tensors)
    dtype = dtype or tensors[0].dtype  # type: ignore[union-attr]

    def evaluate() -> ir.Tensor:
        array = compute(*(tensor.numpy() for tensor in tensors))  # type: ignore[union-attr]
        return ir.Tensor(np.ascontiguousarray(array), name=name)

    tensor = ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(shape), name=name)
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=tensor)


def sizes(value: ir.Value) -> tuple[int, ...]:
    """Shape of an initializer."""
    assert value.shape is not None
    return tuple(int(dim) for dim in value.shape.numpy())


def is_weight(value: ir.Value | None) -> bool:
    """Whether a value is an initializer with a known array (and not one that a caller may override)."""
    return value is not None and value.is_initializer() and not value.is_graph_input()


def drop_unused(model: ir.Model) -> None:
    """Removes nodes nobody reads and initializers nobody uses."""
    graph = model.graph
    outputs = set(graph.outputs)
    for node in reversed(list(graph)):
        if not any(value.uses() or value in outputs for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_input():
            del graph.initializers[name]


def initializer(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    """The initializer of that name, made of an array if there is none."""
    found = model.graph.initializers.get(name)
    if found is None:
        tensor = ir.Tensor(array, name=name)
        found = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        model.graph.register_initializer(found)
    return found


def replace_node(model: ir.Model, old: ir.Node, new: ir.Node) -> None:
    """Puts a node in another's place; its outputs take over names, types and readers."""
    model.graph.insert_before(old, new)
    names = [value.name for value in old.outputs]
    for before, after in zip(old.outputs, new.outputs, strict=True):
        after.type, after.shape = before.type, before.shape
        before.replace_all_uses_with(after, replace_graph_outputs=True)
    model.graph.remove(old, safe=True)
    for value, name in zip(new.outputs, names, strict=True):
        value.name = name
