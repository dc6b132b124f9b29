"""What the drafter's graph says behind some positions, as whoever drafts reads it: see `step.Ahead`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .outputs import TopK

if TYPE_CHECKING:
    from .heads import Heads


class HeadsAhead:
    """What the heads say behind some positions: see `step.Ahead`.

    Attributes:
        positions: Those that were asked about.
        taken: The pass that they are of, if that matters.
        run: The run of the graph whose full rows are still in memory, if it was the last one.
    """

    def __init__(self, heads: Heads, positions: Sequence[int], taken: int | None, outputs: dict[str, np.ndarray]):
        """Take what was asked, and what else was put out by name, [rows, width]."""
        self.positions, self.taken, self.run = positions, taken, heads.runs
        self._heads, self._outputs = heads, outputs

    @property
    def rows(self) -> int:
        """See `Ahead`."""
        return len(self.positions)

    def keep(self) -> None:
        """Copy what the layers' next run would overwrite."""

    def output(self, name: str) -> np.ndarray:
        """See `Ahead`."""
        return self._outputs[name]

    def _whole(self, rows: np.ndarray) -> np.ndarray:
        """Return rows over the vocabulary [rows, vocab] of such over the draft vocabulary."""
        words = self._heads.words
        if words is None:
            return rows.copy()
        whole = np.full((len(rows), self._heads.bundle.vocab_size), -np.inf, rows.dtype)
        whole[:, words] = rows
        return whole


class AllAhead(HeadsAhead):
    """Of heads that all speak at once."""

    def __init__(
        self,
        heads: Heads,
        positions: Sequence[int],
        taken: int | None,
        outputs: dict[str, np.ndarray],
        top: TopK,
    ):
        """Take the largest logits besides, [rows · parts, K]; they are told of before they change."""
        super().__init__(heads, positions, taken, outputs)
        self._top, self._parts = top, top.rows // len(positions)

    def keep(self) -> None:
        """See `HeadsAhead`."""
        self._top = self._top.copy()

    def topk(self, part: int, before: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """See `Ahead`."""
        return self._top.logits[0, part :: self._parts].copy(), self._top.ids[0, part :: self._parts].copy()

    def largest(self, part: int, before: Sequence[int] | None = None) -> tuple[list[float], list[int]]:
        """See `Ahead`."""
        return self._top.of_row(part)

    def logits(self, part: int, before: Sequence[int] | None = None) -> np.ndarray:
        """See `Ahead`; of a word outside the draft vocabulary it is -inf."""
        return self._whole(self._heads.again(self)[:, part])


class ToldAhead(HeadsAhead):
    """Of heads that are told the token in front of what they predict: worked out when it is named."""

    def __init__(
        self,
        heads: Heads,
        positions: Sequence[int],
        taken: int | None,
        outputs: dict[str, np.ndarray],
        states: np.ndarray,
    ):
        """Take what drafts read besides, [rows, parts, width]; they are told of before it changes."""
        super().__init__(heads, positions, taken, outputs)
        self._states = states

    def keep(self) -> None:
        """See `HeadsAhead`."""
        self._states = self._states.copy()

    def topk(self, part: int, before: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """See `Ahead`."""
        top = self._draft(part, before)
        return top.logits[0].copy(), top.ids[0].copy()

    def largest(self, part: int, before: Sequence[int] | None = None) -> tuple[list[float], list[int]]:
        """See `Ahead`."""
        return self._draft(part, before).of_row(0)

    def logits(self, part: int, before: Sequence[int] | None = None) -> np.ndarray:
        """See `Ahead`; of a word outside the draft vocabulary it is -inf."""
        self._draft(part, before)
        return self._whole(self._heads.drafted)

    def _draft(self, part: int, before: Sequence[int] | None) -> TopK:
        return self._heads.draft(self._states[:, part], part, before)
