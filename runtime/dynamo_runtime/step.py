"""One forward pass: which rows are wanted of it, and what it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import BundleError
from .names import GATE, LOGITS, TOPK_IDS, TOPK_LOGITS

_OF_NUMBERS = frozenset({LOGITS, TOPK_LOGITS, GATE})


@dataclass(frozen=True)
class Last:
    """The last `count` rows of a pass."""

    count: int = 1

    def of(self, m: int) -> Sequence[int]:
        """Numbers of these rows of a pass over m tokens, counted from its end: -m … -1.

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


class Step:
    """What one forward pass says: logits of the rows that were asked for, of every head.

    The arrays stay what they are whatever is run later. They become arrays when they are read: full rows stay in
    onnxruntime's own memory, so that a sampler which is content with the top-k outputs does not pay for a vocabulary.
    """

    def __init__(
        self,
        values: dict[str, Any],
        *,
        head_rows: int = 0,
        parts: int = 0,
        hidden: int = 0,
        what: str = "a pass",
    ):
        """Take a pass's outputs.

        Args:
            values: Arrays, or what onnxruntime holds, by name and with the batch axis: "logits", "topk_logits" and
                "topk_ids" [1, rows of all heads, …], the first head's first; and what the topology adds.
            head_rows: Rows of every further head.
            parts: See `Topology`: rows behind the first head's for every one of them.
            hidden: Rows of the first head, from the front, that are left out of what is read here.
            what: It is called where it is complained of.
        """
        self._values = values
        self._head_rows, self._parts = head_rows, parts
        self._further = head_rows * parts
        self._hidden = hidden
        self._what = what

    def logits(self, head: int = 1) -> np.ndarray:
        """The full rows of one head, [rows, vocab]."""
        return self._of_head(LOGITS, head)

    def topk(self, head: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """The largest logits of one head and their token ids, both [rows, K], in descending order."""
        return self._of_head(TOPK_LOGITS, head), self._of_head(TOPK_IDS, head)

    def further(self, name: str) -> np.ndarray:
        """Of one output, the rows behind the first head's: `Topology.parts` for each of the head rows, [rows, …]."""
        rows = self.read(name)
        return rows[len(rows) - self._further :]

    def read(self, name: str) -> np.ndarray:
        """One output as the graph gives it, without the batch axis.

        Raises:
            BundleError: It has rows to choose from that are not numbers, or leave nothing to choose.
        """
        value = self._values[name]
        if not isinstance(value, np.ndarray):
            value = value.numpy()  # over the same memory, unless that is a device's
            # The largest is nan if any of them is, and onnxruntime's top-k puts those first.
            if name in _OF_NUMBERS and not np.isfinite(value.max(-1)).all():
                raise BundleError(
                    f"{self._what} gave {name} that are not finite numbers: its weights are damaged, or what it "
                    "computes does not fit into its precision"
                )
            self._values[name] = value
        array: np.ndarray = value[0]
        return array

    def without(self, rows: int) -> Step:
        """The same pass without the first so many rows of the first head."""
        if not rows:
            return self
        return Step(
            self._values, head_rows=self._head_rows, parts=self._parts, hidden=self._hidden + rows, what=self._what
        )

    def _of_head(self, name: str, head: int) -> np.ndarray:
        rows = self.read(name)
        first = len(rows) - self._further
        if head == 1:
            return rows[self._hidden : first]
        begin = first + (head - 2) * self._head_rows
        return rows[begin : begin + self._head_rows]
