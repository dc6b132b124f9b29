"""Token heads and their objective, DynaMo's modified CLM (Tuli et al. 2024, Eq. 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from dynamo_model import MultiTokenModel

from .cached import CachedHeads
from .cooccurrence import count_ngrams
from .drafter import NewDrafter, Start
from .errors import TrainingError
from .objective import HeadsCLM, Objective, base_embeddings
from .recipe import Recipe
from .states import cache_states


@dataclass(frozen=True)
class TokenHeads(NewDrafter):
    """Further token heads.

    Attributes:
        n_heads: Tokens a pass predicts, 2 to 8.
        draft_vocab: Words that the further heads choose among, the most frequent of the training text; None for what
            they have chosen among before, and all words if they are new.
        condition: Whether they are told the token in front, see `dynamo_model.parallel.Condition`.
        init: Of new heads' layers: `random` (DynaMo) or `copied` from the base's last layer.
        cache: Run the base once over the text, keep what it says on disk, and train on that.
        loss: Of heads that are trained so, see `dynamo_train.cached.CachedHeads`.
        keeps: Start from the heads beside the base, whatever they have of a draft vocabulary and conditions included.
    """

    n_heads: int
    draft_vocab: int | None = None
    condition: bool = False
    init: str = "random"
    cache: bool = False
    loss: str = "ce"
    keeps: bool = False

    model = MultiTokenModel
    title = "Heads"

    @property
    def reads_states(self) -> bool:
        """See `NewDrafter`."""
        return self.cache

    @property
    def reads_ahead(self) -> bool:
        """See `NewDrafter`."""
        return self.cache or self.draft_vocab is not None

    def objective(self, start: Start, recipe: Recipe) -> Objective:
        """See `NewDrafter`."""
        if self.cache and not recipe.freeze_base:
            raise TrainingError("--cache keeps what a base says, which must not change: it goes with --freeze-base")
        if self.loss != "ce" and not self.cache:
            raise TrainingError(f"--loss {self.loss} learns from what the base says: it goes with --cache")
        if self.keeps:
            model = MultiTokenModel.restore(start.base, *MultiTokenModel.read(start.checkpoint))
            if model.n_heads != self.n_heads:
                raise TrainingError(
                    f"'{start.checkpoint.name}' has {model.n_heads} heads: only as many can be kept, not {self.n_heads}"
                )
        else:
            model = MultiTokenModel(start.base, n_heads=self.n_heads)
            if self.init == "copied":
                for layer in model.heads:
                    layer.load_state_dict(model.decoder.layers[-1].state_dict())
        if self.condition and not model.conditioned:
            model.add_conditions()
        if self.draft_vocab is not None:
            vocab_size = len(model.output_embedding.weight)
            if not 1 <= self.draft_vocab <= vocab_size:
                raise TrainingError(f"a draft vocabulary has 1 to {vocab_size} words, not {self.draft_vocab}")
            words = most_frequent(start.streams().train, self.draft_vocab, vocab_size)
            model.draft_vocabulary = words.to(start.base.device)
        if self.cache:
            states = cache_states(start.base, start.streams(), recipe, start.work / "states")
            return CachedHeads(model, *states, self.loss)
        return ModifiedCLM(model, recipe.shared_gradient_scale, recipe.freeze_base)

    @classmethod
    def card_line(cls, stage: dict[str, Any], run: str, held_out: str) -> str:
        """See `NewDrafter`."""
        parts = []
        if words := stage.get("draft_vocabulary"):
            covered = stage["figures"]["coverage"]
            parts.append(f"of the {words:,} most frequent tokens alone ({covered:.1%} of held-out labels)")
        if stage.get("conditioned"):
            parts.append("conditioned on the token in front")
        return "; ".join([*parts, run])


def most_frequent(tokens: NDArray[np.unsignedinteger], words: int, vocab_size: int) -> Tensor:
    """Return a draft vocabulary: ids of the most frequent tokens of a text, of equally frequent ones the smaller first.

    Args:
        tokens: Of the text [tokens].
        words: How many are wanted, at most `vocab_size`.
        vocab_size: How many there are.

    Returns:
        Ids, int64 [words].
    """
    counts = count_ngrams(tokens, 1, vocab_size=vocab_size, end_id=None, min_counts=[1]).unigrams
    return torch.from_numpy(np.argsort(-counts, kind="stable")[:words].astype(np.int64))


class ModifiedCLM(HeadsCLM):
    """Cross-entropy of all heads of a multi-token model, the base's own first.

    Args:
        model: Base and heads.
        shared_gradient_scale: LR_MB / LR_B, see `MultiTokenModel.states`.
        freeze_base: Train the further heads alone (the paper's "-H"): the base gets no gradient at all.
    """

    model: MultiTokenModel

    def __init__(self, model: MultiTokenModel, shared_gradient_scale: float = 1.0, freeze_base: bool = False) -> None:
        super().__init__()
        self.model = model
        self.shared_gradient_scale = shared_gradient_scale
        self.freeze_base = freeze_base
        self.n_heads = self.extra = self.n_losses = model.n_heads
        words = model.draft_vocabulary
        self.settings = {} if words is None else {"draft_vocabulary": len(words)}
        self.settings |= {"conditioned": True} if model.conditioned else {}
        if freeze_base:
            model.base.requires_grad_(False)

    @property
    def base(self) -> PreTrainedModel:
        """See `HeadsCLM`."""
        return self.model.base

    @property
    def draft_vocabulary(self) -> Tensor | None:
        """See `HeadsCLM`."""
        return self.model.draft_vocabulary

    def states(self, tokens: Tensor) -> list[tuple[Tensor, float]]:
        """See `HeadsCLM`; gradients are scaled on the further heads' way."""
        length = tokens.shape[1] - self.n_heads
        scale = self.shared_gradient_scale
        first, *further = self.model.states(tokens[:, :length], shared_gradient_scale=scale)
        result = [(first, 1.0)]
        for head, state in enumerate(further, start=2):  # head i predicts token t + i, and t + i - 1 is in front
            result.append((self.model.condition(head, state, tokens[:, head - 1 : head - 1 + length]), scale))
        return result

    def new_parameters(self) -> set[nn.Parameter]:
        """Return the further heads' layers and conditions."""
        return {*self.model.heads.parameters(), *self.model.conditions.parameters()}

    def embeddings(self) -> set[nn.Parameter]:
        """Return the input and output embedding of the base."""
        return base_embeddings(self.model.base)
