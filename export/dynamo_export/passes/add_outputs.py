"""The end of the base's graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dynamo_model.output import Output
from dynamo_runtime.names import INPUT_IDS

from ..errors import ExportError
from ..tail import Tail
from ..weights import WeightStore


class AddOutputs(ir.passes.InPlacePass):
    """Puts the outputs of the contract in the place of the state that a traced graph ends with."""

    def __init__(
        self, store: WeightStore, weight: np.ndarray, bias: np.ndarray | None, tied: bool, output: Output
    ) -> None:
        """Take what the trace leaves out.

        Args:
            store: The graph's weights; added to.
            weight: The output embedding [vocab, hidden].
            bias: Its bias [vocab], or None.
            tied: Whether `weight` is the input embedding too.
            output: What the base does to its logits behind that.
        """
        super().__init__()
        self.store = store
        self.weight = weight
        self.bias = bias
        self.tied = tied
        self.output = output

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Add the end to a graph whose first output is the state.

        Raises:
            ExportError: The embedding is tied, and the graph looks nothing up in it.
        """
        tail = Tail(model, self.store)
        embedding = input_embedding(model) if self.tied else tail.turned(OUTPUT_EMBEDDING, self.weight)
        bias = None if self.bias is None else tail.constant("lm_head.bias", self.bias)
        tail.build(embedding, self.tied, len(self.weight), bias, self.output)
        return ir.passes.PassResult(model, True)


OUTPUT_EMBEDDING = "lm_head.weight"


def input_embedding(model: ir.Model) -> ir.Value:
    """Return the initializer that tokens are looked up in.

    Raises:
        ExportError: There is none.
    """
    ids = next(value for value in model.graph.inputs if value.name == INPUT_IDS)
    for use in ids.uses():
        if use.node.op_type == "Gather" and use.idx == 1 and use.node.inputs[0] is not None:
            return use.node.inputs[0]
    raise ExportError("the input embedding is not in the traced graph")
