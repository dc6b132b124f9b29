"""Look-ahead embeddings (PaSS: Monea, Joulin, Grave 2023, arXiv 2311.13581)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import checkpoint
from .checkpoint import CheckpointError

MAX_LOOK_AHEAD = 16


class LookAheadModel(nn.Module):
    """A frozen base language model with L trainable look-ahead embeddings.

    Fed behind a text, ``[LA]_1 … [LA]_L`` make the base predict further tokens in the same pass: its output at
    ``[LA]_i`` is about the token i places after the next one.  Nothing but the L embeddings is trained.

    Args:
        base: any transformers causal LM; its parameters are frozen.
        n_look_ahead: L, 1 to 16.

    Raises:
        CheckpointError: L is out of range.
    """

    def __init__(self, base: PreTrainedModel, n_look_ahead: int) -> None:
        super().__init__()
        if not 1 <= n_look_ahead <= MAX_LOOK_AHEAD:
            raise CheckpointError(f"there are 1 to {MAX_LOOK_AHEAD} look-ahead embeddings, not {n_look_ahead}")
        self.base = base.requires_grad_(False)
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
    def config(self) -> Any:
        """The base's configuration."""
        return self.base.config

    def head_parameters(self) -> int:
        """Number of parameters added to the base."""
        return self.embeddings.numel()

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        """Logits [batch, seq, vocab]; ids from the vocabulary's end on, V … V + L - 1, are the look-ahead tokens."""
        return self.base(inputs_embeds=self.embed(input_ids), **inputs).logits

    def embed(self, input_ids: Tensor) -> Tensor:
        """Input embeddings [batch, seq, hidden] of tokens and look-ahead tokens."""
        return nn.functional.embedding(input_ids, self.table())

    def table(self) -> Tensor:
        """The extended input embedding [V + L, hidden]: the base's, then the look-ahead embeddings."""
        return torch.cat([self.vocabulary(), self.embeddings])

    def vocabulary(self) -> Tensor:
        """The base's input embedding [V, hidden]."""
        embedding: Any = self.base.get_input_embeddings()
        return embedding.weight

    def save(self, folder: str | Path) -> None:
        """Write the embeddings as ``lookahead.safetensors`` beside their base, which is written as well."""
        self.base.save_pretrained(folder)
        shape = {"n_look_ahead": self.n_look_ahead}
        checkpoint.save_drafter(Path(folder), "lookahead", {"embeddings": self.embeddings}, **shape)

    @classmethod
    def load(cls, name: str | Path, dtype: torch.dtype = torch.float32) -> LookAheadModel:
        """Load base and look-ahead embeddings from a folder or from the Hub; safetensors only, no remote code.

        Raises:
            CheckpointError: nothing there, no look-ahead embeddings beside the base, or they do not fit it.
        """
        base = checkpoint.load_base(name, dtype)
        tensors, shape = checkpoint.read_drafter(name, "lookahead")
        model = cls(base, shape.get("n_look_ahead", 0))
        checkpoint.fill({"embeddings": model.embeddings}, tensors, "lookahead")
        return model.eval()
