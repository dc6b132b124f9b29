"""What lies before and behind a value of a graph, and what its nodes work on."""

from __future__ import annotations

from collections.abc import Container

import onnx_ir as ir

from dynamo_runtime.names import PAST, PRESENT

from .errors import WriteError

TOKENS = "seq"  # names the axis that has an entry for every token of a pass


def upstream(*values: ir.Value | None, until: Container[ir.Node] = ()) -> dict[ir.Node, None]:
    """Return every node that the values depend on, the nearest first.

    Args:
        values: Where to begin.
        until: Nodes behind which nothing is looked for; they are found themselves.
    """
    found: dict[ir.Node, None] = {}
    todo = list(values)
    while todo:
        following: list[ir.Value | None] = []
        for value in todo:
            node = None if value is None else value.producer()
            if node is not None and node not in found:
                found[node] = None
                following += () if node in until else node.inputs
        todo = following
    return found


def downstream(*values: ir.Value | None) -> set[ir.Node]:
    """Return every node that depends on one of the values."""
    found: set[ir.Node] = set()
    todo = list(values)
    while todo:
        value = todo.pop()
        for node in () if value is None else value.consumers():
            if node not in found:
                found.add(node)
                todo += node.outputs
    return found


def is_tokens(dim: int | ir.SymbolicDim) -> bool:
    """Tell whether an axis has an entry for every token of a pass."""
    return isinstance(dim, ir.SymbolicDim) and dim.value == TOKENS


def has_features(value: ir.Value | None) -> bool:
    """Tell whether a value is [batch, seq, features]."""
    return value is not None and value.shape is not None and len(value.shape) == 3 and is_tokens(value.shape[1])


def is_cache(value: ir.Value) -> bool:
    """Tell whether an input or output of the graph holds keys or values."""
    return value.name is not None and value.name.startswith((f"{PAST}.", f"{PRESENT}."))


def attentions(model: ir.Model) -> list[tuple[int, ir.Node]]:
    """Return the attentions in the order of the graph, each with the number N of its cache `past_key_values.N.key`.

    Raises:
        WriteError: One of them does not read such a cache.
    """
    return [(_cache_number(node), node) for node in model.graph if node.op_type == "GroupQueryAttention"]


def _cache_number(attention: ir.Node) -> int:
    try:
        past = attention.inputs[3]
        assert past is not None and past.name is not None
        return int(past.name.split(".")[1])
    except (AssertionError, IndexError, ValueError) as error:
        raise WriteError(f"{attention.name} does not read {PAST}.N.key") from error
