"""What passes cost on a device: as a profile measured it, or by rules of thumb where none was taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ..bundle import Bundle
from .acceptance import AcceptanceCounts, Acceptances, bin_of
from .profile import Profile
from .records import DrafterRuns
from .tuning import DEFAULT, Tuning

Points = Sequence[tuple[float, float]]
"""(x, milliseconds), ascending in x."""


class DrafterCosts(Protocol):
    """What drafts cost that a graph of its own makes behind a pass, in milliseconds."""

    @property
    def further(self) -> float:
        """A run for every draft that is made; 0 where one run is for all of them.

        What the first of them takes more, whose weights come from memory, is in `begin`.
        """

    def begin(self, unseen: float, past: int) -> float:
        """Return what is to be paid before any draft: layers over `unseen` positions, in a text of about `past`.

        The run is in it that is for all drafts, where there is such a one.
        """


class Costs(Protocol):
    """What things cost on a device, in milliseconds."""

    @property
    def making(self) -> DrafterCosts | None:
        """What the drafter's graph costs; None where heads are inside the base's, or there are none."""

    @property
    def drafting(self) -> float:
        """A draft, in Python: proposing and judging it."""

    @property
    def overhead(self) -> float:
        """A plain token, outside the pass."""

    def step(self, rows: int, with_heads: bool, past: int) -> float:
        """Return what a pass over `rows` tokens behind `past` others costs, with or without heads inside the base."""

    def resume(self, skipped: int) -> float:
        """Return what the first pass with such heads costs more after `skipped` positions without."""


class MeasuredDrafterCosts:
    """`DrafterCosts` as it was measured.

    How much the layers cost by the positions that they read is known behind the shortest past, and behind longer ones
    as far as positions are few: what many cost more is taken for the same there.
    """

    def __init__(self, layers: Mapping[int, Points], first: float, further: float):
        """Take what was measured.

        Args:
            layers: Past -> (positions read, milliseconds).
            first: Milliseconds of the first run that makes drafts.
            further: Of those behind it, one a draft; 0 where the first is for all drafts.
        """
        self.further, self._once = further, first - further
        self._by_past = [(float(past), points) for past, points in sorted(layers.items())]
        self._most = min(points[-1][0] for points in layers.values())

    @staticmethod
    def of(runs: DrafterRuns) -> MeasuredDrafterCosts:
        """Return the medians of a profile."""
        layers: dict[int, dict[float, float]] = {}  # one time for every number of positions
        for run in runs.layers:
            layers.setdefault(run.past, {})[float(run.positions)] = run.time.p50
        points = {past: sorted(times.items()) for past, times in layers.items()}
        conditioned = all(run.depth for run in runs.drafts)
        first, *behind = [run.time.p50 for run in runs.drafts]
        further = sum(behind) / len(behind) if behind else first
        return MeasuredDrafterCosts(points, first, further if conditioned else 0.0)

    def begin(self, unseen: float, past: int) -> float:
        """See `DrafterCosts`."""
        shortest, few = self._by_past[0][1], min(unseen, self._most)
        here = _interpolated([(at, _interpolated(points, few)) for at, points in self._by_past], past)
        return max(here + _interpolated(shortest, unseen) - _interpolated(shortest, few), 0.0) + self._once


class MeasuredCosts:
    """Costs as they were measured, interpolated linearly, and beyond the last measurement continued."""

    def __init__(
        self,
        passes: Mapping[tuple[bool, int], Points],
        resumes: Points = (),
        drafting: float = 0.0,
        overhead: float = 0.0,
        making: DrafterCosts | None = None,
    ):
        """Take what was measured.

        Args:
            passes: (with heads, past) -> (rows, milliseconds).
            resumes: (positions skipped, milliseconds).
            drafting: See `Costs`.
            overhead: See `Costs`.
            making: See `Costs`.
        """
        self.drafting, self.overhead, self.making = drafting, overhead, making
        self._by_past = {
            with_heads: sorted((past, points) for (heads, past), points in passes.items() if heads == with_heads)
            for with_heads in (False, True)
        }
        self._resumes = [(0.0, 0.0), *resumes]
        self._steps: dict[tuple[int, bool, int], float] = {}

    @staticmethod
    def of(profile: Profile) -> MeasuredCosts:
        """Return the medians of a profile."""
        found: dict[tuple[bool, int], dict[float, float]] = {}  # one time for every number of rows
        for each in profile.passes:
            found.setdefault((each.heads, each.past), {})[float(each.rows)] = each.time.p50
        for (_, past), times in list(found.items()):  # a bundle without further heads in its passes
            found.setdefault((True, past), times)
        passes = {key: sorted(times.items()) for key, times in found.items()}
        resumes = {float(each.skipped): each.extra for each in profile.resume if each.skipped > 0}
        making = None if profile.drafter is None else MeasuredDrafterCosts.of(profile.drafter)
        return MeasuredCosts(passes, sorted(resumes.items()), profile.drafting, profile.overhead, making)

    def step(self, rows: int, with_heads: bool, past: int) -> float:
        """See `Costs`."""
        found = self._steps.get((rows, with_heads, past))
        if found is None:
            points = [(float(at), _continued(costs, rows)) for at, costs in self._by_past[with_heads]]
            found = self._steps[rows, with_heads, past] = _interpolated(points, past)
        return found

    def resume(self, skipped: int) -> float:
        """See `Costs`."""
        return max(_interpolated(self._resumes, skipped), 0.0)


@dataclass(frozen=True)
class MadePrior:
    """`DrafterCosts` on a device that has not been measured.

    Attributes:
        first_ms: Layers over one position, and the run that is for all drafts, where there is such a one.
        position_ms: Layers over one more.
        further: See `DrafterCosts`.
    """

    first_ms: float
    position_ms: float
    further: float = 0.0

    @staticmethod
    def of(bundle: Bundle, tuning: Tuning = DEFAULT) -> MadePrior | None:
        """By the bytes that the drafter's graph reads, where the bundle has one; its layers are as large as the base's.

        Runs for one draft each, of heads that are told the token in front, are taken to read half of it.
        """
        if bundle.drafter is None:
            return None
        plain_ms, whole_ms = _reading_ms(bundle, tuning)
        if bundle.drafter.conditioned:
            layers_ms = whole_ms / 2
        else:
            layers_ms = min(plain_ms * bundle.topology.layers / (bundle.base_layers + 1), whole_ms)
        row_ms = layers_ms * tuning.row_share.get(bundle.precision, tuning.other_row_share)
        layers_ms, run_ms = layers_ms + tuning.run_ms, whole_ms - layers_ms + tuning.run_ms
        if bundle.drafter.conditioned:
            return MadePrior(layers_ms, row_ms, run_ms)
        return MadePrior(layers_ms + run_ms, row_ms)

    def begin(self, unseen: float, past: int) -> float:
        """See `DrafterCosts`; the past is taken for short."""
        return self.first_ms + max(unseen - 1, 0.0) * self.position_ms


@dataclass(frozen=True)
class Prior:
    """Costs of a device that has not been measured: a pass takes as long as reading its weights usually does.

    Attributes:
        plain_ms: A pass over one token without heads.
        heads_ms: What further heads inside the base's graph add.
        row_ms: What one more row adds.
        drafting: See `Costs`.
        overhead: See `Costs`.
        making: See `Costs`.
    """

    plain_ms: float
    heads_ms: float
    row_ms: float
    drafting: float = DEFAULT.drafting_ms
    overhead: float = DEFAULT.overhead_ms
    making: MadePrior | None = None

    @staticmethod
    def of(bundle: Bundle, tuning: Tuning = DEFAULT) -> Prior:
        """By the size of the bundle's graphs and its precision."""
        plain_ms, heads_ms = _reading_ms(bundle, tuning)
        row_ms = plain_ms * tuning.row_share.get(bundle.precision, tuning.other_row_share)
        inside_ms = heads_ms if bundle.drafter is None else 0.0
        return Prior(plain_ms, inside_ms, row_ms, tuning.drafting_ms, tuning.overhead_ms, MadePrior.of(bundle, tuning))

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
        widths_hold: Whether passes over several tokens say what passes over one say, as far as is known.
    """

    costs: Costs
    drafts: Mapping[bool, AcceptanceCounts]
    widths_hold: bool = True

    def acceptances(self, depth: int, temperature: float, tuning: Tuning = DEFAULT) -> Acceptances:
        """Return what is expected of up to `depth` drafts when decoding at a temperature."""
        return Acceptances(depth, self.drafts.get(temperature < tuning.nearly_greedy, {}), tuning)

    @staticmethod
    def of(bundle: Bundle, profile: Profile | None) -> Knowledge:
        """From a profile, or else by rules of thumb."""
        if profile is None:
            return Knowledge(Prior.of(bundle), {})
        drafts: dict[bool, dict[tuple[int, int], tuple[int, int]]] = {False: {}, True: {}}
        for each in profile.acceptance:
            drafts[each.greedy][each.depth, bin_of(each.confidence)] = each.seen, each.accepted
        return Knowledge(MeasuredCosts.of(profile), drafts, profile.widths is None or profile.widths.holds)


def _reading_ms(bundle: Bundle, tuning: Tuning) -> tuple[float, float]:
    """Return milliseconds to read the weights of the base, and those of what predicts further tokens."""
    if bundle.drafter is None:
        whole_ms = (bundle.graph_bytes or 1 << 20) / tuning.bytes_per_ms
        heads_ms = whole_ms * bundle.topology.weight_layers / (bundle.kv_layers + 1)
        return whole_ms - heads_ms, heads_ms
    if bundle.pass_bytes is not None:
        return bundle.pass_bytes.plain / tuning.bytes_per_ms, bundle.pass_bytes.heads / tuning.bytes_per_ms
    # By the names of the files, as weights may lie beside a graph under its name and more.
    heads = sum(record.bytes for name, record in bundle.files.items() if name.startswith(bundle.drafter.graph))
    return (bundle.graph_bytes - heads or 1 << 20) / tuning.bytes_per_ms, heads / tuning.bytes_per_ms


def _continued(points: Points, rows: float) -> float:
    """Return what so many rows cost: beyond the last measurement as much more as the second half of them says."""
    (last, most), (middle, half) = points[-1], points[len(points) // 2]
    if rows <= last or middle == last:
        return _interpolated(points, rows)
    return most + max(most - half, 0.0) / (last - middle) * (rows - last)


def _interpolated(points: Points, x: float) -> float:
    """Return a piecewise linear function through ascending points, continued at both ends.

    Through a single point it is constant.
    """
    if len(points) == 1:
        return points[0][1]
    i = next((i for i in range(1, len(points) - 1) if x <= points[i][0]), len(points) - 1)
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
