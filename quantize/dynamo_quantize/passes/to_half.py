"""Half precision: weights, activations and cache in 16 bits, everything behind the output embedding in 32."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dynamo_graph.initializers import is_weight, lazy_tensor
from dynamo_graph.nodes import insert_behind, make, stand_in
from dynamo_graph.walk import downstream, is_cache
from dynamo_runtime.names import DRAFT_STATES, HEAD_STATES, OUTPUTS, PENULTIMATE

from ..errors import QuantizeError
from ..parts import Product

HALF = ir.DataType.FLOAT16
_COMMON = {*OUTPUTS, PENULTIMATE, HEAD_STATES}
_STATES = {PENULTIMATE, DRAFT_STATES}


class ToHalf(ir.passes.InPlacePass):
    """Turns a graph of float32 into one of 16-bit floats whose logits, gate and top-K are float32 still.

    What follows the output embedding, and a joint head's gate, stays in 32 bits: logits that differ must not be rounded
    to a tie before they are ranked. Norms, softmax and rotation compute in 32 bits inside onnxruntime's kernels.
    """

    def __init__(self, output: Product) -> None:
        """Take the product with the output embedding."""
        super().__init__()
        self.output = output

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change all types; the weights are converted when the graph is written.

        Raises:
            QuantizeError: A weight is too large for 16 bits.
        """
        if self.output.weight.dtype == HALF:
            return ir.passes.PassResult(model, False)
        graph = model.graph
        # Where 16 bits end: behind the output embedding, and before whatever is put out besides logits and states.
        makers = [value.producer() for value in graph.outputs if value.name not in _COMMON and not is_cache(value)]
        ends = [value for value in (self.output.node.outputs[0], *(node.inputs[0] for node in makers if node)) if value]
        full = downstream(*ends)
        stays = {value for node in full for value in node.inputs if is_weight(value)}
        for value in [value for inner in model.graphs() for value in inner.initializers.values()]:
            if value.dtype == ir.DataType.FLOAT and value not in stays:
                value.const_value = _converted(value)
                value.type = ir.TensorType(HALF)
        inputs = [value for value in graph.inputs if is_cache(value) or value.name in _STATES]
        values = [value for inner in model.graphs() for node in inner if node not in full for value in node.outputs]
        for value in [*values, *inputs]:
            if value.dtype == ir.DataType.FLOAT:
                value.type = ir.TensorType(HALF)
        for end in ends:
            _cast(graph, end)
        return ir.passes.PassResult(model, True)


def _converted(value: ir.Value) -> ir.TensorProtocol:
    assert value.name is not None and value.const_value is not None
    largest = float(np.abs(value.const_value.numpy()).max(initial=0))
    if largest > float(np.finfo(np.float16).max):
        raise QuantizeError(f"{value.name} holds {largest:.3g}, which is too large for fp16")
    shape = tuple(int(size) for size in value.const_value.shape.numpy())  # a default's, not that of any input
    return lazy_tensor(value.name, [value], lambda array: array.astype(np.float16), shape, HALF)


def _cast(graph: ir.Graph, value: ir.Value) -> None:
    """Give the readers of a value, and the graph's outputs, its float32."""
    producer = value.producer()
    assert producer is not None
    node = make("Cast", [value], f"{producer.name}/fp32", attributes={"to": ir.DataType.FLOAT.value})
    full = node.outputs[0]
    full.type, full.shape = ir.TensorType(ir.DataType.FLOAT), value.shape
    insert_behind(graph, value, node)
    stand_in(graph, value, full, ".half", lambda reader: reader is not node)
