"""Weights in the layout that the graph multiplies with."""

from __future__ import annotations

import onnx_ir as ir

from dynamo_graph.initializers import is_weight, lazily, sizes


class TransposeWeights(ir.passes.InPlacePass):
    """Replaces every Transpose of a weight by the transposed weight.

    A linear layer is traced as x · Transpose(W). Where W is needed as it is too, both layouts are kept.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace them; the weights are transposed when the graph is written."""
        modified = False
        for node in list(model.graph):
            weight = node.inputs[0] if node.inputs else None
            if node.op_type != "Transpose" or weight is None or not is_weight(weight):
                continue
            perm = tuple(node.attributes["perm"].as_ints())
            shape = tuple(sizes(weight)[axis] for axis in perm)
            turned = lazily(
                model, f"{weight.name}.transposed", [weight], lambda array, perm=perm: array.transpose(perm), shape
            )
            node.outputs[0].replace_all_uses_with(turned)
            model.graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)
