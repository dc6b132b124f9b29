"""How fast memory is read, and how close passes come to that."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ..bundle import Bundle
from ..device.records import Floor, Pass
from ..session import Session
from .passes import rounds


def read_bandwidth(threads: int, seconds: float, read_bytes: int) -> float:
    """Return bytes a second that so many threads read from memory at once: the best of several tries.

    Args:
        threads: That read.
        seconds: For all of it; there are at least three tries.
        read_bytes: By all threads in one try; should be more than any cache holds.
    """
    size = read_bytes // 4
    parts = [np.ones(size // threads, np.float32) for _ in range(threads)]
    best = math.inf
    with ThreadPoolExecutor(threads) as pool:
        for _ in rounds(seconds, 3):
            started = time.perf_counter()
            list(pool.map(np.max, parts))  # one pass over the memory, in the kernel that numpy vectorises best
            best = min(best, time.perf_counter() - started)
    return sum(part.nbytes for part in parts) / best


def roofline(bundle: Bundle, session: Session, passes: Sequence[Pass], bandwidth: float) -> list[Floor]:
    """Return how close plain passes come to the time that reading weights and cache must take."""
    if bundle.pass_bytes is None:
        return []
    layers = bundle.base_layers
    position = 2 * layers * bundle.kv_heads * bundle.head_size * session.cache.dtype.itemsize
    floors = []
    for each in passes:
        if each.rows == 1 and not each.heads:
            size = int(bundle.pass_bytes.plain + position * each.past)
            floors.append(Floor(each.past, size, size / bandwidth * 1e3, each.inside))
    return floors
