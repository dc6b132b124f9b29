"""Weights in int8 by output, and activations in int8 with one scale for a whole tensor, found at run time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from dynamo_graph.initializers import initializer
from dynamo_graph.nodes import insert_behind, make, replace_node

from ..parts import Product

INT8_MAX = 127


class StoreDynamic(ir.passes.InPlacePass):
    """Replaces a product by a product of integers.

    The same nodes as onnxruntime's `quantize_dynamic` makes, which onnxruntime fuses into one when it loads the graph;
    but that function holds the model in memory several times over. The full weight stays in the graph, for others that
    may read it.
    """

    def __init__(self, product: Product) -> None:
        """Take the product to replace."""
        super().__init__()
        self.product = product

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace it, unless that was done before."""
        if self.product.node.graph is None:
            return ir.passes.PassResult(model, False)
        _replace(self.product)
        return ir.passes.PassResult(model, True)


def _replace(product: Product) -> None:
    weight, node = product.matrix(), product.node
    graph = node.graph
    assert graph is not None
    scales = np.abs(weight).max(axis=0) / INT8_MAX
    scales[scales == 0] = 1.0
    name = f"{product.name}.q8"
    numbers = initializer(graph, name, np.ascontiguousarray(np.round(weight / scales).astype(np.int8)))
    by_output = initializer(graph, f"{name}.scales", scales.astype(np.float32))
    activations, scale, zero_point = _quantized(node)

    def step(op: str, inputs: Sequence[ir.Value], what: str, attributes: dict[str, int] | None = None) -> ir.Node:
        called = f"{node.name}/{what}"
        return make(op, inputs, called, [f"{called}/output"], attributes)

    integers = step("MatMulInteger", [activations, numbers, zero_point], "integer")
    both = step("Mul", [scale, by_output], "scales")
    cast = step("Cast", integers.outputs, "cast", {"to": ir.DataType.FLOAT.value})
    graph.insert_before(node, [integers, both, cast])
    assert node.name is not None
    replace_node(node, make("Mul", [cast.outputs[0], both.outputs[0]], node.name))


def _quantized(reader: ir.Node) -> tuple[ir.Value, ...]:
    """Return what a product reads as integers, with scale and zero point; once for all products that read it."""
    source = reader.inputs[0]
    assert source is not None
    for use in source.uses():
        if use.node.op_type == "DynamicQuantizeLinear":
            return tuple(use.node.outputs)
    names = [f"{source.name}/{what}" for what in ("integers", "scale", "zero_point")]
    node = make("DynamicQuantizeLinear", [source], f"{source.name}/quantize", names)
    maker = source.producer()
    graph = source.graph if maker is None else maker.graph
    assert isinstance(graph, ir.Graph)
    insert_behind(graph, source, node)
    return tuple(node.outputs)
