"""Joint heads (CP): a second state, of which the end of the graph makes a gate and factors."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn

from dynamo_model import CPModel
from dynamo_runtime import joint
from dynamo_runtime.step import Step
from dynamo_runtime.topology import Topology

from .compare import Values
from .exported import Exported
from .tail import JointHead

GATE, FACTORS = "gate", "factor_logits"


class ExportedJoint(Exported):
    """A base and a joint head."""

    kind = joint.JointHead.kind
    drafter: CPModel

    @property
    def topology(self) -> Topology:
        """See `Exported`."""
        return joint.JointHead(self.drafter.n_tokens, self.drafter.rank)

    @property
    def layered(self) -> nn.Module:
        """See `Exported`."""
        return self.drafter.multi

    @property
    def joint(self) -> JointHead:
        """See `Exported`."""
        gate, factors = (linear.weight.detach().numpy() for linear in (self.drafter.gate, self.drafter.factors))
        return JointHead(gate, factors, self.drafter.n_tokens)

    def states(self, input_ids: Tensor, **inputs: Any) -> tuple[Tensor, ...]:
        """See `Exported`; the second is the context embedding."""
        return self.drafter.states(input_ids, **inputs)

    def values(self, input_ids: Tensor, start: int) -> Values:
        """See `Exported`; besides the base's logits the gate, and the logits of all factors as parts of one output."""
        first, context = self.states(input_ids, use_cache=False)
        log_w, factors = self.drafter.mixture(context[0, start:])
        embedding = self.base.get_output_embeddings()
        mixture = {GATE: log_w[:, None].numpy(), FACTORS: embedding(factors.flatten(1, 2)).numpy()}
        return self.head_values((first,), start) | mixture

    @staticmethod
    def put_out(topology: Topology, step: Step, name: str) -> tuple[np.ndarray, ...]:
        """See `Exported`."""
        assert isinstance(topology, joint.JointHead)  # the registry's
        if name == GATE:
            return (topology.gate(step)[:, None],)
        if name == FACTORS:
            arrays = (topology.factors(step), *topology.factor_topk(step))
            return tuple(array.reshape(len(array), -1, array.shape[-1]) for array in arrays)
        return Exported.put_out(topology, step, name)
