"""Where the end of a text stood before: hash chains over pairs and fours of tokens, as deflate finds repeats (LZ77).

Prompt lookup (Saxena 2023) and REST (He et al. 2023, arXiv 2311.08252) ask for the longest earlier occurrence of the
last tokens, SAM decoding (Hu et al. 2024, arXiv 2411.10666) keeps it up to date from token to token. A suffix automaton
of Python objects takes hundreds of bytes a token, so what is kept here are arrays of whole numbers: for every hash the
place it was seen at last, and for every place the one before it with that hash (Ziv, Lempel 1977; RFC 1951, section 4).
While the text goes on as it did at the earlier place, the match is only made longer, as in SAM decoding.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

FULL = 32
"""Tokens of a match that are counted when it is found; it may become longer."""

SHORT, LONG = 2, 4  # tokens that a chain is about
_WALK = 8  # places of a chain that are looked at, the latest ones
_LEAST_SLOTS = 1024
_FIRST, _SECOND, _FOUR = 0x9E3779B1, 0x85EBCA6B, 0x1B873  # of hashes: odd, and sums of products are below 2^63
_BITS = 0x7FFFFFFF


class Match(NamedTuple):
    """The longest earlier occurrence of the end of a text, the latest if there are several.

    Attributes:
        length: Tokens that agree; 0 if fewer than two do.
        place: Where its last token stands; what follows there may follow here.
        other: The same of the next latest of that length; -1 if there is none.
    """

    length: int
    place: int
    other: int


NOWHERE = Match(0, -1, -1)


class Occurrences:
    """Tokens, and where pairs and fours of them end.

    The arrays are Python's, or views of memory, whose items are quick to get one by one; numpy's are not.

    Attributes:
        tokens: All of them, int32; to be read.
    """

    def __init__(self, tokens: Sequence[int] = ()):
        """Take a text to begin with, all at once: an array operation for every column, and not a step for every token.

        Args:
            tokens: Its tokens.
        """
        self.tokens = array("i", tokens)
        self._build()

    @staticmethod
    def of(arrays: Sequence[np.ndarray]) -> Occurrences:
        """Return those of `arrays`, perhaps mapped into memory: nothing can be appended to them."""
        found = Occurrences.__new__(Occurrences)
        views: list[Any] = [each.data for each in arrays]
        found.tokens, found._pairs, found._fours = views[0], (views[1], views[2]), (views[3], views[4])
        found._room = found._slots = len(views[1]) - 1  # a power of two
        return found

    def arrays(self) -> Iterator[np.ndarray]:
        """Yield what `of` takes, int32: tokens [n], and for pairs and fours the latest [slots] and those before [n]."""
        for each in (self.tokens, *self._pairs, *self._fours):
            yield np.array(each, np.int32)

    def append(self, token: int) -> None:
        """Let the text go on."""
        tokens = self.tokens
        end = len(tokens)
        if end >= self._room:
            self._build()
        tokens.append(token)
        (latest, before), (latest_four, before_four), slots = self._pairs, self._fours, self._slots
        earlier = earlier_four = -1
        if end:
            pair = (tokens[end - 1] * _FIRST + token * _SECOND) & _BITS
            slot = (pair ^ pair >> 15) & slots
            earlier, latest[slot] = latest[slot], end
            if end >= 3:
                four = ((tokens[end - 3] * _FIRST + tokens[end - 2] * _SECOND & _BITS) * _FOUR + pair) & _BITS
                slot = (four ^ four >> 15) & slots
                earlier_four, latest_four[slot] = latest_four[slot], end
        before.append(earlier)
        before_four.append(earlier_four)

    def longest(self, text: array[int]) -> Match:
        """Return the longest of the latest places at which the end of a text stood; that end itself is none.

        Args:
            text: Whose last tokens are looked for: `tokens` itself or another one.
        """
        end = len(text) - 1
        if end < 1:
            return NOWHERE
        if text is self.tokens and end < len(self._pairs[1]):  # nothing drafted behind it: its end is in the chains
            return self._longest_before(end)
        pair, found = (text[end - 1] * _FIRST + text[end] * _SECOND) & _BITS, NOWHERE
        if end >= 3:
            four = ((text[end - 3] * _FIRST + text[end - 2] * _SECOND & _BITS) * _FOUR + pair) & _BITS
            latest, before = self._fours
            found = _walked(self.tokens, text, latest[(four ^ four >> 15) & self._slots], before, LONG)
        if not found.length:
            latest, before = self._pairs
            found = _walked(self.tokens, text, latest[(pair ^ pair >> 15) & self._slots], before, SHORT)
        return found

    def _longest_before(self, end: int) -> Match:
        """Return the same of what ends at a place of the text itself."""
        (_, pairs), (_, fours), tokens, found = self._pairs, self._fours, self.tokens, NOWHERE
        if fours[end] >= 0:
            found = _walked(tokens, tokens, fours[end], fours, LONG)
        if not found.length and pairs[end] >= 0:
            found = _walked(tokens, tokens, pairs[end], pairs, SHORT)
        return found

    def _build(self) -> None:
        """Make the chains anew, with room for more tokens."""
        tokens = np.array(self.tokens, np.int64)
        slots = _LEAST_SLOTS
        while slots <= 2 * len(tokens):
            slots *= 2
        self._room, self._slots = slots // 2, slots - 1
        pairs = (tokens[:-1] * _FIRST + tokens[1:] * _SECOND) & _BITS
        self._pairs = _chained(pairs, len(tokens), slots)
        self._fours = _chained((pairs[:-2] * _FOUR + pairs[2:]) & _BITS, len(tokens), slots)


def _chained(hashes: np.ndarray, count: int, slots: int) -> tuple[array[int], array[int]]:
    """Return the latest place of every slot, and the place before every place in its slot; -1 if there is none.

    Args:
        hashes: Of what ends at the last so many places.
        count: Of places.
        slots: A power of two.
    """
    latest, before = np.full(slots, -1, np.int32), np.full(count, -1, np.int32)
    if len(hashes):
        taken, places = (hashes ^ hashes >> 15) & (slots - 1), np.arange(count - len(hashes), count)
        order = np.argsort(taken, kind="stable")
        same = taken[order[1:]] == taken[order[:-1]]
        before[places[order[1:][same]]] = places[order[:-1][same]]
        last = order[np.append(~same, True)]
        latest[taken[last]] = places[last]
    return array("i", latest.tobytes()), array("i", before.tobytes())


def _walked(tokens: array[int], text: array[int], place: int, before: array[int], least: int) -> Match:
    """Return the longest match along a chain, if it has at least so many tokens."""
    end, length, reach, best, other, walk = len(text) - 1, least - 1, least - 1, -1, -1, _WALK
    while place >= 0 and walk:
        walk -= 1
        if place >= reach and tokens[place - reach] == text[end - reach]:  # else it is not as long as the best one
            same = 0
            while same < FULL and same <= place and same <= end and tokens[place - same] == text[end - same]:
                same += 1
            if same > length:
                length, reach, best, other = same, same - 1, place, -1
            elif same == length and best >= 0 and other < 0:
                other = place
                if length == FULL:
                    break
        place = before[place]
    return Match(length, best, other) if best >= 0 else NOWHERE


class Trail:
    """The longest earlier occurrence of a text's end among some tokens, kept up to date from token to token.

    Attributes:
        among: Those tokens.
        length: See `Match`; of a match that went on all of it, however long.
        place: See `Match`.
        other: See `Match`.
    """

    def __init__(self, among: Occurrences):
        """Begin with no match."""
        self.among = among
        self.length, self.place, self.other = NOWHERE

    @property
    def following(self) -> int:
        """The token behind the place; -1 if there is none."""
        tokens, place = self.among.tokens, self.place + 1
        return tokens[place] if place and place < len(tokens) else -1

    @property
    def agreement(self) -> int:
        """Whether another place of that length tells what follows: 0 there is none, 1 the same token, 2 another one."""
        tokens, place, other = self.among.tokens, self.place + 1, self.other + 1
        if not other or place >= len(tokens):
            return 0
        return 1 if tokens[other] == tokens[place] else 2

    def go_on(self, text: array[int]) -> None:
        """Follow a text by one token.

        Args:
            text: With the token; `among.tokens` itself or another one.
        """
        tokens, token = self.among.tokens, text[-1]
        place = self.place + 1
        if self.length and place < len(tokens) and tokens[place] == token:
            self.length, self.place = self.length + 1, place
            other = self.other + 1
            self.other = other if other and tokens[other] == token else -1  # it stands in front of `place`
        else:
            self.length, self.place, self.other = self.among.longest(text)
