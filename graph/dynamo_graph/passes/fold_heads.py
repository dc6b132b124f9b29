"""Further heads go into a branch."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dynamo_runtime.names import HEAD_ROWS, PAST, PENULTIMATE, PRESENT, SKIPPED

from ..branches import BRANCH, STACKED, find_node, head_nodes
from ..initializers import initializer
from ..nodes import make, stand_in


class FoldHeads(ir.passes.InPlacePass):
    """Moves the further heads into an `If`; a graph that takes no `skipped_states` is left as it is."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Folds the heads.

        Raises:
            WriteError: The graph does not join the rows of its heads.
        """
        graph = model.graph
        inputs = {value.name: value for value in graph.inputs}
        if SKIPPED not in inputs or find_node(model, BRANCH) is not None:
            return ir.passes.PassResult(model, False)
        folded = head_nodes(model)
        stacked = find_node(model, STACKED)
        assert stacked is not None
        folded.add(stacked)
        inside = [node for node in graph if node in folded]
        outputs = set(graph.outputs)
        ends = [
            value
            for node in inside
            for value in node.outputs
            if value in outputs or any(use.node not in folded for use in value.uses())
        ]
        wanted = make("Size", [inputs[HEAD_ROWS]], "/heads/wanted_rows", ["heads_wanted_rows"])
        zero = initializer(model, "heads_zero", np.array(0, np.int64))
        condition = make("Greater", [wanted.outputs[0], zero], "/heads/wanted", ["heads_wanted"])
        branch = ir.Node("", "If", condition.outputs, num_outputs=len(ends), name=BRANCH)
        graph.insert_before(inside[0], [wanted, condition, branch])
        skipping, nothing = _skipped(model, stacked, ends)
        for value, out in zip(ends, branch.outputs, strict=True):
            out.type, out.shape = value.type, value.shape
            stand_in(graph, value, out, ".computed", lambda reader: reader not in folded)
        graph.remove(inside)
        branch.attributes["then_branch"] = ir.AttrGraph("then_branch", ir.Graph([], ends, nodes=inside, name="heads"))
        branch.attributes["else_branch"] = ir.AttrGraph(
            "else_branch", ir.Graph([], nothing, nodes=skipping, name="none")
        )
        graph.sort()
        return ir.passes.PassResult(model, True)


def _skipped(model: ir.Model, stacked: ir.Node, ends: list[ir.Value]) -> tuple[list[ir.Node], list[ir.Value]]:
    """Nodes, and what they put out, of the branch that skips the heads."""
    (states,) = (value for value in model.graph.outputs if value.name == PENULTIMATE)
    nodes: list[ir.Node] = []
    outputs = []
    for value in ends:
        if value is stacked.outputs[0]:
            made = [ir.node("Identity", [stacked.inputs[0]])]
        else:
            made = _nothing(model, value, states)
        node, out = made[-1], made[-1].outputs[0]
        node.name = f"/heads/skip/{value.name}"
        out.name, out.type, out.shape = f"{value.name}.skipped", value.type, value.shape
        nodes += made
        outputs.append(out)
    return nodes, outputs


def _nothing(model: ir.Model, value: ir.Value, states: ir.Value) -> list[ir.Node]:
    """What makes up for an output of the heads when they are skipped: the cache as it was, or no rows at all."""
    assert value.name is not None
    if value.name.startswith(f"{PRESENT}."):
        past = next(i for i in model.graph.inputs if i.name == value.name.replace(PRESENT, PAST, 1))
        return [ir.node("Identity", [past])]
    width = (states if value.shape is None else value).shape[2]  # type: ignore[index]
    starts = initializer(model, "heads_begin", np.array([0, 0], np.int64))
    axes = initializer(model, "heads_axes", np.array([1, 2], np.int64))
    stops = initializer(model, "heads_end", np.array([0, width], np.int64))
    cut = ir.node("Slice", [states, starts, stops, axes])
    if value.dtype is None or value.dtype == states.dtype:
        return [cut]
    return [cut, ir.node("Cast", [cut.outputs[0]], attributes={"to": int(value.dtype)})]
