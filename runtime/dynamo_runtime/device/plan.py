"""How many tokens to draft: what a pass costs on this device against what its drafts are expected to give.

Decoding maximises tokens per second, the ratio of two long-run averages. With ρ the best rate that can be had, that is
the same as maximising tokens - ρ · time in every single decision (Dinkelbach 1967), so each choice here weighs the
tokens it is expected to give against those that plain decoding, or the drafting so far, would have given meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ..bundle import Bundle
from ..errors import ParameterError
from .profile import Profile

_EXPLORATION = 0.01  # of the time may be spent on finding out whether drafting pays again
_BINS = 5  # of a draft's confidence
_PRIOR_WEIGHT = 3.0  # drafts that must have been judged to count as much as what was known before
_FADE, _FADE_EVERY, _FADE_OF_A_LOOK = 0.9, 16, 0.9  # what stays of the judged drafts of every kind, and how often
_MEMORY = 0.97  # what a judged draft counts for once the next one of its kind is judged
_RECENT = 0.93  # the same for passes, in the average of what drafting gains
_STEADY = 0.99  # the same in the rate that every choice is weighed with
_FIRST_PASSES = 4  # what was known before counts as so many of them
_LONGEST_WAIT = 512  # plain tokens before the next look, however dear a look is
_NEARLY_GREEDY = 0.35  # a temperature below which sampling is more like choosing the most probable token
_PAST_STEP = 64  # positions for which one set of costs serves

# What is assumed of a device nobody has measured: bytes read per millisecond, milliseconds of Python.
_BYTES_PER_MS, _OVERHEAD_MS, _DRAFTING_MS = 15e6, 0.13, 0.14
_ROW_SHARE = {"fp32": 0.14, "fp16": 0.14, "int8": 0.25, "int8-dynamic": 0.25, "int4": 0.35}  # of a pass: one more row
_ACCEPTED = 0.5  # of the drafts


class Costs(Protocol):
    """What things cost on a device, in milliseconds."""

    @property
    def drafting(self) -> float:
        """A draft, outside the pass: proposing and judging it."""

    @property
    def overhead(self) -> float:
        """A plain token, outside the pass."""

    def step(self, rows: int, heads: bool, past: int) -> float:
        """A pass over `rows` tokens behind `past` others, with or without further heads."""

    def resume(self, skipped: int) -> float:
        """What the first pass with heads costs more after `skipped` positions without."""


class Curve:
    """Costs as they were measured, interpolated linearly, and beyond the last measurement continued."""

    def __init__(
        self,
        passes: Mapping[tuple[bool, int], Sequence[tuple[float, float]]],
        resumes: Sequence[tuple[float, float]] = (),
        drafting: float = 0.0,
        overhead: float = 0.0,
    ):
        """Take what was measured.

        Args:
            passes: (heads, past) -> (rows, milliseconds), ascending.
            resumes: (positions skipped, milliseconds), ascending.
            drafting: Milliseconds for every draft, outside the pass.
            overhead: Milliseconds for every plain token, outside the pass.
        """
        self.drafting, self.overhead = drafting, overhead
        self._pasts = {on: sorted((past, points) for (o, past), points in passes.items() if o == on) for on in (0, 1)}
        self._resumes = [(0.0, 0.0), *resumes]
        self._steps: dict[tuple[int, bool, int], float] = {}

    @staticmethod
    def of(profile: Profile) -> Curve:
        """The medians of a profile."""
        passes: dict[tuple[bool, int], list[tuple[float, float]]] = {}
        for each in sorted(profile.passes, key=lambda each: each.rows):
            passes.setdefault((each.heads, each.past), []).append((float(each.rows), each.time.p50))
        for (_, past), points in list(passes.items()):  # a bundle without further heads
            passes.setdefault((True, past), points)
        resumes = sorted((float(each.skipped), each.extra) for each in profile.resume)
        return Curve(passes, resumes, profile.drafting, profile.overhead)

    def step(self, rows: int, heads: bool, past: int) -> float:
        """See `Costs`."""
        found = self._steps.get((rows, heads, past))
        if found is None:
            by_past = [(float(at), _interpolated(points, rows)) for at, points in self._pasts[heads]]
            found = self._steps[rows, heads, past] = _interpolated(by_past, past)
        return found

    def resume(self, skipped: int) -> float:
        """See `Costs`."""
        return max(_interpolated(self._resumes, skipped), 0.0)


class Knowledge(NamedTuple):
    """What is known of a device before a text begins.

    Attributes:
        costs: Of passes.
        drafts: Seen and accepted, by depth and bin of confidence; where a sampled token decides, and where the most
            probable one does.
    """

    costs: Costs
    drafts: Mapping[bool, Mapping[tuple[int, int], tuple[int, int]]]

    def drafts_at(self, temperature: float) -> Mapping[tuple[int, int], tuple[int, int]]:
        """Those that tell most about decoding at a temperature."""
        return self.drafts.get(temperature < _NEARLY_GREEDY, {})

    @staticmethod
    def of(bundle: Bundle, profile: Profile | None) -> Knowledge:
        """From a profile, or else by rules of thumb."""
        if profile is None:
            return Knowledge(Prior.of(bundle), {})
        drafts: dict[bool, dict[tuple[int, int], tuple[int, int]]] = {False: {}, True: {}}
        for each in profile.acceptance:
            drafts[each.greedy][each.depth, bin_of(each.confidence)] = each.seen, each.accepted
        return Knowledge(Curve.of(profile), drafts)


def threshold_for(profile: Profile | None, target: float) -> float:
    """The back-off threshold ε_b at which `dynamo` was so many times as fast as plain decoding, or a little more.

    The larger the threshold, the closer the text is to plain sampling's: this is the largest that is fast enough.

    Args:
        profile: Of the device and bundle.
        target: Tokens a second over those of plain decoding.

    Raises:
        ParameterError: There is no profile with `dynamo` in it, or it was never so fast.
    """
    if not 0 < target < math.inf:
        raise ParameterError(f"a target speed-up must be a finite number greater than 0, not {target}")
    if profile is None or not profile.backoff:
        raise ParameterError(
            "a target speed-up needs a profile of this device and bundle with strategy dynamo in it: run dynamo-profile"
        )
    points = sorted((each.threshold, each.speedup.value) for each in profile.backoff)
    fast = [i for i, (_, speedup) in enumerate(points) if speedup >= target]
    if not fast:
        threshold, speedup = max(points, key=lambda point: point[1])
        raise ParameterError(
            f"dynamo is at most {speedup:.2f} times as fast as plain decoding here (backoff_threshold {threshold:g}), "
            f"not {target:g} times"
        )
    if fast[-1] == len(points) - 1:
        return points[-1][0]
    (near, above), (far, below) = points[fast[-1]], points[fast[-1] + 1]
    return near + (far - near) * (above - target) / (above - below)


def _interpolated(points: Sequence[tuple[float, float]], x: float) -> float:
    """A piecewise linear function through ascending points, continued at both ends; constant through a single one."""
    if len(points) == 1:
        return points[0][1]
    i = next((i for i in range(1, len(points) - 1) if x <= points[i][0]), len(points) - 1)
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


@dataclass(frozen=True)
class Prior:
    """Costs of a device that has not been measured: a pass takes as long as reading its weights usually does.

    Attributes:
        plain: Milliseconds of a pass over one token without heads.
        heads: What further heads add.
        row: What one more row adds.
    """

    plain: float
    heads: float
    row: float
    drafting: float = _DRAFTING_MS
    overhead: float = _OVERHEAD_MS

    @staticmethod
    def of(bundle: Bundle) -> Prior:
        """By the size of the bundle's graph and its precision."""
        size = sum(entry["bytes"] for name, entry in bundle.files.items() if name.startswith(bundle.graph)) or 1 << 20
        further = bundle.n_heads - 1 + (2 if bundle.kind == "cp" else 0)
        share = further / (bundle.kv_layers + 1)
        plain = size * (1 - share) / _BYTES_PER_MS
        return Prior(plain, size * share / _BYTES_PER_MS, plain * _ROW_SHARE.get(bundle.precision, 0.25))

    def step(self, rows: int, heads: bool, past: int) -> float:
        """See `Costs`; the past is taken for short."""
        whole = 1 + heads * self.heads / self.plain
        return whole * (self.plain + (rows - 1) * self.row)

    def resume(self, skipped: int) -> float:
        """See `Costs`: the heads' share of as many rows."""
        return skipped * self.row * self.heads / self.plain


