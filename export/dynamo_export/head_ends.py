"""The end of a head: what it makes by itself of the rows that something is wanted of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from dynamo_graph.initializers import is_weight
from dynamo_runtime.names import HEAD_ROWS

BRANCH_BYTES = 500_000_000  # of weights in branches, which are written in one piece with the graph


@dataclass(frozen=True)
class HeadEnd:
    """What only one head reads.

    Attributes:
        given: What it makes its state of [batch, head_rows, width], in the order of the graph.
        nodes: From there to the state, in order; nothing else reads what they make.
        state: [batch, head_rows, hidden].
    """

    given: list[ir.Value]
    nodes: list[ir.Node]
    state: ir.Value

    @property
    def weights(self) -> list[ir.Value]:
        """Those that the nodes read, each once; others may read them as well."""
        read = dict.fromkeys(value for node in self.nodes for value in node.inputs)
        return [value for value in read if value is not None and is_weight(value)]


def head_ends(graph: ir.Graph, states: Sequence[ir.Value]) -> list[HeadEnd]:
    """Return the end of every head.

    They have no nodes where those of all heads hold more than branches are to, or read values of different widths.

    Args:
        graph: The layers, with rows chosen as early as that is exact.
        states: Of the heads; they are no outputs.
    """
    ends = [_end(graph, state) for state in states]
    tensors = [weight.const_value for end in ends for weight in end.weights if weight.const_value is not None]
    alike = len({tuple(map(width_of, end.given)) for end in ends}) == 1
    if alike and sum(tensor.nbytes for tensor in tensors) <= BRANCH_BYTES:
        return ends
    return [HeadEnd([state], [], state) for state in states]


def width_of(value: ir.Value) -> int:
    """Return the width of a value [batch, rows, width]."""
    assert value.shape is not None
    return int(value.shape[-1])  # type: ignore[arg-type]


def _end(graph: ir.Graph, state: ir.Value) -> HeadEnd:
    above, given, todo = set[ir.Node](), set[ir.Value](), [state]
    while todo:
        value = todo.pop()
        maker = value.producer()
        if maker is not None and any(each is not None and each.name == HEAD_ROWS for each in maker.inputs):
            given.add(value)
        elif maker is not None and maker not in above:
            above.add(maker)
            todo += [each for each in maker.inputs if each is not None]
    own: list[ir.Node] = []  # others may read what does not depend on the rows
    for node in reversed(list(graph)):
        if node in above and all(use.node in own for value in node.outputs for use in value.uses()):
            own.insert(0, node)
    return HeadEnd([value for node in graph for value in node.outputs if value in given], own, state)
