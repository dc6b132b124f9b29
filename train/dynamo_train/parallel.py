"""Token heads and their objective, DynaMo's modified CLM (Tuli et al. 2024, Eq. 1)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from dynamo_model import MultiTokenModel

from .drafter import NewDrafter
from .loop import Recipe
from .objective import HeadsCLM, base_embeddings


@dataclass(frozen=True)
class TokenHeads(NewDrafter):
    """Further token heads.

    Attributes:
        n_heads: tokens a pass predicts, 2 to 8.
    """

    n_heads: int

    model = MultiTokenModel
    title = "Heads"

    def objective(self, base: PreTrainedModel, recipe: Recipe) -> ModifiedCLM:
        """See :class:`NewDrafter`."""
        model = MultiTokenModel(base, n_heads=self.n_heads)
        return ModifiedCLM(model, recipe.shared_gradient_scale, recipe.freeze_base)


class ModifiedCLM(HeadsCLM):
    """Cross-entropy of all heads of a multi-token model, the base's own first.

    Args:
        model: base and heads.
        shared_gradient_scale: LR_MB / LR_B, see :meth:`MultiTokenModel.states`.
        freeze_base: train the further heads alone (the paper's "-H"): the base gets no gradient at all.
    """

    model: MultiTokenModel

    def __init__(self, model: MultiTokenModel, shared_gradient_scale: float = 1.0, freeze_base: bool = False) -> None:
        super().__init__()
        self.model = model
        self.shared_gradient_scale = shared_gradient_scale
        self.freeze_base = freeze_base
        self.n_heads = self.extra = self.n_losses = model.n_heads
        self.settings = {}
        if freeze_base:
            model.base.requires_grad_(False)

    @property
    def base(self) -> PreTrainedModel:
        """See :class:`HeadsCLM`."""
        return self.model.base

    def states(self, input_ids: Tensor) -> list[tuple[Tensor, float]]:
        """See :class:`HeadsCLM`; gradients are scaled on the further heads' way."""
        first, *further = self.model.states(input_ids, shared_gradient_scale=self.shared_gradient_scale)
        return [(first, 1.0), *((state, self.shared_gradient_scale) for state in further)]

    def new_parameters(self) -> set[nn.Parameter]:
        """The further heads' layers."""
        return set(self.model.heads.parameters())

    def embeddings(self) -> set[nn.Parameter]:
        """Input and output embedding of the base."""
        return base_embeddings(self.model.base)
