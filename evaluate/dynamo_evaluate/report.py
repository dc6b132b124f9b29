"""Results as tables and JSON."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from dynamo_runtime.errors import printable
from dynamo_runtime.interval import Interval
from dynamo_runtime.tables import MISSING, WIDTH, Table, in_markdown, percent
from dynamo_runtime.tables import interval as with_ends

from .bootstrap import SameQuality, widening
from .cells import AXES, MEASURES, SPEED, TOKENS_PER_PASS, VERDICTS, WIN_RATE
from .results import machine_line
from .settings import PLAIN
from .summary import ALL, Outcome, Summary, fastest_inside, variants

INSIDE = "✓"
ENOUGH_SEEDS = 5  # with fewer a warning is in order
_LABELS = MEASURES | {ALL: "all of these"}


def tables(summary: Summary) -> list[Table]:
    """Return every table that has something in it."""
    names = variants(summary)
    found = [_settings(summary, variant) for variant in names]
    alone = [outcome for outcome in summary.outcomes.values() if not outcome.setting["variant"]]
    if len(alone) > 1 or not found:
        found.append(_outcomes(summary, "Settings of their own", alone))
    found += [_same(summary, variant) for variant in names if summary.curves[variant, SPEED]]
    found += [_steps(summary), _verdicts(summary)]
    return [table for table in found if table.rows]


def conditions(summary: Summary) -> str:
    """Return what it was run on, in one paragraph."""
    header = summary.header
    sampling, seeds = header["sampling"], header["seeds"]
    finished = "" if summary.prompts == summary.wanted else f" of {summary.wanted} (the run is not finished)"
    said = (
        f"{_bundle(header['bundle'])} against {_bundle(header['plain'])}, which decodes {summary.plain_speed:,.0f} "
        f"tokens/s; {summary.prompts} prompts{finished} ({header['prompts']['source']}) × {seeds} seeds × up to "
        f"{header['max_new_tokens']} tokens, temperature {sampling['temperature']:g}, top-k {sampling['top_k']}, "
        f"repetition penalty {sampling['repetition_penalty']:g}. {machine_line(header['machine'])}. Brackets hold 95 % "
        f"intervals, of plain where one more seed's mean would lie; {INSIDE} marks what is inside that."
    )
    if seeds < ENOUGH_SEEDS:
        said += (
            f" With {seeds} seeds that is {widening(seeds):.1f} times as wide as with many, so nearly everything looks "
            "like plain: give more seeds."
        )
    return said


def text(made: Sequence[Table], where: str) -> str:
    """Return tables and conditions for a terminal."""
    return "\n\n".join([*(table.text() for table in made), textwrap.fill(printable(where), WIDTH)])


def markdown(made: Sequence[Table], where: str) -> str:
    """Return the same as Markdown."""
    return "\n\n".join([*(table.markdown() for table in made), in_markdown(where)]) + "\n"


def as_json(summary: Summary) -> dict[str, Any]:
    """Return all of it as JSON values; texts stay in the results."""
    header = {name: value for name, value in summary.header.items() if name not in ("texts", "settings")}
    return {
        **header,
        "finished": {"prompts": summary.prompts, "of": summary.wanted},
        "plain_tokens_per_s": _rounded(summary.plain_speed),
        "plain_spread": {name: _ends(*ends) for name, ends in summary.plain.items()},
        "outcomes": {name: _outcome(outcome) for name, outcome in summary.outcomes.items()},
        "curves": [
            {
                "variant": variant,
                "axis": axis,
                "measure": measure,
                "coefficients": [_rounded(float(c)) for c in curve.polynomial.convert().coef],
                "from": _rounded(curve.places[0]),
                "to": _rounded(curve.places[-1]),
            }
            for (variant, axis), curves in summary.curves.items()
            for measure, curve in curves.items()
        ],
        "same_quality": [
            {"variant": variant, "axis": axis, "measure": measure, **_same_json(found)}
            for (variant, axis), by_measure in summary.same.items()
            for measure, found in by_measure.items()
        ],
    }


def _settings(summary: Summary, variant: str) -> Table:
    members = [outcome for outcome in summary.outcomes.values() if outcome.setting["variant"] == variant]
    return _outcomes(summary, f"{variant}, by back-off threshold", [summary.outcomes[PLAIN], *members])


def _outcomes(summary: Summary, title: str, outcomes: list[Outcome]) -> Table:
    names = list(summary.plain)
    rows = []
    for outcome in outcomes:
        threshold = outcome.setting["threshold"]
        row = [outcome.setting["name"] if threshold is None else f"ε_b {threshold:g}"]
        row += [f"{outcome.tokens_per_pass.value:.2f}", with_ends(outcome.speed)]
        row += [_quality(summary, outcome, name) for name in names]
        rows.append(row)
    return Table(title, ["setting", "tokens/pass", AXES[SPEED], *(MEASURES[name] for name in names)], rows)


def _quality(summary: Summary, outcome: Outcome, name: str) -> str:
    if name not in outcome.measures:
        return MISSING
    value = outcome.measures[name]
    if not math.isfinite(value.value):
        return MISSING
    if outcome.setting["name"] == PLAIN:
        low, high = summary.plain[name]
        return f"{value.value:.3f} [{low:.3f}, {high:.3f}]"
    return f"{value.value:.3f}" + (f" {INSIDE}" if outcome.inside[name] else "")


def _same(summary: Summary, variant: str) -> Table:
    rows = []
    for measure, found in summary.same[variant, SPEED].items():
        fastest = fastest_inside(summary, variant, measure)
        measured = MISSING
        if fastest is not None:
            measured = f"{fastest.speed.value:.2f} at ε_b {fastest.setting['threshold']:g}"
        rows.append(
            [
                _LABELS[measure],
                _same_cell(found),
                _same_cell(summary.same[variant, TOKENS_PER_PASS][measure]),
                measured,
            ]
        )
    return Table(
        f"{variant}: same-quality speed-up, the largest at which the regression is inside plain's own spread "
        "(win rate: at least 1)",
        ["measure", AXES[SPEED], AXES[TOKENS_PER_PASS], "fastest setting inside"],
        rows,
        cell_width=30,
    )


def _same_cell(found: SameQuality) -> str:
    if math.isnan(found.speed.value):
        return "none" if found.share == 0 else f"none ({percent(found.share)} of resamples have one)"
    partly = "" if found.share >= 0.995 else f" ({percent(found.share)} of resamples)"
    return with_ends(found.speed) + partly


def _steps(summary: Summary) -> Table:
    sizes = sorted({size for outcome in summary.outcomes.values() for size in outcome.steps})
    rows = [
        [name, *(percent(outcome.steps.get(size, 0.0)) for size in sizes)]
        for name, outcome in summary.outcomes.items()
        if name != PLAIN
    ]
    columns = ["setting", *(f"{size} token{'s' * (size > 1)}" for size in sizes)]
    return Table("Share of passes by the tokens they gave", columns, rows)


def _verdicts(summary: Summary) -> Table:
    rows = [
        [name, *(with_ends(outcome.verdicts[verdict]) for verdict in VERDICTS), with_ends(outcome.measures[WIN_RATE])]
        for name, outcome in summary.outcomes.items()
        if outcome.verdicts
    ]
    return Table("A judge's verdicts against plain", ["setting", *VERDICTS, "win rate"], rows)


def _bundle(description: Mapping[str, Any]) -> str:
    return f"{description['name']} ({description['kind']}, {description['precision']})"


def _outcome(outcome: Outcome) -> dict[str, Any]:
    return {
        "setting": dict(outcome.setting),
        SPEED: _interval(outcome.speed),
        TOKENS_PER_PASS: _interval(outcome.tokens_per_pass),
        "steps": {str(size): _rounded(share) for size, share in outcome.steps.items()},
        "measures": {
            name: _interval(value) | {"inside": bool(outcome.inside[name])} for name, value in outcome.measures.items()
        },
        "verdicts": {name: _interval(value) for name, value in outcome.verdicts.items()},
    }


def _same_json(found: SameQuality) -> dict[str, Any]:
    return _interval(found.speed) | {"share_of_resamples": _rounded(found.share)}


def _interval(value: Interval) -> dict[str, float | None]:
    return {"value": _rounded(value.value), "low": _rounded(value.low), "high": _rounded(value.high)}


def _ends(low: float, high: float) -> list[float | None]:
    return [_rounded(low), _rounded(high)]


def _rounded(value: float) -> float | None:
    """Five figures; JSON has no infinity and no NaN."""
    return float(f"{value:.5g}") if math.isfinite(value) else None
