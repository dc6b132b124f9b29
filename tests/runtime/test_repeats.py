"""Where the end of a text stood before, against a search through all of it."""

import sys
import tracemalloc
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from dynamo_runtime import repeats
from dynamo_runtime.repeats import FULL, NOWHERE, Match, Occurrences, Trail


def common(text: Sequence[int], end: int, tokens: Sequence[int], place: int) -> int:
    """Tokens that agree up to two places, by counting."""
    same = 0
    while same <= min(end, place) and text[end - same] == tokens[place - same]:
        same += 1
    return same


def searched(text: Sequence[int], tokens: Sequence[int], places: int, most: int = FULL) -> Match:
    """The longest match of a text's end among the first so many places, the latest of that length, and the next."""
    lengths = [min(common(text, len(text) - 1, tokens, place), most) for place in range(places)]
    longest = max(lengths, default=0)
    if longest < 2:
        return NOWHERE
    found = [place for place in range(places) if lengths[place] == longest]
    return Match(longest, found[-1], found[-2] if len(found) > 1 else -1)


def random_text(rng: np.random.Generator, length: int) -> list[int]:
    """Of few tokens, with copies of itself in it."""
    text = rng.integers(rng.integers(1, 6) * 1000, size=length) // 1000
    for _ in range(rng.integers(4)):
        begin, to, size = rng.integers(length, size=3)
        piece = text[begin : begin + size]
        text[to : to + len(piece)] = piece[: length - to]
    return [int(token) * 7919 for token in text]


@pytest.fixture
def whole_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every place of a chain is looked at."""
    monkeypatch.setattr(repeats, "_WALK", 1 << 30)


@pytest.mark.usefixtures("whole_chains")
@pytest.mark.parametrize("seed", range(25))
def test_the_longest_match_is_the_one_a_search_finds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    text = random_text(rng, int(rng.integers(2, 400)))
    begun = int(rng.integers(len(text)))
    found = Occurrences(text[:begun])
    trail, other = Trail(found), Occurrences(random_text(rng, 60))
    for end in range(begun, len(text)):
        found.append(text[end])
        trail.go_on(found.tokens)
        expected = searched(text[: end + 1], text, end)
        assert found.longest(found.tokens) == expected
        assert min(trail.length, FULL) == expected.length  # what goes on is not looked for anew
        if trail.length:
            assert common(text, end, text, trail.place) >= trail.length
        assert other.longest(found.tokens) == searched(text[: end + 1], other.tokens, len(other.tokens))


@pytest.mark.parametrize("seed", range(10))
def test_what_is_found_is_a_match_whichever_places_are_looked_at(seed: int) -> None:
    rng = np.random.default_rng(seed)
    text, found = random_text(rng, 600), Occurrences()
    trail, matched, missed = Trail(found), 0, 0
    for end, token in enumerate(text):
        found.append(token)
        trail.go_on(found.tokens)
        if not trail.length:
            missed += searched(text[: end + 1], text, end) != NOWHERE
            continue
        matched += 1
        assert trail.place < end and common(text, end, text, trail.place) >= trail.length
        if trail.other >= 0:
            assert trail.other < trail.place and common(text, end, text, trail.other) >= min(trail.length, FULL)
            following, other = (text[place + 1] for place in (trail.place, trail.other))
            assert (trail.following, trail.agreement) == (following, 1 if following == other else 2)
    assert matched > 100 and missed < 0.05 * matched  # where others of the same hash came later


def test_a_text_taken_at_once_is_one_taken_token_by_token() -> None:
    text = random_text(np.random.default_rng(3), 1500)
    for length in (0, 1, 2, 3, 4, 5, 511, 512, 513, 1500):
        slowly = Occurrences()
        for token in text[:length]:
            slowly.append(token)
        at_once = Occurrences(text[:length])
        if slowly._slots == at_once._slots:  # else the chains are of other hashes
            for ours, theirs in zip(slowly.arrays(), at_once.arrays(), strict=True):
                assert np.array_equal(ours, theirs)
        for end in range(2, length, 37):
            assert slowly.longest(array("i", text[:end])) == at_once.longest(array("i", text[:end]))


def test_what_is_mapped_from_a_file_is_the_same(tmp_path: Path) -> None:
    text = random_text(np.random.default_rng(4), 900)
    kept, paths = Occurrences(text), []
    for i, each in enumerate(kept.arrays()):
        paths.append(tmp_path / f"{i}.npy")
        np.save(paths[-1], each)
    mapped = Occurrences.of([np.load(path, mmap_mode="r") for path in paths])
    for end in range(2, 900, 11):
        assert mapped.longest(array("i", text[:end])) == kept.longest(array("i", text[:end]))


def test_a_token_takes_less_than_a_hundred_bytes_whatever_is_asked() -> None:
    """All that is kept, where there is most room left, and nothing besides while it is used."""
    text = np.random.default_rng(5).integers(50_000, size=40_000).tolist()
    found = Occurrences()
    for length, token in enumerate(text, 1):
        found.append(token)
        if length >= 1000 and length % 499 == 0:
            arrays = (found.tokens, *found._pairs, *found._fours)
            assert sum(sys.getsizeof(each) for each in arrays) <= 100 * length
    trail = Trail(found)
    tracemalloc.start()
    try:
        for _ in range(2000):
            trail.go_on(found.tokens)
        assert tracemalloc.get_traced_memory()[1] < 10_000
    finally:
        tracemalloc.stop()
