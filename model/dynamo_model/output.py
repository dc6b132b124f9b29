"""From states to logits: the output embedding, and what a base does to its logits behind it.

Granite divides its logits, Cohere multiplies them, Gemma 2 caps them softly.  A further head shares the base's output
embedding and must go the same way: whatever turns a state into logits, here or in a graph, asks this module how.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Output:
    """What a base does to its logits behind the output embedding: `c · tanh(scale · logits / c)`.

    Attributes:
        scale: Factor on the logits; 1 for none.
        softcap: Soft cap c on the scaled logits; 0 for none, and then they stay as they are.
    """

    scale: float = 1.0
    softcap: float = 0.0

    @classmethod
    def of(cls, base: PreTrainedModel) -> Output:
        """Return what a base's configuration says.

        `dynamo_model.preflight.preflight` holds the base against it.
        """
        config: Any = base.config
        scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1)
        return cls(scale, float(getattr(config, "final_logit_softcapping", None) or 0.0))

    def behind(self, logits: Tensor) -> Tensor:
        """Logits, of what the output embedding says [..., vocab]."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    def __call__(self, states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return logits [..., vocab] of normed states.

        Args:
            states: [..., hidden].
            weight: The output embedding [vocab, hidden].
            bias: Its bias [vocab], if it has one.
        """
        return self.behind(F.linear(states, weight, bias))


def logits_of(base: PreTrainedModel, states: Tensor) -> Tensor:
    """Return what a base says of normed states [..., hidden]: logits [..., vocab]."""
    embedding: Any = base.get_output_embeddings()
    return Output.of(base)(states, embedding.weight, embedding.bias)
