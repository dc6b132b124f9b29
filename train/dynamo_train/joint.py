"""Joint heads and their objective (CP: Basharin, Chertkov, Oseledets 2024, arXiv 2410.17765)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamo_model import CPModel

from .drafter import NewDrafter, Start
from .objective import Objective, base_embeddings, label_nll
from .recipe import Recipe
from .spread import summed


@dataclass(frozen=True)
class JointHead(NewDrafter):
    """A joint head over the next tokens.

    Attributes:
        n_tokens: Tokens of the joint distribution, 2 to 8.
        rank: Components of the mixture, 1 to 32.
        balance: Weight of the load-balancing loss, see `JointCLM`.
    """

    n_tokens: int
    rank: int
    balance: float

    model = CPModel
    title = "Joint head (CP)"

    def objective(self, start: Start, recipe: Recipe) -> JointCLM:
        """See `NewDrafter`."""
        model = CPModel(start.base, n_tokens=self.n_tokens, rank=self.rank)
        return JointCLM(model, self.balance, recipe.freeze_base, recipe.shared_gradient_scale)

    @classmethod
    def card_line(cls, stage: dict[str, Any], run: str, held_out: str) -> str:
        """See `NewDrafter`."""
        size = f"rank {stage['rank']} over {stage['n_tokens']} tokens, load balance {stage['balance']:g}"
        return f"{size}; {run}; {held_out}, smallest mean gate weight {stage['figures']['gate_min']:.3f}"


class JointCLM(Objective):
    """Joint negative log-likelihood of the next n tokens, with a loss that keeps all components in use.

    `-(1/T) Σ_t log Σ_α exp(log w_α + Σ_s log p_α^(s)(x_{t+s}))`: of the n tokens together, not divided by n, so
    that rank 1 is the sum of n independent heads' cross-entropies, as DynaMo's Eq. 1.

    Args:
        model: Base and joint head.
        balance: Weight of the load-balancing loss (`load_balance`), which is computed a micro-batch.
        freeze_base: Train the joint head alone: stem, final norm and output embedding get no gradient at all.
        shared_gradient_scale: Factor on the gradient from the joint head into weights it shares with the base.
    """

    model: CPModel

    def __init__(
        self, model: CPModel, balance: float, freeze_base: bool = False, shared_gradient_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.model = model
        self.balance = balance
        self.freeze_base = freeze_base
        self.shared_gradient_scale = shared_gradient_scale
        self.extra, self.n_losses = model.n_tokens, 3
        self.settings = {"n_tokens": model.n_tokens, "rank": model.rank, "balance": balance}
        if freeze_base:
            model.base.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the base's loss (0 if it is frozen), the joint loss, and `balance` times the load-balancing loss.

        Args:
            tokens: Ids [batch, length + n_tokens]; the last n_tokens are labels only.

        Returns:
            Losses [3].
        """
        first, log_w, log_p = self._terms(tokens)
        base = first.new_zeros(()) if self.freeze_base else self._first_nll(first, tokens).mean()
        joint = -(log_w + log_p.sum(-2)).logsumexp(-1).mean()
        return torch.stack([base.float(), joint, self.balance * load_balance(log_w.exp().flatten(0, -2))])

    def new_parameters(self) -> set[nn.Parameter]:
        """Return the joint head: its layer, gate and factors."""
        modules = (self.model.multi.heads, self.model.gate, self.model.factors)
        return {parameter for module in modules for parameter in module.parameters()}

    def embeddings(self) -> set[nn.Parameter]:
        """Return the input and output embedding of the base."""
        return base_embeddings(self.model.base)

    def figures(self, batches: Iterable[Tensor]) -> dict[str, float]:
        """PPL_1 of the base's own head, `gate_min`, and the joint PPL_1:2 … PPL_1:n.

        `PPL_1:m = exp(-(1/(mT)) Σ_t log Σ_α w_α Π_{s≤m} p_α^(s)(x_{t+s}))`: the factors behind m sum to 1.
        `gate_min` is the smallest component's mean gate weight: 1/r if all are used alike, 0 if one is dead.
        """
        n = self.model.n_tokens
        first_nll, count = torch.zeros(2, dtype=torch.float64)
        log_joint = torch.zeros(n, dtype=torch.float64)
        gates = torch.zeros(self.model.rank, dtype=torch.float64)
        for tokens in batches:
            first, log_w, log_p = self._terms(tokens)
            prefixes = (log_w[..., None, :] + log_p.cumsum(-2)).logsumexp(-1)  # [batch, length, n_tokens]
            first_nll += self._first_nll(first, tokens).double().sum().cpu()
            log_joint += prefixes.double().sum((0, 1)).cpu()
            gates += log_w.exp().double().sum((0, 1)).cpu()
            count += prefixes[..., 0].numel()
        first_nll, count, log_joint, gates = summed(first_nll, count, log_joint, gates)
        result = {"ppl_1": math.exp(first_nll / count), "gate_min": (gates.min() / count).item()}
        for m, value in enumerate((-log_joint / count).tolist(), start=1):
            if m > 1:
                result[f"ppl_1:{m}"] = math.exp(value / m)
        return result

    def _terms(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the state of the base [batch, length, hidden], log w and log p.

        log w is [batch, length, rank], log p [batch, length, n, rank].
        """
        n, rank = self.model.n_tokens, self.model.rank
        length = tokens.shape[1] - n
        first, context = self.model.states(tokens[:, :length], shared_gradient_scale=self.shared_gradient_scale)
        log_w, factors = self.model.mixture(context)
        labels = tokens[:, 1:].unfold(1, n, 1)[..., None].expand(-1, -1, -1, rank)  # [batch, length, n, rank]
        nll = label_nll(self.model.base, factors, labels, gradient_scale=self.shared_gradient_scale)
        return first, log_w, -nll.float()

    def _first_nll(self, first: Tensor, tokens: Tensor) -> Tensor:
        return label_nll(self.model.base, first, tokens[:, 1 : first.shape[1] + 1])


def load_balance(weights: Tensor) -> Tensor:
    """`r Σ_α f_α P_α` (Switch Transformer, Fedus et al. 2021, Eq. 4): 1 at perfect balance, r if one has all.

    Args:
        weights: Gate weights [positions, rank], each row a distribution.

    Returns:
        The loss; P_α is the mean weight of a component, f_α the share of positions that prefer it, a constant for
        the gradient.
    """
    rank = weights.shape[-1]
    preferred = F.one_hot(weights.argmax(-1), rank).to(weights.dtype).mean(0)
    return rank * (preferred * weights.mean(0)).sum()
