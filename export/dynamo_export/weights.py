"""Weights: stored once, in the layout that the graph multiplies with, and copied only while they are written."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dynamo_graph.initializers import BIG_BYTES, drop_unused, is_weight, lazily, sizes


class WeightStore(dict[str, np.ndarray]):
    """The only holder of a graph's big weights, which are views of torch's memory.

    The graph reads them through here when it is written. `clear` then lets go of them for certain: onnxscript's
    rewrite rules remember the last graph they saw for good.
    """

    def adopt(self, value: ir.Value) -> None:
        """Puts the store between an initializer and its array; a small one is simply copied."""
        tensor = value.const_value
        assert tensor is not None and value.name is not None
        key, array = value.name, tensor.numpy()
        if array.nbytes <= BIG_BYTES:
            value.const_value = ir.Tensor(array.copy(), name=key)
            return
        self[key] = array
        value.const_value = ir.LazyTensor(
            lambda: ir.Tensor(self[key], name=key), dtype=tensor.dtype, shape=ir.Shape(array.shape), name=key
        )


def transpose_weights(model: ir.Model) -> None:
    """Replaces every Transpose of a weight by the transposed weight.

    A linear layer is traced as x · Transpose(W). Where W is needed as it is too, both layouts are kept.
    """
    graph = model.graph
    for node in list(graph):
        weight = node.inputs[0] if node.inputs else None
        if node.op_type != "Transpose" or not is_weight(weight):
            continue
        assert weight is not None
        perm = tuple(node.attributes["perm"].as_ints())
        shape = tuple(sizes(weight)[axis] for axis in perm)
        name = f"{weight.name}.transposed"
        turned = graph.initializers.get(name)
        if turned is None:
            turned = lazily(name, [weight], lambda array, perm=perm: array.transpose(perm), shape)
            graph.register_initializer(turned)
        node.outputs[0].replace_all_uses_with(turned)
        graph.remove(node, safe=True)
    drop_unused(model)


def shorten_names(model: ir.Model) -> None:
    """Names weights and nodes as the checkpoint does, without the wrappers of the trace around them."""
    for value in list(model.graph.initializers.values()):
        assert value.name is not None
        short = value.name.removeprefix("model.").removeprefix("base.").removesuffix(".qkv").removesuffix(".transposed")
        if short not in model.graph.initializers:  # where both layouts of a weight are in use, they differ in name
            value.name = short
    for node in model.graph:
        node.name = (node.name or "").replace("/model/base/", "/", 1)
