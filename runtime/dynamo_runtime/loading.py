"""How a graph is loaded where onnxruntime's own choices cost time: attention's kernel, and the pages of its memory."""

import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

_UNTILED = "ORT_GQA_DISABLE_FLASH_ATTENTION"
_COLLAPSE, _HUGE = 25, 14  # Linux: MADV_COLLAPSE (6.1 and later) and MADV_HUGEPAGE
_LEAST_BYTES = 16 << 20  # of a mapping: no thread's stack
_PIECE_BYTES = 16 << 20
_SECONDS_WAITED_FOR, _SECONDS_BESIDE = 0.1, 3.0

Ranges = list[tuple[int, int]]

_one_at_a_time = threading.Lock()  # the environment and the mappings belong to the whole process


@contextmanager
def fast_loading() -> Iterator[None]:
    """Yield a session of onnxruntime that is created inside has `untiled_attention` and `huge_pages`."""
    with _one_at_a_time, untiled_attention(), huge_pages():
        yield


@contextmanager
def untiled_attention() -> Iterator[None]:
    """Sessions created inside work out attention in whole rows of scores rather than in tiles ("flash attention").

    onnxruntime's tiles keep running sums in memory that begins where the number of rows puts it.  For most numbers of
    rows that is across the lines of the processor's cache, and costs a fifth to two fifths of attention's time behind
    long texts if the KV cache is in int8 (docs/rows.md).  Untiled, every row's sums begin at a line's start.  Scores
    take heads · rows · capacity · 4 bytes, so a prompt is to be fed in chunks.  The op has no attribute for it; a user
    who has set the variable is asked no questions.
    """
    if _UNTILED in os.environ:
        yield
        return
    os.environ[_UNTILED] = "1"
    try:
        yield
    finally:
        os.environ.pop(_UNTILED, None)


@contextmanager
def huge_pages() -> Iterator[None]:
    """Ask Linux to put the memory that is mapped inside, and stays, on huge pages: weights are read once a pass.

    A pass reads all weights, and with pages of 4 KiB the processor looks up an address for every 64 lines that it
    reads.  It is a wish: kernels that do not know it, or have no such pages left, are asked in vain.  A thread of its
    own goes on with what has not been moved in a tenth of a second, and leaves the rest for the kernel to move later.
    """
    before = _mapped()
    yield
    if sys.platform != "linux":
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    large = [(a, b) for a, b in without(_mapped(), before) if b - a >= _LEAST_BYTES]
    for start, end in large:
        madvise(start, end - start, _HUGE)
    # Pieces end where huge pages may: a page that two of them share would be left as it is.
    bounds = [[a, *range(-(-a // _PIECE_BYTES) * _PIECE_BYTES, b, _PIECE_BYTES), b] for a, b in large]
    pieces = (piece for each in bounds for piece in pairwise(each))

    def collapse(seconds: float) -> None:
        deadline = time.perf_counter() + seconds
        while time.perf_counter() < deadline and (piece := next(pieces, None)):
            madvise(piece[0], piece[1] - piece[0], _COLLAPSE)  # without the interpreter's lock

    collapse(_SECONDS_WAITED_FOR)
    # What is left is moved beside the first passes; memory that is gone by then is no longer this session's to move,
    # and of whatever is mapped there instead no byte changes.
    threading.Thread(target=collapse, args=(_SECONDS_BESIDE,), name="huge pages", daemon=True).start()


def without(ranges: Ranges, taken: Ranges) -> Ranges:
    """Return what is left of ranges of addresses where others are taken out; both in order, and without overlaps."""
    left = []
    for start, end in ranges:
        inside = [(max(a, start), min(b, end)) for a, b in taken if a < end and b > start]
        bounds = [start, *(bound for each in inside for bound in each), end]
        left += [(a, b) for a, b in list(pairwise(bounds))[::2] if a < b]
    return left


def _mapped() -> Ranges:
    """Memory of this process that can be written and belongs to no file; none where the system does not say."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        addresses, rights, _, _, inode, *name = line.split()
        if rights.startswith("rw") and inode == "0" and name in ([], ["[heap]"]):
            start, end = addresses.split("-")
            found.append((int(start, 16), int(end, 16)))
    return found
