"""Half precision: weights, activations and cache in 16 bits, everything behind the output embedding in 32."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dynamo_graph.initializers import is_weight, lazily

from ..errors import QuantizeError
from ..parts import Product
from ..schemes import Part
from .quantize_cache import is_cache

HALF = ir.DataType.FLOAT16


def to_half(model: ir.Model, products: list[Product]) -> None:
    """Turns a graph of float32 into one of 16-bit floats whose logits, gate and top-K are float32 still.

    What follows the output embedding, and a joint head's gate, stays in 32 bits: logits that differ must not be rounded
    to a tie before they are ranked. Norms, softmax and rotation compute in 32 bits inside onnxruntime's kernels.

    Args:
        model: The graph; its weights are converted when it is written.
        products: From `find_products`.

    Raises:
        QuantizeError: A weight is too large for 16 bits.
    """
    graph = model.graph
    output = next(product.node for product in products if product.part is Part.OUTPUT)
    gates = [node for node in graph if node.op_type == "LogSoftmax"]
    ends = [output.outputs[0], *(gate.inputs[0] for gate in gates)]  # where 16 bits end
    full = _downstream([use.node for end in ends if end is not None for use in end.uses()])
    stays = {value for node in full for value in node.inputs if is_weight(value)}
    for value in list(graph.initializers.values()):
        if value.dtype == ir.DataType.FLOAT and value not in stays:
            value.const_value = _converted(value)
            value.type = ir.TensorType(HALF)
    values = [value for node in graph if node not in full for value in node.outputs]
    for value in [*values, *(value for value in graph.inputs if is_cache(value))]:
        if value.dtype == ir.DataType.FLOAT:
            value.type = ir.TensorType(HALF)
    for end in ends:
        if end is not None:
            _cast(graph, end)


def _downstream(nodes: list[ir.Node]) -> set[ir.Node]:
    """The nodes and all that depend on them."""
    found = set(nodes)
    todo = list(nodes)
    while todo:
        for value in todo.pop().outputs:
            for use in value.uses():
                if use.node not in found:
                    found.add(use.node)
                    todo.append(use.node)
    return found


def _converted(value: ir.Value) -> ir.TensorProtocol:
    assert value.name is not None and value.const_value is not None
    largest = float(np.abs(value.const_value.numpy()).max(initial=0))
    if largest > float(np.finfo(np.float16).max):
        raise QuantizeError(f"{value.name} holds {largest:.3g}, which is too large for fp16")
    shape = tuple(int(size) for size in value.const_value.shape.numpy())  # a default's, not that of any input
    made = lazily(value.name, [value], lambda array: array.astype(np.float16), shape, HALF)
    assert made.const_value is not None
    return made.const_value


def _cast(graph: ir.Graph, value: ir.Value) -> None:
    """Gives the readers of a value, and the graph's outputs, its float32."""
    producer, readers = value.producer(), list(value.uses())
    assert producer is not None
    node = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT.value}, name=f"{producer.name}/fp32")
    full = node.outputs[0]
    full.type, full.shape = ir.TensorType(ir.DataType.FLOAT), value.shape
    graph.insert_after(producer, node)
    for reader in readers:
        reader.node.replace_input_with(reader.idx, full)
    value.name, full.name = f"{value.name}.half", value.name
    for i, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[i] = full
