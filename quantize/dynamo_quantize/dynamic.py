"""Weights and activations in 8 bits, every tensor of activations with one scale of its own at run time."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from .parts import Product
from .weights import lazily, replace_node, sizes


def untie(model: ir.Model, products: list[Product]) -> list[Product]:
    """Turns products with a transposed weight into plain ones, as onnxruntime's quantizer knows no others."""
    plain = []
    for product in products:
        if product.transposed and not product.is_lookup:
            rows, columns = sizes(product.weight)
            turned = lazily(f"{product.name}.transposed", [product.weight], np.transpose, (columns, rows))
            model.graph.register_initializer(turned)
            node = ir.node("MatMul", [product.node.inputs[0], turned], name=product.node.name)
            replace_node(model, product.node, node)
            product = Product(node, turned, product.part, False)
        plain.append(product)
    return plain


def quantize_dynamically(source: Path, target: Path, names: Collection[str], external: bool) -> None:
    """Has onnxruntime quantize some products of a graph.

    Args:
        source: The graph as a file.
        target: Where the result goes.
        names: Nodes that are quantized.
        external: Whether the weights go into a file of their own.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.disable(logging.WARNING)  # it warns once an activation that it has no static range for it
    try:
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=list(names),
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=external,
            # Types of activations that shape inference cannot tell, because contrib ops stand before them.
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT, "MatMulConstBOnly": True},
        )
    finally:
        logging.disable(logging.NOTSET)
