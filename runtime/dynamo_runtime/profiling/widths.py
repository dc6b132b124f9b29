"""Do passes over several tokens say on this device what passes over one say?  Verified decoding relies on it.

A bundle is judged when it is made, on the machine that makes it. Kernels of another processor may add in another order,
or be wrong for some numbers of rows, so the device is asked itself: the same text in passes over 1, 2, … tokens behind
the same cache, at as many threads as are measured. A kernel that is wrong for one row and right for several, or the
other way round, shows as a difference.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..decoding import PREFILL_CHUNK
from ..device.records import Widths
from ..session import Session
from ..step import ALL, NONE
from .passes import rounds

WIDEST = 8  # tokens of a pass
STRETCH = 16  # tokens of text that pass in every width before the next ones do
FARTHEST = 1024  # positions before them: getting further takes longer than comparing
_MOST_STRETCHES = 8  # behind one past


def measure_widths(session: Session, text: Sequence[int], pasts: Sequence[int], seconds: float) -> Widths:
    """Compare passes over 2 to `WIDEST` tokens with passes over one.

    Args:
        session: Whose cache is empty then.
        text: Tokens, repeated as often as it takes.
        pasts: Positions before the first passes; `STRETCH` more fit behind each.
        seconds: For all of it; behind every past one stretch is compared, however long that takes.
    """
    cache, compared, changed, difference, largest = session.cache, 0, 0, 0.0, 0.0
    cache.reset()
    for at in range(0, max(pasts), PREFILL_CHUNK):
        session.step(_part(text, at, min(PREFILL_CHUNK, max(pasts) - at)), heads=NONE)
    for past in sorted(pasts, reverse=True):  # longest first: going back is free
        cache.rollback(past)
        room = (session.max_length - past) // STRETCH
        for _ in rounds(seconds / len(pasts), 1, min(room, _MOST_STRETCHES)):
            at = cache.length
            stretch = _part(text, at, STRETCH)
            wide = []
            for width in range(WIDEST, 1, -1):  # one token last: the next stretch continues in that cache
                wide.append(_pass_by(session, stretch, width))
                cache.rollback(at)
            narrow = _pass_by(session, stretch, 1)
            largest = max(largest, _most(narrow))
            for rows in wide:
                sound = np.isfinite(rows).all(-1) & np.isfinite(narrow).all(-1)
                compared += len(rows)
                changed += int((~sound | (rows.argmax(-1) != narrow.argmax(-1))).sum())
                difference = max(difference, _most(rows[sound] - narrow[sound]))
    cache.reset()
    return Widths(WIDEST, sorted(pasts), compared, changed, difference, largest)


def _part(text: Sequence[int], start: int, count: int) -> list[int]:
    """Return tokens of an endlessly repeated text."""
    return [text[at % len(text)] for at in range(start, start + count)]


def _pass_by(session: Session, tokens: Sequence[int], width: int) -> np.ndarray:
    """Return logits [tokens, V] of passes over `width` of them at once, which stay in the cache.

    As when drafting, heads inside the base's graph take part where there are several rows.
    """
    inside = session.bundle.topology.has_head_rows and session.heads is None
    heads = ALL if inside and width > 1 else NONE
    parts = [tokens[at : at + width] for at in range(0, len(tokens), width)]
    return np.concatenate([session.step(part, rows=ALL, heads=heads).logits().copy() for part in parts])


def _most(values: np.ndarray) -> float:
    """Return the largest absolute value of those that are numbers."""
    return float(np.abs(values[np.isfinite(values)]).max(initial=0.0))
