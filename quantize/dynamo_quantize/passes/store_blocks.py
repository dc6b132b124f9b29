"""Puts weights in blocks into the graph: MatMulNBits for products, GatherBlockQuantized for the look-up."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dynamo_graph.initializers import initializer
from dynamo_graph.nodes import make, replace_node

from ..blocks import Blocks
from ..parts import Product

CONTRIB = "com.microsoft"
ACCURACY_LEVEL = 4  # int8 activations, quantized row by row; level 0 is many times slower on CPU


class StoreBlocks(ir.passes.InPlacePass):
    """Replaces a product by its block-quantized counterpart; weights of the same name and format are stored once.

    The full weight stays in the graph, for others that may read it.
    """

    def __init__(self, product: Product, blocks: Blocks) -> None:
        """Take the product to replace, and its weight in blocks."""
        super().__init__()
        self.product = product
        self.blocks = blocks

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace it, unless that was done before."""
        if self.product.node.graph is None:
            return ir.passes.PassResult(model, False)
        model.opset_imports.setdefault(CONTRIB, 1)
        replace_node(self.product.node, _counterpart(self.product, self.blocks))
        return ir.passes.PassResult(model, True)


def _counterpart(product: Product, blocks: Blocks) -> ir.Node:
    form, node = blocks.format, product.node
    name = f"{product.name}.q{form.bits}b{form.block_size}"
    # Two-dimensional, as the look-up wants it; a product of the same weight sees it through a Reshape.
    flat = blocks.packed.reshape(product.outputs, -1) if product.transposed else blocks.packed
    graph = node.graph
    assert graph is not None and node.name is not None
    data = initializer(graph, name, flat)
    scales = initializer(graph, f"{name}.scales", blocks.scales)
    zero_points = [] if blocks.zero_points is None else [initializer(graph, f"{name}.zero_points", blocks.zero_points)]
    if product.is_lookup:
        return make(
            "GatherBlockQuantized",
            [data, node.inputs[1], scales, *zero_points],
            node.name,
            attributes={"bits": form.bits, "block_size": form.block_size, "gather_axis": 0, "quantize_axis": 1},
            domain=CONTRIB,
        )
    if product.transposed:
        shape = initializer(graph, f"{name}.shape", np.array(blocks.packed.shape, np.int64))
        reshape = make("Reshape", [data, shape], f"{node.name}/blocks", [f"{name}.blocks"])
        graph.insert_before(node, reshape)
        data = reshape.outputs[0]
    return make(
        "MatMulNBits",
        [node.inputs[0], data, scales, *zero_points],
        node.name,
        attributes={
            "K": product.inputs,
            "N": product.outputs,
            "bits": form.bits,
            "block_size": form.block_size,
            "accuracy_level": ACCURACY_LEVEL,
        },
        domain=CONTRIB,
    )
