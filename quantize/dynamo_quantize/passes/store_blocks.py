"""Puts weights in blocks into the graph: MatMulNBits for products, GatherBlockQuantized for the look-up."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dynamo_graph.initializers import initializer, replace_node, sizes

from ..blocks import Blocks
from ..parts import Product

CONTRIB = "com.microsoft"
ACCURACY_LEVEL = 4  # int8 activations, quantized row by row; level 0 is many times slower on CPU


def put_blocks(model: ir.Model, product: Product, blocks: Blocks) -> None:
    """Replaces a product by its block-quantized counterpart, whose weights are shared with others of the same name.

    Args:
        model: The graph, which must import onnxruntime's contrib ops.
        product: What is replaced; its full weight stays in the graph for others.
        blocks: The weight.
    """
    rows, columns = sizes(product.weight)
    n, k = (rows, columns) if product.transposed else (columns, rows)
    form = blocks.format
    name = f"{product.name}.q{form.bits}b{form.block_size}"
    # Two-dimensional, as the look-up wants it; a product of the same weight sees it through a Reshape.
    flat = blocks.packed.reshape(n, -1) if product.transposed else blocks.packed
    data = initializer(model, name, flat)
    scales = initializer(model, f"{name}.scales", blocks.scales)
    zero_points = [] if blocks.zero_points is None else [initializer(model, f"{name}.zero_points", blocks.zero_points)]
    node = product.node
    if product.is_lookup:
        ids = node.inputs[1]
        new = ir.node(
            "GatherBlockQuantized",
            [data, ids, scales, *zero_points],
            domain=CONTRIB,
            attributes={"bits": form.bits, "block_size": form.block_size, "gather_axis": 0, "quantize_axis": 1},
            name=node.name,
        )
    else:
        if product.transposed:
            shape = initializer(model, f"{name}.shape", np.array(blocks.packed.shape, np.int64))
            reshape = ir.node("Reshape", [data, shape], name=f"{node.name}/blocks")
            reshape.outputs[0].name = f"{name}.blocks"
            model.graph.insert_before(node, reshape)
            data = reshape.outputs[0]
        new = ir.node(
            "MatMulNBits",
            [node.inputs[0], data, scales, *zero_points],
            domain=CONTRIB,
            attributes={
                "K": k,
                "N": n,
                "bits": form.bits,
                "block_size": form.block_size,
                "accuracy_level": ACCURACY_LEVEL,
            },
            name=node.name,
        )
    replace_node(model, node, new)
