"""Token heads and their objective, DynaMo's modified CLM (Tuli et al. 2024, Eq. 1)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from dynamo_model import MultiTokenModel
from dynamo_model.parallel import scale_gradient
from dynamo_model.sources import Checkpoint

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

    def objective(self, base: Checkpoint, recipe: Recipe) -> ModifiedCLM:
        """See :class:`NewDrafter`."""
        model = MultiTokenModel.from_base(base, n_heads=self.n_heads)
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

    def states(self, input_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """See :class:`HeadsCLM`; gradients are scaled on the further heads' way."""
        states = self.model.states(input_ids, shared_gradient_scale=self.shared_gradient_scale)
        weight = self.model.output_embedding.weight
        scaled = scale_gradient(weight, self.shared_gradient_scale)
        return [(state, weight if i == 0 else scaled) for i, state in enumerate(states)]

    def new_parameters(self) -> set[nn.Parameter]:
        """The further heads' layers."""
        return set(self.model.heads.parameters())

    def embeddings(self) -> set[nn.Parameter]:
        """Input and output embedding of the base."""
        return base_embeddings(self.model.base)
