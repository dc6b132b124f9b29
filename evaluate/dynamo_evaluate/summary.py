"""What generations say: speed, quality, the curve of one against the other, and same-quality speed-ups."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynamo_runtime.interval import Interval

from .bootstrap import (
    Draws,
    Ends,
    Estimates,
    QualityCurve,
    Quotient,
    SameQuality,
    fit_curve,
    interval,
    same_quality,
    spread,
)
from .cells import AXES, MEASURES, SPEED, TOKENS_PER_PASS, WIN_RATE, Cells
from .errors import EvaluationError
from .results import Results
from .settings import PLAIN

DEGREE = 2
ALL = "all"


@dataclass(frozen=True)
class Outcome:
    """What one setting did.

    Attributes:
        setting: Its record.
        speed: Tokens a second over plain's.
        tokens_per_pass: Mean.
        steps: Share of the passes that gave 1, 2, … tokens.
        measures: Quality by the names of `MEASURES`.
        inside: Whether each is inside plain's spread.
        verdicts: Share of texts that a judge put before plain's ("win"), beside it and behind it.
    """

    setting: Mapping[str, Any]
    speed: Interval
    tokens_per_pass: Interval
    steps: Mapping[int, float]
    measures: Mapping[str, Interval]
    inside: Mapping[str, bool]
    verdicts: Mapping[str, Interval]


@dataclass(frozen=True)
class Summary:
    """The whole of it.

    Attributes:
        header: Of the results.
        prompts: Prompts that every setting has finished at every seed; only what is finished counts.
        wanted: How many there will be.
        plain_speed: Plain decoding's tokens a second.
        plain: Ends of plain decoding's quality, by measure: where the mean at one more seed would lie, or for the win
            rate, at least 1.
        outcomes: By setting; plain comes first.
        curves: By variant and axis, then by measure.
        same: Same-quality speed-ups, by variant, axis and measure, and "all" for all measures at once.
    """

    header: Mapping[str, Any]
    prompts: int
    wanted: int
    plain_speed: float
    plain: Mapping[str, tuple[float, float]]
    outcomes: Mapping[str, Outcome]
    curves: Mapping[tuple[str, str], Mapping[str, QualityCurve]]
    same: Mapping[tuple[str, str], Mapping[str, SameQuality]]


@dataclass(frozen=True)
class _Estimate:
    """A figure and its bootstrap replicates, [resamples]."""

    value: float
    replicates: np.ndarray

    @property
    def interval(self) -> Interval:
        return interval(self.value, self.replicates)


def summarize(results: Results, degree: int = DEGREE) -> Summary:
    """Work it all out.

    Args:
        results: Of `dynamo-eval generate` or `ablation`.
        degree: Of the regressions.

    Raises:
        EvaluationError: They are of something else, or no prompt is finished.
    """
    of_generations(results)
    cells = Cells(results)
    draws = Draws.make([prompt for prompt, _ in cells.units], cells.seeds)
    quotients = {name: cells.quotients(name) for name in cells.settings}
    estimates = _estimates(quotients, draws)
    ends = _ends(quotients, draws)
    outcomes = {
        setting["name"]: _outcome(setting, cells, draws, estimates[setting["name"]], ends)
        for setting in results.header["settings"]
    }
    curves, same = {}, {}
    for variant, members in _variants(outcomes.values()).items():
        for axis in AXES:
            found = {
                measure: _curve([estimates[name] for name in points], axis, measure, ends[measure], degree)
                for measure in ends
                if len(points := _with_measure(members, estimates, measure)) > 1
            }
            curves[variant, axis] = found
            same[variant, axis] = {measure: same_quality([curve]) for measure, curve in found.items()}
            # A judge may have seen only some of the settings; then there is no speed that all measures speak of.
            if found and all(_with_measure(members, estimates, measure) == members for measure in ends):
                same[variant, axis][ALL] = same_quality(list(found.values()))
    plain_ends = {measure: each.values for measure, each in ends.items()}
    speed = quotients[PLAIN][SPEED].value
    return Summary(results.header, cells.finished, cells.wanted, speed, plain_ends, outcomes, curves, same)


def _estimates(quotients: Mapping[str, Mapping[str, Quotient]], draws: Draws) -> dict[str, dict[str, _Estimate]]:
    """Return every figure of every setting; speeds are over plain's."""
    found = {
        name: {figure: _Estimate(each.value, each.replicates(draws)) for figure, each in figures.items()}
        for name, figures in quotients.items()
    }
    plain = found[PLAIN][SPEED]
    for figures in found.values():
        speed = figures[SPEED]
        figures[SPEED] = _Estimate(speed.value / plain.value, speed.replicates / plain.replicates)
    return found