@dataclass
class Record:
    """How often drafts of a kind were right, recent ones above all."""

    seen: float = 0.0
    accepted: float = 0.0

    def rate(self, prior: float) -> float:
        """Expected acceptance, where `prior` is what would be expected without any."""
        return (prior * _PRIOR_WEIGHT + self.accepted) / (_PRIOR_WEIGHT + self.seen)

    def add(self, accepted: bool) -> None:
        """Count a judged draft; older ones fade."""
        self.seen = self.seen * _MEMORY + 1
        self.accepted = self.accepted * _MEMORY + accepted


def bin_of(confidence: float) -> int:
    """Which bin a draft's confidence in [0, 1] falls into."""
    return min(int(confidence * _BINS), _BINS - 1)


def middle_of(index: int) -> float:
    """Confidence in the middle of a bin."""
    return (index + 0.5) / _BINS


class Acceptances:
    """Expected acceptance of a draft, by depth and by the drafter's own confidence in it.

    What a drafter says of itself is seldom calibrated; what became of its drafts in this text, and when the device was
    profiled, tells by how much it is off. Drafts of one confidence inform each other across depths, so that a depth
    which was never worth trying may become so.

    Attributes:
        depth: Most drafts a pass.
    """

    def __init__(self, depth: int, known: Mapping[tuple[int, int], tuple[int, int]] | None = None):
        """Begin with what is known.

        Args:
            depth: Most drafts a pass.
            known: (depth, bin) -> drafts seen before and those accepted.
        """
        self.depth = depth
        known = known or {}
        self._kinds = {(i, b): Record() for i in range(1, depth + 1) for b in range(_BINS)}
        self._bins = [Record() for _ in range(_BINS)]
        self._depths = [Record() for _ in range(depth)]
        self._of_bins = [
            _known_rate(middle_of(b), [n for (_, at), n in known.items() if at == b]) for b in range(_BINS)
        ]
        self._of_depths = [
            _known_rate(_ACCEPTED, [n for (at, _), n in known.items() if at == i + 1]) for i in range(depth)
        ]

    def of(self, depth: int, confidence: float) -> float:
        """Of a draft of this confidence at this depth, given that those before it are right."""
        index = bin_of(confidence)
        # A kind never tried is hoped to be half as good as the others, or it never would be.
        prior = max(self._of_bins[index], (self._of_bins[index] + self.usual(depth)) / 2)
        return self._kinds[depth, index].rate(self._bins[index].rate(prior))

    def usual(self, depth: int) -> float:
        """Of any draft at this depth, given that those before it are right."""
        return self._depths[depth - 1].rate(self._of_depths[depth - 1])

    def add(self, confidences: Sequence[float], accepted: int) -> None:
        """Count judged drafts: the first `accepted` were right, the next was not, of the others nothing is known."""
        for depth, confidence in enumerate(confidences[: accepted + 1], 1):
            index = bin_of(confidence)
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


