"""Further heads come out of their branch."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ..branches import BRANCH, find_node


class UnfoldHeads(ir.passes.InPlacePass):
    """Puts the further heads back into the graph itself, where there is an `If` of them."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Unfolds the heads."""
        graph = model.graph
        branch = find_node(model, BRANCH)
        if branch is None:
            return ir.passes.PassResult(model, False)
        then = branch.attributes["then_branch"].as_graph()
        ends = list(then.outputs)
        nodes = list(then)
        then.outputs.clear()
        then.remove(nodes)
        graph.insert_before(branch, nodes)
        for value, out in zip(ends, branch.outputs, strict=True):
            name = out.name
            out.name = f"{name}.folded"
            out.replace_all_uses_with(value, replace_graph_outputs=True)
            value.name, value.type, value.shape = name, out.type, out.shape
        graph.remove(branch, safe=True)
        RemoveUnusedNodesPass()(model)  # what chose the branch
        return ir.passes.PassResult(model, True)
