"""One forward pass: which rows are wanted of it, and what it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .names import LOGITS, TOPK_IDS, TOPK_LOGITS
from .outputs import Outputs


@dataclass(frozen=True)
class Last:
    """The last `count` rows of a pass."""

    count: int = 1

    def of(self, m: int) -> Sequence[int]:
        """Return numbers of these rows of a pass over m tokens, counted from its end: -m … -1.

        Raises:
            ValueError: The pass does not have so many.
        """
        if not 0 <= self.count <= m:
            raise ValueError(f"the last {self.count} rows of a pass over {m} tokens")
        return range(-self.count, 0)


@dataclass(frozen=True)
class All:
    """Every row of a pass."""

    def of(self, m: int) -> Sequence[int]:
        """See `Last.of`."""
        return range(-m, 0)


@dataclass(frozen=True)
class At:
    """Single rows of a pass, numbered 0 … m - 1, or negative from its end."""

    rows: Sequence[int]

    def of(self, m: int) -> Sequence[int]:
        """See `Last.of`."""
        if not all(-m <= row < m for row in self.rows):
            raise ValueError(f"rows {list(self.rows)} of a pass over {m} tokens")
        return [row if row < 0 else row - m for row in self.rows]


Rows = Last | All | At
"""Which rows of a pass are wanted."""

ALL, LAST, NONE = All(), Last(1), Last(0)


class Ahead(Protocol):
    """What predicts further tokens says behind some rows of a pass: row j of it is about the j-th of them.

    Attributes:
        rows: How many rows it was asked about.
    """

    @property
    def rows(self) -> int:
        """See above."""

    def logits(self, part: int, before: Sequence[int] | None = None) -> np.ndarray:
        """Return the full rows of one part (see `Topology.parts`), [rows, vocab].

        Args:
            part: Its number.
            before: The token in front of what it predicts, one a row; only conditioned heads need it.
        """

    def topk(self, part: int, before: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the largest logits of one part and their token ids, both [rows, K], in descending order."""

    def largest(self, part: int, before: Sequence[int] | None = None) -> tuple[list[float], list[int]]:
        """Return the same of the first row; sooner than by `topk`."""

    def output(self, name: str) -> np.ndarray:
        """Return what else the topology puts out for every row, [rows, width]."""


class Step:
    """What one forward pass says: logits of the rows that were asked for, of every head.

    The arrays stay what they are whatever is run later. They become arrays when they are read, so that a sampler which
    is content with the top-k outputs does not pay for a vocabulary, and greedy decoding for neither.
    Further heads with a graph of their own are computed when they are asked, which has to be before the cache is rolled
    back behind their rows; what they have said stays.
    """

    def __init__(
        self,
        values: Outputs,
        ahead: Callable[[Sequence[int]], Ahead] | None = None,
        *,
        head_rows: int = 0,
        hidden: int = 0,
        behind: int = 0,
    ):
        """Take a pass's outputs.

        Args:
            values: With rows of the first head.
            ahead: Asks the further heads about some of the `head_rows` rows, by their numbers.
            head_rows: Rows that further heads may be asked about.
            hidden: Rows of the first head, from the front, that are left out of what is read here.
            behind: Rows of further heads that stand behind those of the first.
        """
        self._values = values
        self._behind = behind
        self._ahead = ahead
        self._head_rows = head_rows
        self._hidden = hidden
        self._all: Ahead | None = None
        self._top: tuple[np.ndarray, np.ndarray] | None = None

    def logits(self, head: int = 1) -> np.ndarray:
        """Return the full rows of one head, [rows, vocab]; of heads that are not conditioned on the token in front."""
        return self._first(LOGITS) if head == 1 else self.ahead().logits(head - 2)

    def topk(self, head: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Return the largest logits of one head and their token ids, both [rows, K], in descending order.

        See `logits`.
        """
        if head > 1:
            return self.ahead().topk(head - 2)
        if self._top is None:
            self._top = self._first(TOPK_LOGITS), self._first(TOPK_IDS)
        return self._top

    def best(self) -> list[int]:
        """Return the token of the largest logit of every row of the first head; sooner than by `topk`."""
        rows = self._values.best()
        return rows[self._hidden : len(rows) - self._behind]

    def largest(self, row: int, most: int) -> tuple[list[float], list[int]]:
        """Return the largest logits of a row of the first head, descending, and their tokens; sooner than by `topk`.

        Args:
            row: One that there is; counted from the end, if negative.
            most: How many are wanted; there are no more of them than `topk` has.
        """
        first = self._hidden if row >= 0 else self._values.rows - self._behind
        return self._values.largest(first + row, most)

    def ahead(self, row: int | None = None) -> Ahead:
        """Return what further heads say.

        Args:
            row: Of those that were asked for; None for all of them.

        Raises:
            ValueError: None were asked for, or not this one; or the cache was rolled back behind it.
            EngineError: The session is closed.
        """
        count = self._head_rows
        if self._ahead is None or not (count if row is None else -count <= row < count):
            raise ValueError(f"a pass was asked for {count} rows of further heads")
        if row is not None and count > 1:
            return self._ahead([row % count])
        if self._all is None:
            self._all = self._ahead(range(count))
        return self._all

    def read(self, name: str) -> np.ndarray:
        """Return one output as the graph gives it, without the batch axis.

        Raises:
            BundleError: It has rows to choose from that are not numbers, or leave nothing to choose.
        """
        return self._values[name][0]

    def without(self, rows: int) -> Step:
        """Return the same pass without the first so many rows of the first head."""
        if not rows:
            return self
        return Step(
            self._values,
            self._ahead,
            head_rows=self._head_rows,
            hidden=self._hidden + rows,
            behind=self._behind,
        )

    def _first(self, name: str) -> np.ndarray:
        rows = self.read(name)
        return rows[self._hidden : len(rows) - self._behind]


class InsideAhead:
    """Further heads that are in the graph of the base, as formats 2 and 3 have them: computed with the pass itself.

    Their rows stand behind those of the first head.
    """

    def __init__(self, values: Outputs, head_rows: int, parts: int, by_head: bool, chosen: Sequence[int]):
        """Take a pass's outputs.

        Args:
            values: See `Step`, with the rows of further heads.
            head_rows: Of every further head.
            parts: See `Topology`.
            by_head: Whether all rows of a part stand together; else all parts of a row do.
            chosen: Rows it is asked about.
        """
        self._values = values
        self._head_rows, self._parts, self._by_head = head_rows, parts, by_head
        self._chosen = list(chosen)

    @property
    def rows(self) -> int:
        """See `Ahead`."""
        return len(self._chosen)

    def logits(self, part: int, before: Sequence[int] | None = None) -> np.ndarray:
        """See `Ahead`."""
        return self._part(LOGITS, part)

    def topk(self, part: int, before: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """See `Ahead`."""
        return self._part(TOPK_LOGITS, part), self._part(TOPK_IDS, part)

    def largest(self, part: int, before: Sequence[int] | None = None) -> tuple[list[float], list[int]]:
        """See `Ahead`."""
        logits, ids = self.topk(part)
        return logits[0].tolist(), ids[0].tolist()

    def output(self, name: str) -> np.ndarray:
        """See `Ahead`."""
        return self._values[name][0][self._chosen]

    def _part(self, name: str, part: int) -> np.ndarray:
        rows = self._values[name][0]
        count, parts = self._head_rows, self._parts
        first = len(rows) - count * parts
        if self._by_head:
            return rows[first + part * count : first + (part + 1) * count][self._chosen]
        return rows[first + part :: parts][self._chosen]
