"""Parallel token heads: one state of every head, each with logits of its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dynamo_model import MultiTokenModel
from dynamo_runtime.parallel import ParallelHeads

from .errors import ExportError
from .exported import Exported


class ExportedParallel(Exported):
    """A base and token heads."""

    kind = ParallelHeads.kind
    drafter: MultiTokenModel

    @property
    def topology(self) -> ParallelHeads:
        """See `Exported`."""
        return ParallelHeads(self.drafter.n_heads)

    @property
    def layered(self) -> nn.Module:
        """See `Exported`."""
        return self.drafter

    def states(self, input_ids: Tensor, **inputs: Any) -> tuple[Tensor, ...]:
        """See `Exported`."""
        return self.drafter.states(input_ids, **inputs)

    def keep_heads(self, heads: int) -> None:
        """See `Exported`."""
        there = self.drafter.n_heads
        if not 2 <= heads <= there:
            raise ExportError(f"--heads must be 0 (the plain model) or 2 to {there} here, not {heads}")
        self.drafter.heads = self.drafter.heads[: heads - 1]
