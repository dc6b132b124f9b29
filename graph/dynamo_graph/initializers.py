"""Initializers of an ONNX graph: its weights and constants, and the defaults of its optional inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

BIG_BYTES = 4096  # constants above this are weights: never folded or copied by an optimizer


def sizes(value: ir.Value) -> tuple[int, ...]:
    """Return the shape of an initializer."""
    assert value.shape is not None
    return tuple(int(dim) for dim in value.shape)  # type: ignore[arg-type]


def is_weight(value: ir.Value | None) -> bool:
    """Tell whether a value is an initializer with a known array (and not one that a caller may override)."""
    return value is not None and value.is_initializer() and not value.is_graph_input()


def initializer(owner: ir.Model | ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Return the initializer of that name, of a model or of a graph inside it, made of an array if there is none."""
    return _registered(owner, name, lambda: ir.Tensor(array, name=name))


def lazily(
    model: ir.Model,
    name: str,
    sources: Sequence[ir.Value],
    compute: Callable[..., np.ndarray],
    shape: tuple[int, ...],
) -> ir.Value:
    """Return the initializer of that name.

    If there is none, it is one that is computed when the file is written, and not before.

    Args:
        model: The graph.
        name: Its name.
        sources: See `lazy_tensor`.
        compute: See `lazy_tensor`.
        shape: See `lazy_tensor`.
    """
    return _registered(model, name, lambda: lazy_tensor(name, sources, compute, shape))


def option(model: ir.Model, name: str, default: np.ndarray, shape: Sequence[str | int]) -> ir.Value:
    """Add an optional input to the graph: an initializer of the same name is its default.

    Args:
        model: The graph.
        name: Its name.
        default: What it is if nobody gives it.
        shape: What it may be.
    """
    value = initializer(model, name, default)
    value.shape = ir.Shape(shape)
    model.graph.inputs.append(value)
    return value


def lazy_tensor(
    name: str,
    sources: Sequence[ir.Value],
    compute: Callable[..., np.ndarray],
    shape: tuple[int, ...],
    dtype: ir.DataType | None = None,
) -> ir.LazyTensor:
    """Return an array that is computed from others each time it is asked for.

    Args:
        name: Its name.
        sources: Initializers whose arrays, as they are now, `compute` takes.
        compute: From the arrays of `sources` to the new array.
        shape: Shape of the result.
        dtype: Its type; None for that of the first source.
    """
    tensors = [source.const_value for source in sources if source.const_value is not None]
    assert len(tensors) == len(sources)

    def evaluate() -> ir.Tensor:
        array = compute(*(tensor.numpy() for tensor in tensors))
        return ir.Tensor(np.ascontiguousarray(array), name=name)

    return ir.LazyTensor(evaluate, dtype=dtype or tensors[0].dtype, shape=ir.Shape(shape), name=name)


def _registered(owner: ir.Model | ir.Graph, name: str, make: Callable[[], ir.TensorProtocol]) -> ir.Value:
    """Return the graph's own value of that name."""
    graph = owner.graph if isinstance(owner, ir.Model) else owner
    found = graph.initializers.get(name)
    if found is None:
        tensor = make()
        found = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
        )
        graph.register_initializer(found)
    return found
