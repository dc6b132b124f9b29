"""Look-ahead embeddings (PaSS: Monea, Joulin, Grave 2023, arXiv 2311.13581)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .drafter import DrafterModel
from .errors import CheckpointError
from .limits import MAX_LOOK_AHEAD


class LookAheadModel(DrafterModel):
    """A frozen base language model with L trainable look-ahead embeddings.

    Fed behind a text, `[LA]_1 … [LA]_L` make the base predict further tokens in the same pass: its output at
    `[LA]_i` is about the token i places after the next one.  Nothing but the L embeddings is trained.

    Args:
        base: Any transformers causal LM; its parameters are frozen.
        n_look_ahead: L, 1 to 16.

    Raises:
        CheckpointError: L is out of range, or the base's input embedding does more than look a row up, or has other
            rows than the vocabulary.
    """

    kind = "lookahead"
    file = "lookahead.safetensors"
    command = "lookahead"
    sizes: ClassVar = ("n_look_ahead",)
    on_stem: ClassVar = False

    def __init__(self, base: PreTrainedModel, n_look_ahead: int) -> None:
        super().__init__()
        if not 1 <= n_look_ahead <= MAX_LOOK_AHEAD:
            raise CheckpointError(f"there are 1 to {MAX_LOOK_AHEAD} look-ahead embeddings, not {n_look_ahead}")
        self.base = base.requires_grad_(False)
        self._check_table()
        table = self.vocabulary().detach()
        # The mean of the vocabulary with a little noise: in the range that the base knows, and no two alike.
        start = table.float().mean(0).repeat(n_look_ahead, 1)
        start += 0.1 * table.float().std() * torch.randn(start.shape, device=start.device)
        self.embeddings = nn.Parameter(start.to(table.dtype))

    @property
    def n_look_ahead(self) -> int:
        """L."""
        return self.embeddings.shape[0]

    @property
    def n_tokens(self) -> int:
        """One more than look-ahead tokens."""
        return 1 + self.n_look_ahead

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        """Return logits [batch, seq, vocab].

        Ids from the vocabulary's end on, V … V + L - 1, are the look-ahead tokens.
        """
        return self.base(inputs_embeds=self.embed(input_ids), **inputs).logits

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return the input embeddings [batch, seq, hidden] of tokens and look-ahead tokens."""
        return nn.functional.embedding(input_ids, self.table())

    def table(self) -> Tensor:
        """Return the extended input embedding [V + L, hidden]: the base's, then the look-ahead embeddings."""
        return torch.cat([self.vocabulary(), self.embeddings])

    def vocabulary(self) -> Tensor:
        """Return the base's input embedding [V, hidden]."""
        embedding: Any = self.base.get_input_embeddings()
        return embedding.weight

    def _check_table(self) -> None:
        own: Any = self.base.get_input_embeddings()
        outputs: Any = self.base.get_output_embeddings()
        rows, words, name = len(own.weight), len(outputs.weight), type(self.base).__name__
        if rows != words:
            raise CheckpointError(
                f"{name} embeds {rows} tokens and predicts {words}: look-ahead tokens would not follow the vocabulary"
            )
        ids = torch.arange(0, rows, max(1, rows // 256), device=own.weight.device)[None]
        with torch.no_grad():
            if not torch.equal(own(ids), nn.functional.embedding(ids, own.weight)):
                raise CheckpointError(
                    f"{name} does more to its input embedding than look it up (scaling): look-ahead embeddings are "
                    "not supported on it"
                )

    def drafter_state_dict(self) -> dict[str, Tensor]:
        """Return what is added to the base: `embeddings` [L, hidden]."""
        return {"embeddings": self.embeddings}
