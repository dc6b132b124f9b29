"""How many tokens of a repeat to feed: what the rows of a pass cost against how often such tokens are right.

What the text itself says is known for nothing, so there is nothing to begin and nothing to probe: every pass may be
fed some of it. A repeat is a stretch of passes that are much alike, so the best length is the one with the most tokens
a millisecond, if those are more than are to be had without it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..drafting import Repeat
from ..verification import Draft
from .costs import Costs
from .tuning import DEFAULT, Tuning

_HOPELESS = 0.02  # chance that a draft is right together with all before it, below which no further one can pay


class Chain(NamedTuple):
    """Drafts for a pass.

    Attributes:
        drafts: In order.
        rate: Tokens a millisecond that it is then expected to give.
        gain: Tokens that it is expected to give beyond those that plain decoding would in its time.
    """

    drafts: list[Draft]
    rate: float
    gain: float


NO_CHAIN = Chain([], 0.0, 0.0)


class Copying:
    """Decides, for one text, how much of what it repeats a pass is to be fed.

    It keeps account of what such rows cost and what they gave, in milliseconds of the device's curve. No row is fed
    that could make them a loss of more than `Tuning.vain` of the time, whatever is expected of it. What would have been
    fed is then compared with what is written, which costs nothing: as far as it would have paid, the loss is forgiven.

    Attributes:
        time: Of the passes so far.
        lost: What rows cost and did not give, as far as it counts; below 0 what may be lost again.
        gained: What all rows gave beyond their costs.
    """

    def __init__(self, costs: Costs, depth: int, source: str, tuning: Tuning = DEFAULT):
        """Start with an empty account.

        Args:
            costs: Of the device.
            depth: Most drafts a pass.
            source: Of the drafts.
            tuning: How much may be lost.
        """
        self._costs, self._depth, self._source, self._tuning = costs, depth, source, tuning
        self._drafting = tuning.repeat_share * costs.overhead
        self.time = self.lost = self.gained = 0.0
        self._unfed: list[int] = []  # what would have been fed, had it not been too much to lose
        self._foreseen = 0  # tokens of it that have been written
        self._turn_to(0)

    @property
    def plain(self) -> float:
        """Tokens a millisecond of plain decoding."""
        return 1.0 / self._cost[0]

    @property
    def may_try(self) -> bool:
        """Whether a pass may be fed one row more."""
        return self.affords(self._cost[1] - self._cost[0])

    @property
    def most(self) -> float:
        """Most milliseconds that rows may have lost so far."""
        return self._tuning.vain * max(self.time, self._tuning.vain_passes * self._cost[0])

    def affords(self, rows: float) -> bool:
        """Tell whether so many milliseconds of rows may be lost."""
        return self.lost + rows <= self.most

    def judged(self, drafts: Sequence[Draft], final: Sequence[int]) -> None:
        """Enter what a pass cost and gave into the account.

        Args:
            drafts: It was fed, of whatever source.
            final: What became final: those that stand, and one token more.
        """
        if self._unfed:
            self._compare(final)
        cost, accepted = self._cost, len(final) - 1
        self.time += cost[min(len(drafts), self._depth)]
        for place, draft in enumerate(drafts[: self._depth]):
            if draft.source == self._source:
                gain = cost[0] * (place < accepted) - cost[place + 1] + cost[place]
                self.lost, self.gained = self.lost - gain, self.gained + gain
        self.lost = max(self.lost, -self._tuning.vain_savings * cost[0])

    def chain(self, repeats: Iterator[Repeat], past: int, least: float = 0.0) -> Chain:
        """Return as many drafts as give the most tokens a millisecond; none if none pays.

        Args:
            repeats: What follows.
            past: Positions that the pass will find in the cache.
            least: Chance that a draft is right together with all before it, below which it is not to be fed.
        """
        if past // self._tuning.past_step != self._block:
            self._turn_to(past)
        first = next(repeats, None)
        if first is None:  # most often
            return NO_CHAIN
        cost, drafts, expected = self._cost, list[Draft](), [1.0]
        certain, best, wanted, least = 1.0, self.plain, 0, max(least, _HOPELESS)
        for repeat in itertools.islice(itertools.chain([first], repeats), self._depth):
            certain *= repeat.expected
            if certain < least:
                break
            drafts.append(Draft(repeat.token, None, repeat.expected, self._source))
            expected.append(expected[-1] + certain)
            if expected[-1] > best * cost[len(drafts)]:
                wanted, best = len(drafts), expected[-1] / cost[len(drafts)]
        kept = wanted
        while kept and not self.affords(cost[kept] - cost[0]):
            kept -= 1
        if kept:
            self._unfed = []
        elif wanted and not self._unfed:
            self._unfed, self._foreseen = [draft.token for draft in drafts[:wanted]], 0
        return Chain(drafts[:kept], expected[kept] / cost[kept], expected[kept] - cost[kept] * self.plain)

    def _compare(self, final: Sequence[int]) -> None:
        """Compare what was not fed with what is written, and settle it as if it had been fed when that is known."""
        unfed = self._unfed
        for token in final:
            right = token == unfed[self._foreseen]
            self._foreseen += right
            if not right or self._foreseen == len(unfed):
                gain = self._foreseen * self._cost[0] - self._cost[len(unfed)] + self._cost[0]
                self.lost, self._unfed = min(max(self.lost - gain, 0.0), self.most), []
                return

    def _turn_to(self, past: int) -> None:
        """Look up what passes cost behind about so many positions, with 0, 1, … drafts."""
        self._block = past // self._tuning.past_step
        behind = self._block * self._tuning.past_step
        rows = range(self._depth + 1)
        self._cost = [self._costs.step(1 + d, False, behind) + self._costs.overhead + self._drafting * d for d in rows]