def _ends(quotients: Mapping[str, Mapping[str, Quotient]], draws: Draws) -> dict[str, Ends]:
    """Return what counts as plain's quality, of every measure that plain has at all seeds, and of the win rate."""
    plain, found = quotients[PLAIN], {}
    for measure in MEASURES:
        if measure == WIN_RATE and any(WIN_RATE in figures for figures in quotients.values()):
            resamples = len(draws.prompts)
            found[measure] = Ends((1.0, np.inf), (np.ones(resamples), np.full(resamples, np.inf)))
        elif measure in plain and np.isfinite(plain[measure].by_seed()).all():
            low, high = spread(plain[measure].by_seed())
            found[measure] = Ends((float(low), float(high)), spread(plain[measure].replicates_by_seed(draws)))
    return found


def _outcome(
    setting: Mapping[str, Any],
    cells: Cells,
    draws: Draws,
    estimates: Mapping[str, _Estimate],
    ends: Mapping[str, Ends],
) -> Outcome:
    quality = {measure: estimates[measure].interval for measure in ends if measure in estimates}
    inside = {measure: ends[measure].hold(each.value) for measure, each in quality.items()}
    verdicts = cells.verdicts(setting["name"])
    return Outcome(
        setting,
        estimates[SPEED].interval,
        estimates[TOKENS_PER_PASS].interval,
        cells.steps(setting["name"]),
        quality,
        inside,
        {verdict: interval(each.value, each.replicates(draws)) for verdict, each in verdicts.items()},
    )


def _with_measure(members: Sequence[str], estimates: Mapping[str, Mapping[str, _Estimate]], measure: str) -> list[str]:
    """Return those settings that have a figure of one measure."""
    return [name for name in members if measure in estimates[name] and np.isfinite(estimates[name][measure].value)]


def _curve(points: Sequence[Mapping[str, _Estimate]], axis: str, measure: str, ends: Ends, degree: int) -> QualityCurve:
    """Return one measure of quality against speed, through some settings."""
    speed, quality = (
        Estimates(
            np.array([point[figure].value for point in points]),
            np.stack([point[figure].replicates for point in points], axis=1),
        )
        for figure in (axis, measure)
    )
    return fit_curve(speed, quality, ends, degree)


def of_generations(results: Results) -> Mapping[str, Any]:
    """Return the header of results that hold generations.

    Raises:
        EvaluationError: They hold something else.
    """
    if "settings" not in results.header:
        raise EvaluationError(f"{results.path} holds results of {results.header.get('command')}, not generations")
    return results.header


def fastest_inside(summary: Summary, variant: str, measure: str) -> Outcome | None:
    """Return a variant's fastest setting whose own figure, whatever the regression says, is in plain's spread."""
    found = [
        outcome
        for outcome in summary.outcomes.values()
        if outcome.setting["variant"] == variant and _is_inside(outcome, measure)
    ]
    return max(found, key=lambda outcome: outcome.speed.value, default=None)


def variants(summary: Summary) -> list[str]:
    """Return the names of the variants, those of a single setting, through which there is no curve, included."""
    return list(_variants(summary.outcomes.values()))


def _is_inside(outcome: Outcome, measure: str) -> bool:
    return all(outcome.inside.values()) if measure == ALL else outcome.inside.get(measure, False)


def _variants(outcomes: Iterable[Outcome]) -> dict[str, list[str]]:
    """Return the names of the settings of every variant."""
    found: dict[str, list[str]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.setting["variant"]:
            found[outcome.setting["variant"]].append(outcome.setting["name"])
    return found
