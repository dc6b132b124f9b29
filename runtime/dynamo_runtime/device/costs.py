"""What passes cost on a device: as a profile measured it, or by rules of thumb where none was taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ..bundle import Bundle
from .acceptance import Acceptances, Counts, bin_of
from .profile import Profile
from .tuning import DEFAULT, Tuning

Points = Sequence[tuple[float, float]]
"""(x, milliseconds), ascending in x."""


class Costs(Protocol):
    """What things cost on a device, in milliseconds."""

    @property
    def drafting(self) -> float:
        """A draft, outside the pass: proposing and judging it."""

    @property
    def overhead(self) -> float:
        """A plain token, outside the pass."""

    def step(self, rows: int, with_heads: bool, past: int) -> float:
        """A pass over `rows` tokens behind `past` others, with or without further heads."""

    def resume(self, skipped: int) -> float:
        """What the first pass with heads costs more after `skipped` positions without."""


class Curve:
    """Costs as they were measured, interpolated linearly, and beyond the last measurement continued."""

    def __init__(
        self,
        passes: Mapping[tuple[bool, int], Points],
        resumes: Points = (),
        drafting: float = 0.0,
        overhead: float = 0.0,
    ):
        """Take what was measured.

        Args:
            passes: (with heads, past) -> (rows, milliseconds).
            resumes: (positions skipped, milliseconds).
            drafting: Milliseconds for every draft, outside the pass.
            overhead: Milliseconds for every plain token, outside the pass.
        """
        self.drafting, self.overhead = drafting, overhead
        self._by_past = {
            with_heads: sorted((past, points) for (heads, past), points in passes.items() if heads == with_heads)
            for with_heads in (False, True)
        }
        self._resumes = [(0.0, 0.0), *resumes]
        self._steps: dict[tuple[int, bool, int], float] = {}

    @staticmethod
    def of(profile: Profile) -> Curve:
        """The medians of a profile."""
        found: dict[tuple[bool, int], dict[float, float]] = {}  # one time for every number of rows
        for each in profile.passes:
            found.setdefault((each.heads, each.past), {})[float(each.rows)] = each.time.p50
        for (_, past), times in list(found.items()):  # a bundle without further heads
            found.setdefault((True, past), times)
        passes = {key: sorted(times.items()) for key, times in found.items()}
        resumes = {float(each.skipped): each.extra for each in profile.resume if each.skipped > 0}
        return Curve(passes, sorted(resumes.items()), profile.drafting, profile.overhead)

    def step(self, rows: int, with_heads: bool, past: int) -> float:
        """See `Costs`."""
        found = self._steps.get((rows, with_heads, past))
        if found is None:
            points = [(float(at), _interpolated(costs, rows)) for at, costs in self._by_past[with_heads]]
            found = self._steps[rows, with_heads, past] = _interpolated(points, past)
        return found

    def resume(self, skipped: int) -> float:
        """See `Costs`."""
        return max(_interpolated(self._resumes, skipped), 0.0)


@dataclass(frozen=True)
class Prior:
    """Costs of a device that has not been measured: a pass takes as long as reading its weights usually does.

    Attributes:
        plain_ms: A pass over one token without heads.
        heads_ms: What further heads add.
        row_ms: What one more row adds.
        drafting: See `Costs`.
        overhead: See `Costs`.
    """

    plain_ms: float
    heads_ms: float
    row_ms: float
    drafting: float = DEFAULT.drafting_ms
    overhead: float = DEFAULT.overhead_ms

    @staticmethod
    def of(bundle: Bundle, tuning: Tuning = DEFAULT) -> Prior:
        """By the size of the bundle's graph and its precision."""
        whole_ms = (bundle.graph_bytes or 1 << 20) / tuning.bytes_per_ms
        heads_ms = whole_ms * bundle.topology.weight_layers / (bundle.kv_layers + 1)
        plain_ms = whole_ms - heads_ms
        row_ms = plain_ms * tuning.row_share.get(bundle.precision, tuning.other_row_share)
        return Prior(plain_ms, heads_ms, row_ms, tuning.drafting_ms, tuning.overhead_ms)

    def step(self, rows: int, with_heads: bool, past: int) -> float:
        """See `Costs`; the past is taken for short."""
        whole = 1 + with_heads * self.heads_ms / self.plain_ms
        return whole * (self.plain_ms + (rows - 1) * self.row_ms)

    def resume(self, skipped: int) -> float:
        """See `Costs`: the heads' share of as many rows."""
        return skipped * self.row_ms * self.heads_ms / self.plain_ms


class Knowledge(NamedTuple):
    """What is known of a device before a text begins.

    Attributes:
        costs: Of passes.
        drafts: What became of drafts where a sampled token decides (False), and where the most probable one does.
    """

    costs: Costs
    drafts: Mapping[bool, Counts]

    def acceptances(self, depth: int, temperature: float, tuning: Tuning = DEFAULT) -> Acceptances:
        """What is expected of up to `depth` drafts when decoding at a temperature."""
        return Acceptances(depth, self.drafts.get(temperature < tuning.nearly_greedy, {}), tuning)

    @staticmethod
    def of(bundle: Bundle, profile: Profile | None) -> Knowledge:
        """From a profile, or else by rules of thumb."""
        if profile is None:
            return Knowledge(Prior.of(bundle), {})
        drafts: dict[bool, dict[tuple[int, int], tuple[int, int]]] = {False: {}, True: {}}
        for each in profile.acceptance:
            drafts[each.greedy][each.depth, bin_of(each.confidence)] = each.seen, each.accepted
        return Knowledge(Curve.of(profile), drafts)


def _interpolated(points: Points, x: float) -> float:
    """A piecewise linear function through ascending points, continued at both ends; constant through a single one."""
    if len(points) == 1:
        return points[0][1]
    i = next((i for i in range(1, len(points) - 1) if x <= points[i][0]), len(points) - 1)
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