def _known_rate(assumed: float, counts: Sequence[tuple[int, int]]) -> float:
    """Acceptance of a kind of drafts, where `assumed` is what one would think without counts of seen and accepted."""
    seen, accepted = (sum(count[i] for count in counts) for i in (0, 1))
    return (assumed * _PRIOR_WEIGHT + accepted) / (_PRIOR_WEIGHT + seen)


class Planner:
    """Decides, for one text, whether a pass is to yield drafts and how many of them the next is to be fed.

    Attributes:
        drafting: Whether the next pass is to yield drafts.
        acceptances: What is expected of them.
    """

    def __init__(self, costs: Costs, acceptances: Acceptances, look_ahead: int = 0):
        """Start from what is known of device and drafter.

        Args:
            costs: Of the device.
            acceptances: Of the drafter; added to.
            look_ahead: Rows that a pass has to be fed for the sake of drafts; 0 where further heads yield them.
        """
        self.acceptances = acceptances
        self._costs = costs
        self._look_ahead = look_ahead
        self._depth = acceptances.depth
        self._looks = 0
        self._patience = 1
        self._turn_to(0)
        # Rate ρ and gain of drafting, as if every draft were as usual: the best number of them, always.
        usual = [math.prod(acceptances.usual(i) for i in range(1, d + 1)) for d in range(1, self._depth + 1)]
        expected = [1.0 + sum(usual[:d]) for d in range(self._depth + 1)]
        best = max(range(self._depth + 1), key=lambda d: expected[d] / self._cost_on[d])
        self._tokens, self._time = expected[best], self._cost_on[best]
        self._gain = expected[best] - 1 - self.rate * (self._cost_on[best] - self._cost_on[0])
        self.drafting = self._pays()
        self._waited = 0

    @property
    def rate(self) -> float:
        """Tokens a millisecond: of drafting as it went lately, or of plain decoding, whichever is more."""
        return max(self._tokens / self._time, 1.0 / self._cost_off[0])

    def worth(self, confidences: Sequence[float]) -> bool:
        """Whether one more draft is worth its cost.

        Called before the draft is drawn, so that which drafts are made does not depend on what they turn out to be:
        verification relies on that.

        Args:
            confidences: Of the drafts there are, and then of the one in question.
        """
        acceptances, rate, depth = self.acceptances, self.rate, len(confidences)
        certain = 1.0
        for i, confidence in enumerate(confidences, 1):
            certain *= acceptances.of(i, confidence)
        gained, before = 0.0, self._cost_on[depth - 1]
        for d in range(depth, self._depth + 1):  # perhaps only further drafts make it worth while
            certain *= acceptances.usual(d) if d > depth else 1.0
            gained += certain
            if gained > rate * (self._cost_on[d] - before):
                return True
        return False

    def wait(self) -> bool:
        """After a pass that was not to yield drafts; returns whether the next is to."""
        self._waited += 1
        self.drafting = self._waited >= self._patience
        return self.drafting

    def plan(self, confidences: Sequence[float], past: int) -> None:
        """After a pass that was to yield drafts, decide about the next.

        Args:
            confidences: Of the drafts that it will be fed.
            past: Positions that it will find in the cache.
        """
        if past // _PAST_STEP != self._block:
            self._turn_to(past)
        expected = certain = 1.0
        for depth, confidence in enumerate(confidences, 1):
            certain *= self.acceptances.of(depth, confidence)
            expected += certain
        cost = self._cost_on[len(confidences)]
        gain = expected - 1 - self.rate * (cost - self._cost_on[0])
        self._looks += 1
        if self._waited:
            self.acceptances.fade(_FADE_OF_A_LOOK)
        elif self._looks % _FADE_EVERY == 0:
            self.acceptances.fade(_FADE)
        weight = max(1 - _RECENT, 1 / (_FIRST_PASSES + self._looks))
        self._gain += (0.5 if self._waited else weight) * (gain - self._gain)  # the last look may be long ago
        steady = max(1 - _STEADY, 1 / (_FIRST_PASSES + self._looks))
        self._tokens += steady * (expected - self._tokens)
        self._time += steady * (cost - self._time)
        self.drafting = self._pays()
        self._waited = 0
        if not self.drafting:
            self._patience = self._wait()

    def _pays(self) -> bool:
        """Whether having drafts gains more than yielding them costs."""
        return self._gain > self.rate * (self._cost_on[0] - self._cost_off[0])

    def _wait(self) -> int:
        """Plain tokens before the next look at what drafting would gain, which is not to cost much of their time."""
        waiting = 1
        plain, look = self._cost_off[0], self._cost_on[0] - self._cost_off[0]
        while look + self._costs.resume(waiting) > _EXPLORATION * plain * waiting and waiting < _LONGEST_WAIT:
            waiting *= 2
        return waiting

    def _turn_to(self, past: int) -> None:
        """Look up what passes cost behind about so many positions, with 0, 1, … drafts."""
        self._block = past // _PAST_STEP
        past = self._block * _PAST_STEP  # so that the same costs are looked up for every text
        costs, ahead = self._costs, self._look_ahead

        def cost(drafts: int, drafting: bool) -> float:
            rows = 1 + drafts + (ahead if drafting else 0)
            return costs.step(rows, drafting and not ahead, past) + costs.overhead + costs.drafting * drafts

        self._cost_on, self._cost_off = ([cost(d, on) for d in range(self._depth + 1)] for on in (True, False))
        self._patience = self._wait()
