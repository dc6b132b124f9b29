"""What generations say: speed, quality, the curve of one against the other, and same-quality speed-ups."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynamo_runtime.profiling.profile import Interval

from .errors import EvaluationError
from .generate import GENERATION
from .results import Record, Results
from .settings import PLAIN
from .statistics import Curve, Draws, Quotient, SameQuality, interval, same_quality, spread, trace

SPEED, TOKENS_PER_PASS = "speed", "tokens_per_pass"
AXES = {SPEED: "tokens/s ÷ plain", TOKENS_PER_PASS: "tokens per pass"}
MAUVE, SCORE, WIN_RATE = "mauve", "score", "win_rate"
PAIR = "pair"
WORTH = {"win": 1.0, "tie": 0.5, "lose": 0.0}
VERDICTS = tuple(WORTH)
MEASURES = {
    "nll": "base NLL",
    "distinct_2": "distinct-2",
    "distinct_3": "distinct-3",
    "repetition": "repeated 4-grams",
    "parsing": "parsing lines",
    MAUVE: "MAUVE",
    SCORE: "judge's score",
    WIN_RATE: "win rate",
}
"""Measures of quality, by the names they have in results, and what people call them."""

DEGREE = 2


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
    curves: Mapping[tuple[str, str], Mapping[str, Curve]]
    same: Mapping[tuple[str, str], Mapping[str, SameQuality]]


ALL = "all"


class Cells:
    """Figures of every text, as arrays [seeds, prompts]; only prompts that are finished everywhere are in them."""

    def __init__(self, results: Results):
        """Arrange the records.

        Raises:
            EvaluationError: No prompt is finished in every setting.
        """
        header = results.header
        self.settings = [setting["name"] for setting in header["settings"]]
        self.seeds: int = header["seeds"]
        self._said: dict[tuple[str, str], list[Record]] = defaultdict(list)
        for kind in (MAUVE, SCORE, PAIR):
            for record in results.of(kind):
                self._said[kind, record["setting"]].append(record)
        self._records = {_place(record): record for record in results.of(GENERATION)}
        self.wanted = len(header["texts"])
        finished = [
            [(text["id"], turn) for turn in range(len(text["turns"]))]
            for text in header["texts"]
            if all(
                (name, text["id"], turn, seed) in self._records
                for name in self.settings
                for turn in range(len(text["turns"]))
                for seed in range(self.seeds)
            )
        ]
        self.finished = len(finished)
        self.units = [unit for turns in finished for unit in turns]
        if not self.units:
            raise EvaluationError(f"{results.path} has no prompt yet that every setting has finished at every seed")

    def array(self, setting: str, read: Any) -> np.ndarray:
        """A figure of every text of one setting, [seeds, prompts]; None becomes NaN."""
        rows = [[read(self._records[(setting, *unit, seed)]) for unit in self.units] for seed in range(self.seeds)]
        return np.array(rows, dtype=float)

    def quotients(self, setting: str) -> dict[str, Quotient]:
        """Tokens per pass, tokens per second, and every measure of quality that there is, of one setting."""
        tokens, passes, seconds = (
            self.array(setting, lambda record, name=name: record[name]) for name in ("tokens", "passes", "seconds")
        )
        found = {TOKENS_PER_PASS: Quotient(tokens, passes), SPEED: Quotient(tokens, seconds)}
        names = {name for record in self._records.values() for name in record["measures"]}
        for name in MEASURES:
            if name in names:
                values = self.array(setting, lambda record, name=name: record["measures"].get(name))
                found[name] = Quotient.mean(values)
        return found | self._judged(setting)

    def verdicts(self, setting: str) -> dict[str, Quotient]:
        """Shares of "win", "tie" and "lose" among a judge's verdicts; empty without any."""
        given = self._answers(PAIR, setting, "verdict")
        if not given:
            return {}
        return {
            verdict: Quotient.mean(self._places({place: each == verdict for place, each in given.items()}))
            for verdict in VERDICTS
        }

    def _judged(self, setting: str) -> dict[str, Quotient]:
        """Measures that judges have given since."""
        found = {}
        if records := self._said[MAUVE, setting]:
            by_seed = {record["seed"]: record["value"] for record in records}
            found[MAUVE] = Quotient.mean(np.array([[by_seed.get(seed, np.nan)] for seed in range(self.seeds)]))
        if scores := self._answers(SCORE, setting, "score"):
            found[SCORE] = Quotient.mean(self._places(scores))
        if verdicts := self._answers(PAIR, setting, "verdict"):
            for_it = self._places({place: WORTH[verdict] for place, verdict in verdicts.items()})
            known = np.isfinite(for_it)
            # Half a win and half a loss more than there were: a setting that never loses has a rate, too.
            half = np.where(known, 0.5 / max(known.sum(), 1), 0.0)
            top, bottom = np.where(known, for_it, 0.0), np.where(known, 1 - for_it, 0.0)
            found[WIN_RATE] = Quotient(top + half, bottom + half)
        return found

    def _answers(self, kind: str, setting: str, field: str) -> dict[tuple[str, int, int], Any]:
        """A judge's answers about one setting by prompt, turn and seed; those that could not be read are left out."""
        return {
            (record["prompt"], record["turn"], record["seed"]): record[field]
            for record in self._said[kind, setting]
            if record[field] is not None
        }

    def _places(self, values: Mapping[tuple[str, int, int], float]) -> np.ndarray:
        """Figures by prompt, turn and seed as an array [seeds, prompts], NaN where there is none."""
        return np.array(
            [[values.get((*unit, seed), np.nan) for unit in self.units] for seed in range(self.seeds)], float
        )

    def steps(self, setting: str) -> dict[int, float]:
        """Share of passes by the tokens they gave."""
        counts: dict[int, int] = defaultdict(int)
        for unit in self.units:
            for seed in range(self.seeds):
                for size, count in self._records[(setting, *unit, seed)]["steps"].items():
                    counts[int(size)] += count
        total = sum(counts.values())
        return {size: counts[size] / total for size in sorted(counts)}


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
    figures = {name: cells.quotients(name) for name in cells.settings}
    plain, replicates = figures[PLAIN], {}
    ends: dict[str, tuple[float, float]] = {}
    end_replicates: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    resamples = len(draws.prompts)
    for name in MEASURES:
        if name == WIN_RATE and any(WIN_RATE in found for found in figures.values()):
            ends[name] = (1.0, np.inf)
            end_replicates[name] = (np.ones(resamples), np.full(resamples, np.inf))
        elif name in plain and np.isfinite(plain[name].by_seed()).all():
            low, high = spread(plain[name].by_seed())
            ends[name] = float(low), float(high)
            end_replicates[name] = spread(plain[name].replicates_by_seed(draws))
    outcomes, values = {}, {}
    base, base_replicates = plain[SPEED].value, plain[SPEED].replicates(draws)
    for name in cells.settings:
        found = figures[name]
        values[name] = {each: quotient.value for each, quotient in found.items()}
        replicates[name] = {each: quotient.replicates(draws) for each, quotient in found.items()}
        values[name][SPEED] /= base
        replicates[name][SPEED] = replicates[name][SPEED] / base_replicates
        measured = {each: interval(values[name][each], replicates[name][each]) for each in found}
        quality = {each: measured[each] for each in ends if each in measured}
        inside = {each: ends[each][0] <= quality[each].value <= ends[each][1] for each in quality}
        setting = next(s for s in results.header["settings"] if s["name"] == name)
        verdicts = {each: interval(q.value, q.replicates(draws)) for each, q in cells.verdicts(name).items()}
        outcomes[name] = Outcome(
            setting, measured[SPEED], measured[TOKENS_PER_PASS], cells.steps(name), quality, inside, verdicts
        )
    curves, same = {}, {}
    for variant, members in _variants(outcomes.values()).items():
        with_measure = {
            measure: [name for name in members if np.isfinite(values[name].get(measure, np.nan))] for measure in ends
        }
        for axis in AXES:
            found_curves = {
                measure: trace(
                    np.array([values[name][axis] for name in points]),
                    np.array([values[name][measure] for name in points]),
                    np.stack([replicates[name][axis] for name in points], axis=1),
                    np.stack([replicates[name][measure] for name in points], axis=1),
                    ends[measure],
                    end_replicates[measure],
                    degree,
                )
                for measure, points in with_measure.items()
                if len(points) > 1
            }
            curves[variant, axis] = found_curves
            same[variant, axis] = {measure: same_quality([curve]) for measure, curve in found_curves.items()}
            if found_curves and all(points == members for points in with_measure.values()):
                same[variant, axis][ALL] = same_quality(list(found_curves.values()))
    return Summary(results.header, cells.finished, cells.wanted, base, ends, outcomes, curves, same)


