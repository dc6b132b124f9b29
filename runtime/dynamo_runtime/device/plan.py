"""How many tokens to draft: what a pass costs on this device against what its drafts are expected to give.

Decoding maximises tokens per second, the ratio of two long-run averages. With ρ the best rate that can be had, that is
the same as maximising tokens - ρ · time in every single decision (Dinkelbach 1967), so each choice here weighs the
tokens it is expected to give against those that plain decoding, or the drafting so far, would have given meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..drafting import Ask
from ..errors import ParameterError
from .acceptance import Acceptances
from .costs import Costs
from .profile import Profile
from .tuning import DEFAULT, Tuning


class Planner:
    """Decides, for one text, whether a pass is to yield drafts and how many of them the next is to be fed.

    Attributes:
        drafting: Whether the next pass is to yield drafts.
        acceptances: What is expected of them.
    """

    def __init__(self, costs: Costs, acceptances: Acceptances, ask: Ask, tuning: Tuning = DEFAULT):
        """Start from what is known of device and drafter.

        Args:
            costs: Of the device.
            acceptances: Of the drafter; added to.
            ask: What a pass has to be fed and to compute for the sake of drafts.
            tuning: How fast it learns, and how much it may try.
        """
        self.acceptances = acceptances
        self._costs = costs
        self._ask = ask
        self._tuning = tuning
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

    def wait(self) -> None:
        """After a pass that was not to yield drafts, decide about the next."""
        self._waited += 1
        self.drafting = self._waited >= self._patience

    def plan(self, confidences: Sequence[float], past: int) -> None:
        """After a pass that was to yield drafts, decide about the next.

        Args:
            confidences: Of the drafts that it will be fed.
            past: Positions that it will find in the cache.
        """
        if past // self._tuning.past_step != self._block:
            self._turn_to(past)
        expected = certain = 1.0
        for depth, confidence in enumerate(confidences, 1):
            certain *= self.acceptances.of(depth, confidence)
            expected += certain
        cost = self._cost_on[len(confidences)]
        gain = expected - 1 - self.rate * (cost - self._cost_on[0])
        self._looks += 1
        if self._waited:
            self.acceptances.fade(self._tuning.fade_of_a_look)
        elif self._looks % self._tuning.fade_every == 0:
            self.acceptances.fade(self._tuning.fade)
        weight = max(1 - self._tuning.recent, 1 / (self._tuning.first_passes + self._looks))
        if self._waited:  # the last look may be long ago
            weight = self._tuning.recent_look
        self._gain += weight * (gain - self._gain)
        steady = max(1 - self._tuning.steady, 1 / (self._tuning.first_passes + self._looks))
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
        while waiting < self._tuning.longest_wait:
            resuming = self._costs.resume(waiting) if self._ask.heads else 0.0
            if look + resuming <= self._tuning.exploration * plain * waiting:
                break
            waiting *= 2
        return waiting

    def _turn_to(self, past: int) -> None:
        """Look up what passes cost behind about so many positions, with 0, 1, … drafts."""
        self._block = past // self._tuning.past_step
        past = self._block * self._tuning.past_step  # so that the same costs are looked up for every text
        costs, ask = self._costs, self._ask

        def cost(drafts: int, drafting: bool) -> float:
            rows = 1 + drafts + (len(ask.look_ahead) if drafting else 0)
            return costs.step(rows, drafting and ask.heads, past) + costs.overhead + costs.drafting * drafts

        self._cost_on, self._cost_off = ([cost(d, on) for d in range(self._depth + 1)] for on in (True, False))
        self._patience = self._wait()


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
