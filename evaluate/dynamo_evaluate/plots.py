"""Plots of a summary, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import EvaluationError
from .summary import AXES, MEASURES, SPEED, Outcome, Summary, variants

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")
BLUE, GREY, RED = "#2563a8", "#8a8f98", "#b3372e"
STEP_COLOURS = ("#c6dbef", "#6baed6", "#2171b5", "#08306b", "#041c3d")
# Okabe and Ito's colours, which people with any colour vision tell apart.
VARIANT_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8a8f98", "#7b5ea7")
MARKERS = "osD^vPX*h"
PANEL = (4.2, 3.2)  # inches


def draw(summary: Summary, folder: Path) -> list[Path]:
    """Draw what there is: the curve of every variant, all variants together, and the steps.

    Args:
        summary: Of the results.
        folder: Where the files go; it is made.

    Returns:
        The files.

    Raises:
        EvaluationError: matplotlib is not there, or the folder cannot be written.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
    except ImportError:
        raise EvaluationError("plots need matplotlib: pip install 'dynamo-edge[eval]'") from None
    matplotlib.rcParams.update(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "svg.fonttype": "none",
            "svg.hashsalt": "0",
        }
    )
    figures: dict[str, Figure] = {}
    names = [name for name in variants(summary) if summary.curves[name, SPEED]]
    if len(names) == 1:
        figures["curve"] = _curve(summary, names[0])
        figures["steps"] = _steps(summary, names[0])
    elif names:
        figures["variants"] = _compared(summary, names)
    return [path for name, figure in figures.items() for path in _save(figure, folder / name)]


