"""Weights: stored once, and copied only while they are written."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dynamo_graph.initializers import BIG_BYTES


class WeightStore(dict[str, np.ndarray]):
    """The only holder of a graph's big weights, which are views of torch's memory.

    The graph reads them through here when it is written. `clear` then lets go of them for certain: onnxscript's
    rewrite rules remember the last graph they saw for good.
    """

    def adopt(self, value: ir.Value) -> None:
        """Put the store between an initializer and its array; a small one is simply copied."""
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
