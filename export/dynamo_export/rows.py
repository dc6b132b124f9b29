"""Row selection moved as far up the graph as it is exact.

Logits are wanted for a few rows of a pass only. Everything between the last attention and the output embedding works
row by row, so choosing the rows *before* it gives the same numbers for less work.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from dynamo_graph.initializers import is_weight
from dynamo_graph.nodes import insert_behind
from dynamo_graph.walk import has_features

UNARY = {"Gelu", "FastGelu", "QuickGelu", "Sigmoid", "Tanh", "Relu", "Erf", "Identity", "Cast", "Neg", "Sqrt"}
UNARY |= {"Reciprocal", "Exp", "Softplus", "Elu", "LeakyRelu", "HardSigmoid", "HardSwish", "Mish"}
BINARY = {"Add", "Sub", "Mul", "Div", "Pow", "Max", "Min"}
NORMS = {"LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization"}

Select = Callable[[ir.Value], ir.Node]


def _is_shared(value: ir.Value | None) -> bool:
    """Tell whether a value is the same for every row: a weight that broadcasts along the features only."""
    if value is None or value.shape is None:
        return False
    return len(value.shape) <= 1 or all(dim == 1 for dim in list(value.shape)[:-1])


def _row_wise(node: ir.Node) -> bool:
    """Tell whether row r of the node's output depends on row r of its inputs only."""
    if not has_features(node.outputs[0]):
        return False
    if node.op_type in UNARY:
        return has_features(node.inputs[0])
    if node.op_type in BINARY:
        return all(has_features(value) or _is_shared(value) for value in node.inputs)
    if node.op_type == "MatMul":
        return has_features(node.inputs[0]) and is_weight(node.inputs[1])
    if node.op_type == "Split":
        return has_features(node.inputs[0]) and node.attributes["axis"].as_int() in (-1, 2)
    if node.op_type in NORMS:
        axis = node.attributes.get("axis")
        return has_features(node.inputs[0]) and (axis is None or axis.as_int() in (-1, 2))
    return False


def select_rows(
    model: ir.Model, states: ir.Value, select: Select, cuts: dict[ir.Value, ir.Value], axis: str
) -> ir.Value:
    """Select rows of `states`, at the earliest place where that gives the same numbers.

    Args:
        model: The graph.
        states: [batch, seq, hidden], read by nobody and no output (else the selection happens right there).
        select: Makes the node that selects rows of a value; its first output is the result.
        cuts: Selections made so far with the same `select`, shared between heads; added to.
        axis: Name of the axis of selected rows. onnxruntime reuses a buffer for whatever has the same named shape, so
            selections of different size must differ in name.

    Returns:
        The value that holds the selected rows, [batch, rows, hidden].
    """
    graph = model.graph
    outputs = set(graph.outputs)
    cone: set[ir.Node] = set()
    producer = states.producer()
    if producer is not None and not states.uses() and states not in outputs and _row_wise(producer):
        cone.add(producer)
        for node in reversed(list(graph)):
            read = [use for value in node.outputs for use in value.uses()]
            if not read or any(value in outputs for value in node.outputs):
                continue
            if all(use.node in cone for use in read) and _row_wise(node):
                cone.add(node)

    def selected(value: ir.Value) -> ir.Value:
        if value not in cuts:
            node = select(value)
            out = node.outputs[0]
            out.type, out.shape = value.type, _rows_shape(value, axis)
            insert_behind(graph, value, node)
            cuts[value] = out
        return cuts[value]

    if not cone:
        return selected(states)
    for node in [node for node in graph if node in cone]:
        for i, value in enumerate(node.inputs):
            if value is not None and has_features(value) and value.producer() not in cone:
                node.replace_input_with(i, selected(value))
    for node in cone:
        for value in node.outputs:
            value.shape = _rows_shape(value, axis)
    return states


def _rows_shape(value: ir.Value, axis: str) -> ir.Shape | None:
    if value.shape is None or len(value.shape) != 3:
        return value.shape
    return ir.Shape([value.shape[0], axis, value.shape[2]])
