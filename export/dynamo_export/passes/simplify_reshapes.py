"""Reshapes between [batch, seq, …] shapes: constant where they were computed, gone where they do nothing."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dynamo_graph.initializers import drop_unused


def _dims(value: ir.Value | None) -> list[int | str | None] | None:
    if value is None or value.shape is None:
        return None
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape]


def simplify_reshapes(model: ir.Model) -> None:
    """Rewrites every Reshape that keeps the batch and sequence axes.

    Tracing writes the new shape as a Concat of Shape nodes. With two leading axes kept, `[0, 0, sizes…]` says the same
    as a constant; a Reshape of a Reshape skips the first; one whose shape is unchanged disappears.
    """
    graph = model.graph
    constants: dict[tuple[int, ...], ir.Value] = {}
    for node in list(graph):
        if node.op_type != "Reshape" or not node.inputs:
            continue
        source, target = node.inputs[0], node.outputs[0]
        assert source is not None
        if (producer := source.producer()) is not None and producer.op_type == "Reshape":
            before = producer.inputs[0]
            inner, outer = _dims(before), _dims(target)
            if inner and outer and inner[:2] == outer[:2] and before is not None:
                source = before
                node.replace_input_with(0, source)
        old, new = _dims(source), _dims(target)
        if old is None or new is None or len(old) < 3 or old[:2] != new[:2] or None in old[:2]:
            continue
        if old == new:
            target.replace_all_uses_with(source, replace_graph_outputs=False)
            continue
        if not all(isinstance(dim, int) for dim in new[2:]):
            continue
        sizes = (0, 0, *(int(dim) for dim in new[2:]))  # type: ignore[arg-type]
        if sizes not in constants:
            name = "shape_" + "x".join(map(str, sizes[2:]))
            constants[sizes] = ir.Value(
                name=name,
                type=ir.TensorType(ir.DataType.INT64),
                shape=ir.Shape([len(sizes)]),
                const_value=ir.Tensor(np.array(sizes, np.int64), name=name),
            )
            graph.register_initializer(constants[sizes])
        node.replace_input_with(1, constants[sizes])
        node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
    drop_unused(model)
