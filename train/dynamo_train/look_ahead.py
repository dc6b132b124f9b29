"""Look-ahead embeddings and their objective (PaSS: Monea, Joulin, Grave 2023, arXiv 2311.13581)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from dynamo_model import LookAheadModel

from .drafter import NewDrafter, Start
from .errors import TrainingError
from .objective import Objective, base_embeddings, label_nll
from .recipe import Recipe
from .spread import summed


@dataclass(frozen=True)
class LookAheadEmbeddings(NewDrafter):
    """Embeddings of look-ahead tokens for a base that stays as it is; `heads_lr` of a recipe is their rate.

    Attributes:
        n_look_ahead: L, 1 to 16.
        anchors: Positions a sequence that are trained on, see `LookAheadCLM`.
    """

    n_look_ahead: int
    anchors: int

    model = LookAheadModel
    title = "Look-ahead embeddings (PaSS)"
    freezes_base = True

    def objective(self, start: Start, recipe: Recipe) -> LookAheadCLM:
        """See `NewDrafter`; a base that attends to fewer tokens than the recipe's sequences is refused."""
        model = LookAheadModel(start.base, n_look_ahead=self.n_look_ahead)
        window = getattr(model.config, "sliding_window", None)
        if window is not None and window < recipe.length:
            raise TrainingError(
                f"the base attends to {window} tokens at a time: look-ahead embeddings need sequences no longer than "
                "that"
            )
        return LookAheadCLM(model, self.anchors, recipe.seed)

    @classmethod
    def card_line(cls, stage: dict[str, Any], run: str, held_out: str) -> str:
        """See `NewDrafter`."""
        return f"{stage['n_look_ahead']}, at {stage['anchors']} positions a sequence; {run}; {held_out}"


class LookAheadCLM(Objective):
    """Cross-entropy of what the base says at its look-ahead tokens: at `[LA]_i` behind x_1 … x_t about x_{t+1+i}.

    Asking at every t would repeat the text as often.  Instead the frozen base runs over the text once, and the
    look-ahead blocks of some anchors t run together in a second pass on its KV cache.  Which anchors is a function
    of `seed` and a sequence's tokens alone: a resumed run sees the same ones, and so does every validation,
    while in training another epoch, which cuts the text elsewhere, sees others.

    Args:
        model: Base and look-ahead embeddings; the base is frozen.
        anchors: Positions a sequence at which the look-ahead tokens are put; all of them if there are fewer.
        seed: Of the choice.
    """

    model: LookAheadModel

    def __init__(self, model: LookAheadModel, anchors: int, seed: int = 0) -> None:
        super().__init__()
        assert [p for p in model.parameters() if p.requires_grad] == [model.embeddings]
        self.model = model
        self.anchors, self.seed = anchors, seed
        # Behind an anchor there is always room for its block, so that no position lies outside the sequence.
        self.extra, self.n_losses = 1, model.n_look_ahead
        self.settings = {"n_look_ahead": model.n_look_ahead, "anchors": anchors}

    def train(self, mode: bool = True) -> LookAheadCLM:
        """Set the mode; the frozen base never drops anything out."""
        super().train(mode)
        self.model.base.eval()
        return self

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the mean negative log-likelihood at every look-ahead token.

        Args:
            tokens: Ids [batch, length + 1]; the last is a label only.

        Returns:
            Losses [n_look_ahead].
        """
        return self.nll(tokens, self.choose_anchors(tokens)).mean((0, 1))

    def nll(self, tokens: Tensor, anchors: Tensor) -> Tensor:
        """Negative log-likelihood of x_{t+1+i} at `[LA]_i` behind every anchor t.

        Args:
            tokens: Ids [batch, length + 1].
            anchors: Positions t [batch, anchors], each below length - n_look_ahead.

        Returns:
            [batch, anchors, n_look_ahead]
        """
        depth = torch.arange(1, self.model.n_look_ahead + 1, device=tokens.device)
        places = anchors[..., None] + depth  # of the look-ahead tokens: [batch, anchors, n_look_ahead]
        labels = tokens.gather(1, places.flatten(1) + 1)
        states = self._states(tokens[:, : tokens.shape[1] - 1 - len(depth)], anchors, places)
        return label_nll(self.model.base, states, labels).float().view(places.shape)

    def choose_anchors(self, tokens: Tensor) -> Tensor:
        """Return ascending positions [batch, anchors], drawn without replacement for every sequence on its own.

        Raises:
            TrainingError: The sequences are too short for a block of look-ahead tokens.
        """
        positions = tokens.shape[1] - 1 - self.model.n_look_ahead
        if positions < 1:
            raise TrainingError(
                f"sequences of {tokens.shape[1] - 1} are too short for {self.model.n_look_ahead} look-ahead tokens"
            )
        rows = []
        for row in tokens.cpu().numpy().astype("<i8"):
            digest = hashlib.sha256(row.tobytes()).digest()
            rng = np.random.default_rng([self.seed, int.from_bytes(digest[:8], "little")])
            rows.append(np.sort(rng.permutation(positions)[: self.anchors]))
        return torch.from_numpy(np.stack(rows)).to(tokens.device)

    def new_parameters(self) -> set[nn.Parameter]:
        """Return the look-ahead embeddings."""
        return {self.model.embeddings}

    def embeddings(self) -> set[nn.Parameter]:
        """Return the look-ahead embeddings, and input and output embedding of the base."""
        return {self.model.embeddings} | base_embeddings(self.model.base)

    def figures(self, batches: Iterable[Tensor]) -> dict[str, float]:
        """PPL_2 … PPL_{L+1} at the anchors, PPL_{1+i} being `[LA]_i`'s, and PPL_2:{L+1} of all of them together."""
        depth = self.model.n_look_ahead
        total, count = torch.zeros(depth, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for tokens in batches:
            nll = self.nll(tokens, self.choose_anchors(tokens))
            total += nll.double().sum((0, 1)).cpu()
            count += nll[..., 0].numel()
        total, count = summed(total, count)
        mean = (total / count).tolist()
        result = {f"ppl_{i}": math.exp(value) for i, value in enumerate(mean, start=2)}
        if depth > 1:
            result[f"ppl_2:{depth + 1}"] = math.exp(sum(mean) / depth)
        return result

    def _states(self, text: Tensor, anchors: Tensor, places: Tensor) -> Tensor:
        """Return normed states [batch, anchors * n_look_ahead, hidden] at the look-ahead tokens.

        Args:
            text: Ids [batch, text].
            anchors: [batch, anchors].
            places: Position ids of the look-ahead tokens [batch, anchors, n_look_ahead].
        """
        decoder: Any = self.model.base.base_model
        cache = DynamicCache()
        with torch.no_grad():
            decoder(input_ids=text, past_key_values=cache, use_cache=True)
        batch, n_anchors, depth = places.shape
        row = torch.arange(n_anchors * depth, device=text.device)
        own, order = row // depth, row % depth  # the block a look-ahead token belongs to, and its place in it
        sees_block = (own[:, None] == own) & (order[:, None] >= order)  # [rows, rows]
        sees_text = torch.arange(text.shape[1], device=text.device) <= anchors[:, own, None]  # [batch, rows, text]
        sees = torch.cat([sees_text, sees_block.expand(batch, -1, -1)], dim=-1)[:, None]
        # Added to the scores, which every attention implementation understands.
        mask = torch.zeros_like(sees, dtype=self.model.embeddings.dtype).masked_fill_(~sees, -math.inf)
        return decoder(
            inputs_embeds=self.model.embeddings.repeat(batch, n_anchors, 1),
            attention_mask=mask,
            position_ids=places.flatten(1),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
