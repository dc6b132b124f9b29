"""What training optimises: the interface all objectives share, and cross-entropy of heads that each predict a token."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import LinearCrossEntropyOptions
from transformers import PreTrainedModel


class Objective(nn.Module):
    """A model together with the losses it is trained by; what the loop, the optimizers and the card know of it.

    Attributes:
        model: what is trained.
        extra: tokens of a sequence behind its last position, which are labels only.
        n_losses: how many losses :meth:`forward` returns; their sum is optimised.
        settings: what decides the result besides the recipe; a checkpoint of other settings is not resumed.
    """

    model: nn.Module
    extra: int
    n_losses: int
    settings: dict[str, Any]

    @abstractmethod
    def forward(self, tokens: Tensor) -> Tensor:
        """Losses [n_losses] of token ids [batch, length + extra]."""

    @abstractmethod
    def new_parameters(self) -> set[nn.Parameter]:
        """What did not come with the base and takes the heads' learning rate."""

    @abstractmethod
    def embeddings(self) -> set[nn.Parameter]:
        """Tables of vectors rather than matrices: AdamW without decay, whatever the optimizer."""

    @abstractmethod
    def figures(self, batches: Iterable[Tensor]) -> dict[str, float]:
        """Held-out figures of batches as :meth:`forward` takes them; called without gradient."""

    def validate(self, batches: Iterable[NDArray[np.int64]]) -> dict[str, float]:
        """Measure on held-out text.

        Args:
            batches: token ids [batch, length + extra] each.

        Returns:
            Figures by name; early stopping looks at the last one, and lower is better.
        """
        device = next(self.parameters()).device
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                return self.figures(torch.from_numpy(tokens).to(device) for tokens in batches)
        finally:
            self.train(training)


class HeadsCLM(Objective):
    """Cross-entropy of every head against the labels shifted to its depth; L_T1 + L_T2 + … (DynaMo, Eq. 1).

    Attributes:
        n_heads: heads of the model, its first predicting the next token.
        freeze_base: train the further heads alone.
    """

    n_heads: int
    freeze_base: bool

    @abstractmethod
    def states(self, input_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Every head's normed state [batch, seq, hidden], and the output embedding [vocab, hidden] for it."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Mean negative log-likelihood of every head that is trained, else 0.

        Args:
            tokens: ids [batch, length + n_heads]; the last n_heads are labels only.

        Returns:
            Losses [n_heads].
        """
        length = tokens.shape[1] - self.n_heads
        losses = []
        for depth, (state, weight) in enumerate(self.states(tokens[:, :length]), start=1):
            if depth == 1 and self.freeze_base:
                losses.append(state.new_zeros(()))
                continue
            labels = tokens[:, depth : depth + length].reshape(-1)
            # Chunked: the logits [batch * length, vocab] never exist at once.
            losses.append(
                F.linear_cross_entropy(state.flatten(0, 1), weight, labels, options=LinearCrossEntropyOptions())
            )
        return torch.stack([loss.float() for loss in losses])

    @torch.no_grad()
    def token_log_likelihoods(self, tokens: Tensor) -> Tensor:
        """Log p of every head's label: [n_heads, batch, length], for ``tokens`` as in :meth:`forward`."""
        length = tokens.shape[1] - self.n_heads
        result = []
        for depth, (state, weight) in enumerate(self.states(tokens[:, :length]), start=1):
            log_p = F.linear(state, weight).float().log_softmax(-1)
            result.append(log_p.gather(-1, tokens[:, depth : depth + length, None])[..., 0])
        return torch.stack(result)

    def figures(self, batches: Iterable[Tensor]) -> dict[str, float]:
        """PPL_1 … PPL_n and the joint PPL_1:2 … PPL_1:n (DynaMo, "Evaluation").

        ``PPL_n = exp(-(1/T) Σ log p(x_{t+n} | x_{1:t}))``, and with independent heads
        ``PPL_1:n = exp(-(1/(nT)) Σ_t Σ_i log p(x_{t+i} | x_{1:t}))``.
        """
        total, count = torch.zeros(self.n_heads, dtype=torch.float64), 0
        for tokens in batches:
            log_likelihoods = self.token_log_likelihoods(tokens)
            total += log_likelihoods.double().sum((1, 2)).cpu()
            count += log_likelihoods[0].numel()
        nll = (-total / count).tolist()
        result = {f"ppl_{i + 1}": math.exp(value) for i, value in enumerate(nll)}
        for n in range(2, self.n_heads + 1):
            result[f"ppl_1:{n}"] = math.exp(sum(nll[:n]) / n)
        return result


class NextTokenCLM(HeadsCLM):
    """Cross-entropy of a plain causal language model, which is one head.

    Args:
        model: any transformers causal LM.
    """

    model: PreTrainedModel

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.n_heads = self.extra = self.n_losses = 1
        self.freeze_base = False
        self.settings = {}

    def states(self, input_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """See :class:`HeadsCLM`."""
        decoder: Any = self.model.base_model
        state = decoder(input_ids=input_ids, use_cache=False).last_hidden_state
        return [(state, self.model.get_output_embeddings().weight)]

    def new_parameters(self) -> set[nn.Parameter]:
        """None."""
        return set()

    def embeddings(self) -> set[nn.Parameter]:
        """Input and output embedding."""
        return base_embeddings(self.model)


def base_embeddings(base: Any) -> set[nn.Parameter]:
    """Input and output embedding of a base; one and the same if they are tied."""
    return {base.get_input_embeddings().weight, base.get_output_embeddings().weight}