def _curve(summary: Summary, variant: str) -> Figure:
    """Quality against speed, a panel a measure: settings, regression with its band, and plain's spread."""
    curves = summary.curves[variant, SPEED]
    figure, panels = _panels(len(curves))
    members = _members(summary, variant)
    for axes, (measure, curve) in zip(panels, curves.items(), strict=True):
        low, high = summary.plain[measure]
        axes.axhspan(
            low, high if np.isfinite(high) else 1e6, color=GREY, alpha=0.25, lw=0, label="plain, one more seed"
        )
        axes.fill_between(curve.places, curve.low, curve.high, color=BLUE, alpha=0.2, lw=0)
        axes.plot(curve.places, curve.fitted, color=BLUE, lw=1.5, label="regression, 95 % band")
        points = [outcome for outcome in members if measure in outcome.measures]
        _points(axes, points, measure, BLUE, "o")
        for outcome in points[:: max(1, len(points) // 6)]:
            place = outcome.speed.value, outcome.measures[measure].value
            axes.annotate(
                f"{outcome.setting['threshold']:g}", place, textcoords="offset points", xytext=(4, 4), fontsize=7
            )
        same = summary.same[variant, SPEED][measure].speed
        if np.isfinite(same.value):
            axes.axvline(same.value, color=RED, lw=1, ls="--", label=f"same quality: {same.value:.2f}×")
            axes.axvspan(same.low, same.high, color=RED, alpha=0.08, lw=0)
        _frame(axes, [curve.low.min(), curve.high.max(), low, high, *_extent(points, measure)])
        axes.set(xlabel=AXES[SPEED], ylabel=MEASURES[measure])
        axes.legend(frameon=False, fontsize=7)
    figure.suptitle(f"{summary.header['bundle']['name']}: quality against speed; numbers are ε_b", fontsize=10)
    return figure


def _compared(summary: Summary, names: Sequence[str]) -> Figure:
    """All variants in one panel a measure, their settings joined in the order of ε_b."""
    measures = [measure for measure in MEASURES if measure in summary.curves[names[0], SPEED]]
    figure, panels = _panels(len(measures), legend=True)
    handles: dict[str, Any] = {}
    for axes, measure in zip(panels, measures, strict=True):
        low, high = summary.plain[measure]
        shade = axes.axhspan(low, high if np.isfinite(high) else 1e6, color=GREY, alpha=0.25, lw=0)
        handles["plain, one more seed"] = shade
        extent = [low, high]
        for name, colour, marker in zip(names, VARIANT_COLOURS, MARKERS, strict=False):
            points = [outcome for outcome in _members(summary, name) if measure in outcome.measures]
            speeds = [outcome.speed.value for outcome in points]
            values = [outcome.measures[measure].value for outcome in points]
            (handles[name],) = axes.plot(speeds, values, color=colour, marker=marker, ms=4, lw=1)
            extent += values
        _frame(axes, extent)
        axes.set(xlabel=AXES[SPEED], ylabel=MEASURES[measure])
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    title = f"{summary.header['bundle']['name']}: every variant at every ε_b"
    figure.suptitle(title, fontsize=10)
    return figure


def _steps(summary: Summary, variant: str) -> Figure:
    """Share of passes that gave 1, 2, … tokens against ε_b, and tokens per pass."""
    figure, (axes,) = _panels(1)
    members = _members(summary, variant)
    thresholds = [outcome.setting["threshold"] for outcome in members]
    sizes = sorted({size for outcome in members for size in outcome.steps})
    shares = [[outcome.steps.get(size, 0.0) for outcome in members] for size in sizes]
    labels = [f"{size} token{'s' * (size > 1)}" for size in sizes]
    axes.stackplot(thresholds, shares, labels=labels, colors=STEP_COLOURS)
    axes.set(xlabel="ε_b", ylabel="share of passes", ylim=(0, 1), xlim=(min(thresholds), max(thresholds)))
    twin = axes.twinx()
    twin.spines["right"].set_visible(True)
    twin.plot(thresholds, [outcome.tokens_per_pass.value for outcome in members], color=RED, marker="o", ms=3, lw=1.5)
    twin.set_ylim(1, max(sizes))
    twin.set_ylabel("tokens per pass", color=RED)
    axes.legend(loc="lower left", fontsize=7)
    return figure


def _panels(count: int, legend: bool = False) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows + 0.6 * legend), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[count:]:
        axes.set_axis_off()
    return figure, panels[:count]


def _points(axes: Axes, outcomes: Sequence[Outcome], measure: str, colour: str, marker: str) -> None:
    quality = [outcome.measures[measure] for outcome in outcomes]
    speeds = [outcome.speed for outcome in outcomes]
    axes.errorbar(
        [speed.value for speed in speeds],
        [value.value for value in quality],
        xerr=_reach(speeds),
        yerr=_reach(quality),
        fmt=marker,
        ms=3.5,
        color=colour,
        ecolor=colour,
        elinewidth=0.6,
        alpha=0.8,
    )


def _reach(values: Sequence[Any]) -> np.ndarray:
    """How far intervals go below and above their estimates, [2, values]."""
    below = [max(0.0, value.value - value.low) for value in values]
    return np.array([below, [max(0.0, value.high - value.value) for value in values]])


def _extent(outcomes: Sequence[Outcome], measure: str) -> list[float]:
    return [end for outcome in outcomes for end in (outcome.measures[measure].low, outcome.measures[measure].high)]


def _frame(axes: Axes, values: Sequence[float]) -> None:
    """Room for what is finite, and a little more."""
    known = [value for value in values if np.isfinite(value)]
    margin = 0.06 * (max(known) - min(known) or 1)
    axes.set_ylim(min(known) - margin, max(known) + margin)


def _members(summary: Summary, variant: str) -> list[Outcome]:
    found = [outcome for outcome in summary.outcomes.values() if outcome.setting["variant"] == variant]
    return sorted(found, key=lambda outcome: outcome.setting["threshold"])


def _save(figure: Figure, path: Path) -> list[Path]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files = [path.with_suffix(f".{name}") for name in FORMATS]
        for file in files:
            metadata: Mapping[str, Any] = {"Date": None} if file.suffix == ".svg" else {}
            figure.savefig(file, dpi=130, metadata=dict(metadata))
    except OSError as error:
        raise EvaluationError(f"cannot write plots beside {path}: {error.strerror or error}") from error
    return files
