"""Reshapes between [batch, seq, …] shapes: constant where they were computed, gone where they do nothing."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dynamo_graph.initializers import initializer


class SimplifyReshapes(ir.passes.InPlacePass):
    """Rewrites every Reshape that keeps the batch and sequence axes.

    Tracing writes the new shape as a Concat of Shape nodes. With two leading axes kept, `[0, 0, sizes…]` says the same
    as a constant; a Reshape of a Reshape skips the first; one whose shape is unchanged is read by nobody any more.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite them."""
        changes = [_simplify(model, node) for node in list(model.graph) if node.op_type == "Reshape" and node.inputs]
        return ir.passes.PassResult(model, any(changes))


def _simplify(model: ir.Model, node: ir.Node) -> bool:
    """Rewrite one Reshape; whether it changed."""
    skipped = _skip_first(node)
    source, target = node.inputs[0], node.outputs[0]
    old, new = _dims(source), _dims(target)
    if source is None or old is None or new is None or len(old) < 3 or old[:2] != new[:2] or None in old[:2]:
        return skipped
    if old == new:
        read = bool(target.uses())
        target.replace_all_uses_with(source, replace_graph_outputs=False)
        return skipped or read
    sizes = [dim for dim in new[2:] if isinstance(dim, int)]
    if len(sizes) < len(new) - 2:
        return skipped
    shape = initializer(model, "shape_" + "x".join(map(str, sizes)), np.array([0, 0, *sizes], np.int64))
    if node.inputs[1] is shape:
        return skipped
    node.replace_input_with(1, shape)
    node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
    return True


def _skip_first(node: ir.Node) -> bool:
    """Have a Reshape of a Reshape read what the first one reads, if that has the same leading axes."""
    assert node.inputs[0] is not None
    first = node.inputs[0].producer()
    if first is None or first.op_type != "Reshape":
        return False
    inner, outer = _dims(first.inputs[0]), _dims(node.outputs[0])
    if not inner or not outer or inner[:2] != outer[:2]:
        return False
    node.replace_input_with(0, first.inputs[0])
    return True


def _dims(value: ir.Value | None) -> list[int | str | None] | None:
    if value is None or value.shape is None:
        return None
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape]
