"""Parallel token heads: one state of every head, each with logits of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dynamo_model import MultiTokenModel
from dynamo_runtime.bundle import Bundle
from dynamo_runtime.parallel import ParallelHeads
from dynamo_runtime.step import Step

from .deviation import TOLD, Values
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
    def draft_vocabulary(self) -> np.ndarray | None:
        """See `Exported`."""
        table = self.drafter.draft_vocabulary
        return None if table is None else table.numpy()

    @property
    def conditions(self) -> Sequence[nn.Module]:
        """See `Exported`."""
        return list(self.drafter.conditions)

    @property
    def layered(self) -> nn.Module:
        """See `Exported`."""
        return self.drafter

    def states(self, input_ids: Tensor, **inputs: Any) -> tuple[Tensor, ...]:
        """See `Exported`."""
        return self.drafter.states(input_ids, **inputs)

    def values(self, input_ids: Tensor, start: int) -> Values:
        """See `Exported`; every head is told the token that really follows, if it is to be told any."""
        first, *further = self.states(input_ids, use_cache=False)
        found = self.head_values(first, start)
        for head, state in enumerate(further, 2):
            before = torch.zeros_like(input_ids)  # at the end of the text, where nothing follows
            before[:, : 1 - head] = input_ids[:, head - 1 :]
            conditioned = self.drafter.condition(head, state[:, start:], before[:, start:])
            found[f"logits_{head}"] = self.drafter.draft_logits(conditioned[0])[:, None].numpy()
            if self.drafter.conditioned:
                found[f"{TOLD}{head}"] = before[0, start:, None, None].numpy()
        return found

    @staticmethod
    def put_out(bundle: Bundle, step: Step, name: str, theirs: Values) -> tuple[np.ndarray, ...]:
        """See `Exported`; of a head with a draft vocabulary its words, in the order of that."""
        head = int(name.partition("_")[2] or 1)
        if head == 1:
            return Exported.put_out(bundle, step, name, theirs)
        told = theirs.get(f"{TOLD}{head}")
        before = None if told is None else told.ravel().tolist()
        ahead = step.ahead()
        logits, (values, ids) = ahead.logits(head - 2, before), ahead.topk(head - 2, before)
        words = None if bundle.drafter is None else bundle.drafter.vocabulary
        if words is not None:
            table = np.array(words)
            places = np.full(bundle.vocab_size, -1)
            places[table] = np.arange(len(table))
            logits, ids = logits[:, table], places[ids]
        return tuple(array[:, None] for array in (logits, values, ids))

    def keep_heads(self, heads: int) -> None:
        """See `Exported`."""
        there = self.drafter.n_heads
        if not 2 <= heads <= there:
            raise ExportError(f"--heads must be 0 (the plain model) or 2 to {there} here, not {heads}")
        self.drafter.heads = self.drafter.heads[: heads - 1]
        self.drafter.conditions = self.drafter.conditions[: heads - 1]
