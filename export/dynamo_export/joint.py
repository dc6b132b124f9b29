"""Joint heads (CP): a second state, of which the end of the graph makes a gate and factors."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor, nn

from dynamo_model import CPModel
from dynamo_model.output import logits_of
from dynamo_runtime.bundle import Bundle
from dynamo_runtime.joint import JointHead
from dynamo_runtime.names import GATE
from dynamo_runtime.step import Step
from dynamo_runtime.topology import Topology

from .deviation import Values
from .drafting import DraftEnd
from .exported import Exported

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

    def ahead(self, end: DraftEnd, chosen: list[ir.Value]) -> tuple[ir.Value, list[tuple[ir.Value, int]]]:
        """Of the context embedding e_t the gate, log w_α, and the states of all factors, n_tokens · rank for a row."""
        gate, factors = (linear.weight.detach().numpy() for linear in (self.drafter.gate, self.drafter.factors))
        (context,) = chosen
        scores = end.add("MatMul", [context, end.turned("cp.gate.weight", gate)], ["out_gate"]).outputs[0]
        log_w = end.add("LogSoftmax", [scores], [GATE], axis=-1).outputs[0]
        mapped = end.add("MatMul", [context, end.turned("cp.factors.weight", factors)], ["out_mapped"]).outputs[0]
        return end.split_rows(mapped, factors.shape[1]), [(log_w, self.drafter.rank)]

    def states(self, input_ids: Tensor, **inputs: Any) -> tuple[Tensor, ...]:
        """See `Exported`; the second is the context embedding."""
        return self.drafter.states(input_ids, **inputs)

    def values(self, input_ids: Tensor, start: int) -> Values:
        """See `Exported`; besides the base's logits the gate, and the logits of all factors as parts of one output."""
        first, context = self.states(input_ids, use_cache=False)
        log_w, factors = self.drafter.mixture(context[0, start:])
        mixture = {GATE: log_w[:, None].numpy(), FACTORS: logits_of(self.base, factors.flatten(1, 2)).numpy()}
        return self.head_values(first, start) | mixture

    @staticmethod
    def put_out(bundle: Bundle, step: Step, name: str, theirs: Values) -> tuple[np.ndarray, ...]:
        """See `Exported`."""
        topology = bundle.topology
        assert isinstance(topology, JointHead)  # the registry's
        if name == GATE:
            return (topology.gate(step.ahead())[:, None],)
        if name == FACTORS:
            ahead = step.ahead()
            arrays = (topology.factors(ahead), *topology.factor_topk(ahead))
            return tuple(array.reshape(len(array), -1, array.shape[-1]) for array in arrays)
        return Exported.put_out(bundle, step, name, theirs)
