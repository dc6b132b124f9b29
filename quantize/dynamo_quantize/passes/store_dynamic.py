"""Weights in int8 by output, and activations in int8 with one scale for a whole tensor, found at run time."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dynamo_graph.initializers import initializer, replace_node

from ..parts import Product

INT8_MAX = 127


def put_dynamic(model: ir.Model, product: Product) -> None:
    """Replaces a product by one of integers.

    The same nodes as onnxruntime's `quantize_dynamic` makes, which onnxruntime fuses into one when it loads the graph;
    but that function holds the model in memory several times over.

    Args:
        model: The graph.
        product: What is replaced; the full weight stays in the graph for others.
    """
    assert product.weight.const_value is not None and product.node.inputs[0] is not None
    weight = product.weight.const_value.numpy()
    weight = weight.T if product.transposed else weight
    scales = np.abs(weight).max(axis=0) / INT8_MAX
    scales[scales == 0] = 1.0
    name, node = f"{product.name}.q8", product.node
    numbers = initializer(model, name, np.ascontiguousarray(np.round(weight / scales).astype(np.int8)))
    by_output = initializer(model, f"{name}.scales", scales.astype(np.float32))
    activations, scale, zero_point = _quantized(model, product.node)
    steps = [
        ir.node("MatMulInteger", [activations, numbers, zero_point], name=f"{node.name}/integer"),
        ir.node("Mul", [scale, by_output], name=f"{node.name}/scales"),
    ]
    steps.append(
        ir.node("Cast", [steps[0].outputs[0]], attributes={"to": ir.DataType.FLOAT.value}, name=f"{node.name}/cast")
    )
    for step in steps:
        step.outputs[0].name = f"{step.name}/output"
        model.graph.insert_before(node, step)
    new = ir.node("Mul", [steps[2].outputs[0], steps[1].outputs[0]], name=node.name)
    replace_node(model, node, new)


def _quantized(model: ir.Model, reader: ir.Node) -> tuple[ir.Value, ...]:
    """What a product reads as integers, with scale and zero point; once for all products that read it."""
    source = reader.inputs[0]
    assert source is not None
    for use in source.uses():
        if use.node.op_type == "DynamicQuantizeLinear":
            return tuple(use.node.outputs)
    node = ir.node("DynamicQuantizeLinear", [source], num_outputs=3, name=f"{source.name}/quantize")
    for value, name in zip(node.outputs, ("integers", "scale", "zero_point"), strict=True):
        value.name = f"{source.name}/{name}"
    producer = source.producer()
    if producer is None:
        model.graph.insert_before(model.graph[0], node)
    else:
        model.graph.insert_after(producer, node)
    return tuple(node.outputs)
