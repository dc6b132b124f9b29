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

    Heads inside the base's graph have to be asked for with the pass, so whether the next pass is to yield drafts
    is decided as soon as one has been judged. Heads with a graph of their own are run after the pass, if at all; for
    them the decision is made at the same time, as nothing that it needs is learnt in between.

    Attributes:
        drafting: Whether the next pass is to yield drafts.
        acceptances: What is expected of them.
    """

    def __init__(self, costs: Costs, acceptances: Acceptances, ask: Ask, tuning: Tuning = DEFAULT, *, most: int = 0):
        """Start from what is known of device and drafter.

        Args:
            costs: Of the device.
            acceptances: Of the drafter; added to.
            ask: What a pass has to be fed and to compute for the sake of drafts.
            tuning: How fast it learns, and how much it may try.
            most: Drafts that a pass may be fed, where others than the drafter's may be among them.
        """
        self.acceptances = acceptances
        self._costs = costs
        self._ask = ask
        self._making = costs.making if ask.heads else None
        self._tuning = tuning
        self._depth = acceptances.depth
        self._most = max(most, self._depth)
        self._drafting_passes = 0
        self._averaged: float = tuning.first_passes  # rounds that the gain is the average of
        self._made_drafts = 0  # behind this pass, whether fed or not
        self._probe_after: float = 1  # plain tokens
        self._behind = 0  # positions that heads have not seen when a stretch without them begins: at first the prompt
        self._paid = 0.0  # milliseconds of a round with drafts beyond a plain pass, until it has been judged
        self._lost = 0.0  # of them, those that gave no tokens; below 0 what drafting gave more
        self._turn_to(0)
        # Rate ρ and gain of drafting, as if every draft were as usual: the best fixed setting, always.
        usual = self._usual()
        self._tokens, self._time, beyond = max(usual, key=lambda each: each[0] / each[1])
        self._gain = self._tokens - 1 - self.rate * beyond
        self.drafting = self._pays()
        self._waited = 0

    @property
    def runs(self) -> bool:
        """Whether making drafts takes a run of its own behind the pass, which may still be left out."""
        return self._making is not None

    @property
    def rate(self) -> float:
        """Tokens a millisecond: those of recent drafting or those of plain decoding, whichever are more."""
        return max(self._tokens / self._time, 1.0 / self._cost_off[0])

    def further(self, confidences: Sequence[float]) -> bool:
        """Tell whether one draft more is worth making where every draft takes a run of its own.

        It is called before the drafter is asked about that place, so it judges by what such drafts usually turn out
        to be.

        Args:
            confidences: Of the drafts there are, which are to be fed.
        """
        if not confidences or self._making is None or not self._making.further:
            return True  # it has been decided, or costs nothing
        acceptances, rate, run = self.acceptances, self.rate, self._making.further
        depth, before = len(confidences) + 1, self._cost_on[len(confidences)]
        certain = self._certain(confidences)
        kinds = acceptances.kinds(depth)
        row = rate * (self._cost_on[depth] - before)
        if sum(share * max(certain * right - row, 0.0) for share, right in kinds) > rate * run:
            return True
        gained, certain = 0.0, certain * sum(share * right for share, right in kinds)
        for d in range(depth, self._depth + 1):  # perhaps only further drafts make it worth while
            certain *= acceptances.usual(d) if d > depth else 1.0
            gained += certain
            if gained > rate * (self._cost_on[d] - before + run * (d - depth + 1)):
                return True
        return False

    def worth(self, confidences: Sequence[float]) -> bool:
        """Tell whether one more draft is worth its cost.

        It is called before the draft is drawn. So which drafts are made does not depend on what they turn out to be,
        and verification relies on that.

        Args:
            confidences: Of the drafts there are, and then of the one in question.
        """
        acceptances, rate, depth = self.acceptances, self.rate, len(confidences)
        acceptances.observe(depth, confidences[-1])
        self._made_drafts = depth
        run = self._making.further if self._making else 0.0
        certain = self._certain(confidences)
        gained, before = 0.0, self._cost_on[depth - 1]
        for d in range(depth, max(self._depth, depth) + 1):  # perhaps only further drafts make it worth while
            certain *= acceptances.usual(d) if d > depth else 1.0
            gained += certain
            if gained > rate * (self._cost_on[d] - before + run * (d - depth)):
                return True
        return False

    def wait(self, past: int) -> None:
        """Decide whether the next pass is to yield drafts, after one that was not to.

        Args:
            past: Positions that it will find in the cache.
        """
        if not self._drafting_passes and not self._waited:
            self._behind = past
            self._turn_to(past)
        self._waited += 1
        self.drafting = self._waited >= self._probe_after

    def judged(self, confidences: Sequence[float], accepted: int) -> None:
        """Learn what became of the drafts of a pass, whoever made them, and settle what they cost.

        Args:
            confidences: Of the drafts.
            accepted: Those of them that stand.
        """
        if confidences:
            self.acceptances.add(confidences, accepted)
        if self._paid:
            plain = self._cost_off[0]
            self._lost = max(self._lost + self._paid - accepted * plain, -self._tuning.savings * plain)
            self._paid = 0.0

    def plan(self, confidences: Sequence[float], past: int, instead: float = 0.0) -> None:
        """After a pass that was to yield drafts, decide about the next.

        Args:
            confidences: Of the drafts that it will be fed.
            past: Positions that it will find in the cache.
            instead: Tokens that were to be gained without the drafter.
        """
        if past // self._tuning.past_step != self._block:
            self._turn_to(past)
        expected = certain = 1.0
        for depth, confidence in enumerate(confidences, 1):
            certain *= self.acceptances.of(depth, confidence)
            expected += certain
        made, self._made_drafts = max(self._made_drafts, 1), 0
        cost = self._cost_on[len(confidences)] + self._made(made, self._tokens)
        gain = expected - 1 - self.rate * (cost - self._cost_of_probe(self._tokens)) - instead
        self._drafting_passes += 1
        if self._waited:
            self.acceptances.fade(self._tuning.fade_at_probe)
        elif self._drafting_passes % self._tuning.fade_every == 0:
            self.acceptances.fade(self._tuning.fade)
        # The last probe may be long ago; by itself this one tells little, so those behind it soon count as much.
        self._averaged = 1 / self._tuning.probe_weight if self._waited else self._averaged + 1
        self._gain += max(1 - self._tuning.recent, 1 / self._averaged) * (gain - self._gain)
        steady = max(1 - self._tuning.steady, 1 / (self._tuning.first_passes + self._drafting_passes))
        self._tokens += steady * (expected - self._tokens)
        self._time += steady * (cost - self._time)
        self.drafting = self._goes_on()
        self._paid = cost - (1 - instead) * self._cost_off[0]
        self._waited = self._behind = 0
        if not self.drafting:
            self._probe_after = self._wait()

    def _goes_on(self) -> bool:
        """Tell whether to draft again.

        What drafts gain varies from round to round, and coming back costs a wait and a probe: drafting that has paid,
        or just begun, is given up when it has lost some time, and not by a few bad rounds. What counts as lost is what
        the drafts did not give, not what was expected of them: as long as little is known, that is hope. Where there
        would be no further probe, though, it is given up by what is expected alone. A probe has to convince.
        """
        pays = self._pays()
        if self._waited:
            self._lost = 0.0
            return pays
        if pays and math.isinf(self._wait()):
            return True
        return self._lost < (self._tuning.doubt if pays else self._tuning.trial) * self._cost_off[0]

    def _usual(self) -> list[tuple[float, float, float]]:
        """Return tokens and milliseconds a round of fixed settings by what is known, and those of them beyond a probe.

        The settings: so many drafts, or fewer as soon as one's confidence is below a bin. What drafters say of their
        drafts is gone by only where it is known what became of such drafts.
        """
        kinds_at = [self.acceptances.kinds(depth) for depth in range(1, self._depth + 1)]
        found = [(1.0, self._cost_on[0] + self._made(1, 1.0), 0.0)]
        for least in range(self._tuning.bins) if self.acceptances.known else (0,):
            reached = certain = tokens = 1.0
            beyond = 0.0
            for depth, kinds in enumerate(kinds_at, 1):
                kept = sum(share for share, _ in kinds[least:])
                right = sum(share * rate for share, rate in kinds[least:]) / kept if kept else 0.0
                if not self.acceptances.known:
                    right = self.acceptances.usual(depth)
                if depth > 1 and self._making:
                    beyond += reached * self._making.further
                reached *= kept
                certain *= right
                tokens += reached * certain
                beyond += reached * (self._cost_on[depth] - self._cost_on[depth - 1])
                found.append((tokens, self._cost_of_probe(tokens) + beyond, beyond))
        return found

    def _certain(self, confidences: Sequence[float]) -> float:
        """Return how likely all of the drafts of these confidences are right."""
        return math.prod(self.acceptances.of(depth, confidence) for depth, confidence in enumerate(confidences, 1))

    def _made(self, drafts: int, unseen: float) -> float:
        """Return milliseconds of the drafter's graph in a round, for so many drafts that were made.

        Args:
            drafts: One or more.
            unseen: Positions that its layers have to read first.
        """
        making = self._making
        return 0.0 if making is None else making.begin(unseen, self._past) + making.further * drafts

    def _cost_of_probe(self, unseen: float) -> float:
        """Return milliseconds of a round that yields drafts and is fed none; argument of `_made`."""
        return self._cost_on[0] + self._made(1, unseen)

    def _pays(self) -> bool:
        """Tell whether having drafts gains more than yielding them costs."""
        return self._gain > self.rate * (self._cost_of_probe(self._tokens) - self._cost_off[0])

    def _wait(self) -> float:
        """Plain tokens before the next probe of what drafting would gain, which is not to cost much of their time.

        Infinite if that costs too much however long the wait is.
        """
        plain, longest, waiting = self._cost_off[0], self._tuning.longest_wait, 1
        while waiting < longest and self._cost_of_probe_after(waiting) > self._tuning.exploration * plain * waiting:
            waiting *= 2
        most = self._tuning.costliest_probe * plain * waiting
        return waiting if self._cost_of_probe_after(waiting) <= most else math.inf

    def _cost_of_probe_after(self, waiting: int) -> float:
        """Return milliseconds of a probe behind so many plain tokens, beyond what the pass costs anyway."""
        skipped = self._behind + waiting
        resuming = self._costs.resume(skipped) if self._ask.heads and self._making is None else 0.0
        return self._cost_of_probe(skipped + 1) - self._cost_off[0] + resuming

    def _turn_to(self, past: int) -> None:
        """Look up what passes cost behind about so many positions, with 0, 1, … drafts."""
        self._block = past // self._tuning.past_step
        # The same costs are looked up for every text.
        self._past = past = self._block * self._tuning.past_step
        costs, ask, inside = self._costs, self._ask, self._ask.heads and self._making is None

        def cost(drafts: int, drafting: bool) -> float:
            rows = 1 + drafts + (len(ask.look_ahead) if drafting else 0)
            return costs.step(rows, drafting and inside, past) + costs.overhead + costs.drafting * drafts

        self._cost_on, self._cost_off = ([cost(d, on) for d in range(self._most + 1)] for on in (True, False))
        self._probe_after = self._wait()


def threshold_for(profile: Profile | None, target: float) -> float:
    """Return the ε_b at which `dynamo` was so many times as fast as plain decoding, or a little more.

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
