"""The text itself as a drafter: what followed where its last tokens stood before (prompt lookup, REST, SAM decoding).

It needs nothing of a model, and no training. How likely the text goes on as it did is told by how many tokens agree,
and by whether it went on in the same way at the two latest places; both are learnt from every token that becomes final,
whether or not a draft was fed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from .drafting import NO_GUESS, NOTHING, Guesses, Passed, Repeat
from .repeat_rates import RepeatRates
from .repeats import Match, Occurrences, Trail
from .sampling import Candidates, Context


class Lookup:
    """Drafts what followed the longest earlier occurrence of the text's end, in the text or a corpus: see `Drafter`.

    Attributes:
        depth: Most drafts a pass.
        ask: Nothing, as all that it needs is in the text.
    """

    name = "lookup"
    depth, ask = 15, NOTHING

    def __init__(self, corpus: Occurrences | None = None):
        """Begin with no text.

        Args:
            corpus: Earlier texts, which are searched as well.
        """
        self._corpus = corpus
        self._context: Context | None = None
        self._begin([])

    def _begin(self, tokens: Sequence[int]) -> None:
        self._own = Occurrences(tokens)
        self._trails = [(Trail(self._own), RepeatRates())]
        if self._corpus is not None:
            self._trails.append((Trail(self._corpus), RepeatRates()))
        if tokens:
            for trail, _ in self._trails:
                trail.go_on(self._own.tokens)

    def follow(self, passed: Passed) -> None:
        """Take the tokens that have become final, and learn which of them were foreseen.

        If they do not continue the text that was followed before, the whole text is read anew.
        """
        own, context = self._own, passed.context
        tokens = own.tokens
        if context is not self._context or not len(tokens) <= len(context.tokens) + len(passed.final):
            self._context = context
            self._begin([*context.tokens, *passed.final])
            return
        for token in (*context.tokens[len(tokens) :], *passed.final):
            for trail, rates in self._trails:
                if trail.length:
                    rates.add(trail.length, trail.agreement, trail.following == token)
            own.append(token)
            for trail, _ in self._trails:
                trail.go_on(tokens)

    def ahead(self) -> Iterator[Repeat]:
        """Yield what follows the text, one token after the other.

        The place that is most likely to be right is followed, until its text ends.
        """
        best, expected = None, 0.0
        for trail, rates in self._trails:
            if trail.length and (rate := rates.of(trail.length, trail.agreement)) > expected:
                best, expected = (trail, rates), rate
        return iter(()) if best is None else _following(*best, overlapping=best[0] is self.trail)

    def behind(self, chosen: Sequence[int]) -> Repeat | None:
        """Return what follows the text and tokens that have been drafted behind it, if anything does."""
        tokens, found = self._own.tokens, None
        tokens.extend(chosen)
        try:
            for trail, rates in self._trails:
                match = trail.among.longest(tokens)
                token, agreement = _continued(trail.among, match)
                if token >= 0 and (found is None or rates.of(match.length, agreement) > found.expected):
                    found = Repeat(token, rates.of(match.length, agreement))
        finally:
            del tokens[len(tokens) - len(chosen) :]
        return found

    @property
    def trail(self) -> Trail:
        """The longest match in the text itself."""
        return self._trails[0][0]

    @property
    def length(self) -> int:
        """Tokens of the longest match."""
        return max(trail.length for trail, _ in self._trails)

    def guess(self, passed: Passed) -> Guesses:
        """See `Drafter`; every guess is certain, and there are as many as the match is long."""
        self.follow(passed)
        following = [repeat.token for repeat, _ in zip(self.ahead(), range(self.length), strict=False)]

        def candidates(chosen: Sequence[int]) -> Candidates:
            depth = len(chosen) - 1
            if depth >= len(following) or list(chosen[1:]) != following[:depth]:
                return NO_GUESS
            return Candidates(np.array(following[depth : depth + 1]), np.ones(1))

        return candidates


def _continued(among: Occurrences, match: Match) -> tuple[int, int]:
    """Return the token behind a match, -1 if there is none, and whether another place agrees: see `Trail.agreement`."""
    length, place, other = match
    if not length or place + 1 >= len(among.tokens):
        return -1, 0
    token = among.tokens[place + 1]
    return token, 0 if other < 0 else 1 if among.tokens[other + 1] == token else 2


def _following(trail: Trail, rates: RepeatRates, overlapping: bool) -> Iterator[Repeat]:
    """Yield what followed at the place of a trail.

    Args:
        trail: With a match.
        rates: Of such matches.
        overlapping: Whether the text itself is gone through: behind its end stands what is drafted.
    """
    tokens, place, other, length = trail.among.tokens, trail.place + 1, trail.other + 1, trail.length
    drafted: list[int] = []
    end = len(tokens)
    while place < end or overlapping:
        token = tokens[place] if place < end else drafted[place - end]
        if token < 0:  # the end of one of several texts
            return
        agreement = 0
        if other:
            agreement = 1 if (tokens[other] if other < end else drafted[other - end]) == token else 2
        yield Repeat(token, rates.of(length, agreement))
        drafted.append(token)
        place, other, length = place + 1, other + 1 if agreement == 1 else 0, length + 1
