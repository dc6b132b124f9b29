"""What a pass has to read of a graph."""

from __future__ import annotations

import onnx_ir as ir

_LOOKUPS = {"Gather", "GatherBlockQuantized"}


def read_bytes(model: ir.Model) -> int:
    """Return bytes of weights that a run of a graph reads.

    Weights that are only looked up do not count, as a run reads a few of their rows; of several branches the largest.

    Args:
        model: The graph.
    """
    return _bytes(model.graph)


def _bytes(graph: ir.Graph) -> int:
    found = 0
    for value in graph.initializers.values():
        if value.const_value is not None and any(use.node.op_type not in _LOOKUPS for use in value.uses()):
            found += value.const_value.nbytes
    for node in graph:
        inner = [
            attribute.as_graph() for attribute in node.attributes.values() if attribute.type == ir.AttributeType.GRAPH
        ]
        found += max(map(_bytes, inner), default=0)
    return found
