"""Nodes of an ONNX graph: made, placed, and put in the place of others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir


def make(
    op: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    outputs: Sequence[str] = (),
    attributes: Mapping[str, int] | None = None,
    domain: str = "",
) -> ir.Node:
    """Return a node that is not yet placed.

    Args:
        op: Its type.
        inputs: What it reads.
        name: Its name.
        outputs: Names of what it makes; none for a single value that is named later.
        attributes: Its attributes.
        domain: Of its type.
    """
    node = ir.node(op, inputs, domain=domain, attributes=attributes, num_outputs=max(1, len(outputs)), name=name)
    for value, called in zip(node.outputs, outputs, strict=False):
        value.name = called
    return node


def insert_behind(graph: ir.Graph, value: ir.Value, node: ir.Node) -> None:
    """Place a node right behind the one that makes a value; in front of all others if it is an input."""
    maker = value.producer()
    if maker is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(maker, node)


def replace_node(old: ir.Node, new: ir.Node) -> None:
    """Put a node in another's place; its outputs take over names, types and readers."""
    graph = old.graph
    assert graph is not None
    graph.insert_before(old, new)
    names = [value.name for value in old.outputs]
    for before, after in zip(old.outputs, new.outputs, strict=True):
        after.type, after.shape = before.type, before.shape
        before.replace_all_uses_with(after, replace_graph_outputs=True)
    graph.remove(old, safe=True)
    for value, name in zip(new.outputs, names, strict=True):
        value.name = name


def redirect(value: ir.Value, new: ir.Value, readers: Callable[[ir.Node], bool]) -> None:
    """Have those readers of a value read another."""
    for use in list(value.uses()):
        if readers(use.node):
            use.node.replace_input_with(use.idx, new)


def stand_in(graph: ir.Graph, value: ir.Value, new: ir.Value, suffix: str, readers: Callable[[ir.Node], bool]) -> None:
    """Put another value in the place of one that stays: it takes over the name, some readers, and being an output.

    Args:
        graph: The graph.
        value: What stays, with `suffix` behind its name.
        new: What stands in for it.
        suffix: See `value`.
        readers: Whether a node reads the new one from now on.
    """
    value.name, new.name = f"{value.name}{suffix}", value.name
    redirect(value, new, readers)
    for i, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[i] = new