def of_generations(results: Results) -> Mapping[str, Any]:
    """The header of results that hold generations.

    Raises:
        EvaluationError: They hold something else.
    """
    if "settings" not in results.header:
        raise EvaluationError(f"{results.path} holds results of {results.header.get('command')}, not generations")
    return results.header


def fastest_inside(summary: Summary, variant: str, measure: str) -> Outcome | None:
    """The fastest setting of a variant whose own figure, whatever the regression says, is inside plain's spread."""
    found = [
        outcome
        for outcome in summary.outcomes.values()
        if outcome.setting["variant"] == variant and _is_inside(outcome, measure)
    ]
    return max(found, key=lambda outcome: outcome.speed.value, default=None)


def variants(summary: Summary) -> list[str]:
    """Names of the variants, those of a single setting, through which there is no curve, included."""
    return list(_variants(summary.outcomes.values()))


def _is_inside(outcome: Outcome, measure: str) -> bool:
    return all(outcome.inside.values()) if measure == ALL else outcome.inside.get(measure, False)


def _variants(outcomes: Iterable[Outcome]) -> dict[str, list[str]]:
    """Names of the settings of every variant."""
    found: dict[str, list[str]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.setting["variant"]:
            found[outcome.setting["variant"]].append(outcome.setting["name"])
    return found


def _place(record: Record) -> tuple[str, str, int, int]:
    return record["setting"], record["prompt"], record["turn"], record["seed"]
