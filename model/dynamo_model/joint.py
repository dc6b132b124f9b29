"""Joint heads by CP tensor decomposition (Basharin, Chertkov, Oseledets 2024, arXiv 2410.17765).

Independent heads approximate the joint tensor of the next n tokens by one of rank 1.  Here it has rank r:
`p(x_{t+1}..x_{t+n} | x_{1:t}) = Σ_α w_α(e_t) Π_s p_α^(s)(x_{t+s} | e_t)`, a mixture of r experts.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from .drafter import DrafterModel
from .errors import CheckpointError
from .limits import MAX_HEADS, MAX_RANK
from .output import logits_of
from .parallel import MultiTokenModel


class CPModel(DrafterModel):
    """A base language model with a rank-r joint head over the next n tokens.

    The context embedding e_t is the state of one further decoder layer on the stem output, a token head as
    DynaMo's; the gate and every factor are linear maps of it, and the factors share the base's output embedding.

    Args:
        base: Any transformers causal LM that `MultiTokenModel` takes.
        n_tokens: n, tokens of the joint distribution, 2 to 8; the first is the one the base predicts as well.
        rank: R, components of the mixture, 1 to 32; 1 is independent heads.

    Raises:
        CheckpointError: `n_tokens` or `rank` is out of range, or the base is not supported.
    """

    kind = "cp"
    file = "cp.safetensors"
    command = "cp"
    sizes: ClassVar = ("n_tokens", "rank")

    def __init__(self, base: PreTrainedModel, n_tokens: int, rank: int) -> None:
        super().__init__()
        if not 2 <= n_tokens <= MAX_HEADS:
            raise CheckpointError(f"a joint head is over 2 to {MAX_HEADS} tokens, not {n_tokens}")
        if not 1 <= rank <= MAX_RANK:
            raise CheckpointError(f"the rank of a joint head is 1 to {MAX_RANK}, not {rank}")
        self.multi = MultiTokenModel(base, 2)
        self._n_tokens, self.rank = n_tokens, rank
        hidden = self.multi.output_embedding.weight.shape[1]
        placement: dict[str, Any] = {"dtype": base.dtype, "device": base.device}
        self.gate = nn.Linear(hidden, rank, bias=False, **placement)
        self.factors = nn.Linear(hidden, n_tokens * rank * hidden, bias=False, **placement)
        with torch.no_grad():  # near the identity: every factor starts as the layer's own prediction, none as another
            nn.init.normal_(self.gate.weight, std=0.02)
            nn.init.normal_(self.factors.weight, std=0.02)
            self.factors.weight.view(n_tokens * rank, hidden, hidden).diagonal(dim1=1, dim2=2).add_(1.0)

    @property
    def base(self) -> PreTrainedModel:  # type: ignore[override]  # it is a module of `multi` already
        """The base language model, whose head verifies."""
        return self.multi.base

    @property
    def n_tokens(self) -> int:
        """Tokens of the joint distribution, the first of which the base predicts as well."""
        return self._n_tokens

    def states(self, input_ids: Tensor, **decoder_inputs: Any) -> tuple[Tensor, Tensor]:
        """Run one pass up to the output embedding; arguments of `MultiTokenModel.states`.

        Returns:
            The base's normed state and the context embedding e_t, both [batch, seq, hidden].
        """
        first, context = self.multi.states(input_ids, **decoder_inputs)
        return first, context

    def mixture(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return gate and factors of the joint distribution.

        Args:
            context: e_t [..., hidden].

        Returns:
            Log w_α [..., rank], and the factors' states [..., n_tokens, rank, hidden], of which the base's output
            (`dynamo_model.output`) makes logits of p_α^(s).
        """
        factors = self.factors(context).unflatten(-1, (self.n_tokens, self.rank, -1))
        return F.log_softmax(self.gate(context).float(), dim=-1), factors

    def forward(self, input_ids: Tensor, **decoder_inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Predict the next token and the joint distribution of the next n.

        Returns:
            The base's logits [batch, seq, vocab], log w [batch, seq, rank] and the factors' logits
            [batch, seq, n_tokens, rank, vocab].
        """
        first, context = self.states(input_ids, **decoder_inputs)
        log_w, factors = self.mixture(context)
        return logits_of(self.base, first), log_w, logits_of(self.base, factors)

    def drafter_state_dict(self) -> dict[str, Tensor]:
        """Return what the joint head adds to the base: `layer.*`, `gate.weight` and `factors.weight`."""
        layer = {f"layer.{name}": tensor for name, tensor in self.multi.heads[0].state_dict().items()}
        return layer | {"gate.weight": self.gate.weight, "factors.weight": self.factors.weight}
