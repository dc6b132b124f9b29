"""How often drafts are right: what was known before a text, and what became of them in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..repeat_rates import Expected
from .tuning import DEFAULT, Tuning

AcceptanceCounts = Mapping[tuple[int, int], tuple[int, int]]
"""By depth and bin of confidence: how many drafts were seen, and how many of those were accepted."""


def bin_of(confidence: float, bins: int = DEFAULT.bins) -> int:
    """Return which bin a draft's confidence in [0, 1] falls into."""
    return min(int(confidence * bins), bins - 1)


def middle_of(index: int, bins: int = DEFAULT.bins) -> float:
    """Confidence in the middle of a bin."""
    return (index + 0.5) / bins


@dataclass
class Record:
    """How often drafts of a kind were right; recent drafts weigh more than older ones."""

    tuning: Tuning = DEFAULT
    seen: float = 0.0
    accepted: float = 0.0

    def rate(self, prior: float) -> float:
        """Return the expected acceptance; `prior` is what would be expected if no draft had been seen."""
        weight = self.tuning.prior_weight
        return (prior * weight + self.accepted) / (weight + self.seen)

    def add(self, accepted: bool) -> None:
        """Count a judged draft; older ones fade."""
        self.seen = self.seen * self.tuning.memory + 1
        self.accepted = self.accepted * self.tuning.memory + accepted


class _BinShares:
    """How often drafts at one depth fall into each bin of confidence, among all drafts that were made, fed or not."""

    def __init__(self, known: Sequence[float], tuning: Tuning):
        """Begin with what is known.

        Args:
            known: How many drafts of each bin were seen; if none was, all bins are taken to be equally likely.
            tuning: How fast it is learnt and forgotten.
        """
        self._tuning = tuning
        counts = known if sum(known) else [1.0] * tuning.bins
        self._weights = [tuning.prior_weight * count / sum(counts) for count in counts]

    def add(self, index: int) -> None:
        """Count a draft of a bin; older ones fade."""
        memory = self._tuning.memory
        self._weights = [weight * memory + (i == index) for i, weight in enumerate(self._weights)]

    def shares(self) -> list[float]:
        """Return the share of every bin."""
        whole = sum(self._weights)
        return [weight / whole for weight in self._weights]


class Acceptances:
    """Expected acceptance of a draft, by depth and by the drafter's own confidence in it.

    A drafter's own confidence is seldom calibrated. How far it is off is learnt from what became of its drafts in this
    text, and when the device was profiled. What is learnt of a confidence at one depth counts for the other depths too,
    so that a depth which was never worth trying may become worth it.

    Attributes:
        depth: Most drafts a pass.
        known: Whether drafts were counted before.
    """

    def __init__(self, depth: int, known: AcceptanceCounts | None = None, tuning: Tuning = DEFAULT):
        """Begin with what is known.

        Args:
            depth: Most drafts a pass.
            known: What was counted before.
            tuning: How fast it is learnt and forgotten.
        """
        self.depth = depth
        self._tuning = tuning
        known = known or {}
        self.known = any(seen for seen, _ in known.values())
        bins, depths = range(tuning.bins), range(1, depth + 1)
        self._kinds = {(d, b): Record(tuning) for d in depths for b in bins}
        self._bins = [Record(tuning) for _ in bins]
        self._depths = [Record(tuning) for _ in depths]
        self._of_bins = [
            self._known_rate(middle_of(b, tuning.bins), [n for (_, at), n in known.items() if at == b]) for b in bins
        ]
        self._of_depths = [
            self._known_rate(tuning.accepted, [n for (at, _), n in known.items() if at == d]) for d in depths
        ]

        self._bin_shares = [_BinShares([known.get((d, b), (0, 0))[0] for b in bins], tuning) for d in depths]

    def of(self, depth: int, confidence: float) -> float:
        """Of a draft of this confidence at this depth, given that those before it are right."""
        if isinstance(confidence, Expected):
            return confidence
        return self._rate(depth, bin_of(confidence, self._tuning.bins), self.usual(depth))

    def _rate(self, depth: int, index: int, usual: float) -> float:
        """Of a draft in a bin of confidence, at a depth with a usual acceptance."""
        hoped = self._of_bins[index] + self._tuning.untried * (usual - self._of_bins[index])
        prior = max(self._of_bins[index], hoped)
        return self._kinds[depth, index].rate(self._bins[index].rate(prior))

    def usual(self, depth: int) -> float:
        """Of any draft at this depth, given that those before it are right."""
        return self._depths[depth - 1].rate(self._of_depths[depth - 1])

    def kinds(self, depth: int) -> list[tuple[float, float]]:
        """Return what a draft at this depth may turn out to be.

        That is a share and an expected acceptance for every bin, from the lowest up.
        """
        usual, shares = self.usual(depth), self._bin_shares[depth - 1].shares()
        return [(share, self._rate(depth, index, usual)) for index, share in enumerate(shares)]

    def observe(self, depth: int, confidence: float) -> None:
        """Count a draft whose confidence is known, whether or not it is fed."""
        if isinstance(confidence, Expected):
            return
        self._bin_shares[depth - 1].add(bin_of(confidence, self._tuning.bins))

    def add(self, confidences: Sequence[float], accepted: int) -> None:
        """Count judged drafts: the first `accepted` were right, the next was not, of the others nothing is known."""
        for depth, confidence in enumerate(confidences[: accepted + 1], 1):
            if isinstance(confidence, Expected):
                continue
            index = bin_of(confidence, self._tuning.bins)
            for record in (self._kinds[depth, index], self._bins[index], self._depths[depth - 1]):
                record.add(depth <= accepted)

    def fade(self, share: float) -> None:
        """Forget some of what was seen in this text, so that what was given up on is tried again.

        Args:
            share: Of it that stays.
        """
        for record in (*self._kinds.values(), *self._bins, *self._depths):
            record.seen *= share
            record.accepted *= share

    def _known_rate(self, assumed: float, counts: Sequence[tuple[int, int]]) -> float:
        """Of a kind of drafts, where `assumed` is what one would think without counts of seen and accepted."""
        seen, accepted = (sum(count[i] for count in counts) for i in (0, 1))
        return Record(self._tuning, seen, accepted).rate(assumed)
