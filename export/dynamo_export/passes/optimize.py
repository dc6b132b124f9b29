"""onnxscript's optimizer."""

from __future__ import annotations

import onnx_ir as ir
import onnxscript.optimizer

from dynamo_graph.initializers import BIG_BYTES


class Optimize(ir.passes.InPlacePass):
    """Folds constants, merges what is computed twice, drops what is unused; never touches a weight."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Optimize the graph."""
        before = _content(model)
        onnxscript.optimizer.optimize_ir(model, input_size_limit=BIG_BYTES, output_size_limit=BIG_BYTES)
        return ir.passes.PassResult(model, _content(model) != before)


def _content(model: ir.Model) -> list[object]:
    """Return what tells whether the optimizer, which does not say so, changed something."""
    nodes = [
        (node.domain, node.op_type, node.name, node.inputs, node.outputs, tuple(node.attributes.values()))
        for node in model.graph
    ]
    values = [value for node in model.graph for value in node.outputs]
    named = [(value.name, value.dtype, str(value.shape)) for value in [*values, *model.graph.initializers.values()]]
    return [nodes, named, dict(model.graph.opset_imports), tuple(model.functions)]
