"""How a graph is loaded: with attention untiled, and its memory wished onto huge pages."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynamo_runtime.loading import Ranges, fast_loading, huge_pages, untiled_attention, without
from dynamo_runtime.providers import import_onnxruntime

VARIABLE = "ORT_GQA_DISABLE_FLASH_ATTENTION"
MIB = 1 << 20


def ranges(rng: np.random.Generator) -> Ranges:
    """In order, and without overlaps."""
    bounds = np.unique(rng.integers(0, 40, 2 * rng.integers(0, 6))).tolist()
    return list(zip(bounds[::2], bounds[1::2], strict=False))


def test_ranges_without_others() -> None:
    """What is left covers the addresses that are in one set and not in the other, and nothing twice."""
    rng = np.random.default_rng(0)
    for _ in range(500):
        kept, taken = ranges(rng), ranges(rng)
        left = without(kept, taken)
        expected = {x for a, b in kept for x in range(a, b)} - {x for a, b in taken for x in range(a, b)}
        assert sorted(expected) == [x for a, b in left for x in range(a, b)]


def test_attention_is_untiled_for_sessions_made_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only for those, whatever happens to them; what a user has decided stays."""
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(RuntimeError), fast_loading():
        assert os.environ[VARIABLE] == "1"
        raise RuntimeError
    assert VARIABLE not in os.environ
    monkeypatch.setenv(VARIABLE, "0")
    with untiled_attention():
        assert os.environ[VARIABLE] == "0"
    assert os.environ[VARIABLE] == "0"


def test_onnxruntime_knows_the_variable() -> None:
    """A later version that has done away with it should not go unnoticed."""
    folder = Path(import_onnxruntime().__file__).parent / "capi"
    assert any(VARIABLE.encode() in path.read_bytes() for path in folder.iterdir() if ".so" in path.name)


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_pages_are_wished_for_new_memory_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of what was mapped inside, and nothing else; in pieces that end where a huge page may."""
    asked: list[tuple[int, int, int]] = []

    class Library:
        @staticmethod
        def madvise(*arguments: Any) -> int:
            asked.append(arguments)
            return -1

    old = np.ones(64 * MIB, np.uint8)
    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", lambda name: Library)
        with huge_pages():
            new = np.ones(64 * MIB, np.uint8)
    wished = [(start, start + size) for start, size, advice in asked if advice == 14]
    collapsed = [(start, start + size) for start, size, advice in asked if advice == 25]
    for address in range(new.ctypes.data + MIB, new.ctypes.data + new.nbytes, MIB):  # numpy sets its first page apart
        assert any(start <= address < end for start, end in wished)
        assert any(start <= address < end for start, end in collapsed)
    for start, end in wished:
        assert end <= old.ctypes.data or start >= old.ctypes.data + old.nbytes
    starts = {start for start, _ in wished}
    assert all(start in starts or start % (2 * MIB) == 0 for start, _ in collapsed)
