"""What a pass puts out: read when somebody asks for it, and in the graph's own memory until then.

Behind a pass the processor's caches hold weights, and nothing of Python, numpy and onnxruntime: every function of
theirs that a token takes costs tens of microseconds. So what nobody asks for is neither fetched nor copied.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .binding import Binding
from .errors import BundleError
from .names import GATE, LOGITS, TOPK_IDS, TOPK_LOGITS

_OF_NUMBERS = frozenset({LOGITS, GATE})


class Outputs:
    """Arrays that a pass put out, by name and with the batch axis: of so many rows of logits, and their top-K."""

    def __init__(self, arrays: dict[str, np.ndarray]):
        """Take "logits", "topk_logits" and "topk_ids" [1, rows, …], and whatever else there is."""
        self._arrays = arrays

    def __getitem__(self, name: str) -> np.ndarray:
        """Return one of them; it stays what it is, whatever is run later.

        Raises:
            BundleError: It has rows to choose from that are not numbers, or leave nothing to choose.
        """
        return self._arrays[name]

    @property
    def rows(self) -> int:
        """How many rows of logits there are."""
        return self._arrays[TOPK_IDS].shape[1]

    def best(self) -> list[int]:
        """Return the token of the largest logit of every row; errors as of reading."""
        tokens: list[int] = self[TOPK_IDS][0, :, 0].tolist()
        return tokens

    def largest(self, row: int, most: int) -> tuple[list[float], list[int]]:
        """Return at most so many of the largest logits of a row, descending, and their tokens; errors as of reading.

        Args:
            row: One that there is, not counted from the end.
            most: How many are wanted.
        """
        logits: list[float] = self[TOPK_LOGITS][0, row, :most].tolist()
        ids: list[int] = self[TOPK_IDS][0, row, :most].tolist()
        return logits, ids


class TopK:
    """Memory that a graph writes the largest logits of every row to.

    Attributes:
        rows: How many there are.
        logits: [1, rows, K], descending.
        ids: Of their tokens, [1, rows, K].
    """

    def __init__(self, rows: int, k: int):
        self.rows, self._k = rows, k
        self.logits, self.ids = np.empty((1, rows, k), np.float32), np.empty((1, rows, k), np.int64)
        # The same, and the first of every row, seen without numpy.
        self._logits: Any = self.logits.reshape(-1).data
        self._ids: Any = self.ids.reshape(-1).data
        self._largest, self._first = self._logits[::k], self._ids[::k]

    def is_finite(self) -> bool:
        """Tell whether there is a number in every row: the largest is nan if any is, as onnxruntime's top-k has it."""
        if self.rows == 1:
            return math.isfinite(self._largest[0])
        return all(map(math.isfinite, self._largest.tolist()))

    def best(self) -> list[int]:
        """Return the token of the largest logit of every row."""
        return self._first.tolist()

    def of_row(self, row: int, most: int | None = None) -> tuple[list[float], list[int]]:
        """Return the largest logits of a row, or at most so many of them, and their tokens."""
        begin = row * self._k
        end = begin + (self._k if most is None else min(most, self._k))
        return self._logits[begin:end].tolist(), self._ids[begin:end].tolist()

    def copy(self) -> TopK:
        """Return the same in memory of its own."""
        other = TopK(self.rows, self._k)
        other.logits[:], other.ids[:] = self.logits, self.ids
        return other


class RunOutputs(Outputs):
    """Of the newest run of a graph, or of an earlier one that was told to keep them."""

    def __init__(self, bound: Binding, top: TopK, what: object):
        """Take what was run, where its top-K is, and what the pass is called, as text, where it is complained of."""
        super().__init__({})
        self._bound, self._top, self._what = bound, top, what
        self._fetched: dict[str, Any] | None = None
        self._checked = False

    def __getitem__(self, name: str) -> np.ndarray:
        """See `Outputs`."""
        if name not in self._arrays:
            if name in (TOPK_LOGITS, TOPK_IDS):
                self._copy_top()
            else:
                self._arrays[name] = self._read(name)
        return self._arrays[name]

    @property
    def rows(self) -> int:
        """See `Outputs`."""
        return self._top.rows

    def best(self) -> list[int]:
        """See `Outputs`."""
        self._check_top()
        return self._top.best()

    def largest(self, row: int, most: int) -> tuple[list[float], list[int]]:
        """See `Outputs`."""
        self._check_top()
        return self._top.of_row(row, most)

    def keep(self) -> None:
        """Fetch what a further run would overwrite; the memory of the top-K is no longer written to."""
        self._fetch()

    def _copy_top(self) -> None:
        self._check_top()
        self._arrays[TOPK_LOGITS], self._arrays[TOPK_IDS] = self._top.logits.copy(), self._top.ids.copy()

    def _check_top(self) -> None:
        if not self._checked and not self._top.is_finite():
            raise not_finite(self._what, TOPK_LOGITS)
        self._checked = True

    def _read(self, name: str) -> np.ndarray:
        value: np.ndarray = self._fetch()[name].numpy()  # over the same memory, unless that is a device's
        if name in _OF_NUMBERS and not all_finite(value.max(-1)):  # nan if any of them is
            raise not_finite(self._what, name)
        return value

    def _fetch(self) -> dict[str, Any]:
        """Return what onnxruntime holds, which no later run changes then."""
        if self._fetched is None:
            self._fetched = self._bound.read()
        return self._fetched


def gone() -> None:
    """Be a weak reference to nothing."""


def all_finite(numbers: np.ndarray) -> bool:
    """Tell whether some few numbers are all finite."""
    return all(map(math.isfinite, numbers.ravel().tolist()))


def not_finite(what: object, name: str) -> BundleError:
    """Return the error that a run gave something else than numbers.

    Args:
        what: As text, the run.
        name: Of the output.
    """
    return BundleError(
        f"{what} gave {name} that are not finite numbers: its weights are damaged, or what it computes does not fit "
        "into its precision"
    )
