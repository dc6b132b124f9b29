"""Nodes and initializers without what the tracer says about them."""

from __future__ import annotations

import onnx_ir as ir


class ClearMetadata(ir.passes.InPlacePass):
    """Clears what the tracer notes at every node and initializer.

    Unlike onnx-ir's `ClearMetadataAndDocStringPass`, which leaves initializers, and takes the graph's own signature.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Clear it."""
        told = [item for item in [*model.graph, *model.graph.initializers.values()] if item.metadata_props]
        for item in told:
            item.metadata_props.clear()
        return ir.passes.PassResult(model, bool(told))
