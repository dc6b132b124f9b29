"""The KV cache in 8 bits, with a scale per channel of every head."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from dynamo_graph.initializers import initializer, replace_node

INT8_MAX = 127


def is_cache(value: ir.Value) -> bool:
    """Whether an input or output of the graph holds keys or values."""
    return value.name is not None and value.name.startswith(("past_key_values.", "present."))


def make_cache(model: ir.Model, dtype: ir.DataType) -> None:
    """Gives the caches among the graph's inputs and outputs another type, which every attention must accept."""
    for value in [*model.graph.inputs, *model.graph.outputs]:
        if is_cache(value):
            value.type = ir.TensorType(dtype)


def quantize_cache(model: ir.Model, ranges: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    """Makes every attention keep its keys and values as int8.

    The scales are the same for every position, so what a row writes and reads does not depend on the other rows of
    its pass.

    Args:
        model: The graph.
        ranges: Largest magnitude of the keys' and of the values' channels, [kv_heads, head_size] each, by layer.
    """
    for node in [node for node in model.graph if node.op_type == "GroupQueryAttention"]:
        past = node.inputs[3]
        assert past is not None and past.name is not None
        layer = int(past.name.split(".")[1])
        inputs = [*node.inputs, *[None] * (12 - len(node.inputs))]
        for name, largest in zip(("key", "value"), ranges[layer], strict=True):
            scale = np.where(largest > 0, largest, 1.0).astype(np.float32)[None, :, None] / INT8_MAX
            inputs.insert(12 if name == "key" else 13, initializer(model, f"cache.{layer}.{name}.scale", scale))
        attributes = dict(node.attributes)
        for name, setting in (("k_quant_type", "PER_CHANNEL"), ("v_quant_type", "PER_CHANNEL")):
            attributes[name] = ir.AttrString(name, setting)
        attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", 8)
        new = ir.Node(
            node.domain, node.op_type, inputs, attributes.values(), num_outputs=len(node.outputs), name=node.name
        )
        replace_node(model, node, new)
    make_cache(model, ir.DataType.INT8)
