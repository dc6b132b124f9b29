"""The KV cache in 8 bits, with a scale per channel of every head."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from dynamo_graph.initializers import initializer
from dynamo_graph.nodes import replace_node
from dynamo_graph.walk import attentions, is_cache

INT8_MAX = 127
KEY_SCALE = 12  # among the inputs of GroupQueryAttention; that of the values follows


class QuantizeCache(ir.passes.InPlacePass):
    """Makes every attention keep its keys and values as int8.

    The scales are the same for every position, so what a row writes and reads does not depend on the other rows of
    its pass.
    """

    def __init__(self, ranges: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """Take the largest magnitude of the keys' and of the values' channels, [kv_heads, head_size], by layer."""
        super().__init__()
        self.ranges = ranges

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change every attention, and the types of the caches among the graph's inputs and outputs."""
        found = [(layer, node) for layer, node in attentions(model) if "kv_cache_bit_width" not in node.attributes]
        for layer, node in found:
            replace_node(node, self._with_scales(model, layer, node))
        if found:
            for value in filter(is_cache, [*model.graph.inputs, *model.graph.outputs]):
                value.type = ir.TensorType(ir.DataType.INT8)
        return ir.passes.PassResult(model, bool(found))

    def _with_scales(self, model: ir.Model, layer: int, node: ir.Node) -> ir.Node:
        scales = []
        for name, largest in zip(("key", "value"), self.ranges[layer], strict=True):
            scale = np.where(largest > 0, largest, 1.0).astype(np.float32)[None, :, None] / INT8_MAX
            scales.append(initializer(model, f"cache.{layer}.{name}.scale", scale))
        inputs = [*node.inputs, *[None] * (KEY_SCALE - len(node.inputs))]
        inputs[KEY_SCALE:KEY_SCALE] = scales
        attributes = dict(node.attributes)
        for name in ("k_quant_type", "v_quant_type"):
            attributes[name] = ir.AttrString(name, "PER_CHANNEL")
        attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", 8)
        return ir.Node(
            node.domain, node.op_type, inputs, attributes.values(), num_outputs=len(node.outputs), name=node.name
        )
