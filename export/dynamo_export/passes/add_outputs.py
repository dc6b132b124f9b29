"""The end of the graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dynamo_model.output import Output

from ..errors import ExportError
from ..tail import Ahead, Tail
from ..weights import WeightStore


class AddOutputs(ir.passes.InPlacePass):
    """Puts the outputs of the contract in the place of the states that a traced graph ends with."""

    def __init__(
        self,
        store: WeightStore,
        n_states: int,
        weight: np.ndarray,
        bias: np.ndarray | None,
        tied: bool,
        output: Output,
        ahead: Ahead,
    ) -> None:
        """Takes what the trace leaves out.

        Args:
            store: The graph's weights; added to.
            n_states: States among its outputs: of every token head, or of the first and of the joint head's layer.
            weight: The output embedding [vocab, hidden].
            bias: Its bias [vocab], or None.
            tied: Whether `weight` is the input embedding too.
            output: What the base does to its logits behind that.
            ahead: What its further states become.
        """
        super().__init__()
        self.store = store
        self.n_states = n_states
        self.weight = weight
        self.bias = bias
        self.tied = tied
        self.output = output
        self.ahead = ahead

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Adds the end to a graph whose first outputs are the states.

        Raises:
            ExportError: The embedding is tied, and the graph looks nothing up in it.
        """
        tail = Tail(model, self.store, self.n_states, self.weight.shape[0])
        embedding = _input_embedding(model) if self.tied else tail.turned("lm_head.weight", self.weight)
        bias = None if self.bias is None else tail.constant("lm_head.bias", self.bias)
        tail.build(embedding, self.tied, bias, self.output, self.ahead)
        return ir.passes.PassResult(model, True)


def _input_embedding(model: ir.Model) -> ir.Value:
    for use in model.graph.inputs[0].uses():
        if use.node.op_type == "Gather" and use.idx == 1 and use.node.inputs[0] is not None:
            return use.node.inputs[0]
    raise ExportError("the tied input embedding is not in the traced graph")
