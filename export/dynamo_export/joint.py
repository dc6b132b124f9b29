"""Joint heads (CP): a second state, of which the end of the graph makes a gate and factors."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor, nn

from dynamo_model import CPModel
from dynamo_model.output import logits_of
from dynamo_runtime.joint import JointHead
from dynamo_runtime.names import GATE
from dynamo_runtime.step import Step
from dynamo_runtime.topology import Topology

from .compare import Values
from .exported import Exported
from .tail import Tail

FACTORS = "factor_logits"


class ExportedJoint(Exported):
    """A base and a joint head."""

    kind = JointHead.kind
    drafter: CPModel

    @property
    def topology(self) -> Topology:
        """See `Exported`."""
        return JointHead(self.drafter.n_tokens, self.drafter.rank)

    @property
    def layered(self) -> nn.Module:
        """See `Exported`."""
        return self.drafter.multi

    def ahead(self, tail: Tail, chosen: list[ir.Value]) -> list[tuple[ir.Value, int]]:
        """Of the context embedding e_t the gate, log w_α, and the states of all factors, n_tokens · rank for a row."""
        gate, factors = (linear.weight.detach().numpy() for linear in (self.drafter.gate, self.drafter.factors))
        context = chosen[1]
        scores = tail.add("MatMul", [context, tail.turned("cp.gate.weight", gate)], ["out_gate"]).outputs[0]
        log_w = tail.add("LogSoftmax", [scores], [GATE], axis=-1).outputs[0]
        weight = tail.turned("cp.factors.weight", factors)
        shape = tail.constant("out_factor_rows", np.array([0, -1, factors.shape[1]], np.int64))
        mapped = tail.add("MatMul", [context, weight], ["out_mapped"]).outputs[0]
        chosen[1] = tail.add("Reshape", [mapped, shape], ["out_factors"]).outputs[0]
        return [(log_w, self.drafter.rank)]

    def states(self, input_ids: Tensor, **inputs: Any) -> tuple[Tensor, ...]:
        """See `Exported`; the second is the context embedding."""
        return self.drafter.states(input_ids, **inputs)

    def values(self, input_ids: Tensor, start: int) -> Values:
        """See `Exported`; besides the base's logits the gate, and the logits of all factors as parts of one output."""
        first, context = self.states(input_ids, use_cache=False)
        log_w, factors = self.drafter.mixture(context[0, start:])
        mixture = {GATE: log_w[:, None].numpy(), FACTORS: logits_of(self.base, factors.flatten(1, 2)).numpy()}
        return self.head_values((first,), start) | mixture

    @staticmethod
    def put_out(topology: Topology, step: Step, name: str) -> tuple[np.ndarray, ...]:
        """See `Exported`."""
        assert isinstance(topology, JointHead)  # the registry's
        if name == GATE:
            return (topology.gate(step)[:, None],)
        if name == FACTORS:
            arrays = (topology.factors(step), *topology.factor_topk(step))
            return tuple(array.reshape(len(array), -1, array.shape[-1]) for array in arrays)
        return Exported.put_out(topology, step, name)
